"""A world without sockets: a loop of virtual time and random order, and the service at the seam of the transport."""

from __future__ import annotations

import asyncio
import heapq
import json
import random
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from datetime import timedelta
from enum import Enum, auto
from typing import Any, Final, TypeVar

import aiohttp
import attrs

from xiling_async import MemoryStore, StoreError, WebhookReceiver
from xiling_async._internal.clock import Timer
from xiling_async.api.transport import Answer, Body, Transport
from xiling_async.models.lifecycle import Abandoned, Change, Event, Verdict
from xiling_async.models.record import JobRecord

T = TypeVar("T")

EPOCH: Final = 1_800_000_000.0
ANSWER_S: Final = 70.0  # what the real transport waits for a connection and an answer

SLOW_S: Final = 3.0  # what the store's slowest answers to the sweeper take


class Hang(AssertionError):
    """Nothing is left that could ever happen, or it takes for ever."""


class SeededLoop(asyncio.BaseEventLoop):
    """Ready callbacks run in an order that the dice decide; time stands still while anything is ready."""

    _ready: deque[asyncio.Handle]
    _scheduled: list[asyncio.TimerHandle]

    def __init__(self, dice: random.Random, *, limit_s: float) -> None:
        super().__init__()
        self._dice = dice
        self._now = 0.0
        self._limit_s = limit_s

    def time(self) -> float:
        return self._now

    def _run_once(self) -> None:
        timers = self._scheduled
        while timers and timers[0].cancelled():
            heapq.heappop(timers)
        if not self._ready:
            if not timers or timers[0].when() > self._limit_s:
                raise Hang(f"nothing is left to happen, after {self._now:.0f} s")
            self._now = max(self._now, timers[0].when())
        ready, self._ready = self._ready, deque()
        while timers and timers[0].when() <= self._now:
            ready.append(heapq.heappop(timers))
        if len(ready) > 1:
            self._dice.shuffle(ready)
        for handle in ready:
            if not handle._cancelled:
                handle._run()

    def play(self, work: Coroutine[Any, Any, T]) -> T:
        """Run this to its end, and see that no task is left."""
        try:
            result = self.run_until_complete(work)
            left = asyncio.all_tasks(self)
            assert not left, f"{len(left)} tasks were left over: {left}"
            return result
        finally:
            if left := asyncio.all_tasks(self):
                for task in left:
                    task.cancel()
                self.run_until_complete(asyncio.wait(left))
            self.close()


