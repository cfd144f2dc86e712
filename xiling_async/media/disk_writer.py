"""Blocks on their way to the disk: written in a thread while the next one is read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from xiling_async._internal.threads import Threads
from xiling_async.media.headers import Announced
from xiling_async.media.partial_file import PartialFile

T = TypeVar("T")
Progress = Callable[[int, int | None], object]  # bytes on the disk, and of the whole file where that is known

BLOCK_BYTES: Final = 1024 * 1024


class DiskError(Exception):
    """An `OSError` of the disk, as `error`. Not an `OSError` itself: those speak of the network."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error.strerror or type(error).__name__)
        self.error = error


class Disk(Threads):
    """Runs what touches files in threads."""

    async def run(self, function: Callable[..., T], *arguments: object) -> T:
        """As `Threads.run`, but an `OSError` becomes a `DiskError`."""
        try:
            return await super().run(function, *arguments)
        except OSError as error:
            raise DiskError(error) from error


class BlockWriter:
    """`async with`: what is added is written in order, in blocks of about `BLOCK_BYTES`, at most one of them ahead.

    The partial file begins (or resumes: `is_rest`) at once: while that is awaited nothing would be read, and what a
    connection has buffered is lost when it breaks. A block is written as soon as the thread is free, full or not. On
    leaving, everything is written, also when the caller is cancelled. `add`, and leaving, raise what the disk or
    `progress` raised; nothing is written after that.
    """

    def __init__(
        self, disk: Disk, part: PartialFile, announced: Announced, *, is_rest: bool, progress: Progress | None
    ) -> None:
        self._disk = disk
        self._part = part
        self._announced = announced
        self._is_rest = is_rest
        self._progress = progress
        self._pending = bytearray()
        self._writing: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._start(self._write_first())
        return self

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        self._writing = asyncio.get_running_loop().create_task(work, name="xiling write")

    async def add(self, data: bytes) -> None:
        """Take these bytes; waits while a whole block is pending."""
        self._pending += data
        if self._writing is not None and self._writing.done():
            self._writing.result()
            self._writing = None
        if self._writing is None and self._pending:
            self._start(self._write_pending())
        while len(self._pending) >= BLOCK_BYTES and self._writing is not None and not self._writing.done():
            await asyncio.wait([self._writing])

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        is_cancelled = False
        while self._writing is not None and not self._writing.done():
            try:
                await asyncio.wait([self._writing])
            except asyncio.CancelledError:
                is_cancelled = True
        failure = self._writing.exception() if self._writing is not None else None
        if is_cancelled:
            raise asyncio.CancelledError
        if failure is not None and kind is not asyncio.CancelledError:
            raise failure

    async def _write_first(self) -> None:
        begin = self._part.resume if self._is_rest else self._part.begin
        await self._disk.run(begin, self._announced)
        report(self._part, self._progress)
        await self._write_pending()

    async def _write_pending(self) -> None:
        while self._pending:
            block, self._pending = bytes(self._pending), bytearray()
            await self._disk.run(self._part.write, block)
            report(self._part, self._progress)


def report(part: PartialFile, progress: Progress | None) -> None:
    if progress is not None:
        progress(part.size, part.announced.total)
