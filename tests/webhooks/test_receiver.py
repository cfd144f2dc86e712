"""The receiver, spoken to as the service, a proxy, a scanner or an attacker would."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from email.utils import parsedate_to_datetime

import aiohttp
import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    GatedStore,
    NotingStore,
    callback_body,
    client_of,
    gone,
    http,
    model_v,
    plain_session,
    port_of,
    post,
    raw_exchange,
    settle,
    started,
    status_of,
    token_of,
    turns_until,
)

from xiling_async import (
    Client,
    ClientClosed,
    ConfigurationError,
    Failed,
    Job,
    MemoryStore,
    State,
    TaskFailed,
    Video,
    WebhookReceiver,
)
from xiling_async.simulator import Simulator, faults
from xiling_async.testing.clock import ManualClock

BODY_BYTES = 256 * 1024
BODY_DEADLINE_S = 10.0


async def pending(sim: Simulator, client: Client, count: int = 1) -> tuple[Job[Video], str]:
    """A job that waits for its callbacks, and the URL that they go to."""
    job = await client.submit(model_v(count=count))
    return job, str(sim.ledger.posts[-1].callback_url)


def tracebacks(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.exc_info]


# --- handle(): no sockets --------------------------------------------------------------------------------------------


async def test_handle_takes_a_callback_from_any_framework() -> None:
    """The last segment of the path is the token, whatever stands before it; the reply has all that is to be sent."""
    receiver = WebhookReceiver(port=0)
    async with Simulator(manual=True) as sim, client_of(sim, receiver=receiver) as client:
        job, url = await pending(sim, client, count=3)
        paths = (f"/{token_of(url)}", f"/api/v1/xiling/{token_of(url)}", url)
        for task_id, path in zip(job.task_ids, paths, strict=True):
            reply = await receiver.handle(path, callback_body(task_id))
            assert (reply.status, reply.body) == (200, b"ok")
            assert reply.headers["Cache-Control"] == "no-store"
        assert len(await job) == 3


async def test_a_cancelled_handle_loses_no_callback() -> None:
    """The sender hangs up while its callback is being written, so the framework cancels the call: nothing is lost."""
    receiver, store = WebhookReceiver(port=0), GatedStore()
    async with Simulator(manual=True) as sim, client_of(sim, receiver=receiver, store=store) as client:
        job, url = await pending(sim, client)
        waiting = await started(job.result())
        store.gate.clear()
        handling = asyncio.create_task(receiver.handle(f"/{token_of(url)}", callback_body(job.task_ids[0])))
        await store.reached.wait()
        await gone(handling)
        store.gate.set()
        assert (await waiting)[0].task_id == job.task_ids[0]


async def test_an_application_that_cancels_its_handlers_loses_no_callback() -> None:
    """aiohttp's `handler_cancellation`: the sender hangs up in the middle of the commit."""
    app = web.Application()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        receiver, store = WebhookReceiver(f"http://127.0.0.1:{listening.getsockname()[1]}/x"), GatedStore()
        receiver.add_to(app, "/x")
        runner = web.AppRunner(app, handler_cancellation=True)
        await runner.setup()
        await web.SockSite(runner, listening).start()
        try:
            async with Simulator(manual=True) as sim, client_of(sim, receiver=receiver, store=store) as client:
                job, url = await pending(sim, client)
                waiting = await started(job.result())
                store.gate.clear()
                async with plain_session() as session:
                    sending = asyncio.create_task(post(session, url, callback_body(job.task_ids[0])))
                    await store.reached.wait()
                    await gone(sending)
                await turns_until(lambda: not runner.server or not runner.server.connections)
                store.gate.set()
                assert (await waiting)[0].task_id == job.task_ids[0]
        finally:
            await runner.cleanup()


