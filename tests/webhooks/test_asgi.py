"""The receiver in other people's applications: a real FastAPI under a real uvicorn, and ASGI by hand."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request, Response
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
)

from xiling_async import ReceiverOptions, State, WebhookReceiver
from xiling_async.simulator import Simulator
from xiling_async.testing.clock import ManualClock
from xiling_async.webhooks.asgi import ASGIApp, Message


@asynccontextmanager
async def uvicorn_serving(app: ASGIApp, listening: socket.socket, **options: Any) -> AsyncIterator[None]:
    """This application under uvicorn, in this loop."""
    config = uvicorn.Config(app, log_config=None, access_log=False, ws="none", **options)
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    await server.startup(sockets=[listening])
    try:
        yield
    finally:
        await server.shutdown(sockets=[])


@asynccontextmanager
async def under_uvicorn(
    make: Callable[[WebhookReceiver], ASGIApp], base: str = "", **options: Any
) -> AsyncIterator[tuple[WebhookReceiver, str]]:
    """A receiver of this public path in an application under uvicorn, and the server's origin."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        origin = f"http://127.0.0.1:{listening.getsockname()[1]}"
        receiver = WebhookReceiver(f"{origin}{base}", **options)
        async with uvicorn_serving(make(receiver), listening, lifespan="on"):
            yield receiver, origin


def mounted(receiver: WebhookReceiver) -> ASGIApp:
    """FastAPI with a route of its own, and the receiver beside it."""
    app = FastAPI()

    @app.get("/hello")
    async def hello() -> str:
        return "hello"

    app.mount("/xiling", receiver.asgi())
    return app


def by_hand(receiver: WebhookReceiver) -> ASGIApp:
    """The recipe of `handle`, as for any framework."""
    app = FastAPI()

    @app.post("/xiling/{token}")
    async def callback(token: str, request: Request) -> Response:
        reply = await receiver.handle(token, await request.body())
        return Response(reply.body, reply.status, dict(reply.headers))

    return app


def alone(receiver: WebhookReceiver) -> ASGIApp:
    """No framework at all: uvicorn's root application."""
    return receiver.asgi()


@pytest.mark.parametrize("make", [mounted, by_hand, alone])
async def test_callbacks_through_an_application(make: Callable[[WebhookReceiver], ASGIApp]) -> None:
    """The whole way: submit, a callback through uvicorn, a video; a wrong token is 404, and before and after, 503."""
    base = "" if make is alone else "/xiling"
    async with (
        under_uvicorn(make, base) as (receiver, origin),
        Simulator(manual=True) as sim,
        plain_session() as session,
    ):
        assert await post(session, f"{origin}{base}/{'A' * 80}", b"{}") == 503
        async with client_of(sim, receiver=receiver) as client:
            job = await client.submit(model_v(count=3))
            url = str(sim.ledger.posts[-1].callback_url)
            assert url.startswith(f"{origin}{base}/")
            assert await post(session, f"{origin}{base}/{'A' * 80}", b"{}") == 404
            assert await post(session, url, b"{}") == 400
            assert await asyncio.gather(*(sim.finish(task_id) for task_id in job.task_ids)) == [200] * 3
            assert len(await job) == 3
        assert await post(session, url, b"{}") == 503


async def test_a_mounted_receiver_has_its_own_limits_and_leaves_the_rest_alone() -> None:
    """Size, declared or not, encoding and method are refused as by our own server; the user's routes are left alone."""
    async with (
        under_uvicorn(mounted, "/xiling", options=ReceiverOptions(body_bytes=2_000)) as (receiver, origin),
        Simulator(manual=True) as sim,
        client_of(sim, receiver=receiver) as client,
        plain_session() as session,
    ):
        job = await client.submit(model_v())
        url = str(sim.ledger.posts[-1].callback_url)
        body, path, port = callback_body(job.task_ids[0]), f"/xiling/{token_of(url)}", port_of(url)
        assert await post(session, url, body.ljust(2_001)) == 413
        chunked = http(path, b"", "Transfer-Encoding: chunked") + b"3e8\r\n%s\r\n" % bytes(1_000) * 3
        assert status_of(await raw_exchange(port, chunked)) == 413
        assert await post(session, url, body, **{"Content-Encoding": "gzip"}) == 415
        for method in ("GET", "PUT", "DELETE"):
            async with session.request(method, url, data=body) as response:
                assert (response.status, await response.text()) == (404, "not found")
        async with session.get(f"{origin}/hello") as response:
            assert await response.json() == "hello"
        async with session.get(f"{origin}/xiling/healthz") as response:
            assert (response.status, await response.text()) == (200, "ok")
        async with session.head(f"{origin}/xiling/healthz") as response:
            assert (response.status, response.headers["Content-Length"]) == (200, "2")
        assert await post(session, url, body.ljust(2_000)) == 200
        assert len(await job) == 1


async def test_a_mounted_body_that_stalls_is_cut_at_its_deadline() -> None:
    """Ten seconds, as with our own server; other callbacks pass by."""
    clock = ManualClock()
    async with (
        under_uvicorn(mounted, "/xiling") as (receiver, _),
        Simulator(manual=True) as sim,
        client_of(sim, receiver=receiver, clock=clock) as client,
    ):
        job = await client.submit(model_v(count=2))
        url = str(sim.ledger.posts[-1].callback_url)
        half = http(f"/xiling/{token_of(url)}", callback_body(job.task_ids[0])[:20], length=500)
        asking = asyncio.create_task(raw_exchange(port_of(url), half))
        await settle(500)
        assert await sim.finish(job.task_ids[1]) == 200
        clock.advance(9.99)
        await settle(500)
        assert not asking.done()
        clock.advance(0.01)
        assert status_of(await asking) == 408
        assert await sim.finish(job.task_ids[0]) == 200


