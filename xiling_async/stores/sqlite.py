"""A store in one SQLite file, for one process: every change is on the disk before it counts."""

# ruff: noqa: S608 - statements are put together from our own words only

from __future__ import annotations

import json
import logging
import os
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from attrs import evolve

from xiling_async._internal.clock import SystemClock
from xiling_async.errors import StoreError
from xiling_async.models.lifecycle import Change, Event, Verdict, decide
from xiling_async.models.ownership import give_way
from xiling_async.models.record import LEFT_BEHIND, JobRecord
from xiling_async.models.settings import instance, path_of
from xiling_async.stores.base import SPREAD_S, Watcher, seconds
from xiling_async.stores.rows import COLUMNS, RowReader, corrected_row, record_of, refusal_row, row_of, tasks_row
from xiling_async.stores.sqlite_file import IN_USE_HERE, DatabaseFile
from xiling_async.stores.sqlite_writer import Work, Writer

log = logging.getLogger("xiling_async.stores")

T = TypeVar("T")

_SELECT: Final = f"SELECT {', '.join(f'jobs.{name}' for name in COLUMNS)} FROM jobs"
_BY_ID: Final = f"{_SELECT} WHERE id = ?"
_BY_KEY: Final = f"{_SELECT} WHERE key = ?"
_BY_TASK: Final = f"{_SELECT} WHERE id = (SELECT job_id FROM tasks WHERE task_id = ?)"
_INSERT: Final = f"INSERT INTO jobs ({', '.join(COLUMNS)}) VALUES ({', '.join('?' * len(COLUMNS))})"
_UPDATE: Final = (
    "UPDATE jobs SET asked = ?, changed_at = ?, state = ?, attempt = ?, tasks = ?, refusal = ?, due_at = ?, "
    "failed_asks = ?, version = ?, request = COALESCE(?, request) WHERE id = ?"
)
_OPEN: Final = "state IN ('sending', 'uncertain', 'accepted')"  # in the words of the index, so that SQLite takes it
_PAGE: Final = 500
_PURGE: Final = 5_000  # jobs looked at in one piece of work


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
        self._reader = RowReader(record_of)
        self._writer: Writer | None = None
        self._watcher: Watcher | None = None

    def __repr__(self) -> str:
        return f"<SQLiteStore {self._path.name}>"

    # --- life ----------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        if self._writer is not None:
            self._writer.check_process()
            raise StoreError(f"{self._path} {IN_USE_HERE}")
        self._reader = RowReader(record_of)
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
        return len(self._reader.skipped)

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
        def work(connection: sqlite3.Connection) -> bytes:
            connection.execute("INSERT OR IGNORE INTO kept VALUES ('webhook secret', ?)", (fresh,))
            (kept,) = connection.execute("SELECT value FROM kept WHERE name = 'webhook secret'").fetchone()
            return bytes(kept)

        return await self._run(work)

    async def add(self, record: JobRecord) -> JobRecord:
        def work(connection: sqlite3.Connection) -> JobRecord:
            known = _read(connection, _BY_ID, record.id)
            if known is None and record.key is not None:
                known = _read(connection, _BY_KEY, record.key)
            for task_id in record.owned_ids:
                known = known or _read(connection, _BY_TASK, task_id)
            if known is not None:
                return known
            connection.execute(_INSERT, row_of(record))
            _own(connection, record.id, record.owned_ids)
            return record

        return await self._run(work)

    async def change(self, job_id: str, event: Event) -> Change:
        def work(connection: sqlite3.Connection) -> Change:
            record = _read(connection, _BY_ID, job_id)
            if record is None:
                return Change(Verdict.NO_JOB, None)
            change = decide(record, event)
            if change.verdict is not Verdict.APPLIED or change.record is None:
                return change
            changed = change.record
            if changed.task_ids is not record.task_ids:
                before, after = set(record.owned_ids), set(changed.owned_ids)
                new = after - before
                owners = _owners(connection, new)
                others = give_way(owners, changed, event)
                if others is None:
                    return Change(Verdict.UNKNOWN_TASK, record)
                for owner, other in zip(owners, others, strict=True):
                    assert other.record is not None, "what gave way is written"
                    _disown(connection, set(owner.owned_ids) - set(other.record.owned_ids))
                    _write(connection, other.record)
                change = evolve(change, others=others) if others else change
                _own(connection, job_id, new)
                _disown(connection, before - after)
            _write(connection, changed)
            return change

        return await self._run(work)

    async def get(self, job_id: str) -> JobRecord | None:
        return await self._run(lambda connection: _read(connection, _BY_ID, job_id))

    async def by_key(self, key: str) -> JobRecord | None:
        return await self._run(lambda connection: _read(connection, _BY_KEY, key))

    async def by_task(self, task_id: str) -> JobRecord | None:
        return await self._run(lambda connection: _read(connection, _BY_TASK, task_id))

    async def unfinished(self) -> AsyncIterator[JobRecord]:
        after: tuple[float, str] | None = (float("-inf"), "")
        while after is not None:
            page, after = await self._run(partial(_page, reader=self._reader, after=after))
            for record in page:
                yield record

    async def jobs(self) -> AsyncIterator[JobRecord]:
        before: int | None = 2**63 - 1
        while before is not None:
            page, before = await self._run(partial(_newest, reader=self._reader, before=before))
            for record in page:
                yield record

    async def claim(self, now: float, *, limit: int, lease_s: float) -> list[JobRecord]:
        def work(connection: sqlite3.Connection) -> list[JobRecord]:
            due = connection.execute(f"{_SELECT} WHERE due_at <= ? ORDER BY due_at LIMIT ?", (now, limit)).fetchall()
            connection.executemany(
                "UPDATE jobs SET due_at = ?, version = version + 1 WHERE id = ?",
                [(now + lease_s, row[0]) for row in due],
            )
            return [record.next_version(due_at=now + lease_s) for record in self._reader.records(due)]

        return await self._run(work)

    async def next_due(self) -> float | None:
        def work(connection: sqlite3.Connection) -> float | None:
            (due_at,) = connection.execute("SELECT MIN(due_at) FROM jobs WHERE due_at IS NOT NULL").fetchone()
            return None if due_at is None else float(due_at)

        return await self._run(work)

    async def recover_orphans(self, now: float, *, doubt_s: float, per_second: float) -> int:
        until = now + doubt_s

        def work(connection: sqlite3.Connection) -> int:
            connection.execute(
                "UPDATE jobs SET state = 'uncertain', refusal = ?, changed_at = ?, due_at = ?, version = version + 1 "
                f"WHERE {_OPEN} AND state = 'sending'",
                (refusal_row(LEFT_BEHIND), now, until),
            )
            connection.execute(
                "UPDATE jobs SET due_at = MIN(COALESCE(due_at, ?), ?), version = version + 1 "
                f"WHERE {_OPEN} AND state = 'uncertain' AND (due_at IS NULL OR due_at > ?)",
                (now, until, until),
            )
            (count,) = connection.execute(f"SELECT COUNT(*) FROM jobs WHERE {_OPEN}").fetchone()
            connection.execute(
                "UPDATE jobs SET due_at = ? + ? * (RANDOM() & 1023) / 1024.0, version = version + 1 "
                f"WHERE {_OPEN} AND state = 'accepted'",
                (now, min(SPREAD_S, count / per_second)),
            )
            return int(count)

        return await self._run(work)

    async def purge(self, older_than: timedelta | float) -> int:
        before = SystemClock().time() - seconds(older_than)
        purged = 0
        after: int | None = 0
        while after is not None:  # page by page: a submit does not wait for the whole of it
            in_hand = frozenset[str]() if self._watcher is None else self._watcher.in_hand()
            count, after = await self._run(
                partial(_purge, reader=self._reader, before=before, after=after, in_hand=in_hand)
            )
            purged += count
        return purged


