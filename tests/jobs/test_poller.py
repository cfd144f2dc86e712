"""The poller on real sockets and a hand-driven clock: what is overdue is asked about, at the right pace."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from typing import Any, Final

import pytest
from support import GatedStore, NotingStore, client_of, gone, model_v, pumped, settle, started, turns_until

from xiling_async import (
    Client,
    Limits,
    MemoryStore,
    NotSent,
    Polling,
    ResultExpired,
    ServiceUnavailable,
    StoreError,
    SubmitUncertain,
    Succeeded,
    Timeouts,
    WebhookReceiver,
)
from xiling_async.models.lifecycle import Change, Event, OutcomeReported
from xiling_async.models.record import JobRecord
from xiling_async.simulator import Simulator, faults
from xiling_async.testing.clock import ManualClock

EVERY_S: Final = 30.0  # the vendor's own pace for video
GRACE_S: Final = 10 * EVERY_S
LIMIT_S: Final = 3600.0  # three times the vendor's 20 minutes
WEEK_S: Final = 7 * 24 * 3600.0
DOUBT_S: Final = Timeouts().uncertain
SECRET: Final = "a secret of sixteen bytes or more"


def polling_client(sim: Simulator, clock: ManualClock, **options: Any) -> Client:
    """A client without a receiver."""
    return Client(sim.api_key, base_url=sim.base_url, clock=clock, **options)


async def look(sim: Simulator, store: MemoryStore, clock: ManualClock, gets: int = 1) -> float:
    """Go on to when the next job falls due, and wait until the service was asked and the answer written down.

    How many seconds that was ahead. Nobody may have been asked before.
    """
    before, due_at = len(sim.ledger.gets), await store.next_due()
    assert due_at is not None, "nothing is due, ever"
    ahead_s = due_at - clock.time()
    clock.advance(max(0.0, ahead_s - 0.01))
    await settle()
    assert len(sim.ledger.gets) == before, "asked before it was due"
    clock.advance(0.02)
    await seen(sim, lambda: len(sim.ledger.gets) > before)
    leased_until = await store.next_due()
    for _ in range(gets - 1):  # each GET takes its turn
        await settle()
        clock.advance(0.05)
    await turns_until(lambda: _front(store) != leased_until)
    await settle()
    assert len(sim.ledger.gets) == before + gets
    return ahead_s


def _front(store: MemoryStore) -> float | None:
    """`next_due` without awaiting."""
    step = store.next_due()
    try:
        step.send(None)
    except StopIteration as end:
        found: float | None = end.value
        return found
    raise AssertionError("a MemoryStore never waits")


async def seen(sim: Simulator, holds: Callable[[], bool]) -> None:
    """Wait until the service has seen this. It takes milliseconds; what never comes shall fail, not hang."""
    async with asyncio.timeout(30):
        await sim.ledger.until(holds)


async def run_until(clock: ManualClock, holds: Callable[[], bool], *, step_s: float, limit_s: float) -> float:
    """Let the clock go on in steps until this holds; how many seconds it took."""
    began = clock.time()
    while not holds():
        assert clock.time() - began < limit_s, "it did not come to hold"
        clock.advance(step_s)
        await settle()
    return clock.time() - began


# --- promise 7, and the pace -----------------------------------------------------------------------------------------


async def test_promise_7_a_lost_callback_is_found_by_the_sweeper() -> None:
    """The service never calls back: after the grace one GET brings the video to the waiter."""
    clock, store = ManualClock(), MemoryStore()
    async with Simulator() as sim, client_of(sim, clock=clock, store=store) as client:
        sim.default(faults.lost_callback())
        job = await client.submit(model_v(count=2), key="one")
        await sim.settled()
        waiting = await started(job.result())
        assert GRACE_S <= await look(sim, store, clock, gets=2) <= GRACE_S * 1.1
        assert [video.task_id for video in await waiting] == list(sim.ledger.task_ids)
        assert (sim.ledger.callbacks, sim.ledger.paid_submits, len(sim.ledger.posts)) == ([], 1, 1)
        assert await store.next_due() is None, "what is finished is not asked about again"


@pytest.mark.parametrize(
    ("polling", "has_receiver", "first_s", "every_s"),
    [
        (Polling(), True, GRACE_S, EVERY_S),
        (Polling(), False, EVERY_S, EVERY_S),
        (Polling(every=7), True, 70, 7),
        (Polling(every=7), False, 7, 7),
        (Polling(every=7, grace=100), True, 100, 7),
        (Polling(every=7, grace=0), True, 0, 7),
        (Polling(grace=500), False, EVERY_S, EVERY_S),
    ],
)
async def test_its_pace(polling: Polling, has_receiver: bool, first_s: float, every_s: float) -> None:
    """The callback is trusted for the grace; then, and without a receiver from the start, one GET every `every`."""
    clock, store = ManualClock(), MemoryStore()
    async with Simulator(manual=True) as sim:
        make = client_of if has_receiver else polling_client
        async with make(sim, clock=clock, store=store, polling=polling) as client:
            job = await client.submit(model_v())
            if first_s:
                assert first_s <= await look(sim, store, clock) <= first_s * 1.1
            else:
                await seen(sim, lambda: len(sim.ledger.gets) == 1)
                await settle()
            for _ in range(4):
                assert every_s * 0.9 <= await look(sim, store, clock) <= every_s * 1.1
            sim.set_result(job.task_ids[0])
            await look(sim, store, clock)
            assert job.state == "done"


async def test_due_times_are_spread() -> None:
    """Jobs that were bought at the same moment are not all asked about at the same moment, now and later."""
    clock, store = ManualClock(), NotingStore()
    async with Simulator(manual=True) as sim, polling_client(sim, clock, store=store) as client:
        await asyncio.gather(*(client.submit(model_v()) for _ in range(100)))
        for low, high in ((1.0, 1.1), (0.9, 1.1)):
            ahead = [(record.due_at or 0.0) - clock.time() for record in (await store.everything()).values()]
            assert all(low * EVERY_S - 10 <= due_s <= high * EVERY_S for due_s in ahead)
            assert len({round(due_s, 6) for due_s in ahead}) > 90
            assert max(ahead) - min(ahead) > (high - low) * EVERY_S / 2
            gets = len(sim.ledger.gets)
            await run_until(clock, lambda gets=gets: len(sim.ledger.gets) >= gets + 100, step_s=0.5, limit_s=60)  # type: ignore[misc]


async def test_old_tasks_are_asked_about_more_rarely() -> None:
    """Beyond the vendor's 20 minutes the pauses grow with the age of the task."""
    clock, store = ManualClock(), MemoryStore()
    async with Simulator(manual=True) as sim, polling_client(sim, clock, store=store) as client:
        await client.submit(model_v())
        born = clock.time()
        while (age_s := clock.time() - born) < 4 * 3600:
            pause_s = await look(sim, store, clock)
            stretch = 1 + age_s / 1200 if age_s > 1200 else 1.0
            assert 0.9 * stretch <= pause_s / EVERY_S <= 1.1 * stretch
        assert 100 < len(sim.ledger.gets) < 200


