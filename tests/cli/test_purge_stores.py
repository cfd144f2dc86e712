"""`xiling purge`: by state and age, in a file and in PostgreSQL, and what it leaves alone."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from pg import fresh_schema, pg_store, server
from test_submit import STORED, job_record, paid, xiling

from xiling_async import SQLiteStore, State, Store
from xiling_async._internal.clock import SystemClock
from xiling_async.models.lifecycle import Acknowledged
from xiling_async.models.record import JobRecord
from xiling_async.simulator import Simulator

DAY_S = 86_400.0
KEEP = ("--older-than", "30d")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def aged(number: int, days: float, state: State = State.DONE) -> JobRecord:
    """A job that ended so long ago."""
    at = SystemClock().time() - days * DAY_S
    due_at = None if state.is_final else at
    return job_record(
        f"{number:032x}", key=f"k{number}", state=state, created_at=at, changed_at=at, due_at=due_at,
        metadata={"user": str(number)},
    )  # fmt: skip


async def filled(store: Store, *records: JobRecord, acknowledged: int | None = None) -> None:
    """A store with these jobs. `acknowledged`: it has a consumer, which is done with so many of them."""
    await store.open()
    for record in records:
        await store.add(record)
    if acknowledged is not None:
        now = SystemClock().time()
        while (handed_over := await store.hand_over(now, lease_s=60)) is not None and acknowledged:
            await store.change(handed_over.record.id, Acknowledged(at=now))
            acknowledged -= 1
    await store.close()


async def keys(store: Store) -> list[str | None]:
    await store.open()
    try:
        return [record.key async for record in store.jobs()]
    finally:
        await store.close()


def file() -> SQLiteStore:
    return SQLiteStore(Path.cwd() / "jobs.db")


async def test_what_ended_long_ago_is_forgotten(sim: Simulator) -> None:
    """Ended jobs of that age go, by any unit; younger and unfinished ones stay; again there is nothing to forget."""
    records = [aged(1, 90), aged(2, 31, State.REJECTED), aged(3, 29), aged(4, 90, State.UNCERTAIN), aged(5, 0.5)]
    await filled(file(), *records)
    ran = await xiling(sim, "purge", *KEEP, *STORED)
    assert (ran.code, ran.out, ran.err) == (0, "2 jobs forgotten.\n", "")
    assert sorted(map(str, await keys(file()))) == ["k3", "k4", "k5"]
    assert (await xiling(sim, "purge", *KEEP, *STORED)).out == "0 jobs forgotten.\n"
    assert (await xiling(sim, "purge", "--older-than", "13h", *STORED)).out == "1 job forgotten.\n"
    assert (await xiling(sim, "purge", "--older-than", "0s", *STORED)).out == "1 job forgotten.\n"
    assert await keys(file()) == ["k4"]
    assert (len(sim.ledger.gets), paid(sim)) == (0, (0, 0))


async def test_what_is_not_acknowledged_stays(sim: Simulator) -> None:
    """Where a consumer takes ended jobs, those it has not acknowledged stay, and are counted."""
    records = [*(aged(number, 90 - number) for number in range(5)), aged(5, 1), aged(6, 90, State.NOT_SENT)]
    await filled(file(), *records, acknowledged=2)
    ran = await xiling(sim, "purge", *KEEP, *STORED)
    assert ran.out.splitlines() == [
        "3 jobs forgotten.", "3 jobs kept: ended as long ago, and not acknowledged by a consumer yet.",
    ]  # fmt: skip
    assert await keys(file()) == ["k2", "k3", "k4", "k5"]


async def test_a_store_in_postgresql(sim: Simulator) -> None:
    """By its URL, as of `xiling jobs`."""
    schema = fresh_schema()
    await filled(pg_store(schema=schema), aged(1, 90), aged(2, 1))
    dsn = f"{server().dsn}&options=-c%20search_path%3D{schema}"
    ran = await xiling(sim, "purge", *KEEP, "--store", dsn)
    assert (ran.code, ran.out) == (0, "1 job forgotten.\n"), ran.err
    assert await keys(pg_store(schema=schema)) == ["k2"]


async def test_purge_makes_no_store(sim: Simulator) -> None:
    """A file that is not there, or of another application, is an error and stays what it is; so is one in use."""
    with closing(sqlite3.connect("other.db")) as other:
        other.execute("CREATE TABLE things (name)")
    for name, why in (("nope.db", "no such file"), ("other.db", "another application")):
        ran = await xiling(sim, "purge", *KEEP, "--store", name)
        assert (ran.code, ran.out) == (1, "")
        assert why in ran.error
    assert not Path("nope.db").exists()
    await filled(file(), aged(1, 90))
    store = file()
    await store.open()
    try:
        ran = await xiling(sim, "purge", *KEEP, *STORED)
        assert (ran.code, ran.out) == (1, "")
    finally:
        await store.close()
    assert await keys(file()) == ["k1"]
