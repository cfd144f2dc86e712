"""The jobs in the tables of a SQLite store: each method is what one transaction does; the SQL is in
sqlite_queries.sql."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from attrs import evolve

from xiling_async.models.lifecycle import Change, Event, Verdict, decide
from xiling_async.models.ownership import give_way
from xiling_async.models.query import JobQuery
from xiling_async.models.record import LEFT_BEHIND, JobRecord
from xiling_async.stores.base import SPREAD_S, HandedOver
from xiling_async.stores.listing import PAGE, Listings, Page, Place, pair_hashes
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

Connection = sqlite3.Connection
_WORDS: Final = {
    "columns": ", ".join(f"jobs.{name}" for name in COLUMNS),
    "columns_to_insert": ", ".join(COLUMNS),
    "values": ", ".join("?" * len(COLUMNS)),
}
_STATEMENTS: Final = statements(Path(__file__).with_name("sqlite_queries.sql"))
_SQL: Final = {name: statement.format_map(_WORDS) for name, statement in _STATEMENTS.items()}
_LISTINGS: Final = Listings(_WORDS["columns"], jobs="jobs", metadata="metadata", mark="?")
_CREATED_AT, _CHANGED_AT = COLUMNS.index("created_at"), COLUMNS.index("changed_at")


class Queries:
    """Used in the thread of the writer. What cannot be read is skipped by `reader` where many are read."""

    def __init__(self) -> None:
        self.reader = RowReader(record_of)

    # --- reading -------------------------------------------------------------------------------------------------

    def get(self, connection: Connection, job_id: str) -> JobRecord | None:
        return _one(connection, "job_by_id", job_id)

    def by_key(self, connection: Connection, key: str) -> JobRecord | None:
        return _one(connection, "job_by_key", key)

    def by_task(self, connection: Connection, task_id: str) -> JobRecord | None:
        return _one(connection, "job_by_task", task_id)

    def listed(self, connection: Connection, query: JobQuery, place: Place) -> Page:
        if query.states is not None and not query.states:
            return [], None
        counting = _LISTINGS.sizes(query)
        sizes = () if counting is None else connection.execute(*counting).fetchone()
        return self._page(connection.execute(*_LISTINGS.page(query, place, sizes)).fetchall(), _CREATED_AT)

    def unsaved(self, connection: Connection, since: float, after: Place) -> Page:
        return self._page(connection.execute(_SQL["unsaved_jobs"], (since, *after, PAGE)).fetchall(), _CHANGED_AT)

    def next_due(self, connection: Connection) -> float | None:
        return _number(connection, "next_due")

    def _page(self, rows: Sequence[Sequence[Any]], ordered_by: int) -> Page:
        return self.reader.records(rows), (rows[-1][ordered_by], rows[-1][0]) if rows else None

    # --- writing -------------------------------------------------------------------------------------------------

    def secret(self, connection: Connection, fresh: bytes) -> bytes:
        connection.execute(_SQL["keep_secret"], (fresh,))
        (kept,) = connection.execute(_SQL["kept_secret"]).fetchone()
        return bytes(kept)

    def add(self, connection: Connection, record: JobRecord) -> JobRecord:
        known = self.get(connection, record.id)
        if known is None and record.key is not None:
            known = self.by_key(connection, record.key)
        for task_id in record.owned_ids:
            known = known or self.by_task(connection, task_id)
        if known is not None:
            return known
        connection.execute(_SQL["insert_job"], (*row_of(record), has_unsaved_result(record)))
        connection.executemany(_SQL["insert_metadata"], _metadata_rows(record))
        _own(connection, record.id, record.owned_ids)
        return record

    def change(self, connection: Connection, job_id: str, event: Event) -> Change:
        record = self.get(connection, job_id)
        if record is None:
            return Change(Verdict.NO_JOB, None)
        change = decide(record, event)
        if change.verdict is not Verdict.APPLIED or change.record is None:
            return change
        changed = change.record
        if changed.task_ids is not record.task_ids:
            before, after = set(record.owned_ids), set(changed.owned_ids)
            new = after - before
            holders = (self.by_task(connection, task_id) for task_id in new)
            owners = list({holder.id: holder for holder in holders if holder is not None}.values())
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

    def claim(self, connection: Connection, now: float, *, limit: int, lease_s: float) -> list[JobRecord]:
        due = connection.execute(_SQL["due_jobs"], (now, limit)).fetchall()
        connection.executemany(_SQL["lease_due_job"], [(now + lease_s, row[0]) for row in due])
        return [record.next_version(due_at=now + lease_s) for record in self.reader.records(due)]

    def hand_over(self, connection: Connection, now: float, *, lease_s: float) -> HandedOver | None:
        connection.execute(_SQL["note_consumer"])
        while row := connection.execute(_SQL["first_to_hand_over"], (now,)).fetchone():
            connection.execute(_SQL["lease_to_consumer"], (now + lease_s, row[0]))
            for record in self.reader.records([row]):  # none, if it cannot be read: then the next job
                return HandedOver(record.next_version(handover_at=now + lease_s), is_again=bool(record.handover_at))
        return None

    def next_handover(self, connection: Connection, now: float) -> float | None:
        at = _number(connection, "next_handover")
        return None if at is None else max(0.0, at - now)

    def recover_orphans(self, connection: Connection, now: float, *, doubt_s: float, per_second: float) -> int:
        until = now + doubt_s
        connection.execute(_SQL["doubt_what_was_sent"], (refusal_row(LEFT_BEHIND), now, until))
        connection.execute(_SQL["limit_doubt"], (now, until))
        (count,) = connection.execute(_SQL["count_open_jobs"]).fetchone()
        connection.execute(_SQL["spread_due_times"], (now, min(SPREAD_S, count / per_second)))
        return int(count)

    def purge(
        self, connection: Connection, before: float, after: Place, in_hand: frozenset[str]
    ) -> tuple[int, Place | None]:
        """Forget a page of what ended before then; returns how many jobs, and the place of the next page or None."""
        values = {
            "before": before,
            "changed_at": after[0],
            "id": after[1],
            "in_hand": json.dumps([*in_hand]),
            "limit": PAGE,
        }
        rows = connection.execute(_SQL["ended_jobs"], values).fetchall()
        for record in self.reader.records(rows):
            _disown(connection, record.owned_ids)
            connection.executemany(_SQL["delete_metadata"], _metadata_rows(record))
        connection.executemany(_SQL["delete_job"], [(row[0],) for row in rows])
        return len(rows), (rows[-1][_CHANGED_AT], rows[-1][0]) if rows else None


def _one(connection: Connection, statement: str, name: str) -> JobRecord | None:
    row = connection.execute(_SQL[statement], (name,)).fetchone()
    return None if row is None else record_of(row)


def _number(connection: Connection, statement: str) -> float | None:
    (value,) = connection.execute(_SQL[statement]).fetchone()
    return None if value is None else float(value)


def _write(connection: Connection, record: JobRecord) -> None:
    connection.execute(
        _SQL["update_job"],
        (
            record.asked, record.changed_at, record.state.value, record.attempt, tasks_row(record),
            refusal_row(record.refusal), record.due_at, record.failed_asks, record.version, record.handover_at,
            has_unsaved_result(record), corrected_row(record), record.id,
        ),
    )  # fmt: skip


def _own(connection: Connection, job_id: str, task_ids: Iterable[str]) -> None:
    connection.executemany(_SQL["insert_task"], [(task_id, job_id) for task_id in task_ids])


def _disown(connection: Connection, task_ids: Iterable[str]) -> None:
    connection.executemany(_SQL["delete_task"], [(task_id,) for task_id in task_ids])


def _metadata_rows(record: JobRecord) -> list[tuple[bytes, float, str]]:
    return [(pair, record.created_at, record.id) for pair in pair_hashes(record.metadata)]
