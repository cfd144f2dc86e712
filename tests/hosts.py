"""What a download may meet on the network: a host with prepared answers or none, and TLS before a service."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Self

import attrs
import trustme

from xiling_async import Timeouts
from xiling_async._internal.clock import SystemClock, Timer

PUBLIC = "127.0.0.2"  # taken for an address of the open internet by those tests that need one


class Brisk(SystemClock):
    """A clock that runs a thousand times too fast: pauses are short, and so is the patience with a stall."""

    def time(self) -> float:
        now = super().time()
        self._began = getattr(self, "_began", now)
        return self._began + (now - self._began) * 1000

    def call_later(self, delay_s: float, callback: Callable[[], object]) -> Timer:
        return super().call_later(delay_s / 1000, callback)

    async def sleep(self, delay_s: float) -> None:
        await super().sleep(delay_s / 1000)

    def timeout(self, delay_s: float) -> AbstractAsyncContextManager[object]:
        return super().timeout(delay_s / 1000)


def brisk_timeouts(stall: float = 20_000) -> Timeouts:
    """The usual patience of a client with a `Brisk` clock; of the stall of a download, which a test may want to see."""
    return Timeouts(connect=10_000, answer=60_000, wait=1_800_000, uncertain=3_600_000, stall=stall)


@attrs.frozen
class Seen:
    """The head of a request, as it came."""

    head: bytes = attrs.field(repr=False)

    def header(self, name: str) -> str | None:
        for line in self.head.decode("latin-1").split("\r\n")[1:]:
            key, _, value = line.partition(":")
            if key.lower() == name.lower():
                return value.strip()
        return None


Answer = Callable[[Seen, int], bytes]  # the request, and its number, from 1


class Host:
    """Answers each request with these bytes, and hangs up. With no answer it is a canary: it should never be touched.

    `connections` counts those who came, also those who said nothing.
    """

    def __init__(self, answer: Answer | None = None, *, address: str = "127.0.0.1") -> None:
        self._answer = answer
        self._address = address
        self.connections = 0
        self.seen: list[Seen] = []
        self._serving: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, self._address, 0)
        self.port = int(self._server.sockets[0].getsockname()[1])
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for _ in range(10):  # what was accepted last has come to its task
            await asyncio.sleep(0)
        while self._serving:
            await asyncio.wait(self._serving)

    @property
    def url(self) -> str:
        return f"http://{self._address}:{self.port}/sample_0.mp4?X-Goog-Signature=0123456789abcdef"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            self.seen.append(Seen(await reader.readuntil(b"\r\n\r\n")))
            if self._answer is not None:
                writer.write(self._answer(self.seen[-1], len(self.seen)))
                await writer.drain()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def answer(status: int = 200, body: bytes = b"", *headers: str, length: int | None = None) -> bytes:
    """An answer as bytes; `length` is what is announced, -1: nothing."""
    lines = [f"HTTP/1.1 {status} Said", *headers, "Connection: close"]
    if length != -1:
        lines.append(f"Content-Length: {len(body) if length is None else length}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


@contextlib.asynccontextmanager
async def tls_front(authority: trustme.CA, port: int, *, address: str = PUBLIC) -> AsyncIterator[int]:
    """HTTPS at this address, for a service on that port; gives its own port."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(address, "localhost", "127.0.0.1").configure_cert(context)
    passing: set[asyncio.Task[None]] = set()

    async def passed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ssl.SSLError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        with contextlib.suppress(OSError, ssl.SSLError):
            writer.close()
            await writer.wait_closed()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        passing.add(task)
        behind_reader, behind = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(passed(reader, behind), passed(behind_reader, writer))

    server = await asyncio.start_server(serve, address, 0, ssl=context)
    try:
        yield int(server.sockets[0].getsockname()[1])
    finally:
        server.close()
        for task in passing:
            task.cancel()
        await asyncio.gather(*passing, return_exceptions=True)


def trusting(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context
