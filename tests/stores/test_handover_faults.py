"""What goes wrong while jobs are handed over: no job is handed to two consumers, and none is missed."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from outage import OutageStore
from pg import Wire, fresh_schema, pg_store
from support import client_of, model_v
from test_store_contract import FACTORIES, NOW
from test_store_handover import add_ended, handed_over
from test_unreadable import postgres_rows, sqlite_rows

from xiling_async import PostgresStore, StoreError
from xiling_async.models.record import State
from xiling_async.simulator import Simulator

LIVELY_S = 20.0


@contextlib.asynccontextmanager
async def opened(store: Any) -> AsyncIterator[Any]:
    await store.open()
    try:
        yield store
    finally:
        await store.close()


@pytest.mark.parametrize("rows", [sqlite_rows, postgres_rows], ids=["sqlite", "postgres"])
async def test_an_unreadable_row_stops_no_handover(tmp_path: Path, rows: Any) -> None:
    """Of three jobs that ended the first cannot be read: the others are handed over, and nothing waits for it alone."""
    async with rows(tmp_path) as (store, spoil):
        async with opened(store):
            for number in (2, 1, 3):
                await add_ended(store, number, NOW + (number != 2) * number)
        await spoil("tasks", '{"not": "a list"}')
        async with opened(store):
            assert await handed_over(store) == [f"{1:032x}", f"{3:032x}"]
            assert store.unreadable == 1
            assert await store.next_handover(NOW), "not at once: it is leased as the others are"


@pytest.mark.parametrize("name", FACTORIES)
async def test_a_store_error_ends_the_loop_and_the_next_one_goes_on(tmp_path: Path, name: str) -> None:
    """Nothing is lost: all jobs come to the two loops together."""
    store = OutageStore(FACTORIES[name](tmp_path))
    async with Simulator() as sim, client_of(sim, store=store) as client:
        jobs = [await client.submit(model_v(f"waves {number}")) for number in range(3)]
        await asyncio.gather(*(job.result() for job in jobs))
        seen = []
        async with aclosing(client.completed()) as loop:
            job = await anext(loop)
            await job.ack()
            seen.append(job.id)
            store.away = True
            with pytest.raises(StoreError, match="full"):
                await anext(loop)
            with pytest.raises(StopAsyncIteration):
                await anext(loop)
        store.away = False
        async with aclosing(client.completed()) as loop:
            for _ in range(2):
                job = await anext(loop)
                await job.ack()
                seen.append(job.id)
        assert sorted(seen) == sorted(job.id for job in jobs)


async def test_three_replicas_hand_no_job_over_twice() -> None:
    """500 jobs, 30 consumers at once; with the lease of each its consumer acknowledges it or leaves it."""
    schema = fresh_schema()
    async with contextlib.AsyncExitStack() as stack:
        stores: list[PostgresStore] = [
            await stack.enter_async_context(opened(pg_store(schema=schema))) for _ in range(3)
        ]
        every = asyncio.Semaphore(20)

        async def add(number: int) -> None:
            async with every:
                await add_ended(stores[number % 3], number, NOW + number)

        await asyncio.gather(*(add(number) for number in range(1, 501)))
        consumers = (handed_over(store) for store in stores * 10)
        counts = Counter(job_id for each in await asyncio.gather(*consumers) for job_id in each)
        assert len(counts) == 500
        assert set(counts.values()) == {1}


async def test_a_lost_notification_only_delays() -> None:
    """A consumer waits, and its connection for notifications is cut while a job ends elsewhere: when it is connected
    again, it has the job."""
    schema, is_asleep = fresh_schema(), asyncio.Event()

    class Noted(PostgresStore):
        async def next_handover(self, now: float) -> float | None:
            wait_s = await super().next_handover(now)
            is_asleep.set()
            return wait_s

    async with Wire() as wire, contextlib.AsyncExitStack() as stack:
        sim = await stack.enter_async_context(Simulator(manual=True))
        other = await stack.enter_async_context(opened(pg_store(schema=schema)))
        client = await stack.enter_async_context(client_of(sim, store=Noted(wire.dsn, schema=schema)))
        loop = await stack.enter_async_context(aclosing(client.completed()))
        waiting = asyncio.ensure_future(anext(loop))
        await is_asleep.wait()
        await wire.down()
        record = await add_ended(other, 1, NOW)
        assert not waiting.done()
        await wire.up()
        async with asyncio.timeout(LIVELY_S):
            job = await waiting
        assert (job.id, job.state) == (record.id, State.DONE)
