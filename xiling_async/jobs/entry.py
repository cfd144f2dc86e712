"""What a client holds in memory of one job: its newest record, who waits for it, and what is not written yet.

Results that the store could not write are held, used, and written again until they are in.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Final

from attrs import define, evolve, field

from xiling_async._internal.clock import Clock
from xiling_async.errors import ClientClosed, StoreError, XilingError
from xiling_async.models.lifecycle import (
    Accepted,
    AnswerLost,
    Change,
    Event,
    OutcomeReported,
    PollScheduled,
    Refused,
    Verdict,
    decide,
)
from xiling_async.models.record import LEFT_BEHIND, NOT_BOUGHT, JobRecord, State
from xiling_async.stores.base import Store

log = logging.getLogger("xiling_async.jobs.registry")

FIRST_PAUSE_S: Final = 0.2  # before what could not be written is tried again; doubled from try to try
LONGEST_PAUSE_S: Final = 30.0
SHOWN: Final = 20  # ids of one answer in a line of the log

Predicate = Callable[[JobRecord], bool]


class JobEntry:
    """The newest known record of a job, and who waits for it to change.

    A record read from the store may be old by the time its entry exists: `is_current` says that no change was missed.
    """

    __slots__ = ("__weakref__", "_waiters", "closed", "is_current", "polling_error", "record")

    def __init__(self, record: JobRecord, *, is_current: bool) -> None:
        self.record = record
        self.is_current = is_current
        self.closed = False
        self.polling_error: XilingError | None = None  # of the last status GET
        self._waiters: list[tuple[Predicate, asyncio.Future[None]]] = []

    def update(self, record: JobRecord) -> None:
        """Take a newer record and wake those it satisfies; drop an older one (commits can overtake each other)."""
        if record.version > self.record.version:
            self.replace(record)

    def replace(self, record: JobRecord) -> None:
        """Take this record whatever its version is, and wake those it satisfies. One that came back to the store by its
        token alone keeps the key and the request that are known here."""
        if record.request is None and self.record.request is not None:
            record = evolve(record, key=self.record.key, request=self.record.request)
        self.record = record
        self.is_current = True
        for predicate, waiter in self._waiters:
            if not waiter.done() and predicate(record):
                waiter.set_result(None)

    def restart(self, record: JobRecord) -> None:
        """This is the job, as it was read from the store: changes since then may have been missed."""
        self.record = record
        self.is_current = False

    async def changed(self, predicate: Predicate) -> JobRecord:
        """The record once it satisfies the predicate, or as it is when the entry is closed.

        Each waiter has a future of its own: a cancelled one harms no other.
        """
        while not predicate(self.record) and not self.closed:
            waiter = predicate, asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            try:
                await waiter[1]
            finally:
                self._waiters.remove(waiter)
        return self.record

    def close(self) -> None:
        """Nothing will change here any more: wake everybody."""
        self.closed = True
        for _, waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)


class JobsInHand:
    """The jobs that submits of this client are buying now, also while they pause between two POSTs."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._counts

    @property
    def ids(self) -> frozenset[str]:
        return frozenset(self._counts)

    def hold(self, job_id: str) -> None:
        self._counts[job_id] = self._counts.get(job_id, 0) + 1

    def release(self, job_id: str) -> None:
        """As often as it was held."""
        count = self._counts.pop(job_id) - 1
        if count:
            self._counts[job_id] = count


def closed_error(record: JobRecord) -> ClientClosed:
    return ClientClosed(
        "The client was closed while this job was awaited. The job goes on at the service, and stays in the "
        "store: a new client with the same store finds it (recover, find).",
        charged="yes" if record.task_ids else "maybe", job_id=record.id, task_ids=record.task_ids,
    )  # fmt: skip


