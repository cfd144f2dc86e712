"""Many at once: lazily pulled, bounded, one failure harms no neighbour, and what was bought is never bought again."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing

import pytest
from support import Road, client_of, closed_port, gone, model_v, settle, started, turns_until

from xiling_async import (
    Client,
    ClientClosed,
    Finished,
    ImageToVideo,
    InvalidRequest,
    Limits,
    MemoryStore,
    NotSent,
    Polling,
    ProtocolError,
    Rejected,
    SubmitUncertain,
    TaskFailed,
    Timeouts,
    Video,
    WebhookReceiver,
)
from xiling_async.simulator import Simulator, faults
from xiling_async.testing.clock import ManualClock


class Source:
    """Requests without end, and how many of them were pulled."""

    def __init__(self, length: int | None = None) -> None:
        self.pulled = 0
        self.length = length

    def __iter__(self) -> Iterator[ImageToVideo]:
        while self.length is None or self.pulled < self.length:
            self.pulled += 1
            yield model_v(f"waves {self.pulled}")

    async def slowly(self) -> AsyncIterator[ImageToVideo]:
        for request in self:
            await asyncio.sleep(0)
            yield request


async def _anext(results: AsyncIterator[Finished[Video]]) -> Finished[Video]:
    return await anext(results)


def prompts(count: int) -> list[ImageToVideo]:
    return [model_v(f"waves {number}") for number in range(count)]


def keyed(count: int) -> list[tuple[str, ImageToVideo]]:
    return [(f"order-{number}", request) for number, request in enumerate(prompts(count))]


# --- bounded, and lazy ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
async def test_it_pulls_lazily_and_holds_no_more_than_in_flight(is_async: bool) -> None:
    """Of a source without end 5 are pulled; one more for each that is taken. Those that are done and wait count."""
    source = Source()
    async with Simulator(manual=True) as sim, client_of(sim) as client:
        async with aclosing(client.map(source.slowly() if is_async else source, in_flight=5)) as results:
            first = await started(_anext(results))
            await sim.wait_for_posts(5)
            await settle()
            assert (source.pulled, len(sim.ledger.posts)) == (5, 5)
            for task_id in sim.ledger.task_ids[:3]:
                assert await sim.finish(task_id) == 200
            assert (await first).ok
            await settle(200)
            assert (source.pulled, len(sim.ledger.posts)) == (5, 5), "the consumer has not asked for the next"
            assert (await anext(results)).ok
            await settle()
            assert (await anext(results)).ok
            await sim.wait_for_posts(6)
            await settle(200)
            assert source.pulled == 7, "two were taken before the last was asked for"
        assert source.pulled == 7


async def test_results_come_as_they_finish_or_in_order() -> None:
    """The same three, finished from the last to the first."""
    for is_ordered in (False, True):
        async with Simulator(manual=True) as sim, client_of(sim) as client:

            async def collected(client: Client = client, is_ordered: bool = is_ordered) -> list[Finished[Video]]:
                return [done async for done in client.map(prompts(3), ordered=is_ordered)]

            collecting = await started(collected())
            await sim.wait_for_posts(3)
            asked = {post.body["prompt"]: post.task_ids[0] for post in sim.ledger.posts if post.body}
            for number in (2, 1, 0):
                assert await sim.finish(asked[f"waves {number}"]) == 200
                await settle()
            done = await collecting
            assert [item.index for item in done] == ([0, 1, 2] if is_ordered else [2, 1, 0])
            for item in done:
                assert (item.ok, item.error, item.key, item.request) == (True, None, None, prompts(3)[item.index])
                assert item.job is not None
                assert [video.task_id for video in item.results] == list(item.job.task_ids)


async def test_an_empty_source_ends_at_once() -> None:
    async with Simulator() as sim, client_of(sim) as client:
        none: list[ImageToVideo] = []
        assert [done async for done in client.map(none)] == []
        assert [done async for done in client.map(Source(0).slowly())] == []


# --- failures ------------------------------------------------------------------------------------------------------


async def test_one_failure_harms_no_neighbour() -> None:
    """Refused, failed, half failed, and a key of another request: each has its error, all others their videos."""
    async with Simulator() as sim, client_of(sim) as client:
        await client.run(model_v("other"), key="taken")
        sim.script(faults.business_error(100001, "Parameter error", http=400))
        sim.script(faults.failed("no faces"))
        sim.script()
        items: list[ImageToVideo | tuple[str, ImageToVideo]]
        items = [model_v("refused"), model_v("failed"), model_v("fine"), ("taken", model_v("not the other"))]
        done = [item async for item in client.map(iter(items), in_flight=1)]
        assert [type(item.error) for item in done] == [Rejected, TaskFailed, type(None), InvalidRequest]
        assert [item.ok for item in done] == [False, False, True, False]
        assert [item.error.charged for item in done if isinstance(item.error, (Rejected, TaskFailed))] == ["no", "yes"]
        assert [item.job is None for item in done] == [True, False, False, True]
        assert (len(sim.ledger.posts), sim.ledger.paid_submits) == (4, 3)


async def test_the_good_outputs_of_a_job_that_failed_are_among_its_results() -> None:
    """2 of 3 outputs were made and paid for."""
    async with Simulator(manual=True) as sim, client_of(sim) as client:
        running = await started(_anext(client.map([model_v(count=3)])))
        await sim.wait_for_posts(1)
        one, two, three = sim.ledger.task_ids
        for task_id, status in ((one, "SUCCEEDED"), (two, "FAILED"), (three, "SUCCEEDED")):
            await sim.finish(task_id, status)
        done = await running
        assert isinstance(done.error, TaskFailed)
        assert [video.task_id for video in done.results] == [one, three]


@pytest.mark.parametrize("items", [7, "abc", model_v()], ids=["a number", "text", "one request"])
async def test_what_is_no_source_is_refused_at_once(items: object) -> None:
    async with Simulator() as sim, client_of(sim) as client:
        with pytest.raises(InvalidRequest, match="iterable of requests"):
            client.map(items)  # type: ignore[arg-type]
        for in_flight in (0, -1, True, 2.0):
            with pytest.raises(InvalidRequest, match="in_flight"):
                client.map([model_v()], in_flight=in_flight)  # type: ignore[arg-type]
        assert sim.ledger.posts == []


async def test_a_wrong_item_of_a_list_is_refused_before_anything_is_sent() -> None:
    async with Simulator() as sim, client_of(sim) as client:
        for wrong in (None, ("", model_v()), (7, model_v()), ("key", 7), {"prompt": "x"}):
            with pytest.raises(InvalidRequest, match="Item 1 of map"):
                client.map([model_v(), wrong])  # type: ignore[arg-type]
        assert sim.ledger.posts == []


async def test_what_the_source_raises_comes_after_what_was_started() -> None:
    """Two were bought when the source breaks: both are given, then its error; nothing more is pulled."""

    def source() -> Iterator[ImageToVideo]:
        yield from prompts(2)
        raise OSError("the file broke off")

    async with Simulator() as sim, client_of(sim) as client:
        done: list[Finished[Video]] = []
        with pytest.raises(OSError, match="broke off"):
            async for item in client.map(source()):
                done.append(item)
        assert [item.ok for item in done] == [True, True]
        assert len(sim.ledger.posts) == 2


# --- keys ----------------------------------------------------------------------------------------------------------


async def test_a_second_run_buys_nothing_again() -> None:
    """Some are done, some in flight, one of unknown fate: the next client with the store sends only what is new."""
    store = MemoryStore()
    async with Simulator(manual=True) as sim:
        first = WebhookReceiver(port=0)
        async with client_of(sim, store=store, receiver=first) as client:
            url, port = first.public_url, first.port
            sim.script(faults.drop_after_accept())
            results = client.map(keyed(6), in_flight=6)
            running = await started(_anext(results))
            await sim.wait_for_posts(6)
            await settle()
            await sim.finish(sim.ledger.posts[2].task_ids[0])
            assert (await running).ok
            await results.aclose()
        async with client_of(sim, store=store, receiver=WebhookReceiver(url, port=port)) as client:
            collecting = await started(_collected(client, keyed(8)))
            await sim.wait_for_posts(8)
            for post in sim.ledger.posts:
                await sim.finish(post.task_ids[0])
            done = await collecting
        assert sorted(item.key or "" for item in done) == [f"order-{number}" for number in range(8)]
        assert all(item.ok for item in done)
        assert (len(sim.ledger.posts), sim.ledger.paid_submits) == (8, 8)


async def _collected(client: Client, items: list[tuple[str, ImageToVideo]]) -> list[Finished[Video]]:
    return [done async for done in client.map(items)]


async def test_a_key_in_doubt_is_not_bought_again() -> None:
    """Nobody knows whether it was bought: `SubmitUncertain`, in this run and in the next, and one POST."""
    clock, store = ManualClock(), MemoryStore()
    async with Simulator(manual=True) as sim:
        sim.script(faults.drop_before_read())
        for _ in range(2):
            async with client_of(sim, store=store, clock=clock, timeouts=Timeouts(uncertain=60)) as client:
                running = await started(_anext(client.map(keyed(1))))
                await turns_until(lambda: len(sim.ledger.posts) == 1)
                for _ in range(4):
                    await settle(200)
                    clock.advance(30)
                done = await running
                assert isinstance(done.error, SubmitUncertain)
                assert done.job is not None
        assert len(sim.ledger.posts) == 1


async def test_a_key_that_names_two_requests_is_refused() -> None:
    """In a list before any POST; of a lazy source the second is not sent. The same request twice is one job."""
    items = [("one", model_v("a")), ("two", model_v("b")), ("one", model_v("c"))]
    async with Simulator() as sim, client_of(sim) as client:
        with pytest.raises(InvalidRequest, match="names another request at item 2") as caught:
            client.map(items)
        assert [problem.field for problem in caught.value.problems] == ["key"]
        assert sim.ledger.posts == []
        done = {item.index: item async for item in client.map(iter(items), in_flight=1)}
        assert [done[index].ok for index in range(3)] == [True, True, False]
        assert isinstance(done[2].error, InvalidRequest)
        same = [item async for item in client.map([("two", model_v("b"))] * 3)]
        assert len({item.job.id for item in same if item.job}) == 1
        assert len(sim.ledger.posts) == 2


# --- leaving -------------------------------------------------------------------------------------------------------


async def test_leaving_the_loop_submits_nothing_more() -> None:
    """`break`: what was bought stays in the store, the rest is not pulled, no task is left."""
    source = Source()
    async with Simulator(manual=True) as sim, client_of(sim, limits=Limits(submits=2)) as client:
        sim.hold_answers()
        async for _ in _first_after(client, sim, source):
            break
        posts = len(sim.ledger.posts)
        sim.release_answers()
        await settle(500)
        assert (len(sim.ledger.posts), source.pulled) == (posts, 6)
        assert len([job async for job in client.recover()]) == posts - 1
    assert sim.ledger.paid_submits == posts


async def test_a_consumer_that_stops_asking_buys_nothing_new() -> None:
    """`break` with the generator still referenced: what was started and waits for its turn is not sent, until the
    consumer asks again."""
    source = Source()
    async with Simulator(manual=True) as sim, client_of(sim, limits=Limits(submits=2)) as client:
        sim.hold_answers()
        results = client.map(source, in_flight=6)
        first = await started(_anext(results))
        await sim.wait_for_posts(2)
        sim.release_answers()
        await sim.wait_for_posts(4)
        sim.hold_answers()
        await settle()
        await sim.finish(sim.ledger.posts[0].task_ids[0])
        assert (await first).ok
        await settle(100)
        posts = len(sim.ledger.posts)
        sim.release_answers()
        await settle(500)
        assert len(sim.ledger.posts) <= posts
        second = await started(_anext(results))
        await sim.wait_for_posts(6)
        await sim.finish(sim.ledger.posts[1].task_ids[0])
        assert (await second).ok
        await results.aclose()


async def test_a_rate_holds_back_what_a_consumer_no_longer_asks_for() -> None:
    """One submit a second, ten in flight: the loop is left after the first result, and no further POST is seen."""
    clock = ManualClock()
    limits = Limits(submits_per_second=1)
    async with Simulator() as sim, client_of(sim, limits=limits, clock=clock) as client:
        results = client.map(Source(), in_flight=10)
        async for done in results:
            assert done.ok
            break
        posts = len(sim.ledger.posts)
        for _ in range(20):
            clock.advance(1)
            await settle(100)
        assert len(sim.ledger.posts) == posts
        await results.aclose()


async def test_an_asynchronous_source_is_closed() -> None:
    """However the loop is left, the generator that gives the items ends its own `finally`."""
    closed: list[bool] = []

    async def source() -> AsyncIterator[ImageToVideo]:
        try:
            while True:
                yield model_v()
        finally:
            closed.append(True)

    async with Simulator() as sim, client_of(sim) as client:
        async with aclosing(client.map(source(), in_flight=2)) as results:
            async for done in results:
                assert done.ok
                break
        assert closed == [True]


async def test_a_paid_answer_with_too_many_ids_has_its_job_in_the_result() -> None:
    """Three ids for one output: `Finished.job` and `ProtocolError.job` are the job, which can be awaited."""
    async with Simulator() as sim, client_of(sim) as client:
        sim.script(faults.ids(3))
        (done,) = [item async for item in client.map([model_v()])]
        assert isinstance(done.error, ProtocolError)
        assert done.job is done.error.job is not None
        assert done.job.task_ids == sim.ledger.task_ids
        assert len(await done.job) == 3


async def _first_after(client: Client, sim: Simulator, source: Source) -> AsyncIterator[Finished[Video]]:
    """A map of 6 in flight with 2 POSTs at once, as it gives its first result; the POSTs behind it are held."""
    async with aclosing(client.map(source, in_flight=6)) as results:
        first = await started(_anext(results))
        await sim.wait_for_posts(2)
        sim.release_answers()
        await turns_until(lambda: bool(sim.ledger.posts[0].task_ids))
        await sim.wait_for_posts(4)
        sim.hold_answers()
        await settle()
        await sim.finish(sim.ledger.posts[0].task_ids[0])
        yield await first


async def test_a_generator_that_is_dropped_stops() -> None:
    """Nobody closes it: it is collected, and what it started goes with it."""
    source = Source()
    async with Simulator(manual=True) as sim, client_of(sim) as client:
        await _taken(client, sim, source)
        gc.collect()
        await turns_until(lambda: not _map_tasks())
        assert len(sim.ledger.posts) == source.pulled == 3


async def _taken(client: Client, sim: Simulator, source: Source) -> None:
    async for done in _finishing(client.map(source, in_flight=3), sim):
        assert done.ok
        return


async def _finishing(results: AsyncIterator[Finished[Video]], sim: Simulator) -> AsyncIterator[Finished[Video]]:
    first = await started(_anext(results))
    await sim.wait_for_posts(3)
    await sim.finish(sim.ledger.task_ids[0])
    yield await first


def _map_tasks() -> list[str]:
    return [task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith("xiling map")]


@pytest.mark.parametrize("way", ["cancelled", "timeout", "exception", "group"])
async def test_however_it_is_left_nothing_leaks(way: str) -> None:
    """Cancelled, out of time, by an exception of the consumer, by a neighbour in a TaskGroup: no task, no new POST."""
    async with Simulator(manual=True) as sim, client_of(sim) as client:

        async def consumer() -> None:
            async for done in client.map(Source().slowly() if way == "timeout" else Source(), in_flight=3):
                assert done.ok
                if way == "exception":
                    raise LookupError

        async def neighbour() -> None:
            await sim.wait_for_posts(3)
            raise LookupError

        if way == "cancelled":
            task = await started(consumer())
            await sim.wait_for_posts(3)
            await gone(task)
        elif way == "timeout":
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(None) as limit:
                    asyncio.get_running_loop().call_soon(limit.reschedule, 0)
                    await consumer()
        elif way == "exception":
            task = await started(consumer())
            await sim.wait_for_posts(3)
            await sim.finish(sim.ledger.task_ids[0])
            with pytest.raises(LookupError):
                await task
        else:
            with pytest.raises(ExceptionGroup):
                async with asyncio.TaskGroup() as group:
                    group.create_task(consumer())
                    group.create_task(neighbour())
        await turns_until(lambda: not _map_tasks())
        posts = len(sim.ledger.posts)
        await settle(300)
        assert len(sim.ledger.posts) == posts <= 3


async def test_a_client_that_closes_ends_the_map() -> None:
    """Another task closes the client: `ClientClosed`, and the jobs are in the store."""
    store = MemoryStore()
    async with Simulator(manual=True) as sim:
        async with client_of(sim, store=store) as client:
            results = client.map(Source(), in_flight=3)
            running = await started(_anext(results))
            await sim.wait_for_posts(3)
        with pytest.raises(ClientClosed):
            await running
        with pytest.raises(ClientClosed):
            client.map([model_v()])
        assert len([record async for record in store.unfinished()]) == 3


# --- pace ----------------------------------------------------------------------------------------------------------


async def test_submits_per_second_are_smoothed() -> None:
    """4 a second: one every quarter of a second, and never two together; a pause saves up nothing."""
    clock = ManualClock()
    limits = Limits(submits_per_second=4)
    async with Simulator(manual=True) as sim, client_of(sim, clock=clock, limits=limits) as client:
        running = await started(_collected(client, keyed(8)))
        seen = []
        for _ in range(16):
            await _quiet(client)
            seen.append(len(sim.ledger.posts))
            clock.advance(0.125)
        assert seen == [1 + number // 2 for number in range(16)]
        await gone(running)
        clock.advance(60)
        running = await started(_collected(client, [(f"later-{number}", model_v()) for number in range(4)]))
        await _quiet(client)
        assert len(sim.ledger.posts) == 9
        await gone(running)


async def test_one_429_pauses_every_submit() -> None:
    """`Retry-After: 20`: for 20 seconds no POST leaves; then they go on, and everything is bought once."""
    clock = ManualClock()
    async with Simulator() as sim, client_of(sim, clock=clock, limits=Limits(submits=4)) as client:
        for _ in range(3):
            sim.script()
        sim.script(faults.rate_limited(retry_after=20))
        running = await started(_collected(client, keyed(10)))
        await turns_until(lambda: any(post.status == 429 for post in sim.ledger.posts))
        await _quiet(client)
        posts = len(sim.ledger.posts)
        for _ in range(19):
            clock.advance(1)
            await _quiet(client)
            assert len(sim.ledger.posts) == posts
        while not running.done():
            clock.advance(1)
            await _quiet(client)
        assert all(done.ok for done in running.result())
        assert sim.ledger.paid_submits == 10
        assert [post.status for post in sim.ledger.posts].count(429) == 1


JOB_S = 10  # how long the service takes for a job, in the test of an outage
IN_FLIGHT = 20
PER_SECOND = 4


async def test_an_outage_of_a_minute_ends_with_every_job_done_at_the_configured_rate() -> None:
    """Virtual time: 4 submits a second, 20 in flight. For 60 s the service is gone; then no second of what follows has
    more than those 4, every job is done, and none was bought twice."""
    clock = ManualClock()
    async with Simulator(manual=True) as sim:
        road = Road(sim)
        await road.open()
        limits = Limits(submits_per_second=PER_SECOND)
        async with client_of(
            sim, clock=clock, base_url=road.base_url, polling=Polling(grace=100_000), limits=limits
        ) as client:
            running = await started(_collected_lazily(client, 200))
            await _quiet(client)
            born: dict[str, float] = {}
            per_second: list[int] = []
            begun = clock.time()
            while not running.done():
                before, second = len(sim.ledger.posts), round(clock.time() - begun)
                if second == 30:
                    await road.close()
                if second == 90:
                    await road.open()
                for _ in range(4):
                    clock.advance(0.25)
                    await _quiet(client)
                for task_id in sim.ledger.task_ids[len(born) :]:
                    born[task_id] = clock.time()
                for task_id in [task_id for task_id, at in born.items() if 0 < at <= clock.time() - JOB_S]:
                    born[task_id] = 0.0
                    assert await sim.finish(task_id) == 200
                await _quiet(client)
                per_second.append(len(sim.ledger.posts) - before)
                assert second < 400
            assert [done.error for done in running.result()] == [None] * 200
        await road.close()
    assert sum(per_second[31:90]) == 0
    assert max(per_second) <= PER_SECOND, str(per_second)
    assert (len(sim.ledger.posts), max(Counter(post.callback_url for post in sim.ledger.posts).values())) == (200, 1)


async def _quiet(client: Client) -> None:
    """No POST is on its way, and nobody is about to send one."""
    await settle()
    await turns_until(lambda: not client.stats().in_flight["submits"])
    await settle()


async def _collected_lazily(client: Client, count: int) -> list[Finished[Video]]:
    return [done async for done in client.map(iter(keyed(count)), in_flight=IN_FLIGHT)]


async def test_a_service_that_never_answered_is_no_outage() -> None:
    """A wrong address: `NotSent` after a few tries, nobody waits for ten minutes."""
    clock = ManualClock()
    async with Simulator() as sim:
        with closed_port() as port:
            async with client_of(sim, clock=clock, base_url=f"http://127.0.0.1:{port}/v1") as client:
                begun, running = clock.time(), await started(_collected(client, keyed(3)))
                while not running.done():
                    await settle(100)
                    clock.advance(0.5)
                assert [type(done.error) for done in running.result()] == [NotSent] * 3
                assert clock.time() - begun < 120
    assert sim.ledger.posts == []
