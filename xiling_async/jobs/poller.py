"""Asks about overdue tasks; the same code recovers after a restart.

One loop for all jobs: the store says which are due, the poller asks the service, and what it is told goes the way of a
callback: `OutcomeReported`, committed before anyone is woken. Without a receiver it is the way to wait.
"""

from __future__ import annotations

import asyncio
import logging
from random import Random
from typing import Any, Final, Literal

from xiling_async._internal.clock import Clock
from xiling_async._internal.tasks import Tasks
from xiling_async.api import backoff
from xiling_async.api.calls import Calls
from xiling_async.api.results import StatusResult
from xiling_async.errors import StoreError, Unauthorized
from xiling_async.jobs.entry import JobEntry
from xiling_async.jobs.registry import Registry
from xiling_async.kinds import BY_NAME
from xiling_async.models.lifecycle import Abandoned, OutcomeReported, PollScheduled, Verdict
from xiling_async.models.record import JobRecord, Outcome, State, Succeeded
from xiling_async.models.request import Kind
from xiling_async.models.settings import Limits, Polling
from xiling_async.stores.base import Store
from xiling_async.telemetry.events import Polled
from xiling_async.telemetry.stats import UNWATCHED, Monitor

log = logging.getLogger("xiling_async.jobs.poller")

BATCH: Final = 64
LEASE_S: Final = 120.0  # longer than one ask can take; a poller that dies in between delays its jobs so long
STORE_PAUSE_S: Final = 5.0
LOOK_S: Final = 10.0  # how often one looks into a store that others use too: one of them may have died with its jobs
NO_CALLBACKS_WARNING: Final = 3  # jobs in a row that only polling finished although a receiver is configured
LAST_ASK_S: Final = 3600.0  # results are asked for once more when so little of their 7 days is left


class PollSchedule:
    """When to ask about a job, and whether callbacks arrive; no I/O.

    `has_receiver`: callbacks are to be expected, so they are trusted for a while before the first GET.
    """

    def __init__(self, clock: Clock, polling: Polling, rng: Random, *, has_receiver: bool) -> None:
        self.clock = clock
        self._polling = polling
        self._random = rng.random
        self._has_receiver = has_receiver
        self._polled_ends = 0  # jobs in a row that only polling finished
        self._called_back_at = float("-inf")

    def first_due(self, kind: Kind[Any]) -> float:
        """When to look at a job that is accepted now."""
        every_s = self._every_s(kind)
        return self.clock.time() + backoff.first_ask_s(
            every_s, self._polling.grace, self._random, has_receiver=self._has_receiver
        )

    def next_due(self, record: JobRecord, kind: Kind[Any], now: float, *, failed: bool) -> float:
        """When to ask again about a job that has open tasks; once more before its results expire."""
        age_s, every_s = now - record.created_at, self._every_s(kind)
        failures = record.failed_asks + 1 if failed else 0
        pause_s = backoff.next_ask_s(every_s, age_s, kind.longest_s / 3, failures, self._random)
        last_ask_in_s = kind.result_ttl_s - LAST_ASK_S - age_s
        return now + min(pause_s, max(last_ask_in_s, every_s))

    def callback_arrived(self) -> None:
        self._polled_ends = 0
        self._called_back_at = self.clock.time()

    def polled_to_its_end(self, record: JobRecord) -> None:
        """No callback finished this job: a few of them in a row are worth a warning."""
        if record.created_at <= self._called_back_at:
            return  # callbacks arrived during its life: its own may have been the one that made us ask
        self._polled_ends += 1
        if self._has_receiver and self._polled_ends == NO_CALLBACKS_WARNING:
            log.warning(
                "%d jobs in a row were finished by polling, although a receiver is configured: do callbacks reach it? "
                "Is its public URL right, reachable from the internet, and does it answer without a redirect?",
                self._polled_ends,
            )

    def _every_s(self, kind: Kind[Any]) -> float:
        return kind.poll_every_s if self._polling.every is None else self._polling.every


