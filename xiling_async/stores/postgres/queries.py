"""The jobs in the tables of a PostgreSQL store: each method is what one transaction does."""

# ruff: noqa: S608 - statements are put together from our own words only

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any, Final

from xiling_async.errors import NotSent
from xiling_async.models.lifecycle import Change, Event, Verdict, decide
from xiling_async.models.record import LEFT_BEHIND, JobRecord, Refusal, State
from xiling_async.stores.base import SPREAD_S
from xiling_async.stores.postgres.driver import Again
from xiling_async.stores.postgres.schema import Connection, Names, hashed, quoted, unquoted
from xiling_async.stores.rows import COLUMNS, corrected_row, record_of, refusal_row, row_of, tasks_row

log = logging.getLogger("xiling_async.stores")

PAGE: Final = 500
PURGE: Final = 2_000  # jobs forgotten in one transaction
_OPEN: Final = "state IN ('sending', 'uncertain', 'accepted')"  # in the words of the index, so that it is taken
_OVER: Final = "state NOT IN ('sending', 'uncertain', 'accepted')"
_ID, _KEY, _AGE = (COLUMNS.index(name) for name in ("id", "key", "created_at"))
_NOBODY: Final = Refusal(
    error=NotSent.__name__, message="The store could not write the intent, so nothing was sent and nothing was bought."
)


