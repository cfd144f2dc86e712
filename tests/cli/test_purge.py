"""`xiling purge`, and what `xiling jobs` shows of metadata."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from support import client_of, model_v
from test_submit import IMAGE, QUICK, STORED, paid, xiling

from xiling_async import SQLiteStore
from xiling_async.simulator import Simulator


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


async def bought(sim: Simulator, *keys: str, **metadata: str) -> None:
    """Jobs that have ended, in the store."""
    async with client_of(sim, store=SQLiteStore("jobs.db")) as client:
        for key in keys:
            await client.run(model_v(key), key=key, metadata=metadata)


async def listed(sim: Simulator, *options: str) -> list[dict[str, object]]:
    ran = await xiling(sim, "jobs", *STORED, "--json", *options)
    assert ran.code == 0, ran.err
    return [json.loads(line) for line in ran.out.splitlines()]


async def test_old_jobs_are_forgotten(sim: Simulator) -> None:
    """What ended before; a key that was forgotten buys again, one that was not does not."""
    await bought(sim, "old")
    await asyncio.to_thread(_ended_a_day_earlier)
    await bought(sim, "new")
    ran = await xiling(sim, "purge", *STORED, "--older-than", "12h")
    assert (ran.code, ran.out) == (0, "1 job forgotten.\n"), ran.err
    assert [job["key"] for job in await listed(sim)] == ["new"]
    before = paid(sim)
    for key, more in (("new", 0), ("old", 1)):
        assert (await xiling(sim, "submit", "waves", *IMAGE, *STORED, *QUICK, "--key", key)).code in (0, 2)
        assert paid(sim)[0] == before[0] + more


def _ended_a_day_earlier() -> None:
    with closing(sqlite3.connect("jobs.db")) as connection:
        connection.execute("UPDATE jobs SET changed_at = changed_at - 86400")
        connection.commit()


async def test_what_a_consumer_has_not_acknowledged_stays(sim: Simulator) -> None:
    """An application takes ended jobs from this store: only what it has dealt with is forgotten."""
    async with client_of(sim, store=SQLiteStore("jobs.db")) as client:
        for key in ("first", "second"):
            await client.run(model_v(key), key=key)
        job = await anext(client.completed())
        await job.ack()
    ran = await xiling(sim, "purge", *STORED, "--older-than", "0s")
    assert (ran.code, ran.out.splitlines()[0]) == (0, "1 job forgotten.")
    assert ran.out.splitlines()[1:] == ["1 job kept: ended as long ago, and not acknowledged by a consumer yet."]
    assert [each["key"] for each in await listed(sim)] == ["second"]


@pytest.mark.parametrize("age", ["", "30", "d", "-1d", "1w", "1.5h", "nan", "9" * 12 + "d"])
async def test_a_wrong_age_forgets_nothing(sim: Simulator, age: str) -> None:
    """Exit code 2, and what would be right."""
    await bought(sim, "old")
    ran = await xiling(sim, "purge", *STORED, f"--older-than={age}")
    assert (ran.code, ran.out) == (2, "")
    assert "30d" in ran.err
    assert len(await listed(sim)) == 1


async def test_a_store_that_is_none_is_said(sim: Simulator) -> None:
    ran = await xiling(sim, "purge", *STORED, "--older-than", "30d")
    assert (ran.code, "no such file" in ran.err) == (1, True)


async def test_metadata_is_listed_and_looked_for(sim: Simulator) -> None:
    """In the JSON and on the screen; `--metadata` and `--since` choose."""
    await bought(sim, "first", user="42")
    await bought(sim, "second", user="43")
    jobs = await listed(sim)
    assert [(job["key"], job["metadata"], job["retry_of"]) for job in jobs] == [
        ("first", {"user": "42"}, None),
        ("second", {"user": "43"}, None),
    ]
    assert all(job["ended_at"] == job["changed_at"] for job in jobs)
    assert [job["key"] for job in await listed(sim, "--metadata", "user=43")] == ["second"]
    assert len(await listed(sim, "--since", "1h")) == 2
    assert (await xiling(sim, "jobs", *STORED, "--metadata", "user")).code == 2
    assert (await xiling(sim, "jobs", *STORED, "--since", "yesterday")).code == 2
