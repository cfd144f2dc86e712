"""A store in one SQLite file, for one process: every change is on the disk before it counts."""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TypeVar

from xiling_async._internal.clock import SystemClock
from xiling_async.errors import StoreError
from xiling_async.models.lifecycle import Change, Event
from xiling_async.models.query import ALL_JOBS, OPEN_JOBS, JobQuery
from xiling_async.models.record import JobRecord
from xiling_async.models.settings import instance, path_of
from xiling_async.stores.base import HandedOver, Watcher, seconds
from xiling_async.stores.listing import FIRST, Place, start
from xiling_async.stores.sqlite_file import IN_USE_HERE, DatabaseFile
from xiling_async.stores.sqlite_queries import Queries
from xiling_async.stores.sqlite_schema import give_space_back
from xiling_async.stores.sqlite_writer import Work, Writer

log = logging.getLogger("xiling_async.stores")

T = TypeVar("T")


class SQLiteStore:
    """Remembers jobs in the file `path`: they survive a crash, a `kill -9`, and (as far as the disk keeps its promises)
    a power cut. One process at a time; several need a `PostgresStore`. While it is open there are two files more: a
    `-wal`, and an `-owner` that says which process it is. What it makes is readable by its owner alone; a file that
    another user made, or that every user may write, is refused. A file that is removed or replaced while it is in use
    is noticed at the next commit (`StoreError`).

    `read_only`: read a copy of the file as it is when the store is opened, also while another process uses it; nothing
    can be written. `connect`: how to open the file (for tests).
    """

    is_shared: bool = False

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        read_only: bool = False,
        connect: Callable[..., sqlite3.Connection] = sqlite3.connect,
    ) -> None:
        self._path = path_of("The path of a SQLiteStore", path)  # looked up when it is opened, in the writer's thread
        instance("read_only", read_only, bool, "True or False")
        self._file = DatabaseFile(self._path, connect, read_only=read_only)
        self._queries = Queries()
        self._writer: Writer | None = None
        self._watcher: Watcher | None = None

    def __repr__(self) -> str:
        return f"<SQLiteStore {self._path.name}>"

    # --- life ----------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        if self._writer is not None:
            self._writer.check_process()
            raise StoreError(f"{self._path} {IN_USE_HERE}")
        self._queries = Queries()
        writer = Writer(self._file, str(self._path))
        await writer.start()
        self._writer = writer

    async def close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            await writer.stop()

    async def _run(self, work: Work[T], *, in_transaction: bool = True) -> T:
        if self._writer is None:
            raise StoreError(f"{self._path} is not open.")
        return await self._writer.run(work, in_transaction=in_transaction)

    @property
    def unreadable(self) -> int:
        """How many jobs were skipped since it was opened, because their rows cannot be read; the log names them."""
        return len(self._queries.reader.skipped)

    async def backup(self, path: str | os.PathLike[str]) -> Path:
        """Write a copy of the store into the new file `path`, while the store is in use; returns its path. The copy
        holds everything that was committed before, is a store itself, and can be read by its owner alone. Submits and
        callbacks wait meanwhile (about a second for each 100 MB).

        Raises `StoreError`, also if there is a file of that name; then nothing is left of the copy.
        """
        target = Path(path)

        def work(connection: sqlite3.Connection) -> Path:
            self._file.back_up(connection, target)
            return target

        return await self._run(work, in_transaction=False)

    # --- what base.py promises -----------------------------------------------------------------------------------

    def listen(self, watcher: Watcher) -> None:
        """No other process changes its jobs; jobs in hand are not forgotten."""
        self._watcher = watcher

    async def secret(self, fresh: bytes) -> bytes:
        return await self._run(partial(self._queries.secret, fresh=fresh))

    async def add(self, record: JobRecord) -> JobRecord:
        return await self._run(partial(self._queries.add, record=record))

    async def change(self, job_id: str, event: Event) -> Change:
        return await self._run(partial(self._queries.change, job_id=job_id, event=event))

    async def get(self, job_id: str) -> JobRecord | None:
        return await self._run(partial(self._queries.get, job_id=job_id))

    async def by_key(self, key: str) -> JobRecord | None:
        return await self._run(partial(self._queries.by_key, key=key))

    async def by_task(self, task_id: str) -> JobRecord | None:
        return await self._run(partial(self._queries.by_task, task_id=task_id))

    async def unfinished(self) -> AsyncIterator[JobRecord]:
        async for record in self.jobs(OPEN_JOBS):
            yield record

    async def jobs(self, query: JobQuery = ALL_JOBS) -> AsyncIterator[JobRecord]:
        place: Place | None = start(query)
        while place is not None:
            page, place = await self._run(partial(self._queries.listed, query=query, place=place))
            for record in page:
                yield record

    async def unsaved(self, since: float) -> AsyncIterator[JobRecord]:
        place: Place | None = FIRST
        while place is not None:
            page, place = await self._run(partial(self._queries.unsaved, since=since, after=place))
            for record in page:
                yield record

    async def claim(self, now: float, *, limit: int, lease_s: float) -> list[JobRecord]:
        return await self._run(partial(self._queries.claim, now=now, limit=limit, lease_s=lease_s))

    async def next_due(self) -> float | None:
        return await self._run(self._queries.next_due)

    async def hand_over(self, now: float, *, lease_s: float) -> HandedOver | None:
        return await self._run(partial(self._queries.hand_over, now=now, lease_s=lease_s))

    async def next_handover(self, now: float) -> float | None:
        return await self._run(partial(self._queries.next_handover, now=now))

    async def recover_orphans(self, now: float, *, doubt_s: float, per_second: float) -> int:
        work = partial(self._queries.recover_orphans, now=now, doubt_s=doubt_s, per_second=per_second)
        return await self._run(work)

    async def purge(self, older_than: timedelta | float, *, now: float | None = None) -> int:
        before = (SystemClock().time() if now is None else now) - seconds(older_than)
        if self._file.read_only:
            raise StoreError(f"{self._path} was opened read-only: it is a readonly database. Nothing was forgotten.")
        purged = 0
        place: Place | None = FIRST
        while place is not None:  # page by page: a submit does not wait for the whole of it
            in_hand = frozenset[str]() if self._watcher is None else self._watcher.in_hand()
            work = partial(self._queries.purge, before=before, after=place, in_hand=in_hand)
            count, place = await self._run(work)
            purged += count
        await self._give_space_back()
        return purged

    async def _give_space_back(self) -> None:
        """In pieces: submits and callbacks go on between them. If it fails, nothing is lost but space."""
        try:
            while await self._run(give_space_back, in_transaction=False):
                pass
        except StoreError as error:
            name = self._path.name
            log.warning("the store %s has forgotten what was purged, but did not become smaller: %s", name, error)
