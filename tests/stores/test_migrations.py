"""Databases of schema 1 (the first landing) and 2 become today's in place, whole or not at all."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import asyncpg
import pg
import pytest
from attrs import define
from pg import fresh_schema, pg_store
from test_first_landing import FIXTURES, SCHEMA
from test_store_contract import NOW, good, job

from xiling_async import SQLiteStore, StoreError
from xiling_async.models.lifecycle import OutcomeReported, Verdict
from xiling_async.models.record import JobRecord, State
from xiling_async.stores import Store
from xiling_async.stores.postgres import schema as postgres_schema
from xiling_async.stores.postgres.schema import Names, hashed
from xiling_async.stores.sqlite_schema import MIGRATIONS, migrate

PRIVATE = 0o600
# What a process of schema 2 says when it adds a job, and when it writes down its end.
OLD_INSERT = """
    INSERT INTO {jobs} (id, key, kind, request, asked, created_at, changed_at, state, attempt, tasks, refusal, due_at,
        failed_asks, version, is_adopted, key_hash, owner, mark)
    VALUES ($1, 'old', 'image_to_video', NULL, 1, $2, $2, 'sending', 1, '[]', NULL, NULL, 0, 0, FALSE, $3, NULL, 'm1')
    ON CONFLICT DO NOTHING RETURNING 1
"""
OLD_UPDATE = """
    UPDATE {jobs} SET asked = 1, changed_at = $2, state = 'done', attempt = 1, tasks = '[["t",{{"succeeded":{{}}}}]]',
        refusal = NULL, due_at = NULL, failed_asks = 0, version = 2, owner = NULL, mark = 'm2',
        request = COALESCE(NULL, request)
    WHERE id = $1