@pytest.mark.parametrize("per_second", [2, 10, 50])
async def test_gets_per_second_counts_every_get(per_second: float) -> None:
    """All is due at once, and each job has several tasks: no more GETs a second than allowed, and none is forgotten."""
    clock, jobs, tasks = ManualClock(), 30, 4
    limits = Limits(gets_per_second=per_second)
    async with Simulator(manual=True) as sim, polling_client(sim, clock, limits=limits) as client:
        await asyncio.gather(*(client.submit(model_v(count=tasks)) for _ in range(jobs)))
        for task_id in sim.ledger.task_ids:
            sim.set_result(task_id)
        clock.advance(EVERY_S * 1.1)
        for seconds in range(1 + math.ceil(jobs * tasks / per_second)):
            await settle(200)
            assert len(sim.ledger.gets) <= 1 + seconds * per_second
            await run_for(clock, 1.0, step_s=1 / per_second)
        assert sorted(get.task_id for get in sim.ledger.gets) == sorted(sim.ledger.task_ids)
        assert [job async for job in client.recover()] == []


async def run_for(clock: ManualClock, seconds: float, *, step_s: float) -> None:
    for _ in range(round(seconds / step_s)):
        clock.advance(step_s)
        await settle()


# --- back-off and patience -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codes", "gets"), [((500,) * 6, 1), ((503,) * 6, 1), ((401,) * 6, 1), ((0,) * 12, 2)], ids=str
)
async def test_it_backs_off_when_the_service_fails(codes: tuple[int, ...], gets: int) -> None:
    """500, 503, 401 or a cut connection: twice as long each time up to 16 times, and the old pace after an answer.

    A GET on a cut connection is repeated once by the HTTP library itself.
    """
    clock, store = ManualClock(), MemoryStore()
    async with Simulator(manual=True) as sim, polling_client(sim, clock, store=store) as client:
        sim.default(faults.status_fault(*codes))
        job = await client.submit(model_v())
        await look(sim, store, clock, gets)
        for factor in (2, 4, 8, 16, 16):
            assert 0.9 * factor <= await look(sim, store, clock, gets) / EVERY_S <= 1.1 * factor
        stretch = 1 + (clock.time() - 1_800_000_000) / 1200  # the failures have made it an old task
        assert 16 * 0.9 * stretch <= await look(sim, store, clock) / EVERY_S <= 16 * 1.1 * stretch
        stretch = 1 + (clock.time() - 1_800_000_000) / 1200
        assert 0.9 * stretch <= await look(sim, store, clock) / EVERY_S <= 1.1 * stretch
        assert job.state == "accepted"


