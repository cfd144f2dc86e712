"""A store that lives and dies with the process: dictionaries."""

from __future__ import annotations

from collections.abc import AsyncIterator

from xiling_async.lifecycle import Change, Event, Verdict, decide
from xiling_async.models import JobRecord


class MemoryStore:
    """Remembers jobs for as long as the process lives: for scripts and tests. It keeps everything it was given.

    What was bought is lost with the process: take `SQLiteStore` where that matters.
    """

    def __init__(self) -> None:
        self._jobs: dict[str, JobRecord] = {}
        self._ids_by_key: dict[str, str] = {}
        self._ids_by_task: dict[str, str] = {}
        self._secret: bytes | None = None

    def __repr__(self) -> str:
        return f"<MemoryStore: {len(self._jobs)} jobs>"

    async def open(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def secret(self, fresh: bytes) -> bytes:
        self._secret = self._secret or fresh
        return self._secret

    async def add(self, record: JobRecord) -> JobRecord:
        known = self._jobs.get(record.id) or await self.by_key(record.key or "")
        if known is not None:
            return known
        self._keep(None, record)
        return record

    async def change(self, job_id: str, event: Event) -> Change:
        record = self._jobs.get(job_id)
        if record is None:
            return Change(Verdict.NO_JOB, None)
        change = decide(record, event)
        if change.verdict is Verdict.APPLIED and change.record is not None:
            if any(self._ids_by_task.get(task_id, job_id) != job_id for task_id in change.record.task_ids):
                return Change(Verdict.STRANGE, record)
            self._keep(record, change.record)
        return change

    def _keep(self, before: JobRecord | None, record: JobRecord) -> None:
        self._jobs[record.id] = record
        if before is None and record.key is not None:
            self._ids_by_key[record.key] = record.id
        if before is None or before.task_ids != record.task_ids:
            for task_id in before.task_ids if before else ():
                del self._ids_by_task[task_id]
            for task_id in record.task_ids:
                self._ids_by_task[task_id] = record.id

    async def get(self, job_id: str) -> JobRecord | None:
        return self._jobs.get(job_id)

    async def by_key(self, key: str) -> JobRecord | None:
        return self._jobs.get(self._ids_by_key.get(key, ""))

    async def by_task(self, task_id: str) -> JobRecord | None:
        return self._jobs.get(self._ids_by_task.get(task_id, ""))

    async def unfinished(self) -> AsyncIterator[JobRecord]:
        for record in tuple(self._jobs.values()):
            if not record.state.is_final:
                yield record