"""


@define
class Database:
    """A database of an older schema, not yet open. `run`: a statement in it; `seen`: what tables and rows it has."""

    store: Store
    run: Callable[[str], Awaitable[None]]
    seen: Callable[[], Awaitable[Any]]


@contextlib.asynccontextmanager
async def sqlite_database(tmp_path: Path, version: int) -> AsyncIterator[Database]:
    file = tmp_path / "jobs.db"
    shutil.copy(FIXTURES / f"{SCHEMA}.db", file)
    file.chmod(PRIVATE)

    def work(statement: str | None) -> Any:
        with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as connection:
            migrate(connection, MIGRATIONS[:version])
            if statement is not None:
                connection.execute(statement)
            names = connection.execute("SELECT name, sql FROM sqlite_master ORDER BY 1").fetchall()
            return names, *(
                connection.execute(each).fetchall() for each in ("PRAGMA user_version", "SELECT * FROM jobs")
            )

    async def run(statement: str) -> None:
        await asyncio.to_thread(work, statement)

    await asyncio.to_thread(work, None)
    yield Database(SQLiteStore(file), run, lambda: asyncio.to_thread(work, None))


@contextlib.asynccontextmanager
async def postgres_database(_: Path, version: int) -> AsyncIterator[Database]:
    schema = fresh_schema()
    connection = await asyncpg.connect(pg.server().dsn)

    async def run(statement: str) -> None:
        await connection.execute(f"SET search_path = {schema}; {statement}".replace("metadata", "xiling_metadata"))

    async def seen() -> Any:
        columns = "SELECT table_name, column_name FROM information_schema.columns WHERE table_schema = $1 ORDER BY 1, 2"
        rows = await connection.fetch(f"SELECT * FROM {schema}.xiling_jobs ORDER BY id")
        return (
            await connection.fetch(columns, schema),
            rows,
            await connection.fetch(f"SELECT * FROM {schema}.xiling_kept"),
        )

    try:
        text = await asyncio.to_thread((FIXTURES / f"{SCHEMA}.sql").read_text, "utf-8")
        await connection.execute(text.replace(SCHEMA, schema))
        async with connection.transaction():
            await postgres_schema.migrate(connection, Names(schema, "xiling_"), postgres_schema.MIGRATIONS[:version])
        yield Database(pg_store(schema=schema), run, seen)
    finally:
        await connection.execute(f"DROP SCHEMA {schema} CASCADE")
        await connection.close()


@pytest.fixture(params=[1, 2])
def version(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(params=[sqlite_database, postgres_database], ids=["sqlite", "postgres"])
async def database(request: pytest.FixtureRequest, tmp_path: Path, version: int) -> AsyncIterator[Database]:
    async with request.param(tmp_path, version) as made:
        yield made


@contextlib.asynccontextmanager
async def opened(store: Store) -> AsyncIterator[Store]:
    await store.open()
    try:
        yield store
    finally:
        await store.close()


async def all_jobs(store: Store) -> dict[str, JobRecord]:
    return {record.id: record async for record in store.jobs()}


async def test_an_older_database_opens_in_place(database: Database) -> None:
    """No job has metadata; what had ended counts as acknowledged; what is open is handed over when it ends."""
    async with opened(database.store) as store:
        jobs = await all_jobs(store)
        assert {record.state for record in jobs.values()} == set(State)
        for record in jobs.values():
            assert (dict(record.metadata), record.retry_of) == ({}, None)
            assert record.handover_at == (None if record.state.is_final else 0)
        assert await store.hand_over(NOW, lease_s=300) is None
        assert await store.next_handover(NOW) is None
        open_job = await store.by_key("accepted")
        assert open_job is not None
        ended = OutcomeReported(attempt=1, at=NOW, task_id="t3", outcome=good("t3"), due_at=None)
        assert (await store.change(open_job.id, ended)).verdict is Verdict.APPLIED
        handed_over = await store.hand_over(NOW, lease_s=300)
        assert handed_over is not None
        assert handed_over.record.id == open_job.id
        assert await store.hand_over(NOW, lease_s=300) is None
        assert await store.purge(0, now=NOW + 1) == sum(record.state.is_final for record in jobs.values())
        assert await store.by_key("accepted") is not None
        await store.add(job(77, metadata={"user": "42"}))
    async with opened(database.store) as store:  # of today's schema now
        assert [record.metadata for record in (await all_jobs(store)).values() if record.metadata] == [{"user": "42"}]


async def test_results_of_the_last_days_are_saved_after_the_upgrade(database: Database) -> None:
    """Of the jobs of the last eight days those with a result count as not saved, until they are written again."""
    prefix = "xiling_" if not isinstance(database.store, SQLiteStore) else ""
    await database.run(f"UPDATE {prefix}jobs SET changed_at = {time.time()} WHERE state IN ('failed', 'expired')")
    async with opened(database.store) as store:
        failed = await store.by_key("failed")
        assert failed is not None
        assert [record.id async for record in store.unsaved(0)] == [failed.id]


async def test_a_migration_that_fails_leaves_all_as_it_was(database: Database) -> None:
    """Another's table is in the way: it is refused, and nothing of any step is there. Without it, it opens."""
    await database.run("CREATE TABLE metadata (x INTEGER)")
    before = await database.seen()
    with pytest.raises(StoreError, match=r"cannot be used as a store: .*metadata\S* already exists"):
        await database.store.open()
    assert await database.seen() == before
    await database.run("DROP TABLE metadata")
    async with opened(database.store) as store:
        assert len(await all_jobs(store)) == 14


async def test_many_that_start_at_once_migrate_once(version: int, tmp_path: Path) -> None:
    """Four processes are upgraded in the same moment."""
    async with postgres_database(tmp_path, version) as database, contextlib.AsyncExitStack() as stack:
        schema = database.store._schema  # type: ignore[attr-defined]
        stores = [pg_store(schema=schema) for _ in range(4)]
        await asyncio.gather(*(stack.enter_async_context(opened(store)) for store in stores))
        first, *others = [await all_jobs(store) for store in stores]
        assert len(first) == 14
        assert all(each == first for each in others)


async def test_what_an_old_process_makes_and_ends_is_handed_over() -> None:
    """It was open when the tables became newer, and goes on with the statements that it knows."""
    schema = fresh_schema()
    async with opened(pg_store(schema=schema)) as store:
        connection = await asyncpg.connect(pg.server().dsn)
        try:
            jobs = Names(schema, "xiling_")["jobs"]
            assert await connection.fetchval(OLD_INSERT.format(jobs=jobs), "f" * 32, NOW, hashed("old"))
            assert await store.hand_over(NOW, lease_s=300) is None
            await connection.execute(OLD_UPDATE.format(jobs=jobs), "f" * 32, NOW + 9)
        finally:
            await connection.close()
        assert await store.next_handover(NOW) == 0
        handed_over = await store.hand_over(NOW, lease_s=300)
        assert handed_over is not None
        record = handed_over.record
        assert (record.key, record.state, dict(record.metadata)) == ("old", State.DONE, {})
        assert not handed_over.is_again
        assert await store.purge(0, now=NOW + 100) == 0, "it is not acknowledged"