@define(eq=False)
class UnwrittenJob:
    """Events of one job that the store could not write, in order; the entry's record has them already.

    `base`: the record as the store holds it, as far as is known.
    """

    entry: JobEntry
    base: JobRecord
    events: list[Event] = field(factory=list)
    gave_way: list[Change] = field(factory=list)  # of the jobs that gave tasks up to this one when it was written
    lock: asyncio.Lock = field(factory=asyncio.Lock)
    awake: asyncio.Event = field(factory=asyncio.Event)  # it is written, or no longer waited for

    def hold(self, event: Event) -> Change:
        """Apply the event in memory, and keep it to be written. When to ask next is not worth writing late."""
        change = decide(self.entry.record, event)
        if change.verdict is Verdict.APPLIED and change.record is not None:
            if not isinstance(event, PollScheduled):
                self.events.append(event)
            self.entry.replace(change.record)
        return change

    def rebase(self, record: JobRecord) -> None:
        """The store holds this record by now: apply the events to it."""
        self.base = record
        for event in self.events:
            record = decide(record, event).record or record
        self.entry.replace(record)

    def lease(self, now: float, lease_s: float) -> JobRecord | None:
        """The record if it is due, which it is then again only after the lease."""
        record = self.entry.record
        if record.due_at is None or record.due_at > now:
            return None
        self.entry.replace(record.next_version(due_at=now + lease_s))
        return self.entry.record


class UnwrittenJobs:
    """The jobs of which the store could not write something. To record a result is itself work: it is held, used, and
    tried again until it is written."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.jobs: dict[str, UnwrittenJob] = {}  # by job id

    def named(self, name: str) -> JobEntry | None:
        """The one with this key, job id or task id."""
        for job in self.jobs.values():
            record = job.entry.record
            if name in (record.key, record.id, *record.task_ids):
                return job.entry
        return None

    def hold(self, entry: JobEntry, event: Event) -> Change:
        """Apply the event in memory, and keep it to be written."""
        job = self.jobs.get(entry.record.id) or UnwrittenJob(entry, entry.record)
        change = job.hold(event)
        if job.events:
            self.jobs[entry.record.id] = job
        return change

    def behind(self, entry: JobEntry, base: JobRecord) -> UnwrittenJob:
        """The store has lost changes of this job, and holds `base`: what is known here is to be written again."""
        job = self.jobs[base.id] = UnwrittenJob(entry, base, events_behind(entry.record))
        return job

    async def write(self, job: UnwrittenJob) -> None:
        """Write what is held of one job. Raises what the store raises; what was written by then stays written."""
        job_id, record, is_added = job.entry.record.id, job.base, False
        async with job.lock:
            while job.events:
                event = job.events[0]
                change = await self._store.change(job_id, event)
                if change.verdict is Verdict.NO_JOB and not is_added:
                    is_added = True
                    await self._store.add(job.base)
                    continue
                job.events.pop(0)
                job.gave_way.extend(change.others)
                if isinstance(event, Accepted):
                    check_ids(job.base, event, change)
                    if change.verdict is Verdict.UNKNOWN_TASK:
                        job.events.insert(0, _in_doubt(event))
                record = change.record or record
            if self.jobs.pop(job_id, None) is not None:
                job.entry.replace(record)
                job.awake.set()

    async def is_written(self, job_id: str, clock: Clock, *, limit_s: float) -> bool:
        """Whether all that is known of the job is written, after at most `limit_s` seconds; at once when closing."""
        job = self.jobs.get(job_id)
        if job is not None:
            with contextlib.suppress(TimeoutError):
                async with clock.timeout(limit_s):
                    await job.awake.wait()
        return job_id not in self.jobs

    def release_waiters(self) -> None:
        for job in tuple(self.jobs.values()):
            job.awake.set()

    async def written(self, clock: Clock) -> AsyncIterator[UnwrittenJob]:
        """Write all that is held, trying again until nothing is left; gives each job that is in the store again."""
        pause_s = FIRST_PAUSE_S
        while self.jobs:
            await clock.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            for job in tuple(self.jobs.values()):
                try:
                    await self.write(job)
                except StoreError:
                    break  # away for all of them
                except Exception:
                    log.exception("job %s: a result could not be written; trying again", job.entry.record.id)
                else:
                    pause_s = FIRST_PAUSE_S
                    yield job

    async def claim(self, now: float, *, limit: int, lease_s: float) -> list[JobRecord]:
        """As `Store.claim`, with the jobs that the store does not know as they are."""
        leased = [record for job in self.jobs.values() if (record := job.lease(now, lease_s)) is not None]
        try:
            claimed = await self._store.claim(now, limit=limit, lease_s=lease_s)
        except StoreError:
            if leased:
                return leased
            raise
        return leased + [record for record in claimed if record.id not in self.jobs]

    async def next_due(self) -> float | None:
        """As `Store.next_due`, with the jobs that the store does not know as they are."""
        stored = await self._store.next_due()
        times = [stored, *(job.entry.record.due_at for job in self.jobs.values())]
        return min((due_at for due_at in times if due_at is not None), default=None)


def due_now(record: JobRecord, now: float) -> JobRecord:
    """The record to write for a job that the store has lost: due at once, since its callbacks may be lost too."""
    return record.next_version(due_at=now) if record.state is State.ACCEPTED else record


def events_behind(record: JobRecord) -> list[Event]:
    """The events that bring the row of a store that has lost its last changes to what this record knows. The job is due
    at once: its callbacks may be among what was lost."""
    events: list[Event] = []
    at, attempt = record.changed_at, record.attempt
    if record.task_ids:
        if record.confirmed_ids:
            events.append(Accepted(attempt=attempt, at=at, task_ids=record.confirmed_ids, due_at=at))
        for task_id, outcome in zip(record.task_ids, record.outcomes, strict=True):
            if outcome is not None or task_id not in record.confirmed_ids:
                events.append(
                    OutcomeReported(attempt=attempt, at=at, task_id=task_id, outcome=outcome, due_at=at, is_status=True)
                )
    elif record.refusal is not None and record.state is State.UNCERTAIN:
        events.append(AnswerLost(attempt=attempt, at=at, refusal=record.refusal, due_at=record.due_at))
    elif record.refusal is not None and record.state in NOT_BOUGHT:
        is_sent = record.state is State.REJECTED
        events.append(Refused(attempt=attempt, at=at, refusal=record.refusal, sent=is_sent))
    return events


def has_lost(known: JobRecord, record: JobRecord) -> bool:
    """Whether the store's record may lack what is known of the job: it is older, or came back by its token alone."""
    if record.version > known.version and record.is_adopted <= known.is_adopted:
        return False
    return any(getattr(known, name) != getattr(record, name) for name in ("state", "attempt", "task_ids", "outcomes"))


