"""What `purge` gives back of a SQLite file, and that jobs are written meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import shutil
import sqlite3
from pathlib import Path

import pytest
from disk import Disk
from test_sqlite import NOW, job

from xiling_async import SQLiteStore
from xiling_async.models.lifecycle import Refused
from xiling_async.models.record import Refusal

FIRST_LANDING = Path(__file__).parent / "fixtures" / "first_landing.db"
PRIVATE = 0o600
SHRINK = ("PRAGMA incremental_vacuum", "VACUUM")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "jobs.db"


async def fill(file: Path, jobs: int) -> None:
    """Give a store's file so many jobs of 2 KB that have ended."""
    store = SQLiteStore(file)
    await store.open()
    await store.add(job(119))
    no = Refusal(error="RequestRejected", message="x" * 2_000)
    await store.change(job(119).id, Refused(attempt=1, at=NOW, refusal=no, sent=True))
    await store.close()

    def write() -> None:
        with contextlib.closing(sqlite3.connect(file)) as connection, connection:
            columns = [row[1] for row in connection.execute("PRAGMA table_info(jobs)")]
            values = ", ".join({"id": "printf('%032x', n.i)", "key": "'k' || n.i"}.get(name, name) for name in columns)
            connection.execute(
                "WITH RECURSIVE n (i) AS (SELECT 1000 UNION ALL SELECT i + 1 FROM n WHERE i < ?) "
                f"INSERT INTO jobs ({', '.join(columns)}) SELECT {values} FROM n, jobs WHERE jobs.key = 'k119'",
                (jobs + 999,),
            )

    await asyncio.to_thread(write)


def size(file: Path) -> int:
    return sum(path.stat().st_size for path in file.parent.glob(f"{file.name}*"))


async def test_a_file_shrinks_when_jobs_are_forgotten(file: Path) -> None:
    """By piece after piece, to about what an empty one has; what is kept is still there."""
    await fill(file, 3_000)
    store = SQLiteStore(file)
    await store.open()
    await store.add(job(120))
    before = size(file)
    assert await store.purge(0, now=NOW + 100) == 3_001
    assert before > 6_000_000
    assert size(file) < 300_000
    assert await store.by_key("k120") == job(120)
    await store.close()


async def test_a_file_of_the_first_landing_shrinks_too(file: Path) -> None:
    """It is rewritten at the first purge that leaves space, and at no other one."""
    await asyncio.to_thread(shutil.copy, FIRST_LANDING, file)
    file.chmod(PRIVATE)
    await fill(file, 3_000)
    disk = Disk()
    store = SQLiteStore(file, connect=disk.connect)
    await store.open()
    kept = [record async for record in store.unfinished()]
    before = size(file)
    assert await store.purge(0, now=NOW + 100) > 3_000
    assert size(file) < before / 10
    assert [record async for record in store.jobs()] == kept
    await store.close()
    await fill(file, 3_000)
    await store.open()
    assert await store.purge(0, now=NOW + 100) > 3_000
    assert size(file) < before / 10
    await store.close()
    assert disk.statements.count("VACUUM") == 1


@pytest.mark.parametrize("shrink", SHRINK)
async def test_a_full_disk_loses_no_job(file: Path, shrink: str, caplog: pytest.LogCaptureFixture) -> None:
    """The jobs are forgotten, the others are there and can be written, and the next purge tries again."""
    if shrink == "VACUUM":
        await asyncio.to_thread(shutil.copy, FIRST_LANDING, file)
        file.chmod(PRIVATE)
    await fill(file, 3_000)
    disk = Disk(fails=lambda statement: statement.startswith(shrink))
    store = SQLiteStore(file, connect=disk.connect)
    await store.open()
    before = size(file)
    with caplog.at_level(logging.WARNING):
        assert await store.purge(0, now=NOW + 100) > 3_000
    assert "did not become smaller" in caplog.text
    assert await store.add(job(120)) == job(120)
    disk.fails = lambda statement: False
    assert await store.purge(0, now=NOW + 100) == 0
    assert size(file) < before / 10
    assert await store.by_key("k120") == job(120)
    await store.close()


async def test_jobs_are_written_while_a_file_shrinks(file: Path) -> None:
    """A commit between any two pieces, if there is something to write."""
    await fill(file, 3_000)
    disk = Disk()
    store = SQLiteStore(file, connect=disk.connect)
    await store.open()
    purging = asyncio.create_task(store.purge(0, now=NOW + 100))
    number = 10_000
    while not purging.done():
        number += 1
        await store.add(job(number))
    await purging
    await store.close()
    pieces = [place for place, each in enumerate(disk.statements) if each.startswith("PRAGMA incremental_vacuum")]
    assert len(pieces) >= 6
    assert all("COMMIT" in disk.statements[one:two] for one, two in itertools.pairwise(pieces))
