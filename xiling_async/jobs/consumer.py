"""Hands ended jobs over to the application, each until it is acknowledged.

A consumer asks the store for one job whenever its loop asks for one. While there is none it sleeps until a job ends
here, another process says that something has changed, or a lease runs out; it never polls.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Final

from xiling_async._internal.clock import Clock
from xiling_async._internal.redact import shown
from xiling_async.errors import ClientClosed, InvalidRequest
from xiling_async.jobs.entry import JobEntry
from xiling_async.jobs.registry import Registry
from xiling_async.models.lifecycle import Acknowledged, Verdict
from xiling_async.models.record import HANDED_OVER, JobRecord
from xiling_async.models.settings import as_number
from xiling_async.stores.base import Store
from xiling_async.telemetry.events import JobAcknowledged, JobHandedOver
from xiling_async.telemetry.stats import Monitor

LONGEST_LEASE_S: Final = 10 * 365 * 24 * 3600.0


def checked_lease(lease: object) -> float:
    """Seconds. Raises `InvalidRequest` for what is not a number above 0."""
    number = as_number(lease)
    if number is None or not 0 < number <= LONGEST_LEASE_S:
        raise InvalidRequest(f"lease must be a number of seconds above 0, not {shown(lease)}. Nothing was changed.")
    return number


class Consumers:
    """The loops of one client over `Client.completed`. The store decides which of them gets which job."""

    def __init__(self, registry: Registry, *, store: Store, clock: Clock, monitor: Monitor) -> None:
        self._registry = registry
        self._store = store
        self._clock = clock
        self._monitor = monitor
        self._is_closed = False

    async def jobs(self, lease_s: float) -> AsyncGenerator[JobEntry, None]:
        """Each ended job that was not acknowledged, for as long as the loop asks. Raises `StoreError`, and
        `ClientClosed` when the client is closed."""
        with self._registry.handover.listening() as changed:
            while True:
                changed.clear()
                entry = await self._next(lease_s)
                if entry is not None:
                    yield entry
                else:
                    await self._sleep(changed)

    async def _next(self, lease_s: float) -> JobEntry | None:
        self._check_open()
        now = self._clock.time()
        handed_over = await self._store.hand_over(now, lease_s=lease_s)
        if handed_over is None:
            return None
        record = handed_over.record
        self._monitor.emit(JobHandedOver(
            job_id=record.id, key=record.key, kind=record.kind, state=record.state, is_again=handed_over.is_again,
            at=now, metadata=record.metadata,
        ))  # fmt: skip
        self._registry.handover.wake()  # others sleep until the earliest lease ends: there is a new one
        return self._registry.entry_of(record)

    async def _sleep(self, changed: asyncio.Event) -> None:
        wait_s = await self._store.next_handover(self._clock.time())
        timer = None if wait_s is None else self._clock.call_later(wait_s, changed.set)
        try:
            self._check_open()
            await changed.wait()
        finally:
            if timer is not None:
                timer.cancel()

    async def acknowledge(self, job_id: str) -> Verdict:
        """Write that the application has dealt with the end of this job."""
        now = self._clock.time()
        change = await self._registry.apply(job_id, Acknowledged(at=now))
        record = change.record
        if change.verdict is Verdict.APPLIED and record is not None:
            self._monitor.emit(
                JobAcknowledged(job_id=record.id, key=record.key, kind=record.kind, state=record.state, at=now)
            )
        return change.verdict

    def changed(self, record: JobRecord) -> None:
        """A job of this client has changed."""
        if record.state in HANDED_OVER:
            self._registry.handover.wake()

    def close(self) -> None:
        self._is_closed = True
        self._registry.handover.wake()

    def _check_open(self) -> None:
        if self._is_closed:
            raise ClientClosed(
                "The client was closed while jobs were handed over. What was not acknowledged stays in the store, and "
                "is handed over again."
            )
