"""When requests leave, seen by the service: after a 429, with callers who give up, in an outage, at the end."""

from __future__ import annotations

import asyncio
import logging

import pytest
from support import Road, client_of, gone, model_v, pumped, settle, started, turns_until

from xiling_async import Client, ClientClosed, Limits, MemoryStore, Polling, WaitTimeout, WebhookReceiver
from xiling_async.models.record import JobRecord
from xiling_async.simulator import Simulator, faults
from xiling_async.testing.clock import ManualClock

HOUR_S = 3600.0
PATIENT = Polling(grace=1e9)


async def test_a_client_that_got_a_429_submits_for_a_simulated_month() -> None:
    """Four submits a day after one 429: each is sent at once and bought, and the client closes."""
    clock = ManualClock()
    async with Simulator(manual=True) as sim, client_of(sim, clock=clock, polling=PATIENT) as client:
        for _ in range(3):
            await client.submit(model_v())
            clock.advance(1)
        sim.script(faults.rate_limited(20))
        await pumped(clock, client.submit(model_v()))
        posts = len(sim.ledger.posts)
        for _ in range(4 * 30):
            clock.advance(6 * HOUR_S)
            job = await asyncio.wait_for(client.submit(model_v()), 10)
            assert await sim.finish(job.task_ids[0]) == 200
        assert len(sim.ledger.posts) == posts + 4 * 30


async def test_callers_who_give_up_give_their_submit_slot_back() -> None:
    """Two a second; of 20 callers 19 give up after 0.3 s: who comes then gets the next slot."""
    clock = ManualClock()
    limits = Limits(submits_per_second=2)
    async with Simulator(manual=True) as sim, client_of(sim, clock=clock, limits=limits) as client:
        impatient = [await started(client.submit(model_v(str(number)))) for number in range(20)]
        await sim.wait_for_posts(1)
        clock.advance(0.3)
        for task in impatient[1:]:
            await gone(task)
        following = [await started(client.submit(model_v("later"))) for _ in range(2)]
        clock.advance(0.2)
        await sim.wait_for_posts(2)
        clock.advance(0.5)
        await sim.wait_for_posts(3)
        await asyncio.gather(*following)


async def test_refreshes_that_are_cancelled_do_not_delay_the_next_status_get() -> None:
    """2,000 of them, at 20 GETs a second: the next GET leaves within the tenth of a second, not after 100."""
    clock = ManualClock()
    async with Simulator(manual=True) as sim, client_of(sim, clock=clock, polling=PATIENT) as client:
        job = await client.submit(model_v())
        refreshes = [asyncio.create_task(job.refresh()) for _ in range(2_000)]
        await settle()
        for task in refreshes:
            task.cancel()
        await asyncio.wait(refreshes)
        gets = len(sim.ledger.gets)
        refreshing = await started(job.refresh())
        clock.advance(0.1)
        await turns_until(lambda: len(sim.ledger.gets) > gets)
        await refreshing


async def test_a_429_counts_while_the_client_closes() -> None:
    """A POST is still out when the client is left, and polling was answered 429: no GET leaves before its time."""
    clock = ManualClock()
    async with Simulator(manual=True) as sim:
        sim.script(faults.status_fault(*(429,) * 1_000))
        async with Client(sim.api_key, base_url=sim.base_url, clock=clock) as client:
            await client.submit(model_v())
            clock.advance(33.1)
            await turns_until(lambda: len(sim.ledger.gets) == 1)
            await turns_until(lambda: client.stats().paused_until is not None)
            sim.hold_answers()
            submitting = asyncio.create_task(client.submit(model_v()))
            clock.advance(30.1)
            await sim.wait_for_posts(2)
            await turns_until(lambda: len(sim.ledger.gets) >= 1)
            sim.release_answers()
            await submitting
            sim.hold_answers()
            held = asyncio.create_task(client.submit(model_v()))
            await settle(200)
            clock.advance(30.1)
            await sim.wait_for_posts(3)
            await settle(200)
            gets = len(sim.ledger.gets)

            async def later() -> None:
                for _ in range(60):
                    clock.advance(0.05)
                    await settle(30)
                sim.release_answers()

            releasing = asyncio.create_task(later())
        await releasing
        await asyncio.wait({held})
        since = [get.status for get in sim.ledger.gets[gets:]]
        assert 429 not in since[:-1], "a GET left in the pause that the one before it was told to keep"


