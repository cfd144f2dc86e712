"""How fast: the one gate that a 429 closes for the whole client, and an even rate."""

from __future__ import annotations

import asyncio

from xiling_async.clock import Clock


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
    def is_open(self) -> bool:
        return self._given_up or self._clock.time() >= self._opens_at

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

    async def turn(self) -> None:
        now = self._clock.time()
        mine = max(now, self._next_at)
        self._next_at = mine + self._step_s
        if mine > now:
            await self._clock.sleep(mine - now)
