"""Where a task and its callback meet; written down before anyone is told.

A `Slot` is the meeting place of one job: its newest record, and a future for each one who waits for it. Slots live
while somebody holds a handle on the job; a job that nobody watches costs nothing but its row in the store.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from weakref import WeakValueDictionary

from xiling_async._internal.tasks import Tasks
from xiling_async.errors import ClientClosed, XilingError
from xiling_async.models.lifecycle import Change, Event, Heard, Verdict
from xiling_async.models.record import JobRecord
from xiling_async.stores.base import Store
from xiling_async.telemetry.stats import UNWATCHED, Monitor

Enough = Callable[[JobRecord], bool]


class Slot:
    """The newest known record of a job, and who waits for it to change.

    A record read from the store may be old by the time its slot exists: `fresh` says that no change was missed.
    """

    __slots__ = ("__weakref__", "_waiters", "closed", "fresh", "polling_error", "record")

    def __init__(self, record: JobRecord, *, fresh: bool) -> None:
        self.record = record
        self.fresh = fresh
        self.closed = False
        self.polling_error: XilingError | None = None  # of the last status GET
        self._waiters: list[tuple[Enough, asyncio.Future[None]]] = []

    def update(self, record: JobRecord) -> None:
        """Take a newer record and wake those it satisfies; drop an older one (commits can overtake each other)."""
        if record.version <= self.record.version:
            return
        self.record = record
        self.fresh = True
        for enough, waiter in self._waiters:
            if not waiter.done() and enough(record):
                waiter.set_result(None)

    async def changed(self, enough: Enough) -> JobRecord:
        """The record once it satisfies `enough`, or as it is when the slot is closed.

        Each waiter has a future of its own: a cancelled one harms nobody.
        """
        while not enough(self.record) and not self.closed:
            entry = (enough, asyncio.get_running_loop().create_future())
            self._waiters.append(entry)
            try:
                await entry[1]
            finally:
                self._waiters.remove(entry)
        return self.record

    def close(self) -> None:
        """Nothing will change here any more: wake everybody."""
        self.closed = True
        for _, waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)


class Registry:
    """The one place where records change: commit, then tell those who wait."""

    def __init__(
        self, store: Store, on_change: Callable[[JobRecord], None] = lambda record: None, monitor: Monitor = UNWATCHED
    ) -> None:
        self._store = store
        self._monitor = monitor
        self._slots: WeakValueDictionary[str, Slot] = WeakValueDictionary()
        self._on_change = on_change
        self._commits = Tasks()
        self._closed = False
        self._is_left = False  # nobody waits here any longer

    def slot(self, record: JobRecord) -> Slot:
        """The meeting place of this job, the same one for everybody who asks while it lives."""
        slot = self._slots.get(record.id)
        if slot is None:
            slot = self._slots[record.id] = Slot(record, fresh=False)
        else:
            slot.update(record)
        return slot

    async def open(self, record: JobRecord) -> Slot:
        """Write the intent; the slot is of the job that the store holds, another one if the key was known."""
        slot = self._slots[record.id] = Slot(record, fresh=True)
        held = await self._store.add(record)
        if held.id != record.id:
            return self.slot(held)
        self._monitor.changed(held, None)
        return slot

    async def fresh(self, slot: Slot) -> Slot:
        """The slot with no change missed. A job that the store does not know (made from a bare task id) is written
        into it, or turns out to be one that the store knows by its task."""
        while not slot.fresh and not self._closed:
            held = await self._store.get(slot.record.id)
            if held is None and slot.record.task_ids and not slot.record.state.is_final:
                held = await self._store.by_task(slot.record.task_ids[0]) or await self._take_in(slot.record)
            if held is not None and held.id != slot.record.id:
                slot = self.slot(held)
                continue
            slot.fresh = True
            if held is not None:
                slot.update(held)
        return slot

    async def _take_in(self, record: JobRecord) -> JobRecord:
        held = await self._store.add(record)
        if held.id == record.id:
            self._monitor.changed(held, None)
        self._on_change(held)
        return held

    async def adopt(self, record: JobRecord, heard: Heard) -> Change:
        """Take in a job that the store has lost, because its token proves that it is ours; `heard` tells of a task."""
        await self._store.add(record)
        self._monitor.changed(record, None)
        return await self.commit(record.id, heard)

    async def wait(self, slot: Slot, enough: Enough) -> JobRecord:
        """The job's record once it satisfies `enough`. Raises `ClientClosed` when the client is closed before."""
        record = slot.record if self._is_left else await slot.changed(enough)
        if not enough(record):
            raise ClientClosed(
                "The client was closed while this job was awaited. The job goes on at the service, and stays in the "
                "store: a new client with the same store finds it (recover, find).",
                charged="maybe" if not record.task_ids else "yes",
                job_id=record.id,
                task_ids=record.task_ids,
            )
        return record

    async def apply(self, job_id: str, event: Event) -> Change:
        """Commit what `event` does to the job, then wake those who wait for it.

        Who is cancelled in between (a `refresh`) takes nobody's news with him.
        """
        if self._closed:
            raise ClientClosed("The client is closed: what was heard of the job is not kept.", job_id=job_id)
        return await self._commits.outlive(self.commit(job_id, event), name=f"xiling commit {job_id}")

    async def commit(self, job_id: str, event: Event) -> Change:
        """`apply` for who runs in a task that nobody cancels half-way: it needs no task more."""
        change = await self._store.change(job_id, event)
        if change.record is not None:
            slot = self._slots.get(job_id)
            if slot is not None:
                slot.update(change.record)
            if change.verdict is Verdict.APPLIED:
                self._monitor.changed(change.record, change.was)
                self._on_change(change.record)
        return change

    def note_error(self, job_id: str, error: XilingError | None) -> None:
        """What became of the last status GET of this job, for those who wait for it."""
        slot = self._slots.get(job_id)
        if slot is not None:
            slot.polling_error = error

    async def find(self, name: str) -> Slot | None:
        """The job with this key, job id or task id, in that order."""
        for look in (self._store.by_key, self._store.get, self._store.by_task):
            record = await look(name)
            if record is not None:
                return self.slot(record)
        return None

    async def by_key(self, key: str) -> Slot | None:
        record = await self._store.by_key(key)
        return None if record is None else self.slot(record)

    async def unfinished(self) -> AsyncIterator[Slot]:
        async for record in self._store.unfinished():
            yield self.slot(record)

    # --- what other processes do: the store tells (store/base.py, `Watcher`) ---------------------------------------

    def known(self, job_id: str) -> int | None:
        slot = self._slots.get(job_id)
        return None if slot is None else slot.record.version

    def watched(self) -> list[str]:
        return list(self._slots)

    def told(self, record: JobRecord) -> None:
        slot = self._slots.get(record.id)
        if slot is not None:
            slot.update(record)

    def stop_waiting(self) -> None:
        """Wake everybody who still waits: they get `ClientClosed`; the jobs go on."""
        self._is_left = True
        for slot in tuple(self._slots.values()):
            slot.close()

    async def close(self) -> None:
        """End all waits, and write what is being written."""
        self._closed = True
        self.stop_waiting()
        await self._commits.drain()
