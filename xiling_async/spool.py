"""Blocks on their way to the disk: written in a thread while the next ones are read, never many of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, TypeVar

from xiling_async.clock import Clock
from xiling_async.tasks import Tasks
from xiling_async.threads import Threads

T = TypeVar("T")

# What may wait while as much is being written: with a socket's own buffers some 3 MiB for each download.
WAITING_BYTES: Final = 1024 * 1024


class DiskTrouble(Exception):
    """The disk said no. Not an `OSError` any more: those speak of the network."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error.strerror or type(error).__name__)
        self.error = error


class Disk:
    """All that touches files, off the loop. Whoever is cancelled meanwhile waits until his work is over: nothing runs
    on behind anybody's back."""

    def __init__(self, most: int, clock: Clock) -> None:
        self._threads = Threads(most, "xiling download", clock)
        self._tasks = Tasks()

    def start(self, work: Callable[[], T]) -> asyncio.Task[T]:
        return self._tasks.start(self._run(work), name="xiling disk")

    async def do(self, work: Callable[[], T]) -> T:
        """Its result. Raises `DiskTrouble`, and what else it raises."""
        task = self.start(work)
        await ended(task)
        return task.result()

    async def close(self) -> None:
        await self._tasks.drain()
        await self._threads.close()

    async def _run(self, work: Callable[[], T]) -> T:
        try:
            return await self._threads.run(work)
        except OSError as error:
            raise DiskTrouble(error) from error


async def ended(task: asyncio.Task[object]) -> None:
    """Wait until it has ended, also when this wait is cancelled (and then be cancelled)."""
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled


class Spool:
    """Of one answer. `first` is done before anything is written; `written` is told after each step, in the loop.

    `failure`: what went wrong; from then on nothing more is written.
    """

    def __init__(
        self,
        disk: Disk,
        *,
        first: Callable[[], object],
        write: Callable[[bytes], object],
        written: Callable[[], object],
    ) -> None:
        self.failure: Exception | None = None
        self._disk = disk
        self._write = write
        self._written = written
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self._running: asyncio.Task[object] | None = None
        self._start(first)

    async def put(self, data: bytes) -> None:
        """Take this; returns at once unless too much waits already."""
        self._waiting.append(data)
        self._waiting_bytes += len(data)
        self._next()
        while self._waiting_bytes >= WAITING_BYTES and self._running is not None:
            await asyncio.wait([self._running])

    async def drain(self) -> None:
        """Wait until everything is written, or has failed; also when this wait is cancelled (and then be cancelled)."""
        while self._running is not None:
            await ended(self._running)

    def _next(self) -> None:
        if self._running is None and self._waiting and self.failure is None:
            data = self._waiting[0] if len(self._waiting) == 1 else b"".join(self._waiting)
            self._waiting.clear()
            self._waiting_bytes = 0
            self._start(lambda: self._write(data))

    def _start(self, work: Callable[[], object]) -> None:
        self._running = self._disk.start(work)
        self._running.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[object]) -> None:
        self._running = None
        try:
            task.result()
            self._written()
        except Exception as failure:  # of the disk, or of the user's own progress callback
            self.failure = failure
            self._waiting.clear()
            self._waiting_bytes = 0
        self._next()
