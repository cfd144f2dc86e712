"""Blocks on their way to the disk: written in a thread while the next one is read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from xiling_async._internal.threads import Threads

T = TypeVar("T")

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

    `begin` is called first, at once: who waited for it would not read meanwhile, and what a connection has buffered is
    lost when it breaks. What has come is not held back until a block is full: it is written as soon as the thread is
    free. On leaving, everything is written, also when the caller is cancelled. `add`, and leaving, raise what `begin`,
    `write` or `written` raised; nothing is written after that.
    """

    def __init__(
        self,
        disk: Disk,
        begin: Callable[[], object],
        write: Callable[[bytearray], object],
        written: Callable[[], object],
    ) -> None:
        self._disk = disk
        self._begin = begin
        self._write = write
        self._written = written  # called in the loop when more is on the disk
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
        await self._disk.run(self._begin)
        self._written()
        await self._write_pending()

    async def _write_pending(self) -> None:
        while self._pending:
            block, self._pending = self._pending, bytearray()
            await self._disk.run(self._write, block)
            self._written()
