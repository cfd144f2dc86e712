"""A few threads of our own for what would block the loop, files above all; gone when they are closed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from xiling_async._internal.clock import Clock

T = TypeVar("T")


class Threads:
    """At most so many, begun when they are needed. asyncio's own pool would outlive the client that used it."""

    def __init__(self, most: int, name: str, clock: Clock) -> None:
        self._most = most
        self._name = name
        self._clock = clock
        self._permits = asyncio.Semaphore(most)  # what still waits can be called off
        self._executor: ThreadPoolExecutor | None = None
        self._running: set[asyncio.Future[Any]] = set()
        self._alive: list[threading.Thread] = []

    async def run(self, work: Callable[[], T]) -> T:
        """The result of `work`. Who is cancelled meanwhile does not wait for it: it must leave nothing to clean up."""
        async with self._permits:
            if self._executor is None:
                self._executor = ThreadPoolExecutor(self._most, thread_name_prefix=self._name, initializer=self._begun)
            future = asyncio.get_running_loop().run_in_executor(self._executor, work)
            self._running.add(future)
            future.add_done_callback(self._ended)
            return await asyncio.shield(future)

    def _begun(self) -> None:
        self._alive.append(threading.current_thread())

    def _ended(self, future: asyncio.Future[Any]) -> None:
        self._running.discard(future)
        if not future.cancelled():
            future.exception()  # whoever awaits it has it, or has gone

    async def close(self) -> None:
        """Wait for what runs, then until the threads are gone."""
        executor, self._executor = self._executor, None
        if executor is None:
            return
        executor.shutdown(wait=False, cancel_futures=True)
        while self._running:
            await asyncio.wait(tuple(self._running))
        while any(thread.is_alive() for thread in self._alive):  # a few microseconds: they have nothing left to do
            await self._clock.sleep(0)
        self._alive.clear()
