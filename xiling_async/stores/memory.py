"""A store that lives and dies with the process: dictionaries, and a heap of due times."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Final, cast

from attrs import evolve

from xiling_async._internal.clock import SystemClock
from xiling_async._internal.redact import shown
from xiling_async.errors import ConfigurationError
from xiling_async.models.lifecycle import AnswerLost, Change, Event, Verdict, decide
from xiling_async.models.ownership import give_way
from xiling_async.models.query import ALL_JOBS, JobQuery
from xiling_async.models.record import HANDED_OVER, LEFT_BEHIND, JobRecord, State
from xiling_async.stores.base import SPREAD_S, HandedOver, Watcher, seconds
from xiling_async.stores.rows import has_unsaved_result

_CERTAIN: Final = (State.DONE, State.FAILED, State.NOT_SENT, State.REJECTED)


class MemoryStore:
    """Remembers jobs for as long as the process lives: for scripts and tests.

    What was bought is lost with the process: take `SQLiteStore` where that matters. `keep`: of jobs that are over and
    have no key, the last so many are kept, about 1 KB each, so that a worker does not grow for weeks; jobs with a key,
    and those whose end is not certain, are kept until `purge`. Where there is a consumer (`Client.completed`), a job is
    over when it was acknowledged.
    """

    is_shared: bool = False

    def __init__(self, *, keep: int = 2_000) -> None:
        if type(keep) is not int or keep < 0:
            raise ConfigurationError(f"keep must be a whole number of jobs, 0 or more, not {shown(keep)}.")
        self._keep_over = keep
        self._over: deque[str] = deque()  # without a key, in the order they ended
        self._jobs: dict[str, JobRecord] = {}
        self._ids_by_key: dict[str, str] = {}
        self._ids_by_task: dict[str, str] = {}
        self._due: list[tuple[float, str]] = []  # lazily cleaned: an entry counts only while its job is due then
        self._ended: dict[str, float] = {}  # jobs that a consumer has not acknowledged: from when it may be given one
        self._has_consumer = False
        self._secret: bytes | None = None
        self._watcher: Watcher | None = None

    def __repr__(self) -> str:
        return f"<MemoryStore: {len(self._jobs)} jobs>"

    async def open(self) -> None:
        pass

    async def close(self) -> None:
        pass

    def listen(self, watcher: Watcher) -> None:
        """No other process changes its jobs; jobs in hand are not forgotten."""
        self._watcher = watcher

    def _in_hand(self) -> frozenset[str]:
        return frozenset() if self._watcher is None else self._watcher.in_hand()

    async def secret(self, fresh: bytes) -> bytes:
        self._secret = self._secret or fresh
        return self._secret

    async def add(self, record: JobRecord) -> JobRecord:
        held = self._jobs.get(record.id)
        if held is None and record.key is not None:
            held = await self.by_key(record.key)
        for task_id in record.owned_ids:
            held = held or await self.by_task(task_id)
        if held is None:
            self._keep(None, record)
        return held or record

    async def change(self, job_id: str, event: Event) -> Change:
        record = self._jobs.get(job_id)
        if record is None:
            return Change(Verdict.NO_JOB, None)
        change = decide(record, event)
        if change.verdict is Verdict.APPLIED and change.record is not None:
            after = change.record
            if after.task_ids is not record.task_ids:
                owners = self._other_owners(after)
                others = give_way(owners, after, event)
                if others is None:
                    return Change(Verdict.UNKNOWN_TASK, record)
                for owner, other in zip(owners, others, strict=True):
                    self._keep(owner, cast("JobRecord", other.record))
                change = evolve(change, others=others) if others else change
            self._keep(record, after)
            if after.state is not record.state or after.handover_at != record.handover_at:
                self._forget_oldest(after)
        return change

    def _other_owners(self, record: JobRecord) -> list[JobRecord]:
        ids = dict.fromkeys(self._ids_by_task.get(task_id, record.id) for task_id in record.owned_ids)
        return [self._jobs[job_id] for job_id in ids if job_id != record.id]

    def _forget_oldest(self, record: JobRecord) -> None:
        if record.key is None and record.state in _CERTAIN and not self._is_awaited_by_consumer(record):
            self._over.append(record.id)
        for _ in range(len(self._over) - self._keep_over):
            oldest = self._jobs.get(self._over.popleft())
            if oldest is not None and oldest.state in _CERTAIN and not self._is_awaited_by_consumer(oldest):
                if oldest.id in self._in_hand():
                    self._over.append(oldest.id)
                else:
                    self._forget(oldest)

    def _is_awaited_by_consumer(self, record: JobRecord) -> bool:
        return self._has_consumer and record.id in self._ended

    def _forget(self, record: JobRecord) -> None:
        del self._jobs[record.id]
        self._ended.pop(record.id, None)
        if record.key is not None:
            del self._ids_by_key[record.key]
        for task_id in record.owned_ids:
            del self._ids_by_task[task_id]

    def _keep(self, before: JobRecord | None, record: JobRecord) -> None:
        self._jobs[record.id] = record
        if before is None or before.state is not record.state or record.handover_at is None:
            self._ended.pop(record.id, None)
        if record.state in HANDED_OVER and record.handover_at is not None:
            self._ended[record.id] = record.handover_at  # the one that ended last stands last
        if before is None and record.key is not None:
            self._ids_by_key[record.key] = record.id
        if before is None or before.task_ids != record.task_ids:
            for task_id in before.owned_ids if before else ():
                del self._ids_by_task[task_id]
            for task_id in record.owned_ids:
                self._ids_by_task[task_id] = record.id
        if record.due_at is not None and (before is None or before.due_at != record.due_at):
            heapq.heappush(self._due, (record.due_at, record.id))
            if len(self._due) > 2 * len(self._jobs) + 64:
                self._due = [(job.due_at, job.id) for job in self._jobs.values() if job.due_at is not None]
                heapq.heapify(self._due)

    async def get(self, job_id: str) -> JobRecord | None:
        return self._jobs.get(job_id)

    async def by_key(self, key: str) -> JobRecord | None:
        return self._jobs.get(self._ids_by_key.get(key, ""))

    async def by_task(self, task_id: str) -> JobRecord | None:
        return self._jobs.get(self._ids_by_task.get(task_id, ""))

    async def unfinished(self) -> AsyncIterator[JobRecord]:
        oldest_first = sorted(self._jobs.values(), key=lambda record: record.created_at)
        for job_id in [record.id for record in oldest_first if not record.state.is_final]:
            record = self._jobs.get(job_id)  # as it is now: the reader may have taken its time
            if record is not None and not record.state.is_final:
                yield record

    async def jobs(self, query: JobQuery = ALL_JOBS) -> AsyncIterator[JobRecord]:
        ids = sorted(self._jobs, key=lambda job_id: self._jobs[job_id].created_at)
        for job_id in reversed(ids) if query.newest_first else ids:
            record = self._jobs.get(job_id)
            if record is not None and query.matches(record):
                yield record

    async def unsaved(self, since: float) -> AsyncIterator[JobRecord]:
        for record in tuple(self._jobs.values()):
            if record.changed_at >= since and has_unsaved_result(record):
                yield record

    async def claim(self, now: float, *, limit: int, lease_s: float) -> list[JobRecord]:
        claimed: list[JobRecord] = []
        while self._next() and self._due[0][0] <= now and len(claimed) < limit:
            record = self._jobs[heapq.heappop(self._due)[1]]
            leased = record.next_version(due_at=now + lease_s)
            self._keep(record, leased)
            claimed.append(leased)
        return claimed

    async def next_due(self) -> float | None:
        return self._due[0][0] if self._next() else None

    def _next(self) -> bool:
        """Whether anything is due, ever; what is no longer due is dropped from the front of the heap."""
        while self._due:
            due_at, job_id = self._due[0]
            record = self._jobs.get(job_id)
            if record is not None and record.due_at == due_at:
                return True
            heapq.heappop(self._due)
        return False

    async def hand_over(self, now: float, *, lease_s: float) -> HandedOver | None:
        self._has_consumer = True
        for job_id, handover_at in self._ended.items():
            if handover_at <= now:
                record = self._jobs[job_id]
                leased = record.next_version(handover_at=now + lease_s)
                self._keep(record, leased)
                return HandedOver(leased, is_again=handover_at > 0)
        return None

    async def next_handover(self, now: float) -> float | None:
        return max(0.0, min(self._ended.values()) - now) if self._ended else None

    async def recover_orphans(self, now: float, *, doubt_s: float, per_second: float) -> int:
        open_jobs = [record for record in self._jobs.values() if not record.state.is_final]
        spread_s = min(SPREAD_S, len(open_jobs) / per_second)
        for place, record in enumerate(open_jobs):
            if record.state is State.SENDING:
                lost = AnswerLost(attempt=record.attempt, at=now, refusal=LEFT_BEHIND, due_at=now + doubt_s)
                await self.change(record.id, lost)
            elif record.state is State.UNCERTAIN:
                self._keep(record, record.next_version(due_at=min(record.due_at or now, now + doubt_s)))
            else:
                self._keep(record, record.next_version(due_at=now + spread_s * place / len(open_jobs)))
        return len(open_jobs)

    async def purge(self, older_than: timedelta | float, *, now: float | None = None) -> int:
        now = SystemClock().time() if now is None else now
        before, in_hand = now - seconds(older_than), self._in_hand()
        old = [
            job
            for job in self._jobs.values()
            if job.state.is_final
            and job.changed_at < before
            and job.id not in in_hand
            and not self._is_awaited_by_consumer(job)
        ]
        for record in old:
            self._forget(record)
        return len(old)