# --- rows and pages --------------------------------------------------------------------------------------------------


def _read(connection: sqlite3.Connection, query: str, name: str) -> JobRecord | None:
    row = connection.execute(query, (name,)).fetchone()
    return None if row is None else record_of(row)


def _page(
    connection: sqlite3.Connection, reader: RowReader, after: tuple[float, str]
) -> tuple[list[JobRecord], tuple[float, str] | None]:
    where = f"{_SELECT} WHERE {_OPEN} AND (created_at, id) > (?, ?) ORDER BY created_at, id LIMIT {_PAGE}"
    rows = connection.execute(where, after).fetchall()
    created_at = COLUMNS.index("created_at")
    return reader.records(rows), (rows[-1][created_at], rows[-1][0]) if rows else None


def _newest(connection: sqlite3.Connection, reader: RowReader, before: int) -> tuple[list[JobRecord], int | None]:
    query = f"SELECT {', '.join(COLUMNS)}, rowid FROM jobs WHERE rowid < ? ORDER BY rowid DESC LIMIT {_PAGE}"
    rows = connection.execute(query, (before,)).fetchall()
    return reader.records(row[:-1] for row in rows), rows[-1][-1] if rows else None


def _write(connection: sqlite3.Connection, record: JobRecord) -> None:
    connection.execute(
        _UPDATE,
        (
            record.asked, record.changed_at, record.state.value, record.attempt, tasks_row(record),
            refusal_row(record.refusal), record.due_at, record.failed_asks, record.version, corrected_row(record),
            record.id,
        ),
    )  # fmt: skip


def _own(connection: sqlite3.Connection, job_id: str, task_ids: Iterable[str]) -> None:
    connection.executemany("INSERT INTO tasks VALUES (?, ?)", [(task_id, job_id) for task_id in task_ids])


def _owners(connection: sqlite3.Connection, task_ids: Iterable[str]) -> list[JobRecord]:
    held = (_read(connection, _BY_TASK, task_id) for task_id in task_ids)
    return list({record.id: record for record in held if record is not None}.values())


def _disown(connection: sqlite3.Connection, task_ids: Iterable[str]) -> None:
    connection.executemany("DELETE FROM tasks WHERE task_id = ?", [(task_id,) for task_id in task_ids])


def _purge(
    connection: sqlite3.Connection, reader: RowReader, before: float, after: int, in_hand: frozenset[str]
) -> tuple[int, int | None]:
    """Forget what ended before then, among the next rows; how many, and the last of those rows if there may be more."""
    (last,) = connection.execute(
        f"SELECT MAX(rowid) FROM (SELECT rowid FROM jobs WHERE rowid > ? ORDER BY rowid LIMIT {_PURGE})",
        (after,),
    ).fetchone()
    if last is None:
        return 0, None
    kept = "id NOT IN (SELECT value FROM json_each(?))"
    old = f"FROM jobs WHERE rowid > ? AND rowid <= ? AND NOT {_OPEN} AND changed_at < ? AND {kept}"
    chosen = (after, last, before, json.dumps([*in_hand]))
    ended = connection.execute(f"SELECT {', '.join(COLUMNS)} {old}", chosen).fetchall()
    for record in reader.records(ended):
        _disown(connection, record.owned_ids)
    return connection.execute(f"DELETE {old}", chosen).rowcount, last
