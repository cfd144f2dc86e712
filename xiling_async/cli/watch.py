"""What is written of our jobs, as it is written: for who shows it, and for who must name it after Ctrl-C."""

from __future__ import annotations

import asyncio
from pathlib import Path

from xiling_async.models.lifecycle import Change, Event
from xiling_async.models.record import JobRecord
from xiling_async.stores import MemoryStore, SQLiteStore, Store
from xiling_async.telemetry import events as telemetry
from xiling_async.telemetry.events import Polled


class Watch:
    """The newest record of each job that is followed, in the order in which they came."""

    def __init__(self) -> None:
        self.jobs: dict[str, JobRecord] = {}
        self._confirmed: set[str] = set()
        self._news: list[JobRecord] = []
        self._awake = asyncio.Event()

    @property
    def last(self) -> JobRecord | None:
        """The job that was followed last."""
        return next(reversed(self.jobs.values()), None)

    def follow(self, record: JobRecord) -> None:
        """Follow this job from now on."""
        if record.id not in self.jobs:
            self._keep(record)

    def saw(self, record: JobRecord) -> None:
        """A record was written; of a job that nobody follows it is no news."""
        if record.id in self.jobs and record.version > self.jobs[record.id].version:
            self._keep(record)

    def is_confirmed(self, record: JobRecord) -> bool:
        """Whether the service has told of this job: anybody can name a task id."""
        return record.request is not None or any(record.outcomes) or record.id in self._confirmed

    def on_event(self, event: telemetry.Event) -> None:
        """An event of the client."""
        if isinstance(event, Polled) and event.job_id and event.result in ("running", "succeeded", "failed"):
            self._confirmed.add(event.job_id)

    def _keep(self, record: JobRecord) -> None:
        self.jobs[record.id] = record
        self._news.append(record)
        self._awake.set()

    def news(self) -> list[JobRecord]:
        """What was written since this was asked last."""
        news, self._news = self._news, []
        self._awake.clear()
        return news

    async def changed(self) -> None:
        """Wait for news."""
        await self._awake.wait()


class _Memory(MemoryStore):
    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    async def add(self, record: JobRecord) -> JobRecord:
        return _added(await super().add(record), self._watch)

    async def change(self, job_id: str, event: Event) -> Change:
        return _changed(await super().change(job_id, event), self._watch)


class _SQLite(SQLiteStore):
    def __init__(self, path: Path, watch: Watch) -> None:
        super().__init__(path)
        self._watch = watch

    async def add(self, record: JobRecord) -> JobRecord:
        return _added(await super().add(record), self._watch)

    async def change(self, job_id: str, event: Event) -> Change:
        return _changed(await super().change(job_id, event), self._watch)


def _added(record: JobRecord, watch: Watch) -> JobRecord:
    if record.request is not None:  # one without a request was lost and is taken in again: nobody here waits for it
        watch.follow(record)
    return record


def _changed(change: Change, watch: Watch) -> Change:
    if change.record is not None:
        watch.saw(change.record)
    return change


def watched(path: Path | None, watch: Watch) -> Store:
    """A store in this file, or in memory, that tells the watch."""
    return _Memory(watch) if path is None else _SQLite(path, watch)
