"""Rows that cannot be read: whatever stands in a column of one job, all other jobs are found, listed and claimed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import asyncpg
import pg
import pytest
from pg import fresh_schema, pg_store
from support import client_of, model_v
from test_store_contract import NOW, answer, job

from xiling_async import PostgresStore, SQLiteStore, StoreError
from xiling_async.simulator import Simulator

HOSTILE = ["", "\0", "[", "[[", "7", "null", "true", '"text"', "{}", "[]", "[[1]]", '[["t", 7]]', '[["t", {}]]',
           '[["t", {"succeeded": 7}]]', '[["t", {"failed": {}}]]', "[" * 9_000, "9" * 5_000, "\ud83d"]  # fmt: skip
COLUMNS = ["kind", "request", "state", "tasks", "refusal"]

Spoil = Callable[[str, str], Awaitable[None]]  # of job 2: a column, and what is written into it


@contextlib.asynccontextmanager
async def sqlite_rows(tmp_path: Path) -> AsyncIterator[tuple[SQLiteStore, Spoil]]:
    file = tmp_path / "jobs.db"

    async def spoil(column: str, value: str) -> None:
        def write() -> None:
            with contextlib.closing(sqlite3.connect(file)) as connection, connection:
                stored = value.encode("utf-8", "surrogatepass")  # a TEXT column keeps any bytes
                connection.execute(f"UPDATE jobs SET {column} = CAST(? AS TEXT) WHERE id = ?", (stored, job(2).id))

        await asyncio.to_thread(write)

    yield SQLiteStore(file), spoil


@contextlib.asynccontextmanager
async def postgres_rows(tmp_path: Path) -> AsyncIterator[tuple[PostgresStore, Spoil]]:
    schema = fresh_schema()
    other = await asyncpg.connect(pg.server().dsn)

    async def spoil(column: str, value: str) -> None:
        text = value.replace("\0", "").encode("utf-8", "replace").decode()  # PostgreSQL takes no other
        await other.execute(f"UPDATE {schema}.xiling_jobs SET {column} = $1 WHERE id = $2", text, job(2).id)

    try:
        yield pg_store(schema=schema), spoil
    finally:
        await other.close()


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("rows", [sqlite_rows, postgres_rows], ids=["sqlite", "postgres"])
async def test_whatever_stands_in_one_row_hides_no_other(
    tmp_path: Path, rows: Any, column: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Each column of one job in turn, with texts that no version has written: its neighbours are recovered, listed and
    claimed; it is skipped, named once at ERROR, and counted; asked for by itself it is a job or a StoreError."""
    caplog.set_level(logging.ERROR)
    async with rows(tmp_path) as (store, spoil):
        await store.open()
        for number in (1, 2, 3):
            await store.add(job(number, key=f"k{number}"))
            await store.change(job(number).id, answer(f"t{number}", due_at=NOW))
        await store.close()
        neighbours = {job(1).id, job(3).id}
        for value in HOSTILE if isinstance(store, SQLiteStore) else HOSTILE[::4]:  # they read rows alike
            await spoil(column, value)
            caplog.clear()
            await store.open()
            for _ in range(2):
                seen = [{record.id async for record in jobs} for jobs in (store.jobs(), store.unfinished())]
                seen.append({record.id for record in await store.claim(NOW + 1e6, limit=9, lease_s=-1e6)})
                assert all(neighbours <= ids for ids in seen), value
            is_skipped = job(2).id not in seen[0]
            assert store.unreadable == is_skipped
            assert len(
                [line for line in caplog.messages if f"job {job(2).id} of the store cannot be read" in line]
            ) == (is_skipped)
            assert max(map(len, caplog.messages), default=0) < 1_000
            for look in (store.get(job(2).id), store.by_key("k2"), store.by_task("t2")):
                with contextlib.suppress(StoreError):
                    assert (await look).id == job(2).id
                    assert not is_skipped
            await store.close()


async def test_one_unreadable_row_stops_no_client(sim: Simulator, tmp_path: Path) -> None:
    """It opens, recovers and finishes the others; the key of the bad row is refused, not bought again."""
    async with sqlite_rows(tmp_path) as (store, spoil):
        await store.open()
        await store.add(job(2, key="k2", request=model_v()))
        await store.add(job(3, key="k3", request=model_v()))
        await store.close()
        await spoil("tasks", '{"not": "a list"}')
        async with client_of(sim, store=store) as client:
            assert [found.key async for found in client.recover()] == ["k3"]
            with pytest.raises(StoreError):
                await client.submit(model_v(), key="k2")
            assert not sim.ledger.posts
            assert (await (await client.submit(model_v(), key="new")))[0].task_id
