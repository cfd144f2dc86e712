"""One seed of a virtual world: clients put together of their parts, their users, and what must hold at the end."""

from __future__ import annotations

import asyncio
import functools
import logging
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Final

import attrs
from support import model_v
from virtual import EPOCH, LoopClock, Met, Sale, SeededLoop, Service, SlowStore

from xiling_async import (
    Failed,
    ImageToVideo,
    Job,
    Limits,
    NotSent,
    Polling,
    Request,
    ResultExpired,
    ServiceError,
    State,
    StoreError,
    SubmitUncertain,
    Succeeded,
    TaskFailed,
    Timeouts,
    Video,
    WaitTimeout,
    WebhookReceiver,
    XilingError,
)
from xiling_async.api.calls import Calls
from xiling_async.api.failures import error_of
from xiling_async.jobs.callbacks import CallbackApplier
from xiling_async.jobs.consumer import Consumers
from xiling_async.jobs.exchange import Exchange, Order
from xiling_async.jobs.job import JobContext
from xiling_async.jobs.poller import Poller, PollSchedule
from xiling_async.jobs.registry import Registry
from xiling_async.jobs.submission import Submission
from xiling_async.media.uploads import Uploads
from xiling_async.models.record import JobRecord
from xiling_async.telemetry.stats import UNWATCHED
from xiling_async.webhooks.tokens import TokenSigner

PUBLIC_URL: Final = "https://media.example.com/xiling"
SECRET: Final = b"thirty-two bytes of webhook key."
_NOT_BOUGHT: Final = (Met.REFUSED, Met.NEVER_ARRIVED)
LIMIT_S: Final = 10 * 24 * 3600.0  # whatever is not at its end by then never ends
LATE_S: Final = 150.0  # how much later than it was due a job may be looked at: closed gates, slow stores


class House:
    """The parts of a client, put together as its engine does, over a store that outlives it."""

    def __init__(
        self,
        rng: random.Random,
        clock: LoopClock,
        service: Service,
        store: SlowStore,
        *,
        has_receiver: bool,
        timeouts: Timeouts,
        calls: type[Calls],
    ) -> None:
        self.clock, self.service, self.store = clock, service, store
        self.receiver = WebhookReceiver(PUBLIC_URL, secret=SECRET) if has_receiver else None
        limits = Limits(submits=rng.choice((1, 2, 64)))
        schedule = PollSchedule(clock, Polling(), rng, has_receiver=has_receiver)
        api = calls(service, "key", clock=clock, limits=limits, rng=rng)
        self.registry = registry = Registry(store, clock=clock)
        self.poller = Poller(schedule, store=store, registry=registry, calls=api, limits=limits)
        registry.observers = [self.poller]
        consumers = Consumers(registry, store=store, clock=clock, monitor=UNWATCHED)
        self.job_context = JobContext(
            registry=registry, clock=clock, timeouts=timeouts, poller=self.poller, consumers=consumers
        )
        self.uploads = Uploads(api, clock)
        exchange = Exchange(schedule, registry=registry, calls=api, receiver=self.receiver, timeouts=timeouts)
        self.submission = Submission(exchange, registry=registry, calls=api, uploads=self.uploads, limits=limits)
        self._callbacks = CallbackApplier(registry=registry, schedule=schedule, only_wakes=False)

    async def open(self) -> None:
        self.store.opened_at = self.clock.time()
        await self.store.recover_orphans(self.clock.time(), doubt_s=self.job_context.timeouts.uncertain, per_second=20)
        if self.receiver is not None:
            await self.receiver.start(self._callbacks, self.clock, SECRET)
        self.service.receiver = self.receiver
        self.poller.start()

    async def close(self) -> None:
        await self.uploads.close()
        await self.submission.close()
        await self.poller.close()
        self.service.receiver = None
        if self.receiver is not None:
            await self.receiver.stop()
        await self.registry.close()

    async def submit(self, request: Request[Video], key: str | None) -> Job[Video]:
        """As `Client.submit`."""
        purchase = await self.submission.submit(Order(request=request, key=key))
        job: Job[Video] = Job(purchase.entry, self.job_context)
        if job.state in (State.UNCERTAIN, State.UNKNOWN) and self.receiver is None:
            error = error_of(purchase.entry.record, job=job)
            assert error is not None
            raise error
        return job


_request = functools.cache(lambda prompt, count: model_v(prompt, count=count))


# --- the users --------------------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class User:
    """One caller: what it wanted, what it got."""

    name: str
    key: str | None
    count: int
    timeout_s: float
    cancelled: bool = False  # by us
    got: tuple[Succeeded[Video] | Failed, ...] | BaseException | None = None
    waited_s: float = 0.0


