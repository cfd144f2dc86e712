"""Clocks for tests: one that moves only by `advance`, and one that skips every wait."""

import asyncio
import heapq
import itertools
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager


class _ManualTimer:
    def __init__(self, clock: "ManualClock", number: int) -> None:
        self._clock = clock
        self.number = number

    def cancel(self) -> None:
        self._clock._callbacks.pop(self.number, None)


class ManualClock:
    """A clock for tests that stands still until `advance` is called. It starts at `now`, Unix seconds."""

    def __init__(self, now: float = 1_800_000_000.0) -> None:
        self._now = now
        self._due: list[tuple[float, int]] = []  # a heap of due times and timer numbers, cancelled ones included
        self._callbacks: dict[int, Callable[[], object]] = {}  # of the pending timers, by number
        self._timeouts: set[int] = set()  # which of them belong to a `timeout`
        self._numbers = itertools.count()

    def time(self) -> float:
        return self._now

    def call_later(self, delay_s: float, callback: Callable[[], object]) -> _ManualTimer:
        timer = _ManualTimer(self, next(self._numbers))
        self._callbacks[timer.number] = callback
        heapq.heappush(self._due, (self._now + delay_s, timer.number))
        return timer

    async def sleep(self, delay_s: float) -> None:
        if delay_s <= 0:
            await asyncio.sleep(0)
            return
        over = asyncio.Event()
        timer = self.call_later(delay_s, over.set)
        try:
            await over.wait()
        finally:
            timer.cancel()

    @asynccontextmanager
    async def timeout(self, delay_s: float) -> AsyncIterator[None]:
        async with asyncio.timeout(0 if delay_s <= 0 else None) as timeout:
            if not 0 < delay_s < math.inf:
                yield
                return
            timer = self.call_later(delay_s, lambda: timeout.reschedule(0))  # long past in the loop's own time
            self._timeouts.add(timer.number)
            try:
                yield
            finally:
                timer.cancel()
                self._timeouts.discard(timer.number)

    @property
    def pending(self) -> int:
        """How many timers are set."""
        return len(self._callbacks)

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass: each timer that falls due is called, in order, at its own time."""
        until = self._now + seconds
        while self._due and self._due[0][0] <= until:
            due_at, number = heapq.heappop(self._due)
            self._now = max(self._now, due_at)
            callback = self._callbacks.pop(number, None)
            if callback is not None:
                callback()
        self._now = max(self._now, until)  # a callback may have advanced it further


class SkippingClock(ManualClock):
    """A clock for tests that skips every wait: when nothing happens, it advances to the next timer.

    Nothing happens when the clock was not used for `quiet_s` real seconds, and then for `QUIET_TURNS` turns of the
    loop: an exchange between two ends in the same loop is over by then. Before it lets a `timeout` expire it waits
    `TIMEOUT_ROUNDS` times as long, because the work may be in a thread or in the system. With `skips = False` it
    stands still until `advance`.
    """

    QUIET_TURNS = 64
    TIMEOUT_ROUNDS = 10

    def __init__(self, now: float = 1_800_000_000.0, *, quiet_s: float = 0.1) -> None:
        super().__init__(now)
        self.skips = True
        self._quiet_s = quiet_s
        self._uses = 0
        self._loop: asyncio.AbstractEventLoop | None = None  # in which a check is scheduled

    def time(self) -> float:
        self._uses += 1
        return super().time()

    def call_later(self, delay_s: float, callback: Callable[[], object]) -> _ManualTimer:
        self._uses += 1
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._loop = loop
            self._schedule_check(loop, 0)
        return super().call_later(delay_s, callback)

    def _schedule_check(self, loop: asyncio.AbstractEventLoop, rounds: int) -> None:
        loop.call_later(self._quiet_s, self._check, self._uses, self.QUIET_TURNS, rounds)

    def _check(self, uses: int, turns: int, rounds: int) -> None:
        loop = asyncio.get_running_loop()
        if not self._callbacks:
            self._loop = None
        elif uses != self._uses or not self.skips:
            self._schedule_check(loop, 0)
        elif turns:
            loop.call_soon(self._check, uses, turns - 1, rounds)
        else:
            due_at, number = min(due for due in self._due if due[1] in self._callbacks)
            if number in self._timeouts and rounds < self.TIMEOUT_ROUNDS:
                self._schedule_check(loop, rounds + 1)
                return
            self.advance(max(0.0, due_at - self._now))
            self._schedule_check(loop, 0)