async def test_only_from_allowed_networks_as_uvicorn_sees_them() -> None:
    """uvicorn resolves its own proxy's X-Forwarded-For: the peer is the address that it names, no proxy counts."""
    options = ReceiverOptions(allowed_networks=["203.0.113.0/24"])
    async with (
        under_uvicorn(mounted, "/xiling", options=options) as (receiver, _),
        Simulator(manual=True) as sim,
        client_of(sim, receiver=receiver) as client,
        plain_session() as session,
    ):
        job = await client.submit(model_v())
        url, body = str(sim.ledger.posts[-1].callback_url), callback_body(job.task_ids[0])
        assert await post(session, url, body) == 404
        assert await post(session, url, body, **{"X-Forwarded-For": "203.0.113.9, 198.51.100.1"}) == 404
        assert await post(session, url, body, **{"X-Forwarded-For": "203.0.113.9"}) == 200


# --- by hand ---------------------------------------------------------------------------------------------------------


async def spoken(app: ASGIApp, scope: dict[str, Any], *messages: Message) -> list[Message]:
    """What an application answers to this, until it has ended."""
    coming, sent = list(messages), []

    async def receive() -> Message:
        return coming.pop(0) if coming else await asyncio.Event().wait() and {}

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent


def scope(path: str, method: str = "POST", **headers: str) -> dict[str, Any]:
    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return {"type": "http", "method": method, "path": path, "headers": pairs, "client": None}


def piece(body: bytes, *, more: bool = False) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}


async def test_a_websocket_is_refused() -> None:
    """Closed before it is accepted, which is a 403."""
    app = WebhookReceiver(port=0).asgi()
    sent = await spoken(app, {"type": "websocket", "path": "/x"}, {"type": "websocket.connect"})
    assert sent == [{"type": "websocket.close", "code": 1008}]


async def test_a_lifespan_is_answered() -> None:
    """As the root application: ready at once, done at once."""
    app = WebhookReceiver(port=0).asgi()
    events: list[Message] = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]
    sent = await spoken(app, {"type": "lifespan"}, *events)
    assert [message["type"] for message in sent] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


async def test_an_unknown_scope_is_left_alone() -> None:
    """A scope of a future server is ignored."""
    assert await spoken(WebhookReceiver(port=0).asgi(), {"type": "carrier-pigeon"}) == []


async def test_a_body_in_pieces_and_one_that_breaks_off() -> None:
    """Joined up; a sender that has gone is not answered, and changes nothing."""
    receiver, store = WebhookReceiver(port=0), NotingStore()
    app = receiver.asgi()
    async with Simulator(manual=True) as sim, client_of(sim, receiver=receiver, store=store) as client:
        job = await client.submit(model_v())
        path, body = f"/{token_of(sim.ledger.posts[-1].callback_url)}", callback_body(job.task_ids[0])
        asked = len(store.asked)
        assert await spoken(app, scope(path), piece(body[:50], more=True), {"type": "http.disconnect"}) == []
        assert len(store.asked) == asked
        for length in ("x", "-1", "\u0661", "9" * 400, "300000"):
            head, _ = await spoken(app, scope(path, content_length=length), piece(body * 2_000))
            assert head["status"] == 413
        head, end = await spoken(
            app, scope("/mount" + path), piece(body[:50], more=True), {"type": "http.request"} | {"more_body": True},
            piece(body[50:]),
        )  # fmt: skip
        assert (head["status"], end["body"]) == (200, b"ok")
        assert dict(head["headers"])[b"cache-control"] == b"no-store"
        assert len(await job) == 1


async def test_nothing_of_a_forged_request_is_read() -> None:
    """The token is looked at before the first piece of the body is asked for."""
    receiver = WebhookReceiver(port=0)
    async with Simulator() as sim, client_of(sim, receiver=receiver):
        head, _ = await spoken(receiver.asgi(), scope("/" + "A" * 80))
        assert head["status"] == 404


async def test_a_framework_that_cancels_its_handlers_loses_no_callback() -> None:
    """The sender hangs up in the middle of the commit: who waits hears of it all the same."""
    receiver, store = WebhookReceiver(port=0), GatedStore()
    async with Simulator(manual=True) as sim, client_of(sim, receiver=receiver, store=store) as client:
        job = await client.submit(model_v())
        path = f"/{token_of(sim.ledger.posts[-1].callback_url)}"
        waiting = await started(job.result())
        store.gate.clear()
        serving = asyncio.create_task(spoken(receiver.asgi(), scope(path), piece(callback_body(job.task_ids[0]))))
        await store.reached.wait()
        await gone(serving)
        store.gate.set()
        assert (await waiting)[0].task_id == job.task_ids[0]
        assert job.state is State.DONE


async def test_a_sender_that_hangs_up_on_uvicorn_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    """Half a body and away."""
    async with (
        under_uvicorn(mounted, "/xiling") as (receiver, _),
        Simulator(manual=True) as sim,
        client_of(sim, receiver=receiver) as client,
    ):
        job = await client.submit(model_v())
        url = str(sim.ledger.posts[-1].callback_url)
        _, writer = await asyncio.open_connection("127.0.0.1", port_of(url))
        writer.write(http(f"/xiling/{token_of(url)}", b"{", length=500))
        await settle(100)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        await settle(100)
        assert [record for record in caplog.records if record.exc_info] == []
        assert await sim.finish(job.task_ids[0]) == 200
