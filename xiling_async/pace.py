"""How fast: the one gate that a 429 closes for the whole client, and an even rate."""

from __future__ import annotations

from xiling_async.clock import Clock


class Gate:
    """Open, until somebody was told to slow down; then everybody waits. Waiting holds no connection."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._opens_at = 0.0

    def close_for(self, seconds: float) -> None:
        """Stay closed for at least so long from now."""
        self._opens_at = max(self._opens_at, self._clock.time() + seconds)

    @property
    def is_open(self) -> bool:
        return self._clock.time() >= self._opens_at

    async def passed(self) -> None:
        while (left_s := self._opens_at - self._clock.time()) > 0:
            await self._clock.sleep(left_s)


class Rate:
    """At most so many turns a second, evenly spread; whoever comes first goes first."""

    def __init__(self, per_second: float, clock: Clock) -> None:
        self._step_s = 1 / per_second
        self._clock = clock
        self._next_at = 0.0

    async def turn(self) -> None:
        now = self._clock.time()
        mine = max(now, self._next_at)
        self._next_at = mine + self._step_s
        if mine > now:
            await self._clock.sleep(mine - now)
