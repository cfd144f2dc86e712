"""The receiver as an ASGI 3 application, for FastAPI, Starlette and every other framework; none is imported."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from xiling_async.webhooks.handler import BROKEN, IncomingRequest, SenderGone, WebhookHandler

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]


def application(handler: WebhookHandler) -> ASGIApp:
    """Mounted, or alone as the root application of a server."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        match scope["type"]:
            case "http":
                await _http(handler, _ASGIRequest(scope, receive), send)
            case "websocket":
                await receive()
                await send({"type": "websocket.close", "code": 1008})  # before it was accepted: a 403
            case "lifespan":
                await _lifespan(receive, send)

    return app


async def _lifespan(receive: Receive, send: Send) -> None:
    """Nothing is started here: the client is opened elsewhere."""
    while True:
        event = (await receive())["type"].removeprefix("lifespan.")
        await send({"type": f"lifespan.{event}.complete"})
        if event == "shutdown":
            return


async def _http(handler: WebhookHandler, request: _ASGIRequest, send: Send) -> None:
    reply = await handler.serve(request)
    if reply is BROKEN:
        return
    headers = {"Content-Length": str(len(reply.body)), **reply.headers}
    if request.is_http_1 and not request.is_complete:
        headers["Connection"] = "close"  # otherwise servers read, and discard, what is still sent
    head = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": reply.status, "headers": head})
    await send({"type": "http.response.body", "body": b"" if request.method == "HEAD" else reply.body})


class _ASGIRequest(IncomingRequest):
    """An `IncomingRequest` of an ASGI server."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        length = "".join(_values(scope, b"content-length")[:1])
        is_number = length.isascii() and length.isdigit()
        has_body = bool(length.lstrip("0") or _values(scope, b"transfer-encoding"))
        self.is_http_1 = not scope.get("http_version", "1.1").startswith(("2", "3"))
        super().__init__(
            method=scope["method"],
            path=scope["path"],
            peer=scope["client"][0] if scope.get("client") else None,
            forwarded=_values(scope, b"x-forwarded-for"),
            content_length=int(length[:18]) if is_number else None,
            is_encoded=bool(_values(scope, b"content-encoding")),
            is_complete="http_version" in scope and self.is_http_1 and not has_body,
        )
        self._receive = receive

    async def read(self, limit: int) -> bytes | None:
        body = bytearray()
        while not self.is_complete:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise SenderGone
            body += message.get("body", b"")
            self.is_complete = not message.get("more_body", False)
            if len(body) > limit:
                return None
        return bytes(body)


def _values(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key.lower() == name]
