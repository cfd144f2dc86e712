"""Buying again: exactly the failed tasks, each generation once, whoever asks."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import pytest
from support import client_of, model_v

from xiling_async import (
    Client,
    ImageToVideo,
    InvalidRequest,
    Job,
    LimitReached,
    Limits,
    MemoryStore,
    Rejected,
    SQLiteStore,
    State,
    TaskFailed,
)
from xiling_async.simulator import Simulator, faults


async def failed_job(
    client: Client, sim: Simulator, *which: int, count: int = 1, key: str | None = "order"
) -> Job[Any]:
    """A job of which these tasks (all, if none is named) have failed."""
    sim.script(faults.failed("no", which=which or None))
    job = await client.submit(model_v(count=count), key=key)
    await job.outcomes()
    assert job.state is State.FAILED
    return job


def counts(sim: Simulator) -> list[object]:
    return [post.body["generate_count"] for post in sim.ledger.posts if post.body]


async def test_only_the_failed_tasks_are_bought_again() -> None:
    """Two of four: a job of its own for two, with the metadata of the first."""
    async with Simulator() as sim, client_of(sim) as client:
        sim.script(faults.failed("no", which=(1, 3)))
        job = await client.submit(model_v(count=4), key="order", metadata={"user": "42"})
        with pytest.raises(TaskFailed):
            await job
        retried = await client.retry(job)
        assert counts(sim) == [4, 2]
        assert (retried.key, retried.retry_of, dict(retried.metadata)) == ("order~1", job.id, {"user": "42"})
        assert len(await retried) == 2
        assert job.retry_of is None


async def test_each_generation_is_bought_once() -> None:
    """Ten callers at once, and later ones, get the same retry; a retry that failed has one of its own."""
    async with Simulator() as sim, client_of(sim) as client:
        job = await failed_job(client, sim)
        sim.script(faults.failed("no"))
        retries = await asyncio.gather(*(client.retry(job) for _ in range(10)))
        assert {retried.id for retried in retries} == {retries[0].id}
        await retries[0].outcomes()
        second = await client.retry(retries[0])
        assert (second.key, second.retry_of) == ("order~2", retries[0].id)
        await second.outcomes()
        assert (await client.retry(job)).id == retries[0].id
        assert (await client.retry(retries[0])).id == second.id
        assert counts(sim) == [1, 1, 1]


async def test_a_job_without_a_key_is_bought_again_once() -> None:
    """Its own id stands in for the key."""
    async with Simulator() as sim, client_of(sim) as client:
        job = await failed_job(client, sim, key=None)
        first, second = await client.retry(job), await client.retry(job)
        assert first.id == second.id
        assert first.key == f"{job.id}~1"
        assert counts(sim) == [1, 1]


async def test_a_retry_outlives_the_process(tmp_path: Path) -> None:
    """The same key in another client: what was bought is found, nothing is bought."""
    async with Simulator() as sim:
        async with client_of(sim, store=SQLiteStore(tmp_path / "jobs.db")) as client:
            job = await failed_job(client, sim)
            retried = await client.retry(job)
            await retried
        async with client_of(sim, store=SQLiteStore(tmp_path / "jobs.db")) as client:
            found = await client.find("order")
            assert found is not None
            again = await client.retry(found)
            assert (again.id, again.retry_of) == (retried.id, job.id)
            assert counts(sim) == [1, 1]


async def test_an_unchecked_request_is_bought_again_as_it_was() -> None:
    """All of its wire fields, and the number of what failed."""
    async with Simulator() as sim, client_of(sim) as client:
        sim.lenient = True
        fields: dict[str, Any] = {**model_v(count=3).fields(), "seed": 7}
        sim.script(faults.failed("no", which=(0, 2)))
        job = await client.submit(ImageToVideo.unchecked(**fields))
        await job.outcomes()
        await client.retry(job)
        assert sim.ledger.posts[1].body is not None
        sent = {name: value for name, value in sim.ledger.posts[1].body.items() if name != "callback_url"}
        assert sent == {**fields, "generate_count": 2}


async def test_only_what_failed_can_be_bought_again() -> None:
    """Neither what is under way, nor what succeeded, nor what is in doubt, nor what is no job of ours."""
    async with Simulator(manual=True) as sim, client_of(sim) as client:
        job = await client.submit(model_v(), key="order")
        with pytest.raises(InvalidRequest, match="accepted"):
            await client.retry(job)
        assert await sim.finish(job.task_ids[0]) == 200
        with pytest.raises(InvalidRequest, match="done"):
            await client.retry(job)
        with pytest.raises(InvalidRequest, match="a job"):
            await client.retry("order")  # type: ignore[arg-type]
        async with client_of(sim, store=MemoryStore()) as other:
            with pytest.raises(InvalidRequest, match="knows"):
                await other.retry(job)
        assert counts(sim) == [1]


async def test_a_derived_key_that_is_taken_is_said() -> None:
    """A key of the user's own that looks like a retry's: its job is not given as the retry, and nothing is bought."""
    async with Simulator() as sim, client_of(sim) as client:
        job = await failed_job(client, sim)
        await client.submit(model_v(), key="order~1")
        with pytest.raises(InvalidRequest, match="order~1"):
            await client.retry(job)
        assert counts(sim) == [1, 1]


async def test_a_derived_key_that_is_being_taken_is_said() -> None:
    """The same request, submitted by its key at the same moment: one purchase, and it is not given as the retry."""
    async with Simulator() as sim, client_of(sim) as client:
        job = await failed_job(client, sim)
        calls: list[Awaitable[object]] = [client.submit(model_v(), key="order~1"), client.retry(job)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(answer) for answer in answers] == [Job, InvalidRequest]
        assert counts(sim) == [1, 1]


async def test_the_retry_of_a_key_with_a_number_of_its_own() -> None:
    """`a~1` that was not bought as a retry has the retry `a~1~1`."""
    async with Simulator() as sim, client_of(sim) as client:
        job = await failed_job(client, sim, key="a~1")
        assert (await client.retry(job)).key == "a~1~1"


# --- map -------------------------------------------------------------------------------------------------------------


async def test_map_buys_failed_tasks_again_and_joins_the_results() -> None:
    """In task order: a result of a retry takes the place of the task that failed."""
    async with Simulator() as sim, client_of(sim) as client:
        sim.script(faults.failed("no", which=(1,)))
        sim.script(faults.failed("again no"))
        (done,) = [done async for done in client.map([("order", model_v(count=3))], retries=2)]
        assert done.ok
        assert done.job is not None
        assert (done.key, done.job.key, done.job.state) == ("order", "order~2", State.DONE)
        assert counts(sim) == [3, 1, 1]
        ids = sim.ledger.task_ids
        assert [video.task_id for video in done.results] == [ids[0], ids[4], ids[2]]


async def test_map_gives_up_after_so_many_retries_for_all_runs() -> None:
    """The same keys again: what was bought again is not bought once more."""
    async with Simulator() as sim, client_of(sim) as client:
        for _ in range(5):
            sim.script(faults.failed("no"))
        for _ in range(2):
            (done,) = [done async for done in client.map([("order", model_v())], retries=2)]
            assert isinstance(done.error, TaskFailed)
            assert (done.ok, done.results) == (False, ())
            assert counts(sim) == [1, 1, 1]
        (done,) = [done async for done in client.map([("order", model_v())], retries=3)]
        assert counts(sim) == [1, 1, 1, 1]


@pytest.mark.parametrize("retries", [-1, 1.5, "2", True, None])
async def test_wrong_retries_buy_nothing(retries: Any) -> None:
    """It is said before anything is sent."""
    async with Simulator() as sim, client_of(sim) as client:
        with pytest.raises(InvalidRequest, match="retries"):
            client.map([model_v()], retries=retries)
        assert counts(sim) == []


# --- caps ------------------------------------------------------------------------------------------------------------


async def test_a_cap_is_kept_before_anything_is_sent() -> None:
    """Three outputs: a request for two, then one for two more, which is refused, then one for one."""
    async with Simulator() as sim, client_of(sim, limits=Limits(outputs=3)) as client:
        await client.submit(model_v(count=2))
        with pytest.raises(LimitReached, match=r"outputs is 3.* 2 ") as caught:
            await client.submit(model_v(count=2))
        assert caught.value.charged == "no"
        await client.submit(model_v(), key="last")
        await client.submit(model_v(), key="last")
        with pytest.raises(LimitReached):
            await client.submit(model_v("another"))
        assert counts(sim) == [2, 1]
        assert [job.state async for job in client.jobs(state="sending")] == []


async def test_many_at_once_do_not_go_beyond_the_cap() -> None:
    """A hundred submits at once, of which forty may buy."""
    async with Simulator() as sim, client_of(sim, limits=Limits(outputs=40)) as client:
        done = [each async for each in client.map([model_v(f"waves {n}") for n in range(100)], in_flight=100)]
        assert sum(each.ok for each in done) == sim.ledger.paid_submits == 40
        assert {type(each.error) for each in done if not each.ok} == {LimitReached}


async def test_what_was_not_bought_does_not_count() -> None:
    """Refused by the service, or never sent."""
    async with Simulator() as sim, client_of(sim, limits=Limits(outputs=1)) as client:
        sim.script(faults.status(400))
        with pytest.raises(Rejected):
            await client.submit(model_v())
        await client.submit(model_v("another"))
        with pytest.raises(LimitReached):
            await client.submit(model_v("a third"))


async def test_what_may_have_been_bought_counts() -> None:
    """An answer that was lost."""
    async with Simulator() as sim, client_of(sim, limits=Limits(outputs=1)) as client:
        sim.script(faults.drop_after_accept())
        job = await client.submit(model_v())
        with pytest.raises(LimitReached):
            await client.submit(model_v("another"))
        await job


async def test_a_retry_is_within_the_cap() -> None:
    """It is a purchase like any other."""
    async with Simulator() as sim, client_of(sim, limits=Limits(outputs=1)) as client:
        job = await failed_job(client, sim)
        with pytest.raises(LimitReached):
            await client.retry(job)
        assert counts(sim) == [1]
