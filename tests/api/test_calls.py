"""What leaves, and what a caller is told when nothing could: borrowed sessions, errors before a byte, late timers."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable

import aiohttp
import pytest
from aiohttp.abc import AbstractResolver, ResolveResult
from support import NotingStore, client_of, model_v, pumped

from xiling_async import Client, ConfigurationError, NotSent, State
from xiling_async.simulator import Simulator, faults
from xiling_async.testing.clock import ManualClock


async def test_a_borrowed_sessions_middlewares_do_not_run_on_a_paid_post() -> None:
    """A middleware that sends each request twice: one POST is seen, and one is paid."""

    async def twice(request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        await handler(request)
        return await handler(request)

    async with (
        Simulator(manual=True) as sim,
        aiohttp.ClientSession(middlewares=(twice,)) as session,
        client_of(sim, session=session) as client,
    ):
        await client.submit(model_v())
        assert (len(sim.ledger.posts), sim.ledger.paid_submits) == (1, 1)


def _with_auth() -> aiohttp.ClientSession:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it is deprecated, and still in use
        return aiohttp.ClientSession(auth=aiohttp.BasicAuth("me", "secret"))


@pytest.mark.parametrize(
    ("what", "make"),
    [("auth", _with_auth), ("raise_for_status", lambda: aiohttp.ClientSession(raise_for_status=True))],
    ids=["auth", "raise_for_status"],
)
async def test_a_borrowed_session_that_would_change_the_request_is_refused(
    what: str, make: Callable[[], aiohttp.ClientSession]
) -> None:
    """`auth=` and `raise_for_status`: refused when the client is opened, with what to change; nothing is sent."""
    store = NotingStore()
    async with Simulator() as sim, make() as session:
        with pytest.raises(ConfigurationError, match=what):
            async with client_of(sim, session=session, store=store):
                pass
        assert (store.asked, sim.ledger.posts) == ([], [])


@pytest.mark.parametrize("closed", ["before", "while open"])
async def test_a_borrowed_session_that_is_closed_writes_no_intent(closed: str) -> None:
    """Before the client is opened or while it is: `ConfigurationError`, charged: no, and no job is in doubt."""
    store = NotingStore()
    session = aiohttp.ClientSession()
    async with Simulator() as sim:
        if closed == "before":
            await session.close()
        with pytest.raises(ConfigurationError, match="closed") as caught:
            async with client_of(sim, session=session, store=store) as client:
                await session.close()
                await client.submit(model_v(), key="order-42")
        assert caught.value.charged == "no"
        assert (store.asked, sim.ledger.posts) == ([], [])


class _Broken(AbstractResolver):
    """A resolver with a bug."""

    async def resolve(self, host: str, port: int = 0, family: int = 0) -> list[ResolveResult]:
        raise LookupError(host)

    async def close(self) -> None:
        pass


async def _trace(*_: object) -> None:
    raise RuntimeError("a bug in a trace")


def _traced(when: str) -> aiohttp.ClientSession:
    config = aiohttp.TraceConfig()
    getattr(config, when).append(_trace)
    return aiohttp.ClientSession(trace_configs=[config])


def _unresolved() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(resolver=_Broken()))


BEFORE: dict[str, tuple[str | None, Callable[[], aiohttp.ClientSession]]] = {
    "a resolver with a bug": ("https://api.example/v1", _unresolved),
    "a trace with a bug": (None, lambda: _traced("on_request_start")),
    "a header that cannot be sent": (None, lambda: aiohttp.ClientSession(headers={"X-A": "b\r\nc: d"})),
}


@pytest.mark.parametrize("what", BEFORE)
async def test_what_fails_before_a_byte_has_left_is_not_sent(what: str) -> None:
    """Whatever the HTTP library or a codec raises: `NotSent`, charged: no, and the job says the same."""
    base_url, make = BEFORE[what]
    store, clock = NotingStore(), ManualClock()
    async with Simulator() as sim, make() as session:
        url = base_url or sim.base_url
        async with Client("key", base_url=url, session=session, store=store, clock=clock) as client:
            with pytest.raises(NotSent) as caught:
                await pumped(clock, client.submit(model_v()))
            assert caught.value.charged == "no"
        assert sim.ledger.posts == []
        (record,) = (await store.everything()).values()
        assert record.state is State.NOT_SENT


async def test_what_fails_after_the_body_has_left_is_in_doubt() -> None:
    """The same bug of a trace, once the request has been sent: uncertain, one POST, its callback adopts the job."""
    async with (
        Simulator(manual=True) as sim,
        _traced("on_request_end") as session,
        client_of(sim, session=session) as client,
    ):
        job = await client.submit(model_v())
        assert job.state is State.UNCERTAIN
        assert await sim.finish(sim.ledger.task_ids[0]) == 200
        assert (len(await job), len(sim.ledger.posts)) == (1, 1)


async def test_an_answer_with_far_too_many_ids_is_capped() -> None:
    """20,000 ids for one output: the store gets a few of them, the error says how many there were."""
    store = NotingStore()
    async with Simulator(manual=True) as sim, client_of(sim, store=store) as client:
        sim.script(faults.answer_data({"task_ids": [f"i2v-{number}" for number in range(20_000)]}))
        job = None
        try:
            await client.submit(model_v())
        except Exception as error:
            assert "20000" in str(error)
            assert getattr(error, "charged", None) == "yes"
            job = getattr(error, "job", None)
        assert job is not None
        assert job.task_ids == tuple(f"i2v-{number}" for number in range(17))


# --- a timer that fires much too late ------------------------------------------------------------------------------


class LeapingLoop(asyncio.SelectorEventLoop):
    """Its time can leap, as if the process had been stopped for a while."""

    leapt_s = 0.0

    def time(self) -> float:
        return super().time() + self.leapt_s


async def _stopped_while_answered(loop: LeapingLoop) -> State:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        await reader.readexactly(length)
        body = b'{"code": 0, "msg": "ok", "data": {"task_ids": ["i2v-1"]}}'
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%b" % (len(body), body))
        loop.leapt_s += 90.0  # the answer is in the socket's buffer, and the deadline is long past
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, Client("key", base_url=f"http://127.0.0.1:{port}/v1") as client:
        return (await client.submit(model_v())).state


def test_an_answer_that_arrived_while_the_process_stood_still_counts() -> None:
    """Stopped for 90 s with the answer in the socket's buffer, and no receiver: the job is accepted, not uncertain."""
    with asyncio.Runner(loop_factory=LeapingLoop) as runner:
        loop = runner.get_loop()
        assert isinstance(loop, LeapingLoop)
        assert runner.run(_stopped_while_answered(loop)) is State.ACCEPTED
