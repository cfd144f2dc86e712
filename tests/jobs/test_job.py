"""The handle: awaiting, outcomes, many waiters, running out of patience, and finding a job again."""

from __future__ import annotations

import asyncio
import math
import pickle

import pytest
from support import (
    NotingStore,
    client_of,
    gone,
    model_v,
    pumped,
    settle,
    started,
)

from xiling_async import (
    ClientClosed,
    Failed,
    InvalidRequest,
    Job,
    MemoryStore,
    Rejected,
    State,
    Succeeded,
    TaskFailed,
    Timeouts,
    Video,
    WaitTimeout,
    XilingError,
)
from xiling_async.simulator import Simulator, faults
from xiling_async.testing.clock import ManualClock

# --- results -------------------------------------------------------------------------------------------------------


async def test_await_gives_the_results_in_task_order() -> None:
    """`await job` is `await job.result()`: a tuple of videos, the same again and again."""
    async with Simulator() as sim, client_of(sim) as client:
        job = await client.submit(model_v(count=3))
        videos = await job
        assert [video.task_id for video in videos] == list(job.task_ids) == list(sim.ledger.task_ids)
        assert {type(video) for video in videos} == {Video}
        assert videos == await job.result() == await job
        assert all(video.video_url.startswith(sim.origin) for video in videos)
        assert (job.state, sim.ledger.gets) == (State.DONE, [])


async def test_run_gives_exactly_one_video() -> None:
    """`run` submits and waits; with several outputs it refuses before anything is sent."""
    async with Simulator() as sim, client_of(sim) as client:
        video = await client.run(model_v(), key="one", timeout=60)
        assert video.task_id == sim.ledger.task_ids[0]
        assert await client.run(model_v(), key="one") == video
        with pytest.raises(InvalidRequest, match="one result"):
            await client.run(model_v(count=2))
        assert len(sim.ledger.posts) == 1


async def test_outcomes_have_the_good_and_the_bad() -> None:
    """`outcomes` never raises for a failed task: each task has its own, in task order."""
    async with Simulator() as sim, client_of(sim) as client:
        sim.script(faults.failed("The prompt was refused", [1, 3]))
        job = await client.submit(model_v(count=4))
        outcomes = await job.outcomes()
        assert [type(outcome) for outcome in outcomes] == [Succeeded, Failed, Succeeded, Failed]
        assert [outcome.task_id for outcome in outcomes] == list(job.task_ids)
        assert outcomes[1] == Failed(job.task_ids[1], "The prompt was refused")
        assert isinstance(outcomes[0], Succeeded)
        assert outcomes[0].result.task_id == job.task_ids[0]
        assert job.state == "failed"


async def test_task_failed_has_every_outcome() -> None:
    """The error holds the good videos too, names the service's reason, and survives pickling."""
    async with Simulator() as sim, client_of(sim) as client:
        sim.script(faults.failed("The prompt was refused", [0]))
        job = await client.submit(model_v(count=2))
        with pytest.raises(TaskFailed, match="The prompt was refused") as caught:
            await job
        error = caught.value
        assert error.outcomes == await job.outcomes()
        assert (error.charged, error.job, error.job_id, error.task_ids) == ("yes", job, job.id, job.task_ids)
        assert pickle.loads(pickle.dumps(error)).outcomes == error.outcomes
        with pytest.raises(TaskFailed):
            await job  # every time


async def test_a_job_whose_tasks_all_failed_is_failed() -> None:
    """All four failed: one error, four outcomes."""
    async with Simulator() as sim, client_of(sim) as client:
        sim.script(faults.failed())
        job = await client.submit(model_v(count=4))
        with pytest.raises(TaskFailed, match="4 of 4") as caught:
            await job.result()
        assert {type(outcome) for outcome in caught.value.outcomes} == {Failed}


# --- waiting -------------------------------------------------------------------------------------------------------


async def test_many_wait_for_one_job() -> None:
    """A thousand waiters of one job, through three handles: all have the same tuple."""
    async with Simulator(manual=True) as sim, client_of(sim) as client:
        job = await client.submit(model_v(), key="one")
        by_key, by_task = await client.find("one"), await client.find(job.task_ids[0])
        assert by_key is not None
        assert by_task is not None
        waiters = [asyncio.create_task(handle.result()) for handle in (job, by_key, by_task) for _ in range(333)]
        await settle()
        assert await sim.finish(job.task_ids[0]) == 200
        results = await asyncio.gather(*waiters)
        assert set(results) == {await job}


