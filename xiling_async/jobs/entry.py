"""What a client holds in memory of one job: its newest record, and who waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from attrs import evolve

from xiling_async.errors import ClientClosed, SubmitUncertain, XilingError
from xiling_async.models.record import JobRecord

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


def still_sending_error(record: JobRecord, limit_s: float) -> SubmitUncertain:
    return SubmitUncertain(
        f"Another process has been sending job {record.id} for more than {limit_s:g} s and has not written what became "
        "of it. It may have been bought, so it is not sent from here. Wait for that process, or tell the job what was "
        "bought: client.resolve().",
        job_id=record.id,
    )
