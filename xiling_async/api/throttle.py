"""How fast: the one gate that a 429 closes for the whole client, an even rate, patience while the service is away."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Final

from xiling_async._internal.clock import Clock
from xiling_async.api import retry

MEAN_OVER_S: Final = 60.0
SLOWEST_START: Final = 1.0  # a second, after a standstill: no service calls that a burst
FAILURES_IN_A_ROW: Final = 5  # of POSTs whose fate is unknown: then the service is away, and each more may cost money


class Gate:
    """Open, until somebody was told to slow down; then everybody waits. Waiting holds no connection."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._opens_at = 0.0
        self._waiting: set[asyncio.Future[None]] = set()
        self._given_up = False

    def close_for(self, seconds: float) -> None:
        """Stay closed for at least so long from now."""
        self._opens_at = max(self._opens_at, self._clock.time() + seconds)

    def give_up(self) -> None:
        """Nobody waits here any longer: the client is closing."""
        self._given_up = True
        for waiting in tuple(self._waiting):
            _wake(waiting)

    @property
    def has_given_up(self) -> bool:
        return self._given_up

    @property
    def is_open(self) -> bool:
        return self._given_up or self._clock.time() >= self._opens_at

    @property
    def closed_until(self) -> float | None:
        """Unix seconds; None while it is open."""
        return None if self.is_open else self._opens_at

    async def passed(self) -> None:
        while not self.is_open:
            await self.pause(self._opens_at - self._clock.time())

    async def pause(self, seconds: float) -> None:
        """Wait so long, or until everybody is sent home."""
        if self._given_up:
            return
        waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        timer = self._clock.call_later(seconds, lambda: _wake(waiting))
        self._waiting.add(waiting)
        try:
            await waiting
        finally:
            self._waiting.discard(waiting)
            timer.cancel()


def _wake(waiting: asyncio.Future[None]) -> None:
    if not waiting.done():
        waiting.set_result(None)


class Rate:
    """At most so many turns a second, evenly spread; whoever comes first goes first."""

    def __init__(self, per_second: float, clock: Clock) -> None:
        self._step_s = 1 / per_second
        self._clock = clock
        self._next_at = 0.0

    def reserve(self) -> float:
        """Take the next turn; seconds until it comes."""
        now = self._clock.time()
        mine = max(now, self._next_at)
        self._next_at = mine + self._step_s
        return mine - now

    async def turn(self) -> None:
        wait_s = self.reserve()
        if wait_s > 0:
            await self._clock.sleep(wait_s)


class Tempo:
    """Starts again after a standstill as fast as it was before, and then ever faster: what has queued up meanwhile does
    not burst out at once."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._began_at: float | None = None
        self._counted_at = 0.0
        self._count = 0.0  # decays by 1/e in MEAN_OVER_S
        self._mean: float | None = None  # a second, before the standstill; None: there was none, or it is got over
        self._stood_until = 0.0
        self._next_at = 0.0
        self._has_queued = False

    def count(self) -> None:
        """One more has been done."""
        now = self._clock.time()
        if self._began_at is None:
            self._began_at = self._counted_at = now
        self._count = self._count * math.exp((self._counted_at - now) / MEAN_OVER_S) + 1
        self._counted_at = now

    def standstill(self) -> None:
        """Nothing can be done now."""
        self._stood_until = now = self._clock.time()
        self._next_at, self._has_queued = 0.0, False  # whoever has queued comes again
        if self._mean is None and self._began_at is not None and now > self._began_at:
            self._mean = max(SLOWEST_START, self._count / min(MEAN_OVER_S, now - self._began_at))

    def reserve(self) -> float:
        """Take the next turn; seconds until it comes."""
        if self._mean is None:
            return 0.0
        now = self._clock.time()
        if now >= self._next_at and self._has_queued:  # the queue is gone
            self._mean = None
            return 0.0
        mine = max(now, self._next_at)
        self._has_queued = mine > now
        self._next_at = mine + 1 / (self._mean * 2 ** max(0.0, (mine - self._stood_until) / MEAN_OVER_S))
        return mine - now


class Outage:
    """The service cannot be reached, or every POST of a row has come to an unknown end: those who are patient try
    again ever more rarely, all together. A service that has never answered is a wrong address, and no outage."""

    def __init__(self, gate: Gate, tempo: Tempo, clock: Clock, random: Callable[[], float]) -> None:
        self._gate = gate  # whose waiting room is used; it is not closed: who is not patient does not wait
        self._tempo = tempo
        self._clock = clock
        self._random = random
        self._tries = 0
        self._doubts = 0
        self._again_at = 0.0
        self._since: float | None = None
        self._has_answered = False

    @property
    def is_over(self) -> bool:
        return self._clock.time() >= self._again_at

    def may_wait(self, patience_s: float) -> bool:
        """Whether it has not lasted longer than this yet."""
        return self._has_answered and self._since is not None and self._clock.time() - self._since < patience_s

    async def passed(self) -> None:
        while not self.is_over and not self._gate.has_given_up:
            await self._gate.pause(self._again_at - self._clock.time())

    def answered(self) -> None:
        """A POST came to a clear end."""
        self._has_answered = True
        self._tries = self._doubts = 0
        self._since = None
        self._again_at = 0.0

    def doubtful(self) -> None:
        """The fate of a POST is unknown."""
        self._doubts += 1
        if self._doubts >= FAILURES_IN_A_ROW:
            self.unreachable()

    def unreachable(self) -> None:
        """A POST never arrived."""
        now = self._clock.time()
        if self._since is None:
            self._since = now
        self._tempo.standstill()
        if self.is_over:  # those that left together fail together: they are one try
            self._again_at = now + max(retry.BASE_S / 2, retry.full_jitter(self._tries, self._random))
            self._tries += 1
