"""aiohttp's side of a connection, made fit for strangers: it tells them and the log nothing, and answers fast."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from email.utils import formatdate
from typing import Any

from aiohttp import HttpVersion11, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http_exceptions import HttpProcessingError

from xiling_async._internal.clock import Clock
from xiling_async.webhooks.handler import BROKEN, UNAVAILABLE, Reply

log = logging.getLogger("xiling_async.webhooks.receiver.http")

Handler = web.RequestHandler
SERVER = "callbacks"  # its name in answers: not aiohttp's, with its version and Python's


def _discreet(record: logging.LogRecord) -> bool:
    """aiohttp quotes the request line, with the token in it, and has a traceback for whoever scans ports."""
    error = record.exc_info[1] if record.exc_info else None
    if error is not None:
        record.msg, record.args = f"{record.getMessage()} ({type(error).__name__})", ()
    record.exc_info = record.exc_text = None
    return True


log.addFilter(_discreet)


class Connection(web.RequestHandler):
    """aiohttp's protocol, which tells a stranger its version and what he has sent, and calls his mistakes errors."""

    __slots__ = ()

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        if status < 500:
            log.info("a request from %s was no HTTP (%s)", request.remote, type(exc).__name__)
        else:
            log.error("a request from %s could not be served (%s); answered 503", request.remote, type(exc).__name__)
        if request.writer.output_size > 0:
            raise ConnectionError("an answer has begun already")
        response = anonymous(BROKEN if status < 500 else UNAVAILABLE)
        response.force_close()
        return response

    def log_exception(self, *args: Any, **kw: Any) -> None:
        error = kw.get("exc_info")
        if isinstance(error, (HttpProcessingError, web.RequestPayloadError)):
            log.info("a request broke off (%s)", type(error).__name__)
        else:
            super().log_exception(*args, **kw)


class QuietServer(web.Server):
    """Tells of each connection's end."""

    def __init__(self, handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]], **options: Any) -> None:
        super().__init__(handler)
        self._options = options
        self.on_lost: Callable[[Handler], None] = lambda handler: None

    def connection_lost(self, handler: Handler, exc: BaseException | None = None) -> None:
        super().connection_lost(handler, exc)
        self.on_lost(handler)

    def __call__(self) -> Handler:
        return Connection(self, loop=asyncio.get_running_loop(), **self._options)


def anonymous(reply: Reply) -> web.Response:
    """Without aiohttp's version, and Python's."""
    return web.Response(status=reply.status, headers={**reply.headers, "Server": SERVER}, body=reply.body)


class Ready(web.StreamResponse):
    """One answer for all requests that it `fits`: its bytes are made once a second, and sent as they are.

    aiohttp's own makes its headers for each request: 58,000 instructions more (valgrind, aiohttp 3.14.5, 2026-11-24).
    """

    def __init__(self, reply: Reply, clock: Clock) -> None:
        super().__init__(status=reply.status)
        self._clock = clock
        fields = {**reply.headers, "Content-Length": str(len(reply.body)), "Server": SERVER}
        self._head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        self._content = reply.body
        self._second = -1
        self._bytes = b""

    @staticmethod
    def fits(request: web.BaseRequest) -> bool:
        """One that may have a body, on a connection that stays open by itself."""
        return request.method == "POST" and request.version == HttpVersion11 and request.keep_alive

    @property
    def keep_alive(self) -> bool:
        return True

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Send it whole. Raises `ConnectionResetError` when nobody is there any more."""
        if request.transport is None:
            raise ConnectionResetError("the sender has hung up")
        second = int(self._clock.time())
        if second != self._second:
            self._second = second
            line = f"HTTP/1.1 {self.status} {self.reason}\r\nDate: {formatdate(second, usegmt=True)}\r\n"
            self._bytes = f"{line}{self._head}\r\n".encode("ascii") + self._content
        request.transport.write(self._bytes)
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        """It is sent already."""
