"""Cancelled at any turn of the loop, once or twice: nothing is left, nothing is paid twice, nothing paid is lost."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import itertools
import selectors
import socket
import threading
import warnings
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from contextlib import aclosing
from pathlib import Path
from typing import Any, Final

import pg
import pytest
from support import client_of, model_v
from yarl import URL

from xiling_async import (
    Client,
    ClientClosed,
    Job,
    Limits,
    MemoryStore,
    ReceiverOptions,
    SQLiteStore,
    State,
    Store,
    Video,
    WebhookReceiver,
    XilingError,
    simulator,
)
from xiling_async.simulator import Simulator

PICTURE: Final = Path(simulator.__file__).with_name("media") / "samples" / "landscape.webp"
HANG_S: Final = 20.0  # of real time: far beyond what anything here takes
STORES: Final = ["memory", "sqlite", "postgres"]
Work = Callable[[], Coroutine[Any, Any, object]]


class Turns(selectors.DefaultSelector):
    """Counts the turns of a loop: each begins with one `select`. At chosen turns it calls something first."""

    def __init__(self) -> None:
        super().__init__()
        self._turn = 0
        self._due: list[int] = []
        self._act: Callable[[], object] = int

    def act_after(self, turns: list[int], act: Callable[[], object]) -> None:
        self._due = [self._turn + count for count in turns]
        self._act = act

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self._turn += 1
        if self._due and self._turn >= self._due[0]:
            self._due.pop(0)
            self._act()
            timeout = 0  # what it made ready runs in this turn
        return super().select(timeout)


async def cancelled_at(turns: Turns, turn: int, work: Work, *, twice: bool) -> bool:
    """Run this and cancel it at its `turn`-th turn, and once more at the next. False: it had ended before.

    A cancellation that was delivered ends the work as such, and nobody has taken it back.
    """
    accepted: list[bool] = []

    async def run() -> tuple[bool, int]:
        task = asyncio.current_task()
        assert task is not None
        try:
            await work()
        except asyncio.CancelledError:
            for _ in range(sum(accepted)):
                task.uncancel()
            return True, task.cancelling()
        return False, task.cancelling()

    task = asyncio.create_task(run())
    # The first turn only starts the task: a cancellation there would be one of nothing.
    turns.act_after([turn + 1, turn + 2][: 1 + twice], lambda: accepted.append(task.cancel()))
    async with asyncio.timeout(HANG_S):
        was_cancelled, still_cancelling = await task
    turns.act_after([], int)
    assert still_cancelling == 0
    assert was_cancelled == any(accepted), "a cancellation was swallowed" if any(accepted) else "a foreign cancellation"
    return was_cancelled


def turns_to_try(name: str) -> Iterable[int]:
    """Every turn; with a database, where the loop turns once for each packet, ever fewer of them."""
    return itertools.count(1) if name != "postgres" else (round(1.6**step) for step in itertools.count(1))


async def every_turn(
    turns: Turns, name: str, work: Callable[[int], Coroutine[Any, Any, object]], *, twice: bool
) -> list[int]:
    """Cancel it at the n-th turn for every n (for a sample, with a database) until it completes. Which n these were."""
    tried: list[int] = []
    for turn in turns_to_try(name):
        tried.append(turn)
        if not await cancelled_at(turns, turn, lambda number=turn: work(number), twice=twice):  # type: ignore[misc]
            break
    return tried


@functools.cache
def schema_of(folder: Path) -> str:
    return pg.fresh_schema()


def store_of(name: str, folder: Path) -> Store:
    if name == "postgres":
        return pg.pg_store(schema=schema_of(folder), pool_size=2)
    return MemoryStore() if name == "memory" else SQLiteStore(folder / "jobs.db")


@pytest.fixture(autouse=True)
def database(request: pytest.FixtureRequest) -> None:
    """It is started before the loop is."""
    if "postgres" in request.node.name:
        pg.server()


def one_at_a_time(sim: Simulator, store: Store) -> Client:
    """A client in which a slot that is not given back is the last one."""
    return client_of(sim, store=store, limits=Limits(submits=1, downloads=1), allow_private=True)


def played(test: Callable[[Turns], Awaitable[None]]) -> None:
    """Run this in a loop of its own, with warnings as errors, and see that no task and no thread is left."""
    turns = Turns()
    threads = set(threading.enumerate())

    async def run() -> None:
        await test(turns)
        await nothing_left()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(turns)) as runner:
            runner.run(run())
        gc.collect()
    left = [thread for thread in set(threading.enumerate()) - threads if not thread.name.startswith("asyncio_")]
    for thread in left:
        thread.join(HANG_S)
    assert [thread.name for thread in left if thread.is_alive()] == []


async def nothing_left() -> None:
    """No task but this one; what was cancelled last may end."""
    for _ in range(50):
        await asyncio.sleep(0)
    left = [task.get_name() for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    assert left == []


async def all_paid_are_known(sim: Simulator, client: Client) -> None:
    """Each callback URL was POSTed once, and every task that was paid for belongs to a job that the client knows."""
    urls = [record.callback_url for record in sim.ledger.posts]
    assert len(set(urls)) == len(urls)
    assert all(count == 1 for count in sim.ledger.paid_by_callback_token.values())
    async with asyncio.timeout(HANG_S):
        for task_id in sim.ledger.task_ids:
            while (job := await client.find(task_id)) is None:  # its answer is under way
                await asyncio.sleep(0)
            assert len(await job) == 1


# --- while the client is open ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("keyed", [False, True], ids=["without key", "with key"])
@pytest.mark.parametrize("name", STORES)
def test_a_cancelled_submit_pays_once_or_not_at_all(name: str, keyed: bool, twice: bool, tmp_path: Path) -> None:
    """Its slot comes back, its key gives the one paid job, and what was paid for is in the store."""

    async def test(turns: Turns) -> None:
        async with Simulator() as sim, one_at_a_time(sim, store_of(name, tmp_path)) as client:

            async def work(number: int) -> object:
                return await client.submit(model_v(f"{number}"), key=f"order-{number}" if keyed else None)

            tried = await every_turn(turns, name, work, twice=twice)
            assert len(tried) > 3
            async with asyncio.timeout(HANG_S):
                if keyed:
                    jobs = [await client.submit(model_v(f"{n}"), key=f"order-{n}") for n in tried]
                    assert [len(await job) for job in jobs] == [1] * len(tried)
                    assert sim.ledger.paid_submits == len(tried)
            await all_paid_are_known(sim, client)
            assert client.stats().in_flight == {"submits": 0, "uploads": 0, "downloads": 0}
            assert sim.ledger.paid_submits <= len(tried)

    played(test)


@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("name", STORES)
def test_a_cancelled_run_pays_once_or_not_at_all(name: str, twice: bool, tmp_path: Path) -> None:
    """Run again with the same key it gives the video of the one paid job."""

    async def test(turns: Turns) -> None:
        async with Simulator() as sim, one_at_a_time(sim, store_of(name, tmp_path)) as client:

            async def work(number: int) -> object:
                return await client.run(model_v(f"{number}"), key=f"order-{number}")

            tried = await every_turn(turns, name, work, twice=twice)
            async with asyncio.timeout(HANG_S):
                for number in tried:
                    await work(number)
            assert sim.ledger.paid_submits == len(tried)
            await all_paid_are_known(sim, client)

    played(test)


@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("name", STORES)
def test_a_cancelled_map_pays_once_or_not_at_all(name: str, twice: bool, tmp_path: Path) -> None:
    """Repeated with the same keys it gives every result, each paid for once; nothing of it runs on."""

    async def test(turns: Turns) -> None:
        async with Simulator() as sim, client_of(sim, store=store_of(name, tmp_path)) as client:

            async def work(number: int) -> object:
                pairs = [(f"{number}-{item}", model_v(f"{number}-{item}")) for item in range(3)]
                async with aclosing(client.map(pairs, in_flight=2)) as results:
                    return [done.ok async for done in results]

            tried = await every_turn(turns, name, work, twice=twice)
            async with asyncio.timeout(HANG_S):
                for number in tried:
                    assert await work(number) == [True] * 3
            assert sim.ledger.paid_submits == 3 * len(tried)
            await all_paid_are_known(sim, client)

    played(test)


@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("name", STORES)
def test_a_cancelled_download_leaves_a_whole_file_or_none(name: str, twice: bool, tmp_path: Path) -> None:
    """Its slot and its lock come back: the next download to the same place completes."""

    async def test(turns: Turns) -> None:
        async with Simulator() as sim, one_at_a_time(sim, store_of(name, tmp_path)) as client:
            (video,) = await (await client.submit(model_v()))
            whole = (await client.download(video, tmp_path / "whole.mp4", allow_private=True)).read_bytes()

            async def work(number: int) -> object:
                return await client.download(video, tmp_path / f"{number}.mp4", allow_private=True)

            tried = await every_turn(turns, name, work, twice=twice)
            for number in tried:
                path = tmp_path / f"{number}.mp4"
                if not path.exists():
                    async with asyncio.timeout(HANG_S):
                        await work(number)
                assert path.read_bytes() == whole
            assert client.stats().in_flight["downloads"] == 0

    played(test)


@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("name", STORES)
def test_a_cancelled_wait_is_only_a_wait(name: str, twice: bool, tmp_path: Path) -> None:
    """`await job`, `outcomes`, `refresh` and `find`: the job and its other waiter are not touched."""

    async def test(turns: Turns) -> None:
        async with Simulator(manual=True) as sim, one_at_a_time(sim, store_of(name, tmp_path)) as client:
            job = await client.submit(model_v(), key="one")
            other = asyncio.create_task(job.result())
            fresh = await client.find("one")
            assert fresh is not None

            async def refresh(_: int) -> object:
                return await fresh.refresh()

            async def find(_: int) -> object:
                return await client.find(job.task_ids[0])

            for work in (refresh, find):
                await every_turn(turns, name, work, twice=twice)
            ticking = asyncio.create_task(_turning())
            for waits in (job.result, job.outcomes, fresh.result):
                for turn in range(1, 12):
                    assert await cancelled_at(turns, turn, waits, twice=twice)
            ticking.cancel()
            assert await sim.finish(job.task_ids[0]) == 200
            async with asyncio.timeout(HANG_S):
                assert await other == await job == await fresh
            assert sim.ledger.paid_submits == 1

    played(test)


async def _turning() -> None:
    """Without this an idle loop does not turn."""
    while True:
        await asyncio.sleep(0)


# --- opening and closing ---------------------------------------------------------------------------------------------


def _is_listening(receiver: WebhookReceiver) -> bool:
    try:
        url = URL(str(receiver.public_url))
    except Exception:
        return False
    with socket.socket() as probe, contextlib.suppress(OSError):
        return probe.connect_ex(("127.0.0.1", url.port or 0)) == 0
    return False


@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("listens", ["at a port", "at a path"])
@pytest.mark.parametrize("name", STORES)
def test_a_cancelled_open_leaves_nothing_open(name: str, listens: str, twice: bool, tmp_path: Path) -> None:
    """No task, no port, no lock on the store: another client opens it at once."""

    async def test(turns: Turns) -> None:
        async with Simulator() as sim:

            async def attempt(turn: int) -> bool:
                store = store_of(name, tmp_path)
                path = tmp_path / "socket" if listens == "at a path" else None
                receiver = WebhookReceiver(
                    None if path is None else "https://media.example.com/x",
                    port=0 if path is None else None,
                    options=ReceiverOptions(path=path),
                )
                client = client_of(sim, store=store, receiver=receiver, save_to=tmp_path / "clips")
                before = asyncio.all_tasks()
                was_cancelled = await cancelled_at(turns, turn, client.open, twice=twice)
                if was_cancelled:
                    await client.aclose()  # nothing to close, and no harm
                    await _gone(asyncio.all_tasks() - before)
                    assert not _is_listening(receiver)
                    assert path is None or not path.exists()
                    with pytest.raises(ClientClosed):
                        await client.submit(model_v())
                    client = await client_of(sim, store=store_of(name, tmp_path)).open()
                await client.aclose()
                await _gone(asyncio.all_tasks() - before)
                return was_cancelled

            for turn in turns_to_try(name):
                if not await attempt(turn):
                    break
            assert sim.ledger.posts == []

    played(test)


@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("name", STORES)
def test_a_cancelled_close_leaves_nothing_open(name: str, twice: bool, tmp_path: Path) -> None:
    """With a job under way and somebody who waits for it: no task, no port, no lock is left, and the job is kept."""

    async def test(turns: Turns) -> None:
        async with Simulator(manual=True) as sim:

            async def attempt(turn: int) -> bool:
                receiver, store = WebhookReceiver(port=0), store_of(name, tmp_path)
                before = asyncio.all_tasks()
                client = await client_of(sim, store=store, receiver=receiver).open()
                job = await client.submit(model_v(f"{turn}"), key=f"order-{turn}")
                waiter = asyncio.create_task(_ended(job))
                calls: dict[str, Coroutine[Any, Any, object]] = {
                    "submit": client.submit(model_v(f"late {turn}"), key=f"late-{turn}"),
                    "submit without a key": client.submit(model_v(f"later {turn}")),
                    "run": client.run(model_v(f"run {turn}"), key=f"run-{turn}"),
                    "upload": client.upload(PICTURE.read_bytes() + b" " * turn),
                    "map": _mapped(client, turn),
                    "refresh": job.refresh(),
                }
                callers = [asyncio.create_task(call, name=name) for name, call in calls.items()]
                await asyncio.sleep(0)
                was_cancelled = await cancelled_at(turns, turn, client.aclose, twice=twice)
                done, pending = await asyncio.wait([*callers, waiter], timeout=HANG_S)
                assert not pending
                assert waiter.result() is ClientClosed
                assert [task.get_name() for task in done if task.cancelled()] == [], "nobody cancelled these callers"
                errors = [task.exception() for task in callers]
                assert [error for error in errors if error is not None and not isinstance(error, XilingError)] == []
                await client.aclose()
                await _gone(asyncio.all_tasks() - before)
                assert not _is_listening(receiver)
                async with client_of(sim, store=store if name == "memory" else store_of(name, tmp_path)) as after:
                    found = await after.find(f"order-{turn}")
                    assert found is not None
                    assert (found.state, found.task_ids) == (State.ACCEPTED, job.task_ids)
                await _gone(asyncio.all_tasks() - before)
                return was_cancelled

            for turn in turns_to_try(name):
                if not await attempt(turn):
                    break
            urls = [record.callback_url for record in sim.ledger.posts]
            assert len(set(urls)) == len(urls)

    played(test)


async def _mapped(client: Client, turn: int) -> None:
    async with aclosing(client.map([(f"{turn}-{item}", model_v(f"{turn} {item}")) for item in range(3)])) as results:
        async for _ in results:
            pass


async def _ended(job: Job[Video]) -> type[BaseException] | None:
    try:
        await job
    except ClientClosed as error:
        return type(error)
    return None


async def _gone(tasks: set[asyncio.Task[Any]]) -> None:
    """These tasks end by themselves, now."""
    for _ in range(100):
        if all(task.done() for task in tasks):
            return
        await asyncio.sleep(0)
    raise AssertionError(f"left over: {sorted(task.get_name() for task in tasks if not task.done())}")
