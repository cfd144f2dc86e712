"""A store behind a switch: while it is away, every operation fails, as with a full disk or a database that restarts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from datetime import timedelta

from xiling_async import StoreError
from xiling_async.models.lifecycle import Change, Event
from xiling_async.models.query import ALL_JOBS, JobQuery
from xiling_async.models.record import JobRecord
from xiling_async.stores.base import HandedOver, Store, Watcher


class OutageStore:
    """Passes everything to `inner`, unless it is away.

    `away`: every operation raises `StoreError`. `goes_away_at(event)`: the store goes away just before it writes
    such an event. `calls` counts the operations that were asked for.
    """

    def __init__(self, inner: Store) -> None:
        self.inner = inner
        self.away = False
        self.goes_away_at: Callable[[Event], bool] = lambda event: False
        self.calls = 0

    def __repr__(self) -> str:
        return f"<OutageStore {self.inner!r}>"

    @property
    def is_shared(self) -> bool:
        return self.inner.is_shared

    def _check(self) -> None:
        self.calls += 1
        if self.away:
            raise StoreError("The disk is full.")

    async def open(self) -> None:
        await self.inner.open()

    async def close(self) -> None:
        await self.inner.close()

    def listen(self, watcher: Watcher) -> None:
        self.inner.listen(watcher)

    async def secret(self, fresh: bytes) -> bytes:
        self._check()
        return await self.inner.secret(fresh)

    async def add(self, record: JobRecord) -> JobRecord:
        self._check()
        return await self.inner.add(record)

    async def change(self, job_id: str, event: Event) -> Change:
        if self.goes_away_at(event):
            self.away = True
        self._check()
        return await self.inner.change(job_id, event)

    async def get(self, job_id: str) -> JobRecord | None:
        self._check()
        return await self.inner.get(job_id)

    async def by_key(self, key: str) -> JobRecord | None:
        self._check()
        return await self.inner.by_key(key)

    async def by_task(self, task_id: str) -> JobRecord | None:
        self._check()
        return await self.inner.by_task(task_id)

    async def unfinished(self) -> AsyncIterator[JobRecord]:
        self._check()
        async for record in self.inner.unfinished():
            yield record

    async def jobs(self, query: JobQuery = ALL_JOBS) -> AsyncIterator[JobRecord]:
        self._check()
        async for record in self.inner.jobs(query):
            yield record

    async def unsaved(self, since: float) -> AsyncIterator[JobRecord]:
        self._check()
        async for record in self.inner.unsaved(since):
            yield record

    async def hand_over(self, now: float, *, lease_s: float) -> HandedOver | None:
        self._check()
        return await self.inner.hand_over(now, lease_s=lease_s)

    async def next_handover(self, now: float) -> float | None:
        self._check()
        return await self.inner.next_handover(now)

    async def claim(self, now: float, *, limit: int, lease_s: float) -> list[JobRecord]:
        self._check()
        return await self.inner.claim(now, limit=limit, lease_s=lease_s)

    async def next_due(self) -> float | None:
        self._check()
        return await self.inner.next_due()

    async def recover_orphans(self, now: float, *, doubt_s: float, per_second: float) -> int:
        self._check()
        return await self.inner.recover_orphans(now, doubt_s=doubt_s, per_second=per_second)

    async def purge(self, older_than: timedelta | float, *, now: float | None = None) -> int:
        self._check()
        return await self.inner.purge(older_than, now=now)
