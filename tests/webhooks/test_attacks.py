"""The receiver on an open port, under attack. Pass marks: nothing accepted, no 500, no traceback, bounded memory, and
every honest callback answered."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import json
import logging
import random
import socket
import ssl
import tracemalloc
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import fuzz
import pytest
import trustme
from hypothesis import given, settings
from hypothesis import strategies as st
from open_port import MIB, Scene, clean_records, connected, resident, scene, swallowed, until_closed
from support import (
    GatedStore,
    NotingStore,
    callback_body,
    client_of,
    http,
    model_v,
    plain_session,
    port_of,
    post,
    raw_exchange,
    settle,
    status_of,
    token_of,
    turns_until,
)
from yarl import URL

from xiling_async import ConfigurationError, ReceiverOptions, State, WebhookReceiver
from xiling_async.simulator import Simulator
from xiling_async.testing.clock import ManualClock


@pytest.fixture(autouse=True)
def clean_log(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No attack leaves a traceback or an error, and no token gets into a log, at whatever level."""
    with clean_records(caplog):
        yield


def unix_receiver(path: Path, **options: Any) -> WebhookReceiver:
    return WebhookReceiver("http://127.0.0.1:9/prefix/of/a/proxy", options=ReceiverOptions(path=path, **options))


def forged_requests(count: int) -> bytes:
    return b"".join(http(f"/{'A' * 80}", b"{}").replace(b"Connection: close\r\n", b"") for _ in range(count))


# --- the limits ------------------------------------------------------------------------------------------------------


async def test_the_limits_are_those_that_were_given() -> None:
    """A body one byte larger than its limit is refused, also by `handle`."""
    receiver = WebhookReceiver(port=0, options=ReceiverOptions(body_bytes=1_000))
    async with scene(receiver=receiver) as on:
        fitting = on.callback().ljust(1_000)
        assert status_of(await raw_exchange(on.port, http(on.path, fitting + b" "))) == 413
        assert (await receiver.handle(on.path, fitting + b" ")).status == 413
        assert status_of(await raw_exchange(on.port, http(on.path, fitting))) == 200


@pytest.mark.parametrize(
    "head",
    [
        f"POST /{'A' * 3000} HTTP/1.1\r\nHost: x\r\n\r\n",
        f"POST / HTTP/1.1\r\nHost: x\r\nA: {'a' * 5000}\r\n\r\n",
        f"POST / HTTP/1.1\r\nHost: x\r\n{'A' * 5000}: a\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: x\r\n" + "A: b\r\n" * 70 + "\r\n",
    ],
    ids=["line", "value", "name", "fields"],
)
async def test_a_large_head_is_refused(head: str) -> None:
    """One line, one field, or too many of them: 400, and the connection is closed."""
    async with scene() as on:
        assert status_of(await raw_exchange(on.port, head.encode())) == 400
        assert await on.sim.finish(on.job.task_ids[0]) == 200


# --- slow ones -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sent", [b"", b"POST /", b"POST /x HTTP/1.1\r\nHost: x\r\nA: "], ids=["nothing", "line", "head"]
)
async def test_a_slow_head_is_cut(sent: bytes) -> None:
    """A byte now and then does not keep a connection: the head has one deadline."""
    loop = asyncio.get_running_loop()
    async with scene(options=ReceiverOptions(header_s=0.3)) as on, connected(on.port) as (reader, writer):
        begun = loop.time()
        reading = asyncio.create_task(until_closed(reader))
        writer.write(sent)
        while not reading.done():
            with contextlib.suppress(OSError):
                writer.write(b"x" if sent else b"")
            await asyncio.wait([reading], timeout=0.02)
        assert reading.result() == b""
        assert 0.25 <= loop.time() - begun < 5
        assert await on.sim.finish(on.job.task_ids[0]) == 200


async def test_slow_bodies_are_cut_and_honest_callbacks_pass_by() -> None:
    """200 senders with a valid URL drip their bodies: a few get 408 at the deadline, the rest 503 at once; all others
    are served meanwhile."""
    clock = ManualClock()
    async with scene(count=4, clock=clock) as on:
        body = on.callback()
        async with contextlib.AsyncExitStack() as stack:
            slow = [await stack.enter_async_context(connected(on.port)) for _ in range(200)]
            for _, writer in slow:
                writer.write(http(on.path, body[:5], length=len(body)))
            await settle(200)
            clock.advance(9.9)
            for place in range(3):
                assert await on.sim.finish(on.job.task_ids[place]) == 200
            for _, writer in slow:
                writer.write(body[5:6])
            await settle(200)
            clock.advance(0.2)
            answers = await asyncio.gather(*(until_closed(reader) for reader, _ in slow))
        assert Counter(map(status_of, answers)) == {408: 8, 503: 192}
        assert on.job.state is State.ACCEPTED
        assert await on.sim.finish(on.job.task_ids[3]) == 200
        assert len(await on.job) == 4


