"""The receiver's own HTTP server, on an open port: aiohttp's, behind a count of connections.

Attackers pay only in bytes, so every resource spent on them is bounded: a connection is counted before a parser, a
task or a TLS handshake is spent on it, every read has a size and a deadline, and nothing that it sends is logged.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
import traceback
from contextlib import AsyncExitStack
from pathlib import Path
from socket import socket
from typing import Any, Final, cast

from aiohttp import web

from xiling_async._internal.clock import Clock, Timer
from xiling_async._internal.tasks import Tasks
from xiling_async.webhooks.aiohttp_adapter import REAL_TIME, AiohttpRequest, respond
from xiling_async.webhooks.handler import BROKEN, OK, UNAVAILABLE, SenderGone, WebhookHandler
from xiling_async.webhooks.limits import ConnectionLimiter
from xiling_async.webhooks.server_log import AiohttpLog, Summary
from xiling_async.webhooks.sockets import accept, affordable, listen_at, listen_on_port, remove

log = logging.getLogger("xiling_async.webhooks.receiver.http")

ACCEPT_PAUSE_S: Final = 1.0  # when the process can open no more files


class CallbackServer:
    """Listens on a TCP port or a Unix socket, and asks the handler about what comes."""

    def __init__(
        self, handler: WebhookHandler, clock: Clock, *, tls: ssl.SSLContext | None, counts_addresses: bool
    ) -> None:
        self._handler = handler
        self._clock = clock
        self._tls = tls
        self._counts_addresses = counts_addresses
        self.limits = limits = handler.limits
        most = affordable(limits.connections)
        self._limiter: ConnectionLimiter[_Connection] = ConnectionLimiter(most, limits.per_address)
        self._handshakes: ConnectionLimiter[_Connection] = ConnectionLimiter(limits.handshakes, limits.per_address)
        self._connections: dict[web.RequestHandler, _Connection] = {}
        self._summary = Summary(clock)
        self._tasks = Tasks()
        self._is_stopping = False
        self._at_rest = asyncio.Event()
        self._web = web.Server(
            self._serve,
            keepalive_timeout=limits.header_s,  # aiohttp 3.14.5: it is the deadline of the head, too
            lingering_time=0,  # `respond` does it, with an end in bytes
            max_line_size=limits.line_bytes,
            max_field_size=limits.field_bytes,
            max_headers=limits.fields,
            auto_decompress=False,
            access_log=None,
            logger=AiohttpLog(log, self._summary),
        )
        self._listening: list[socket] = []
        self._socket_file: tuple[Path, int] | None = None

    @property
    def port(self) -> int:
        return int(self._listening[0].getsockname()[1])

    async def listen(self, host: str, port: int) -> None:
        """Raises `OSError`."""
        self._start(await listen_on_port(host, port, self.limits.connections))

    async def listen_at(self, path: Path) -> None:
        """On a Unix socket. Raises `OSError`, also when another process listens there."""
        bound = asyncio.create_task(asyncio.to_thread(listen_at, path, self.limits.connections))
        try:
            await asyncio.shield(bound)
        finally:  # cancelled too: `stop` must know what the thread has made
            listening, inode = await bound
            self._socket_file, self._listening = (path, inode), [listening]
        self._start([listening])

    def _start(self, listening: list[socket]) -> None:
        self._listening = listening
        for one in listening:
            self._tasks.start(self._accept(one), name="xiling accept")

    async def stop(self) -> None:
        """Stop listening, answer the callbacks under way, close all other connections."""
        async with AsyncExitStack() as steps:  # the last one first, and each of them, also when one is cancelled
            steps.callback(self._summary.flush)
            steps.push_async_callback(self._abort)
            steps.push_async_callback(self._web.shutdown, self.limits.linger_s)
            steps.push_async_callback(self._come_to_rest)
            if self._socket_file is not None:
                path, inode = self._socket_file
                steps.push_async_callback(asyncio.to_thread, lambda: remove(path, inode))
            for listening in self._listening:
                steps.callback(listening.close)
            await self._tasks.cancel()

    async def _come_to_rest(self) -> None:
        """Close idle connections; give the others their answers."""
        self._is_stopping = True
        for connection in tuple(self._limiter.idle()):
            connection.close()
        with contextlib.suppress(TimeoutError):
            async with REAL_TIME.timeout(self.limits.shutdown_s):
                while self._limiter.busy:
                    self._at_rest.clear()
                    await self._at_rest.wait()

    async def _abort(self) -> None:
        for connection in tuple(self._connections.values()):
            connection.abort()  # its peer does not read, or does not end its TLS
        while self._connections:
            self._at_rest.clear()
            await self._at_rest.wait()

    # --- connections ---------------------------------------------------------------------------------------------

    async def _accept(self, listening: socket) -> None:
        """One connection in each turn of the loop, so that those that are open are served in between."""
        while True:
            try:
                sock, address = await accept(listening)
            except ConnectionError:
                continue
            except Exception as error:  # EMFILE, or whatever it is: the next one must be accepted
                self._summary.add("connections could not be accepted", level=logging.WARNING)
                log.debug("a connection could not be accepted (%s)", type(error).__name__)
                await REAL_TIME.sleep(ACCEPT_PAUSE_S)
                continue
            connection = _Connection(self, sock)
            if self._admit(connection, address[0] if isinstance(address, tuple) else None):
                connection.opening = self._tasks.start(self._connect(connection), name="xiling connection")
            else:
                sock.close()
            await REAL_TIME.sleep(0)

    def _admit(self, connection: _Connection, peer: str | None) -> bool:
        """Whether there is room for it; an idle one may have to go."""
        limiters = (self._limiter,) if self._tls is None else (self._limiter, self._handshakes)
        for limiter in limiters:
            fits, evicted = limiter.add(connection, peer if self._counts_addresses else None)
            if evicted is not None:
                self._summary.add("idle connections were closed to make room")
                evicted.abort()
                self._forget(evicted)
            if not fits:
                self._summary.add("connections were refused: all that may be open are in use", level=logging.WARNING)
                self._forget(connection)
                return False
        return True

    async def _connect(self, connection: _Connection) -> None:
        """Give an accepted socket its protocol, after the TLS handshake if there is one."""
        limits = self.limits
        deadlines: dict[str, Any] = {}
        if self._tls is not None:
            deadlines = {"ssl_handshake_timeout": limits.header_s, "ssl_shutdown_timeout": limits.linger_s}
        try:
            loop = asyncio.get_running_loop()
            await loop.connect_accepted_socket(lambda: connection, connection.take_socket(), ssl=self._tls, **deadlines)
        except OSError as error:  # SSLError, reset, timeout
            self._summary.add("TLS handshakes failed")
            _forget_frames(error)
        except asyncio.CancelledError as error:
            _forget_frames(error)
            connection.discard()
            raise
        finally:
            connection.opening = None
            self._handshakes.remove(connection)
            if connection.transport is None:
                self._forget(connection)

    def made(self, connection: _Connection) -> web.RequestHandler:
        """aiohttp's protocol for a connection that stands."""
        http = self._web()
        self._connections[http] = connection
        return http

    def lost(self, connection: _Connection, http: web.RequestHandler) -> None:
        del self._connections[http]
        self._forget(connection)
        self._at_rest.set()

    def _forget(self, connection: _Connection) -> None:
        self._limiter.remove(connection)
        self._handshakes.remove(connection)

    # --- requests ------------------------------------------------------------------------------------------------

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        connection = self._connections.get(request.protocol)
        reply = BROKEN
        try:
            reply = await self._handler.serve(_CountedRequest(request, connection, self._limiter))
        except SenderGone:
            pass
        except Exception as error:
            log.error("a request could not be served (%s); answered 503", type(error).__name__)
            reply = UNAVAILABLE
        finally:
            if connection is not None:  # before the rest of a refused body is read: it can be evicted meanwhile
                self._limiter.mark_idle(connection, known=reply is OK)
                self._at_rest.set()
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%s from %s: %d", request.method, request.remote, reply.status)
        if reply.status == 404:
            await REAL_TIME.sleep(0)  # a connection full of forged tokens lets the others have their turn
        response = await respond(request, reply, self.limits)
        if self._is_stopping:
            response.force_close()
        return response