async def test_handle_refuses_as_the_server_does() -> None:
    """Wrong token, malformed, too large, another job's task: 404, 400, 413, 409; the job goes on."""
    receiver = WebhookReceiver(port=0)
    async with Simulator(manual=True) as sim, client_of(sim, receiver=receiver) as client:
        job, url = await pending(sim, client)
        path, body = f"/{token_of(url)}", callback_body(job.task_ids[0])
        asked = [
            ("", body), ("/", body), (path[:-1], body), (path + "/", body), (path + "?a=b", body), (path, b""),
            (path, body.ljust(BODY_BYTES + 1)), (path, callback_body("i2v-strange")), (path, body.ljust(BODY_BYTES)),
        ]  # fmt: skip
        replies = [(await receiver.handle(*one)).status for one in asked]
        assert replies == [404, 404, 404, 404, 404, 400, 413, 409, 200]


async def test_a_receiver_without_an_open_client_answers_503() -> None:
    """Before the client is open and after it was closed, every callback is to be sent again later."""
    receiver = WebhookReceiver(port=0)
    assert (await receiver.handle("/x", b"")).status == 503
    async with Simulator(manual=True) as sim:
        async with client_of(sim, receiver=receiver) as client:
            job, url = await pending(sim, client)
        reply = await receiver.handle(f"/{token_of(url)}", callback_body(job.task_ids[0]))
        assert (reply.status, "Retry-After" in reply.headers) == (503, True)


async def test_a_callback_under_way_when_the_client_closes_is_committed_and_answered() -> None:
    """Closing waits for the commit of a callback that was already read; its sender gets the 200."""
    store = GatedStore()

    async def open_later() -> None:
        await settle()
        store.gate.set()

    async with Simulator(manual=True) as sim:
        async with client_of(sim, store=store) as client:
            job, _ = await pending(sim, client)
            store.gate.clear()
            finishing = asyncio.create_task(sim.finish(job.task_ids[0]))
            await store.reached.wait()
            opening = asyncio.create_task(open_later())
        await opening
        assert await finishing == 200
        record = await store.get(job.id)
        assert record is not None
        assert (record.state, job.state) == (State.DONE, State.DONE)


