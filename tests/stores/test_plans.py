"""How the databases carry statements out: each by an index, so that a million ended jobs cost what ten cost."""

from __future__ import annotations

import contextlib
import json
import re
import sqlite3
from pathlib import Path
from typing import Any

import asyncpg
import pg
import pytest
from pg import fresh_schema, pg_store

from xiling_async.models.query import JobQuery
from xiling_async.models.record import State
from xiling_async.stores import sqlite_queries
from xiling_async.stores.listing import PAGE
from xiling_async.stores.postgres.queries import Queries
from xiling_async.stores.postgres.schema import Names
from xiling_async.stores.sqlite_schema import prepare

TENANT, ORDER = {"tenant": "a"}, {"order": "7"}
LISTINGS = {
    "all": (JobQuery(), (), ["jobs_age"]),
    "newest first": (JobQuery(newest_first=True, since=1.0), (), ["jobs_age"]),
    "state": (JobQuery(states=frozenset({State.FAILED})), (), ["jobs_state"]),
    "open": (JobQuery(states=frozenset({State.SENDING, State.ACCEPTED})), (), ["jobs_state"]),
    "kind": (JobQuery(kind="image_generate"), (), ["jobs_kind"]),
    "kind and state": (JobQuery(kind="image_generate", states=frozenset({State.DONE})), (), ["jobs_kind"]),
    "metadata": (JobQuery(metadata=TENANT), (), ["metadata_pkey", "jobs_pkey"]),
    "the second pair": (JobQuery(metadata=TENANT | ORDER), (9, 1), ["metadata_pkey", "jobs_pkey"]),
    "state rather than metadata": (
        JobQuery(metadata=TENANT, states=frozenset({State.FAILED})),
        (9, 1),
        ["jobs_state", "metadata_pkey"],
    ),
    "metadata rather than state": (
        JobQuery(metadata=ORDER, states=frozenset({State.DONE})),
        (1, 9),
        ["metadata_pkey", "jobs_pkey"],
    ),
}
# What the writer's statements take, where it is not the primary key of a table.
BY_INDEX = {
    "unsaved_jobs": "jobs_unsaved",
    "due_jobs": "jobs_due",
    "next_due": "jobs_due",
    "first_to_hand_over": "jobs_handover",
    "next_handover": "jobs_handover",
    "doubt_what_was_sent": "jobs_state",
    "limit_doubt": "jobs_state",
    "count_open_jobs": "jobs_state",
    "spread_due_times": "jobs_state",
    "ended_jobs": "jobs_ended",
}
PRIMARY = {"sqlite_autoindex_jobs_1": "jobs_pkey", "PRIMARY KEY": "metadata_pkey"}


@pytest.fixture
def connection(tmp_path: Path) -> Any:
    with contextlib.closing(sqlite3.connect(tmp_path / "jobs.db", isolation_level=None)) as connection:
        prepare(connection)
        yield connection


def sqlite_plan(connection: sqlite3.Connection, statement: str, values: Any) -> list[str]:
    return [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}", values)]


@pytest.mark.parametrize("name", sqlite_queries._SQL)
def test_every_statement_of_sqlite_uses_an_index(connection: sqlite3.Connection, name: str) -> None:
    """None reads a whole table, and none sorts."""
    statement = sqlite_queries._SQL[name]
    count = 2 if "?2" in statement else statement.count("?")
    values: Any = dict.fromkeys(re.findall(r":(\w+)", statement)) or [None] * count
    plan = sqlite_plan(connection, statement, values)
    assert not [step for step in plan if "TEMP B-TREE" in step]
    # What waits for consumers has an index of its own, which is read from its first entry on.
    scans = [step for step in plan if step.startswith("SCAN") and "json_each" not in step]
    assert scans in ([], ["SCAN jobs USING INDEX jobs_handover"])
    assert BY_INDEX.get(name, "") in plan[0] if plan else name not in BY_INDEX


