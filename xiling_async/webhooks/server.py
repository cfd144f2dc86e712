"""Our own HTTP server on an open port.

Only bytes cost an attacker something, so each of our own is counted: a connection is looked at before a parser, a task
or a TLS handshake is spent on it, every read has a size and a deadline, and nothing that a stranger sends is logged.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar, cast

from aiohttp import web

from xiling_async._internal.clock import Clock, SystemClock
from xiling_async._internal.tasks import Tasks
from xiling_async._internal.threads import Threads
from xiling_async.webhooks.connection import Handler, QuietServer, Ready, anonymous, log
from xiling_async.webhooks.handler import OK, TOO_SLOW, Crowd, Desk, Reply, counted_as
from xiling_async.webhooks.hearing import answer, read_body
from xiling_async.webhooks.sockets import affordable, bind, remove

T = TypeVar("T")

REAL_TIME: Final = SystemClock()  # of partings: a clock that is driven by hand must not keep anybody here
LINGER_BODIES: Final = 4  # hanging up on unread bytes resets a connection, and its sender never reads the 413
TURNS_TO_SERVE: Final = 5  # of the loop, from the arrival of bytes to `_serve`; aiohttp needs 3


class CallbackServer:
    """Listens on a TCP port or a Unix socket and asks the desk about what comes."""

    def __init__(self, desk: Desk, clock: Clock, *, tls: ssl.SSLContext | None, counts_addresses: bool) -> None:
        self._desk = desk
        self._clock = clock
        self._tls = tls
        self._counts_addresses = counts_addresses
        limits = desk.limits
        self._crowd: Crowd[Handler] = Crowd(affordable(limits.connections), limits.per_address)
        self._transports: dict[Handler, asyncio.Transport] = {}  # the raw ones, also before and below TLS
        self._handshakes = Tasks()
        self._evicted = self._refused = 0
        self._is_ending = False
        self._all_rest = asyncio.Event()
        self._taken = Ready(OK, clock)
        self._server = QuietServer(
            self._serve,
            # 3.14.5: it is the deadline of the head, too.
            keepalive_timeout=limits.header_s,
            lingering_time=0,  # we do it ourselves, with an end in bytes
            max_line_size=limits.line_bytes,
            max_field_size=limits.field_bytes,
            max_headers=limits.fields,
            auto_decompress=False,
            access_log=None,
            logger=log,
        )
        self._server.on_lost = self._leave
        self._runner = web.ServerRunner(self._server, shutdown_timeout=limits.linger_s)
        self._listening: asyncio.Server | None = None
        self._socket_file: Path | None = None
        self._socket_inode = 0

    @property
    def port(self) -> int:
        assert self._listening is not None
        return int(self._listening.sockets[0].getsockname()[1])

    async def listen(self, host: str, port: int) -> None:
        """Raises `OSError`."""
        await self._runner.setup()
        self._listening = await asyncio.get_running_loop().create_server(
            lambda: _Gate(self), host, port, backlog=self._desk.limits.connections
        )

    async def listen_at(self, path: Path) -> None:
        """On a Unix socket. Raises `OSError`, also when somebody listens there already; an orphaned one is replaced."""
        await self._runner.setup()
        listening, self._socket_inode = await self._in_a_thread(lambda: bind(path))
        self._socket_file = path
        self._listening = await asyncio.get_running_loop().create_unix_server(
            lambda: _Gate(self), sock=listening, backlog=self._desk.limits.connections
        )

    async def stop(self) -> None:
        """Listen no more, answer what is being answered, hang up on everybody else."""
        if self._listening is not None:
            self._listening.close()
        if self._socket_file is not None:
            path, inode = self._socket_file, self._socket_inode
            await self._in_a_thread(lambda: remove(path, inode))
        await self._handshakes.cancel()
        await self._come_to_rest()
        await self._runner.cleanup()
        for transport in tuple(self._transports.values()):
            transport.abort()  # its peer does not read, or does not end its TLS
        while self._transports:
            await self._clock.sleep(0)

    async def _come_to_rest(self) -> None:
        """Idle connections go at once, the others with their answer. aiohttp would read no byte more of a body."""
        self._is_ending = True
        for _ in range(TURNS_TO_SERVE):  # what was read has come to its handler
            await self._clock.sleep(0)
        for handler in tuple(self._crowd.idle()):
            self._transports[handler].abort()
        if self._crowd.at_work:
            with contextlib.suppress(TimeoutError):
                async with REAL_TIME.timeout(self._desk.limits.shutdown_s):
                    await self._all_rest.wait()

    async def _in_a_thread(self, work: Callable[[], T]) -> T:
        threads = Threads(1, "xiling-socket", self._clock)
        try:
            return await threads.run(work)
        finally:
            await threads.close()

    # --- coming in -----------------------------------------------------------------------------------------------

    def enter(self, transport: asyncio.Transport) -> Handler | None:
        """A protocol for this connection, None if there is no room for it."""
        handler = self._server()
        peer = transport.get_extra_info("peername")
        named = counted_as(peer[0]) if self._counts_addresses and isinstance(peer, tuple) else None
        fits, gone = self._crowd.enter(handler, named)
        if gone is not None:
            self._transports.pop(gone).abort()
            self._evicted += 1
            _now_and_then(logging.INFO, self._evicted, "idle connections had to make room")
        if not fits:
            self._refused += 1
            _now_and_then(logging.WARNING, self._refused, "connections were refused: all that may be open are in use")
            return None
        self._transports[handler] = transport
        if self._tls is None:
            transport.set_protocol(handler)
            handler.connection_made(transport)
        return handler

    def secure(self, gate: _Gate, transport: asyncio.Transport, handler: Handler) -> None:
        """The TLS handshake, after the counting: before it nobody would see who only connects."""
        transport.pause_reading()
        self._handshakes.start(self._shake_hands(gate, transport, handler), name="xiling TLS handshake")

    async def _shake_hands(self, gate: _Gate, raw: asyncio.Transport, handler: Handler) -> None:
        assert self._tls is not None
        limits = self._desk.limits
        try:
            secured = None
            if not gate.is_lost:
                secured = await asyncio.get_running_loop().start_tls(
                    raw,
                    gate,
                    self._tls,
                    server_side=True,
                    ssl_handshake_timeout=limits.header_s,
                    ssl_shutdown_timeout=limits.linger_s,
                )
            if secured is not None and not gate.is_lost:
                gate.hand_over(secured, handler)
                return
        except OSError as error:  # SSLError, reset, timeout
            log.info("a TLS handshake failed (%s)", type(error).__name__)
        except BaseException:
            raw.abort()
            self._leave(handler)
            raise
        raw.abort()
        self._leave(handler)

    def _leave(self, handler: Handler) -> None:
        self._crowd.leave(handler)
        self._transports.pop(handler, None)

    # --- serving -------------------------------------------------------------------------------------------------

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        connection = request.protocol
        self._crowd.busy(connection)
        reply = None
        try:
            reply = await answer(request, self._desk)
            if log.isEnabledFor(logging.DEBUG):
                log.debug("%s from %s: %d", request.method, request.remote, reply.status)
            if reply is OK and not self._is_ending and self._is_read(request) and self._taken.fits(request):
                return self._taken
            response = anonymous(reply)
            if self._is_ending:
                response.force_close()
            if reply.status == 404:
                await self._clock.sleep(0)  # a connection full of forged tokens lets the others have their turn
            if request.transport is not None and not self._is_read(request):
                await self._take_leave(request, request.transport, response, reply)
            return response
        finally:
            self._crowd.rest(connection, known=reply is OK)
            if self._is_ending and not self._crowd.at_work:
                self._all_rest.set()

    @staticmethod
    def _is_read(request: web.BaseRequest) -> bool:
        """The sender has finished, and has read what it was told before."""
        transport = request.transport
        return transport is not None and request.content.is_eof() and not transport.get_write_buffer_size()

    async def _take_leave(
        self, request: web.BaseRequest, transport: asyncio.Transport, response: web.Response, reply: Reply
    ) -> None:
        """Answer a sender who has not finished, or who does not read; he gets `linger_s`, then we hang up."""
        limits = self._desk.limits
        transport.set_write_buffer_limits(0)  # what is awaited is then that all of it is sent
        try:
            async with REAL_TIME.timeout(limits.linger_s):
                await response.prepare(request)
                await response.write_eof()
                if reply is not TOO_SLOW:
                    await read_body(request.content, LINGER_BODIES * limits.body_bytes)
        except TimeoutError:
            if transport.get_write_buffer_size():
                transport.abort()
        except (ConnectionError, web.RequestPayloadError):
            pass
        transport.set_write_buffer_limits()
        if not request.content.is_eof():
            request.protocol.force_close()


class _Gate(asyncio.Protocol):
    """The protocol of a connection until it is known whether there is room for it."""

    def __init__(self, server: CallbackServer) -> None:
        self._server = server
        self._early: list[bytes] = []  # what comes between the end of a TLS handshake and our hearing of it
        self.is_lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast(asyncio.Transport, transport)
        handler = self._server.enter(transport)
        if handler is None:
            transport.abort()
        elif transport.get_protocol() is self:
            self._server.secure(self, transport, handler)

    def data_received(self, data: bytes) -> None:
        self._early.append(data)

    def connection_lost(self, exc: BaseException | None) -> None:
        self.is_lost = True

    def hand_over(self, transport: asyncio.Transport, handler: Handler) -> None:
        transport.set_protocol(handler)
        handler.connection_made(transport)
        for data in self._early:
            handler.data_received(data)


def _now_and_then(level: int, count: int, what: str) -> None:
    """A flood must not flood the log: only when the count has doubled."""
    if count & (count - 1) == 0:
        log.log(level, "%d %s", count, what)