async def test_a_service_that_is_away_for_an_hour_is_probed_and_then_asked_at_the_configured_rate() -> None:
    """200 overdue jobs: single probes, ever more rarely; then each job is delivered, 20 GETs a second."""
    clock = ManualClock()
    async with Simulator(manual=True) as sim:
        road = Road(sim)
        await road.open()
        options = {"base_url": road.base_url, "clock": clock, "polling": Polling(every=60)}
        async with Client(sim.api_key, limits=Limits(gets_per_second=20), **options) as client:  # type: ignore[arg-type]
            jobs = [await client.submit(model_v(str(number))) for number in range(200)]
            await road.close()
            for _ in range(720):
                clock.advance(5)
                await settle(40)
            polls = client.stats().gets
            assert 20 <= polls <= 250, "an hour of pauses of at most a minute, at least half of it"
            sim_tasks = sim.ledger.task_ids
            for task_id in sim_tasks:
                await sim.finish(task_id)
            await road.open()
            seconds = 0
            while any(job.state != "done" for job in jobs):
                seconds += 1
                before = len(sim.ledger.gets)
                for _ in range(20):
                    clock.advance(0.05)
                    await settle(20)
                assert len(sim.ledger.gets) - before <= 41, "at most twice a second's worth in any second"
                assert seconds < 90
            assert len(sim.ledger.posts) == 200
        await road.close()


async def test_a_revoked_key_is_said_once_and_is_in_the_wait_timeout(caplog: pytest.LogCaptureFixture) -> None:
    """Every status GET is answered 401: one WARNING for all jobs, and `WaitTimeout` says what polling got."""
    clock = ManualClock()
    async with Simulator(manual=True) as sim:
        sim.default(faults.status_fault(*(401,) * 1_000))
        async with Client(sim.api_key, base_url=sim.base_url, clock=clock) as client:
            jobs = [await client.submit(model_v(str(number))) for number in range(5)]
            waiting = await started(jobs[0].result(timeout=600))
            with caplog.at_level(logging.WARNING, logger="xiling_async"):
                for _ in range(620):
                    clock.advance(1)
                    await settle(30)
            with pytest.raises(WaitTimeout, match="HTTP 401") as caught:
                await waiting
            assert caught.value.charged == "yes"
            assert len(sim.ledger.gets) > 5
            told = [record.getMessage() for record in caplog.records if "401" in record.getMessage()]
            assert len(told) == 1


async def test_run_gives_up_in_time_also_while_it_submits() -> None:
    """`run(timeout=5)` and no answer to the POST: `WaitTimeout` after 5 s, with the job, which goes on."""
    clock = ManualClock()
    receiver = WebhookReceiver(port=0)
    async with Simulator(manual=True) as sim, client_of(sim, clock=clock, receiver=receiver) as client:
        sim.hold_answers()
        running = await started(client.run(model_v(), timeout=5))
        await sim.wait_for_posts(1)
        clock.advance(4.9)
        await settle()
        assert not running.done()
        clock.advance(0.2)
        with pytest.raises(WaitTimeout) as caught:
            await running
        sim.release_answers()
        assert await sim.finish(sim.ledger.task_ids[0]) == 200
        assert len(await caught.value.job) == 1
        assert len(sim.ledger.posts) == 1


async def test_a_run_that_was_not_sent_in_time_bought_nothing() -> None:
    """It stood in the queue behind a 429: `WaitTimeout`, charged: no, and no POST follows."""
    clock = ManualClock()
    async with Simulator(manual=True) as sim, client_of(sim, clock=clock) as client:
        sim.script(faults.rate_limited(30))
        first = await started(client.submit(model_v()))
        await turns_until(lambda: client.stats().paused_until is not None)
        running = await started(client.run(model_v(), timeout=5))
        clock.advance(5.1)
        with pytest.raises(WaitTimeout, match="nothing was bought"):
            await running
        clock.advance(30)
        await first
        await settle(100)
        assert (len(sim.ledger.posts), sim.ledger.paid_submits) == (2, 1)


class SharedStore(MemoryStore):
    """As if other processes used it, too."""

    is_shared = True


async def test_closing_does_not_wait_for_a_job_that_another_process_sends() -> None:
    """A submit waits for the key that another replica is sending: leaving the client sends it home at once."""
    clock, store = ManualClock(), SharedStore()
    async with Simulator(manual=True) as sim:
        async with client_of(sim, clock=clock, store=store) as client:
            theirs = JobRecord(
                id="0" * 32, kind="image_to_video", key="order-42", request=model_v(), asked=1,
                created_at=clock.time(), changed_at=clock.time(),
            )  # fmt: skip
            await store.add(theirs)
            waiting = await started(client.submit(model_v(), key="order-42"))
            assert not waiting.done()
        with pytest.raises(ClientClosed):
            await waiting
        assert sim.ledger.posts == []
