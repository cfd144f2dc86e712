"""A store in one SQLite file, for one process: every change is on the disk before it counts."""

from __future__ import annotations

import contextlib
import os
import socket
import sqlite3
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, TypeVar

from attrs import asdict

from xiling_async.clock import SystemClock
from xiling_async.errors import StoreError
from xiling_async.lifecycle import Change, Event, Verdict, decide
from xiling_async.models import JobRecord, State
from xiling_async.store.base import LEFT_BEHIND, SPREAD_S, seconds
from xiling_async.store.rows import outcome_of, outcome_row, refusal_of, refusal_row, request_of, request_row
from xiling_async.store.writer import Work, Writer

T = TypeVar("T")

# One script a version; `user_version` says how many have run. Scripts are only ever added at the end.
MIGRATIONS: Final = (
    """
    CREATE TABLE jobs (
        id TEXT PRIMARY KEY, key TEXT UNIQUE, kind TEXT NOT NULL, request TEXT, asked INTEGER NOT NULL,
        created_at REAL NOT NULL, changed_at REAL NOT NULL, state TEXT NOT NULL, attempt INTEGER NOT NULL,
        refusal TEXT, due_at REAL, failed_asks INTEGER NOT NULL, version INTEGER NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE tasks (
        task_id TEXT PRIMARY KEY, job_id TEXT NOT NULL, place INTEGER NOT NULL, outcome TEXT
    ) WITHOUT ROWID;
    CREATE TABLE kept (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
    CREATE INDEX tasks_of_job ON tasks (job_id, place);
    CREATE INDEX jobs_due ON jobs (due_at) WHERE due_at IS NOT NULL;
    CREATE INDEX jobs_open ON jobs (created_at, id) WHERE state IN ('sending', 'uncertain', 'accepted');
    """,
)

_COLUMNS: Final = (
    "id", "key", "kind", "request", "asked", "created_at", "changed_at", "state", "attempt", "refusal", "due_at",
    "failed_asks", "version",
)  # fmt: skip
_SELECT: Final = f"SELECT {', '.join(_COLUMNS)} FROM jobs"  # noqa: S608 - our own column names
_INSERT: Final = f"INSERT INTO jobs ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))})"  # noqa: S608
_UPDATE: Final = (
    "UPDATE jobs SET asked = ?, changed_at = ?, state = ?, attempt = ?, refusal = ?, due_at = ?, failed_asks = ?, "
    "version = ? WHERE id = ?"
)
_OPEN: Final = "state IN ('sending', 'uncertain', 'accepted')"
_PAGE: Final = 500

# Read back after they are set: SQLite ignores what it cannot do. EXCLUSIVE first: then WAL needs no shared memory, and
# a second process is refused (SQLite before 3.51.3 can lose data in WAL mode with several connections).
_PRAGMAS: Final = (("locking_mode", "exclusive"), ("journal_mode", "wal"), ("synchronous", 2), ("foreign_keys", 1))