@st.composite
def paths(draw: st.DrawFn, token: str) -> str:
    """Any text, or something near a valid path."""
    place = draw(st.integers(0, 79))
    near = st.sampled_from([
        f"/{token}", f"/{token}", f"/x/{token}", f"/{token[:place]}", f"/{token[:place]}A{token[place + 1 :]}",
        f"/{token}/", f"/{token}?x", f"//{token}", f"/{token}\x00",
    ])  # fmt: skip
    return draw(near | st.text() | st.text("AZaz09_-", min_size=80, max_size=80).map("/".__add__))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def bodies(draw: st.DrawFn, task_id: str) -> bytes:
    """Any bytes, any JSON, or a callback with any of its fields changed."""
    names = ["task_id", "status", "video_url", "thumbnail_url", "error_message", "width", "height", "duration", "new"]
    statuses = st.sampled_from(["SUCCEEDED", "FAILED", "PROCESSING", "PENDING", "QUEUED", ""])
    changed = draw(st.dictionaries(st.sampled_from(names), JSON | statuses, max_size=3))
    near = callback_body(
        task_id, draw(statuses), **{k: v for k, v in changed.items() if k not in ("task_id", "status")}
    )
    document = json.loads(near)
    document["data"] |= changed
    return draw(
        st.binary() | JSON.map(lambda value: json.dumps(value).encode()) | st.just(json.dumps(document).encode())
        | st.just(json.dumps(document, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    )  # fmt: skip


def test_any_path_and_body_through_handle_is_answered(deep: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever comes, `handle` answers with a known status, raises nothing and logs no traceback."""
    receiver, store = WebhookReceiver(port=0), MemoryStore()
    seen: set[int] = set()
    with asyncio.Runner() as runner:
        sim = runner.run(Simulator(manual=True).__aenter__())
        client = runner.run(client_of(sim, receiver=receiver, store=store).__aenter__())
        job, url = runner.run(pending(sim, client))
        token, task_id = token_of(url), job.task_ids[0]

        @settings(max_examples=20_000 if deep else 150)
        @given(path=paths(token), body=bodies(task_id))
        def check(path: str, body: bytes) -> None:
            reply = runner.run(receiver.handle(path, body))
            seen.add(reply.status)
            assert reply.status in {200, 400, 404, 409}
            if not path.endswith(token):
                assert reply.status == 404

        check()
        seen.add(runner.run(receiver.handle(f"/{token}", callback_body(task_id))).status)  # generated or not
        runner.run(client.__aexit__(None, None, None))
        runner.run(sim.__aexit__(None, None, None))
    assert {200, 400, 404} <= seen
    assert tracebacks(caplog) == []


# --- a user's own application ----------------------------------------------------------------------------------------


@asynccontextmanager
async def served(app: web.Application, listening: socket.socket) -> AsyncIterator[None]:
    """A user's own aiohttp application."""
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.05)
    await runner.setup()
    try:
        await web.SockSite(runner, listening).start()
        yield
    finally:
        await runner.cleanup()


@pytest.mark.parametrize("path", ["/xiling", "/deep/er/xiling/", "/"])
async def test_add_to_serves_inside_the_users_application(path: str) -> None:
    """The callbacks come through the user's own server, whose own routes and limits are left alone."""

    async def hello(request: web.Request) -> web.Response:
        return web.Response(text=f"hello {len(await request.read())}")

    app = web.Application(client_max_size=10)
    app.router.add_post("/a/hello", hello)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        origin = f"http://127.0.0.1:{listening.getsockname()[1]}"
        receiver = WebhookReceiver(f"{origin}{path}")
        receiver.add_to(app, path)
        base = f"{origin}{path.rstrip('/')}"
        async with served(app, listening), Simulator(manual=True) as sim, plain_session() as session:
            assert await post(session, f"{base}/token", b"{}") == 503  # the client is not open yet
            async with client_of(sim, receiver=receiver) as client:
                job, url = await pending(sim, client)
                assert url == f"{base}/{token_of(url)}"
                assert await post(session, f"{base}/{'A' * 80}", b"{}") == 404
                assert await post(session, url, b" " * (BODY_BYTES + 1)) == 413
                assert await post(session, url, callback_body(job.task_ids[0]), **{"Content-Encoding": "gzip"}) == 415
                async with session.get(url) as response:
                    assert response.status == 404
                assert await post(session, f"{origin}/a/hello", b"12345") == 200
                assert await post(session, f"{origin}/a/hello", b"1234567890+") == 413
                assert await sim.finish(job.task_ids[0]) == 200
                assert len(await job) == 1
            assert await post(session, url, b"{}") == 503


# --- the own server --------------------------------------------------------------------------------------------------


async def test_a_port_in_use_is_named_and_leaves_nothing_open() -> None:
    """The error names the port; the client is not open, sends nothing, and the next one may try another port."""
    store = NotingStore()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with Simulator() as sim:
            receiver = WebhookReceiver(f"http://127.0.0.1:{port}", port=port)
            client = client_of(sim, receiver=receiver, store=store)
            with pytest.raises(ConfigurationError, match=f":{port}"):
                await client.__aenter__()
            with pytest.raises(ClientClosed):
                await client.submit(model_v())
            async with client_of(sim, store=store) as other:
                await (await other.submit(model_v()))
            assert len(sim.ledger.posts) == 1


async def test_port_0_is_a_free_port_that_can_be_read() -> None:
    """Once started, `port` and `public_url` say where it listens; before and after, nothing."""
    receiver = WebhookReceiver(port=0)
    before_and_after = [(receiver.port, receiver.public_url)]
    async with Simulator() as sim, client_of(sim, receiver=receiver):
        assert receiver.port
        assert receiver.public_url == f"http://127.0.0.1:{receiver.port}"
    before_and_after.append((receiver.port, receiver.public_url))
    assert before_and_after == [(0, None), (0, None)]


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS"])
async def test_only_post_is_a_callback(method: str) -> None:
    """Another method with a valid URL is answered 404 and changes nothing."""
    store = NotingStore()
    async with Simulator(manual=True) as sim, client_of(sim, store=store) as client, plain_session() as session:
        job, url = await pending(sim, client)
        asked = list(store.asked)
        async with session.request(method, url, data=callback_body(job.task_ids[0])) as response:
            assert response.status == 404
        assert store.asked == asked


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "x"])
async def test_a_content_encoding_is_refused(encoding: str) -> None:
    """A compressed body is not unpacked: a small one could be a gigabyte."""
    store = NotingStore()
    async with Simulator(manual=True) as sim, client_of(sim, store=store) as client:
        job, url = await pending(sim, client)
        asked = list(store.asked)
        sent = http(f"/{token_of(url)}", callback_body(job.task_ids[0]), f"Content-Encoding: {encoding}")
        assert status_of(await raw_exchange(port_of(url), sent)) == 415
        assert store.asked == asked