async def test_half_the_waiters_leaving_harms_not_the_other_half() -> None:
    """Every second waiter is cancelled, some of them in the very turn in which the result comes."""
    async with Simulator(manual=True) as sim, client_of(sim) as client:
        job = await client.submit(model_v())
        waiters = [await started(job.result()) for _ in range(20)]
        for waiter in waiters[::4]:
            await gone(waiter)
        finishing = asyncio.create_task(sim.finish(job.task_ids[0]))
        while job.state is not State.DONE:
            await asyncio.sleep(0)
        for waiter in waiters[2::4]:
            waiter.cancel()
        ends = await asyncio.gather(*waiters, return_exceptions=True)
        assert await finishing == 200
        assert {type(end) for end in ends[1::2]} == {tuple}
        assert {type(end) for end in ends[::4]} == {asyncio.CancelledError}


@pytest.mark.parametrize("given", [None, 5.0, 0.25, 0, -1])
async def test_wait_timeout_says_what_is_left_to_do(given: float | None) -> None:
    """After `timeout` seconds, else `Timeouts.wait`: the error has the job, which can be awaited again."""
    clock = ManualClock()
    async with Simulator(manual=True) as sim, client_of(sim, clock=clock, timeouts=Timeouts(wait=90)) as client:
        job = await client.submit(model_v())
        limit_s = 90 if given is None else max(0, given)
        waiting = await started(job.result(given))
        if limit_s:
            clock.advance(limit_s - 0.01)
            await settle()
            assert not waiting.done()
            clock.advance(0.01)
        with pytest.raises(WaitTimeout) as caught:
            await waiting
        error = caught.value
        assert isinstance(error, TimeoutError)
        assert (error.job, error.job_id, error.task_ids, error.charged) == (job, job.id, job.task_ids, "yes")
        for part in (job.id, job.task_ids[0], "still accepted", "Do not submit it again"):
            assert part in str(error)
        again = pickle.loads(pickle.dumps(error))
        assert (str(again), again.job, again.job_id) == (str(error), None, job.id)
        assert await sim.finish(job.task_ids[0]) == 200
        assert len(await error.job) == 1
        assert len(sim.ledger.posts) == 1


async def test_a_finished_job_never_times_out() -> None:
    """`result(timeout=0)` is a way to look: the result if it is there."""
    async with Simulator() as sim, client_of(sim) as client:
        job = await client.submit(model_v(), key="one")
        videos = await job
        assert await job.result(timeout=0) == videos
        found = await client.find("one")
        assert found is not None
        assert await found.result(timeout=0) == videos


async def test_infinity_is_no_limit() -> None:
    """`timeout=math.inf` waits for as long as it takes."""
    clock = ManualClock()
    async with Simulator(manual=True) as sim, client_of(sim, clock=clock) as client:
        job = await client.submit(model_v())
        waiting = await started(job.result(math.inf))
        clock.advance(3000)
        await settle(200)
        assert not waiting.done()
        assert await sim.finish(job.task_ids[0]) == 200
        assert len(await waiting) == 1


async def test_a_timeout_of_the_users_own_works_as_everywhere() -> None:
    """`asyncio.timeout` around an await ends that wait with `TimeoutError`, not with a `WaitTimeout` of ours."""
    async with Simulator(manual=True) as sim, client_of(sim) as client:
        job = await client.submit(model_v())
        with pytest.raises(TimeoutError) as caught:
            async with asyncio.timeout(0.01):
                await job.result(math.inf)
        assert not isinstance(caught.value, XilingError)
        assert await sim.finish(job.task_ids[0]) == 200
        assert len(await job) == 1


async def test_an_uncertain_job_times_out_as_maybe_paid() -> None:
    """While nobody knows whether it was bought, the timeout does not say that it was."""
    clock = ManualClock()
    async with Simulator(manual=True) as sim, client_of(sim, clock=clock) as client:
        sim.script(faults.drop_after_accept())
        job = await client.submit(model_v())
        waiting = await started(job.result(timeout=5))
        clock.advance(5)
        with pytest.raises(WaitTimeout, match="not known yet") as caught:
            await waiting
        assert (caught.value.charged, caught.value.task_ids) == ("maybe", ())