class PgRows:
    """`owner`: the open store that writes. What a change tells, and to whom, is in the same transaction."""

    def __init__(self, names: Names, owner: str) -> None:
        self._owner = owner
        self._channel = names.channel
        self._tasks, self._kept, self._owners = names["tasks"], names["kept"], names["owners"]
        self._jobs = names["jobs"]
        columns = ", ".join(f"jobs.{name}" for name in COLUMNS)
        self._select = f"SELECT {columns} FROM {self._jobs} AS jobs"
        values = ", ".join(f"${place}" for place in range(1, len(COLUMNS) + 4))
        self._insert = (
            f"INSERT INTO {self._jobs} ({', '.join(COLUMNS)}, key_hash, owner, mark) VALUES ({values}) "
            "ON CONFLICT DO NOTHING RETURNING 1"
        )
        self._locked = f"SELECT {columns}, jobs.mark FROM {self._jobs} AS jobs WHERE id = $1 FOR UPDATE"
        self._write = (
            f"WITH own AS (INSERT INTO {self._tasks} SELECT unnest($13::bytea[]), $1 ON CONFLICT DO NOTHING "
            f"RETURNING 1), disowned AS (DELETE FROM {self._tasks} WHERE hash = ANY($14::bytea[])), "
            f"written AS (UPDATE {self._jobs} SET asked = $2, changed_at = $3, state = $4, attempt = $5, tasks = $6, "
            "refusal = $7, due_at = $8, failed_asks = $9, version = $10, owner = $11, mark = $12, "
            "request = COALESCE($17, request) WHERE id = $1) "
            "SELECT COUNT(*), CASE WHEN $15::text IS NOT NULL THEN pg_notify($16, $15) END FROM own"
        )
        self._claim = (
            f"WITH due AS (SELECT id, due_at FROM {self._jobs} WHERE due_at <= $1 ORDER BY due_at LIMIT $2 "
            f"FOR UPDATE SKIP LOCKED) UPDATE {self._jobs} AS jobs SET due_at = $3, version = version + 1, owner = $4 "
            f"FROM due WHERE jobs.id = due.id RETURNING {columns}, due.due_at AS was_due"
        )
        is_alive = f"EXISTS (SELECT 1 FROM {self._owners} AS o WHERE o.id = jobs.owner AND o.until > clock_timestamp())"
        self._bury = (
            f"WITH dead AS (SELECT id FROM {self._jobs} AS jobs WHERE state = 'sending' AND "
            f"(owner = $4 OR NOT {is_alive}) FOR UPDATE SKIP LOCKED), "
            f"buried AS (UPDATE {self._jobs} AS jobs SET state = 'uncertain', refusal = $1, changed_at = $2, "
            "due_at = $3, version = version + 1, owner = NULL FROM dead WHERE jobs.id = dead.id "
            "RETURNING jobs.id, version) SELECT pg_notify($5, id || ' ' || version) FROM buried"
        )
        self._release = (
            f"WITH leased AS (SELECT id FROM {self._jobs} AS jobs WHERE owner IS NOT NULL AND state <> 'sending' AND "
            f"NOT {is_alive} FOR UPDATE SKIP LOCKED) UPDATE {self._jobs} AS jobs SET due_at = LEAST(due_at, $1), "
            "version = version + 1, owner = NULL FROM leased WHERE jobs.id = leased.id"
        )

    # --- reading -------------------------------------------------------------------------------------------------

    async def get(self, connection: Connection, job_id: str) -> JobRecord | None:
        return _one(await connection.fetchrow(f"{self._select} WHERE id = $1", quoted(job_id)))

    async def by_key(self, connection: Connection, key: str) -> JobRecord | None:
        return _one(await connection.fetchrow(f"{self._select} WHERE key_hash = $1", hashed(key)))

    async def by_task(self, connection: Connection, task_id: str) -> JobRecord | None:
        where = f"WHERE id = (SELECT job_id FROM {self._tasks} WHERE hash = $1)"
        return _one(await connection.fetchrow(f"{self._select} {where}", hashed(task_id)))

    async def many(self, connection: Connection, job_ids: Iterable[str]) -> list[JobRecord]:
        return _readable(await connection.fetch(f"{self._select} WHERE id = ANY($1)", [*map(quoted, job_ids)]))

    async def oldest_open(
        self, connection: Connection, after: tuple[float, str]
    ) -> tuple[list[JobRecord], tuple[float, str] | None]:
        """A page of the unfinished jobs behind this place, and its last place."""
        where = f"WHERE {_OPEN} AND (created_at, id) > ($1, $2) ORDER BY created_at, id LIMIT {PAGE}"
        return _page(await connection.fetch(f"{self._select} {where}", *after))

    async def newest(
        self, connection: Connection, before: tuple[float, str]
    ) -> tuple[list[JobRecord], tuple[float, str] | None]:
        where = f"WHERE (created_at, id) < ($1, $2) ORDER BY created_at DESC, id DESC LIMIT {PAGE}"
        return _page(await connection.fetch(f"{self._select} {where}", *before))

    async def next_due(self, connection: Connection) -> float | None:
        due_at: float | None = await connection.fetchval(f"SELECT MIN(due_at) FROM {self._jobs}")
        return due_at

    # --- writing -------------------------------------------------------------------------------------------------

    async def secret(self, connection: Connection, fresh: bytes) -> bytes:
        await connection.execute(
            f"INSERT INTO {self._kept} VALUES ('webhook secret', $1) ON CONFLICT DO NOTHING", fresh
        )
        return bytes(await connection.fetchval(f"SELECT value FROM {self._kept} WHERE name = 'webhook secret'"))

    async def add(self, connection: Connection, record: JobRecord, mark: str) -> JobRecord:
        """The job that has this id, this key or one of these tasks; that is this one, if there was none."""
        if record.task_ids:
            held = await self._known(connection, record)
            if held is not None:
                return held
        columns = [*row_of(record)]
        columns[_ID] = quoted(record.id)
        columns[_KEY] = None if record.key is None else quoted(record.key)
        key_hash = None if record.key is None else hashed(record.key)
        if await connection.fetchval(self._insert, *columns, key_hash, self._owner_of(record), mark):
            if record.task_ids:
                await self._own(connection, record)
            return record
        held = await self._known(connection, record)
        if held is None:
            raise Again("the job that was in the way has been forgotten")
        return held

    async def _own(self, connection: Connection, record: JobRecord) -> None:
        hashes = sorted(map(hashed, record.task_ids))  # in one order for everybody: no deadlocks
        own = f"INSERT INTO {self._tasks} SELECT unnest($1::bytea[]), $2 ON CONFLICT DO NOTHING RETURNING 1"
        if len(await connection.fetch(own, hashes, quoted(record.id))) < len(hashes):
            raise Again("another job has taken one of the task ids meanwhile")

    async def _known(self, connection: Connection, record: JobRecord) -> JobRecord | None:
        held = await self.get(connection, record.id)
        if held is None and record.key is not None:
            held = await self.by_key(connection, record.key)
        for task_id in record.task_ids:
            held = held or await self.by_task(connection, task_id)
        return held

    async def change(self, connection: Connection, job_id: str, event: Event, mark: str, *, looks: bool) -> Change:
        """`looks`: first, whether new task ids are another job's; else `Again` says that one may be."""
        row = await connection.fetchrow(self._locked, quoted(job_id))
        if row is None:
            return Change(Verdict.NO_JOB, None)
        *columns, newest_mark = row
        record = _record(columns)
        if newest_mark == mark:  # written by a try of ours whose COMMIT was answered to nobody
            return Change(Verdict.APPLIED, record)
        change = decide(record, event)
        if change.verdict is not Verdict.APPLIED or change.record is None:
            return change
        new = [task_id for task_id in change.record.task_ids if task_id not in record.task_ids]
        if looks and new:
            taken = f"SELECT 1 FROM {self._tasks} WHERE hash = ANY($1) LIMIT 1"
            if await connection.fetchval(taken, [hashed(task_id) for task_id in new]):
                return Change(Verdict.STRANGE, record)
        await self._keep(connection, record, change.record, mark)
        return change

    async def _keep(self, connection: Connection, before: JobRecord, record: JobRecord, mark: str) -> None:
        new = sorted(hashed(task_id) for task_id in record.task_ids if task_id not in before.task_ids)
        old = [hashed(task_id) for task_id in before.task_ids if task_id not in record.task_ids]
        news = f"{quoted(record.id)} {record.version}" if _is_news(before, record) else None
        owned = await connection.fetchval(
            self._write, quoted(record.id), record.asked, record.changed_at, record.state.value, record.attempt,
            tasks_row(record), refusal_row(record.refusal), record.due_at, record.failed_asks, record.version,
            self._owner_of(record), mark, new, old, news, self._channel, corrected_row(record),
        )  # fmt: skip
        if owned < len(new):
            raise Again("a task id is another job's")

    def _owner_of(self, record: JobRecord) -> str | None:
        return self._owner if record.state is State.SENDING else None

    async def greet(self, connection: Connection, greeting: str) -> None:
        await connection.execute("SELECT pg_notify($1, $2)", self._channel, greeting)

    async def claim(self, connection: Connection, now: float, limit: int, lease_s: float) -> list[JobRecord]:
        rows = await connection.fetch(self._claim, now, limit, now + lease_s, self._owner)
        return _readable([*row][:-1] for row in sorted(rows, key=lambda row: row["was_due"]))

    async def takeover(self, connection: Connection, now: float, doubt_s: float, per_second: float) -> int:
        """What was being sent by this owner or a dead one becomes uncertain. What else is open is looked after by the
        living owners; if there are none, it falls due."""
        until = now + doubt_s
        await self.bury(connection, now, doubt_s, mine=True)
        count = int(await connection.fetchval(f"SELECT COUNT(*) FROM {self._jobs} WHERE {_OPEN}"))
        others = f"SELECT 1 FROM {self._owners} WHERE id <> $1 AND until > clock_timestamp() LIMIT 1"
        if not await connection.fetchval(others, self._owner):
            await connection.execute(
                f"UPDATE {self._jobs} SET due_at = LEAST(COALESCE(due_at, $1), $2), version = version + 1 "
                f"WHERE {_OPEN} AND state = 'uncertain' AND (due_at IS NULL OR due_at > $2)",
                now, until,
            )  # fmt: skip
            await connection.execute(
                f"UPDATE {self._jobs} SET due_at = $1::float8 + $2::float8 * random(), version = version + 1 "
                f"WHERE {_OPEN} AND state = 'accepted'",
                now, min(SPREAD_S, count / per_second),
            )  # fmt: skip
        return count

    async def purge(self, connection: Connection, before: float) -> int:
        done = await connection.execute(
            f"DELETE FROM {self._jobs} WHERE id IN (SELECT id FROM {self._jobs} WHERE {_OVER} AND changed_at < $1 "
            f"LIMIT {PURGE} FOR UPDATE SKIP LOCKED)",
            before,
        )
        return int(done.rpartition(" ")[2])

    # --- owners --------------------------------------------------------------------------------------------------

    async def beat(self, connection: Connection, place: str, life_s: float) -> None:
        """This owner lives, and counts as dead when nothing is heard of it for `life_s` by the database's clock."""
        await connection.execute(
            f"INSERT INTO {self._owners} VALUES ($1, $2, clock_timestamp() + make_interval(secs => $3)) "
            "ON CONFLICT (id) DO UPDATE SET until = EXCLUDED.until",
            self._owner, place, life_s,
        )  # fmt: skip

    async def bury(self, connection: Connection, now: float, doubt_s: float, *, mine: bool) -> None:
        """What dead owners were sending becomes uncertain (`mine`: also what this one was); nobody sends it again. What
        they were about to ask about falls due."""
        owner = self._owner if mine else None
        await connection.execute(self._bury, refusal_row(LEFT_BEHIND), now, now + doubt_s, owner, self._channel)
        await connection.execute(self._release, now)
        await connection.execute(f"DELETE FROM {self._owners} WHERE until < clock_timestamp() - interval '1 day'")

    async def leave(self, connection: Connection) -> None:
        await connection.execute(f"DELETE FROM {self._owners} WHERE id = $1", self._owner)

    async def take_back(self, connection: Connection, job_id: str, mark: str, now: float) -> None:
        """An intent whose writing failed, as its caller was told: if it is there all the same, nothing was sent."""
        row = await connection.fetchrow(
            f"UPDATE {self._jobs} SET state = 'not_sent', refusal = $3, changed_at = $4, version = version + 1, "
            "owner = NULL WHERE id = $1 AND mark = $2 AND state = 'sending' RETURNING version",
            quoted(job_id), mark, refusal_row(_NOBODY), now,
        )  # fmt: skip
        if row is not None:
            payload = f"{quoted(job_id)} {row['version']}"
            await connection.execute("SELECT pg_notify($1, $2)", self._channel, payload)