@pytest.mark.parametrize(
    "content_type", [None, "text/plain", "application/json; charset=utf-8", "multipart/form-data", "?"]
)
async def test_the_content_type_does_not_matter(content_type: str | None) -> None:
    """What a sender calls its JSON is not documented: only the body counts."""
    async with Simulator(manual=True) as sim, client_of(sim) as client:
        job, url = await pending(sim, client)
        headers = [] if content_type is None else [f"Content-Type: {content_type}"]
        sent = http(f"/{token_of(url)}", callback_body(job.task_ids[0]), *headers)
        assert status_of(await raw_exchange(port_of(url), sent)) == 200
        assert len(await job) == 1


async def test_a_chunked_callback_is_taken() -> None:
    """A body without a length, in pieces that split a character, is a callback like any other."""
    async with Simulator(manual=True) as sim, client_of(sim) as client:
        job, url = await pending(sim, client)
        body = callback_body(job.task_ids[0], note="Übermut").decode().encode()
        chunks = [b"%x\r\n%s\r\n" % (len(piece), piece) for piece in (body[i : i + 7] for i in range(0, len(body), 7))]
        head = http(f"/{token_of(url)}", b"", "Transfer-Encoding: chunked")
        assert status_of(await raw_exchange(port_of(url), head, *chunks, b"0\r\n\r\n")) == 200
        assert len(await job) == 1