async def test_a_client_that_does_not_read_is_cut(tmp_path: Path) -> None:
    """Requests without end whose answers are not read: bounded memory, then an abort; others are served meanwhile."""
    path = tmp_path / "xiling.sock"  # its buffers are small; those of TCP grow to megabytes
    async with scene(receiver=unix_receiver(path, linger_s=0.05)) as on:
        with socket.socket(socket.AF_UNIX) as deaf:
            deaf.connect(str(path))
            deaf.setblocking(False)
            loop, flood = asyncio.get_running_loop(), forged_requests(500)
            before, most = resident(), 0
            with pytest.raises(OSError):
                for _ in range(2_000):
                    await loop.sock_sendall(deaf, flood)
                    most = max(most, resident())
            assert most - before < 16 * MIB
            async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as session:
                assert await post(session, f"http://x{on.path}", on.callback()) == 200


# --- large ones ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "status"), [("right", 413), ("wrong", 404)])
async def test_a_body_that_declares_5_gb_is_not_read(path: str, status: int) -> None:
    """Refused by its length; what is sent all the same is not taken."""
    async with scene() as on:
        head = http(on.path if path == "right" else f"/{'A' * 80}", length=5_000_000_000)
        taken, answer = await swallowed(on.port, head, bytes(64 * 1024))
        assert answer == b"" or status_of(answer) == status
        assert taken < 8 * MIB  # the kernel's own buffers
        assert status_of(await raw_exchange(on.port, head)) == status
        assert await on.sim.finish(on.job.task_ids[0]) == 200


@pytest.mark.parametrize(
    ("head", "piece"),
    [
        pytest.param("right", b"10000\r\n" + bytes(65_536) + b"\r\n", id="chunks"),
        pytest.param("right", b"1\r\n \r\n" * 2_000, id="tiny chunks"),
        pytest.param("wrong", b"10000\r\n" + bytes(65_536) + b"\r\n", id="chunks, forged"),
        pytest.param("wrong", b"1\r\n \r\n" * 2_000, id="tiny chunks, forged"),
        pytest.param("wrong", b"1" + b"0" * 65_536, id="a size without end"),
    ],
)
async def test_endless_chunks_are_cut(head: str, piece: bytes) -> None:
    """A body without a length ends where ours does; memory stays where it was."""
    async with scene(options=ReceiverOptions(body_bytes=32 * 1024)) as on:
        path = on.path if head == "right" else f"/{'A' * 80}"
        tracemalloc.start()
        try:
            taken, answer = await swallowed(on.port, http(path, b"", "Transfer-Encoding: chunked"), piece)
            assert tracemalloc.get_traced_memory()[1] < 4 * MIB
        finally:
            tracemalloc.stop()
        assert answer == b"" or status_of(answer) in {413, 404, 400}
        assert taken < 16 * MIB
        assert await on.sim.finish(on.job.task_ids[0]) == 200


@pytest.mark.parametrize(
    "endless",
    [b"5;" + b"a=b;" * 16_000, b"0\r\n" + b"A: b\r\n" * 10_000, b"5\r\nabcd"],
    ids=["a chunk's extension", "trailers", "a chunk"],
)
async def test_endless_parts_of_a_chunk_are_cut(endless: bytes) -> None:
    """Extensions and trailers are nothing that we read: the body's deadline ends them, if nothing else does."""
    clock = ManualClock()
    async with scene(clock=clock) as on, connected(on.port) as (reader, writer):
        reading = asyncio.create_task(until_closed(reader))
        writer.write(http(on.path, b"", "Transfer-Encoding: chunked") + endless)
        with contextlib.suppress(OSError):
            await writer.drain()
        await settle(500)
        if not reading.done():
            clock.advance(10)
        answer = await reading
        assert answer == b"" or status_of(answer) in {408, 400}
        assert await on.sim.finish(on.job.task_ids[0]) == 200


@pytest.mark.parametrize("header", ["Content-Encoding: gzip", "Transfer-Encoding: gzip, chunked"])
async def test_a_gzip_bomb_is_not_unpacked(header: str) -> None:
    """100 MiB in 100 KB: refused as it is, whatever the header that would have it unpacked."""
    bomb = gzip.compress(bytes(100 * MIB), 9)
    body = bomb if header.startswith("Content") else b"%x\r\n%s\r\n0\r\n\r\n" % (len(bomb), bomb)
    async with scene() as on:
        tracemalloc.start()
        try:
            answer = await raw_exchange(on.port, http(on.path, body, header))
            assert tracemalloc.get_traced_memory()[1] < 4 * MIB
        finally:
            tracemalloc.stop()
        assert status_of(answer) == 415
        assert await on.sim.finish(on.job.task_ids[0]) == 200


