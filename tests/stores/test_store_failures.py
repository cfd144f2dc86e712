"""Every method of every durable store, when what it stands on fails: a StoreError that says so, nothing half done, and
the same call works once the failure is over."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pg
import pytest
from disk import Disk
from pg import Wire, pg_store
from test_store_cancellation import METHODS
from test_store_contract import NOW, job

from xiling_async import SQLiteStore, StoreError
from xiling_async.models.record import State
from xiling_async.stores import Store

LIVELY_S = 20.0


async def filled(store: Store) -> None:
    await store.open()
    await store.add(job(1, key="k1"))
    await store.add(job(2, key="k2", state=State.ACCEPTED, task_ids=("t2",), outcomes=(None,), due_at=NOW))


async def fails(store: Store, method: str) -> None:
    with pytest.raises(StoreError) as caught:
        async with asyncio.timeout(LIVELY_S):
            await METHODS[method](store)
    assert caught.value.charged == "no"
    assert "stored" in str(caught.value) or "removed" in str(caught.value)


async def works(store: Store, method: str) -> None:
    """Now it does, and what was in the store before is as it was."""
    held = await store.get(job(2).id)
    assert held is not None
    assert (held.key, held.task_ids, held.version) == ("k2", ("t2",), 0)
    await METHODS[method](store)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("failing", ["BEGIN", "COMMIT", "everything"])
async def test_a_method_of_sqlite_whose_disk_fails(tmp_path: Path, failing: str, method: str) -> None:
    """At the beginning, at the commit, or at every statement."""
    disk = Disk()
    store = SQLiteStore(tmp_path / "jobs.db", connect=disk.connect)
    await filled(store)
    disk.fails = lambda statement: failing == "everything" or statement.startswith(failing)
    await fails(store, method)
    disk.fails = lambda statement: False
    await works(store, method)
    await store.close()


HUNG = ("add", "change", "get", "unfinished", "claim")  # each takes as long as its deadline


@pytest.mark.parametrize(
    ("failure", "method"), [*(("away", method) for method in METHODS), *(("hung", method) for method in HUNG)]
)
async def test_a_method_of_postgres_whose_database_fails(failure: str, method: str) -> None:
    """Refusing and cut, or swallowing everything in silence."""
    options: dict[str, Any] = {"timeout": 1, "command_timeout": 1}
    await asyncio.to_thread(pg.server)  # it takes a moment to start
    async with Wire() as wire:
        store = pg_store(wire.dsn, connect=options, heartbeat_s=60)
        await filled(store)
        if failure == "away":
            await wire.down()
        else:
            wire.passes.clear()
        await fails(store, method)
        if failure == "away":
            await wire.up()
        else:
            wire.passes.set()
            wire.cut()
        await works(store, method)
        await store.close()