class SQLiteStore:
    """Remembers jobs in the file `path`: they survive a crash, a `kill -9`, and (as far as the disk keeps its promises)
    a power cut. The file is readable by its owner alone. One process at a time; several need a `PostgresStore`.

    `connect`: how to open the file (for tests).
    """

    def __init__(
        self, path: str | os.PathLike[str], *, connect: Callable[..., sqlite3.Connection] = sqlite3.connect
    ) -> None:
        self._path = Path(path).absolute()
        self._connect_file = connect
        self._writer: Writer | None = None

    def __repr__(self) -> str:
        return f"<SQLiteStore {self._path.name}>"

    # --- life ----------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        if self._writer is not None:
            raise StoreError(f"{self._path} is in use by another client of this process: share the client instead.")
        writer = Writer(self._connect, str(self._path))
        await writer.start()
        self._writer = writer

    async def close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            await writer.stop()

    async def _run(self, work: Work[T]) -> T:
        if self._writer is None:
            raise StoreError(f"{self._path} is not open.")
        return await self._writer.run(work)

    def _connect(self) -> sqlite3.Connection:
        with contextlib.ExitStack() as undo:
            try:
                # Made by us and not by SQLite, so that nobody else can read it; its -wal file takes the same mode.
                os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600))
                connection = self._connect_file(self._path, timeout=0.5, isolation_level=None, check_same_thread=False)
                undo.callback(connection.close)
                self._prepare(connection)
                self._migrate(connection)
                self._owner_file.write_text(f"process {os.getpid()} on {socket.gethostname()}")
            except (sqlite3.Error, OSError) as error:
                raise self._refused(error) from error
            undo.pop_all()
        return connection

    @property
    def _owner_file(self) -> Path:
        return self._path.with_name(self._path.name + "-owner")

    def _refused(self, error: Exception) -> StoreError:
        if "locked" in str(error):
            owner = "another process"
            with contextlib.suppress(OSError):
                owner = self._owner_file.read_text()[:200]
            return StoreError(
                f"{self._path} is held by {owner}. One process at a time may use a SQLiteStore: stop that one, "
                "or let several share a PostgresStore. Nothing was sent."
            )
        return StoreError(f"{self._path} cannot be used as a store: {error}. Nothing was sent.")

    def _prepare(self, connection: sqlite3.Connection) -> None:
        for name, wanted in _PRAGMAS:
            connection.execute(f"PRAGMA {name} = {wanted}")
            got = connection.execute(f"PRAGMA {name}").fetchone()
            if got != (wanted,):
                raise StoreError(f"{self._path}: SQLite does not do {name}={wanted} here (it says {got}).")

    def _migrate(self, connection: sqlite3.Connection) -> None:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version > len(MIGRATIONS):
            raise StoreError(
                f"{self._path} was written by a newer xiling_async (its schema is {version}, this one knows "
                f"{len(MIGRATIONS)}): upgrade the package. The file was not touched."
            )
        for number, script in enumerate(MIGRATIONS[version:], version + 1):
            connection.executescript(f"BEGIN IMMEDIATE; {script} PRAGMA user_version = {number}; COMMIT;")
        connection.execute("BEGIN IMMEDIATE")  # takes the file now, not at the first job
        connection.execute("COMMIT")

    # --- what base.py promises -----------------------------------------------------------------------------------

    async def secret(self, fresh: bytes) -> bytes:
        def work(connection: sqlite3.Connection) -> bytes:
            connection.execute("INSERT OR IGNORE INTO kept VALUES ('webhook secret', ?)", (fresh,))
            (kept,) = connection.execute("SELECT value FROM kept WHERE name = 'webhook secret'").fetchone()
            return bytes(kept)

        return await self._run(work)

    async def add(self, record: JobRecord) -> JobRecord:
        def work(connection: sqlite3.Connection) -> JobRecord:
            known = _read(connection, "id", record.id)
            if known is None and record.key is not None:
                known = _read(connection, "key", record.key)
            if known is not None:
                return known
            connection.execute(_INSERT, _job_row(record))
            _write_tasks(connection, record)
            return record

        return await self._run(work)

    async def change(self, job_id: str, event: Event) -> Change:
        def work(connection: sqlite3.Connection) -> Change:
            record = _read(connection, "id", job_id)
            if record is None:
                return Change(Verdict.NO_JOB, None)
            change = decide(record, event)
            if change.verdict is Verdict.APPLIED and change.record is not None:
                if any(_owner(connection, task_id) not in (None, job_id) for task_id in change.record.task_ids):
                    return Change(Verdict.STRANGE, record)
                _write(connection, record, change.record)
            return change

        return await self._run(work)

    async def get(self, job_id: str) -> JobRecord | None:
        return await self._run(lambda connection: _read(connection, "id", job_id))

    async def by_key(self, key: str) -> JobRecord | None:
        return await self._run(lambda connection: _read(connection, "key", key))

    async def by_task(self, task_id: str) -> JobRecord | None:
        return await self._run(lambda connection: _read(connection, "id", _owner(connection, task_id)))

    async def unfinished(self) -> AsyncIterator[JobRecord]:
        after: tuple[float, str] = (float("-inf"), "")
        while page := await self._run(lambda connection, after=after: _page(connection, after)):  # type: ignore[misc]
            for record in page:
                yield record
            after = (page[-1].created_at, page[-1].id)

    async def claim(self, now: float, *, limit: int, lease_s: float) -> list[JobRecord]:
        def work(connection: sqlite3.Connection) -> list[JobRecord]:
            due = connection.execute("SELECT id FROM jobs WHERE due_at <= ? ORDER BY due_at LIMIT ?", (now, limit))
            ids = due.fetchall()
            connection.executemany(
                "UPDATE jobs SET due_at = ?, version = version + 1 WHERE id = ?", [(now + lease_s, *row) for row in ids]
            )
            return [record for (job_id,) in ids if (record := _read(connection, "id", job_id)) is not None]

        return await self._run(work)

    async def next_due(self) -> float | None:
        def work(connection: sqlite3.Connection) -> float | None:
            (due_at,) = connection.execute("SELECT MIN(due_at) FROM jobs WHERE due_at IS NOT NULL").fetchone()
            return None if due_at is None else float(due_at)

        return await self._run(work)

    async def takeover(self, now: float, *, doubt_s: float, per_second: float) -> int:
        def work(connection: sqlite3.Connection) -> int:
            connection.execute(
                "UPDATE jobs SET state = 'uncertain', refusal = ?, changed_at = ?, due_at = ?, version = version + 1 "
                "WHERE state = 'sending'",
                (refusal_row(LEFT_BEHIND), now, now + doubt_s),
            )
            connection.execute(
                "UPDATE jobs SET due_at = MIN(due_at, ?), version = version + 1 WHERE state = 'uncertain'",
                (now + doubt_s,),
            )
            (count,) = connection.execute(f"SELECT COUNT(*) FROM jobs WHERE {_OPEN}").fetchone()  # noqa: S608
            connection.execute(
                "UPDATE jobs SET due_at = ? + ? * (ABS(RANDOM()) % 1000) / 1000.0, version = version + 1 "
                "WHERE state = 'accepted'",
                (now, min(SPREAD_S, count / per_second)),
            )
            return int(count)

        return await self._run(work)

    async def purge(self, older_than: timedelta | float) -> int:
        before = SystemClock().time() - seconds(older_than)

        def work(connection: sqlite3.Connection) -> int:
            old = f"FROM jobs WHERE NOT {_OPEN} AND changed_at < ?"
            connection.execute(f"DELETE FROM tasks WHERE job_id IN (SELECT id {old})", (before,))  # noqa: S608
            return connection.execute(f"DELETE {old}", (before,)).rowcount

        return await self._run(work)