# --- many ------------------------------------------------------------------------------------------------------------


async def test_5000_pipelined_requests() -> None:
    """Each is refused, in order, on one connection, while an honest callback on another one has its turn."""
    async with scene(count=2) as on, connected(on.port) as (reader, writer):
        asked = len(on.store.asked)
        writer.write(forged_requests(5_000) + http(f"/{'A' * 80}", b"{}"))
        reading = asyncio.create_task(until_closed(reader))
        assert await on.sim.finish(on.job.task_ids[0]) == 200
        assert not reading.done()
        answers = (await reading).split(b"HTTP/1.1 ")
        assert [answer[:3] for answer in answers[1:]] == [b"404"] * 5_001
        assert len(on.store.asked) == asked + 1


async def test_5000_pipelined_callbacks() -> None:
    """A client that has the URL repeats a callback as fast as it can: one end, and 5,000 times 200."""
    async with scene() as on, connected(on.port) as (reader, writer):
        writer.write(on.honest().replace(b"Connection: close\r\n", b"") * 4_999 + on.honest())
        answers = (await until_closed(reader)).split(b"HTTP/1.1 ")
        assert [answer[:3] for answer in answers[1:]] == [b"200"] * 5_000
        assert len(await on.job) == 1


async def test_600_idle_connections_while_300_honest_callbacks_come() -> None:
    """Below the cap the idle ones disturb no one: 300 jobs, 300 times 200."""
    async with scene() as on, contextlib.AsyncExitStack() as stack:
        for number in range(600):
            _, writer = await stack.enter_async_context(connected(on.port))
            writer.write((b"", b"POST /", b"POST / HTTP/1.1\r\nHost: x\r\n")[number % 3])
        jobs = await asyncio.gather(*(on.client.submit(model_v()) for _ in range(300)))
        answers = await asyncio.gather(*(on.sim.finish(job.task_ids[0]) for job in jobs))
        assert answers == [200] * 300
        assert [job.state for job in jobs] == [State.DONE] * 300


async def test_idle_connections_beyond_the_cap_make_room() -> None:
    """The longest idle one is closed for each new one: never more than the cap, and honest ones always connect."""
    async with scene(options=ReceiverOptions(connections=50)) as on, contextlib.AsyncExitStack() as stack:
        idle = []
        for number in range(200):
            idle.append(await stack.enter_async_context(connected(on.port)))
            if number % 20 == 0:
                assert await on.sim.finish(on.job.task_ids[0]) == 200
        await turns_until(lambda: sum(not reader.at_eof() for reader, _ in idle) <= 50)
        assert not idle[-1][0].at_eof()
        jobs = await asyncio.gather(*(on.client.submit(model_v()) for _ in range(40)))
        assert await asyncio.gather(*(on.sim.finish(job.task_ids[0]) for job in jobs)) == [200] * 40


async def test_a_callback_under_way_is_not_evicted() -> None:
    """With every connection in use for a callback, a new one is refused; the others are answered."""
    store = GatedStore()
    async with scene(count=2, options=ReceiverOptions(connections=2), store=store) as on:
        store.gate.clear()
        under_way = [asyncio.create_task(raw_exchange(on.port, on.honest(place))) for place in range(2)]
        await store.reached.wait()
        await settle(500)
        assert await raw_exchange(on.port, on.honest()) == b""
        store.gate.set()
        assert [status_of(await one) for one in under_way] == [200, 200]
        assert status_of(await raw_exchange(on.port, on.honest())) == 200


# --- requests in disguise --------------------------------------------------------------------------------------------

