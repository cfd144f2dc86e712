"""Blocks on their way to the disk: written in a thread while the next ones are read, never many of them."""

from __future__ import annotations

import asyncio
import errno
from collections import deque
from collections.abc import Callable
from typing import Final, TypeVar

from xiling_async.clock import Clock
from xiling_async.tasks import Tasks
from xiling_async.threads import Threads

T = TypeVar("T")

# With the buffers of its connection some 3 MiB for each download; a buffer stays in a core's own cache.
BUFFER_BYTES: Final = 512 * 1024
BUFFERS: Final = 4


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
    """Wait until it has ended and whoever asked to be told was told; also when this is cancelled (and then be so)."""
    cancelled: asyncio.CancelledError | None = None
    while True:
        try:
            await asyncio.wait([task])  # also of one that has ended: its callbacks come before ours
        except asyncio.CancelledError as error:
            cancelled = error
        if task.done():
            break
    if cancelled is not None:
        raise cancelled


class Spool:
    """Of one answer. `first` is done before anything is written; `written` hears in the loop that more is on the disk.

    What comes is copied at once into a few buffers, so that the memory it came in serves for the next: else the system
    would map fresh pages for every block, which costs more than the copy. A thread writes buffer after buffer by
    itself, and does not wait for the loop in between. `failure`: what went wrong; then nothing more is written.
    """

    def __init__(
        self,
        disk: Disk,
        *,
        first: Callable[[], object],
        write: Callable[[memoryview], object],
        written: Callable[[], object],
    ) -> None:
        self.failure: Exception | None = None
        self._disk = disk
        self._loop = asyncio.get_running_loop()
        self._first: Callable[[], object] | None = first
        self._write = write
        self._written = written
        self._unmade = BUFFERS
        self._free: deque[bytearray] = deque()
        self._filling: bytearray | None = None
        self._filled = 0  # bytes of it
        self._full: deque[memoryview] = deque()
        self._is_told = False  # a call of `_tell` is on its way
        self._room = asyncio.Event()
        self._running: asyncio.Task[None] | None = None
        self._start()

    async def put(self, data: bytes) -> None:
        """Take this; returns at once unless every buffer waits to be written."""
        rest = memoryview(data)
        while rest and self.failure is None:
            if self._filling is None:
                self._filling = await self._empty()
                self._filled = 0
                continue  # it may have failed meanwhile
            size = min(len(rest), BUFFER_BYTES - self._filled)
            self._filling[self._filled : self._filled + size] = rest[:size]
            self._filled += size
            rest = rest[size:]
            if self._filled == BUFFER_BYTES:
                self._turn_over()
        if self._running is None:
            self._start()

    async def drain(self) -> None:
        """Wait until everything is written, or has failed; also when this wait is cancelled (and then be so)."""
        cancelled: asyncio.CancelledError | None = None
        while self._running is not None:
            try:
                await ended(self._running)
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            raise cancelled

    # --- in the loop ---------------------------------------------------------------------------------------------

    async def _empty(self) -> bytearray:
        while not self._free:
            if self._unmade:
                self._unmade -= 1
                return bytearray(BUFFER_BYTES)
            self._room.clear()
            if not self._free:  # the thread may have been faster
                await self._room.wait()
        return self._free.popleft()

    def _turn_over(self) -> None:
        """What has come so far may be written."""
        if self._filling is not None and self._filled:
            self._full.append(memoryview(self._filling)[: self._filled])
            self._filling = None

    def _start(self) -> None:
        self._turn_over()
        if self.failure is None and (self._full or self._first is not None):
            self._running = self._disk.start(self._work)
            self._running.add_done_callback(self._done)

    def _tell(self) -> None:
        self._is_told = False  # first: what is written from here on is told again
        self._room.set()
        if self.failure is None:
            try:
                self._written()
            except Exception as failure:  # the user's own progress callback
                self.failure = failure

    def _done(self, task: asyncio.Task[None]) -> None:
        self._running = None
        error = DiskTrouble(OSError(errno.ECANCELED, "it was called off")) if task.cancelled() else task.exception()
        if isinstance(error, Exception) and self.failure is None:
            self.failure = error
            self._free.append(bytearray())  # whoever waits for room finds some, and sees the failure
        self._room.set()
        self._start()  # with what came when the thread had just looked

    # --- in the thread -------------------------------------------------------------------------------------------

    def _work(self) -> None:
        """For as long as there is something to write."""
        if self._first is not None:
            self._first()
            self._first = None
            self._notify()
            return  # so that this is told before anything is written
        while self._full and self.failure is None:
            data = self._full.popleft()
            self._write(data)
            self._free.append(data.obj)  # type: ignore[arg-type]  # the bytearray behind it
            self._notify()

    def _notify(self) -> None:
        if not self._is_told:
            self._is_told = True
            self._loop.call_soon_threadsafe(self._tell)
