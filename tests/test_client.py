"""The object users hold: what it refuses before anything is sent, its life, and the loop that it belongs to."""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import math
import pickle
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import attrs
import pytest
from support import FailingStore, client_of, model_v
from yarl import URL

from xiling_async import (
    Client,
    ClientClosed,
    ConfigurationError,
    Failed,
    InvalidRequest,
    Limits,
    MemoryStore,
    Polling,
    PostgresStore,
    ReceiverOptions,
    Rejected,
    SQLiteStore,
    Succeeded,
    TaskFailed,
    Timeouts,
    WebhookReceiver,
    XilingError,
)
from xiling_async.models.record import JobRecord
from xiling_async.simulator import Simulator, faults

SECRET = "SECRETSECRETSECRET"


def repr_of(value: object) -> str:
    return repr(value)[:10]


# Values of every type that somebody might pass for another one.
ANY_VALUES: tuple[object, ...] = (
    0, 1, -1, 5, 1.5, math.nan, math.inf, True, False, None, "", " ", "text", "jobs.db", "https://me.example/x", b"",
    b"bytes", [], ["text"], (), {}, {"a": "b"}, {1: "b"}, {"a": 1}, {"": "b"}, {"Transfer-Encoding": "chunked"},
    {"x": "\ud800"}, {"Connection": "close"}, set(), object(), print, int, MemoryStore, WebhookReceiver, Limits,
    Limits(), Timeouts(), Polling(), URL("https://me.example"), Path("folder"), Path(__file__), __file__, "\ud800",
    "a\0b", MemoryStore(), WebhookReceiver("https://me.example/x"), 10**400, -(10**400), asyncio.sleep,
)  # fmt: skip

# What each argument takes of them. Everything else must be refused by a message that names the argument.
TAKES: dict[str, Callable[[Any], bool]] = {
    "api_key": lambda value: (
        isinstance(value, str) and value.isascii() and bool(value.strip("\0 ")) and "\0" not in value
    ),
    "base_url": lambda value: value in (None, "", " ") or str(value).startswith("https://me.example"),
    "receiver": lambda value: value is None or isinstance(value, WebhookReceiver),
    "store": lambda value: value is None or isinstance(value, MemoryStore),
    "session": lambda value: value is None,
    "limits": lambda value: isinstance(value, Limits),
    "timeouts": lambda value: isinstance(value, Timeouts),
    "polling": lambda value: isinstance(value, Polling),
    "headers": lambda value: value in (None, {}, {"a": "b"}),
    "on_uncertain": lambda value: False,
    "save_to": lambda value: value is None or value in ("text", "jobs.db", "https://me.example/x", Path("folder")),
    "allow_private": lambda value: isinstance(value, bool),
    "on_event": lambda value: value is None or value in ([], ()) or (callable(value) and value is not asyncio.sleep),
    "clock": lambda value: value is None,
}


@pytest.mark.parametrize("name", TAKES)
def test_a_wrong_argument_of_the_client_is_a_configuration_error(name: str) -> None:
    """Every argument with values of every type: it is taken, or the error names it, and nothing was sent."""
    given: dict[str, Any] = {"api_key": SECRET}
    for value in ANY_VALUES:
        try:
            accepted = bool(TAKES[name](value))
        except TypeError:  # not hashable, not comparable
            accepted = False
        if accepted:
            Client(**{**given, name: value})
            continue
        with pytest.raises(ConfigurationError) as caught:
            Client(**{**given, name: value})
        message = str(caught.value)
        assert name.replace("_", " ") in message.lower().replace("_", " "), (value, message)
        assert SECRET not in message
        assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args