SHAPES = {
    "length and chunked": "Content-Length: {n}\r\nTransfer-Encoding: chunked\r\n\r\n{chunked}",
    "chunked and length": "Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n{chunked}",
    "length twice": "Content-Length: {n}\r\nContent-Length: {n}\r\n\r\n{body}",
    "two lengths": "Content-Length: {n}\r\nContent-Length: 5\r\n\r\n{body}",
    "a list of lengths": "Content-Length: {n}, {n}\r\n\r\n{body}",
    "plus": "Content-Length: +{n}\r\n\r\n{body}",
    "underscore": "Content-Length: 1_0\r\n\r\n{body}",
    "hexadecimal": "Content-Length: 0x10\r\n\r\n{body}",
    "a length of 30 digits": "Content-Length: 999999999999999999999999999999\r\n\r\n{body}",
    "xchunked": "Transfer-Encoding: xchunked\r\n\r\n{chunked}",
    "chunked, then another": "Transfer-Encoding: chunked, identity\r\n\r\n{chunked}",
    "chunked twice": "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n{chunked}",
    "chunked and identity": "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n{chunked}",
    "gzip and chunked": "Transfer-Encoding: gzip, chunked\r\n\r\n{chunked}",
    "a space before the colon": "Transfer-Encoding : chunked\r\n\r\n{chunked}",
    "a tab before chunked": "Transfer-Encoding:\tchunked\r\nContent-Length: 4\r\n\r\n{chunked}",
    "a folded line": "Transfer-Encoding:\r\n chunked\r\n\r\n{chunked}",
    "a NUL": "A: \0\r\nContent-Length: {n}\r\n\r\n{body}",
    "a bare CR": "A: a\rContent-Length: 0\r\nContent-Length: {n}\r\n\r\n{body}",
    "chunk sizes with LF": "Transfer-Encoding: chunked\r\n\r\n{x}\n{body}\n0\n\n",
    "a chunk size with 0x": "Transfer-Encoding: chunked\r\n\r\n0x{x}\r\n{body}\r\n0\r\n\r\n",
    "a negative chunk": "Transfer-Encoding: chunked\r\n\r\n-{x}\r\n{body}\r\n0\r\n\r\n",
    "a chunk beyond 64 bits": "Transfer-Encoding: chunked\r\n\r\n1000000000000000{x}\r\n{body}\r\n0\r\n\r\n",
    "a chunk that is longer than sent": "Transfer-Encoding: chunked\r\n\r\n5\r\n{body}\r\n0\r\n\r\n",
    "an upgrade": "Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: {n}\r\n\r\n{body}",
    "a length of nothing": "Content-Length:\r\n\r\n{body}",
    "no length": "A: b\r\n\r\n{body}",
    "a short length": "Content-Length: 5\r\n\r\n{body}",
}


@pytest.mark.parametrize("shape", SHAPES)
async def test_a_request_in_disguise_smuggles_nothing(shape: str) -> None:
    """However its length is read, by us or by a proxy, the request inside its body is never served."""
    async with scene(count=2, options=ReceiverOptions(body_s=0.2, header_s=0.2)) as on:
        inner = on.honest(1).decode()
        outer = json.dumps({**json.loads(on.callback(0)), "x": "PLACE"}).replace("PLACE", "\r\n\r\n")
        body = outer + inner
        values = {
            "n": len(body),
            "x": f"{len(body):x}",
            "body": body,
            "chunked": f"{len(body):x}\r\n{body}\r\n0\r\n\r\n",
        }
        sent = f"POST {on.path} HTTP/1.1\r\nHost: x\r\n{SHAPES[shape].format(**values)}"
        answer = await raw_exchange(on.port, sent.encode())
        applied = [item for item in on.store.asked if getattr(item, "task_id", None) == on.job.task_ids[1]]
        assert applied == []
        assert b" 200 " not in answer
        assert b" 500 " not in answer and b" 503 " not in answer
        assert await on.sim.finish(on.job.task_ids[0]) == 200


@pytest.mark.parametrize(
    "target",
    [
        "*",
        "//[/x",
        "http://[::1/x",
        "http://a:99999/x",
        "/%ff%00",
        "a:80",
        "/..%2f..%2fetc",
        "/\x7f",
        "/" + "%41" * 600,
    ],
)
@pytest.mark.parametrize("method", ["POST", "GET", "CONNECT", "OPTIONS", "PRI", "\x16\x03\x01"])
async def test_strange_targets_are_refused(method: str, target: str) -> None:
    """Scanners ask for everything: 404, or 400 for what is not HTTP."""
    async with scene() as on:
        sent = f"{method} {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
        answer = await raw_exchange(on.port, sent.encode("latin-1"))
        assert status_of(answer) in {404, 400}


async def test_one_token_is_one_job_however_it_is_spelt() -> None:
    """Percent signs, an absolute target, a prefix that a proxy has left or added: the same URL, the same job."""
    async with scene() as on:
        token = on.path[1:]
        for path in (f"/%{ord(token[0]):02X}{token[1:]}", f"http://evil.example/{token}", f"//x//{token}"):
            assert status_of(await raw_exchange(on.port, http(path, on.callback()))) == 200
        assert len(await on.job) == 1


# --- aborted requests ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["Content-Length: 900", "Transfer-Encoding: chunked"])
async def test_a_sender_that_hangs_up_is_no_error(ending: str, caplog: pytest.LogCaptureFixture) -> None:
    """In the middle of a body: nothing is written or logged."""
    async with scene() as on:
        asked = list(on.store.asked)
        async with connected(on.port) as (_, writer):
            writer.write(f"POST {on.path} HTTP/1.1\r\nHost: x\r\n{ending}\r\n\r\n".encode() + b"5\r\nabc")
            await writer.drain()
            await settle()
        await settle(200)
        assert on.store.asked == asked
        assert [record for record in caplog.records if record.levelno > logging.INFO] == []
        assert await on.sim.finish(on.job.task_ids[0]) == 200


