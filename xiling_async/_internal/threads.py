"""A few threads for blocking calls, files above all; none is left once they are closed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from xiling_async._internal.clock import Clock
from xiling_async._internal.tasks import wait_out

T = TypeVar("T")


class Threads:
    """At most `most` threads, started when needed.

    Not `asyncio.to_thread`: the threads of the loop's own executor would outlive the client.
    """

    def __init__(self, most: int, name: str, clock: Clock) -> None:
        self._most = most
        self._name = name
        self._clock = clock
        self._executor: ThreadPoolExecutor | None = None
        self._running: set[Future[Any]] = set()
        self._alive: list[threading.Thread] = []

    async def run(self, function: Callable[..., T], *arguments: object) -> T:
        """The result of `function(*arguments)`, called in a thread.

        No work outlives its caller: a cancelled caller calls off what has not begun, waits for what has, and only then
        raises `CancelledError`.
        """
        if self._executor is None:
            self._executor = ThreadPoolExecutor(self._most, thread_name_prefix=self._name, initializer=self._started)
        work = self._executor.submit(function, *arguments)
        self._running.add(work)
        work.add_done_callback(self._running.discard)
        result = asyncio.wrap_future(work)
        try:
            await asyncio.wait([result])
        except asyncio.CancelledError:
            work.cancel()
            await wait_out(result)
            raise
        return result.result()

    def _started(self) -> None:
        self._alive.append(threading.current_thread())

    async def close(self) -> None:
        """Wait for the work under way, then until the threads have ended."""
        executor, self._executor = self._executor, None
        if executor is None:
            return
        executor.shutdown(wait=False, cancel_futures=True)
        await wait_out(*(asyncio.wrap_future(work) for work in tuple(self._running)))
        while any(thread.is_alive() for thread in self._alive):  # idle threads: they end within microseconds
            await self._clock.sleep(0)
        self._alive.clear()
