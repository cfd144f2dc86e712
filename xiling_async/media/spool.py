"""Blocks on their way to the disk: written in a thread while the next ones are read, never many of them."""

from __future__ import annotations

import asyncio
import errno
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Final, TypeVar

from xiling_async._internal.clock import Clock
from xiling_async._internal.tasks import Tasks
from xiling_async._internal.threads import Threads

T = TypeVar("T")

# Three mebibytes for each download, and what its connection has. A thread is woken for each buffer, which may cost as
# much time as to write some hundred kilobytes.
BUFFER_BYTES: Final = 1024 * 1024
BUFFERS: Final = 3
PARTIAL_S: Final = 0.05  # a buffer that is not full is written when the thread has had nothing to do for so long
IDLE_S: Final = 0.2  # then it waits so long for more before it ends: to begin anew costs more than to be woken


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
        written: Callable[[], object] | None,
    ) -> None:
        self.failure: Exception | None = None
        self._disk = disk
        self._loop = asyncio.get_running_loop()
        self._first: Callable[[], object] | None = first
        self._write = write
        self._written = written
        self._unmade = BUFFERS
        # As views: assigned to a slice of a bytearray itself, what comes would be copied twice.
        self._free: deque[memoryview] = deque()
        self._filling: memoryview | None = None
        self._filled = 0  # bytes of it
        self._full: SimpleQueue[tuple[memoryview, int] | None] = SimpleQueue()  # None: there will be no more
        self._is_partial = False  # there is a buffer that is not full: a thread with nothing to do asks for it
        self._wants_room = False
        self._is_idle = False  # the thread asks for a buffer that is not full
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
            size = min(len(rest), len(self._filling) - self._filled)
            self._filling[self._filled : self._filled + size] = rest[:size]
            self._filled += size
            rest = rest[size:]
            if self._filled == len(self._filling):
                self._turn_over()
        self._is_partial = self._filling is not None
        if self._running is None:
            self._start_if_needed()

    async def drain(self) -> None:
        """Wait until everything is written, or has failed; also when this wait is cancelled (and then be so)."""
        self._turn_over()
        self._full.put(None)
        self._start_if_needed()
        cancelled: asyncio.CancelledError | None = None
        while self._running is not None:
            try:
                await ended(self._running)
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            raise cancelled

    # --- in the loop ---------------------------------------------------------------------------------------------

    async def _empty(self) -> memoryview:
        while not self._free:
            if self._unmade:
                self._unmade -= 1
                return memoryview(bytearray(BUFFER_BYTES))
            self._room.clear()
            self._wants_room = True
            if not self._free:  # the thread may have been faster
                await self._room.wait()
        return self._free.popleft()

    def _turn_over(self) -> None:
        """What has come so far may be written."""
        if self._filling is not None and self._filled:
            self._full.put((self._filling, self._filled))
            self._filling = None
            self._is_partial = False

    def _start_if_needed(self) -> None:
        if self._running is None and self.failure is None and (self._is_partial or not self._full.empty()):
            self._start()

    def _start(self) -> None:
        self._running = self._disk.start(self._work)
        self._running.add_done_callback(self._done)

    def _tell(self) -> None:
        self._is_told = self._wants_room = False  # first: what is written from here on is told again
        self._room.set()
        if self._is_idle:
            self._is_idle = False
            self._turn_over()
        if self._written is not None and self.failure is None:
            try:
                self._written()
            except Exception as failure:  # the user's own progress callback
                self.failure = failure

    def _done(self, task: asyncio.Task[None]) -> None:
        self._running = None
        error = DiskTrouble(OSError(errno.ECANCELED, "it was called off")) if task.cancelled() else task.exception()
        if isinstance(error, Exception) and self.failure is None:
            self.failure = error
            self._free.append(memoryview(bytearray(1)))  # whoever waits for room finds some, and sees the failure
        self._room.set()
        self._start_if_needed()

    # --- in the thread -------------------------------------------------------------------------------------------

    def _work(self) -> None:
        """Until there has been nothing to write for a while."""
        if self._first is not None:
            self._first()
            self._first = None
            self._notify()
            return  # so that this is told before anything is written
        with suppress(Empty):
            while (found := self._next()) is not None and self.failure is None:
                buffer, size = found
                self._write(buffer[:size])
                self._free.append(buffer)
                if self._wants_room or self._written is not None:
                    self._notify()

    def _next(self) -> tuple[memoryview, int] | None:
        try:
            return self._full.get(timeout=PARTIAL_S)
        except Empty:
            if self._is_partial:
                self._is_idle = True
                self._notify()
            return self._full.get(timeout=IDLE_S)

    def _notify(self) -> None:
        if not self._is_told:
            self._is_told = True
            self._loop.call_soon_threadsafe(self._tell)