async def test_a_sender_that_waits_for_a_go_ahead_gets_it() -> None:
    """`Expect: 100-continue`: told to go on when its token is good, refused at once when it is not."""
    async with scene(options=ReceiverOptions(linger_s=0.05)) as on:
        async with connected(on.port) as (reader, writer):
            writer.write(http(on.path, b"", "Expect: 100-continue", length=len(on.callback())))
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(on.callback())
            assert status_of(await reader.read()) == 200
        refused = http(f"/{'A' * 80}", b"", "Expect: 100-continue", length=700)
        assert status_of(await raw_exchange(on.port, refused)) == 404
        assert len(await on.job) == 1


# --- forged tokens, any bodies ---------------------------------------------------------------------------------------


def forgeries(minted: list[str], count: int) -> Iterator[str]:
    """Every single-bit flip of these tokens, then random ones and mutations, `count` together."""
    dice = random.Random(7)
    made = 0
    for token in minted:
        raw = base64.urlsafe_b64decode(token)
        for bit in range(len(raw) * 8):
            flipped = bytearray(raw)
            flipped[bit // 8] ^= 1 << bit % 8
            yield base64.urlsafe_b64encode(flipped).decode()
            made += 1
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    while made < count:
        token = dice.choice(minted)
        match made % 4:
            case 0:
                forged = base64.urlsafe_b64encode(dice.randbytes(60)).decode()
            case 1:
                forged = token[: (cut := dice.randrange(1, 79))] + dice.choice(minted)[cut:]
            case 2:
                head = base64.urlsafe_b64decode(token)[:28]  # all is right but for the MAC
                forged = base64.urlsafe_b64encode(head + dice.randbytes(32)).decode()
            case _:
                places = dice.sample(range(80), 3)
                forged = "".join(dice.choice(alphabet) if at in places else was for at, was in enumerate(token))
        if forged not in minted:
            yield forged
            made += 1


async def test_100000_forged_tokens(deep: bool) -> None:
    """None is accepted, each gets the very same answer, nothing is looked up, and the service is asked nothing."""
    receiver = WebhookReceiver(port=0)
    async with scene(receiver=receiver) as on:
        jobs = [on.job, *[await on.client.submit(model_v()) for _ in range(99)]]
        minted = [token_of(record.callback_url) for record in on.sim.ledger.posts]
        asked, gets = len(on.store.asked), len(on.sim.ledger.gets)
        body = on.callback()
        replies = set()
        count = 0
        for forged in forgeries(minted, 1_000_000 if deep else 100_000):
            replies.add(id(await receiver.handle(f"/{forged}", body)))
            count += 1
        assert count == (1_000_000 if deep else 100_000)
        reply = await receiver.handle(f"/{'A' * 80}", body)
        assert (replies, reply.status) == ({id(reply)}, 404)
        assert (len(on.store.asked), len(on.sim.ledger.gets)) == (asked, gets)
        assert {job.state for job in jobs} == {State.ACCEPTED}
        sent = b"".join(http(f"/{forged}", body) for forged in forgeries(minted[:2], 960))
        answers = await raw_exchange(on.port, sent.replace(b"Connection: close\r\n", b"") + http("/", b""))
        assert answers.count(b"HTTP/1.1 404") == 961
        assert answers.count(b"HTTP/1.1 ") == 961


def mutations(seed: int, document: bytes, count: int) -> Iterator[bytes]:
    """This document with a few bytes changed, left out, doubled, or replaced by what parsers dislike."""
    dice = random.Random(seed)
    spice = (b"NaN", b"1e999", b"\\ud83d", b'"', b"{", b"[", b"\xff", b"\0", b"null", b"-0", b"9" * 40, b'"status"')
    for _ in range(count):
        changed = bytearray(document)
        for _ in range(dice.randint(1, 3)):
            at = dice.randrange(len(changed) + 1)
            match dice.randrange(4):
                case 0:
                    changed[at : at + 1] = dice.randbytes(1)
                case 1:
                    del changed[at : at + dice.randint(1, 8)]
                case 2:
                    changed[at:at] = changed[at : at + dice.randint(1, 20)]
                case _:
                    changed[at:at] = dice.choice(spice)
        yield bytes(changed)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(["task_id", "status", "video_url", "thumbnail_url", "error_message", "width", "duration", "x"])
STATUSES = st.sampled_from(["SUCCEEDED", "FAILED", "PROCESSING", "PENDING", "QUEUED", ""])


def test_50000_generated_bodies(deep: bool) -> None:
    """Each is a report, exactly as it stands, or malformed; through `handle` none is a 500, and all statuses occur."""
    receiver, seen = WebhookReceiver(port=0), set()
    tried = 0
    with asyncio.Runner() as runner:
        sim = runner.run(Simulator(manual=True).__aenter__())
        client = runner.run(client_of(sim, receiver=receiver).__aenter__())
        job = runner.run(client.submit(model_v()))
        path = f"/{token_of(sim.ledger.posts[-1].callback_url)}"
        each = 20 if deep else 100

        @settings(max_examples=20_000 if deep else 500)
        @given(changed=st.dictionaries(FIELDS, VALUES | STATUSES, max_size=3), seed=st.integers(0, 2**32))
        def check(changed: dict[str, Any], seed: int) -> None:
            nonlocal tried
            document = json.loads(callback_body(job.task_ids[0]))
            document["data"] |= changed
            base = json.dumps(document, ensure_ascii=seed % 2 == 0).encode("utf-8", "surrogatepass")
            for number, body in enumerate((base, *mutations(seed, base, each - 1))):
                tried += 1
                fuzz.body(body)
                if number % 20 == 0:
                    seen.add(runner.run(receiver.handle(path, body)).status)

        check()
        runner.run(client.__aexit__(None, None, None))
        runner.run(sim.__aexit__(None, None, None))
    assert tried >= 50_000
    assert {200, 400} <= seen <= {200, 400, 409}


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_the_fuzzers_first_inputs_and_their_neighbours(name: str) -> None:
    """The corpus and 2,000 mutations of it hold what the target claims; the search itself is `fuzz_search.py`."""
    target = fuzz.TARGETS[name]
    small = [data for data in target.corpus if len(data) < 2_000]
    for data in target.corpus:
        target.check(data)
    for number, data in enumerate(small):
        for changed in mutations(number, data, 2_000 // len(small)):
            target.check(changed)


# --- allowed networks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sent", "status"),
    [
        ({"allowed_networks": ["127.0.0.0/8"]}, [], 200),
        ({"allowed_networks": ["203.0.113.0/24"]}, ["X-Forwarded-For: 203.0.113.9"], 404),
        (
            {"allowed_networks": ["203.0.113.0/24"], "trusted_proxies": 1},
            ["X-Forwarded-For: 1.1.1.1, 203.0.113.9"],
            200,
        ),
        (
            {"allowed_networks": ["203.0.113.0/24"], "trusted_proxies": 1},
            ["X-Forwarded-For: 203.0.113.9, 1.1.1.1"],
            404,
        ),
        ({"allowed_networks": ["203.0.113.0/24"], "trusted_proxies": 1}, [], 404),
    ],
)
async def test_a_callback_from_elsewhere_is_404(options: dict[str, Any], sent: list[str], status: int) -> None:
    """With a good token, too; and a load balancer may ask for /healthz from anywhere."""
    async with scene(receiver=WebhookReceiver(port=0, options=ReceiverOptions(**options))) as on:
        assert status_of(await raw_exchange(on.port, on.honest(0, *sent))) == status
        assert status_of(await raw_exchange(on.port, http("/healthz", method="GET"))) == 200


@pytest.mark.parametrize("networks", [(), "10.0.0.0/8", ["10.0.0.1/8"], ["x"], [""], [None]])
def test_invalid_networks_are_refused(networks: Any) -> None:
    """An empty list would refuse all, text is not a list, host bits are a slip."""
    with pytest.raises(ConfigurationError, match="allowed_networks"):
        ReceiverOptions(allowed_networks=networks)


@pytest.mark.parametrize("count", [-1, 17, True, "1", None])
def test_an_invalid_proxy_count_is_refused(count: Any) -> None:
    """0 to 16."""
    with pytest.raises(ConfigurationError, match="trusted_proxies"):
        ReceiverOptions(trusted_proxies=count)


# --- health ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_health_says_nothing_else(method: str) -> None:
    """200 and two letters, below whatever prefix; another method finds nothing there."""
    async with scene() as on:
        for path in ("/healthz", "/xiling/healthz"):
            answer = await raw_exchange(on.port, http(path, method=method))
            assert status_of(answer) == 200
            assert answer.endswith(b"\r\n\r\nok" if method == "GET" else b"\r\n\r\n")
            assert (b"Python" in answer, b"aiohttp" in answer, b"xiling" in answer) == (False, False, False)
        assert status_of(await raw_exchange(on.port, http("/healthz"))) == 404
        assert status_of(await raw_exchange(on.port, http("/health", method=method))) == 404


async def test_no_answer_to_a_request_tells_the_versions() -> None:
    """Neither aiohttp's nor Python's. (What is not HTTP is answered by aiohttp itself: README leaves it to a proxy.)"""
    async with scene() as on:
        for sent in (on.honest(), http("/x"), http("/healthz", method="GET"), http(on.path, length=10**9)):
            answer = await raw_exchange(on.port, sent)
            assert answer
            assert (b"Python" in answer, b"aiohttp" in answer) == (False, False)


# --- the end ---------------------------------------------------------------------------------------------------------


async def test_a_body_under_way_is_waited_for_at_the_end() -> None:
    """Leaving the client: half a callback may become a whole one; no other connection is accepted."""
    async with Simulator(manual=True) as sim:
        store = NotingStore()
        client = client_of(sim, store=store)
        await client.__aenter__()
        job = await client.submit(model_v())
        url = str(sim.ledger.posts[-1].callback_url)
        sent = http(f"/{token_of(url)}", callback_body(job.task_ids[0]))
        async with connected(port_of(url)) as (reader, writer), connected(port_of(url)) as (idle, _):
            writer.write(sent[:-5])
            await settle(200)
            leaving = asyncio.create_task(client.__aexit__(None, None, None))
            assert await until_closed(idle) == b""
            with pytest.raises(OSError, match=r"refused|Connect call failed"):
                await asyncio.open_connection("127.0.0.1", port_of(url))
            writer.write(sent[-5:])
            assert status_of(await reader.read()) == 200
            await leaving
        record = await store.get(job.id)
        assert record is not None
        assert record.state is State.DONE


async def test_a_body_that_never_ends_does_not_hold_up_the_end() -> None:
    """After `shutdown_s` its connection is closed."""
    async with Simulator(manual=True) as sim, contextlib.AsyncExitStack() as stack:
        receiver = WebhookReceiver(port=0, options=ReceiverOptions(shutdown_s=0.1))
        async with client_of(sim, receiver=receiver) as client:
            job = await client.submit(model_v())
            url = str(sim.ledger.posts[-1].callback_url)
            reader, writer = await stack.enter_async_context(connected(port_of(url)))
            writer.write(http(f"/{token_of(url)}", callback_body(job.task_ids[0]))[:-5])
            await settle(200)
        assert await until_closed(reader) in (b"",)


# --- TLS, Unix sockets -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def tls(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    return context


@asynccontextmanager
async def secure_scene(
    authority: trustme.CA, tls: ssl.SSLContext, **limits: Any
) -> AsyncIterator[tuple[Scene, ssl.SSLContext]]:
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    async with scene(receiver=WebhookReceiver(port=0, options=ReceiverOptions(tls=tls, **limits))) as on:
        assert on.url.startswith("https://127.0.0.1:")
        yield on, trusting


async def test_callbacks_over_tls(authority: trustme.CA, tls: ssl.SSLContext) -> None:
    """With a certificate of its own no proxy is needed; a connection is kept as without."""
    async with secure_scene(authority, tls) as (on, trusting):
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trusting)) as session:
            for _ in range(3):
                assert await post(session, on.url, on.callback()) == 200
            assert await post(session, on.url, bytes(300_000)) == 413
        assert len(await on.job) == 1


