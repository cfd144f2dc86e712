"""The receiver as an ASGI 3 application, for FastAPI, Starlette and every other framework; none is imported."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from xiling_async.webhooks.handler import SenderGone, WebhookHandler

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
    try:
        reply = await handler.serve(request)
    except SenderGone:
        return
    headers = {"Content-Length": str(len(reply.body)), **reply.headers}
    if not request.is_complete:
        headers["Connection"] = "close"  # otherwise servers read, and throw away, whatever is still sent
    if not request.is_http_1:
        headers.pop("Connection", None)  # a stream of HTTP/2 has none
    head = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": reply.status, "headers": head})
    await send({"type": "http.response.body", "body": b"" if request.method == "HEAD" else reply.body})


class _ASGIRequest:
    """An `IncomingRequest` of an ASGI server."""

    may_be_cancelled = True

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self._scope = scope
        self._receive = receive
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.is_http_1 = not scope.get("http_version", "1.1").startswith(("2", "3"))
        self.is_encoded = bool(self._values(b"content-encoding"))
        length = "".join(self._values(b"content-length")[:1])
        is_number = length.isascii() and length.isdigit()
        self.content_length = int(length[:18]) if is_number else None
        has_body = bool(length.lstrip("0") or self._values(b"transfer-encoding"))
        self.is_complete = "http_version" in scope and self.is_http_1 and not has_body

    def sender(self) -> tuple[str | None, Sequence[str]]:
        peer = self._scope.get("client")
        return None if peer is None else peer[0], self._values(b"x-forwarded-for")

    async def read(self, limit: int) -> bytes | None:
        chunks: list[bytes] = []
        size = 0
        while not self.is_complete:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise SenderGone
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            self.is_complete = not message.get("more_body", False)
            if size > limit:
                return None
        return b"".join(chunks)

    def _values(self, name: bytes) -> list[str]:
        return [value.decode("latin-1") for key, value in self._scope["headers"] if key.lower() == name]
