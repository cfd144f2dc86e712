"""Databases of the first landing: `fixtures/` has one of each kind, written by that code, with jobs in every state."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import pg
import pytest
from support import client_of

from xiling_async import Failed, PostgresStore, SQLiteStore, Succeeded
from xiling_async.models.record import JobRecord, State
from xiling_async.simulator import Simulator
from xiling_async.stores import Store

FIXTURES = Path(__file__).parent / "fixtures"
SECRET = b"first landing's secret of 32 byte"
SCHEMA = "first_landing"


def as_written(record: JobRecord) -> dict[str, Any]:
    """A record in the words of `first_landing.json`, which the first landing wrote beside its databases."""
    request: Any = record.request
    known = {name: getattr(record, name) for name in (
        "id", "key", "attempt", "version", "created_at", "changed_at", "due_at", "asked",
    )}  # fmt: skip
    return {
        **known,
        "state": record.state.value,
        "task_ids": list(record.task_ids),
        "outcomes": [_outcome(outcome) for outcome in record.outcomes],
        "refusal": None if record.refusal is None else record.refusal.error,
        "model": None if request is None else request.model,
        "prompt": None if request is None else request.prompt,
        "image_url": None if request is None or not request.image_url else str(request.image_url),
        "reference_images": list(request.reference_images) if request and request.reference_images else None,
        "mystery": None if request is None else dict(request.extra or {}).get("mystery"),
    }


def _outcome(outcome: Succeeded[Any] | Failed | None) -> Any:
    if outcome is None or isinstance(outcome, Failed):
        return None if outcome is None else outcome.message
    result = outcome.result
    return {"video_url": result.video_url, "width": result.width, "raw": result.raw, "file": outcome.file}


@pytest.fixture(params=["sqlite", "postgres"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    """A store of today, not yet open, on a copy of yesterday's database."""
    if request.param == "sqlite":
        file = tmp_path / "jobs.db"
        await asyncio.to_thread(shutil.copy, FIXTURES / f"{SCHEMA}.db", file)
        file.chmod(0o600)
        yield SQLiteStore(file)
        return
    connection = await asyncpg.connect(pg.server().dsn)
    try:
        await connection.execute((FIXTURES / f"{SCHEMA}.sql").read_text(encoding="utf-8"))
        yield PostgresStore(pg.server().dsn, schema=SCHEMA)
    finally:
        await connection.execute(f"DROP SCHEMA IF EXISTS {SCHEMA} CASCADE")
        await connection.close()


async def test_a_database_of_the_first_landing_opens_and_every_job_reads(store: Store) -> None:
    """Every state, model, outcome, refusal and strange key is as it was written; the callback secret is kept."""
    expected = json.loads((FIXTURES / f"{SCHEMA}.json").read_text(encoding="utf-8"))
    assert {job["state"] for job in expected} == set(State)
    await store.open()
    try:
        held = {record.id: as_written(record) async for record in store.jobs()}
        assert held == {job["id"]: job for job in expected}
        for job in expected:
            for look, name in [(store.get, job["id"]), (store.by_key, job["key"])]:
                record = None if name is None else await look(name)
                assert name is None or (record is not None and as_written(record) == job)
            for task_id in job["task_ids"]:
                owner = await store.by_task(task_id)
                assert owner is not None
                assert owner.id == job["id"]
        unfinished = [record.id async for record in store.unfinished()]
        assert unfinished == [job["id"] for job in expected if not State(job["state"]).is_final]
        assert await store.secret(b"another") == SECRET
    finally:
        await store.close()


async def test_what_the_first_landing_bought_is_not_bought_again(store: Store) -> None:
    """Its keys are the same jobs for a client of today: no POST leaves, except for what the service had refused."""
    await store.open()
    requests = {record.key: record.request async for record in store.jobs()}
    await store.close()
    async with Simulator() as sim, client_of(sim, store=store) as client:
        done = await client.find("done")
        assert done is not None
        assert [video.video_url for video in await done] == ["https://m.example/t5.mp4?s=1"]
        for key in ("accepted", "half done", "failed", "uncertain", "sending", "sent again"):
            request = requests[key]
            assert request is not None
            assert (await client.submit(request, key=key)).key == key
        assert not sim.ledger.posts
        request = requests["rejected"]
        assert request is not None
        await client.submit(request, key="rejected")
        assert len(sim.ledger.posts) == 1