async def test_a_request_that_comes_with_the_end_of_the_handshake(authority: trustme.CA, tls: ssl.SSLContext) -> None:
    """The last message of the handshake and the request in one packet: nothing is lost."""
    async with secure_scene(authority, tls) as (on, trusting):
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            trusting.maximum_version = version
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
                end.write(on.honest())
                writer.write(outgoing.read())  # Finished and the request together
                answer = b""
                while b"\r\n\r\nok" not in answer:
                    incoming.write(await reader.read(65_536))
                    with contextlib.suppress(ssl.SSLWantReadError):
                        answer += end.read()
                assert status_of(answer) == 200


async def test_connections_are_counted_before_tls(authority: trustme.CA, tls: ssl.SSLContext) -> None:
    """No handshake is needed to fill a server: so they are counted, closed, and evicted, before it."""
    async with (
        secure_scene(authority, tls, connections=20, header_s=0.5) as (on, trusting),
        contextlib.AsyncExitStack() as stack,
    ):
        mute = [await stack.enter_async_context(connected(on.port)) for _ in range(60)]
        for number, (_, writer) in enumerate(mute):
            writer.write(b"\x16\x03\x01" if number % 2 else b"")
        await turns_until(lambda: sum(not reader.at_eof() for reader, _ in mute) <= 20)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trusting)) as session:
            assert await post(session, on.url, on.callback()) == 200
        await asyncio.gather(*(until_closed(reader) for reader, _ in mute))