class _CountedRequest(AiohttpRequest):
    """A request of the own server: its connection is busy from the moment its token has proved to be valid."""

    may_be_cancelled = False

    def __init__(
        self, request: web.BaseRequest, connection: _Connection | None, limiter: ConnectionLimiter[_Connection]
    ) -> None:
        super().__init__(request)
        self._connection = connection
        self._limiter = limiter

    async def read(self, limit: int) -> bytes | None:
        if self._connection is not None:
            self._limiter.mark_busy(self._connection)
        return await super().read(limit)


class _Connection(asyncio.Protocol):
    """One counted connection; aiohttp's protocol does the rest."""

    _clock: Final = REAL_TIME

    def __init__(self, server: CallbackServer, sock: socket) -> None:
        self._server = server
        self._sock: socket | None = sock
        self._http: web.RequestHandler | None = None
        self._unread: Timer | None = None
        self._is_aborted = False
        self.transport: asyncio.Transport | None = None
        self.opening: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        if self._is_aborted:
            self.transport.abort()
            return
        self._http = self._server.made(self)
        self._http.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        assert self._http is not None
        self._http.data_received(data)

    def eof_received(self) -> None:
        assert self._http is not None
        self._http.eof_received()

    def pause_writing(self) -> None:
        assert self._http is not None
        self._unread = self._clock.call_later(self._server.limits.linger_s, self.abort)
        self._http.pause_writing()

    def resume_writing(self) -> None:
        assert self._http is not None
        if self._unread is not None:
            self._unread.cancel()
        self._http.resume_writing()

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._unread is not None:
            self._unread.cancel()
        http, self._http = self._http, None
        if http is not None:
            http.connection_lost(exc)
            self._server.lost(self, http)
        self.opening = None

    def close(self) -> None:
        """Close it once what was written is sent."""
        if self.transport is None:
            self.abort()
        else:
            self.transport.close()

    def take_socket(self) -> socket:
        """For the transport, which closes it from then on."""
        sock, self._sock = self._sock, None
        assert sock is not None, "it is taken once"
        return sock

    def discard(self) -> None:
        """Its handshake or its creation was cancelled. uvloop then does not call `connection_lost`."""
        self._is_aborted = True
        if self.transport is not None:
            self.transport.abort()
            asyncio.get_running_loop().call_soon(self.connection_lost, None)

    def abort(self) -> None:
        self._is_aborted = True
        if self.transport is not None:
            self.transport.abort()
        elif self.opening is not None:
            self.opening.cancel()
        if self._sock is not None:  # cancelled before it began
            self._sock.close()


def _forget_frames(error: BaseException) -> None:
    """The frames of a failed handshake hold its buffers (256 KiB) in a reference cycle with the exception."""
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen.__traceback__ = None
        seen = seen.__context__
