"""The receiver as an ASGI 3 application, for FastAPI, Starlette and every other one; no framework is imported."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from xiling_async.webhooks.handler import ENCODED, TOO_LARGE, TOO_SLOW, Desk, Reply

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]


class _HungUp(Exception):
    """The sender has gone; there is nobody to answer."""


def application(desk: Desk) -> ASGIApp:
    """Mounted or alone. What the server and the framework in front have read of a request they have read."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        match scope["type"]:
            case "http":
                await _http(desk, scope, receive, send)
            case "websocket":
                await receive()
                await send({"type": "websocket.close", "code": 1008})  # before it was accepted: a 403
            case "lifespan":
                await _lifespan(receive, send)

    return app


async def _lifespan(receive: Receive, send: Send) -> None:
    """As the root application of a server: nothing is started here, the client is entered elsewhere."""
    while True:
        event = (await receive())["type"].removeprefix("lifespan.")
        await send({"type": f"lifespan.{event}.complete"})
        if event == "shutdown":
            return


async def _http(desk: Desk, scope: Scope, receive: Receive, send: Send) -> None:
    try:
        reply = await _answer(desk, scope, receive)
    except _HungUp:
        return
    head = [(b"content-length", b"%d" % len(reply.body))]
    head += [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in reply.headers.items()]
    await send({"type": "http.response.start", "status": reply.status, "headers": head})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else reply.body})


async def _answer(desk: Desk, scope: Scope, receive: Receive) -> Reply:
    def sender() -> tuple[str | None, Sequence[str]]:
        peer = scope.get("client")
        return None if peer is None else peer[0], _values(scope, b"x-forwarded-for")

    admitted = desk.welcome(scope["method"], scope["path"], sender)
    if isinstance(admitted, Reply):
        return admitted
    if _values(scope, b"content-encoding"):
        return desk.refused(ENCODED, admitted)
    length = "".join(_values(scope, b"content-length")[:1])
    if length.isascii() and length.isdigit() and (len(length) > 18 or int(length) > desk.limits.body_bytes):
        return desk.refused(TOO_LARGE, admitted)
    try:
        async with desk.deadline(desk.limits.body_s):
            body = await _read(receive, desk.limits.body_bytes)
    except TimeoutError:
        return desk.refused(TOO_SLOW, admitted)
    return desk.refused(TOO_LARGE, admitted) if body is None else await desk.take(admitted, body)


async def _read(receive: Receive, most: int) -> bytes | None:
    """The body, or None as soon as it is too large."""
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _HungUp
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        if size > most:
            return None
        if not message.get("more_body", False):
            return b"".join(chunks)


def _values(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key.lower() == name]