def _in_doubt(event: Accepted) -> AnswerLost:
    why = evolve(LEFT_BEHIND, message="The service answered with task ids that belong to another job.")
    return AnswerLost(attempt=event.attempt, at=event.at, refusal=why, due_at=event.due_at)


def check_ids(before: JobRecord, event: Accepted, change: Change) -> None:
    """No paid id goes without a trace: those that could not be kept, or take the place of others, are logged."""
    kept = frozenset(change.record.task_ids if change.record else ())
    if lost := [task_id for task_id in event.task_ids if task_id not in kept]:
        log.error(
            "job %s: the service's answer named tasks %s, which could not be kept as its own (%s): keep the ids",
            before.id, ", ".join(lost[:SHOWN]), change.verdict.value,
        )  # fmt: skip
    if unknown := [task_id for task_id in before.task_ids if task_id not in kept]:
        log.error(
            "job %s: a callback named tasks %s before the service's answer, which names %s: the answer counts",
            before.id, ", ".join(unknown), ", ".join(event.task_ids[:SHOWN]),
        )  # fmt: skip


def log_given_up(record: JobRecord, owner: JobRecord) -> None:
    """A callback had given tasks to `owner` that are those of `record` by the service's answer."""
    log.error(
        "job %s: a callback named tasks for it that the service's answer gives to job %s (%s): they were taken from "
        "it, and it is %s now. Has its callback URL become known to others?",
        owner.id, record.id, ", ".join(record.task_ids[:SHOWN]), owner.state.value,
    )  # fmt: skip


def lost_at_close(records: Iterable[JobRecord]) -> str:
    """What the log says of jobs whose results could not be written to the end."""
    jobs = [f"{record.id} (tasks {', '.join(record.task_ids) or 'not known'})" for record in records]
    return (
        f"{len(jobs)} jobs could not be written down before the client was closed. The next client of this store takes "
        f"them for uncertain; keep their ids, client.resolve() tells it what they bought: {'; '.join(jobs)}"
    )
