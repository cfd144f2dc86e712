"""The newest that is known of the jobs of a command, by the client's events: for display, and to name after Ctrl-C."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from attrs import evolve

from xiling_async.errors import StoreError
from xiling_async.models.record import JobRecord, State
from xiling_async.stores import Store
from xiling_async.telemetry.events import Event, JobChanged, Polled, TaskEnded


class Watch:
    """The jobs that are followed, in the order in which they came: each job that is submitted from now on, and those
    that are named. `store`: where the client keeps them; None: only events are known."""

    def __init__(self, store: Store | None = None) -> None:
        self.jobs: dict[str, JobRecord] = {}
        self._store = store
        self._confirmed: set[str] = set()
        self._stale: dict[str, None] = {}
        self._news: dict[str, JobRecord] = {}
        self._awake = asyncio.Event()
        self._reading = asyncio.Lock()

    @property
    def last(self) -> JobRecord | None:
        """The job that was followed last."""
        return next(reversed(self.jobs.values()), None)

    def follow(self, record: JobRecord) -> None:
        """Follow this job from now on."""
        if record.id not in self.jobs:
            self._keep(record)

    def saw(self, record: JobRecord) -> None:
        """A record was read; one that is not followed, or no newer than what is known, changes nothing."""
        if record.id in self.jobs and record.version > self.jobs[record.id].version:
            self._keep(record)

    def on_event(self, event: Event) -> None:
        """An event of the client."""
        match event:
            case JobChanged():
                self._moved(event)
            case Polled(job_id=str(job_id), result="running" | "succeeded" | "failed"):
                self._confirmed.add(job_id)
                self._mark(job_id)
            case Polled(job_id=str(job_id)) | TaskEnded(job_id=job_id):
                self._mark(job_id)

    def is_confirmed(self, record: JobRecord) -> bool:
        """Whether the service has told of this job: anyone can name a task id."""
        return record.request is not None or any(record.outcomes) or record.id in self._confirmed

    async def refresh(self) -> None:
        """Read again what has changed. A store that cannot be read changes nothing: the events are known."""
        async with self._reading:  # a second caller waits for what the first one is still reading
            stale, self._stale = self._stale, {}
            for job_id in stale:
                with suppress(StoreError):
                    record = None if self._store is None else await self._store.get(job_id)
                    if record is not None:
                        self.saw(record)

    def news(self) -> list[JobRecord]:
        """What has changed since this was asked last."""
        news, self._news = self._news, {}
        self._awake.clear()
        return list(news.values())

    async def changed(self) -> None:
        """Wait for news."""
        await self._awake.wait()

    def _moved(self, event: JobChanged) -> None:
        known = self.jobs.get(event.job_id)
        if known is None:
            if event.was is not None or event.state is not State.SENDING:
                return  # of an earlier run, or lost and adopted: this command does not wait for it
            self._confirmed.add(event.job_id)
            known = JobRecord(
                id=event.job_id, kind=event.kind, key=event.key, request=None, asked=0, created_at=event.created_at,
                changed_at=event.at, version=-1,
            )  # fmt: skip
        outcomes = known.outcomes if known.task_ids == event.task_ids else (None,) * len(event.task_ids)
        # The version stays: whatever is read of it from now on is newer.
        self._keep(evolve(known, state=event.state, task_ids=event.task_ids, outcomes=outcomes, changed_at=event.at))
        self._mark(event.job_id)

    def _mark(self, job_id: str) -> None:
        if job_id in self.jobs:
            self._stale[job_id] = None
            self._awake.set()

    def _keep(self, record: JobRecord) -> None:
        self.jobs[record.id] = self._news[record.id] = record
        self._awake.set()