@pytest.mark.parametrize(
    "sent", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\0" * 500, b"\x16\x03\x01\x02\x00" + b"\xff" * 512]
)
async def test_a_connection_that_is_not_tls_is_closed(authority: trustme.CA, tls: ssl.SSLContext, sent: bytes) -> None:
    """Plain HTTP or garbage on the TLS port: no traceback, and the next one is served."""
    async with secure_scene(authority, tls) as (on, trusting):
        for _ in range(30):
            assert b"HTTP" not in await raw_exchange(on.port, sent)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trusting)) as session:
            assert await post(session, on.url, on.callback()) == 200


async def test_the_end_in_the_middle_of_a_handshake(authority: trustme.CA, tls: ssl.SSLContext) -> None:
    """It is broken off; nothing is left."""
    async with contextlib.AsyncExitStack() as stack:
        async with secure_scene(authority, tls) as (on, _):
            mute = [await stack.enter_async_context(connected(on.port)) for _ in range(5)]
            await settle(100)
        for reader, _ in mute:
            assert await until_closed(reader) == b""


@pytest.mark.parametrize("tls", ["yes", True])
def test_an_invalid_tls_context_is_refused(tls: Any) -> None:
    """It is Python's own SSLContext."""
    with pytest.raises(ConfigurationError, match="SSLContext"):
        ReceiverOptions(tls=tls)