# --- rows ------------------------------------------------------------------------------------------------------------


def _job_row(record: JobRecord) -> tuple[Any, ...]:
    values = asdict(record, recurse=False)
    values["request"] = request_row(record.request)
    values["refusal"] = refusal_row(record.refusal)
    values["state"] = record.state.value
    return tuple(values[name] for name in _COLUMNS)


def _record(connection: sqlite3.Connection, row: tuple[Any, ...]) -> JobRecord:
    values = dict(zip(_COLUMNS, row, strict=True))
    tasks = connection.execute(
        "SELECT task_id, outcome FROM tasks WHERE job_id = ? ORDER BY place", (values["id"],)
    ).fetchall()
    values["request"] = request_of(values["kind"], values["request"])
    values["refusal"] = refusal_of(values["refusal"])
    values["state"] = State(values["state"])
    values["task_ids"] = tuple(task_id for task_id, _ in tasks)
    values["outcomes"] = tuple(outcome_of(values["kind"], task_id, outcome) for task_id, outcome in tasks)
    return JobRecord(**values)


def _read(connection: sqlite3.Connection, column: str, value: str | None) -> JobRecord | None:
    row = connection.execute(f"{_SELECT} WHERE {column} = ?", (value,)).fetchone()
    return None if row is None else _record(connection, row)


def _page(connection: sqlite3.Connection, after: tuple[float, str]) -> list[JobRecord]:
    where = f"{_SELECT} WHERE {_OPEN} AND (created_at, id) > (?, ?) ORDER BY created_at, id LIMIT {_PAGE}"
    return [_record(connection, row) for row in connection.execute(where, after).fetchall()]


def _owner(connection: sqlite3.Connection, task_id: str) -> str | None:
    row = connection.execute("SELECT job_id FROM tasks WHERE task_id = ?", (task_id,)).fetchone()
    return None if row is None else str(row[0])


def _write(connection: sqlite3.Connection, before: JobRecord, record: JobRecord) -> None:
    connection.execute(
        _UPDATE,
        (
            record.asked, record.changed_at, record.state.value, record.attempt, refusal_row(record.refusal),
            record.due_at, record.failed_asks, record.version, record.id,
        ),
    )  # fmt: skip
    if before.task_ids != record.task_ids:
        connection.execute("DELETE FROM tasks WHERE job_id = ?", (record.id,))
        _write_tasks(connection, record)
        return
    for task_id, old, new in zip(record.task_ids, before.outcomes, record.outcomes, strict=True):
        if old is not new:
            connection.execute("UPDATE tasks SET outcome = ? WHERE task_id = ?", (outcome_row(new), task_id))


def _write_tasks(connection: sqlite3.Connection, record: JobRecord) -> None:
    connection.executemany(
        "INSERT INTO tasks VALUES (?, ?, ?, ?)",
        [
            (task_id, record.id, place, outcome_row(outcome))
            for place, (task_id, outcome) in enumerate(zip(record.task_ids, record.outcomes, strict=True))
        ],
    )
