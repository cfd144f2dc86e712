"""A result that the store cannot write: it is held, used, and written as soon as the store takes it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from outage import OutageStore
from pg import pg_store
from support import client_of, model_v

from xiling_async import Client, MemoryStore, SQLiteStore, State, StoreError
from xiling_async.models.lifecycle import Accepted, AnswerLost, Event
from xiling_async.simulator import Simulator, faults
from xiling_async.stores.base import Store
from xiling_async.testing.clock import ManualClock, SkippingClock

FACTORIES: dict[str, Callable[[Path], Store]] = {
    "memory": lambda folder: MemoryStore(),
    "sqlite": lambda folder: SQLiteStore(folder / "jobs.db"),
    "postgres": lambda folder: pg_store(),
}


@pytest.fixture(params=FACTORIES)
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[OutageStore]:
    yield OutageStore(FACTORIES[request.param](tmp_path))


def is_answer(event: Event) -> bool:
    return isinstance(event, Accepted | AnswerLost)


async def bought_while_away(
    client: Client, store: OutageStore, key: str | None = "order-42", *, clock: ManualClock | None = None
) -> StoreError:
    """Buy a job; the store goes away when its answer is to be written, and stays away. `clock`: moved by hand."""
    store.goes_away_at = is_answer
    submitting = asyncio.create_task(client.submit(model_v(), key=key))
    while clock is not None and not submitting.done():
        await asyncio.sleep(0.001)
        if store.away:
            clock.advance(1)
    with pytest.raises(StoreError) as caught:
        await submitting
    store.goes_away_at = lambda event: False
    return caught.value


async def state_in(store: OutageStore, job_id: str | None) -> State | None:
    record = await store.inner.get(str(job_id))
    return None if record is None else record.state


@pytest.mark.parametrize("key", ["order-42", None], ids=["keyed", "keyless"])
async def test_a_bought_answer_is_written_when_the_store_is_back(store: OutageStore, key: str | None) -> None:
    """Away while the answer comes: the error has the ids; nobody calls again, and the row is accepted all the same."""
    async with Simulator(manual=True) as sim, client_of(sim, store=store, clock=SkippingClock(quiet_s=0.01)) as client:
        error = await bought_while_away(client, store, key)
        assert (error.charged, error.task_ids) == ("yes", tuple(sim.ledger.task_ids))
        assert await state_in(store, error.job_id) is State.SENDING
        store.away = False
        while await state_in(store, error.job_id) is not State.ACCEPTED:
            await asyncio.sleep(0.001)
        assert await sim.finish(error.task_ids[0]) == 200
        assert await state_in(store, error.job_id) is State.DONE


async def test_a_bought_job_is_awaited_while_the_store_is_away(store: OutageStore) -> None:
    """The error's own advice, `client.job(task_id)`, joins the job; GETs bring its result; it is written later."""
    clock = SkippingClock(quiet_s=0.01)
    async with Simulator() as sim, client_of(sim, store=store, clock=clock) as client:
        sim.default(faults.lost_callback())
        error = await bought_while_away(client, store)
        await sim.settled()
        job = client.job(error.task_ids[0])
        assert (job.id, job.key) == (error.job_id, "order-42")
        assert [video.task_id for video in await job] == list(error.task_ids)
        store.away = False
        while await state_in(store, error.job_id) is not State.DONE:
            await asyncio.sleep(0.001)
        again = await client.submit(model_v(), key="order-42")
        assert (again.id, len(await again), len(sim.ledger.posts)) == (error.job_id, 1, 1)


async def test_a_callback_of_an_unwritten_job_is_taken_when_the_store_is_back(store: OutageStore) -> None:
    """While it is away the callback is answered 503 and its waiter is woken; the repeat is 200, and nothing is lost."""
    clock = ManualClock()
    async with Simulator(manual=True) as sim, client_of(sim, store=store, clock=clock) as client:
        error = await bought_while_away(client, store, clock=clock)
        job = client.job(error.task_ids[0])
        assert await sim.finish(error.task_ids[0]) == 503
        assert [video.task_id for video in await job] == list(error.task_ids)
        store.away = False
        assert await sim.callback(error.task_ids[0]) == 200
        assert await state_in(store, error.job_id) is State.DONE


async def test_the_same_key_finds_its_unwritten_job(store: OutageStore) -> None:
    """The order is submitted again, by key, while the store is away and afterwards: one POST, one job."""
    async with Simulator() as sim, client_of(sim, store=store, clock=SkippingClock(quiet_s=0.01)) as client:
        error = await bought_while_away(client, store)
        again = await client.submit(model_v(), key="order-42")
        assert (again.id, again.task_ids) == (error.job_id, error.task_ids)
        for name in ("order-42", again.id, error.task_ids[0]):
            found = await client.find(name)
            assert found is not None
            assert found.id == again.id
        store.away = False
        assert len(await again) == 1
        assert len(sim.ledger.posts) == 1