async def test_a_waiter_of_a_closed_client_is_told() -> None:
    """Waiting when the client is left, and asking afterwards: `ClientClosed`, with the ids to look for."""
    async with Simulator(manual=True) as sim:
        async with client_of(sim) as client:
            job = await client.submit(model_v())
            waiting = await started(job.result())
        for end in (waiting, job.result(), job.outcomes()):
            with pytest.raises(ClientClosed) as caught:
                await end
            assert (caught.value.job_id, caught.value.task_ids, caught.value.charged) == (job.id, job.task_ids, "yes")


# --- finding -------------------------------------------------------------------------------------------------------


async def test_find_knows_a_job_by_its_three_names() -> None:
    """By key, by job id, by each of its task ids: the same job; by anything else: None."""
    async with Simulator(manual=True) as sim, client_of(sim) as client:
        job = await client.submit(model_v(count=2), key="order-42")
        for name in ("order-42", job.id, *job.task_ids):
            found = await client.find(name)
            assert found is not None
            assert (found.id, found.key, found.task_ids) == (job.id, "order-42", job.task_ids)
            assert found.request == model_v(count=2)
        for name in ("order-43", "", job.id.upper() + "0", job.task_ids[0][:-1]):
            assert await client.find(name) is None
        assert (len(sim.ledger.posts), sim.ledger.gets) == (1, [])


async def test_a_found_job_that_was_refused_raises_why() -> None:
    """Awaiting a job that the service refused raises that refusal again, also in the next process."""
    store = MemoryStore()
    async with Simulator() as sim:
        async with client_of(sim, store=store) as client:
            sim.script(faults.business_error(100005, "Prompt too long", http=400))
            with pytest.raises(Rejected) as first:
                await client.submit(model_v(), key="order-42")
        async with client_of(sim, store=store) as client:
            job = await client.find("order-42")
            assert job is not None
            with pytest.raises(Rejected, match="Prompt too long") as caught:
                await job.result()
            assert (caught.value.status, caught.value.code) == (400, 100005)
            assert str(caught.value) == str(first.value) == str(job.error)
        assert len(sim.ledger.posts) == 1


async def test_recover_gives_the_unfinished_jobs_oldest_first() -> None:
    """Pending and uncertain jobs of the client before, oldest first; not those that ended or were refused."""
    store, clock = NotingStore(), ManualClock()
    async with Simulator(manual=True) as sim:
        async with client_of(sim, store=store, clock=clock) as client:
            jobs: list[Job[Video]] = []
            for number in range(4):
                clock.advance(1)
                if number == 2:
                    sim.script(faults.drop_after_accept())
                jobs.append(await client.submit(model_v(str(number))))
            assert await sim.finish(jobs[1].task_ids[0]) == 200
            sim.script(faults.business_error(100001, "no", http=400))
            with pytest.raises(Rejected):
                await client.submit(model_v())
        async with client_of(sim, store=store, clock=clock) as client:
            found = [job async for job in client.recover()]
            assert [job.id for job in found] == [jobs[0].id, jobs[2].id, jobs[3].id]
            assert [job.state for job in found] == [State.ACCEPTED, State.UNCERTAIN, State.ACCEPTED]
            sim.set_result(found[0].task_ids[0])
            assert len(await pumped(clock, found[0].result())) == 1
        assert len(sim.ledger.posts) == 5


async def test_recover_may_be_left_in_the_middle() -> None:
    """Whoever stops after the first job leaves nothing behind, and may begin again."""
    async with Simulator(manual=True) as sim, client_of(sim) as client:
        for _ in range(3):
            await client.submit(model_v())
        async for job in client.recover():
            assert job.state is State.ACCEPTED
            break
        assert len([job async for job in client.recover()]) == 3


# --- what a handle shows -------------------------------------------------------------------------------------------


async def test_a_handle_shows_where_the_job_stands() -> None:
    """`repr`, `state`, `task_ids`, `request` follow the job; the repr holds no URL."""
    async with Simulator(manual=True) as sim, client_of(sim) as client:
        sim.script(faults.drop_after_accept())
        job = await client.submit(model_v(), key="order-42")
        assert repr(job) == f"<Job {job.id} uncertain task_ids=[]>"
        (task_id,) = sim.ledger.task_ids
        assert await sim.progress(task_id) == 200
        assert repr(job) == f"<Job {job.id} accepted task_ids=['{task_id}']>"
        assert await sim.finish(task_id) == 200
        assert repr(job) == f"<Job {job.id} done task_ids=['{task_id}']>"
        assert (job.key, job.request, job.state) == ("order-42", model_v(), "done")
        assert len(job.id) == 32
        (video,) = await job
        assert "?" not in repr(video).replace("?<hidden>", "")
