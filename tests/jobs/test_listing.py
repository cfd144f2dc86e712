"""What the store remembers: listings, metadata, timestamps, tasks as they end, and forgetting."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from typing import Any

import pytest
from support import client_of, model_v, settle, started

from xiling_async import Failed, ImageToVideo, InvalidRequest, Rejected, State, Succeeded, TaskFailed, WaitTimeout
from xiling_async.models.record import Outcome
from xiling_async.simulator import Simulator, faults
from xiling_async.testing.clock import ManualClock


async def next_of(outcomes: AsyncIterator[Outcome]) -> Outcome:
    return await anext(outcomes)


# --- tasks as they end -----------------------------------------------------------------------------------------------


async def test_each_task_is_given_as_it_ends() -> None:
    """The fourth is not waited for; those that have ended already come first."""
    async with Simulator(manual=True) as sim, client_of(sim) as client:
        job = await client.submit(model_v(count=3))
        first, second, third = job.task_ids
        assert await sim.finish(second) == 200
        outcomes = job.as_completed()
        assert (await anext(outcomes)).task_id == second
        waiting = await started(next_of(outcomes))
        await settle()
        assert not waiting.done()
        assert await sim.finish(first) == 200
        assert (await waiting).task_id == first
        assert await sim.finish(third) == 200
        assert [outcome.task_id async for outcome in outcomes] == [third]
        assert [outcome.task_id async for outcome in job.as_completed()] == list(job.task_ids)


async def test_a_failed_task_is_given_like_any_other() -> None:
    """No error: each outcome says what it is."""
    async with Simulator() as sim, client_of(sim) as client:
        sim.script(faults.failed("no", which=(1,)))
        job = await client.submit(model_v(count=3))
        kinds = {outcome.task_id: type(outcome) async for outcome in job.as_completed()}
        assert [kinds[task_id] for task_id in job.task_ids] == [Succeeded, Failed, Succeeded]
        with pytest.raises(TaskFailed):
            await job


async def test_a_wait_for_the_next_task_ends_in_time() -> None:
    """`WaitTimeout`, after the outcomes that are known; the job goes on."""
    clock = ManualClock()
    async with Simulator(manual=True) as sim, client_of(sim, clock=clock) as client:
        job = await client.submit(model_v(count=2))
        assert await sim.finish(job.task_ids[0]) == 200
        outcomes = job.as_completed()
        await anext(outcomes)
        waiting = await started(next_of(outcomes))
        await settle()
        clock.advance(1801)
        with pytest.raises(WaitTimeout):
            await waiting


# --- metadata and times ----------------------------------------------------------------------------------------------


async def test_metadata_and_times_are_remembered() -> None:
    """As given when the job was new; a second submit of the key changes nothing."""
    clock = ManualClock()
    began_at = clock.time()
    async with Simulator(manual=True) as sim, client_of(sim, clock=clock) as client:
        given = {"user": "42", "波": "🌊"}
        job = await client.submit(model_v(), key="order", metadata=given)
        given["user"] = "43"
        again = await client.submit(model_v(), key="order", metadata={"user": "44"})
        for each in (job, again):
            assert (dict(each.metadata), each.created_at, each.ended_at) == ({"user": "42", "波": "🌊"}, began_at, None)
        with pytest.raises(TypeError):
            job.metadata["user"] = "1"  # type: ignore[index]
        clock.advance(5)
        assert await sim.finish(job.task_ids[0]) == 200
        assert job.ended_at == began_at + 5


@pytest.mark.parametrize(
    "metadata",
    [
        {"user": 42},
        {42: "user"},
        {"user": None},
        {"": "x"},
        {"user": "\ud800"},
        {"user": "a\0b"},
        {"user": "x" * 16_385},
        {f"name {n}": "é" * 1000 for n in range(9)},
        [("user", "42")],
        "user=42",
    ],
)
async def test_wrong_metadata_buys_nothing(metadata: Any) -> None:
    """Text by name, at most 16 KiB in all; said before anything is sent."""
    async with Simulator() as sim, client_of(sim) as client:
        with pytest.raises(InvalidRequest, match="metadata"):
            await client.submit(model_v(), metadata=metadata)
        with pytest.raises(InvalidRequest, match="metadata"):
            await client.run(model_v(), metadata=metadata)
        assert sim.ledger.posts == []


async def test_every_problem_of_the_metadata_is_named() -> None:
    async with Simulator() as sim, client_of(sim) as client:
        with pytest.raises(InvalidRequest) as caught:
            await client.submit(model_v(), metadata={"user": 42, "order": None})  # type: ignore[dict-item]
        assert [problem.field for problem in caught.value.problems] == ["metadata['user']", "metadata['order']"]
        assert len(sim.ledger.posts) == 0


async def test_the_largest_metadata_is_kept() -> None:
    """16 KiB to the byte."""
    async with Simulator() as sim, client_of(sim) as client:
        job = await client.submit(model_v(), metadata={"é": "x" * (16 * 1024 - 2)})
        assert len(job.metadata["é"]) == 16 * 1024 - 2


# --- listings --------------------------------------------------------------------------------------------------------


async def test_jobs_are_listed_by_what_they_are() -> None:
    """The oldest first; by state, kind, metadata and age."""
    clock = ManualClock()
    began_at = clock.time()
    async with Simulator() as sim, client_of(sim, clock=clock) as client:
        done = await client.submit(model_v("one"), metadata={"user": "42"})
        await done
        clock.advance(10)
        sim.script(faults.status(400))
        with pytest.raises(Rejected):
            await client.submit(model_v("two"), key="two", metadata={"user": "42"})
        clock.advance(10)
        sim.script(faults.failed("no"))
        failed = await client.submit(model_v("three"), metadata={"user": "43"})
        await failed.outcomes()

        async def listed(**query: Any) -> list[str]:
            return [job.state.value async for job in client.jobs(**query)]

        assert await listed() == ["done", "rejected", "failed"]
        assert await listed(state="failed") == ["failed"]
        assert await listed(state=[State.DONE, "rejected"]) == ["done", "rejected"]
        assert await listed(metadata={"user": "42"}) == ["done", "rejected"]
        assert await listed(metadata={"user": "42"}, state="done", kind=ImageToVideo) == ["done"]
        assert await listed(since=began_at + 10) == ["rejected", "failed"]
        assert await listed(kind="image_generate") == []
        assert [job.id async for job in client.jobs(state="failed")] == [failed.id]


@pytest.mark.parametrize(
    "query",
    [
        {"state": "finished"},
        {"state": 5},
        {"state": [None]},
        {"kind": int},
        {"kind": 5},
        {"metadata": {"user": 42}},
        {"metadata": "user"},
        {"since": "yesterday"},
        {"since": math.nan},
        {"since": True},
    ],
)
async def test_a_wrong_query_is_refused(query: Any) -> None:
    """Before the store is asked."""
    async with Simulator() as sim, client_of(sim) as client:
        with pytest.raises(InvalidRequest, match=next(iter(query))):
            await anext(client.jobs(**query))


# --- forgetting ------------------------------------------------------------------------------------------------------


async def test_old_ends_are_forgotten() -> None:
    """By the client's clock; what is under way stays, and what a consumer has not acknowledged."""
    clock = ManualClock()
    async with Simulator() as sim, client_of(sim, clock=clock) as client:
        for number in range(3):
            await client.run(model_v(f"waves {number}"), key=f"order-{number}")
        clock.advance(100)
        await client.run(model_v("new"), key="new")
        clock.advance(1)
        sim.manual = True
        await client.submit(model_v("open"), key="open")
        assert await client.purge(older_than=101) == 0
        assert await client.purge(older_than=100) == 3
        assert [job.key async for job in client.jobs()] == ["new", "open"]
        jobs = client.completed()
        await anext(jobs)
        await jobs.aclose()
        clock.advance(1000)
        assert await client.purge(older_than=0) == 0
        assert (await client.find("new")) is not None


@pytest.mark.parametrize("older_than", [-1, math.nan, math.inf, "1 day", None, True])
async def test_a_wrong_age_forgets_nothing(older_than: Any) -> None:
    async with Simulator() as sim, client_of(sim) as client:
        await client.run(model_v(), key="order")
        with pytest.raises(InvalidRequest, match="older_than"):
            await client.purge(older_than=older_than)
        assert await client.find("order") is not None
