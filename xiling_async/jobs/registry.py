"""Where a task and its callback meet; each change is committed before its waiters wake.

A `JobEntry` is the meeting place of one job. Entries live while there is a handle on the job; a job without one costs
only its row in the store. What the store could not write is held, used, and written again until it is in.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Iterable, Sequence
from typing import Protocol
from weakref import WeakValueDictionary

from xiling_async._internal.broadcast import Broadcast
from xiling_async._internal.clock import Clock, SystemClock
from xiling_async._internal.tasks import Tasks
from xiling_async.errors import ClientClosed, StoreError, XilingError
from xiling_async.jobs.entry import (
    JobEntry,
    JobsInHand,
    Predicate,
    UnwrittenJob,
    UnwrittenJobs,
    closed_error,
    due_now,
    has_lost,
    log_given_up,
    lost_at_close,
)
from xiling_async.models.lifecycle import Change, Event, OutcomeReported, ResendStarted, Verdict
from xiling_async.models.record import JobRecord, bare_job_id
from xiling_async.stores.base import Store
from xiling_async.telemetry.stats import UNWATCHED, Monitor
from xiling_async.webhooks.receiver import WebhookReceiver

log = logging.getLogger("xiling_async.jobs.registry")


class Observer(Protocol):
    """What is told of each record that changes: the poller, the auto-save."""

    def changed(self, record: JobRecord) -> None: ...


class Registry:
    """The one place where records change: commit, then tell those who wait."""

    def __init__(
        self,
        store: Store,
        *,
        observers: Sequence[Observer] = (),
        monitor: Monitor = UNWATCHED,
        clock: Clock | None = None,
    ) -> None:
        self._store = store
        self._monitor = monitor
        self._clock = SystemClock() if clock is None else clock
        self._entries: WeakValueDictionary[str, JobEntry] = WeakValueDictionary()
        self._unwritten = UnwrittenJobs(store)
        self.observers: Sequence[Observer] = observers
        self.jobs_in_hand = JobsInHand()  # neither purged, nor taken for jobs that their sender has left
        self._commits = Tasks()
        self._repairs = Tasks()
        self._writer = Tasks()
        self._closed = self._released = False
        self.handover = Broadcast()  # what is to be handed to consumers has changed
        self.keyed_ids: WebhookReceiver | None = None  # gives keyed jobs their ids

    # --- entries -------------------------------------------------------------------------------------------------

    def entry_of(self, record: JobRecord) -> JobEntry:
        """The entry of this job, the same one for everybody who asks while it lives. A job made from a bare task id
        (`attempt` 0) joins the job that is known to have bought the task."""
        owner = None if record.attempt else self._unwritten.named(record.task_ids[0])
        if owner is not None:
            return owner
        entry = self._entries.get(record.id)
        if entry is None:
            entry = self._entries[record.id] = JobEntry(record, is_current=False)
        elif record.id not in self._unwritten.jobs:
            entry.update(record)
        return entry

    async def open(self, record: JobRecord) -> JobEntry:
        """Write the intent; the entry is of the job that the store holds, another one if the id or the key was known.
        `entry.record is record`: it was written."""
        entry = JobEntry(record, is_current=True)
        known = self._entries.setdefault(record.id, entry)
        stored = await self._add(record)
        if stored is not record:
            if known.record is record:  # ours was not written: it must not pass for the one that the store holds
                known.restart(stored)
            return self.entry_of(stored)
        if known is not entry:  # a handle on the job of this key, whose row was forgotten
            known.replace(record)
        return known

    async def _add(self, record: JobRecord) -> JobRecord:
        """The record of this job in the store: this one, or the one that was there."""
        stored = await self._store.add(record)
        if stored is record:
            self._monitor.changed(record, None)
        return stored

    async def up_to_date(self, entry: JobEntry) -> JobEntry:
        """The entry with no change missed. A job made from a bare task id is the job that bought the task, if the store
        knows it, and is written as one of its own if not."""
        while not entry.is_current and not self._closed:
            record = entry.record
            stored = None if record.attempt else await self._store.by_task(record.task_ids[0])
            stored = stored or await self._store.get(record.id)
            if stored is None and not record.attempt:
                stored = await self._add(record)
                self._notify(stored)
            if stored is not None and stored.id != record.id:
                entry = self.entry_of(stored)
                continue
            entry.is_current = True
            if stored is not None:
                entry.update(stored)
        return entry

    async def wait(self, entry: JobEntry, predicate: Predicate) -> JobRecord:
        """The job's record once it satisfies the predicate. Raises `ClientClosed` when the client is closed before."""
        record = entry.record if self._released else await entry.changed(predicate)
        if not predicate(record):
            raise closed_error(record)
        return record

    def is_in_hand(self, job_id: str) -> bool:
        """A submit has the job in hand, here or maybe in another process."""
        return self._store.is_shared or job_id in self.jobs_in_hand

    async def reread(self, entry: JobEntry) -> None:
        """Look into the store for changes that were missed. Raises `StoreError`."""
        record = await self._store.get(entry.record.id)
        if record is not None:
            self.told(record)

    def new_id(self, key: str | None) -> str:
        """The id of a new job. That of a keyed one is its key's, so that a job which comes back by its token alone is
        still the job of this key."""
        ids = () if key is None or self.keyed_ids is None else self.keyed_ids.job_ids(key)
        return ids[0] if ids else secrets.token_hex(16)

    # --- writing -------------------------------------------------------------------------------------------------

    async def adopt(self, record: JobRecord, event: OutcomeReported) -> Change:
        """Add a job that the store has lost, because its token proves that it is ours; `event` names a task of it."""
        await self._add(record)
        return await self.commit(record.id, event)

    async def apply(self, job_id: str, event: Event) -> Change:
        """Commit what `event` does to the job, then wake those who wait for it. Cancelling the caller cancels no
        commit."""
        if self._closed:
            raise ClientClosed("The client is closed: this change of the job is not recorded.", job_id=job_id)
        return await self._commits.run_shielded(self.commit(job_id, event), name=f"xiling commit {job_id}")

    async def commit(self, job_id: str, event: Event) -> Change:
        """`apply`, for a caller in a task that is not cancelled half-way. Raises `StoreError`; what is told of a job
        with unwritten results is known in memory even then."""
        unwritten = self._unwritten.jobs.get(job_id)
        if unwritten is not None:
            try:
                await self._write(unwritten)
            except Exception:
                if not isinstance(event, ResendStarted):  # an intent that is not written is not sent
                    self.hold(unwritten.entry, event)
                raise
        change = await self._store.change(job_id, event)
        if change.verdict is Verdict.NO_JOB and not isinstance(event, ResendStarted):
            change = await self._restored(job_id, event, change)
        if change.record is not None:
            self._publish(change.record, change, event)
        return change

    def _publish(self, record: JobRecord, change: Change, event: Event) -> None:
        entry = self._entries.get(record.id)
        if entry is not None:
            self._update(entry, record)
        if change.verdict is Verdict.APPLIED:
            self._monitor.changed(record, change.was, getattr(event, "outcome", None))
            self._notify(record)
            self._publish_previous_owners(record, change.others)

    def _publish_previous_owners(self, record: JobRecord, others: Iterable[Change]) -> None:
        """Of the jobs that gave tasks up to this one."""
        for owner, was in ((other.record, other.was) for other in others if other.record is not None):
            log_given_up(record, owner)
            self.told(owner)
            self._monitor.changed(owner, was)
            self._notify(owner)

    def _notify(self, record: JobRecord) -> None:
        for observer in self.observers:
            observer.changed(record)

    async def _restored(self, job_id: str, event: Event, change: Change) -> Change:
        """The store has lost a job that is known here (a restored backup, a failover): write it again, then `event`."""
        entry = self._entries.get(job_id)
        if entry is None or not entry.is_current:
            return change
        await self._add_again(entry)
        return await self._store.change(job_id, event)

    async def _add_again(self, entry: JobEntry) -> None:
        log.warning("job %s was not in the store any more: written again", entry.record.id)
        record = due_now(entry.record, self._clock.time())
        await self._store.add(record)
        entry.update(record)
        self._notify(record)

    # --- what could not be written -------------------------------------------------------------------------------

    def hold(self, entry: JobEntry, event: Event) -> None:
        """Apply the event in memory, and write it in the background as soon as the store takes it."""
        unwritten = self._unwritten.jobs.get(entry.record.id)
        if unwritten is not None and event in unwritten.events:
            return
        change = self._unwritten.hold(entry, event)
        self._publish(entry.record, change, event)
        if self._unwritten.jobs and not self._closed and not len(self._writer):
            self._writer.start(self._write_again(), name="xiling unwritten results")

    async def is_written(self, job_id: str, *, limit_s: float) -> bool:
        """Whether all that is known of the job is written, after at most `limit_s` seconds; at once when closing."""
        return await self._unwritten.is_written(job_id, self._clock, limit_s=0.0 if self._released else limit_s)

    async def _write_again(self) -> None:
        async for job in self._unwritten.written(self._clock):
            self._written(job)

    async def _write(self, job: UnwrittenJob) -> None:
        await self._unwritten.write(job)
        self._written(job)

    def _written(self, job: UnwrittenJob) -> None:
        self._notify(job.entry.record)
        self._publish_previous_owners(job.entry.record, job.gave_way)

    # --- finding -------------------------------------------------------------------------------------------------

    def note_error(self, job_id: str, error: XilingError | None) -> None:
        """What became of the last status GET of this job, for those who wait for it."""
        if (entry := self._entries.get(job_id)) is not None:
            entry.polling_error = error

    async def find(self, name: str) -> JobEntry | None:
        """The job with this key, job id or task id, in that order."""
        entry = self._unwritten.named(name) or await self.by_key(name)
        if entry is not None:
            return entry
        record = await self._store.get(name) or await self._store.by_task(name)
        record = record or await self._store.get(bare_job_id(name))
        return None if record is None else self.entry_of(record)

    async def by_key(self, key: str) -> JobEntry | None:
        """The job of this key; also one that came back by its token alone, whose id is the key's."""
        entry = self._unwritten.named(key)
        if entry is not None and entry.record.key == key:
            return entry
        record = await self._store.by_key(key)
        if record is None and self.keyed_ids is not None:
            for job_id in self.keyed_ids.job_ids(key)[1:]:  # of the first one, `add` knows
                record = record or await self._store.get(job_id)
        return None if record is None else self.entry_of(record)

    async def claim(self, now: float, *, limit: int, lease_s: float) -> list[JobRecord]:
        """`Store.claim`, with the jobs that the store does not know of yet. Raises `StoreError` if that is all."""
        return await self._unwritten.claim(now, limit=limit, lease_s=lease_s)

    async def next_due(self) -> float | None:
        """`Store.next_due`, with the jobs that the store does not know of yet."""
        return await self._unwritten.next_due()

    # --- what other processes do: the store tells (stores/base.py, `Watcher`) -------------------------------------

    def known(self, job_id: str) -> int | None:
        entry = self._entries.get(job_id)
        return None if entry is None else entry.record.version

    def watched(self) -> list[str]:
        return list(self._entries)

    def handover_changed(self) -> None:
        self.handover.wake()

    def in_hand(self) -> frozenset[str]:
        return self.jobs_in_hand.ids | self._unwritten.jobs.keys()

    def told(self, record: JobRecord) -> None:
        unwritten, entry = self._unwritten.jobs.get(record.id), self._entries.get(record.id)
        if unwritten is not None:
            unwritten.rebase(record)
        elif entry is not None:
            self._update(entry, record)

    def _update(self, entry: JobEntry, record: JobRecord) -> None:
        """Take what the store says; if it knows less than is known here, bring it to that."""
        if entry.is_current and has_lost(entry.record, record):
            self._repairs.start(self._repair(entry), name=f"xiling repair of {record.id}")
        else:
            entry.update(record)

    def missing(self, job_ids: Iterable[str]) -> None:
        for job_id in job_ids:
            entry = self._entries.get(job_id)
            if entry is not None and entry.is_current and not entry.record.state.is_final:
                self._repairs.start(self._repair(entry), name=f"xiling repair of {job_id}")

    async def _repair(self, entry: JobEntry) -> None:
        """A database that failed over may have lost its last changes: bring it to what this process knows."""
        known = entry.record
        if known.id in self._unwritten.jobs:
            return
        with contextlib.suppress(StoreError):  # the next look at all that is watched comes soon
            record = await self._store.get(known.id)
            if record is None:
                await self._add_again(entry)
            elif has_lost(known, record) and known.id not in self._unwritten.jobs:
                log.warning("job %s is older in the store than it was: written again", known.id)
                await self._write(self._unwritten.behind(entry, record))
            self._notify(entry.record)

    # --- the end -------------------------------------------------------------------------------------------------

    def release_waiters(self) -> None:
        """Wake all waiters with `ClientClosed`, also those to come; what is known by now is still written."""
        self._released = True
        self._unwritten.release_waiters()
        for entry in tuple(self._entries.values()):
            entry.close()

    async def close(self) -> None:
        """Wake all waiters, wait for pending commits, and write what could not be written before; the jobs go on."""
        self._closed = True
        self.release_waiters()
        await self._commits.drain()
        await self._repairs.cancel()
        await self._writer.cancel()
        for job in tuple(self._unwritten.jobs.values()):
            with contextlib.suppress(Exception):
                await self._write(job)
        if self._unwritten.jobs:
            log.error("%s", lost_at_close(job.entry.record for job in self._unwritten.jobs.values()))