async def test_a_429_closes_the_gate_for_every_get_and_post() -> None:
    """After one 429 nothing is sent for 30 s, then all of it, at the allowed rate."""
    clock = ManualClock()
    async with Simulator(manual=True) as sim, polling_client(sim, clock, limits=Limits(gets_per_second=20)) as client:
        sim.script(faults.status_fault(429))
        jobs = [await client.submit(model_v(f"job {number}")) for number in range(40)]
        clock.advance(EVERY_S * 1.1)
        await run_until(clock, lambda: any(get.status == 429 for get in sim.ledger.gets), step_s=0.05, limit_s=5)
        await settle()
        gets = len(sim.ledger.gets)
        submitting = await started(client.submit(model_v("later")))
        await run_for(clock, 29.9, step_s=0.1)
        assert (len(sim.ledger.gets), len(sim.ledger.posts)) == (gets, 40), "the gate is closed"
        for _ in range(4):
            await run_for(clock, 0.5, step_s=0.05)
            assert len(sim.ledger.gets) - gets <= 11, "the gate lets them out at the allowed rate"
            gets = len(sim.ledger.gets)
        assert (await submitting).state == "accepted"
        await run_for(clock, 30, step_s=0.5)
        assert {get.task_id for get in sim.ledger.gets} >= {job.task_ids[0] for job in jobs}


@pytest.mark.parametrize("has_receiver", [True, False])
async def test_404_is_patience(has_receiver: bool) -> None:
    """A status endpoint that does not know the task ends nothing before three times the vendor's limit."""
    clock = ManualClock()
    async with Simulator(manual=True) as sim:
        sim.default(faults.no_status_endpoint())
        make = client_of if has_receiver else polling_client
        async with make(sim, clock=clock) as client:
            job = await client.submit(model_v())
            waiting = await started(job.result(math.inf))
            lasted_s = await run_until(clock, lambda: job.state != "accepted", step_s=5, limit_s=3 * LIMIT_S)
            assert LIMIT_S < lasted_s < 2 * LIMIT_S
            assert job.state == "expired"
            with pytest.raises(ResultExpired) as caught:
                await waiting
            assert (caught.value.charged, caught.value.task_ids) == ("yes", job.task_ids)
            assert {get.status for get in sim.ledger.gets} == {404}
            assert len(sim.ledger.gets) < 20
            assert len(sim.ledger.posts) == 1


async def test_a_callback_after_the_end_of_patience_still_wins() -> None:
    """Given up, then called back: the job is done and can be awaited."""
    clock = ManualClock()
    async with Simulator(manual=True) as sim, client_of(sim, clock=clock) as client:
        sim.default(faults.no_status_endpoint())
        job = await client.submit(model_v(count=2))
        await run_until(clock, lambda: job.state == "expired", step_s=10, limit_s=3 * LIMIT_S)
        assert await sim.finish(job.task_ids[0]) == 200
        assert job.state == "accepted", "one output is there, the other one is waited for again"
        assert await sim.finish(job.task_ids[1]) == 200
        assert [video.task_id for video in await job] == list(job.task_ids)


