"""All orders in which an answer, a callback, its repeat and two waiters can meet; each is driven, none is luck."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from enum import Enum, auto
from itertools import permutations
from typing import Any, Final

import pytest
from support import NotingStore, client_of, model_v, started

from xiling_async import Client, Job, State, Video, WaitTimeout, WebhookReceiver
from xiling_async.simulator import Simulator, faults
from xiling_async.simulator.faults import Fault
from xiling_async.testing.clock import ManualClock

FIRST_WAITS_S: Final = 5.0  # far less than an answer is waited for


class Step(Enum):
    ANSWER = auto()  # the POST is answered, or its answer is lost
    CALLBACK = auto()
    REPEAT = auto()  # the same callback again
    LEAVES = auto()  # the first waiter times out, or is cancelled
    ARRIVES = auto()  # the second waiter


def _is_possible(order: Sequence[Step]) -> bool:
    """A repeat repeats something; a waiter that has its result does not leave without it."""
    return order.index(Step.CALLBACK) < order.index(Step.REPEAT) and (
        Step.LEAVES not in order or order.index(Step.LEAVES) < order.index(Step.CALLBACK)
    )


def orders() -> Iterator[tuple[Step, ...]]:
    staying = [step for step in Step if step is not Step.LEAVES]
    for steps in (list(Step), staying):
        yield from (order for order in permutations(steps) if _is_possible(order))


ORDERS: Final = tuple(orders())
ANSWERS: Final[dict[str, tuple[Fault, ...]]] = {
    "answered": (),
    "answer lost": (faults.drop_after_accept(),),
    "answer garbled": (faults.garbage(),),
    "answered 500": (faults.status(500, accept=True),),
}


def _name(order: tuple[Step, ...]) -> str:
    return "-".join(step.name.lower() for step in order)


class Play:
    """One job on the stage: the POST is held, the first waiter waits for it by its key."""

    def __init__(self, sim: Simulator, client: Client, clock: ManualClock, *, cancels: bool) -> None:
        self.sim = sim
        self.client = client
        self.clock = clock
        self.cancels = cancels
        self.waiters: list[asyncio.Task[tuple[Video, ...]]] = []

    async def begin(self) -> None:
        self.sim.hold_answers()
        self.submitting = asyncio.create_task(self.client.submit(model_v(), key="one"))
        await self.sim.wait_for_posts(1)
        (self.task_id,) = self.sim.ledger.task_ids
        await self.wait(FIRST_WAITS_S)

    async def wait(self, timeout: float | None = None) -> None:
        job: Job[Any] | None = await self.client.find("one")
        assert job is not None
        self.waiters.append(await started(job.result(timeout)))

    async def play(self, step: Step) -> None:
        match step:
            case Step.ANSWER:
                self.sim.release_answers()
                self.job = await self.submitting
            case Step.CALLBACK:
                assert await self.sim.finish(self.task_id) == 200
            case Step.REPEAT:
                assert await self.sim.callback(self.task_id) == 200
            case Step.ARRIVES:
                await self.wait()
            case Step.LEAVES:
                await self.leave(self.waiters.pop(0))

    async def leave(self, waiter: asyncio.Task[tuple[Video, ...]]) -> None:
        if self.cancels:
            waiter.cancel()
        else:
            self.clock.advance(FIRST_WAITS_S)
        await asyncio.wait({waiter})
        assert waiter.cancelled() if self.cancels else isinstance(waiter.exception(), WaitTimeout)


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("order", ORDERS, ids=_name)
@pytest.mark.parametrize("cancels", [False, True], ids=["timeout", "cancel"])
async def test_every_order_ends_the_same(order: tuple[Step, ...], answer: str, cancels: bool) -> None:
    """Every surviving waiter has the same video; one POST, one outcome, no GET; the job is done under its one id."""
    clock, store = ManualClock(), NotingStore()
    async with Simulator(manual=True) as sim, client_of(sim, clock=clock, store=store) as client:
        sim.script(*ANSWERS[answer])
        play = Play(sim, client, clock, cancels=cancels)
        await play.begin()
        for step in order:
            await play.play(step)
        results = await asyncio.gather(*play.waiters, play.job.result())
        assert {videos[0].task_id for videos in results} == {play.task_id}
        assert all(videos == results[0] for videos in results)
        assert (play.job.state, play.job.task_ids) == (State.DONE, (play.task_id,))
        again = await client.submit(model_v(), key="one")
        assert (again.id, await again) == (play.job.id, results[0])
        records = await store.everything()
        assert [(record.state, len(record.outcomes)) for record in records.values()] == [(State.DONE, 1)]
        assert (len(sim.ledger.posts), sim.ledger.paid_submits, sim.ledger.gets) == (1, 1, [])
        assert [callback.status for callback in sim.ledger.callbacks] == [200, 200]


def test_no_order_is_missing() -> None:
    """20 orders where the first waiter leaves, 12 where it stays, none twice."""
    assert len(ORDERS) == len(set(ORDERS)) == 20 + 12


@pytest.mark.parametrize("order", list(permutations(range(4))), ids=lambda order: "".join(map(str, order)))
async def test_outputs_may_end_in_any_order(order: tuple[int, ...]) -> None:
    """The four outputs of a job end in any order, the second with a failure: the outcomes are in task order."""
    async with Simulator(manual=True) as sim, client_of(sim) as client:
        sim.hold_answers()
        submitting = asyncio.create_task(client.submit(model_v(count=4)))
        await sim.wait_for_posts(1)
        ids = sim.ledger.task_ids
        for place in order[:2]:
            assert await sim.finish(ids[place], "FAILED" if place == 1 else "SUCCEEDED") == 200
        sim.release_answers()
        job = await submitting
        waiting = await started(job.outcomes())
        for place in order[2:]:
            assert not waiting.done()
            assert await sim.finish(ids[place], "FAILED" if place == 1 else "SUCCEEDED") == 200
        outcomes = await waiting
        assert [outcome.task_id for outcome in outcomes] == list(ids) == list(job.task_ids)
        assert [type(outcome).__name__ for outcome in outcomes] == ["Succeeded", "Failed", "Succeeded", "Succeeded"]
        assert (len(sim.ledger.posts), sim.ledger.gets) == (1, [])


@pytest.mark.parametrize("first", ["SUCCEEDED", "FAILED"])
async def test_two_ends_at_once_make_one_outcome(first: str) -> None:
    """Ten contradicting ends sent at the same time: each is answered 200, one is the outcome, for every waiter."""
    second = "FAILED" if first == "SUCCEEDED" else "SUCCEEDED"
    async with Simulator(manual=True) as sim, client_of(sim) as client:
        job = await client.submit(model_v())
        waiters = [await started(job.outcomes()) for _ in range(3)]
        (task_id,) = job.task_ids
        answers = await asyncio.gather(*(sim.finish(task_id, end) for end in (first, second) * 5))
        assert set(answers) == {200}
        outcomes = await asyncio.gather(*waiters, job.outcomes())
        assert len({type(found[0]) for found in outcomes}) == 1
        assert job.state in (State.DONE, State.FAILED)
        before = job.state
        assert [await sim.finish(task_id, end) for end in (first, second)] == [200, 200]
        assert job.state == before


async def test_a_callback_between_the_submits_of_one_key_is_seen_by_both() -> None:
    """Two callers of one key, the callback comes while both wait for the POST: both get the job, done."""
    async with Simulator(manual=True) as sim, client_of(sim) as client:
        sim.hold_answers()
        first = asyncio.create_task(client.submit(model_v(), key="one"))
        await sim.wait_for_posts(1)
        second = await started(client.submit(model_v(), key="one"))
        assert await sim.finish(sim.ledger.task_ids[0]) == 200
        third = await started(client.submit(model_v(), key="one"))
        assert [task.done() for task in (first, second, third)] == [False] * 3
        sim.release_answers()
        jobs = await asyncio.gather(first, second, third)
        assert {job.id for job in jobs} == {jobs[0].id}
        assert {job.state for job in jobs} == {State.DONE}
        assert len(sim.ledger.posts) == 1


async def test_a_callback_for_the_client_before_is_taken_by_the_one_after() -> None:
    """The client goes, a new one with the same store and address comes: it takes the callback of the old job."""
    store, clock = NotingStore(), ManualClock()
    async with Simulator(manual=True) as sim:
        receiver = WebhookReceiver(port=0)
        async with client_of(sim, store=store, receiver=receiver, clock=clock) as client:
            job = await client.submit(model_v(), key="one")
            url, port = receiver.public_url, receiver.port
        assert await sim.finish(job.task_ids[0]) is None  # nobody listens
        async with client_of(sim, store=store, receiver=WebhookReceiver(url, port=port), clock=clock) as client:
            again = await client.submit(model_v(), key="one")
            waiting = await started(again.result())
            assert await sim.callback(job.task_ids[0]) == 200
            (video,) = await waiting
            assert (again.id, video.task_id) == (job.id, job.task_ids[0])
            assert len(sim.ledger.posts) == 1