class LoopClock:
    """The loop's own time, counted from a Unix time."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def time(self) -> float:
        return EPOCH + self._loop.time()

    def call_later(self, delay_s: float, callback: Callable[[], object]) -> Timer:
        return self._loop.call_later(delay_s, callback)

    async def sleep(self, delay_s: float) -> None:
        await asyncio.sleep(delay_s)

    def timeout(self, delay_s: float) -> AbstractAsyncContextManager[object]:
        return asyncio.timeout(None if delay_s == float("inf") else delay_s)


# --- a store that takes its time --------------------------------------------------------------------------------------


class SlowStore(MemoryStore):
    """What it says may be old when it arrives; a sick one fails now and then, and then has changed nothing."""

    def __init__(self, dice: random.Random, *, is_sick: bool) -> None:
        super().__init__()
        self._dice = dice
        self.is_sick = is_sick
        self.given_up: list[JobRecord] = []
        self.opened_at = 0.0
        self.lateness_s = 0.0  # how long after it was due a job was claimed, at worst

    async def _travel(self) -> None:
        fate = self._dice.random()
        if fate < 0.2:
            await asyncio.sleep(0)
        elif fate < 0.3:
            await asyncio.sleep(fate - 0.2)

    async def _there_and_back(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        await self._travel()
        if self.is_sick and self._dice.random() < 0.04:
            raise StoreError("The disk is full.")
        found = await work()
        await self._travel()
        return found

    async def add(self, record: JobRecord) -> JobRecord:
        return await self._there_and_back(lambda: super(SlowStore, self).add(record))

    async def change(self, job_id: str, event: Event) -> Change:
        change = await self._there_and_back(lambda: super(SlowStore, self).change(job_id, event))
        if isinstance(event, Abandoned) and change.verdict is Verdict.APPLIED and change.record is not None:
            self.given_up.append(change.record)
        return change

    async def get(self, job_id: str) -> JobRecord | None:
        return await self._there_and_back(lambda: super(SlowStore, self).get(job_id))

    async def by_key(self, key: str) -> JobRecord | None:
        return await self._there_and_back(lambda: super(SlowStore, self).by_key(key))

    async def by_task(self, task_id: str) -> JobRecord | None:
        return await self._there_and_back(lambda: super(SlowStore, self).by_task(task_id))

    async def claim(self, now: float, *, limit: int, lease_s: float) -> list[JobRecord]:
        due_at = await super().next_due()
        if due_at is not None:
            self.lateness_s = max(self.lateness_s, now - max(due_at, self.opened_at))
        if self._dice.random() < 0.1:
            claimed = await super().claim(now, limit=limit, lease_s=lease_s)
            await asyncio.sleep(self._dice.random() * SLOW_S)
            return claimed
        return await self._there_and_back(lambda: super(SlowStore, self).claim(now, limit=limit, lease_s=lease_s))

    async def next_due(self) -> float | None:
        if self._dice.random() < 0.1:
            found = await super().next_due()
            await asyncio.sleep(self._dice.random() * SLOW_S)
            return found
        return await self._there_and_back(lambda: super(SlowStore, self).next_due())

    async def recover_orphans(self, now: float, *, doubt_s: float, per_second: float) -> int:
        is_sick, self.is_sick = self.is_sick, False  # a client that cannot open its store does not open
        try:
            return await super().recover_orphans(now, doubt_s=doubt_s, per_second=per_second)
        finally:
            self.is_sick = is_sick

    async def purge(self, older_than: timedelta | float, *, now: float | None = None) -> int:
        raise NotImplementedError

    @property
    def records(self) -> list[JobRecord]:
        return list(self._jobs.values())


# --- the service ------------------------------------------------------------------------------------------------------


class Met(Enum):
    """What became of a POST, as the service knows it."""

    NEVER_ARRIVED = auto()
    REFUSED = auto()  # with an answer that says so
    IN_VAIN = auto()  # read and not taken, and the client cannot know it
    PAID = auto()


@attrs.define(eq=False)
class Sale:
    """One POST. `token` is the last segment of its callback URL; `is_told`: the ids were in the answer."""

    job: str
    token: str
    met: Met
    task_ids: tuple[str, ...] = ()
    is_told: bool = False


#          how a POST goes                 paid?          weight
POSTS: Final = (
    ("answered",                           Met.PAID,          40),
    ("answered late",                      Met.PAID,          8),
    ("cut",                                Met.PAID,          8),
    ("cut",                                Met.IN_VAIN,       4),
    ("hangs",                              Met.PAID,          4),
    ("hangs",                              Met.IN_VAIN,       2),
    ("500",                                Met.PAID,          4),
    ("500",                                Met.IN_VAIN,       2),
    ("garbage",                            Met.PAID,          4),
    ("429",                                Met.REFUSED,       10),
    ("400",                                Met.REFUSED,       3),
    ("unreachable",                        Met.NEVER_ARRIVED, 8),
)  # fmt: skip


class Service(Transport):
    """The service in plain Python, in place of the transport: it has its own ledger, and calls `receiver` back."""

    def __init__(self, dice: random.Random, doubt_s: float) -> None:
        self._dice = dice
        self._doubt_s = doubt_s
        self.receiver: WebhookReceiver | None = None
        self.sales: list[Sale] = []
        self.status: dict[str, str] = {}
        self.job_of: dict[str, str] = {}
        self.acknowledged: set[str] = set()  # tasks whose end was taken with a 200
        self.told: set[str] = set()  # tasks whose end a GET told
        self.forgeries: list[int] = []  # what the receiver answered to those
        self._busy: set[asyncio.Task[None]] = set()
        self._urls: dict[str, str] = {}

    def open(self) -> None:
        pass

    async def close(self) -> None:
        for task in tuple(self._busy):
            task.cancel()
        await asyncio.gather(*self._busy, return_exceptions=True)

    def paid(self, job: str) -> list[Sale]:
        return [sale for sale in self.sales if sale.job == job and sale.met is Met.PAID]

    # --- creates

    def check(self) -> None:
        pass

    async def post(self, path: str, body: Body) -> Answer:
        fields = json.loads(body.content)
        url = fields.get("callback_url", "")
        weights = [weight for _, _, weight in POSTS]
        ((how, met, _),) = self._dice.choices(POSTS, weights)
        await self._pass(0.5)
        body.has_left = met is not Met.NEVER_ARRIVED
        sale = Sale(fields["prompt"], url.rpartition("/")[2], met)
        self.sales.append(sale)
        if met is Met.PAID:
            self._make_tasks(sale, fields.get("generate_count", 1), url)
        return await self._answer(how, sale)

    def _make_tasks(self, sale: Sale, count: int, url: str) -> None:
        sale.task_ids = tuple(f"i2v-{len(self.status) + place}" for place in range(count))
        for task_id in sale.task_ids:
            self.status[task_id] = "PENDING"
            self.job_of[task_id] = sale.job
            self._urls[task_id] = url
            self._begin(self._live(task_id))

    async def _answer(self, how: str, sale: Sale) -> Answer:
        match how:
            case "answered" | "answered late":
                await self._pass(0.5 if how == "answered" else ANSWER_S)
                sale.is_told = True
                return _json(200, {"code": 0, "msg": "ok", "data": {"task_ids": list(sale.task_ids)}})
            case "cut":
                await self._pass(1)
                raise aiohttp.ServerDisconnectedError
            case "hangs":
                await asyncio.sleep(ANSWER_S)
                raise TimeoutError
            case "500":
                return _json(500, {"code": 500, "msg": "Internal error"})
            case "garbage":
                return Answer(status=200, headers={}, body=b"<html>It works!</html>")
            case "429":
                return _json(429, {"code": 429, "msg": "Too many"}, {"Retry-After": str(self._dice.randrange(40))})
            case "400":
                return _json(400, {"code": 100001, "msg": "Parameter error"})
            case _:
                raise aiohttp.ConnectionTimeoutError("no connection in time")

    # --- status

    async def get(self, path: str) -> Answer:
        task_id = path.rpartition("/")[2]
        await self._pass(0.5)
        match self._dice.randrange(16):
            case 0:
                raise aiohttp.ServerDisconnectedError
            case 1:
                return _json(500, {"code": 500, "msg": "Internal error"})
            case 2:
                return _json(429, {"code": 429, "msg": "Too many"}, {"Retry-After": "3"})
            case 3:
                return _json(404, {"code": 100003, "msg": "Task not found"})
            case 4:
                await asyncio.sleep(ANSWER_S)
                raise TimeoutError
        state = self.status[task_id]
        if state in ("SUCCEEDED", "FAILED"):
            self.told.add(task_id)
        return _json(200, {"code": 0, "msg": "ok", "data": self._data(task_id, state)})

    def _data(self, task_id: str, state: str) -> dict[str, str]:
        done = state == "SUCCEEDED"
        return {
            "task_id": task_id,
            "status": state,
            "video_url": f"https://media.example/{task_id}.mp4" if done else "",
            "error_message": "No face" if state == "FAILED" else "",
        }

    # --- generations and callbacks

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._busy.add(task)
        task.add_done_callback(self._busy.discard)

    async def _live(self, task_id: str) -> None:
        """Early, late, out of order, twice, never: the life of a task and its callbacks."""
        dice = self._dice
        if dice.random() < 0.3:
            await self._call(task_id, "PROCESSING")
        if dice.random() < 0.1:  # just when an uncertain job is given up
            await asyncio.sleep(self._doubt_s + dice.random() * SLOW_S)
            await self._call(task_id, "PROCESSING")
        await self._pass(dice.choice((0.0, 1.0, 1.0, 100.0, 400.0)))
        if dice.random() < 0.001:
            return  # at work for ever
        self.status[task_id] = "FAILED" if dice.random() < 0.1 else "SUCCEEDED"
        if dice.random() < 0.2:
            await self._forge(task_id)
        if dice.random() < 0.3:
            return
        for _ in range(dice.choice((1, 1, 1, 2, 3))):
            await self._pass(dice.choice((0.0, 1.0, 200.0)))
            await self._call(task_id, self.status[task_id])
        if dice.random() < 0.2:
            await self._call(task_id, "PROCESSING")

    async def _call(self, task_id: str, state: str) -> None:
        if self._urls[task_id] and self.receiver is not None:
            body = {"code": 0, "msg": "ok", "task_type": "image_to_video", "data": self._data(task_id, state)}
            reply = await self.receiver.handle(self._urls[task_id], json.dumps(body).encode())
            if reply.status == 200 and state in ("SUCCEEDED", "FAILED"):
                self.acknowledged.add(task_id)

    async def _forge(self, task_id: str) -> None:
        """Somebody else, who does not know the URL, or knows another job's."""
        if self.receiver is None or not self._urls[task_id]:
            return
        body = {
            "code": 0,
            "msg": "ok",
            "data": {**self._data(task_id, "SUCCEEDED"), "video_url": "https://evil.example"},
        }
        base, _, token = self._urls[task_id].rpartition("/")
        place = self._dice.randrange(len(token))
        wrong = token[:place] + ("A" if token[place] != "A" else "B") + token[place + 1 :]
        reply = await self.receiver.handle(f"{base}/{wrong}", json.dumps(body).encode())
        self.forgeries.append(reply.status)

    async def _pass(self, most_s: float) -> None:
        if most_s and self._dice.random() < 0.7:
            await asyncio.sleep(self._dice.random() * most_s)


def _json(status: int, content: object, headers: dict[str, str] | None = None) -> Answer:
    return Answer(status=status, headers=headers or {}, body=json.dumps(content).encode())
