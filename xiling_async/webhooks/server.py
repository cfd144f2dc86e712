"""The receiver's own HTTP server, on an open port: aiohttp's, behind a count of connections.

Attackers pay only in bytes, so every resource spent on them is bounded: a connection is counted before a task or a TLS
handshake is spent on it, every read has a size and a deadline, and nothing that it sends is logged.
"""

from __future__ import annotations

import asyncio
import contextlib
import traceback
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from socket import socket
from typing import Final

from aiohttp import web

from xiling_async._internal.tasks import Tasks
from xiling_async._internal.threads import Threads
from xiling_async.webhooks.aiohttp_adapter import REAL_TIME, AiohttpRequest, respond
from xiling_async.webhooks.handler import BROKEN, OK, WebhookHandler
from xiling_async.webhooks.limits import ConnectionLimiter
from xiling_async.webhooks.options import ReceiverOptions
from xiling_async.webhooks.server_log import AiohttpLog, log
from xiling_async.webhooks.sockets import UnixSocket, accept, affordable, listen_on_port

ACCEPT_PAUSE_S: Final = 1.0  # when the process can open no more files


class CallbackServer:
    """Listens on a TCP port or a Unix socket, and passes requests on to the handler."""

    def __init__(self, handler: WebhookHandler) -> None:
        self._handler = handler
        self._options = handler.options
        self._opening: dict[web.RequestHandler, asyncio.Task[None]] = {}
        self._answered = asyncio.Event()
        self._tasks = Tasks()
        self._threads = Threads(1, "xiling socket", REAL_TIME)
        self._listening: list[socket] = []
        self._unix_socket: UnixSocket | None = None
        self._web = _CountedServer(self._serve, handler.options)
        self._limiter = self._web.limiter

    @property
    def port(self) -> int:
        return int(self._listening[0].getsockname()[1])

    async def listen(self, host: str, port: int) -> None:
        """Raises `OSError`."""
        self._start(await listen_on_port(host, port, self._options.connections, self._threads))

    async def listen_at(self, path: Path) -> None:
        """On a Unix socket. Raises `OSError`, also when another process listens there."""
        self._unix_socket = UnixSocket(path)
        await self._threads.run(self._unix_socket.listen, self._options.connections)
        assert self._unix_socket.socket is not None, "it listens"
        self._start([self._unix_socket.socket])

    def _start(self, listening: list[socket]) -> None:
        self._listening = listening
        for one in listening:
            self._tasks.start(self._accept(one), name="xiling accept")

    async def stop(self) -> None:
        """Stop listening, answer the callbacks under way, close all other connections."""
        async with AsyncExitStack() as steps:  # the last one first, and each of them, also when one is cancelled
            steps.push_async_callback(self._threads.close)
            steps.push_async_callback(self._web.abort, self._options.linger_s)
            steps.push_async_callback(self._web.shutdown, self._options.linger_s)
            steps.push_async_callback(self._finish_requests)
            if self._unix_socket is not None:
                steps.push_async_callback(self._threads.run, self._unix_socket.remove)
                if self._unix_socket.socket is not None:
                    steps.callback(self._unix_socket.socket.close)
            for listening in self._listening:
                steps.callback(listening.close)
            self._listening = []
            await self._tasks.cancel()

    async def _finish_requests(self) -> None:
        """Close idle connections; give the others their answers. (aiohttp's `shutdown` reads no more of a body.)"""
        for http in self._limiter.select(busy=False):
            if http in self._web.transports:
                self._web.transports[http].close()
        with contextlib.suppress(TimeoutError):
            async with REAL_TIME.timeout(self._options.shutdown_s):
                while self._limiter.select(busy=True):
                    self._answered.clear()
                    await self._answered.wait()

    # --- connections ---------------------------------------------------------------------------------------------

    async def _accept(self, listening: socket) -> None:
        """One connection in each turn of the loop, so that those that are open are served in between."""
        while True:
            try:
                sock, address = await accept(listening)
            except ConnectionError:
                continue
            except Exception as error:  # such as EMFILE: the next one must be accepted
                log.warning("connections could not be accepted (%s)", type(error).__name__)
                await REAL_TIME.sleep(ACCEPT_PAUSE_S)
                continue
            self._admit(sock, address[0] if isinstance(address, tuple) else None)
            await REAL_TIME.sleep(0)

    def _admit(self, sock: socket, peer: str | None) -> None:
        """Count a connection and open it; an idle one may be evicted for it."""
        http = self._web()
        is_admitted, evicted = self._limiter.add(http, peer)
        if evicted is not None:
            log.info("an idle connection was closed to make room")
            if evicted in self._opening:
                self._opening[evicted].cancel()
            self._web.abort_one(evicted)
        if not is_admitted:
            log.warning("a connection was refused: all that may be open are in use")
            sock.close()
            return
        self._opening[http] = opening = self._tasks.start(self._open(http, sock), name="xiling connection")
        opening.add_done_callback(lambda _: self._opened(http, sock))

    async def _open(self, http: web.RequestHandler, sock: socket) -> None:
        """Connect an accepted socket with its protocol, after the TLS handshake if there is one."""
        tls = self._options.tls
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: http,
                sock,
                ssl=tls,
                ssl_handshake_timeout=None if tls is None else self._options.header_s,
                ssl_shutdown_timeout=None if tls is None else self._options.linger_s,
            )
        except OSError as error:  # SSLError, reset, timeout
            log.info("a TLS handshake failed")
            _forget_frames(error)
        except asyncio.CancelledError as error:
            _forget_frames(error)
            self._web.abort_one(http)
            raise

    def _opened(self, http: web.RequestHandler, sock: socket) -> None:
        """Its task has ended; cancelled, it may not have begun."""
        del self._opening[http]
        if http not in self._web.transports:
            sock.close()
            self._limiter.remove(http)

    # --- requests ------------------------------------------------------------------------------------------------

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        reply = BROKEN
        try:
            reply = await self._handler.serve(_CountedRequest(request, self._limiter))
        finally:  # before the rest of a refused body is read: it can be evicted meanwhile
            self._limiter.mark_idle(request.protocol, is_known=reply is OK and request.method == "POST")
            self._answered.set()
        log.debug("%s from %s: %d", request.method, request.remote, reply.status)
        if reply.status == 404:
            await REAL_TIME.sleep(0)  # a connection full of forged tokens lets the others have their turn
        response = await respond(request, reply, self._options)
        if not self._listening:
            response.force_close()
        if request.transport is not None and request.transport.get_write_buffer_size():  # earlier answers are not read
            try:
                async with REAL_TIME.timeout(self._options.linger_s):
                    await response.prepare(request)
                    await response.write_eof()
            except TimeoutError:
                self._web.abort_one(request.protocol)
        return response


