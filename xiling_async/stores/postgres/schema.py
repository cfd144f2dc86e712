"""The tables of a PostgreSQL store, their names, and how older ones become newer ones.

In a rolling upgrade, processes of the version before that are open go on with the newer tables. The jobs that they make
and end are handed over, though consumers that wait learn of it only after some heartbeats. What an old process does not
do: set `unsaved` (a client that saves results and starts later does not look for such a result), hand over the second
end of a job that was acknowledged, and keep in a purge what was not acknowledged. It has no consumers itself. One that
starts again is refused, since the tables are newer than it knows.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any, Final, Protocol

from attrs import frozen

from xiling_async.stores.base import UnusableDatabase

# One script a version; the row `schema` of `kept` says how many have run. Scripts are only ever added at the end.
# Names may be any text: `key` and `id` hold it as `quoted`, and what must be unique is a hash (an index takes no entry
# above 2,700 bytes). `owner`: which open store is sending the job, or has
# claimed it to ask about it. `mark`: of the newest change, so that a COMMIT whose
# answer was lost can be told from one that never was.
MIGRATIONS: Final = (
    """
    CREATE TABLE {kept} (name TEXT PRIMARY KEY, value BYTEA NOT NULL);
    CREATE TABLE {jobs} (
        id TEXT COLLATE "C" PRIMARY KEY, key TEXT, kind TEXT NOT NULL, request TEXT, asked BIGINT NOT NULL,
        created_at DOUBLE PRECISION NOT NULL, changed_at DOUBLE PRECISION NOT NULL, state TEXT NOT NULL,
        attempt BIGINT NOT NULL, tasks TEXT NOT NULL, refusal TEXT, due_at DOUBLE PRECISION,
        failed_asks BIGINT NOT NULL, version BIGINT NOT NULL,
        key_hash BYTEA UNIQUE, owner TEXT, mark TEXT NOT NULL
    );
    CREATE TABLE {tasks} (
        hash BYTEA PRIMARY KEY, job_id TEXT COLLATE "C" NOT NULL REFERENCES {jobs} ON DELETE CASCADE
    );
    CREATE TABLE {owners} (id TEXT PRIMARY KEY, place TEXT NOT NULL, until TIMESTAMPTZ NOT NULL);
    CREATE INDEX {tasks_job} ON {tasks} (job_id);
    CREATE INDEX {jobs_age} ON {jobs} (created_at, id);
    CREATE INDEX {jobs_due} ON {jobs} (due_at) WHERE due_at IS NOT NULL;
    CREATE INDEX {jobs_open} ON {jobs} (created_at, id) WHERE state IN ('sending', 'uncertain', 'accepted');
    CREATE INDEX {jobs_over} ON {jobs} (changed_at) WHERE state NOT IN ('sending', 'uncertain', 'accepted');
    CREATE INDEX {jobs_owned} ON {jobs} (owner) WHERE owner IS NOT NULL;
    """,
    """
    ALTER TABLE {jobs} ADD COLUMN is_adopted BOOLEAN NOT NULL DEFAULT FALSE;
    UPDATE {jobs} SET is_adopted = TRUE WHERE request IS NULL;
    """,
    # A job that a process of an older version makes or ends while this schema is in use is handed over as any other.
    # Jobs that had ended count as acknowledged: their rows are not written again, however many there are. `unsaved` is
    # exact for what is written from now on; of the jobs of the last eight days (results live seven) all that have a
    # result are looked at once.
    """
    ALTER TABLE {jobs} ADD COLUMN metadata TEXT, ADD COLUMN retry_of TEXT,
        ADD COLUMN handover_at DOUBLE PRECISION, ADD COLUMN unsaved BOOLEAN NOT NULL DEFAULT FALSE;
    ALTER TABLE {jobs} ALTER COLUMN handover_at SET DEFAULT 0;
    UPDATE {jobs} SET handover_at = 0 WHERE state IN ('sending', 'uncertain', 'accepted');
    UPDATE {jobs} SET unsaved = TRUE
        WHERE changed_at > extract(epoch FROM clock_timestamp()) - 691200 AND tasks LIKE '%"succeeded"%';
    CREATE TABLE {metadata} (
        pair BYTEA, created_at DOUBLE PRECISION, job_id TEXT COLLATE "C" REFERENCES {jobs} ON DELETE CASCADE,
        PRIMARY KEY (pair, created_at, job_id)
    );
    CREATE INDEX {metadata_job} ON {metadata} (job_id);
    DROP INDEX {schema}.{jobs_open};
    CREATE INDEX {jobs_state} ON {jobs} (state, created_at, id);
    CREATE INDEX {jobs_kind} ON {jobs} (kind, state, created_at, id);
    CREATE INDEX {jobs_handover} ON {jobs} (changed_at, id)
        WHERE handover_at IS NOT NULL AND state IN ('done', 'failed', 'expired', 'unknown');
    CREATE INDEX {jobs_unsaved} ON {jobs} (changed_at, id) WHERE unsaved;
    """,
)
_SET_VERSION: Final = """
    INSERT INTO {kept} VALUES ('schema', $1) ON CONFLICT (name) DO UPDATE SET value = EXCLUDED.value