async def test_a_task_that_never_ends_expires_with_its_results() -> None:
    """PROCESSING for ever: it is asked about until an hour before results are deleted, then `ResultExpired`."""
    clock, store = ManualClock(), MemoryStore()
    async with Simulator(manual=True) as sim, client_of(sim, clock=clock, store=store) as client:
        job = await client.submit(model_v())
        await sim.progress(job.task_ids[0])
        born = clock.time()
        while job.state == "accepted":
            await look(sim, store, clock)
        assert WEEK_S - 3600 <= clock.time() - born <= WEEK_S - 3600 + 2 * EVERY_S
        with pytest.raises(ResultExpired, match="paid for"):
            await job
        assert len(sim.ledger.gets) < 500
        clock.advance(3600)
        assert await sim.finish(job.task_ids[0]) == 404, "the callback URL lives as long as the results"


async def test_what_is_known_of_an_expired_job_is_not_kept_back() -> None:
    """The answer was lost, one callback came, the other never: the error carries the result that was paid for."""
    clock, store = ManualClock(), MemoryStore()
    async with Simulator(manual=True) as sim, client_of(sim, clock=clock, store=store) as client:
        sim.script(faults.drop_after_accept())
        job = await client.submit(model_v(count=2))
        (first, _) = sim.ledger.task_ids
        assert await sim.finish(first) == 200
        while not job.state.is_final:
            due_at = await store.next_due()
            assert due_at is not None
            clock.advance(max(0.0, due_at - clock.time()))
            await settle()
        with pytest.raises(ResultExpired, match="1 results that are known") as caught:
            await job
        (outcome,) = caught.value.outcomes
        assert isinstance(outcome, Succeeded)
        assert outcome.task_id == first


# --- what it is told -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["REVIEWING", "", "succeeded", "CANCELLED"])
async def test_an_unknown_status_is_progress(status: str) -> None:
    """A status that nobody documented ends nothing: the task is asked about again."""
    clock, store = ManualClock(), MemoryStore()
    async with Simulator(manual=True) as sim, polling_client(sim, clock, store=store) as client:
        job = await client.submit(model_v())
        sim.set_result(job.task_ids[0], status=status)
        for _ in range(3):
            assert EVERY_S * 0.9 <= await look(sim, store, clock) <= EVERY_S * 1.1
            assert job.state == "accepted"
        sim.set_result(job.task_ids[0])
        await look(sim, store, clock)
        assert (await job)[0].task_id == job.task_ids[0]


async def test_a_task_that_failed_is_found_too() -> None:
    """One output failed, one succeeded, no callback: the job fails with both; only open tasks are asked about."""
    clock, store = ManualClock(), MemoryStore()
    async with Simulator(manual=True) as sim, polling_client(sim, clock, store=store) as client:
        job = await client.submit(model_v(count=2))
        sim.set_result(job.task_ids[0], "FAILED", message="No face found")
        await look(sim, store, clock, gets=2)
        assert job.state == "accepted"
        sim.set_result(job.task_ids[1])
        await look(sim, store, clock)
        outcomes = await job.outcomes()
        assert [type(outcome).__name__ for outcome in outcomes] == ["Failed", "Succeeded"]
        assert [get.task_id for get in sim.ledger.gets] == [*job.task_ids, job.task_ids[1]]


async def test_with_trust_status_the_get_decides() -> None:
    """`trust="status"`: a callback makes the poller ask at once; what the callback itself says is not believed."""
    clock = ManualClock()
    async with Simulator(manual=True) as sim:
        receiver = WebhookReceiver(port=0, trust="status")
        async with client_of(sim, clock=clock, receiver=receiver) as client:
            sim.script(faults.callback_fields(status="FAILED", error_message="forged"))
            job = await client.submit(model_v())
            waiting = await started(job.result())
            assert await sim.callback(job.task_ids[0]) == 200
            await seen(sim, lambda: len(sim.ledger.gets) == 1)
            await settle()
            assert not waiting.done(), "the service says that it is still at work"
            clock.advance(10)  # one job's callbacks cause no more GETs than that
            assert await sim.finish(job.task_ids[0]) == 200
            (video,) = await waiting
            assert video.task_id == job.task_ids[0]
            assert len(sim.ledger.gets) == 2