def test_every_argument_of_the_client_is_in_the_generated_test() -> None:
    """A new argument without its line there is noticed."""
    arguments = Client.__init__.__annotations__.keys() - {"return"}
    assert arguments == TAKES.keys()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"store": "jobs.db"}, r'store must be a store, such as SQLiteStore\("jobs.db"\), not str'),
        ({"store": MemoryStore}, "store must be a store.*not the class MemoryStore"),
        ({"receiver": "https://me.example"}, r"receiver must be a WebhookReceiver\(.*\), not str"),
        ({"limits": {}}, r"limits must be Limits\(\.\.\.\), not dict"),
        ({"timeouts": 30}, r"timeouts must be Timeouts\(\.\.\.\), not int"),
        ({"polling": 5}, r"polling must be Polling\(\.\.\.\), not int"),
        ({"api_key": 123}, "api_key must be text, not int"),
        ({"session": 1}, "session must be an aiohttp.ClientSession, not int"),
        ({"headers": {1: "x"}}, "headers.*int"),
        ({"headers": {"": "x"}}, "headers"),
        ({"headers": {"Transfer-Encoding": "chunked"}}, "headers.*Transfer-Encoding"),
        ({"save_to": __file__}, "save_to must be a folder.*is a file"),
        ({"allow_private": "no"}, "allow_private must be True or False"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_error_says_what_to_pass(arguments: dict[str, Any], says: str) -> None:
    """Not only what is wrong, but what would be right."""
    with pytest.raises(ConfigurationError, match=says):
        Client(**{"api_key": SECRET, **arguments})


@pytest.mark.parametrize("kind", [Limits, Timeouts, Polling])
def test_wrong_settings_are_configuration_errors(kind: type[Any]) -> None:
    """Every setting with values of every type: a number that makes sense is taken, all else is refused by its name."""
    for name in attrs.fields_dict(kind):
        for value in ANY_VALUES:
            try:
                taken = getattr(kind(**{name: value}), name)
            except ConfigurationError as error:
                assert f"{kind.__name__}.{name}" in str(error)
            else:
                assert taken is None or (type(taken) in (int, float) and taken >= 0)
                assert taken is None or math.isfinite(taken) or kind is Timeouts or name == "grace"


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (WebhookReceiver, {"public_url": "https://me.example/x"}),
        (ReceiverOptions, {}),
        (MemoryStore, {}),
        (SQLiteStore, {"path": "jobs.db"}),
        (PostgresStore, {"dsn": "postgresql://db.example.com/videos"}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_a_wrong_argument_of_a_receiver_or_a_store_is_a_configuration_error(
    kind: type[Any], given: dict[str, Any]
) -> None:
    """Every argument with values of every type: it is taken, or it is a ConfigurationError that shows no secret."""
    taken: dict[str, int] = {}
    for name in inspect.signature(kind).parameters:
        if kind is SQLiteStore and name == "connect":  # for tests
            continue
        for value in ANY_VALUES:
            try:
                kind(**{**given, name: value})
                taken[name] = taken.get(name, 0) + 1
            except ConfigurationError as error:
                assert str(error) and SECRET not in str(error)
    assert {name for name, count in taken.items() if count > len(ANY_VALUES) / 2} == set(), "nothing is refused"


def test_a_client_that_could_not_be_made_has_a_repr() -> None:
    """A debugger or a traceback with locals shows it, and does not fail in turn."""
    client = Client.__new__(Client)
    with pytest.raises(ConfigurationError):
        client.__init__(on_uncertain="maybe")  # type: ignore[misc]
    assert repr(client) == "<Client, not set up>"
    assert repr(Client.__new__(Client)) == "<Client, not set up>"


# --- wrong arguments of calls ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("task_id", ["\ud800", "a\0b", "", 7, None, b"i2v", ["i2v"], "x" * 10_000])
async def test_a_task_id_that_cannot_be_one_is_refused(sim: Simulator, task_id: Any) -> None:
    """`client.job` says so at once, not at the first await."""
    async with client_of(sim) as client:
        with pytest.raises(InvalidRequest, match="task_id must be"):
            client.job(task_id)
        with pytest.raises(InvalidRequest, match="kind must be"):
            client.job("i2v-1", kind=task_id)


@pytest.mark.parametrize("key", ["\ud800", "a\0b", "", 7, b"k", ["k"]])
async def test_a_key_that_cannot_be_one_is_refused(sim: Simulator, key: Any) -> None:
    """Before anything is sent, by whichever call it comes; `find` of it finds nothing."""
    async with client_of(sim) as client:
        for call in (client.submit(model_v(), key=key), client.run(model_v(), key=key)):
            with pytest.raises(InvalidRequest, match="key must be"):
                await call
        try:
            (error,) = [done.error async for done in client.map([(key, model_v())])]
        except InvalidRequest as refused:
            error = refused
        assert isinstance(error, InvalidRequest)
        if isinstance(key, str):
            assert await client.find(key) is None
        else:
            with pytest.raises(InvalidRequest, match="find takes"):
                await client.find(key)
        assert sim.ledger.posts == []


@pytest.mark.parametrize("timeout", [-1, 0, -0.0, math.nan, -math.inf, "5", True, [], b"5", 10**400], ids=repr_of)
async def test_run_with_a_wrong_timeout_buys_nothing(sim: Simulator, timeout: Any) -> None:
    """It is refused before the POST: after it the video would be paid for and not waited for."""
    async with client_of(sim) as client:
        with pytest.raises(InvalidRequest, match=r"timeout must be .*Nothing was sent"):
            await client.run(model_v(), timeout=timeout)
        assert sim.ledger.posts == []


@pytest.mark.parametrize("timeout", [math.nan, "5", True, [], b"5", 10**400], ids=repr_of)
async def test_a_wait_with_a_wrong_timeout_is_refused(sim: Simulator, timeout: Any) -> None:
    """NaN would be a wait of no known length; the job goes on."""
    async with client_of(sim) as client:
        job = await client.submit(model_v())
        for wait in (job.result, job.outcomes):
            with pytest.raises(InvalidRequest, match="timeout must be"):
                await wait(timeout)
        assert len(await job) == 1


# --- life ------------------------------------------------------------------------------------------------------------


async def test_open_and_aclose_may_be_called_twice(sim: Simulator) -> None:
    """Start-up hooks and notebook cells: a second call of either changes nothing, also one at the same time."""
    client = client_of(sim)
    assert tuple(await asyncio.gather(client.open(), client.open())) == (client, client)
    assert await client.open() is client
    assert len(await (await client.submit(model_v()))) == 1
    await asyncio.gather(client.aclose(), client.aclose())
    await client.aclose()
    with pytest.raises(ClientClosed):
        await client.submit(model_v())
    assert len(sim.ledger.posts) == 1


async def test_a_closed_client_is_not_opened_again(sim: Simulator) -> None:
    """It says that a new one is needed, by whichever way it was opened."""
    client = client_of(sim)
    async with client:
        await client.aclose()
    for again in (client.open, client.__aenter__):
        with pytest.raises(ConfigurationError, match="make a new one"):
            await again()
    await client_of(sim).aclose()  # one that was never opened has nothing to close


async def test_entering_an_open_client_is_entering_it_once(sim: Simulator) -> None:
    """`open` and then `async with` is one client, which is closed at the end of the block; two blocks are refused."""
    client = await client_of(sim).open()
    async with client as same:
        assert same is client
        await client.submit(model_v())
        with pytest.raises(ConfigurationError, match="make a new one"):
            await client.__aenter__()
        await client.submit(model_v())
    with pytest.raises(ClientClosed):
        await client.submit(model_v("sand"))


# --- another event loop ----------------------------------------------------------------------------------------------


async def _elsewhere(work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """What this comes to in an event loop of another thread."""

    async def run() -> Any:
        async with asyncio.timeout(10):
            return await work()

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return await asyncio.get_running_loop().run_in_executor(pool, lambda: asyncio.run(run()))


@pytest.mark.parametrize("is_done", [False, True], ids=["pending", "done"])
async def test_a_job_awaited_in_another_loop_says_so(is_done: bool) -> None:
    """`await job`, `result`, `outcomes` and `refresh` do not hang there without a word."""
    async with Simulator(manual=True) as sim, client_of(sim) as client:
        job = await client.submit(model_v())
        if is_done:
            assert await sim.finish(job.task_ids[0]) == 200
            await job

        async def awaited() -> object:
            return await job

        for work in (awaited, job.result, job.outcomes, job.refresh):
            with pytest.raises(ConfigurationError, match="another event loop"):
                await _elsewhere(work)
        if not is_done:
            assert await sim.finish(job.task_ids[0]) == 200
        assert len(await job) == 1
        assert sim.ledger.gets == []


async def test_a_client_used_in_another_loop_says_so(sim: Simulator) -> None:
    """Submitting, opening and closing belong to the loop in which it was opened."""
    async with client_of(sim) as client:
        for work in (lambda: client.submit(model_v()), client.open, client.aclose, lambda: client.find("x")):
            with pytest.raises(ConfigurationError, match="another event loop"):
                await _elsewhere(work)
        assert len(await (await client.submit(model_v()))) == 1
        assert len(sim.ledger.posts) == 1


# --- a job's outcome without waiting ---------------------------------------------------------------------------------


async def _state_endpoint(client: Client, name: str) -> dict[str, Any]:
    """What a web application answers about a job, with no wait and no exception."""
    job = await client.find(name)
    assert job is not None
    return {
        "state": str(job.state),
        "error": None if job.error is None else type(job.error).__name__,
        "outcomes": [None if outcome is None else outcome.ok for outcome in job.outcomes_so_far],
    }


async def test_a_state_endpoint_reads_every_job_without_an_exception() -> None:
    """Running, half done, done, failed, refused and uncertain jobs: state, error and the outcomes so far."""
    async with Simulator(manual=True) as sim, client_of(sim) as client:
        job = await client.submit(model_v(count=2), key="a")
        assert await _state_endpoint(client, "a") == {"state": "accepted", "error": None, "outcomes": [None, None]}
        assert await sim.finish(job.task_ids[1]) == 200
        assert await _state_endpoint(client, "a") == {"state": "accepted", "error": None, "outcomes": [None, True]}
        assert await sim.finish(job.task_ids[0], "FAILED", message="too dark") == 200
        assert await _state_endpoint(client, "a") == {
            "state": "failed",
            "error": "TaskFailed",
            "outcomes": [False, True],
        }
        sim.script(faults.status(400))
        with pytest.raises(Rejected):
            await client.submit(model_v("b"), key="b")
        assert await _state_endpoint(client, "b") == {"state": "rejected", "error": "Rejected", "outcomes": []}
        sim.script(faults.drop_after_accept())
        await client.submit(model_v("c"), key="c")
        assert await _state_endpoint(client, "c") == {"state": "uncertain", "error": "SubmitUncertain", "outcomes": []}


async def test_a_refused_job_has_no_outcomes(sim: Simulator) -> None:
    """Nothing was bought, so there are no tasks: `outcomes()` is empty, `job.error` says why, `result()` raises it."""
    async with client_of(sim) as client:
        sim.script(faults.business_error(100005, "Prompt too long", http=400))
        with pytest.raises(Rejected):
            await client.submit(model_v(), key="order-42")
        job = await client.find("order-42")
        assert job is not None
        assert (await job.outcomes(), job.outcomes_so_far) == ((), ())
        assert isinstance(job.error, Rejected)
        assert (job.error.charged, job.error.code, job.error.job_id) == ("no", 100005, job.id)
        with pytest.raises(Rejected, match="Prompt too long"):
            await job
        assert len(sim.ledger.posts) == 1


async def test_outcomes_tell_whether_they_are_good(sim: Simulator) -> None:
    """`ok` of both kinds, and typed: what is not ok has a message."""
    sim.script(faults.failed())
    async with client_of(sim) as client:
        job = await client.submit(model_v())
        (failed,) = await job.outcomes()
        assert isinstance(failed, Failed)
        assert not failed.ok
        assert isinstance(job.error, TaskFailed)
        assert job.error.outcomes == (failed,)
        (good,) = await (await client.submit(model_v("sand"))).outcomes()
        assert isinstance(good, Succeeded)
        assert good.ok


async def test_an_unexpected_error_of_one_item_is_an_error_of_ours(sim: Simulator) -> None:
    """A store of the user's that raises what no store may: `Finished.error` still says what it means for the money."""
    store = FailingStore(JobRecord, error=RuntimeError("Bearer SECRETSECRETSECRET is broken"))
    async with client_of(sim, store=store) as client:
        (done,) = [done async for done in client.map([model_v()])]
    assert (done.ok, done.job, done.results) == (False, None, ())
    assert type(done.error) is XilingError
    assert "RuntimeError" in str(done.error)
    assert SECRET not in str(done.error)
    assert done.error.charged == "maybe"
    assert sim.ledger.posts == []