"""
_GET_VERSION: Final = "SELECT value FROM {kept} WHERE name = 'schema'"
# Not `to_regclass`: within a transaction it may remember from before the lock that there was no such table.
_OWNERS: Final = """
    WITH found AS (
        SELECT NULL::text AS name, nspowner AS owner FROM pg_namespace WHERE nspname = $1
        UNION ALL
        SELECT c.relname::text, c.relowner FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
        WHERE n.nspname = $1 AND c.relname = ANY($2)
    )
    SELECT found.name, r.rolname::text, r.rolsuper OR r.rolname = current_user OR r.rolname = 'pg_database_owner' OR
        r.oid = (SELECT datdba FROM pg_database WHERE datname = current_database()) OR r.rolname = $3
    FROM found JOIN pg_roles AS r ON r.oid = found.owner
"""
_TABLES: Final = ("kept", "jobs", "tasks", "owners", "metadata")
_INDEXES: Final = (
    "tasks_job",
    "jobs_age",
    "jobs_due",
    "jobs_open",
    "jobs_over",
    "jobs_owned",
    "metadata_job",
    "jobs_state",
    "jobs_kind",
    "jobs_handover",
    "jobs_unsaved",
)
_PREFIX: Final = re.compile(r"[A-Za-z0-9_]{0,40}")
_SCHEMA_BYTES: Final = 63  # PostgreSQL cuts longer names


class Connection(Protocol):
    """What is used of a connection of asyncpg."""

    async def execute(self, query: str, *values: Any) -> str: ...

    async def fetch(self, query: str, *values: Any) -> list[Any]: ...

    async def fetchrow(self, query: str, *values: Any) -> Any: ...

    async def fetchval(self, query: str, *values: Any) -> Any: ...


@frozen
class Names:
    """Full names of the tables, since no search_path finds them."""

    schema: str
    prefix: str

    def __getitem__(self, name: str) -> str:
        """Of one of `_TABLES`; of an index the name alone, as CREATE INDEX wants it."""
        short = f'"{self.prefix}{name}"'
        return f"{identifier(self.schema)}.{short}" if name in _TABLES else short

    @property
    def tables(self) -> dict[str, str]:
        return {name: self[name] for name in _TABLES}

    @property
    def channel(self) -> str:
        """Of NOTIFY; all schemas of a database share one space of names."""
        whole = f"{self.schema}.{self.prefix}".encode()
        return f"xiling_{hashlib.sha256(whole).hexdigest()[:32]}"

    @property
    def lock(self) -> int:
        """The advisory lock of those who migrate."""
        return int.from_bytes(hashlib.sha256(self.channel.encode()).digest()[:8], signed=True)


def is_schema(name: str) -> bool:
    return 0 < len(name.encode("utf-8", "replace")) <= _SCHEMA_BYTES and "\0" not in name


def is_prefix(name: str) -> bool:
    return _PREFIX.fullmatch(name) is not None


def identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def quoted(name: str) -> str:
    """Any text as one that PostgreSQL takes: it refuses a NUL."""
    return name.replace("\\", "\\\\").replace("\0", "\\0")


def unquoted(text: str) -> str:
    return re.sub(r"\\([\\0])", lambda found: "\0" if found[1] == "0" else "\\", text)


def hashed(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


async def prepare(connection: Connection, names: Names, *, may_migrate: bool, trusted: str | None = None) -> None:
    """Make the tables today's, in the caller's transaction. Raises `UnusableDatabase`, or what the connection raises.

    One process at a time does it; one that finds them as they should be needs no rights but to use them. `trusted`: a
    role whose tables are accepted; see `_check_owners`.
    """
    version = await _version(connection, names, trusted)
    if version < len(MIGRATIONS) and not may_migrate:
        raise UnusableDatabase(
            f"there are no tables {names['jobs']} of schema {len(MIGRATIONS)} in it (what is there is {version}); "
            "a store that may migrate makes them"
        )
    if version != len(MIGRATIONS):
        await migrate(connection, names, MIGRATIONS, trusted=trusted)


async def migrate(connection: Connection, names: Names, scripts: Sequence[str], *, trusted: str | None = None) -> None:
    """Run the scripts that these tables have not seen. A transaction that fails leaves them as they were."""
    await connection.execute("SELECT pg_advisory_xact_lock($1)", names.lock)
    version = await _version(connection, names, trusted)
    if version > len(scripts):
        raise UnusableDatabase(
            f"it was written by a newer xiling_async (its schema is {version}, this one knows {len(scripts)}); upgrade "
            "the package. The database was not touched"
        )
    if not await connection.fetchval("SELECT 1 FROM pg_namespace WHERE nspname = $1", names.schema):
        await connection.execute(f"CREATE SCHEMA {identifier(names.schema)}")
    words = {"schema": identifier(names.schema), **{name: names[name] for name in (*_TABLES, *_INDEXES)}}
    for script in scripts[version:]:
        await connection.execute(script.format_map(words))
    await connection.execute(_SET_VERSION.format_map(words), str(len(scripts)).encode())


async def _version(connection: Connection, names: Names, trusted: str | None) -> int:
    tables = await _check_owners(connection, names, trusted)
    if f"{names.prefix}kept" not in tables:
        return 0
    value = await connection.fetchval(_GET_VERSION.format_map(names.tables))
    return 0 if value is None else int(value)


async def _check_owners(connection: Connection, names: Names, trusted: str | None) -> list[str]:
    """The names of our tables that exist. Raises `UnusableDatabase` if one of them, or the schema, belongs to a role
    that could be a neighbour's: its owner decides what is read from it, and reading a view runs code.

    Accepted are this role, a superuser, the owner of the database, and `trusted`. Membership in a role is not enough:
    before PostgreSQL 16 a role can make others members of itself.
    """
    wanted = [f"{names.prefix}{name}" for name in _TABLES]
    found = await connection.fetch(_OWNERS, names.schema, wanted, trusted)
    for name, owner, is_trusted in found:
        if not is_trusted:
            what = f"the schema {names.schema!r}" if name is None else f"the table {name!r} in {names.schema!r}"
            raise UnusableDatabase(
                f"{what} belongs to {owner}, which is neither this role, nor the owner of the database, nor a "
                "superuser, so it may be a trap. If that role may be trusted, say "
                f"options=PostgresOptions(owner={owner!r}); else take a schema of your own"
            )
    return [name for name, _, _ in found if name is not None]
