"""The tables of a SQLite store, how older files become newer ones, and what SQLite is told to do."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Final

from xiling_async.stores.base import UnusableDatabase

# One script a version; `user_version` says how many have run. Scripts are only ever added at the end.
MIGRATIONS: Final = (
    """
    CREATE TABLE jobs (
        id TEXT NOT NULL UNIQUE, key TEXT UNIQUE, kind TEXT NOT NULL, request TEXT, asked INTEGER NOT NULL,
        created_at REAL NOT NULL, changed_at REAL NOT NULL, state TEXT NOT NULL, attempt INTEGER NOT NULL,
        tasks TEXT NOT NULL, refusal TEXT, due_at REAL, failed_asks INTEGER NOT NULL, version INTEGER NOT NULL
    );
    CREATE TABLE tasks (task_id TEXT PRIMARY KEY, job_id TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE kept (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
    CREATE INDEX jobs_due ON jobs (due_at) WHERE due_at IS NOT NULL;
    CREATE INDEX jobs_open ON jobs (created_at, id) WHERE state IN ('sending', 'uncertain', 'accepted');
    """,
    """
    ALTER TABLE jobs ADD COLUMN is_adopted INTEGER NOT NULL DEFAULT 0;
    UPDATE jobs SET is_adopted = 1 WHERE request IS NULL;
    """,
    # Jobs that had ended count as acknowledged. `unsaved` is exact for what is written from now on; of the jobs of the
    # last eight days (results live seven) all that have a result are looked at once.
    """
    ALTER TABLE jobs ADD COLUMN metadata TEXT;
    ALTER TABLE jobs ADD COLUMN retry_of TEXT;
    ALTER TABLE jobs ADD COLUMN handover_at REAL;
    ALTER TABLE jobs ADD COLUMN unsaved INTEGER NOT NULL DEFAULT 0;
    UPDATE jobs SET handover_at = 0 WHERE state IN ('sending', 'uncertain', 'accepted');
    UPDATE jobs SET unsaved = 1 WHERE changed_at > strftime('%s', 'now') - 691200 AND tasks LIKE '%"succeeded"%';
    CREATE TABLE metadata (
        pair BLOB NOT NULL, created_at REAL NOT NULL, job_id TEXT NOT NULL, PRIMARY KEY (pair, created_at, job_id)
    ) WITHOUT ROWID;
    DROP INDEX jobs_open;
    CREATE INDEX jobs_age ON jobs (created_at, id);
    CREATE INDEX jobs_state ON jobs (state, created_at, id);
    CREATE INDEX jobs_kind ON jobs (kind, state, created_at, id);
    CREATE INDEX jobs_handover ON jobs (changed_at, id, handover_at)
        WHERE handover_at IS NOT NULL AND state IN ('done', 'failed', 'expired', 'unknown');
    CREATE INDEX jobs_unsaved ON jobs (changed_at, id) WHERE unsaved = 1;
    CREATE INDEX jobs_ended ON jobs (changed_at, id) WHERE state NOT IN ('sending', 'uncertain', 'accepted');
    """,
)
APPLICATION: Final = int.from_bytes(b"xlng")  # `application_id`: whose database it is

# Read back after they are set: SQLite ignores what it cannot do. EXCLUSIVE before WAL: then WAL needs no shared memory,
# and every other program is refused (SQLite before 3.51.3 can lose data in WAL mode with several connections).
# FULL: an fsync a commit. fullfsync: on macOS a plain fsync does not reach the disk.
_INCREMENTAL: Final = 2  # auto_vacuum: the file shrinks when it is told to
_PIECE: Final = 256  # pages of 4 KiB
_FIRST: Final = ("locking_mode", "exclusive")
_PRAGMAS: Final = (
    ("journal_mode", "wal"), ("synchronous", 2), ("fullfsync", 1), ("checkpoint_fullfsync", 1), ("cache_size", -16_000),
)  # fmt: skip


def prepare(connection: sqlite3.Connection) -> None:
    """Make the file ours and today's. Raises `UnusableDatabase` or `sqlite3.Error`; a foreign file is not touched."""
    _set(connection, *_FIRST)
    _check(connection, len(MIGRATIONS))
    if connection.execute("PRAGMA user_version").fetchone() == (0,):
        connection.execute(f"PRAGMA auto_vacuum = {_INCREMENTAL}")  # possible before the first table only
    for pragma in _PRAGMAS:
        _set(connection, *pragma)
    migrate(connection, MIGRATIONS)
    connection.execute("BEGIN IMMEDIATE")  # a file that cannot be written is refused now, not at the first job
    connection.execute("COMMIT")


def give_space_back(connection: sqlite3.Connection) -> bool:
    """Make the file smaller by a piece, which takes some milliseconds; returns whether there is more to give back. A
    file that was made before files could shrink piece by piece is rewritten once, which takes as much space again
    meanwhile."""
    (free,) = connection.execute("PRAGMA freelist_count").fetchone()
    if free and connection.execute("PRAGMA auto_vacuum").fetchone() != (_INCREMENTAL,):
        connection.execute(f"PRAGMA auto_vacuum = {_INCREMENTAL}")
        connection.execute("VACUUM")
    elif free:
        connection.executescript(f"PRAGMA incremental_vacuum({_PIECE})")  # `execute` would do its first page alone
        if free > _PIECE:
            return True
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    return False


def migrate_copy(connection: sqlite3.Connection) -> None:
    """Make a copy of a store today's, and let nothing else be written into it. Raises as `prepare` does."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    _check(connection, len(MIGRATIONS))
    if not version:
        raise UnusableDatabase("it is empty")
    migrate(connection, MIGRATIONS)
    _set(connection, "query_only", 1)


def _set(connection: sqlite3.Connection, name: str, wanted: str | int) -> None:
    connection.execute(f"PRAGMA {name} = {wanted}")
    got = connection.execute(f"PRAGMA {name}").fetchone()
    if got != (wanted,):
        raise UnusableDatabase(f"SQLite does not do {name}={wanted} here (it says {got})")


def _check(connection: sqlite3.Connection, known: int) -> None:
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
    if application != APPLICATION and (application or version or tables):
        raise UnusableDatabase("it is the database of another application; give the store a file of its own")
    if version > known:
        raise UnusableDatabase(
            f"it was written by a newer xiling_async (its schema is {version}, this one knows {known}); upgrade the "
            "package. The file was not touched"
        )


def migrate(connection: sqlite3.Connection, scripts: Sequence[str]) -> None:
    """Run the scripts that the file has not seen, in one transaction: one that fails leaves the file as it was."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version < len(scripts):
        mark = f"PRAGMA application_id = {APPLICATION}; PRAGMA user_version = {len(scripts)}"
        connection.executescript(f"BEGIN IMMEDIATE; {'; '.join(scripts[version:])}; {mark}; COMMIT;")
