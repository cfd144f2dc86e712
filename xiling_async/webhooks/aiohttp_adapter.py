"""One callback over aiohttp: in the receiver's own server, or in an application of the user."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Final

from aiohttp import StreamReader, web

from xiling_async._internal.clock import SystemClock
from xiling_async.webhooks.handler import BROKEN, REPLIES, TOO_SLOW, Reply, SenderGone, WebhookHandler
from xiling_async.webhooks.limits import ReceiverLimits

Application = web.Application

REAL_TIME: Final = SystemClock()  # of closing: a clock that is driven by hand must not keep a connection open
LINGER_BODIES: Final = 4  # closing a connection with unread bytes resets it, and its sender never reads the 413
SERVER: Final = "callbacks"  # in answers, instead of the versions of aiohttp and Python

# aiohttp copies a multidict faster than it makes one.
_HEADERS: Final = {id(reply): web.Response(headers={**reply.headers, "Server": SERVER}).headers for reply in REPLIES}


class AiohttpRequest:
    """An `IncomingRequest` of aiohttp."""

    may_be_cancelled = True

    def __init__(self, request: web.BaseRequest) -> None:
        self._request = request

    @property
    def method(self) -> str:
        return self._request.method

    @property
    def path(self) -> str:
        return self._request.path

    @property
    def content_length(self) -> int | None:
        return self._request.content_length

    @property
    def is_encoded(self) -> bool:
        headers = self._request.headers
        # aiohttp passes the body of "gzip, chunked" on as it came.
        return "Content-Encoding" in headers or headers.get("Transfer-Encoding", "chunked").lower() != "chunked"

    @property
    def is_complete(self) -> bool:
        return self._request.content.is_eof()

    def sender(self) -> tuple[str | None, Sequence[str]]:
        return self._request.remote, self._request.headers.getall("X-Forwarded-For", ())

    async def read(self, limit: int) -> bytes | None:
        content = self._request.content
        if content.is_eof():
            body = content.read_nowait()
            return body if len(body) <= limit else None
        self._send_continue()
        try:
            return await _read(content, limit)
        except (OSError, web.RequestPayloadError):
            raise SenderGone from None

    def _send_continue(self) -> None:
        """RFC 9110, 10.1.1; an `Application` has done it before it calls its handler."""
        request = self._request
        if isinstance(request, web.Request) or request.transport is None:
            return
        if request.headers.get("Expect", "").lower() == "100-continue":
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")


async def _read(content: StreamReader, limit: int) -> bytes | None:
    """The body, None as soon as it is too large (a chunked one does not say so before)."""
    chunks: list[bytes] = []
    size = 0
    async for chunk in content.iter_any():
        size += len(chunk)
        if size > limit:
            return None
        chunks.append(chunk)
    return b"".join(chunks)


async def respond(request: web.BaseRequest, reply: Reply, limits: ReceiverLimits) -> web.Response:
    """The response; a connection whose request is not complete is closed with it.

    aiohttp by itself would go on reading a body that was refused, for ten seconds and without a limit.
    """
    response = web.Response(status=reply.status, headers=_HEADERS[id(reply)], body=reply.body)
    if request.content.is_eof():
        return response
    if reply is not TOO_SLOW:
        with contextlib.suppress(OSError, web.RequestPayloadError):
            async with REAL_TIME.timeout(limits.linger_s):
                await _read(request.content, LINGER_BODIES * limits.body_bytes)
    if not request.content.is_eof():
        response.force_close()
        with contextlib.suppress(OSError):
            await response.prepare(request)
            await response.write_eof()
        request.protocol.force_close()
    return response


def add_route(app: web.Application, path: str, handler: WebhookHandler) -> None:
    """Callbacks at `path`/<token> of an application of the user."""

    async def serve(request: web.Request) -> web.StreamResponse:
        try:
            reply = await handler.serve(AiohttpRequest(request))
        except SenderGone:
            reply = BROKEN
        return await respond(request, reply, handler.limits)

    app.router.add_route("*", f"{path.rstrip('/')}/{{xiling_token}}", serve)
