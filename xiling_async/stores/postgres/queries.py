"""The jobs in the tables of a PostgreSQL store: each method is what one transaction does; the SQL is in queries.sql."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from attrs import evolve

from xiling_async.errors import NotSent
from xiling_async.models.lifecycle import Change, Event, Verdict, decide
from xiling_async.models.ownership import give_way
from xiling_async.models.query import JobQuery
from xiling_async.models.record import HANDED_OVER, LEFT_BEHIND, JobRecord, Refusal, State
from xiling_async.stores.base import SPREAD_S, HandedOver
from xiling_async.stores.listing import PAGE, Listings, Page, Place, pair_hashes
from xiling_async.stores.postgres.driver import ConcurrentChange
from xiling_async.stores.postgres.schema import Connection, Names, hashed, quoted, unquoted
from xiling_async.stores.rows import (
    COLUMNS,
    RowReader,
    corrected_row,
    has_unsaved_result,
    record_of,
    refusal_row,
    row_of,
    tasks_row,
)
from xiling_async.stores.statements import statements

PURGE: Final = 2_000  # jobs forgotten in one transaction
_ID, _KEY, _AGE, _CHANGED, _RETRY_OF = (
    COLUMNS.index(name) for name in ("id", "key", "created_at", "changed_at", "retry_of")
)
_NOT_WRITTEN: Final = Refusal(
    error=NotSent.__name__, message="The store could not write the intent, so nothing was sent and nothing was bought."
)
_STATEMENTS: Final = statements(Path(__file__).with_name("queries.sql"))
HANDOVER: Final = "handover"  # a notification: a job has ended, or a consumer has it, or has acknowledged it


class Queries:
    """`owner`: the open store that writes. What a change tells, and to whom, is in the same transaction."""

    def __init__(self, names: Names, owner: str) -> None:
        self._owner = owner
        self.channel = names.channel
        self.reader = RowReader(_record)
        words = {
            **names.tables,
            "columns": ", ".join(f"jobs.{name}" for name in COLUMNS),
            "columns_to_insert": ", ".join(COLUMNS),
            "values": ", ".join(f"${place}" for place in range(1, len(COLUMNS) + 5)),
        }
        self._sql = {name: statement.format_map(words) for name, statement in _STATEMENTS.items()}
        self._listings = Listings(words["columns"], jobs=words["jobs"], metadata=words["metadata"], mark="$")

    # --- reading -------------------------------------------------------------------------------------------------

    async def get(self, connection: Connection, job_id: str) -> JobRecord | None:
        return _one(await connection.fetchrow(self._sql["job_by_id"], quoted(job_id)))

    async def by_key(self, connection: Connection, key: str) -> JobRecord | None:
        return _one(await connection.fetchrow(self._sql["job_by_key"], hashed(key)))

    async def by_task(self, connection: Connection, task_id: str) -> JobRecord | None:
        return _one(await connection.fetchrow(self._sql["job_by_task"], hashed(task_id)))

    async def many(self, connection: Connection, job_ids: Iterable[str]) -> list[JobRecord]:
        return self.reader.records(await connection.fetch(self._sql["jobs_by_ids"], [*map(quoted, job_ids)]))

    async def listed(self, connection: Connection, query: JobQuery, place: Place) -> Page:
        """A page of a listing behind this place."""
        if query.states is not None and not query.states:
            return [], None
        counting = self._listings.sizes(query)
        sizes = () if counting is None else await connection.fetchrow(counting[0], *counting[1])
        statement, values = self._listings.page(query, place, sizes)
        return self._page(await connection.fetch(statement, *values))

    async def unsaved(self, connection: Connection, since: float, after: Place) -> Page:
        rows = await connection.fetch(self._sql["unsaved_jobs"], *after, PAGE, since)
        return self.reader.records(rows), (rows[-1][_CHANGED], rows[-1][_ID]) if rows else None

    async def next_due(self, connection: Connection) -> float | None:
        due_at: float | None = await connection.fetchval(self._sql["next_due"])
        return due_at

    def _page(self, rows: Sequence[Sequence[Any]]) -> Page:
        return self.reader.records(rows), (rows[-1][_AGE], rows[-1][_ID]) if rows else None

    # --- writing -------------------------------------------------------------------------------------------------

    async def secret(self, connection: Connection, fresh: bytes) -> bytes:
        await connection.execute(self._sql["keep_secret"], fresh)
        return bytes(await connection.fetchval(self._sql["kept_secret"]))

    async def add(self, connection: Connection, record: JobRecord, mark: str) -> JobRecord:
        """The job that has this id, this key or one of these tasks; that is this one, if there was none."""
        if record.owned_ids:
            held = await self._known(connection, record)
            if held is not None:
                return held
        columns = [*row_of(record)]
        columns[_ID] = quoted(record.id)
        columns[_KEY] = None if record.key is None else quoted(record.key)
        columns[_RETRY_OF] = None if record.retry_of is None else quoted(record.retry_of)
        key_hash = None if record.key is None else hashed(record.key)
        more = key_hash, self._owner_of(record), mark, has_unsaved_result(record)
        if await connection.fetchval(self._sql["insert_job"], *columns, *more):
            if record.metadata:
                pairs = pair_hashes(record.metadata)
                await connection.execute(self._sql["insert_metadata"], pairs, record.created_at, quoted(record.id))
            if record.owned_ids:
                await self._own(connection, record)
            return record
        held = await self._known(connection, record)
        if held is None:
            raise ConcurrentChange("the job that was in the way has been forgotten")
        written = self._sql["job_with_mark"]
        if held.id == record.id and await connection.fetchval(written, quoted(record.id), mark):
            return record  # written by an earlier try, whose COMMIT was not answered
        return held

    async def _own(self, connection: Connection, record: JobRecord) -> None:
        hashes = sorted(map(hashed, record.owned_ids))  # in the same order in every session, so there are no deadlocks
        if len(await connection.fetch(self._sql["insert_tasks"], hashes, quoted(record.id))) < len(hashes):
            raise ConcurrentChange("another job has taken one of the task ids meanwhile")

    async def _known(self, connection: Connection, record: JobRecord) -> JobRecord | None:
        held = await self.get(connection, record.id)
        if held is None and record.key is not None:
            held = await self.by_key(connection, record.key)
        for task_id in record.owned_ids:
            held = held or await self.by_task(connection, task_id)
        return held

    async def change(self, connection: Connection, job_id: str, event: Event, mark: str, *, looks: bool) -> Change:
        """`looks`: first, whether new task ids are another job's; else `ConcurrentChange` says that one may be."""
        row = await connection.fetchrow(self._sql["job_for_update"], quoted(job_id))
        if row is None:
            return Change(Verdict.NO_JOB, None)
        *columns, newest_mark = row
        record = _record(columns)
        if newest_mark == mark:  # written by an earlier try, whose COMMIT was not answered
            return Change(Verdict.APPLIED, record)
        change = decide(record, event)
        if change.verdict is not Verdict.APPLIED or change.record is None:
            return change
        changed = change.record
        hashes = [hashed(task_id) for task_id in set(changed.owned_ids) - set(record.owned_ids)]
        if looks and hashes:
            rows = await connection.fetch(self._sql["owners_of_tasks"], hashes)
            owners = self.reader.records(rows)
            others = None if len(owners) < len(rows) else give_way(owners, changed, event)
            if others is None:
                return Change(Verdict.UNKNOWN_TASK, record)
            for owner, other in zip(owners, others, strict=True):
                assert other.record is not None, "what gave way is written"
                await self._keep(connection, owner, other.record, mark)
            change = evolve(change, others=others) if others else change
        await self._keep(connection, record, changed, mark)
        return change

    async def _keep(self, connection: Connection, before: JobRecord, record: JobRecord, mark: str) -> None:
        had, has = set(before.owned_ids), set(record.owned_ids)
        new = sorted(map(hashed, has - had))
        old = [hashed(task_id) for task_id in had - has]
        news = f"{quoted(record.id)} {record.version}" if _is_news(before, record) else None
        owned = await connection.fetchval(
            self._sql["update_job"],
            quoted(record.id), record.asked, record.changed_at, record.state.value, record.attempt, tasks_row(record),
            refusal_row(record.refusal), record.due_at, record.failed_asks, record.version,
            self._owner_of(record), mark, new, old, news, self.channel, corrected_row(record), record.handover_at,
            has_unsaved_result(record), HANDOVER if _is_handover_news(before, record) else None,
        )  # fmt: skip
        if owned < len(new):
            raise ConcurrentChange("a task id is another job's")

    def _owner_of(self, record: JobRecord) -> str | None:
        return self._owner if record.state is State.SENDING else None

    async def greet(self, connection: Connection, greeting: str) -> None:
        await connection.execute(self._sql["notify"], self.channel, greeting)

    async def claim(self, connection: Connection, now: float, limit: int, lease_s: float) -> list[JobRecord]:
        rows = await connection.fetch(self._sql["claim_due_jobs"], now, limit, now + lease_s, self._owner)
        return self.reader.records([*row][:-1] for row in sorted(rows, key=lambda row: row["was_due"]))

    async def hand_over(self, connection: Connection, lease_s: float) -> HandedOver | None:
        while row := await connection.fetchrow(self._sql["hand_over_job"], lease_s, self.channel, HANDOVER):
            *columns, was_handed_over_at, _ = row
            for record in self.reader.records([columns]):  # none, if it cannot be read: then the next job
                return HandedOver(record, is_again=was_handed_over_at > 0)
        return None

    async def next_handover(self, connection: Connection) -> float | None:
        wait_s: float | None = await connection.fetchval(self._sql["next_handover"])
        return None if wait_s is None else max(0.0, wait_s)

    async def recover_orphans(self, connection: Connection, now: float, doubt_s: float, per_second: float) -> int:
        """What was being sent by this owner or a dead one becomes uncertain. What else is open is looked after by the
        living owners; if there are none, it falls due."""
        await self.mark_dead_owners(connection, now, doubt_s, mine=True)
        count = int(await connection.fetchval(self._sql["count_open_jobs"]))
        if not await connection.fetchval(self._sql["living_owner_besides"], self._owner):
            await connection.execute(self._sql["limit_doubt"], now, now + doubt_s)
            await connection.execute(self._sql["spread_due_times"], now, min(SPREAD_S, count / per_second))
        return count

    async def purge(self, connection: Connection, before: float, in_hand: Iterable[str]) -> int:
        done = await connection.execute(self._sql["purge_jobs"], before, PURGE, [*map(quoted, in_hand)])
        return int(done.rpartition(" ")[2])

    # --- owners --------------------------------------------------------------------------------------------------

    async def beat(self, connection: Connection, place: str, life_s: float) -> None:
        """This owner lives, and counts as dead when nothing is heard of it for `life_s` by the database's clock."""
        await connection.execute(self._sql["beat"], self._owner, place, life_s)

    async def mark_dead_owners(self, connection: Connection, now: float, doubt_s: float, *, mine: bool) -> None:
        """What dead owners were sending becomes uncertain (`mine`: also what this one was), and is never sent again;
        what they were about to ask about falls due."""
        owner = self._owner if mine else None
        await connection.execute(
            self._sql["mark_dead_owners"], refusal_row(LEFT_BEHIND), now, now + doubt_s, owner, self.channel
        )
        await connection.execute(self._sql["release_leases_of_dead_owners"], now)
        await connection.execute(self._sql["forget_dead_owners"])

    async def sending_here(self, connection: Connection) -> set[str]:
        """The jobs that this owner is sending, as the table has it."""
        return {unquoted(row["id"]) for row in await connection.fetch(self._sql["jobs_sent_by_owner"], self._owner)}

    async def doubt(self, connection: Connection, job_ids: Iterable[str], now: float, doubt_s: float) -> None:
        """These jobs of this owner are not being sent: they become uncertain."""
        await connection.execute(
            self._sql["doubt_jobs"],
            refusal_row(LEFT_BEHIND), now, now + doubt_s, [*map(quoted, job_ids)], self._owner, self.channel,
        )  # fmt: skip

    async def leave(self, connection: Connection) -> None:
        await connection.execute(self._sql["leave"], self._owner)

    async def take_back(self, connection: Connection, job_id: str, mark: str, now: float) -> None:
        """An intent whose writing failed, as its caller was told: if it is there all the same, nothing was sent."""
        row = await connection.fetchrow(
            self._sql["take_back_intent"], quoted(job_id), mark, refusal_row(_NOT_WRITTEN), now
        )
        if row is not None:
            payload = f"{quoted(job_id)} {row['version']}"
            await connection.execute(self._sql["notify"], self.channel, payload)


# --- rows ------------------------------------------------------------------------------------------------------------


def _record(row: Sequence[Any]) -> JobRecord:
    columns = [*row]
    columns[_ID] = unquoted(columns[_ID])
    for place in (_KEY, _RETRY_OF):
        columns[place] = None if columns[place] is None else unquoted(columns[place])
    return record_of(columns)


def _one(row: Sequence[Any] | None) -> JobRecord | None:
    return None if row is None else _record(row)


def _is_news(before: JobRecord, record: JobRecord) -> bool:
    """Whether a waiter may want to know of it; a due time that moves is not news."""
    return any(
        getattr(before, name) != getattr(record, name)
        for name in ("state", "attempt", "task_ids", "outcomes", "refusal")
    )


def _is_handover_news(before: JobRecord, record: JobRecord) -> bool:
    """Whether consumers may want to know of it: an end, or an acknowledgement."""
    return record.state in HANDED_OVER and (
        before.state is not record.state or before.handover_at != record.handover_at
    )
