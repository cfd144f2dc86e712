"""The only place that knows the time or sleeps."""

import asyncio
import math
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Protocol, runtime_checkable
from weakref import WeakKeyDictionary


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


class _Lane:
    """Timeouts of one length in one loop: they end in the order in which they began, so one timer is enough for all.

    `asyncio.timeout` sets a timer for each, and nearly all of them are called off again.
    """

    def __init__(self, delay_s: float) -> None:
        self.waiting: dict[_LaneTimeout, None] = {}
        self._delay_s = delay_s
        self.is_timed = False

    def add(self, timeout: "_LaneTimeout") -> None:
        loop = asyncio.get_running_loop()
        timeout.ends_at = loop.time() + self._delay_s
        self.waiting[timeout] = None
        if not self.is_timed:
            self.is_timed = True
            loop.call_at(timeout.ends_at, self._look)

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        while self.waiting:
            first = next(iter(self.waiting))
            if first.ends_at > now:
                loop.call_at(first.ends_at, self._look)
                return
            del self.waiting[first]
            first.expire()
        self.is_timed = False


class _LaneTimeout:
    """`asyncio.timeout`, in a lane."""

    __slots__ = ("_cancelling", "_is_expiring", "_lane", "_task", "ends_at")

    ends_at: float  # by the loop's time

    def __init__(self, lane: _Lane) -> None:
        self._lane = lane
        self._is_expiring = False

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None, "a timeout belongs into a task"
        self._task, self._cancelling = task, task.cancelling()
        self._lane.add(self)

    def expire(self) -> None:
        self._is_expiring = True
        self._task.cancel()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._is_expiring:
            del self._lane.waiting[self]
        elif self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise TimeoutError from error


LANES = 16  # of a loop: there are a handful of lengths, but callers may give their own

# Of all clocks together: a lane's timer, and so the lane, stays until it is due; clients that come and go, and lengths
# that are used once, must not pile them up.
_lanes: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[float, _Lane]] = WeakKeyDictionary()


def _lane(delay_s: float) -> _Lane | None:
    """None: there are too many already, each with a timer that is not due yet."""
    loop = asyncio.get_running_loop()
    lanes = _lanes.get(loop)
    if lanes is None:
        lanes = _lanes[loop] = {}
    lane = lanes.get(delay_s)
    if lane is None:
        if len(lanes) >= LANES:
            for length_s in [length_s for length_s, other in lanes.items() if not other.is_timed]:
                del lanes[length_s]
        if len(lanes) < LANES:
            lane = lanes[delay_s] = _Lane(delay_s)
    return lane


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
        lane = _lane(delay_s) if 0 < delay_s < math.inf else None
        if lane is None:
            return asyncio.timeout(None if delay_s == math.inf else delay_s)
        return _LaneTimeout(lane)
