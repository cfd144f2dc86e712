"""The only place that knows the time or sleeps."""

import asyncio
import math
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Final, Protocol, runtime_checkable

LATE_S: Final = 1.0  # a deadline that is noticed so much later tells of a pause of this process, not of the other side
GRACE_S: Final = 1.0  # then what has arrived meanwhile is read first


class Timer(Protocol):
    """Something scheduled that can still be called off."""

    def cancel(self) -> None: ...


@runtime_checkable
class Clock(Protocol):
    """Time in seconds.

    `time()` is Unix time that never jumps while the process lives; differences of it are true durations.
    """

    def time(self) -> float: ...

    def call_later(self, delay_s: float, callback: Callable[[], object]) -> Timer: ...

    async def sleep(self, delay_s: float) -> None: ...

    def timeout(self, delay_s: float) -> AbstractAsyncContextManager[object]:
        """`async with` that ends in `TimeoutError` after `delay_s` seconds; `math.inf`: never."""
        ...


class _Deadline:
    """`asyncio.timeout` that gives the loop time to read when its timer fires much too late.

    A process that was stopped, or whose loop was blocked, finds both the deadline and the answer in one turn of the
    loop. The late timer proves nothing about an answer that has arrived.
    """

    __slots__ = ("_cancelled_before", "_delay_s", "_due_at", "_is_expired", "_loop", "_task", "_timer")

    def __init__(self, delay_s: float) -> None:
        self._delay_s = delay_s
        self._is_expired = False

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a timeout is used inside a task")
        self._task = task
        self._cancelled_before = task.cancelling()
        self._loop = task.get_loop()
        self._set(self._delay_s)

    def _set(self, delay_s: float) -> None:
        self._due_at = self._loop.time() + delay_s
        self._timer: asyncio.Handle = self._loop.call_at(self._due_at, self._expire)

    def _expire(self) -> None:
        if self._loop.time() - self._due_at > LATE_S:
            self._set(GRACE_S)
        else:  # what has arrived in this turn of the loop comes first
            self._timer = self._loop.call_soon(self._cancel)

    def _cancel(self) -> None:
        self._is_expired = True
        self._task.cancel()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        # As asyncio's: it is a timeout unless another cancellation of the task came meanwhile.
        if self._is_expired and self._task.uncancel() <= self._cancelled_before and kind is asyncio.CancelledError:
            raise TimeoutError from error


class SystemClock:
    """The time of this machine, from the moment it was made on by the monotonic clock: NTP steps do not reach it."""

    def __init__(self) -> None:
        self._offset_s = time.time() - time.monotonic()

    def time(self) -> float:
        return self._offset_s + time.monotonic()

    def call_later(self, delay_s: float, callback: Callable[[], object]) -> Timer:
        return asyncio.get_running_loop().call_later(delay_s, callback)

    async def sleep(self, delay_s: float) -> None:
        await asyncio.sleep(delay_s)

    def timeout(self, delay_s: float) -> AbstractAsyncContextManager[object]:
        # Never `wait_for`: on Python 3.11 it can swallow a cancellation.
        if 0 < delay_s < math.inf:
            return _Deadline(delay_s)
        return asyncio.timeout(None if delay_s == math.inf else delay_s)