def test_options_that_exclude_each_other(tmp_path: Path, tls: ssl.SSLContext) -> None:
    """A port or a path; TLS only with a port; networks behind a socket only with a trusted proxy."""
    url = "https://media.example.com/x"
    for options in (
        {"tls": tls}, {"tls": tls, "path": tmp_path / "s"},
        {"path": tmp_path / "s", "allowed_networks": ["10.0.0.0/8"]},
    ):  # fmt: skip
        with pytest.raises(ConfigurationError):
            WebhookReceiver(url, options=ReceiverOptions(**options))
    with pytest.raises(ConfigurationError, match="not both"):
        WebhookReceiver(url, port=0, options=ReceiverOptions(path=tmp_path / "s"))
    with pytest.raises(ConfigurationError, match="cannot reach this receiver"):
        WebhookReceiver(options=ReceiverOptions(path=tmp_path / "s"))


async def test_callbacks_through_a_unix_socket(tmp_path: Path) -> None:
    """The proxy strips its prefix and names the sender; the socket's file goes with the client."""
    path = tmp_path / "xiling.sock"
    receiver = unix_receiver(path, allowed_networks=["203.0.113.0/24"], trusted_proxies=1)
    async with scene(receiver=receiver) as on:
        assert receiver.port is None
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as session:
            seen = {"X-Forwarded-For": "203.0.113.9"}
            assert await post(session, f"http://x{on.path}", on.callback()) == 404
            assert await post(session, f"http://x{on.path}", on.callback(), **seen) == 200
            async with session.get("http://x/healthz") as response:
                assert (response.status, await response.text()) == (200, "ok")
        assert len(await on.job) == 1
        assert path.is_socket()
    assert list(tmp_path.iterdir()) == []


async def test_an_orphaned_socket_is_replaced_and_a_living_one_is_not(tmp_path: Path) -> None:
    """A killed process leaves its socket's file; another one that still listens is not robbed of its callbacks."""
    path = tmp_path / "xiling.sock"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
    async with scene(receiver=unix_receiver(path)) as on:
        async with Simulator() as sim:
            with pytest.raises(ConfigurationError, match="another process listens there"):
                await client_of(sim, receiver=unix_receiver(path)).__aenter__()
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as session:
            assert await post(session, f"http://x{on.path}", on.callback()) == 200


@pytest.mark.parametrize("name", ["missing/s.sock", "x" * 200, "a-file"])
async def test_an_impossible_socket_path_is_refused(tmp_path: Path, name: str) -> None:
    """No folder, a name that is too long, a file that is not ours: refused, and the file is left alone."""
    await asyncio.to_thread((tmp_path / "a-file").write_text, "precious")
    async with Simulator() as sim:
        with pytest.raises(ConfigurationError, match="cannot listen"):
            await client_of(sim, receiver=unix_receiver(tmp_path / name)).__aenter__()
    assert await asyncio.to_thread((tmp_path / "a-file").read_text) == "precious"


async def test_a_proxy_may_strip_or_add_a_prefix() -> None:
    """Only the last segment counts: the public URL's path need not arrive."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    receiver = WebhookReceiver(f"http://127.0.0.1:{port}/deep/prefix", port=port)
    async with scene(receiver=receiver) as on, plain_session() as session:
        assert URL(on.url).path.startswith("/deep/prefix/")
        for prefix in ("", "/prefix", "/deep/prefix", "/other/deep/prefix"):
            assert await post(session, f"http://127.0.0.1:{port}{prefix}{on.path}", on.callback()) == 200
        assert len(await on.job) == 1