class World:
    """One seed: a service, a store, one or two clients one after the other, and their users."""

    def __init__(self, seed: int, loop: SeededLoop, rng: random.Random, calls: type[Calls]) -> None:
        self.rng = rng
        self.clock = LoopClock(loop)
        self.timeouts = Timeouts(uncertain=rng.choice((0.1, 1, 100, 3600)))
        self.service = Service(rng, self.timeouts.uncertain)
        self.store = SlowStore(rng, is_sick=seed % 5 == 4)
        self.has_receiver = rng.random() < 0.8
        self.calls = calls
        self.users: list[User] = []
        self.names: dict[str, tuple[str | None, int]] = {}
        self.found: list[str] = []

    async def run(self) -> None:
        rng = self.rng
        for number in range(rng.randrange(1, 4)):
            name = f"job {number}"
            self.names[name] = (name if rng.random() < 0.8 else None, rng.choice((1, 1, 2, 3)))
        is_closed_early = rng.random() < 0.3
        await self._client(closes_after_s=rng.choice((0.0, 1.0, 60.0, 400.0)) if is_closed_early else None)
        if is_closed_early:
            await self._client(closes_after_s=None)
        await self.service.close()

    async def _client(self, *, closes_after_s: float | None) -> None:
        """A client with its users, until all of them have gone; or until it is closed."""
        is_first = not self.users
        house = House(
            self.rng,
            self.clock,
            self.service,
            self.store,
            has_receiver=self.has_receiver,
            timeouts=self.timeouts,
            calls=self.calls,
        )
        await house.open()
        tasks = [asyncio.ensure_future(work) for work in self._callers(house, is_first=is_first)]
        if closes_after_s is not None:
            await asyncio.sleep(closes_after_s * self.rng.random())
            await house.close()
            await asyncio.gather(*tasks)
        else:
            await asyncio.gather(*tasks)
            await house.close()

    def _callers(self, house: House, *, is_first: bool) -> Iterator[Any]:
        rng = self.rng
        for name, (key, count) in self.names.items():
            if key is None and not is_first:
                continue  # it cannot be submitted again; `recover` would find it
            for _ in range(rng.choice((1, 1, 1, 2, 3)) if key else 1):
                user = User(name, key, count, rng.choice((5.0, 700.0, 1800.0, float("inf"), float("inf"))))
                self.users.append(user)
                yield self._use(house, user)
        if rng.random() < 0.3:
            yield self._refresh(house)

    async def _use(self, house: House, user: User) -> None:
        await asyncio.sleep(self.rng.choice((0.0, 0.0, 1.0, 300.0)) * self.rng.random())
        work = asyncio.ensure_future(self._submit_and_await(house, user))
        if self.rng.random() < 0.2:
            await asyncio.sleep(self.rng.choice((0.0, 1.0, 300.0)) * self.rng.random())
            user.cancelled = work.cancel()
        await asyncio.wait([work])
        user.got = asyncio.CancelledError() if work.cancelled() else work.exception() or work.result()

    async def _submit_and_await(self, house: House, user: User) -> tuple[Succeeded[Video] | Failed, ...]:
        job = await house.submit(_request(user.name, user.count), user.key)
        began = self.clock.time()
        try:
            return await job.outcomes(user.timeout_s)
        finally:
            user.waited_s = self.clock.time() - began

    async def _refresh(self, house: House) -> None:
        """Somebody who looks at what is unfinished, and goes away in the middle of it."""
        await asyncio.sleep(self.rng.random() * 200)
        async for record in house.store.unfinished():
            job: Job[Any] = Job(house.registry.entry_of(record), house.job_context)
            work = asyncio.ensure_future(job.refresh())
            await asyncio.wait([work], timeout=self.rng.choice((0.0, 0.1, 100.0)))
            work.cancel()
            await asyncio.wait([work])

    # --- what must hold

    def violations(self) -> Iterator[str]:
        yield from self._of_the_ledger()
        for record in self.store.records:
            yield from self._of_a_record(record)
        for record in self.store.given_up:
            age_s = record.changed_at - record.created_at
            if record.state is State.EXPIRED and age_s < ImageToVideo.kind.longest_s:
                yield f"given up after {age_s} s: {record}"
        if self.store.lateness_s > LATE_S and not self.store.is_sick:
            yield f"a job was looked at {self.store.lateness_s:.0f} s after it was due"
        for user in self.users:
            for violation in self._of_a_user(user):
                yield f"{user}: {violation}"

    def _of_the_ledger(self) -> Iterator[str]:
        sales, service = self.service.sales, self.service
        for token, count in Counter(sale.token for sale in sales if sale.token).items():
            if count > 1:
                yield f"{count} POSTs of one attempt: {token}"
        for name in self.names:
            mine = [sale for sale in sales if sale.job == name]
            if sum(sale.met is Met.PAID for sale in mine) > 1:
                yield f"{name} was paid more than once: {mine}"
            if any(sale.met in (Met.PAID, Met.IN_VAIN) for sale in mine[:-1]):
                yield f"{name} was sent again after an ambiguous POST: {mine}"
        if set(service.forgeries) - {404, 503}:
            yield f"a forged callback was answered {service.forgeries}"
        by_id = {record.id: record for record in self.store.records}
        verify = TokenSigner((SECRET,), PUBLIC_URL).verify
        for sale in sales:
            if sale.met is Met.PAID:
                signed = verify(sale.token, EPOCH)
                held = [by_id.get(signed.job_id)] if signed else self._by_name(sale.job)
                yield from self._of_a_sale(sale, held[0] if held else None)

    def _by_name(self, name: str) -> list[JobRecord]:
        return [record for record in self.store.records if record.request and record.request.fields()["prompt"] == name]

    def _of_a_sale(self, sale: Sale, record: JobRecord | None) -> Iterator[str]:
        if record is None:
            yield f"nobody knows of {sale}"
            return
        if record.state in (State.NOT_SENT, State.REJECTED):
            yield f"{sale} is thought to be {record.state}"
        if record.state is State.SENDING and not self.store.is_sick:
            yield f"{sale} is thought to be on its way for ever"
        if not record.task_ids and record.state not in (State.UNCERTAIN, State.UNKNOWN, State.SENDING):
            yield f"{sale} is {record.state} without ids"
        if sale.is_told and not self.store.is_sick and set(record.task_ids) != set(sale.task_ids):
            yield f"{sale}: its ids were told, and {record.task_ids} are known"
        known = {task_id for task_id, outcome in zip(record.task_ids, record.outcomes, strict=True) if outcome}
        if forgotten := (self.service.acknowledged & set(sale.task_ids)) - known:
            yield f"callbacks were taken and forgotten: {forgotten}"

    def _of_a_record(self, record: JobRecord) -> Iterator[str]:
        for task_id, outcome in zip(record.task_ids, record.outcomes, strict=True):
            if record.request is None or self.service.job_of[task_id] != record.request.fields()["prompt"]:
                yield f"{task_id} is with the wrong job: {record}"
            if outcome is not None and self._is_wrong(task_id, outcome):
                yield f"{task_id} is {self.service.status[task_id]}, not {outcome}"

    def _is_wrong(self, task_id: str, outcome: Succeeded[Video] | Failed) -> bool:
        if isinstance(outcome, Failed):
            return outcome.task_id != task_id or self.service.status[task_id] != "FAILED"
        video = outcome.result
        is_own = {outcome.task_id, video.task_id} == {task_id} and video.video_url.endswith(f"/{task_id}.mp4")
        return not is_own or self.service.status[task_id] != "SUCCEEDED"

    def _of_a_user(self, user: User) -> Iterator[str]:
        got, paid = user.got, self.service.paid(user.name)
        match got:
            case tuple():
                if not paid or {outcome.task_id for outcome in got} != set(paid[0].task_ids):
                    yield "got the outcomes of something else"
                if any(self._is_wrong(outcome.task_id, outcome) for outcome in got):
                    yield "got a wrong outcome"
            case asyncio.CancelledError():
                if not user.cancelled:
                    yield "was cancelled by nobody"
            case WaitTimeout():
                if user.waited_s < user.timeout_s - 1e-3:
                    yield f"timed out after {user.waited_s} s"
            case ResultExpired() | TaskFailed():
                if not paid:
                    yield "nothing was paid"
            case SubmitUncertain():
                if not self.store.is_sick and not self._is_in_doubt(user.name):
                    yield "it never left"
            case NotSent() | ServiceError():
                refused = [sale for sale in self.service.sales if sale.job == user.name and sale.met in _NOT_BOUGHT]
                if got.charged != "no" or not refused or (paid and user.key is None):
                    yield "it was paid"
            case StoreError():
                if not self.store.is_sick:
                    yield "the store is fine"
            case XilingError():
                pass
            case _:
                yield f"not a typed error: {got!r}"

    def _is_in_doubt(self, name: str) -> bool:
        return any(sale.met in (Met.PAID, Met.IN_VAIN) for sale in self.service.sales if sale.job == name)


