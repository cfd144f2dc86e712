"""Clocks for tests: one that stands still until it is moved, and one that skips over every wait."""

import asyncio
import heapq
import itertools
import math
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from types import TracebackType

from xiling_async._internal.clock import Timer


class _ManualTimer:
    def __init__(self, callback: Callable[[], object]) -> None:
        self.callback: Callable[[], object] | None = callback

    def cancel(self) -> None:
        self.callback = None


class ManualClock:
    """A clock that stands still until `advance` is called: for tests. Starts at `now`, Unix seconds."""

    def __init__(self, now: float = 1_800_000_000.0) -> None:
        self._now = now
        self._timers: list[tuple[float, int, _ManualTimer]] = []
        self._order = itertools.count()

    def time(self) -> float:
        return self._now

    def call_later(self, delay_s: float, callback: Callable[[], object]) -> Timer:
        timer = _ManualTimer(callback)
        heapq.heappush(self._timers, (self._now + delay_s, next(self._order), timer))
        return timer

    async def sleep(self, delay_s: float) -> None:
        if delay_s <= 0:
            await asyncio.sleep(0)
            return
        awake: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        timer = self.call_later(delay_s, lambda: _wake(awake))
        try:
            await awake
        finally:
            timer.cancel()

    def timeout(self, delay_s: float) -> AbstractAsyncContextManager[object]:
        return _ManualTimeout(self, delay_s)

    @property
    def pending(self) -> int:
        """How many timers are set: what still waits for this clock."""
        return sum(1 for _, _, timer in self._timers if timer.callback is not None)

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass: every timer that falls due is called, in order, at its own time."""
        until = self._now + seconds
        while self._timers and self._timers[0][0] <= until:
            due, _, timer = heapq.heappop(self._timers)
            self._now = max(self._now, due)
            if timer.callback is not None:
                callback, timer.callback = timer.callback, None
                callback()
        self._now = max(self._now, until)  # a callback may have advanced it further


class SkippingClock(ManualClock):
    """A clock that waits for nothing: when all is quiet, it goes on to the next timer. For tests.

    It is quiet when the clock was not used for `quiet_s` real seconds, and then for `QUIET_TURNS` turns of the loop:
    an exchange between two ends in the same loop is over by then. Before it lets a `timeout` expire it waits
    `DEADLINE_ROUNDS` times as long, for what is timed may be under way in a thread or in the system. With
    `skips = False` it stands still until `advance`.
    """

    QUIET_TURNS = 64
    DEADLINE_ROUNDS = 10

    def __init__(self, now: float = 1_800_000_000.0, *, quiet_s: float = 0.1) -> None:
        super().__init__(now)
        self.skips = True
        self._quiet_s = quiet_s
        self._uses = 0
        self._watched_by: asyncio.AbstractEventLoop | None = None

    def time(self) -> float:
        self._uses += 1
        return super().time()

    def call_later(self, delay_s: float, callback: Callable[[], object]) -> Timer:
        self._uses += 1
        loop = asyncio.get_running_loop()
        if self._watched_by is not loop:
            self._watched_by = loop
            self._look_again(loop, 0)
        return super().call_later(delay_s, callback)

    def _look_again(self, loop: asyncio.AbstractEventLoop, rounds: int) -> None:
        loop.call_later(self._quiet_s, self._look, self._uses, self.QUIET_TURNS, rounds)

    def _look(self, uses: int, turns: int, rounds: int) -> None:
        loop = asyncio.get_running_loop()
        waiting = [(due_at, place, timer.callback) for due_at, place, timer in self._timers if timer.callback]
        if not waiting:
            self._watched_by = None
        elif uses != self._uses or not self.skips:
            self._look_again(loop, 0)
        elif turns:
            loop.call_soon(self._look, uses, turns - 1, rounds)
        else:
            due_at, _, callback = min(waiting, key=lambda timer: timer[:2])
            if isinstance(getattr(callback, "__self__", None), _ManualTimeout) and rounds < self.DEADLINE_ROUNDS:
                self._look_again(loop, rounds + 1)
                return
            self.advance(max(0.0, due_at - self._now))
            self._look_again(loop, 0)


def _wake(sleeper: asyncio.Future[None]) -> None:
    if not sleeper.done():
        sleeper.set_result(None)


class _ManualTimeout:
    """`asyncio.timeout` that listens to a `ManualClock`."""

    def __init__(self, clock: ManualClock, delay_s: float) -> None:
        self._clock = clock
        self._delay_s = delay_s
        self._inner = asyncio.timeout(None)
        self._timer: Timer | None = None

    async def __aenter__(self) -> None:
        await self._inner.__aenter__()
        if self._delay_s <= 0:
            self._expire()  # as asyncio's: over at the loop's next turn, whether or not time passes
        elif self._delay_s != math.inf:
            self._timer = self._clock.call_later(self._delay_s, self._expire)

    def _expire(self) -> None:
        self._inner.reschedule(0)  # long past in the loop's own time

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        await self._inner.__aexit__(kind, error, trace)
