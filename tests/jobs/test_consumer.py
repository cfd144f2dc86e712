"""Hand-over: every ended job is given until it is acknowledged, to one consumer at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from support import client_of, gone, model_v, settle, started, turns_until

from xiling_async import Client, ClientClosed, InvalidRequest, Job, MemoryStore, Rejected, SQLiteStore, State
from xiling_async.simulator import Simulator, faults
from xiling_async.telemetry.events import JobAcknowledged, JobHandedOver
from xiling_async.testing.clock import ManualClock


async def next_of(jobs: AsyncIterator[Job[Any]]) -> Job[Any]:
    return await anext(jobs)


async def bought(client: Client, count: int, clock: ManualClock | None = None) -> list[Job[Any]]:
    """So many jobs that have ended, in the order of their ends."""
    jobs = []
    for number in range(count):
        job = await client.submit(model_v(f"waves {number}"), key=f"order-{number}")
        await job.outcomes()
        jobs.append(job)
        if clock is not None:
            clock.advance(1)
    return jobs


async def test_ended_jobs_are_given_and_then_those_that_end() -> None:
    """The one that ended first at first; the loop waits for the next end."""
    async with Simulator() as sim, client_of(sim) as client:
        first, second = await bought(client, 2)
        async with aclosing(client.completed()) as jobs:
            for expected in (first, second):
                job = await anext(jobs)
                assert (job.id, job.key, job.state) == (expected.id, expected.key, State.DONE)
                assert await job == await expected
                await job.ack()
            waiting = await started(next_of(jobs))
            assert not waiting.done()
            third = await client.submit(model_v("later"), metadata={"user": "42"})
            job = await waiting
            assert (job.id, dict(job.metadata)) == (third.id, {"user": "42"})


async def test_every_end_is_given_also_the_bad_ones() -> None:
    """A failed job, too; not one that was refused, since its submitter was told and nothing was bought."""
    async with Simulator() as sim, client_of(sim) as client:
        sim.script(faults.failed("no"))
        failed = await client.submit(model_v("one"))
        await failed.outcomes()
        sim.script(faults.status(400))
        with pytest.raises(Rejected):
            await client.submit(model_v("two"), key="two")
        async with aclosing(client.completed()) as jobs:
            job = await anext(jobs)
            assert (job.id, job.state) == (failed.id, State.FAILED)
            await job.ack()
            waiting = await started(next_of(jobs))
            await settle(200)
            assert not waiting.done()
            await gone(waiting)


async def test_nothing_is_claimed_that_the_loop_has_not_asked_for() -> None:
    """Backpressure: a slow consumer holds one job, and another consumer gets the next."""
    async with Simulator() as sim, client_of(sim) as client:
        expected = await bought(client, 3)
        async with aclosing(client.completed()) as slow, aclosing(client.completed()) as quick:
            assert (await anext(slow)).id == expected[0].id
            assert (await anext(quick)).id == expected[1].id
            assert (await anext(quick)).id == expected[2].id
            assert client.stats().handover == {"handed_over": 3}


async def test_what_is_not_acknowledged_is_given_again_after_its_lease() -> None:
    """And not before, to whoever asks; a consumer that waits is woken when the lease ends."""
    clock = ManualClock()
    async with Simulator() as sim, client_of(sim, clock=clock) as client:
        (expected,) = await bought(client, 1)
        async with aclosing(client.completed(lease=60)) as jobs:
            assert (await anext(jobs)).id == expected.id
        async with aclosing(client.completed(lease=60)) as jobs:
            waiting = await started(next_of(jobs))
            clock.advance(59)
            await settle()
            assert not waiting.done()
            clock.advance(2)
            again = await waiting
            assert again.id == expected.id
            assert client.stats().handover == {"handed_over": 2, "again": 1}
            await again.ack()
            waiting = await started(next_of(jobs))
            clock.advance(1_000)
            await settle()
            assert not waiting.done()
            await gone(waiting)


async def test_a_lease_that_begins_elsewhere_is_known_to_those_who_wait() -> None:
    """One consumer waits for nothing in particular; another gets a job and drops it."""
    clock = ManualClock()
    async with Simulator(manual=True) as sim, client_of(sim, clock=clock) as client:
        job = await client.submit(model_v())
        async with aclosing(client.completed(lease=10)) as jobs, aclosing(client.completed(lease=10)) as others:
            waiting = {await started(next_of(jobs)), await started(next_of(others))}
            assert await sim.finish(job.task_ids[0]) == 200
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            await settle()
            assert [task.done() for task in waiting] == [False]
            clock.advance(11)
            (first,), (second,) = done, waiting
            assert (await second).id == (await first).id == job.id


async def test_acknowledged_once_for_all() -> None:
    """Twice changes nothing; a job found by its key can be acknowledged too; the events tell of it."""
    events: list[object] = []
    async with Simulator() as sim, client_of(sim, on_event=events.append) as client:
        (expected,) = await bought(client, 1)
        async with aclosing(client.completed()) as jobs:
            await anext(jobs)
        found = await client.find("order-0")
        assert found is not None
        await found.ack()
        await found.ack()
        await expected.ack()
        assert client.stats().handover == {"handed_over": 1, "acknowledged": 1}
        told = [event for event in events if isinstance(event, (JobHandedOver, JobAcknowledged))]
        assert [type(event) for event in told] == [JobHandedOver, JobAcknowledged]
        assert {event.job_id for event in told} == {expected.id}


async def test_what_has_not_ended_cannot_be_acknowledged() -> None:
    """Nor is anything changed by it."""
    async with Simulator(manual=True) as sim, client_of(sim) as client:
        job = await client.submit(model_v())
        with pytest.raises(InvalidRequest, match="accepted"):
            await job.ack()
        assert await sim.finish(job.task_ids[0]) == 200
        await job.ack()
        assert client.stats().handover == {"acknowledged": 1}


@pytest.mark.parametrize("lease", [0, -1, float("nan"), float("inf"), "300", True, None])
async def test_a_wrong_lease_claims_nothing(lease: Any) -> None:
    """It is said at once, where the loop begins."""
    async with Simulator() as sim, client_of(sim) as client:
        await bought(client, 1)
        with pytest.raises(InvalidRequest, match="lease"):
            await anext(client.completed(lease=lease))
        assert client.stats().handover == {}


async def test_closing_the_client_ends_the_loop() -> None:
    """`ClientClosed`, and the job that was not acknowledged is given to the next client of the store."""
    store = MemoryStore()
    clock = ManualClock()
    async with Simulator() as sim:
        async with client_of(sim, store=store, clock=clock) as client:
            (expected,) = await bought(client, 1)
            jobs = client.completed(lease=60)
            held = await anext(jobs)
            waiting = await started(next_of(jobs))
        with pytest.raises(ClientClosed, match="handed over"):
            await waiting
        with pytest.raises(ClientClosed):
            await held.ack()
        clock.advance(61)
        async with client_of(sim, store=store, clock=clock) as client, aclosing(client.completed()) as jobs:
            again = await anext(jobs)
            assert again.id == expected.id
            await again.ack()


async def test_it_outlives_the_process(tmp_path: Path) -> None:
    """A store in a file: what one client did not acknowledge, the next is given; what it did, not."""
    clock = ManualClock()
    async with Simulator() as sim:
        async with client_of(sim, store=SQLiteStore(tmp_path / "jobs.db"), clock=clock) as client:
            first, second = await bought(client, 2, clock)
            async with aclosing(client.completed(lease=60)) as jobs:
                acknowledged = await anext(jobs)
                assert acknowledged.id == first.id
                await acknowledged.ack()
                assert (await anext(jobs)).id == second.id
        clock.advance(61)
        store = SQLiteStore(tmp_path / "jobs.db")
        async with client_of(sim, store=store, clock=clock) as client, aclosing(client.completed()) as jobs:
            assert (await anext(jobs)).id == second.id
            assert client.stats().handover == {"handed_over": 1, "again": 1}


async def test_many_consumers_share_the_jobs() -> None:
    """Twenty consumers, a hundred jobs: each is dealt with once."""
    dealt_with: list[str] = []
    async with Simulator() as sim, client_of(sim) as client:

        async def consume() -> None:
            async for job in client.completed():
                dealt_with.append(job.id)
                await job.ack()

        consumers = [await started(consume()) for _ in range(20)]
        expected = [done.job.id async for done in client.map(model_v(f"waves {n}") for n in range(100)) if done.job]
        await turns_until(lambda: client.stats().handover.get("acknowledged") == 100)
        assert sorted(dealt_with) == sorted(expected)
        assert client.stats().handover == {"handed_over": 100, "acknowledged": 100}
        for consumer in consumers:
            await gone(consumer)


async def test_an_idle_consumer_asks_nothing() -> None:
    """While nothing ends, an hour costs no look into the store."""

    class Counting(MemoryStore):
        asked = 0

        async def hand_over(self, now: float, *, lease_s: float) -> Any:
            self.asked += 1
            return await super().hand_over(now, lease_s=lease_s)

    store, clock = Counting(), ManualClock()
    async with (
        Simulator() as sim,
        client_of(sim, store=store, clock=clock) as client,
        aclosing(client.completed()) as jobs,
    ):
        waiting = await started(next_of(jobs))
        await settle()
        before = store.asked
        for _ in range(60):
            clock.advance(60)
            await settle()
        assert (before, store.asked) == (1, 1)
        await gone(waiting)