def judged(seed: int, calls: type[Calls] = Calls) -> World:
    """Play this seed to its end; `found` are its violations."""
    rng = random.Random(seed)
    loop = SeededLoop(rng, limit_s=LIMIT_S)
    world = World(seed, loop, rng, calls)
    try:
        loop.play(world.run())
    except BaseException as error:
        raise AssertionError(f"seed {seed}: {error!r}") from error
    world.found = list(world.violations())
    return world


@attrs.define(kw_only=True)
class Tally:
    """What many seeds came to."""

    seeds: int = 0
    paid: int = 0
    ends: Counter[str] = attrs.field(factory=Counter)
    found: list[str] = attrs.field(factory=list)

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            seeds=self.seeds + other.seeds,
            paid=self.paid + other.paid,
            ends=self.ends + other.ends,
            found=self.found + other.found,
        )


def tally(seeds: Sequence[int], calls: type[Calls] = Calls) -> Tally:
    """Play all of these; ends with the first that violates anything."""
    total = Tally()
    logging.disable()  # thousands of warnings that nobody reads would take a third of the time
    try:
        for seed in seeds:
            world = judged(seed, calls)
            total.seeds += 1
            total.paid += sum(sale.met is Met.PAID for sale in world.service.sales)
            total.ends.update(type(user.got).__name__ for user in world.users)
            total.found += [f"seed {seed}: {violation}" for violation in world.found]
    finally:
        logging.disable(logging.NOTSET)
    return total
