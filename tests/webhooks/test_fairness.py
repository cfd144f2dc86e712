"""What one client, or many, can take from the others that call: nothing that they need. On real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import socket
import ssl
import struct
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trustme
import uvicorn
from aiohttp import web
from open_port import MIB, clean_records, connected, resident, scene, swallowed, until_closed
from support import callback_body, client_of, http, model_v, plain_session, port_of, post, settle, status_of, token_of

from xiling_async import ReceiverOptions, State, WebhookReceiver
from xiling_async.simulator import Simulator
from xiling_async.testing.clock import ManualClock
from xiling_async.webhooks.server_log import OncePerMinute, log

needs_loopback_addresses = pytest.mark.skipif(sys.platform != "linux", reason="127.0.1.1 is this machine on Linux only")


@pytest.fixture(autouse=True)
def clean_log(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No attack leaves a traceback or an error, and no token gets into a log, at whatever level."""
    [once] = log.filters
    log.removeFilter(once)
    log.addFilter(fresh := OncePerMinute())  # what was logged in other tests does not count
    with clean_records(caplog):
        yield
    log.removeFilter(fresh)
    log.addFilter(once)


# --- connections -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["valid", "forged"])
async def test_one_callback_url_does_not_take_all_connections(token: str) -> None:
    """Twice as many stalled bodies as there are connections, on one URL: every honest callback is answered, also those
    of the job whose URL it is."""
    async with scene(count=2, options=ReceiverOptions(connections=40, shutdown_s=0.1)) as on, AsyncExitStack() as stack:
        jobs = [await on.client.submit(model_v()) for _ in range(20)]
        stalled = http(on.path if token == "valid" else f"/{'A' * 80}", b"{", length=500)
        for number in range(80):
            _, writer = await stack.enter_async_context(connected(on.port))
            writer.write(stalled.replace(b"Connection: close\r\n", b""))
            if number % 4 == 0:
                await settle(100)
                assert await on.sim.finish(jobs[number // 4].task_ids[0]) == 200
        assert [await on.sim.finish(task_id) for task_id in on.job.task_ids] == [200, 200]
        assert {job.state for job in (*jobs, on.job)} == {State.DONE}


async def test_asking_for_health_makes_no_sender_known() -> None:
    """GET /healthz is answered 200 to everyone. It does not put a client before a sender that brought a callback."""
    async with scene(count=2, options=ReceiverOptions(connections=5)) as on, AsyncExitStack() as stack:
        reader, writer = await stack.enter_async_context(connected(on.port))
        writer.write(on.honest(0).replace(b"Connection: close\r\n", b""))
        assert (await reader.readuntil(b"\r\n\r\nok")).startswith(b"HTTP/1.1 200")
        for _ in range(20):
            other_reader, other_writer = await stack.enter_async_context(connected(on.port))
            other_writer.write(http("/healthz", method="GET").replace(b"Connection: close\r\n", b""))
            assert (await other_reader.readuntil(b"\r\n\r\nok")).startswith(b"HTTP/1.1 200")
        writer.write(on.honest(1))
        assert status_of(await until_closed(reader)) == 200


@needs_loopback_addresses
async def test_a_flood_from_one_network_does_not_evict_a_new_connection_from_another() -> None:
    """A sender that has connected and not sent its request yet stays, while 300 others come from elsewhere."""
    async with scene(options=ReceiverOptions(connections=30)) as on, AsyncExitStack() as stack:
        reader, writer = await stack.enter_async_context(connected(on.port, local="127.0.9.1"))
        await settle(50)
        for number in range(300):
            await stack.enter_async_context(connected(on.port, local=f"127.0.1.{1 + number % 200}"))
        await settle(200)
        writer.write(on.honest())
        assert status_of(await until_closed(reader)) == 200


async def test_a_request_is_served_before_those_behind_it_are_accepted() -> None:
    """As many connections as there may be wait to be accepted, behind one that has sent its request: it is answered."""
    connections = 20
    async with scene(options=ReceiverOptions(connections=connections)) as on:
        with contextlib.ExitStack() as stack:
            honest = stack.enter_context(socket.create_connection(("127.0.0.1", on.port)))
            honest.sendall(on.honest())
            for _ in range(connections):
                stack.enter_context(socket.create_connection(("127.0.0.1", on.port)))
            honest.setblocking(False)
            with contextlib.suppress(ConnectionError):
                answer = await asyncio.get_running_loop().sock_recv(honest, 65_536)
            assert status_of(answer) == 200
            await settle(200)


# --- TLS -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def tls(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    return context


@pytest.mark.parametrize(
    "sent",
    [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\x02\x00" + b"\xff" * 512, b""],
    ids=["http", "rubbish", "nothing"],
)
async def test_a_failed_handshake_leaves_no_memory(tls: ssl.SSLContext, sent: bytes) -> None:
    """300 of them, with the cyclic garbage collector off: its 256 KiB each are given back at once."""
    if not resident():
        pytest.skip("memory is measured on Linux only")
    async with scene(receiver=WebhookReceiver(port=0, options=ReceiverOptions(tls=tls))) as on:

        async def fail(times: int) -> None:
            for _ in range(times):
                async with connected(on.port) as (reader, writer):
                    writer.write(sent)
                    writer.write_eof()
                    await until_closed(reader)

        await fail(20)
        gc.collect()
        gc.disable()
        try:
            before = resident()
            await fail(300)
            assert resident() - before < 16 * MIB
        finally:
            gc.enable()


@pytest.mark.parametrize(("secure", "bytes_each"), [(False, 12 * 1024), (True, 400 * 1024)], ids=["plain", "tls"])
async def test_what_a_connection_costs(tls: ssl.SSLContext, secure: bool, bytes_each: int) -> None:
    """Of memory, idle: README states 6 KiB, and 310 KiB with TLS (asyncio has a buffer of 256 KiB for each)."""
    if not resident():
        pytest.skip("memory is measured on Linux only")
    count = 200
    receiver = WebhookReceiver(port=0, options=ReceiverOptions(tls=tls if secure else None))
    async with scene(receiver=receiver) as on:
        with contextlib.ExitStack() as stack:
            gc.collect()
            before = resident()
            for _ in range(count):
                stack.enter_context(socket.create_connection(("127.0.0.1", on.port)))
                await settle(10)
            await settle(100)
            assert resident() - before < count * bytes_each


# --- mounted in an application ---------------------------------------------------------------------------------------


@asynccontextmanager
async def in_aiohttp(receiver: WebhookReceiver, listening: socket.socket) -> AsyncIterator[None]:
    """A user's own aiohttp application, with aiohttp's own settings."""
    app = web.Application()
    receiver.add_to(app, "/xiling")
    runner = web.AppRunner(app, shutdown_timeout=0.05)
    await runner.setup()
    try:
        await web.SockSite(runner, listening).start()
        yield
    finally:
        await runner.cleanup()


@asynccontextmanager
async def in_uvicorn(receiver: WebhookReceiver, listening: socket.socket) -> AsyncIterator[None]:
    config = uvicorn.Config(receiver.asgi(), log_config=None, ws="none", lifespan="on")
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    await server.startup(sockets=[listening])
    try:
        yield
    finally:
        await server.shutdown(sockets=[])


Mount = Callable[[WebhookReceiver, socket.socket], contextlib.AbstractAsyncContextManager[None]]
every_mount = pytest.mark.parametrize("mount", [in_aiohttp, in_uvicorn])


@asynccontextmanager
async def mounted(mount: Mount, clock: ManualClock | None = None) -> AsyncIterator[tuple[str, Simulator, str]]:
    """The URL of a job's callbacks, its simulator and its task's id; the receiver stands in another application."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        origin = f"http://127.0.0.1:{listening.getsockname()[1]}"
        receiver = WebhookReceiver(f"{origin}/xiling")
        async with (
            mount(receiver, listening),
            Simulator(manual=True) as sim,
            client_of(sim, receiver=receiver, clock=clock) as client,
        ):
            job = await client.submit(model_v())
            yield str(sim.ledger.posts[-1].callback_url), sim, job.task_ids[0]


@every_mount
@pytest.mark.parametrize("token", ["valid", "forged"])
@pytest.mark.parametrize("form", ["5 GB declared", "chunks without end"])
async def test_a_mounted_receiver_does_not_swallow_what_it_refuses(mount: Mount, token: str, form: str) -> None:
    """After the 413 or the 404 the connection is closed; some megabytes are in the kernel's buffers."""
    async with mounted(mount) as (url, sim, task_id):
        path = f"/xiling/{token_of(url) if token == 'valid' else 'A' * 80}"
        if form == "5 GB declared":
            head, piece = http(path, length=5_000_000_000), bytes(65_536)
        else:
            head = http(path, b"", "Transfer-Encoding: chunked")
            piece = b"10000\r\n" + bytes(65_536) + b"\r\n"
        head = head.replace(b"Connection: close\r\n", b"")
        taken, answer = await swallowed(port_of(url), head, piece)
        assert taken < 16 * MIB
        assert answer == b"" or status_of(answer) == (413 if token == "valid" else 404)
        assert answer == b"" or b"connection: close\r\n" in answer.lower()
        assert await sim.finish(task_id) == 200


@every_mount
async def test_a_mounted_body_that_stalls_is_cut_once(mount: Mount) -> None:
    """408 at its deadline of ten seconds, and then the connection is closed, not ten seconds later."""
    clock = ManualClock()
    async with mounted(mount, clock) as (url, sim, task_id), connected(port_of(url)) as (reader, writer):
        writer.write(http(f"/xiling/{token_of(url)}", b"{", length=500).replace(b"Connection: close\r\n", b""))
        await settle(500)
        clock.advance(10)
        begun = asyncio.get_running_loop().time()
        assert status_of(await until_closed(reader)) == 408
        assert asyncio.get_running_loop().time() - begun < 5
        assert await sim.finish(task_id) == 200


# --- the log ---------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def by_itself(receiver: WebhookReceiver, listening: socket.socket) -> AsyncIterator[None]:
    """Its own server: `listening` is not used."""
    yield


@pytest.mark.parametrize("mount", [by_itself, in_aiohttp, in_uvicorn])
@pytest.mark.parametrize("how", ["closed", "reset", "half closed"])
@pytest.mark.parametrize("framing", ["Content-Length: 900", "Transfer-Encoding: chunked"])
async def test_a_sender_that_hangs_up_in_its_body_is_no_error(
    mount: Mount, how: str, framing: str, caplog: pytest.LogCaptureFixture
) -> None:
    """In every form of the receiver, however the connection ends: no line above INFO, of whatever logger."""
    async with AsyncExitStack() as stack:
        if mount is by_itself:
            on = await stack.enter_async_context(scene())
            url, sim, task_id = on.url, on.sim, on.job.task_ids[0]
            path = f"/{token_of(url)}"
        else:
            url, sim, task_id = await stack.enter_async_context(mounted(mount))
            path = f"/xiling/{token_of(url)}"
        _, writer = await stack.enter_async_context(connected(port_of(url)))
        writer.write(f"POST {path} HTTP/1.1\r\nHost: x\r\n{framing}\r\n\r\n".encode() + b"5\r\nabc")
        await settle(100)
        if how == "reset":
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        if how == "half closed":
            writer.write_eof()
        else:
            writer.transport.abort()
        await settle(300)
        assert [record.getMessage() for record in caplog.records if record.levelno > logging.INFO] == []
        assert await sim.finish(task_id) == 200


async def test_a_tls_stream_that_turns_into_garbage_is_no_error(
    authority: trustme.CA, tls: ssl.SSLContext, caplog: pytest.LogCaptureFixture
) -> None:
    """Bytes that are not TLS, in the middle of a body: the connection ends, no line above INFO."""
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    async with scene(receiver=WebhookReceiver(port=0, options=ReceiverOptions(tls=tls))) as on:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        end = trusting.wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
        async with connected(on.port) as (reader, writer):
            while True:
                try:
                    end.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    writer.write(outgoing.read())
                    incoming.write(await reader.read(65_536))
            end.write(http(on.path, b"{", length=500))
            writer.write(outgoing.read())
            await settle(300)
            writer.write(b"this is not TLS at all" * 9)
            await until_closed(reader)
        await settle(300)
        assert [record.getMessage() for record in caplog.records if record.levelno > logging.INFO] == []


async def test_garbage_is_one_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """200 requests that are not HTTP, of all kinds, within a minute: one line, and none of what was sent."""
    garbage = (
        b"\x16\x03\x01\x02\x00\r\n\r\n",
        b"POST /SECRET HTTP/9.9\r\n\r\n",
        b"POST /SECRET\r\nA\r\n\r\n",
        b"A: b\r\n\r\n",
    )
    async with scene() as on:
        for number in range(200):
            async with connected(on.port) as (reader, writer):
                writer.write(garbage[number % 4])
                await until_closed(reader)
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("xiling_async.webhooks")]
    assert len([line for line in lines if "HTTP" in line]) == 1
    assert "SECRET" not in caplog.text


def test_each_kind_of_line_is_logged_once_a_minute() -> None:
    """The next one says how many were left out; errors and DEBUG are never left out."""
    once = OncePerMinute()
    logged = []
    for created_s in (0, 1, 59, 60, 61, 200):
        for level, message in ((logging.INFO, "a"), (logging.WARNING, "b"), (logging.ERROR, "c"), (logging.DEBUG, "d")):
            record = logging.LogRecord("x", level, "f.py", 1, message, (), None)
            record.created = float(created_s)
            if once.filter(record):
                logged.append(record.getMessage())
    assert [line for line in logged if line[0] == "a"] == [
        "a", "a (2 more since the last such line)", "a (1 more since the last such line)",
    ]  # fmt: skip
    assert {letter: sum(line[0] == letter for line in logged) for letter in "abcd"} == {"a": 3, "b": 3, "c": 6, "d": 6}


# --- trust="status" --------------------------------------------------------------------------------------------------


async def test_one_callback_url_does_not_spend_the_budget_of_status_gets() -> None:
    """`trust="status"`: 300 callbacks in three seconds ask the service a few times; the last of them is not lost."""
    clock = ManualClock()
    receiver = WebhookReceiver(port=0, trust="status")
    async with (
        Simulator(manual=True) as sim,
        client_of(sim, receiver=receiver, clock=clock) as client,
        plain_session() as session,
    ):
        job = await client.submit(model_v())
        url = str(sim.ledger.posts[-1].callback_url)
        for number in range(300):
            assert await post(session, url, callback_body(job.task_ids[0])) == 200
            await settle(20)
            if number % 100 == 0:
                clock.advance(1)
        assert 1 <= len(sim.ledger.gets) <= 3
        assert await sim.finish(job.task_ids[0]) == 200
        for _ in range(30):
            clock.advance(1)
            await settle(100)
        assert job.state is State.DONE
        assert len(sim.ledger.gets) <= 6
