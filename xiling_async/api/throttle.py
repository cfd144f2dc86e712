"""When a request may leave: in order, at an even rate, not in a pause that the service asked for, nor in an outage."""

from __future__ import annotations

import asyncio
from random import Random
from typing import Final

from xiling_async._internal.clock import Clock
from xiling_async.api import backoff
from xiling_async.errors import ClientClosed

FAILING_IN_A_ROW: Final = 5  # jobs or tasks without a clear answer: then the service is taken to be away
PROBE_CAP_S: Final = 60.0  # the longest pause between two probes of a service that is away
REPEATS: Final = 10.0  # requests may be sent again so often, and once more for ten that were answered
REPEATS_PER_ANSWER: Final = 0.1
LATE_S: Final = 1.0
CLOCK_S: Final = 1e-6  # shorter waits are rounding errors of Unix time


class Throttle:
    """Requests of one sort leave through it one by one.

    A slot that its holder gives up is given back. The service counts as away after one request that could not reach it,
    or `FAILING_IN_A_ROW` jobs or tasks got no clear answer (one that always gets a 500 says nothing about the others);
    then requests that can wait leave as single probes, ever more rarely,
    until one is answered. `end`: nothing leaves any more.
    """

    def __init__(self, clock: Clock, rng: Random, *, per_second: float | None = None) -> None:
        self._clock = clock
        self._rng = rng
        self._step_s = 0.0 if per_second is None else 1 / per_second
        self._line = asyncio.Lock()  # FIFO; a caller that is cancelled in it leaves nothing behind
        self._next_at = 0.0
        self._paused_until = 0.0
        self._ended = False
        self._waiting: set[asyncio.Future[None]] = set()
        self._repeats = REPEATS
        self._failing: set[str] = set()  # jobs or tasks without a clear answer since the last one
        self.has_answered = False  # ever; a service that never has is a wrong address, not an outage
        self._away_since: float | None = None
        self._probe_at = 0.0
        self._probes = 0

    # --- slots -------------------------------------------------------------------------------------------------------

    async def take_slot(self) -> None:
        """Wait for the next slot and take it. Raises `ClientClosed`."""
        came_at = self._clock.time()
        async with self._line:
            while True:
                now = self._clock.time()
                # A loop that is late is made up for, by at most `LATE_S`.
                slot = max(self._next_at, self._paused_until, came_at, now - LATE_S)
                if slot - now <= CLOCK_S:
                    break
                await self.pause(slot - now)
            self._check_not_ended()
            self._next_at = slot + self._step_s

    def release_slot(self) -> None:
        """The slot that was just taken is not used: the next in the line gets it."""
        self._next_at -= self._step_s

    def pause_for(self, seconds: float) -> None:
        """Nothing leaves for at least so long: the service asked for it."""
        self._paused_until = max(self._paused_until, self._clock.time() + seconds)

    @property
    def is_open(self) -> bool:
        """Whether who comes now need not wait."""
        now = self._clock.time()
        return not self._line.locked() and max(self._next_at, self._paused_until, self.probe_at or 0.0) <= now

    @property
    def paused_until(self) -> float | None:
        """Unix seconds; None while it is open."""
        return self._paused_until if self._paused_until > self._clock.time() else None

    async def pause(self, seconds: float) -> None:
        """Wait so long, or until an outage is over. Raises `ClientClosed`."""
        self._check_not_ended()
        waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        timer = self._clock.call_later(seconds, lambda: _wake(waiting))
        self._waiting.add(waiting)
        try:
            await waiting
        finally:
            self._waiting.discard(waiting)
            timer.cancel()
        self._check_not_ended()

    def end(self) -> None:
        """Nothing leaves any more: everybody who waits gets `ClientClosed`."""
        self._ended = True
        self._wake_all()

    def _check_not_ended(self) -> None:
        if self._ended:
            raise ClientClosed("The client was closed before this request was sent: nothing was bought.")

    def _wake_all(self) -> None:
        for waiting in tuple(self._waiting):
            _wake(waiting)

    # --- outages -----------------------------------------------------------------------------------------------------

    @property
    def probe_at(self) -> float | None:
        """When the next probe may leave, Unix seconds; None: the service is not away."""
        return None if self._away_since is None else self._probe_at

    def may_probe(self) -> bool:
        """Whether a request that can wait may leave now. In an outage it is then the probe, and there is no other."""
        if self._away_since is None:
            return True
        if self._probe_at - self._clock.time() > CLOCK_S:
            return False
        self._plan_probe()
        return True

    async def reachable(self) -> None:
        """Wait until the service's pause is over, and the outage, or until the next probe. Raises `ClientClosed`."""
        while (wait_s := max(self._paused_until, self.probe_at or 0.0) - self._clock.time()) > CLOCK_S:
            await self.pause(wait_s)

    def is_away_for_less_than(self, seconds: float) -> bool:
        """It is worth waiting: the service has answered before, and is not away for so long yet."""
        return self.has_answered and self._away_since is not None and self._clock.time() - self._away_since < seconds

    def answered(self) -> None:
        """The service gave a clear answer."""
        self.has_answered = True
        self._failing.clear()
        self._probes = 0
        self._repeats = min(REPEATS, round(self._repeats + REPEATS_PER_ANSWER, 6))  # ten tenths are one
        if self._away_since is not None:
            self._away_since = None
            self._wake_all()

    def failed(self, about: str, *, is_unreachable: bool) -> None:
        """A request never arrived, or got no clear answer. `about`: the id of its job or task."""
        if len(self._failing) < FAILING_IN_A_ROW:
            self._failing.add(about)
        if not is_unreachable and len(self._failing) < FAILING_IN_A_ROW:
            return
        now = self._clock.time()
        if self._away_since is None:
            self._away_since, self._probe_at = now, now
        if self._probe_at - now <= CLOCK_S:  # those that left together and fail together are one try
            self._plan_probe()

    def take_repeat(self) -> bool:
        """Whether one more request may be sent again, so that a storm of failures is not multiplied; it is counted."""
        if self._repeats < 1:
            return False
        self._repeats -= 1
        return True

    def _plan_probe(self) -> None:
        longest_s = min(PROBE_CAP_S, backoff.BASE_S * 2.0 ** min(self._probes, 30))
        self._probe_at = self._clock.time() + longest_s * (0.5 + 0.5 * self._rng.random())
        self._probes += 1


def _wake(waiting: asyncio.Future[None]) -> None:
    if not waiting.done():
        waiting.set_result(None)