class Poller:
    """Asks the service about the jobs that are due."""

    def __init__(
        self,
        schedule: PollSchedule,
        *,
        store: Store,
        registry: Registry,
        calls: Calls,
        limits: Limits,
        monitor: Monitor = UNWATCHED,
    ) -> None:
        self._schedule = schedule
        self._clock = schedule.clock
        self._store = store
        self._registry = registry
        self._calls = calls
        self._monitor = monitor
        self._tasks = Tasks()
        self._awake = asyncio.Event()
        self._sleeps_until = 0.0
        self._asks = asyncio.Semaphore(BATCH)
        # No job may fall due again while it waits for its turn: a batch has to fit into its lease.
        self._batch = max(1, min(BATCH, int(limits.gets_per_second * LEASE_S / 8)))
        self._is_unauthorized = False
        self._asked_in_vain: dict[str, None] = {}  # jobs, in the outage
        self._began_at = 0.0
        self._old_since: dict[str, float] = {}  # jobs that were made before `_began_at`

    def start(self) -> None:
        self._began_at = self._clock.time()
        self._tasks.start(self._run(), name="xiling poller")

    async def close(self) -> None:
        await self._tasks.cancel()

    def changed(self, record: JobRecord) -> None:
        """A record has changed: if it falls due before the poller would wake, wake it."""
        if record.state.is_final:
            self._old_since.pop(record.id, None)
        if record.due_at is not None and record.due_at < self._sleeps_until:
            self._awake.set()

    async def ask(self, entry: JobEntry) -> None:
        """Ask now about each task of the job that has no outcome. Raises what went wrong for the last of them."""
        results = [await self._ask_one(entry.record, task_id) for task_id in _open_tasks(entry.record)]
        errors = [result.error for result in results if result.error is not None]
        if errors:
            raise errors[-1]

    async def outcome(self, kind: Kind[Any], task_id: str) -> Outcome | None:
        """What the service says of a task now: for new links to a result that is settled already, so nothing is
        written down. None: it does not know the task, or works on it. Raises what went wrong."""
        result = await self._get(kind, task_id)
        if result.error is not None and not result.is_missing:
            raise result.error
        return result.outcome

    async def ended_at(self, task_id: str) -> float | None:
        """When the result of this task was known, as far as the store knows."""
        record = await self._store.by_task(task_id)
        return record.changed_at if record is not None and record.state.is_final else None

    # --- the loop ------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            try:
                await self._calls.gets.reachable()  # while the service is away, one job at a time is a probe
                is_away = self._calls.gets.probe_at is not None
                if not is_away:
                    await self._ask_again()
                limit = 1 if is_away else self._batch
                due = await self._registry.claim(self._clock.time(), limit=limit, lease_s=LEASE_S)
                for record in due:
                    await self._asks.acquire()
                    ask = self._tasks.start(self._look_at(record), name=f"xiling ask {record.id}")
                    ask.add_done_callback(lambda _: self._asks.release())
                    if is_away:
                        await asyncio.wait({ask})
                if not due:
                    self._awake.clear()
                    self._sleeps_until = float("inf")  # what changes while the store is asked is not missed
                    await self._sleep_until(self._look_by(await self._registry.next_due()))
            except StoreError as error:
                log.warning("the store cannot be read, trying again in %g s: %s", STORE_PAUSE_S, error)
                await self._clock.sleep(STORE_PAUSE_S)
            except Exception:
                log.exception("the store cannot be read, trying again in %g s", STORE_PAUSE_S)
                await self._clock.sleep(STORE_PAUSE_S)

    async def _ask_again(self) -> None:
        """The outage is over: those that were asked about in vain need not wait for their next turn."""
        asked_in_vain, self._asked_in_vain = self._asked_in_vain, {}
        now = self._clock.time()
        for job_id in asked_in_vain:
            await self._registry.apply(job_id, PollScheduled(at=now, due_at=now))

    def _look_by(self, due_at: float | None) -> float | None:
        look_at = self._clock.time() + LOOK_S if self._store.is_shared else None
        return look_at if due_at is None else min(due_at, look_at or due_at)

    async def _sleep_until(self, due_at: float | None) -> None:
        self._sleeps_until = float("inf") if due_at is None else due_at
        timer = None if due_at is None else self._clock.call_later(due_at - self._clock.time(), self._awake.set)
        try:
            await self._awake.wait()
        finally:
            self._sleeps_until = 0.0
            if timer is not None:
                timer.cancel()

    async def _look_at(self, record: JobRecord) -> None:
        try:
            await self._advance(record)
        except StoreError as error:
            log.warning("job %s: the store could not write what a status GET told: %s", record.id, error)
        except Exception:
            log.exception("job %s: could not be asked about; the next try comes in %g s", record.id, LEASE_S)

    async def _advance(self, record: JobRecord) -> None:
        if record.state is State.UNCERTAIN:
            abandoned = Abandoned(at=self._clock.time(), was=record.state)
            if (await self._registry.apply(record.id, abandoned)).verdict is Verdict.APPLIED:
                log.warning("job %s: no callback adopted it in time; its fate stays unknown", record.id)
            return
        kind = BY_NAME.get(record.kind)
        if kind is None:
            log.warning("job %s is of kind %s, which this version does not know", record.id, record.kind)
            return
        results = [await self._ask_one(record, task_id, can_wait=True) for task_id in _open_tasks(record)]
        for error in (result.error for result in results if result.error is not None):
            log.info("job %s: a status GET failed: %s", record.id, error)
        open_still = [result for result in results if result.outcome is None]
        if results and not open_still and len(record.task_ids) >= record.asked:
            self._schedule.polled_to_its_end(record)
            return
        probe_at = self._calls.gets.probe_at
        if probe_at is not None and any(not result.is_asked for result in open_still):
            await self._registry.apply(record.id, PollScheduled(at=self._clock.time(), due_at=probe_at))
            return
        await self._ask_later(record, kind, open_still)

    async def _ask_later(self, record: JobRecord, kind: Kind[Any], open_still: list[StatusResult]) -> None:
        now = self._clock.time()
        age_s = now - record.created_at
        is_missing = all(result.is_missing for result in open_still)  # also when there is nothing left to ask about
        is_old = age_s > kind.result_ttl_s - LAST_ASK_S
        is_given_up = is_old or (is_missing and age_s > kind.longest_s and not record.is_adopted)
        if is_given_up and self._is_old_by_this_clock(record, now, kind):
            if (await self._registry.apply(record.id, Abandoned(at=now, was=record.state))).verdict is Verdict.APPLIED:
                log.warning("job %s: given up after %.0f s; a callback still wins", record.id, age_s)
            return
        failed = any(result.error is not None for result in open_still)
        due_at = self._schedule.next_due(record, kind, now, failed=failed)
        await self._registry.apply(record.id, PollScheduled(at=now, due_at=due_at, failed=failed))

    def _is_old_by_this_clock(self, record: JobRecord, now: float, kind: Kind[Any]) -> bool:
        """Whether the job has been waited for since this process knows it to be old, or was made in its time. Another
        process, or this machine before a restart, may have had a wrong clock when the job was made."""
        if record.created_at >= self._began_at:
            return True
        return now - self._old_since.setdefault(record.id, now) >= kind.longest_s

    # --- one GET -------------------------------------------------------------------------------------------------

    async def _ask_one(self, record: JobRecord, task_id: str, *, can_wait: bool = False) -> StatusResult:
        """One status GET; what it tells goes the way of a callback."""
        result = await self._get(BY_NAME[record.kind], task_id, record.id, can_wait=can_wait)
        self._note_error(record.id, result)
        if result.report is not None:
            event = OutcomeReported(
                attempt=record.attempt,
                at=self._clock.time(),
                task_id=task_id,
                outcome=result.outcome,
                due_at=record.due_at,
                is_status=True,
            )
            await self._registry.apply(record.id, event)
        return result

    def _note_error(self, job_id: str, result: StatusResult) -> None:
        """Those who wait for the job are told why polling does not help; a key that does not work is said aloud."""
        self._registry.note_error(job_id, result.error)
        if isinstance(result.error, Unauthorized) and not self._is_unauthorized:
            log.warning("job %s: status GETs are refused, only callbacks can end jobs now: %s", job_id, result.error)
        if self._calls.gets.probe_at is not None and result.error is not None:
            self._asked_in_vain[job_id] = None
        else:
            self._asked_in_vain.pop(job_id, None)
        if result.is_asked:
            self._is_unauthorized = isinstance(result.error, Unauthorized)

    async def _get(
        self, kind: Kind[Any], task_id: str, job_id: str | None = None, *, can_wait: bool = False
    ) -> StatusResult:
        result = await self._calls.status(kind, task_id, can_wait=can_wait)
        if result.is_asked:
            error = None if result.error is None else type(result.error).__name__
            self._monitor.emit(Polled(
                job_id=job_id, task_id=task_id, result=_name(result), error=error, began_at=result.began_at,
                at=self._clock.time(),
            ))  # fmt: skip
        return result


def _name(result: StatusResult) -> Literal["succeeded", "failed", "running", "missing", "error"]:
    if result.error is not None:
        return "missing" if result.is_missing else "error"
    if result.outcome is None:
        return "running"
    return "succeeded" if isinstance(result.outcome, Succeeded) else "failed"


def _open_tasks(record: JobRecord) -> list[str]:
    return [task_id for task_id, outcome in zip(record.task_ids, record.outcomes, strict=True) if outcome is None]