async def test_a_body_that_stalls_is_cut_at_its_deadline() -> None:
    """Half a body and then nothing: 408 after ten seconds, not before, and the job is untouched."""
    clock, store = ManualClock(), NotingStore()
    async with Simulator(manual=True) as sim, client_of(sim, clock=clock, store=store) as client:
        job, url = await pending(sim, client)
        asked, body = list(store.asked), callback_body(job.task_ids[0])
        half = http(f"/{token_of(url)}", body[:20], length=len(body))
        asking = asyncio.create_task(raw_exchange(port_of(url), half))
        await settle(500)
        clock.advance(BODY_DEADLINE_S - 0.01)
        await settle(500)
        assert not asking.done()
        clock.advance(0.01)
        assert status_of(await asking) == 408
        assert store.asked == asked
        assert await sim.finish(job.task_ids[0]) == 200


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param((b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{", b""), id="hangs up in the body"),
        pytest.param((b"POST %s HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",), id="bad chunk"),
        pytest.param((b"POST %s HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab", b""), id="half chunk"),
        pytest.param((b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: x\r\n\r\n",), id="bad length"),
        pytest.param((b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",), id="negative length"),
        pytest.param((b"POST %s HTTP/1.1\r\nno colon\r\n\r\n",), id="bad header"),
        pytest.param((b"POST %s HTTP/9.9\r\n\r\n",), id="bad version"),
        pytest.param((b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",), id="TLS"),
        pytest.param((b"\0" * 3000 + b"\r\n\r\n",), id="zeros"),
        pytest.param((b"POST %s" + b"a" * 3000 + b" HTTP/1.1\r\n\r\n",), id="long line"),
        pytest.param((b"POST %s HTTP/1.1\r\n" + b"A: b\r\n" * 100 + b"\r\n",), id="many headers"),
    ],
)  # fmt: skip
async def test_a_broken_request_is_no_traceback(broken: tuple[bytes, ...], caplog: pytest.LogCaptureFixture) -> None:
    """What is not HTTP, or breaks off, changes nothing, prints no traceback, and the next callback is taken."""
    caplog.set_level(logging.INFO)
    store = NotingStore()
    async with Simulator(manual=True) as sim, client_of(sim, store=store) as client:
        job, url = await pending(sim, client)
        asked, path = list(store.asked), f"/{token_of(url)}".encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(url))
        writer.write(broken[0].replace(b"%s", path))
        await writer.drain()
        await settle()
        if len(broken) == 1:
            writer.write_eof()
            answer = await reader.read()
            assert answer == b"" or status_of(answer) in {400, 404}
        writer.close()
        await writer.wait_closed()
        await settle(200)
        assert store.asked == asked
        assert tracebacks(caplog) == []
        assert token_of(url) not in caplog.text
        assert await sim.finish(job.task_ids[0]) == 200


async def test_callbacks_share_a_connection() -> None:
    """Two callbacks in one go on one connection are both taken, in order."""
    async with Simulator(manual=True) as sim, client_of(sim) as client:
        job, url = await pending(sim, client, count=2)
        path = f"/{token_of(url)}"
        first, last = (http(path, callback_body(task_id)) for task_id in job.task_ids)
        answers = await raw_exchange(port_of(url), first.replace(b"Connection: close\r\n", b"") + last)
        assert answers.count(b"HTTP/1.1 200 OK") == 2
        assert len(await job) == 2


async def test_every_200_says_the_same_on_a_kept_and_on_a_closed_connection() -> None:
    """They differ in nothing but the connection's end; HTTP/1.0, whose sender must be told that a connection stays, is
    told."""
    async with Simulator(manual=True) as sim, client_of(sim) as client:
        job, url = await pending(sim, client, count=3)
        path, (first, second, third) = f"/{token_of(url)}", job.task_ids
        kept = http(path, callback_body(first)).replace(b"Connection: close\r\n", b"")
        old = http(path, callback_body(second)).replace(b"Connection: close", b"Connection: keep-alive")
        answers = await raw_exchange(
            port_of(url), kept + old.replace(b"HTTP/1.1", b"HTTP/1.0") + http(path, callback_body(third))
        )
        assert len(await job) == 3
    found = []
    for answer in answers.split(b"HTTP/1.")[1:]:
        head, _, body = answer.partition(b"\r\n\r\n")
        line, *fields = head.decode().split("\r\n")
        assert (line[2:], body) == ("200 OK", b"ok")
        found.append(dict(field.split(": ", 1) for field in fields))
    assert [answer.pop("Connection", None) for answer in found] == [None, "keep-alive", "close"]
    dates = [parsedate_to_datetime(answer.pop("Date")) for answer in found]
    assert abs((dates[0] - dates[2]).total_seconds()) <= 60
    assert found[0] == found[1] == found[2]
    assert found[0]["Server"] == "callbacks"


# --- what callbacks say ----------------------------------------------------------------------------------------------


async def test_unknown_fields_are_kept() -> None:
    """What the service adds one day is in `raw`, beside what is known."""
    async with Simulator(manual=True) as sim, client_of(sim) as client, plain_session() as session:
        job, url = await pending(sim, client)
        body = callback_body(job.task_ids[0], fps=24, seeds=[1, {"a": None}], width=1920, height=1080, duration=8.5)
        assert await post(session, url, body) == 200
        (video,) = await job
        assert (video.raw["fps"], video.raw["seeds"]) == (24, [1, {"a": None}])
        assert (video.width, video.height, video.duration) == (1920, 1080, 8.5)
        assert video.raw["status"] == "SUCCEEDED"


async def test_a_callback_without_its_envelope_fields_is_taken() -> None:
    """Only `data` counts: `code`, `msg` and `task_type` are wrong on the vendor's own pages."""
    async with Simulator(manual=True) as sim, client_of(sim) as client, plain_session() as session:
        job, url = await pending(sim, client)
        data = json.loads(callback_body(job.task_ids[0]))["data"]
        data["thumbnail_url"] = None
        assert await post(session, url, json.dumps({"data": data, "task_type": "x", "code": 7}).encode()) == 200
        (video,) = await job
        assert (video.thumbnail_url, video.width) == (None, None)


@pytest.mark.parametrize("status", ["PENDING", "PROCESSING", "QUEUED", "succeeded", ""])
async def test_progress_does_not_end_a_job(status: str) -> None:
    """A status that is not an end, also an undocumented one, is answered 200 and the wait goes on."""
    async with Simulator(manual=True) as sim, client_of(sim) as client, plain_session() as session:
        job, url = await pending(sim, client)
        waiting = await started(job.result())
        assert await post(session, url, callback_body(job.task_ids[0], status, video_url="", thumbnail_url="")) == 200
        await settle()
        assert (waiting.done(), job.state) == (False, State.ACCEPTED)
        assert await sim.finish(job.task_ids[0]) == 200
        assert len(await waiting) == 1


async def test_progress_adopts_a_job_whose_answer_was_lost() -> None:
    """A sign of life is proof that the job was bought: its id is known from then on."""
    async with Simulator(manual=True) as sim, client_of(sim) as client:
        sim.script(faults.drop_after_accept())
        job, _ = await pending(sim, client)
        assert (job.state, job.task_ids) == (State.UNCERTAIN, ())
        assert await sim.progress(sim.ledger.task_ids[0]) == 200
        assert (job.state, job.task_ids) == (State.ACCEPTED, sim.ledger.task_ids)
        assert await sim.finish(job.task_ids[0]) == 200
        assert len(await job) == 1


async def test_reports_out_of_order_end_the_job_all_the_same() -> None:
    """Stale progress after the end, the last task first, everything twice: the results are whole and in order."""
    async with Simulator() as sim, client_of(sim) as client:
        sim.script(faults.out_of_order(), faults.progress_callback(), faults.duplicate_callback())
        job = await client.submit(model_v(count=4))
        videos = await job
        assert [video.task_id for video in videos] == list(sim.ledger.task_ids)
        await sim.settled()
        assert {callback.status for callback in sim.ledger.callbacks} == {200}
        assert job.state is State.DONE


@pytest.mark.parametrize(("first", "second"), [("SUCCEEDED", "FAILED"), ("FAILED", "SUCCEEDED")])
async def test_the_first_end_stays(first: str, second: str, caplog: pytest.LogCaptureFixture) -> None:
    """A second, different end is answered 200, so that it is not sent for ever; it is logged, and changes nothing."""
    store = NotingStore()
    async with Simulator(manual=True) as sim, client_of(sim, store=store) as client:
        job, _ = await pending(sim, client)
        assert await sim.finish(job.task_ids[0], first) == 200
        before = await store.get(job.id)
        caplog.clear()
        assert await sim.finish(job.task_ids[0], second) == 200
        assert await store.get(job.id) == before
        assert [job.id in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize(
    ("sent", "message"),
    [("The prompt was refused", "The prompt was refused"), (None, ""), ("", ""), ("half an emoji \ud83d", None)],
)
async def test_a_failure_ends_its_job_whatever_its_message(sent: str | None, message: str | None) -> None:
    """A failed task ends its job; a message may be missing, or be cut in the middle of a character."""
    async with Simulator(manual=True) as sim, client_of(sim) as client, plain_session() as session:
        job, url = await pending(sim, client)
        body = callback_body(job.task_ids[0], "FAILED", video_url="", thumbnail_url="", error_message=sent)
        assert await post(session, url, body) == 200
        with pytest.raises(TaskFailed) as failed:
            await job
        (outcome,) = failed.value.outcomes
        assert isinstance(outcome, Failed)
        assert message is None or outcome.message == message


async def test_trust_status_believes_the_service_alone() -> None:
    """With `trust="status"` a callback only wakes: what counts is what the GET says, also against the callback."""
    receiver = WebhookReceiver(port=0, trust="status")
    async with Simulator(manual=True) as sim, client_of(sim, receiver=receiver) as client, plain_session() as session:
        job, url = await pending(sim, client)
        assert await post(session, url, callback_body(job.task_ids[0], video_url="https://evil.example/v.mp4")) == 200
        await turns_until(lambda: len(sim.ledger.gets) == 1)
        await settle(200)
        assert job.state is State.ACCEPTED
        assert await sim.finish(job.task_ids[0]) == 200
        (video,) = await job
        assert video.video_url.startswith(sim.origin)
        assert (video.width, video.height) == (1920, 1080)  # which only a GET tells
        assert len(sim.ledger.posts) == 1


# --- where it is, and its secrets ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "", "nowhere", "media.example.com/xiling", "ftp://media.example.com", "http://media.example.com/xiling",
        "https://user:pass@media.example.com", "https://media.example.com/?a=b", "https://media.example.com/#f",
        "https://", "https://[::1", "//media.example.com",
    ],
)  # fmt: skip
def test_a_public_url_that_cannot_work_is_refused(url: str) -> None:
    """No URL, no https, a query, a password: refused at once."""
    with pytest.raises(ConfigurationError):
        WebhookReceiver(url)


@pytest.mark.parametrize("port", [-1, 65536, True, "80", 1.5])
def test_an_invalid_port_is_refused(port: object) -> None:
    """A port is 0 to 65535."""
    with pytest.raises(ConfigurationError):
        WebhookReceiver("https://media.example.com", port=port)  # type: ignore[arg-type]


def test_a_receiver_without_url_and_port_cannot_be_reached() -> None:
    """Without a public URL and without a port of its own there is no way in; the error says what to write."""
    with pytest.raises(ConfigurationError, match="https://"):
        WebhookReceiver()


async def test_a_port_alone_means_this_machine_only() -> None:
    """As port=0 does: the URL is derived, and a service on this machine can call it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    receiver = WebhookReceiver(port=port)
    async with Simulator(manual=True) as sim, client_of(sim, receiver=receiver) as client:
        assert receiver.public_url == f"http://127.0.0.1:{port}"
        job, _ = await pending(sim, client)
        assert await sim.finish(job.task_ids[0]) == 200
        assert len(await job) == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost", "::1", "::"])
async def test_the_own_server_listens_on_its_host(host: str) -> None:
    """An address, all addresses, or a name, with every address that it has; its own URL leads there."""
    if ":" in host and not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    receiver = WebhookReceiver(host=host, port=0)
    async with Simulator(manual=True) as sim, client_of(sim, receiver=receiver) as client:
        job, _ = await pending(sim, client)
        assert await sim.finish(job.task_ids[0]) == 200


async def test_a_host_that_does_not_exist_is_named() -> None:
    """The name is in the error; nothing stays open."""
    async with Simulator() as sim:
        client = client_of(sim, receiver=WebhookReceiver(host="no-such-host.invalid", port=0))
        with pytest.raises(ConfigurationError, match=r"no-such-host\.invalid"):
            await client.__aenter__()


async def test_a_receiver_that_is_not_mounted_warns_at_the_first_submit(caplog: pytest.LogCaptureFixture) -> None:
    """A public URL without port and mount is easily forgotten: one warning, and none for those that are mounted."""
    url = "http://127.0.0.1:9/x"
    mounted = WebhookReceiver(url), WebhookReceiver(url), WebhookReceiver(url)
    mounted[0].add_to(web.Application())
    mounted[1].asgi()
    assert (await mounted[2].handle("/x", b"")).status == 503
    for receiver, warnings in ((WebhookReceiver(url), 1), *((one, 0) for one in mounted)):
        caplog.clear()
        async with Simulator(manual=True) as sim, client_of(sim, receiver=receiver) as client:
            for _ in range(3):
                await client.submit(model_v())
        lines = [record.getMessage() for record in caplog.records if "is not mounted" in record.getMessage()]
        assert len(lines) == warnings
        assert all(url in line and "polled" in line for line in lines)


@pytest.mark.parametrize(
    "receiver",
    [WebhookReceiver(port=0), WebhookReceiver(port=8080), WebhookReceiver("http://localhost:8080/x")],
    ids=repr,
)
def test_a_service_elsewhere_cannot_call_this_machine(receiver: WebhookReceiver) -> None:
    """A loopback receiver with the real service: refused when the client is made, before anything is paid."""
    with pytest.raises(ConfigurationError, match=r"api\.keevx\.com"):
        Client("key", receiver=receiver)
    assert "api.keevx.com" in repr(Client("key", receiver=WebhookReceiver("https://media.example.com/x")))


@pytest.mark.parametrize("path", ["", "/", "/hook", "/hook/"])
async def test_the_callback_url_is_one_segment_below_the_public_url(path: str) -> None:
    """No slash is doubled or lost; the service is told exactly that URL."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    receiver = WebhookReceiver(f"http://127.0.0.1:{port}{path}", port=port)
    async with Simulator(manual=True) as sim, client_of(sim, receiver=receiver) as client:
        job, url = await pending(sim, client)
        assert url == f"http://127.0.0.1:{port}{path.rstrip('/')}/{token_of(url)}"
        assert await sim.finish(job.task_ids[0]) == 200


@pytest.mark.parametrize("secret", ["", "short", b"fifteen bytes..", ["long enough a secret", "short"]])
def test_a_short_secret_is_refused(secret: str | bytes | list[str | bytes]) -> None:
    """A secret must not be guessable."""
    with pytest.raises(ConfigurationError, match="16"):
        WebhookReceiver(port=0, secret=secret)


OLD, NEW = "the old secret of this receiver", b"the new secret of this receiver"


@pytest.mark.parametrize(
    ("secrets", "answer"),
    [([NEW, OLD], 200), ([OLD, NEW], 200), ([OLD], 200), ([NEW], 404), (None, 404)],
    ids=["rotated", "other order", "same", "forgotten", "a random one"],
)
async def test_rotated_secrets_still_know_their_urls(secrets: list[str | bytes] | None, answer: int) -> None:
    """A URL made with a secret is known as long as that secret is in the list, and no longer."""
    store = MemoryStore()
    async with Simulator(manual=True) as sim:
        receiver = WebhookReceiver(port=0, secret=OLD)
        async with client_of(sim, store=store, receiver=receiver) as client:
            job, _ = await pending(sim, client)
            url, port = receiver.public_url, receiver.port
        async with client_of(sim, store=store, receiver=WebhookReceiver(url, port=port, secret=secrets)):
            assert await sim.finish(job.task_ids[0]) == answer


async def test_the_secret_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """XILING_WEBHOOK_SECRET holds one or several, separated by commas; a blank one does not count."""
    store = MemoryStore()
    async with Simulator(manual=True) as sim:
        receiver = WebhookReceiver(port=0, secret=OLD)
        async with client_of(sim, store=store, receiver=receiver) as client:
            job, _ = await pending(sim, client)
            url, port = receiver.public_url, receiver.port
        monkeypatch.setenv("XILING_WEBHOOK_SECRET", f"another secret of someone, {OLD} ,")
        async with client_of(sim, store=MemoryStore(), receiver=WebhookReceiver(url, port=port)):
            reached = await sim.finish(job.task_ids[0])
        monkeypatch.setenv("XILING_WEBHOOK_SECRET", "  ")
        async with client_of(sim, store=store, receiver=WebhookReceiver(url, port=port)):
            forgotten = await sim.callback(job.task_ids[0])
        assert (reached, forgotten) == (200, 404)  # 200: the token is right, the lost job is adopted


# --- life cycle---------------------------------------------------------------------------------------------------


async def test_a_receiver_can_be_used_again() -> None:
    """After its client was closed, the next client may have it."""
    receiver, store = WebhookReceiver(port=0), MemoryStore()
    async with Simulator() as sim:
        for count in (1, 2, 3):
            async with client_of(sim, receiver=receiver, store=store) as client:
                await (await client.submit(model_v()))
            assert len(sim.ledger.posts) == count


async def test_one_receiver_for_two_clients_is_refused_and_the_first_goes_on() -> None:
    """The second client is refused before it sends anything; the first still gets its callbacks."""
    receiver = WebhookReceiver(port=0)
    async with Simulator(manual=True) as sim, client_of(sim, receiver=receiver) as client:
        job, _ = await pending(sim, client)
        with pytest.raises(ConfigurationError, match="another client"):
            await client_of(sim, receiver=receiver).__aenter__()
        assert await sim.finish(job.task_ids[0]) == 200
        assert len(await job) == 1
        assert len(sim.ledger.posts) == 1


async def test_a_sender_that_keeps_its_connection_does_not_hold_up_the_end() -> None:
    """Idle connections of the service are closed when the client is left, at once."""
    async with Simulator(manual=True) as sim, plain_session() as session:
        async with client_of(sim) as client:
            job, url = await pending(sim, client)
            for _ in range(3):
                assert await post(session, url, callback_body(job.task_ids[0])) == 200
        with pytest.raises(aiohttp.ClientConnectionError):
            await post(session, url, callback_body(job.task_ids[0]))
