"""One file brought whole into its part: resumed where it was cut, checked against what was announced."""

from __future__ import annotations

from typing import Final

from xiling_async.api import retry
from xiling_async.errors import IntegrityError, ResultExpired
from xiling_async.media.exchange import Exchange, Failed, Gone, Means, Order, Setback, Spoiled
from xiling_async.media.partial_file import Part

TRIES: Final = 5  # in a row that brought nothing new
RATE_LIMIT_WAITS: Final = 8  # in a row, at 30 s about 4 minutes


class Fetch:
    """Of one order into one open part."""

    def __init__(self, order: Order, part: Part, means: Means) -> None:
        self.order = order
        self._part = part
        self._means = means
        self._exchange = Exchange(order, part, means)
        self._link = order.url
        self._asked_for_link = False
        self._best = 0  # bytes: what goes beyond them is progress
        self._tries = 0
        self._waits = 0
        self._spoiled = False
        self.exchanges = 0

    async def run(self) -> None:
        """Until the part holds the whole file. Raises `DownloadError`, `DiskTrouble`, and what `progress` raises."""
        total = self._part.announced.total
        if total is not None and total > self.order.max_bytes:
            raise self._exchange.too_large(total)
        if await self._is_whole_already():
            return
        self._best = self._part.size
        while True:
            self.exchanges += 1
            ending = await self._exchange.attempt(self._link)
            if self._part.size > self._best:
                self._best, self._tries, self._waits = self._part.size, 0, 0
            if ending is None:
                why = await self._fault()
                if why is None:
                    self._means.budget.succeeded()
                    return
                ending = Spoiled(why)
            await self._go_on_after(ending)

    # --- between two exchanges -----------------------------------------------------------------------------------

    async def _is_whole_already(self) -> bool:
        """Whether an earlier call has left all of it, and a digest proves that."""
        part = self._part
        if not part.announced.is_provable or part.announced.total != part.size:
            await self._catch_up()
            return False
        if await self._fault() is None:
            self._exchange.tell()
            return True
        await self._means.disk.do(part.clear)
        return False

    async def _catch_up(self) -> None:
        while await self._means.disk.do(self._part.catch_up):
            pass

    async def _fault(self) -> str | None:
        await self._catch_up()
        return self._part.fault()

    async def _go_on_after(self, ending: Setback | Gone | Spoiled | Failed) -> None:
        match ending:
            case Failed(error):
                raise error
            case Spoiled(why):
                await self._once_more_from_the_start(why)
            case Gone(why):
                await self._ask_for_link(why)
            case Setback(limited=True):
                self._waits += 1
                if self._waits > RATE_LIMIT_WAITS:
                    raise self._exchange.error(
                        f"could not be had: {ending.why}, again and again.", retry_after=ending.pause_s
                    )
                self._means.gate.close_for(retry.RATE_LIMIT_S if ending.pause_s is None else ending.pause_s)
            case Setback():
                await self._pause(ending)

    async def _pause(self, setback: Setback) -> None:
        self._tries += 1
        moved_on = self._tries == 1 and self._best  # whatever brings us forward is not limited
        if self._tries > TRIES or not (moved_on or self._means.budget.take()):
            kept = " What came is kept: a later download goes on from there." if self._part.size else ""
            raise self._exchange.error(
                f"could not be had: {setback.why}; {self._tries} tries in a row brought nothing.{kept}"
            )
        pause_s = retry.full_jitter(self._tries - 1, self._means.random)
        await self._means.gate.pause(max(pause_s, setback.pause_s or 0.0))

    async def _once_more_from_the_start(self, why: str) -> None:
        if self._spoiled:
            await self._means.disk.do(self._part.discard)
            whose = f"{self.order.words} from {self._exchange.host}"
            raise IntegrityError(
                f"{whose} is not what was announced, twice: {why}. Nothing was kept.", task_ids=(self.order.task_id,)
            )
        self._spoiled = True
        self._best = 0
        await self._means.disk.do(self._part.clear)

    async def _ask_for_link(self, why: str) -> None:
        """One status GET for a new link, then it is over."""
        fresh = None
        if not self._asked_for_link:
            self._asked_for_link = True
            fresh = await self.order.fresh()
        if fresh is not None and fresh != self._link:
            self._link = fresh
            return
        await self._means.disk.do(self._part.discard)
        raise ResultExpired(
            f"{self.order.words} cannot be had any more: {why}, and the service gives no other link. "
            f"{await self.order.lives_until()}",
            task_ids=(self.order.task_id,),
        )