@pytest.mark.parametrize("name", LISTINGS)
def test_every_listing_of_sqlite_walks_an_index(connection: sqlite3.Connection, name: str) -> None:
    """In the order of the listing, so that it is not read to its end; only the pages of several states are sorted."""
    query, sizes, indexes = LISTINGS[name]
    plan = sqlite_plan(connection, *sqlite_queries._LISTINGS.page(query, (0.0, ""), sizes))
    assert not [step for step in plan if step.startswith("SCAN jobs")]
    assert ("USE TEMP B-TREE FOR ORDER BY" in plan) is ("CO-ROUTINE page" in plan)
    used = [re.search(r"INDEX (\w+)|(PRIMARY KEY)", step) for step in plan]
    names = dict.fromkeys(match[1] or match[2] for match in used if match is not None)
    assert [PRIMARY.get(each, each) for each in names][: len(indexes)] == indexes


async def test_the_statements_of_postgres_use_their_indexes() -> None:
    """With 20,000 ended jobs, whatever the values are: none reads a table of jobs whole, or sorts more than pages."""
    schema = fresh_schema()
    names = Names(schema, "xiling_")
    queries = Queries(names, "owner")
    store = pg_store(schema=schema)
    await store.open()
    await store.close()
    connection = await asyncpg.connect(pg.server().dsn)
    try:
        await connection.execute(f"SET search_path = {schema}")
        await connection.execute(FILL)
        await connection.execute("SET plan_cache_mode = force_generic_plan")
        for name, (query, sizes, indexes) in LISTINGS.items():
            statement, values = queries._listings.page(query, (0.0, ""), sizes)
            assert indexes[0] in await postgres_plan(connection, statement, len(values)), name
            counting = queries._listings.sizes(query)
            if counting is not None:
                await postgres_plan(connection, counting[0], len(counting[1]))
        for name, index in POSTGRES.items():
            statement = queries._sql[name]
            count = max(map(int, re.findall(r"\$(\d+)", statement)), default=0)
            assert index in await postgres_plan(connection, statement, count), name
    finally:
        await connection.close()


FILL = """
    INSERT INTO xiling_jobs (id, key_hash, kind, asked, created_at, changed_at, state, attempt, tasks, failed_asks,
        version, mark, handover_at)
    SELECT lpad(i::text, 32, '0'), sha256(i::text::bytea),
        CASE WHEN i < 5 THEN 'image_generate' ELSE 'image_to_video' END, 1, i, i,
        CASE WHEN i < 5 THEN 'failed' WHEN i < 9 THEN 'accepted' ELSE 'done' END, 1, '[]', 0, 1, '',
        CASE WHEN i < 50 THEN 0 END
    FROM generate_series(1, 20000) AS n (i);
    INSERT INTO xiling_tasks SELECT key_hash, id FROM xiling_jobs;
    INSERT INTO xiling_metadata SELECT sha256('a'), created_at, id FROM xiling_jobs;
    ANALYZE
"""
POSTGRES = {
    "job_by_id": "jobs_pkey",
    "job_by_key": "jobs_key_hash_key",
    "job_by_task": "tasks_pkey",
    "unsaved_jobs": "jobs_unsaved",
    "hand_over_job": "jobs_handover",
    "next_handover": "jobs_handover",
    "next_due": "jobs_due",
    "count_open_jobs": "jobs_state",
    "mark_dead_owners": "jobs_state",
    "release_leases_of_dead_owners": "jobs_owned",
    "limit_doubt": "jobs_state",
    "spread_due_times": "jobs_state",
    "jobs_sent_by_owner": "jobs_owned",
    "purge_jobs": "jobs_over",
}


async def postgres_plan(connection: Any, statement: str, count: int) -> set[str]:
    """The indexes that it uses, without their prefix, whatever its values are."""
    values = ", ".join(["NULL"] * count)
    await connection.execute(f"PREPARE statement AS {statement}")
    plan = await connection.fetchval(f"EXPLAIN (FORMAT JSON) EXECUTE statement{f'({values})' if count else ''}")
    await connection.execute("DEALLOCATE statement")
    nodes = list(_nodes(json.loads(plan)[0]["Plan"]))
    for node in nodes:
        is_ours = node.get("Relation Name", "").removeprefix("xiling_") in ("jobs", "tasks", "metadata")
        assert not (is_ours and node["Node Type"] == "Seq Scan"), plan
        assert node["Node Type"] != "Sort" or node["Plan Rows"] <= len(State) * PAGE, plan
    return {node["Index Name"].removeprefix("xiling_") for node in nodes if "Index Name" in node}


def _nodes(node: dict[str, Any]) -> Any:
    yield node
    for child in node.get("Plans", ()):
        yield from _nodes(child)
