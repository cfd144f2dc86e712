"""What a store costs that remembers a million jobs that have ended, against one that remembers ten thousand.

`python benchmarks/ended.py [--quick]` (needs the extras `postgres` and `dev`, for a PostgreSQL from pip). All but a few
jobs are done, acknowledged, of one kind and of one tenant; each time is the best of three, in milliseconds. The first
job of a listing comes with the page it stands on.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sqlite3
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import asyncpg
from replicas import postgres
from report import show
from store import heard, intent

from xiling_async import PostgresStore, SQLiteStore
from xiling_async.models.lifecycle import Accepted, Acknowledged, decide
from xiling_async.models.query import JobQuery
from xiling_async.models.record import JobRecord, State
from xiling_async.stores.base import Store
from xiling_async.stores.listing import pair_hash
from xiling_async.stores.rows import COLUMNS, row_of

NOW: Final = 1_800_000_000.0
OLD: Final = 10  # jobs that ended long before all others
FEW: Final = 3
ROUNDS: Final = 3
TENANT, ORDER = ("tenant", "a"), ("order", "7")
LISTINGS: Final = {
    "all": JobQuery(),
    "the newest first": JobQuery(newest_first=True),
    "a common state": JobQuery(states=frozenset({State.DONE})),
    "a rare state": JobQuery(states=frozenset({State.FAILED})),
    "a common kind": JobQuery(kind="image_to_video"),
    "a rare kind": JobQuery(kind="image_generate"),
    "a rare kind in a rare state": JobQuery(kind="image_generate", states=frozenset({State.FAILED})),
    "common metadata": JobQuery(metadata=dict([TENANT])),
    "rare metadata": JobQuery(metadata=dict([ORDER])),
    "common and rare metadata": JobQuery(metadata=dict([TENANT, ORDER])),
    "common metadata in a rare state": JobQuery(metadata=dict([TENANT]), states=frozenset({State.FAILED})),
    "since lately": JobQuery(since=NOW - 1),
}

# {n} numbers the jobs; {n + 1} is of the last that ended. Rare are the last FEW jobs.
_VALUES: Final = {
    "id": "{text}",
    "key": "'order-' || {n}",
    "kind": "CASE WHEN {n} < {few} THEN 'image_generate' ELSE kind END",
    "request": "CASE WHEN {n} < {few} THEN NULL ELSE request END",
    "created_at": "{now} - {n}",
    "changed_at": "CASE WHEN {n} >= {jobs} - {old} THEN 1000 * ({jobs} - {n}) ELSE {now} - {n} END",
    "state": "CASE WHEN {n} < {few} THEN 'failed' WHEN {n} < 2 * {few} THEN 'accepted' ELSE state END",
    "tasks": "REPLACE(tasks, 'i2v-0', 'i2v-' || {n})",
    "metadata": """CASE WHEN {n} < {few} THEN '{{"tenant":"a","order":"7"}}' ELSE metadata END""",
    "handover_at": "CASE WHEN {n} >= 2 * {few} AND {n} < 10 * {few} THEN 0 END",
}


def template() -> JobRecord:
    """A job that is done."""
    record = intent(0, NOW)
    for event in (Accepted(attempt=1, at=NOW, task_ids=("i2v-0",), due_at=None), heard(0, NOW)):
        changed = decide(record, event).record
        assert changed is not None
        record = changed
    return record.next_version(metadata=dict([TENANT]))


def selected(jobs: int, **words: str) -> str:
    known = {"jobs": jobs, "old": OLD, "few": FEW, "now": NOW, **words}
    return ", ".join(_VALUES.get(name, name).format_map(known) for name in COLUMNS)


def fill_sqlite(file: Path, jobs: int) -> None:
    connection = sqlite3.connect(file)
    connection.executescript("PRAGMA synchronous = off; PRAGMA cache_size = -1000000")
    columns = ", ".join(COLUMNS)
    with connection:
        connection.execute(f"CREATE TEMP TABLE one AS SELECT {columns} FROM jobs")
        marks = ", ".join("?" * len(COLUMNS))
        connection.execute(f"INSERT INTO one VALUES ({marks})", row_of(template()))
        text = "printf('%032x', n.i * 2654435761 % 4294967296)"
        connection.execute(
            f"WITH RECURSIVE n (i) AS (SELECT {jobs} - 1 UNION ALL SELECT i - 1 FROM n WHERE i > 0) "
            f"INSERT INTO jobs ({columns}) SELECT {selected(jobs, n='n.i', text=text)} FROM n, one"
        )
        connection.execute("INSERT INTO tasks SELECT json_extract(tasks, '$[0][0]'), id FROM jobs ORDER BY 1")
        for pair, condition in ((TENANT, "TRUE"), (ORDER, f"created_at > {NOW - FEW}")):
            connection.execute(
                f"INSERT INTO metadata SELECT ?, created_at, id FROM jobs WHERE {condition} ORDER BY 2",
                (pair_hash(*pair),),
            )
    connection.close()


async def fill_postgres(dsn: str, jobs: int) -> None:
    connection = await asyncpg.connect(dsn)
    columns = ", ".join(COLUMNS)
    await connection.execute(f"CREATE TEMP TABLE one AS SELECT {columns} FROM xiling_jobs")
    marks = ", ".join(f"${place}" for place in range(1, len(COLUMNS) + 1))
    await connection.execute(f"INSERT INTO one VALUES ({marks})", *row_of(template()))
    text = "lpad(to_hex(n.i * 2654435761 % 4294967296), 32, '0')"
    await connection.execute(
        f"INSERT INTO xiling_jobs ({columns}, key_hash, mark) SELECT {selected(jobs, n='n.i', text=text)}, "
        f"sha256(convert_to('order-' || n.i, 'UTF8')), '' FROM generate_series({jobs - 1}::bigint, 0, -1) AS n (i), one"
    )
    await connection.execute(
        "INSERT INTO xiling_tasks SELECT sha256(convert_to(tasks::json->0->>0, 'UTF8')), id FROM xiling_jobs"
    )
    for pair, condition in ((TENANT, "TRUE"), (ORDER, f"created_at > {NOW - FEW}")):
        await connection.execute(
            f"INSERT INTO xiling_metadata SELECT $1, created_at, id FROM xiling_jobs WHERE {condition}",
            pair_hash(*pair),
        )
    await connection.execute("VACUUM ANALYZE")
    await connection.close()


async def best_ms(work: Callable[[], Awaitable[Any]]) -> float:
    times = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        await work()
        times.append(time.perf_counter() - begun)
    return min(times) * 1000


async def measured(store: Store) -> dict[str, float]:
    """Milliseconds of everything that is asked of this store, which is filled."""

    async def open_and_close() -> None:
        await store.open()
        await store.close()

    async def find() -> None:
        assert await store.by_key("order-1000") is not None

    async def recover() -> None:
        assert await store.recover_orphans(NOW, doubt_s=3600, per_second=5) == FEW
        assert len([record async for record in store.unfinished()]) == FEW

    async def hand_over() -> None:
        handed_over = await store.hand_over(NOW, lease_s=300)
        assert handed_over is not None
        await store.change(handed_over.record.id, Acknowledged(at=NOW))

    async def first(query: JobQuery) -> None:
        async with contextlib.aclosing(store.jobs(query)) as jobs:  # type: ignore[type-var]
            assert query.matches(await anext(jobs))

    purges = iter(range(1, OLD))

    async def purge_one() -> None:
        assert await store.purge(0, now=1000.0 * next(purges) + 500) == 1

    times = {"open and close": await best_ms(open_and_close)}
    await store.open()
    try:
        times["find by key"] = await best_ms(find)
        times["recover"] = await best_ms(recover)
        times["hand over and acknowledge"] = await best_ms(hand_over)
        for name, query in LISTINGS.items():
            times[f"first listed: {name}"] = await best_ms(lambda query=query: first(query))  # type: ignore[misc]
        times["purge one"] = await best_ms(purge_one)
    finally:
        await store.close()
    return times


async def in_sqlite(folder: Path, jobs: int) -> dict[str, float]:
    store = SQLiteStore(folder / f"{jobs}.db")
    await store.open()
    await store.close()
    await asyncio.to_thread(fill_sqlite, folder / f"{jobs}.db", jobs)
    return await measured(store)


async def in_postgres(dsn: str, jobs: int) -> dict[str, float]:
    connection = await asyncpg.connect(dsn)
    await connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    await connection.close()
    store = PostgresStore(dsn)
    await store.open()
    await store.close()
    await fill_postgres(dsn, jobs)
    return await measured(store)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few seconds, for CI: a look, not a measurement")
    sizes = (2_000, 20_000) if parser.parse_args().quick else (10_000, 1_000_000)
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix="bench-") as folder:  # /tmp may be memory
        times = {f"SQLite, {jobs:,}": asyncio.run(in_sqlite(Path(folder), jobs)) for jobs in sizes}
        with postgres(Path(folder)) as (dsn, _):
            times |= {f"PostgreSQL, {jobs:,}": asyncio.run(in_postgres(dsn, jobs)) for jobs in sizes}
    rows = [(what, *(f"{each[what]:.1f}" for each in times.values())) for what in next(iter(times.values()))]
    show("milliseconds with so many ended jobs", ("what", *times), rows)


if __name__ == "__main__":
    main()
