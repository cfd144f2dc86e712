"""One callback over aiohttp: in the receiver's own server, or in an application of the user."""

from __future__ import annotations

import contextlib
from typing import Final

from aiohttp import StreamReader, web

from xiling_async._internal.clock import SystemClock
from xiling_async.webhooks.handler import TOO_SLOW, IncomingRequest, Reply, SenderGone, WebhookHandler
from xiling_async.webhooks.options import ReceiverOptions

REAL_TIME: Final = SystemClock()  # of closing: a clock that is driven by hand must not keep a connection open
LINGER_BODIES: Final = 4  # closing a connection with unread bytes resets it, and its sender never reads the 413
SERVER: Final = "callbacks"  # in answers, instead of the versions of aiohttp and Python


class AiohttpRequest(IncomingRequest):
    """An `IncomingRequest` of aiohttp."""

    def __init__(self, request: web.BaseRequest) -> None:
        headers = request.headers
        transfer = headers.get("Transfer-Encoding", "chunked")  # aiohttp does not unpack "gzip, chunked"
        super().__init__(
            method=request.method,
            path=request.path,
            peer=request.remote,
            forwarded=headers.getall("X-Forwarded-For", ()),
            content_length=request.content_length,
            is_encoded="Content-Encoding" in headers or transfer.lower() != "chunked",
            is_complete=request.content.is_eof(),
        )
        self._request = request

    async def read(self, limit: int) -> bytes | None:
        self._send_continue()
        try:
            return await _read(self._request.content, limit)
        except (OSError, web.RequestPayloadError):
            raise SenderGone from None

    def _send_continue(self) -> None:
        """RFC 9110, 10.1.1; an `Application` has done it before it calls its handler."""
        request = self._request
        if self.is_complete or isinstance(request, web.Request) or request.transport is None:
            return
        if request.headers.get("Expect", "").lower() == "100-continue":
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")


async def _read(content: StreamReader, limit: int) -> bytes | None:
    """The body, None as soon as it is too large (a chunked one does not say so before)."""
    body = bytearray()
    async for chunk in content.iter_any():
        body += chunk
        if len(body) > limit:
            return None
    return bytes(body)


async def respond(request: web.BaseRequest, reply: Reply, options: ReceiverOptions) -> web.Response:
    """The response; a connection whose request is not complete is closed with it.

    aiohttp by itself would go on reading a body that was refused, for ten seconds and without a limit.
    """
    response = web.Response(status=reply.status, headers={**reply.headers, "Server": SERVER}, body=reply.body)
    if request.content.is_eof():
        return response
    if reply is not TOO_SLOW:
        with contextlib.suppress(OSError, web.RequestPayloadError):
            async with REAL_TIME.timeout(options.linger_s):
                await _read(request.content, LINGER_BODIES * options.body_bytes)
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
        return await respond(request, await handler.serve(AiohttpRequest(request)), handler.options)

    app.router.add_route("*", f"{path.rstrip('/')}/{{xiling_token}}", serve)