class _CountedRequest(AiohttpRequest):
    """A request of the own server: its connection is busy from the moment its token has proved to be valid."""

    may_be_cancelled = False

    def __init__(self, request: web.BaseRequest, limiter: ConnectionLimiter[web.RequestHandler]) -> None:
        super().__init__(request)
        self._limiter = limiter

    async def read(self, limit: int) -> bytes | None:
        self._limiter.mark_busy(self._request.protocol)
        return await super().read(limit)


class _CountedServer(web.Server):
    """aiohttp's server; each connection is counted until its transport is closed."""

    def __init__(
        self, serve: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]], options: ReceiverOptions
    ) -> None:
        super().__init__(
            serve,
            keepalive_timeout=options.header_s,  # aiohttp 3.14.5: it is the deadline of the head, too
            lingering_time=0,  # `respond` does it, with an end in bytes
            max_line_size=options.line_bytes,
            max_field_size=options.field_bytes,
            max_headers=options.fields,
            auto_decompress=False,
            access_log=None,
            logger=AiohttpLog(log, {}),
        )
        self.limiter: ConnectionLimiter[web.RequestHandler] = ConnectionLimiter(affordable(options.connections))
        self.transports: dict[web.RequestHandler, asyncio.Transport] = {}

    def connection_made(self, handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        self.transports[handler] = transport

    def connection_lost(self, handler: web.RequestHandler, exc: BaseException | None = None) -> None:
        super().connection_lost(handler, exc)
        self.transports.pop(handler, None)
        self.limiter.remove(handler)

    def abort_one(self, handler: web.RequestHandler) -> None:
        transport = self.transports.get(handler)
        if transport is not None:
            transport.abort()
            asyncio.get_running_loop().call_soon(handler.connection_lost, None)  # uvloop does not always call it

    async def abort(self, timeout_s: float) -> None:
        """Abort all connections: their peers do not read, or do not end their TLS."""
        for handler in tuple(self.transports):
            self.abort_one(handler)
        with contextlib.suppress(TimeoutError):
            async with REAL_TIME.timeout(timeout_s):
                while self.transports:
                    await REAL_TIME.sleep(0)


def _forget_frames(error: BaseException) -> None:
    """The frames of a failed handshake hold its buffers (256 KiB) in a reference cycle with the exception."""
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen.__traceback__ = None
        seen = seen.__context__