async def test_one_warning_when_callbacks_never_come(caplog: pytest.LogCaptureFixture) -> None:
    """Three jobs in a row that only polling finished, although a receiver is configured: one warning, not more."""
    clock, store = ManualClock(), MemoryStore()
    async with Simulator() as sim, client_of(sim, clock=clock, store=store) as client:
        sim.default(faults.lost_callback())
        for number in range(8):
            job = await client.submit(model_v(f"job {number}"))
            await sim.settled()
            await look(sim, store, clock)
            assert job.state == "done"
            assert len(_warnings(caplog)) == (number >= 2)


@pytest.mark.parametrize("has_receiver", [True, False])
async def test_no_warning_where_none_is_due(has_receiver: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Without a receiver, or with callbacks in between, polling is nothing to warn of."""
    clock, store = ManualClock(), MemoryStore()
    async with Simulator() as sim:
        make = client_of if has_receiver else polling_client
        async with make(sim, clock=clock, store=store) as client:
            for number in range(10):
                is_called = has_receiver and number % 3 == 2
                sim.script(*[] if is_called else [faults.lost_callback()])
                job = await client.submit(model_v(f"job {number}"))
                await sim.settled()
                if not is_called:
                    await look(sim, store, clock)
                assert job.state == "done"
            assert _warnings(caplog) == []


async def test_no_warning_when_callbacks_make_it_ask(caplog: pytest.LogCaptureFixture) -> None:
    """`trust="status"`: every job is finished by a GET, but it was its callback that caused it."""
    async with Simulator(manual=True) as sim:
        receiver = WebhookReceiver(port=0, trust="status")
        async with client_of(sim, clock=(clock := ManualClock()), receiver=receiver) as client:
            jobs = [await client.submit(model_v(f"job {number}")) for number in range(6)]
            assert await asyncio.gather(*map(sim.finish, sim.ledger.task_ids)) == [200] * 6
            await run_until(clock, lambda: all(job.state == "done" for job in jobs), step_s=0.05, limit_s=5)
            assert _warnings(caplog) == []


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno == logging.WARNING and "finished by polling" in record.getMessage()
    ]


# --- jobs that are uncertain, lost, or from elsewhere -----------------------------------------------------------------


async def test_an_uncertain_job_ends_as_unknown_and_is_adopted_all_the_same() -> None:
    """Nothing for `Timeouts.uncertain`: `SubmitUncertain`; its callback still makes it a video. Never sent again."""
    clock = ManualClock()
    async with Simulator(manual=True) as sim, client_of(sim, clock=clock) as client:
        sim.script(faults.drop_after_accept())
        job = await client.submit(model_v(), key="one")
        assert (job.state, job.task_ids) == ("uncertain", ())
        waiting = await started(job.result(math.inf))
        clock.advance(DOUBT_S - 1)
        await settle()
        assert (job.state, waiting.done()) == ("uncertain", False)
        clock.advance(1.1)
        await turns_until(waiting.done)
        assert job.state == "unknown"
        with pytest.raises(SubmitUncertain) as caught:
            await waiting
        assert (caught.value.charged, caught.value.job) == ("maybe", job)
        again = await client.submit(model_v(), key="one")
        assert (again.id, again.state) == (job.id, "unknown")
        assert await sim.finish(sim.ledger.task_ids[0]) == 200
        assert [video.task_id for video in await job] == list(sim.ledger.task_ids)
        assert (len(sim.ledger.posts), sim.ledger.gets) == (1, [])


async def test_an_adopted_output_leads_to_the_others() -> None:
    """The answer was lost and one of two callbacks too: the job waits for it as long as a task can take."""
    clock = ManualClock()
    async with Simulator(manual=True) as sim, client_of(sim, clock=clock) as client:
        sim.script(faults.drop_after_accept())
        job = await client.submit(model_v(count=2))
        assert await sim.finish(sim.ledger.task_ids[1]) == 200
        assert (job.state, job.task_ids) == ("accepted", sim.ledger.task_ids[1:])
        lasted_s = await run_until(clock, lambda: job.state != "accepted", step_s=20, limit_s=3 * LIMIT_S)
        assert (job.state, lasted_s > LIMIT_S) == ("expired", True)
        assert await sim.finish(sim.ledger.task_ids[0]) == 200
        assert {video.task_id for video in await job} == set(sim.ledger.task_ids)


async def test_a_callback_that_meets_the_end_of_patience_wins() -> None:
    """The uncertain job is claimed to be given up, and its callback comes in between: it is adopted, not expired."""
    clock, store = ManualClock(), SlowStore()
    async with Simulator(manual=True) as sim, client_of(sim, clock=clock, store=store) as client:
        sim.script(faults.drop_after_accept())
        job = await client.submit(model_v())
        store.claims.clear()
        clock.advance(DOUBT_S + 1)
        await store.claimed.wait()
        assert await sim.progress(sim.ledger.task_ids[0]) == 200
        store.claims.set()
        await settle()
        assert (job.state, job.task_ids) == ("accepted", sim.ledger.task_ids)
        assert await sim.finish(job.task_ids[0]) == 200
        assert len(await job) == 1


async def test_what_falls_due_while_the_store_is_asked_is_not_missed() -> None:
    """A job becomes due while the poller waits for the store to say that nothing is: it is asked about in time."""
    clock, store = ManualClock(), SlowStore()
    async with Simulator() as sim:
        sim.default(faults.lost_callback())
        store.next_dues.clear()
        async with polling_client(sim, clock, store=store) as client:
            await store.looked.wait()
            job = await client.submit(model_v())
            await sim.settled()
            store.next_dues.set()
            await settle()
            clock.advance(EVERY_S * 1.1)
            await seen(sim, lambda: len(sim.ledger.gets) == 1)
            assert (await job)[0].task_id == sim.ledger.task_ids[0]


async def test_a_callback_adopts_a_job_that_the_store_has_lost() -> None:
    """A fresh store with the same secret: the callback is ours, so the job was paid for; a GET tells the rest."""
    clock, store = ManualClock(), MemoryStore()
    async with Simulator(manual=True) as sim:
        receiver = WebhookReceiver(port=0, secret=SECRET)
        async with client_of(sim, clock=clock, receiver=receiver) as client:
            job = await client.submit(model_v(count=2), key="one")
            url, port = receiver.public_url, receiver.port
        receiver = WebhookReceiver(url, port=port, secret=SECRET)
        async with client_of(sim, clock=clock, store=store, receiver=receiver) as client:
            assert await client.find(job.id) is None
            assert await sim.finish(job.task_ids[1]) == 200
            await seen(sim, lambda: len(sim.ledger.gets) == 1)
            adopted = await client.find(job.task_ids[1])
            assert adopted is not None
            assert (adopted.id, adopted.key, adopted.request) == (job.id, None, None)
            assert await sim.finish(job.task_ids[0]) == 200
            videos = await pumped(clock, adopted.result())  # its callbacks are not believed: each task is asked about
            assert {video.task_id for video in videos} == set(job.task_ids)
            assert sim.ledger.paid_submits == 1


async def test_another_secret_adopts_nothing() -> None:
    """A receiver with another secret does not know the URL: 404, no job, no GET."""
    async with Simulator(manual=True) as sim:
        receiver = WebhookReceiver(port=0, secret=SECRET)
        async with client_of(sim, receiver=receiver) as client:
            job = await client.submit(model_v())
            url, port = receiver.public_url, receiver.port
        receiver = WebhookReceiver(url, port=port, secret="another" + SECRET)
        async with client_of(sim, receiver=receiver) as client:
            assert await sim.finish(job.task_ids[0]) == 404
            assert await client.find(job.task_ids[0]) is None
            await settle()
            assert sim.ledger.gets == []


async def test_a_task_id_kept_elsewhere_can_be_awaited() -> None:
    """`client.job(task_id)` sends nothing; awaiting it asks at once, and from then on the store remembers it."""
    clock, store = ManualClock(), MemoryStore()
    async with Simulator(manual=True) as sim:
        async with polling_client(sim, clock) as elsewhere:
            (task_id,) = (await elsewhere.submit(model_v())).task_ids
        async with polling_client(sim, clock, store=store) as client:
            job, twin = client.job(task_id), client.job(task_id)
            await settle()
            assert (sim.ledger.gets, await client.find(task_id)) == ([], None)
            waiting = [await started(handle.result()) for handle in (job, twin)]
            await seen(sim, lambda: len(sim.ledger.gets) == 1)
            await settle()
            assert (job.state, job.id) == ("accepted", twin.id)
            sim.set_result(task_id)
            await look(sim, store, clock)
            assert [(await each)[0].task_id for each in waiting] == [task_id] * 2
            found = await client.find(task_id)
            assert found is not None
            assert (found.id, found.state, len(sim.ledger.gets)) == (job.id, "done", 2)


async def test_a_task_id_that_the_store_knows_gives_its_whole_job() -> None:
    """`client.job(task_id)` of one output of a job that was bought here: the same job with both outputs."""
    clock, store = ManualClock(), MemoryStore()
    async with Simulator(manual=True) as sim, polling_client(sim, clock, store=store) as client:
        bought = await client.submit(model_v(count=2), key="one")
        job = client.job(bought.task_ids[1])
        waiting = await started(job.result())
        for task_id in bought.task_ids:
            sim.set_result(task_id)
        await look(sim, store, clock, gets=2)
        assert [video.task_id for video in await waiting] == list(bought.task_ids)
        assert (job.id, job.key) == (bought.id, "one")


async def test_a_task_that_the_service_does_not_know_is_not_believed_for_ever() -> None:
    """`client.job` of a wrong id: patience as for every 404, then `ResultExpired`."""
    clock = ManualClock()
    async with Simulator() as sim, polling_client(sim, clock) as client:
        job = client.job("i2v-of-somebody-else")
        waiting = await started(job.result(math.inf))
        lasted_s = await run_until(clock, waiting.done, step_s=10, limit_s=3 * LIMIT_S)
        assert lasted_s > LIMIT_S
        with pytest.raises(ResultExpired):
            await waiting


# --- refresh ---------------------------------------------------------------------------------------------------------


async def test_refresh_asks_now() -> None:
    """One GET for each open task, no waiting; the job itself comes back, and its waiters hear of it."""
    clock = ManualClock()
    async with Simulator(manual=True) as sim, client_of(sim, clock=clock) as client:
        job = await client.submit(model_v(count=2))
        waiting = await started(job.result())
        sim.set_result(job.task_ids[0])
        refreshing = asyncio.create_task(job.refresh())
        await run_until(clock, refreshing.done, step_s=0.05, limit_s=1)
        assert (await refreshing is job, job.state, len(sim.ledger.gets)) == (True, "accepted", 2)
        clock.advance(1)
        sim.set_result(job.task_ids[1])
        assert (await job.refresh()).state == "done"
        assert (len(await waiting), len(sim.ledger.gets)) == (2, 3)
        await job.refresh()
        assert len(sim.ledger.gets) == 3, "nothing is open"


@pytest.mark.parametrize(("code", "error"), [(500, ServiceUnavailable), (0, NotSent)])
async def test_refresh_says_what_went_wrong(code: int, error: type[Exception]) -> None:
    """The service did not tell: a typed error, the job goes on, and the next one works."""
    clock = ManualClock()
    async with Simulator(manual=True) as sim, client_of(sim, clock=clock) as client:
        sim.default(faults.status_fault(code, *[code] * (code == 0)))
        job = await client.submit(model_v())
        sim.set_result(job.task_ids[0])
        with pytest.raises(error):
            await job.refresh()
        assert job.state == "accepted"
        clock.advance(1)
        assert (await job.refresh()).state == "done"


async def test_a_cancelled_refresh_takes_nobodys_news_with_it() -> None:
    """It is cancelled while its answer is being written: whoever waits for the job hears of it all the same."""
    clock, store = ManualClock(), GatedStore()
    async with Simulator(manual=True) as sim, client_of(sim, clock=clock, store=store) as client:
        job = await client.submit(model_v())
        waiting = await started(job.result())
        sim.set_result(job.task_ids[0])
        store.gate.clear()
        refreshing = asyncio.create_task(job.refresh())
        await store.reached.wait()
        await gone(refreshing)
        store.gate.set()
        assert (await waiting)[0].task_id == job.task_ids[0]


# --- without a receiver ----------------------------------------------------------------------------------------------


async def test_without_a_receiver_polling_is_the_way_to_wait() -> None:
    """No callback URL is sent; the job is found by GET."""
    clock, store = ManualClock(), MemoryStore()
    async with Simulator() as sim, polling_client(sim, clock, store=store) as client:
        running = asyncio.create_task(client.run(model_v()))
        await sim.wait_for_posts(1)
        await sim.settled()
        assert sim.ledger.posts[0].callback_url is None
        await turns_until(lambda: _front(store) is not None)
        await look(sim, store, clock)
        assert (await running).task_id == sim.ledger.task_ids[0]


@pytest.mark.parametrize("fault", [faults.drop_after_accept(), faults.status(500, accept=True)], ids=lambda f: f.name)
async def test_without_a_receiver_an_uncertain_submit_says_so_at_once(fault: faults.Fault) -> None:
    """Nothing could adopt the job: `SubmitUncertain`, and why; the same key raises it again, and sends nothing."""
    clock = ManualClock()
    async with Simulator() as sim, polling_client(sim, clock) as client:
        sim.script(fault)
        for _ in range(2):
            with pytest.raises(SubmitUncertain, match="No receiver was configured") as caught:
                await client.submit(model_v(), key="one")
            assert caught.value.charged == "maybe"
            assert caught.value.job is not None
        assert len(sim.ledger.posts) == 1


# --- restarts and failing stores -------------------------------------------------------------------------------------


async def test_a_restart_asks_about_everything_within_a_minute() -> None:
    """Callbacks were lost while nobody listened: the next client with the store finds them, evenly spread."""
    clock, store = ManualClock(), MemoryStore()
    async with Simulator(manual=True) as sim:
        async with client_of(sim, clock=clock, store=store) as client:
            jobs = await asyncio.gather(*(client.submit(model_v(), key=f"{number}") for number in range(100)))
        for task_id in sim.ledger.task_ids:
            assert await sim.finish(task_id) is None, "nobody listens"
        async with client_of(sim, clock=clock, store=store, limits=Limits(gets_per_second=5)) as client:
            found = [job async for job in client.recover()]
            assert {job.id for job in found} == {job.id for job in jobs}
            for second in range(1, 61):
                await run_for(clock, 1.0, step_s=0.1)
                assert len(sim.ledger.gets) <= 5 * second + 6, "spread, not at once"
            assert all(job.state == "done" for job in found)
            assert len(sim.ledger.gets) == 100


class SlowStore(MemoryStore):
    """Answers when it is let; what it read by then may be old."""

    def __init__(self) -> None:
        super().__init__()
        self.claimed, self.claims = asyncio.Event(), asyncio.Event()
        self.looked, self.next_dues = asyncio.Event(), asyncio.Event()
        self.claims.set()
        self.next_dues.set()

    async def claim(self, now: float, *, limit: int, lease_s: float) -> list[JobRecord]:
        found = await super().claim(now, limit=limit, lease_s=lease_s)
        if found:
            self.claimed.set()
        await self.claims.wait()
        return found

    async def next_due(self) -> float | None:
        found = await super().next_due()
        self.looked.set()
        await self.next_dues.wait()
        return found


class SickStore(MemoryStore):
    """Cannot do what is counted down here, so often."""

    def __init__(self, error: Exception, **times: int) -> None:
        super().__init__()
        self.error = error
        self.times = times

    def _fail(self, name: str) -> None:
        if self.times.get(name, 0) > 0:
            self.times[name] -= 1
            raise self.error

    async def claim(self, now: float, *, limit: int, lease_s: float) -> list[JobRecord]:
        self._fail("claim")
        return await super().claim(now, limit=limit, lease_s=lease_s)

    async def next_due(self) -> float | None:
        self._fail("next_due")
        return await super().next_due()

    async def change(self, job_id: str, event: Event) -> Change:
        if isinstance(event, OutcomeReported):
            self._fail("heard")
        return await super().change(job_id, event)


@pytest.mark.parametrize("error", [StoreError("The disk is full."), ValueError("a row of another version")], ids=repr)
@pytest.mark.parametrize("what", ["claim", "next_due", "heard"])
async def test_a_failing_store_does_not_end_the_sweeper(what: str, error: Exception) -> None:
    """The store fails three times in the poller's loop, whatever it raises: the job is found all the same."""
    clock, store = ManualClock(), SickStore(error, **{what: 3})
    async with Simulator() as sim, polling_client(sim, clock, store=store) as client:
        sim.default(faults.lost_callback())
        job = await client.submit(model_v())
        await sim.settled()
        await run_until(clock, lambda: job.state == "done", step_s=1, limit_s=3600)
        assert store.times == {what: 0}
        assert len(await job) == 1