async def test_an_uncertain_job_is_adopted_although_its_doubt_was_not_written(store: OutageStore) -> None:
    """The answer was cut and the store was away: the callback adopts the job, as if the doubt had been written."""
    clock = ManualClock()
    async with Simulator(manual=True) as sim, client_of(sim, store=store, clock=clock) as client:
        sim.script(faults.drop_after_accept())
        error = await bought_while_away(client, store, clock=clock)
        assert error.charged == "maybe"
        store.away = False
        assert await sim.finish(sim.ledger.task_ids[0]) == 200
        job = await client.submit(model_v(), key="order-42")
        assert (len(await job), len(sim.ledger.posts)) == (1, 1)


async def test_what_was_not_written_is_written_at_close(tmp_path: Path) -> None:
    """The store comes back just before the client is left: the next client finds the job accepted, and finishes it."""
    clock = ManualClock()  # no background try comes when the store is back
    path = tmp_path / "jobs.db"
    async with Simulator() as sim:
        sim.default(faults.lost_callback())
        store = OutageStore(SQLiteStore(path))
        async with client_of(sim, store=store, clock=clock) as client:
            error = await bought_while_away(client, store, clock=clock)
            store.away = False
        async with client_of(sim, store=SQLiteStore(path), clock=SkippingClock(quiet_s=0.01)) as client:
            job = await client.submit(model_v(), key="order-42")
            assert job.task_ids == error.task_ids
            await sim.settled()
            assert len(await job) == 1
        assert len(sim.ledger.posts) == 1


async def test_what_cannot_be_written_at_close_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """The store stays away to the end: one ERROR names the job and its task ids, so that nothing is lost in silence."""
    clock = ManualClock()
    store = OutageStore(MemoryStore())
    async with Simulator(manual=True) as sim:
        async with client_of(sim, store=store, clock=clock) as client:
            error = await bought_while_away(client, store, clock=clock)
            caplog.clear()
        said = [entry.getMessage() for entry in caplog.records if entry.levelno == logging.ERROR]
        assert len(said) == 1
        assert str(error.job_id) in said[0]
        assert error.task_ids[0] in said[0]


@pytest.mark.parametrize("way", ["submit", "run", "map"])
async def test_a_store_that_is_back_soon_is_not_noticed(
    store: OutageStore, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Away for 0.4 s when the answers of five jobs come: no caller gets an error, and each job is bought once."""
    clock = SkippingClock(quiet_s=0.02)
    async with Simulator() as sim, client_of(sim, store=store, clock=clock) as client:
        requests = [model_v(f"shot {number}") for number in range(5)]

        def goes_away(event: Event) -> bool:
            if is_answer(event) and not store.away:
                clock.call_later(0.4, lambda: setattr(store, "away", False))
                store.goes_away_at = lambda event: False
                return True
            return False

        store.goes_away_at = goes_away
        match way:
            case "submit":
                jobs = await asyncio.gather(*map(client.submit, requests))
                videos = [video for job in jobs for video in await job]
            case "run":
                videos = await asyncio.gather(*map(client.run, requests))
            case _:
                finished = [done async for done in client.map(requests)]
                assert [done.error for done in finished if not done.ok] == []
                videos = [video for done in finished for video in done.results]
        assert {video.task_id for video in videos} == set(sim.ledger.task_ids)
        assert len(sim.ledger.posts) == sim.ledger.paid_submits == 5
        assert not [entry for entry in caplog.records if entry.levelno >= logging.ERROR and "registry" in entry.name]


async def test_an_outage_of_any_length_loses_no_job(store: OutageStore) -> None:
    """Twenty jobs whose answers meet a store that is away, some finished meanwhile: all are done, each POST once."""
    async with Simulator() as sim, client_of(sim, store=store, clock=SkippingClock(quiet_s=0.02)) as client:
        store.goes_away_at = is_answer
        keys = [f"order-{number}" for number in range(20)]
        ends = await asyncio.gather(*(client.submit(model_v(key), key=key) for key in keys), return_exceptions=True)
        assert {type(end) for end in ends} == {StoreError}
        store.goes_away_at, store.away = (lambda event: False), False
        videos = await asyncio.gather(*(client.run(model_v(key), key=key) for key in keys))
        assert {video.task_id for video in videos} == set(sim.ledger.task_ids)
        assert len(sim.ledger.posts) == sim.ledger.paid_submits == 20


@pytest.mark.parametrize("operation", ["get", "by_key", "by_task", "claim", "next_due", "add", "change"])
async def test_no_single_failure_loses_a_paid_job(operation: str) -> None:
    """Each operation of the store fails, at its n-th call for every n until none is left: done, and paid once."""
    for n in range(1, 60):
        inner = MemoryStore()
        store, left, works = OutageStore(inner), n, getattr(inner, operation)

        async def failing(*given: Any, real: Any = works, **known: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                raise StoreError("The disk is full.")
            return await real(*given, **known)

        setattr(inner, operation, failing)
        async with Simulator() as sim, client_of(sim, store=store, clock=SkippingClock(quiet_s=0.005)) as client:
            sim.default(faults.lost_callback())
            while True:
                try:
                    job = await client.submit(model_v(), key="order-42")
                    await sim.settled()
                    assert len(await job) == 1
                    break
                except StoreError:
                    continue
            assert sim.ledger.paid_submits == 1
        if left > 0:
            return
    raise AssertionError("it never came to an end")