# --- rows ------------------------------------------------------------------------------------------------------------


def _record(row: Sequence[Any]) -> JobRecord:
    columns = [*row]
    columns[_ID] = unquoted(columns[_ID])
    columns[_KEY] = None if columns[_KEY] is None else unquoted(columns[_KEY])
    return record_of(columns)


def _one(row: Sequence[Any] | None) -> JobRecord | None:
    return None if row is None else _record(row)


def _readable(rows: Iterable[Sequence[Any]]) -> list[JobRecord]:
    """The records of these rows. One that cannot be read (a newer version's) must not keep the sweeper from all others;
    who asks for that very job gets a `StoreError`."""
    records = []
    for row in rows:
        try:
            records.append(_record(row))
        except (ValueError, TypeError, LookupError) as error:
            log.error("job %s of the store cannot be read: %s", row[_ID], error)
    return records


def _page(rows: Sequence[Sequence[Any]]) -> tuple[list[JobRecord], tuple[float, str] | None]:
    return _readable(rows), (rows[-1][_AGE], rows[-1][_ID]) if rows else None


def _is_news(before: JobRecord, record: JobRecord) -> bool:
    """Whether somebody may wait for it; a due time that moves is nobody's news."""
    return any(
        getattr(before, name) != getattr(record, name)
        for name in ("state", "attempt", "task_ids", "outcomes", "refusal")
    )
