"""Results that the store could not write: held, used, and written again until they are in."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Final

from attrs import define, evolve, field

from xiling_async._internal.clock import Clock
from xiling_async.errors import StoreError, XilingError
from xiling_async.jobs.entry import JobEntry
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
from xiling_async.models.record import LEFT_BEHIND, JobRecord, State
from xiling_async.stores.base import Store

log = logging.getLogger("xiling_async.jobs.registry")

FIRST_PAUSE_S: Final = 0.2  # before what could not be written is tried again; doubled from try to try
LONGEST_PAUSE_S: Final = 30.0
SHOWN: Final = 20  # ids of one answer in a line of the log
Answer = Accepted | AnswerLost | Refused


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
        self._jobs: dict[str, UnwrittenJob] = {}

    def __len__(self) -> int:
        return len(self._jobs)

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._jobs

    def __iter__(self) -> Iterator[UnwrittenJob]:
        return iter(tuple(self._jobs.values()))

    @property
    def ids(self) -> frozenset[str]:
        return frozenset(self._jobs)

    def get(self, job_id: str) -> UnwrittenJob | None:
        return self._jobs.get(job_id)

    def named(self, name: str) -> JobEntry | None:
        """The one with this key, job id or task id."""
        for job in self._jobs.values():
            record = job.entry.record
            if name in (record.key, record.id, *record.task_ids):
                return job.entry
        return None

    def hold(self, entry: JobEntry, event: Event) -> Change:
        """Apply the event in memory, and keep it to be written."""
        job = self._jobs.get(entry.record.id) or UnwrittenJob(entry, entry.record)
        change = job.hold(event)
        if job.events:
            self._jobs[entry.record.id] = job
        return change

    def behind(self, entry: JobEntry, base: JobRecord) -> UnwrittenJob:
        """The store has lost changes of this job, and holds `base`: what is known here is to be written again."""
        job = self._jobs[base.id] = UnwrittenJob(entry, base, events_behind(entry.record))
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
            if self._jobs.pop(job_id, None) is not None:
                job.entry.replace(record)
                job.awake.set()

    async def is_written(self, job_id: str, clock: Clock, *, limit_s: float) -> bool:
        """Whether all that is known of the job is written, after at most `limit_s` seconds; at once when closing."""
        job = self._jobs.get(job_id)
        if job is not None:
            with contextlib.suppress(TimeoutError):
                async with clock.timeout(limit_s):
                    await job.awake.wait()
        return job_id not in self._jobs

    def release_waiters(self) -> None:
        for job in self:
            job.awake.set()

    async def written(self, clock: Clock) -> AsyncIterator[UnwrittenJob]:
        """Write all that is held, trying again until nothing is left; gives each job that is in the store again."""
        pause_s = FIRST_PAUSE_S
        while self._jobs:
            await clock.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            for job in self:
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
        leased = [record for job in self if (record := job.lease(now, lease_s)) is not None]
        try:
            claimed = await self._store.claim(now, limit=limit, lease_s=lease_s)
        except StoreError:
            if leased:
                return leased
            raise
        return leased + [record for record in claimed if record.id not in self._jobs]

    async def next_due(self) -> float | None:
        """As `Store.next_due`, with the jobs that the store does not know as they are."""
        times = [await self._store.next_due(), *(job.entry.record.due_at for job in self)]
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
    elif record.refusal is not None and record.state in (State.NOT_SENT, State.REJECTED):
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
    if strangers := [task_id for task_id in before.task_ids if task_id not in kept]:
        log.error(
            "job %s: a callback named tasks %s before the service's answer, which names %s: the answer counts",
            before.id, ", ".join(strangers), ", ".join(event.task_ids[:SHOWN]),
        )  # fmt: skip


def log_given_up(record: JobRecord, owner: JobRecord) -> None:
    """A callback had given tasks to `owner` that are those of `record` by the service's answer."""
    log.error(
        "job %s: a callback named tasks for it that the service's answer gives to job %s (%s): they were taken from "
        "it, and it is %s now. Has its callback URL become known to others?",
        owner.id, record.id, ", ".join(record.task_ids[:SHOWN]), owner.state.value,
    )  # fmt: skip


def summary(event: Answer) -> str:
    """What became of a POST, for the log."""
    return f"bought tasks {', '.join(event.task_ids[:SHOWN])}" if isinstance(event, Accepted) else "its result"


def unwritten_error(record: JobRecord, event: Answer, cause: BaseException) -> StoreError:
    """The POST is over, and the store could not write its result: what that means for the money, and what to do."""
    said = str(cause) if isinstance(cause, XilingError) else type(cause).__name__
    later = "The result is kept in memory and written as soon as the store takes it"
    match event:
        case Accepted(task_ids=ids):
            return StoreError(
                f"The job WAS bought: its task ids are {', '.join(ids)}. {later}; until then client.job(task_id) "
                f"awaits it. Do not submit it again without its key. ({said})",
                charged="yes", job_id=record.id, task_ids=ids,
            )  # fmt: skip
        case Refused():
            return StoreError(
                f"Nothing was bought: {event.refusal.message} {later}. ({said})", charged="no", job_id=record.id
            )
        case AnswerLost():
            return StoreError(
                f"The job may have been bought, and is never sent again: {event.refusal.message} {later}. ({said})",
                charged="maybe", job_id=record.id,
            )  # fmt: skip


def lost_at_close(records: Iterable[JobRecord]) -> str:
    """What the log says of jobs whose results could not be written to the end."""
    jobs = [f"{record.id} (tasks {', '.join(record.task_ids) or 'not known'})" for record in records]
    return (
        f"{len(jobs)} jobs could not be written down before the client was closed. The next client of this store takes "
        f"them for uncertain; keep their ids, client.resolve() tells it what they bought: {'; '.join(jobs)}"
    )
