"""A paid job keeps its ids, its key and its end: against forged callbacks, lost rows, stuck states and lost news."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import math
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from pg import Wire, fresh_schema, pg_store
from support import NotingStore, callback_body, client_of, model_v, pumped, settle, started

from xiling_async import (
    ClientClosed,
    InvalidRequest,
    Job,
    MemoryStore,
    NotSent,
    Rejected,
    SQLiteStore,
    State,
    StoreError,
    SubmitUncertain,
    WebhookReceiver,
)
from xiling_async.models.lifecycle import AnswerLost, Change, Event, Refused
from xiling_async.models.record import LEFT_BEHIND, JobRecord
from xiling_async.simulator import Simulator, faults
from xiling_async.stores.base import Store
from xiling_async.telemetry.events import JobChanged
from xiling_async.testing.clock import ManualClock, SkippingClock

SECRET = "a secret of sixteen bytes or more"
LIVELY_S = 30.0  # a test that waits longer for something hangs
DAY_S = 24 * 3600.0
FACTORIES: dict[str, Callable[[Path], Store]] = {
    "memory": lambda folder: MemoryStore(),
    "sqlite": lambda folder: SQLiteStore(folder / "jobs.db"),
    "postgres": lambda folder: pg_store(),
}


@pytest.fixture(params=FACTORIES)
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    yield FACTORIES[request.param](tmp_path)


@pytest.fixture
async def by_hand() -> AsyncIterator[Simulator]:
    async with Simulator(manual=True) as simulator:
        yield simulator


@pytest.fixture
async def wire() -> AsyncIterator[Wire]:
    async with Wire() as made:
        yield made


async def call_back(url: str | None, task_id: str, status: str = "SUCCEEDED") -> int:
    """Send a callback of our own making to this URL."""
    async with aiohttp.ClientSession() as session, session.post(str(url), data=callback_body(task_id, status)) as reply:
        return reply.status


async def found(work: Callable[[], Any]) -> Any:
    """Ask until the answer is true: for what a database does in its own time."""
    async with asyncio.timeout(LIVELY_S):
        while not (result := await work()):
            await asyncio.sleep(0.005)
        return result


def sending(job_id: str, key: str | None, now: float) -> JobRecord:
    """A job whose POST is under way, as its row has it."""
    return JobRecord(
        id=job_id, kind="image_to_video", key=key, request=model_v(), asked=1, created_at=now, changed_at=now
    )  # fmt: skip


async def forget(store: Store, schema: str) -> None:
    await store._driver.run(lambda connection: connection.execute(f'DELETE FROM "{schema}".xiling_jobs'))  # type: ignore[attr-defined]


# --- ids and outcomes ------------------------------------------------------------------------------------------------


async def test_the_services_ids_win_over_those_of_a_callback(
    by_hand: Simulator, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    """A forged callback overtakes the answer: the job is the answer's all the same, and an ERROR names both ids."""
    by_hand.hold_answers()
    async with client_of(by_hand, store=store) as client:
        submitting = asyncio.create_task(client.submit(model_v(), key="order-42"))
        await by_hand.wait_for_posts(1)
        assert await call_back(by_hand.ledger.posts[0].callback_url, "invented") == 200
        by_hand.release_answers()
        job = await submitting
        (task_id,) = by_hand.ledger.task_ids
        assert (job.state, job.task_ids) == (State.ACCEPTED, (task_id,))
        errors = [entry.getMessage() for entry in caplog.records if entry.levelno == logging.ERROR]
        assert len(errors) == 1
        assert task_id in errors[0]
        assert "invented" in errors[0]
        assert await by_hand.finish(task_id) == 200
        assert [video.task_id for video in await job] == [task_id]
        assert await client.find("invented") is None


async def test_the_services_ids_win_over_those_that_a_callback_gave_to_another_job(
    by_hand: Simulator, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    """A callback at the URL of one job names the next job's task before its answer: the answer has it, both go on."""
    async with client_of(by_hand, store=store, clock=ManualClock()) as client:
        by_hand.script(faults.drop_after_accept())
        first = await client.submit(model_v("first"), key="first")
        by_hand.hold_answers()
        submitting = asyncio.create_task(client.submit(model_v("second"), key="second"))
        await by_hand.wait_for_posts(2)
        its_own, taken = by_hand.ledger.task_ids
        assert await call_back(by_hand.ledger.posts[0].callback_url, taken) == 200
        assert (first.state, first.task_ids) == (State.DONE, (taken,))
        by_hand.release_answers()
        second = await submitting
        assert (second.state, second.task_ids) == (State.ACCEPTED, (taken,))
        assert (first.state, first.task_ids) == (State.UNCERTAIN, ())
        errors = [entry.getMessage() for entry in caplog.records if entry.levelno == logging.ERROR]
        assert any(taken in error and first.id in error and second.id in error for error in errors)
        found = await client.find(taken)
        assert found is not None
        assert found.id == second.id
        assert await call_back(by_hand.ledger.posts[0].callback_url, taken) == 409
        for task_id in (its_own, taken):
            assert await by_hand.finish(task_id) == 200
        assert [video.task_id for video in (*await first, *await second)] == [its_own, taken]
        assert by_hand.ledger.paid_submits == len(by_hand.ledger.posts) == 2


async def test_a_url_of_a_forgotten_job_is_believed_by_status_only(
    by_hand: Simulator, store: Store, tmp_path: Path
) -> None:
    """The job is purged and its URL called again, with an id and an outcome of choice: no result comes of it, ever."""
    clock = ManualClock()
    async with client_of(by_hand, store=store, clock=clock) as client:
        job = await client.submit(model_v())
        assert await by_hand.finish(job.task_ids[0]) == 200
        job_id = job.id
        del job
        gc.collect()
        assert await store.purge(-1e12) == 1
        for _ in range(2):
            assert await call_back(by_hand.ledger.posts[0].callback_url, "invented") == 200
        async with asyncio.timeout(LIVELY_S):
            while not by_hand.ledger.gets:
                clock.advance(0.01)
                await asyncio.sleep(0.005)
        again = await client.find(job_id)
        assert again is not None
        assert (again.state, again.task_ids) == (State.ACCEPTED, ("invented",))
        record = await store.get(job_id)
        assert record is not None
        assert (record.outcomes, record.is_adopted) == ((None,), True)


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
async def test_that_only_status_is_believed_outlives_a_restart(by_hand: Simulator, kind: str, tmp_path: Path) -> None:
    """The mark of an adopted job is in its row: after a restart its callbacks are not believed either."""
    schema, clock = fresh_schema(), ManualClock()

    def make() -> Store:
        return SQLiteStore(tmp_path / "jobs.db") if kind == "sqlite" else pg_store(schema=schema)

    receiver = WebhookReceiver(port=0, secret=SECRET)
    async with client_of(by_hand, receiver=receiver, clock=clock) as lost:
        job = await lost.submit(model_v())
        url, port = receiver.public_url, receiver.port
    for _ in range(2):
        receiver = WebhookReceiver(url, port=port, secret=SECRET)
        async with client_of(by_hand, receiver=receiver, store=make(), clock=clock) as client:
            assert await call_back(by_hand.ledger.posts[0].callback_url, job.task_ids[0]) == 200
            again = await client.find(job.id)
            assert again is not None
            assert again.state is State.ACCEPTED
            await settle(200)
    by_hand.set_result(job.task_ids[0])
    receiver = WebhookReceiver(url, port=port, secret=SECRET)
    async with client_of(by_hand, receiver=receiver, store=make(), clock=clock) as client:
        again = await client.find(job.id)
        assert again is not None
        assert len(await pumped(clock, again.result())) == 1


async def test_a_lost_job_waits_until_a_status_answer_can_tell(by_hand: Simulator) -> None:
    """Adopted by its callback while every GET says 404, for hours: it is not given up, and ends when a GET tells."""
    clock, secret = SkippingClock(quiet_s=0.005), SECRET
    receiver = WebhookReceiver(port=0, secret=secret)
    by_hand.script(faults.status_fault(*[404] * 12))
    async with client_of(by_hand, receiver=receiver, clock=clock) as lost:
        job = await lost.submit(model_v())
        url, port = receiver.public_url, receiver.port
    began_at = clock.time()
    async with client_of(
        by_hand, receiver=WebhookReceiver(url, port=port, secret=secret), store=MemoryStore(), clock=clock
    ) as client:
        assert await by_hand.finish(job.task_ids[0]) == 200
        again = await client.find(job.id)
        assert again is not None
        assert [video.task_id for video in await again.result(timeout=6 * DAY_S)] == list(job.task_ids)
        assert clock.time() - began_at > 2 * 3600


# --- states that must not stick --------------------------------------------------------------------------------------


class Doubting(NotingStore):
    """Another replica takes the owner for dead, just before its refusal is written."""

    async def change(self, job_id: str, event: Event) -> Change:
        if isinstance(event, Refused):
            doubt = AnswerLost(attempt=event.attempt, at=event.at, refusal=LEFT_BEHIND, due_at=event.at + 60)
            await super().change(job_id, doubt)
        return await super().change(job_id, event)


async def test_a_proven_refusal_wins_over_a_supposed_doubt() -> None:
    """Stopped and resumed: the POST was answered 400, or 429, while others called its sender dead. Nothing is lost."""
    store, clock = Doubting(), SkippingClock(quiet_s=0.01)
    async with Simulator() as sim, client_of(sim, store=store, clock=clock) as client:
        sim.script(faults.business_error(100001, "no", http=400))
        with pytest.raises(Rejected):
            await client.submit(model_v(), key="order-42")
        record = await store.by_key("order-42")
        assert record is not None
        assert (record.state, record.due_at) == (State.REJECTED, None)
        sim.script(faults.rate_limited())
        assert len(await (await client.submit(model_v("other"), key="order-43"))) == 1
        assert sim.ledger.paid_submits == 1


async def test_a_job_in_hand_is_not_purged(by_hand: Simulator, store: Store) -> None:
    """Everything that ended is purged while a submit pauses after a 429: it goes on, and buys once."""
    clock = ManualClock()
    async with client_of(by_hand, store=store, clock=clock) as client:
        by_hand.script(faults.rate_limited())
        submitting = asyncio.create_task(client.submit(model_v(), key="order-42"))

        async def is_refused() -> bool:
            record = await store.by_key("order-42")
            return record is not None and record.state is State.REJECTED

        await found(is_refused)
        assert await store.purge(-1e12) == 0
        job = await pumped(clock, asyncio.wait_for(submitting, LIVELY_S))
        assert (job.state, len(by_hand.ledger.posts)) == (State.ACCEPTED, 2)
        assert await by_hand.finish(job.task_ids[0]) == 200
        assert await store.purge(-1e12) == 1


async def test_a_row_that_vanished_under_a_submit_is_an_error(by_hand: Simulator) -> None:
    """Another replica's purge takes the row while a submit pauses after a 429: an error that says so, and no loop."""
    clock, schema = ManualClock(), fresh_schema()
    store, other = pg_store(schema=schema), pg_store(schema=schema)
    await other.open()
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(other.close)
        client = await stack.enter_async_context(client_of(by_hand, store=store, clock=clock))
        by_hand.script(faults.rate_limited())
        submitting = asyncio.create_task(client.submit(model_v(), key="order-42"))

        async def is_refused() -> bool:
            record = await other.by_key("order-42")
            return record is not None and record.state is State.REJECTED

        await found(is_refused)
        assert await other.purge(-1e12) == 1
        with pytest.raises(StoreError) as caught:
            await pumped(clock, asyncio.wait_for(submitting, LIVELY_S))
        assert (caught.value.charged, len(by_hand.ledger.posts)) == ("no", 1)


async def test_a_hook_that_raises_cancellederror_stops_no_submit() -> None:
    """It is raised between the intent and the POST: the job is bought, and its waiter gets its video."""

    def on_event(event: object) -> None:
        if isinstance(event, JobChanged):
            raise asyncio.CancelledError

    async with Simulator() as sim, client_of(sim, on_event=on_event) as client:
        assert len(await (await client.submit(model_v(), key="order-42"))) == 1


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
async def test_a_row_that_nobody_sends_does_not_stay_sending(by_hand: Simulator, kind: str, tmp_path: Path) -> None:
    """The row says `sending`, and the only process there is sends no POST of it: the same key ends at once."""
    clock, store = ManualClock(), FACTORIES[kind](tmp_path)
    async with client_of(by_hand, store=store, clock=clock) as client:
        await store.add(sending("5" * 32, "order-42", clock.time()))
        async with asyncio.timeout(LIVELY_S):
            job = await client.submit(model_v(), key="order-42")
        assert (job.id, job.state, by_hand.ledger.posts) == ("5" * 32, State.UNCERTAIN, [])


async def test_an_owner_heals_its_own_stuck_rows(by_hand: Simulator) -> None:
    """PostgreSQL: a row of this owner is `sending` and not in hand here at two heartbeats: it becomes uncertain."""
    store = pg_store(heartbeat_s=0.05)
    async with client_of(by_hand, store=store) as client:
        by_hand.hold_answers()
        submitting = asyncio.create_task(client.submit(model_v(), key="in flight"))
        await by_hand.wait_for_posts(1)
        await store.add(sending("5" * 32, "order-42", 1_800_000_000.0))
        async with asyncio.timeout(LIVELY_S):
            job = await client.submit(model_v(), key="order-42")
        assert job.state is State.UNCERTAIN
        flying = await client.find("in flight")
        assert flying is not None
        assert flying.state is State.SENDING, "what is in flight is left alone"
        by_hand.release_answers()
        assert (await submitting).state is State.ACCEPTED


async def test_the_wait_for_another_process_has_an_end(by_hand: Simulator) -> None:
    """A living process never says what became of its POST: the same key gets `SubmitUncertain`, and nothing is sent."""
    schema, clock = fresh_schema(), ManualClock()
    other = pg_store(schema=schema)
    await other.open()
    async with client_of(by_hand, store=pg_store(schema=schema), clock=clock) as client:
        await other.add(sending("5" * 32, "order-42", clock.time()))
        submitting = asyncio.create_task(client.submit(model_v(), key="order-42"))
        async with asyncio.timeout(LIVELY_S):
            while not submitting.done():
                clock.advance(10)
                await asyncio.sleep(0.01)
        with pytest.raises(SubmitUncertain) as caught:
            await submitting
        assert (caught.value.job_id, by_hand.ledger.posts) == ("5" * 32, [])
    await other.close()


async def test_closing_does_not_wait_for_another_process(by_hand: Simulator) -> None:
    """A submit waits for a job that another process sends: closing wakes it, with `ClientClosed`."""
    schema, clock = fresh_schema(), ManualClock()
    other = pg_store(schema=schema)
    await other.open()
    async with client_of(by_hand, store=pg_store(schema=schema), clock=clock) as client:
        await other.add(sending("5" * 32, "order-42", clock.time()))
        submitting = asyncio.create_task(client.submit(model_v(), key="order-42"))
        await asyncio.sleep(0.1)
        assert not submitting.done()
        async with asyncio.timeout(LIVELY_S):
            await client.__aexit__(None, None, None)
        with pytest.raises(ClientClosed):
            await submitting
    await other.close()


# --- a store that lost its last changes ------------------------------------------------------------------------------


async def test_an_adopted_job_is_the_job_of_its_key(by_hand: Simulator) -> None:
    """The store is lost, the callback brings the job back: submitted again by its key it is not bought again."""
    clock, receiver = ManualClock(), WebhookReceiver(port=0, secret=SECRET)
    async with client_of(by_hand, receiver=receiver, clock=clock) as lost:
        job = await lost.submit(model_v(), key="order-42")
        url, port = receiver.public_url, receiver.port
    receiver = WebhookReceiver(url, port=port, secret=["a newer secret, of many bytes", SECRET])
    async with client_of(by_hand, receiver=receiver, store=MemoryStore(), clock=clock) as client:
        assert await by_hand.finish(job.task_ids[0]) == 200
        again = await client.submit(model_v(), key="order-42")
        by_name = await client.find("order-42")
        assert by_name is not None
        assert again.id == by_name.id == job.id
        assert [video.task_id for video in await pumped(clock, again.result())] == list(job.task_ids)
        assert by_hand.ledger.paid_submits == 1


async def test_keys_have_different_ids_and_keyless_jobs_random_ones(by_hand: Simulator) -> None:
    """The id of a keyed job depends on the key and the secret alone; those of others are never the same."""
    ids = []
    for secret in (SECRET, SECRET, "another " + SECRET):
        async with client_of(by_hand, receiver=WebhookReceiver(port=0, secret=secret)) as client:
            jobs = [await client.submit(model_v(), key=key) for key in ("a", "b", None, None)]
            ids.append([job.id for job in jobs])
    assert ids[0][:2] == ids[1][:2]
    assert len({*ids[0], *ids[1], *ids[2]}) == 10


async def test_a_callback_of_a_later_attempt_is_taken(by_hand: Simulator) -> None:
    """A backup of before the second attempt is restored: that attempt's callback finds the job, and ends it."""
    clock, receiver = SkippingClock(quiet_s=0.01), WebhookReceiver(port=0, secret=SECRET)
    by_hand.script(faults.rate_limited())
    async with client_of(by_hand, receiver=receiver, clock=clock) as lost:
        job = await lost.submit(model_v(), key="order-42")
        url, port = receiver.public_url, receiver.port
    backup = MemoryStore()
    await backup.add(sending(job.id, "order-42", clock.time()))
    receiver = WebhookReceiver(url, port=port, secret=SECRET)
    async with client_of(by_hand, receiver=receiver, store=backup, clock=clock) as client:
        assert await by_hand.finish(job.task_ids[0]) == 200
        again = await client.submit(model_v(), key="order-42")
        assert [video.task_id for video in await again] == list(job.task_ids)
        assert by_hand.ledger.paid_submits == 1


async def test_a_process_writes_its_own_jobs_again(by_hand: Simulator) -> None:
    """The database loses its last transactions: a job that is awaited here is written again, its callback is taken."""
    schema = fresh_schema()
    store = pg_store(schema=schema, heartbeat_s=0.05)
    async with client_of(by_hand, store=store) as client:
        jobs = [await client.submit(model_v(), key=f"order-{number}") for number in range(2)]
        waiting = [await started(job.result()) for job in jobs]
        await forget(store, schema)
        assert await by_hand.finish(jobs[0].task_ids[0]) == 200, "its callback writes it again"
        await found(lambda: store.get(jobs[1].id))  # the next look at all that is watched does
        record = await store.by_key("order-0")
        assert record is not None
        assert record.request == model_v()
        assert await by_hand.finish(jobs[1].task_ids[0]) == 200
        async with asyncio.timeout(LIVELY_S):
            assert [(await one)[0].task_id for one in waiting] == [job.task_ids[0] for job in jobs]


async def test_a_job_that_another_replica_adopted_is_brought_to_what_is_known(by_hand: Simulator) -> None:
    """The database lost the job, and another replica adopts it: its waiter here is woken by what that one hears."""
    schema = fresh_schema()
    store, other = pg_store(schema=schema), pg_store(schema=schema)
    first = WebhookReceiver(port=0, secret=SECRET)
    async with client_of(by_hand, store=store, receiver=first) as client:
        job = await client.submit(model_v(count=2), key="order-42")
        url = str(by_hand.ledger.posts[0].callback_url)
        waiting = await started(job.result())
        await forget(store, schema)
        second = WebhookReceiver(first.public_url, secret=SECRET)
        async with client_of(by_hand, store=other, receiver=second):
            by_hand.set_result(job.task_ids[0])
            by_hand.set_result(job.task_ids[1])
            reply = await second.handle(url, callback_body(job.task_ids[0]))
            assert reply.status == 200
            async with asyncio.timeout(LIVELY_S):
                assert [video.task_id for video in await waiting] == list(job.task_ids)


# --- by hand ---------------------------------------------------------------------------------------------------------


async def uncertain(client: Any, sim: Simulator, **known: Any) -> Job[Any]:
    sim.script(faults.drop_after_accept())
    job: Job[Any] = await client.submit(model_v(**known), key="order-42")
    assert job.state is State.UNCERTAIN
    return job


async def test_a_bare_task_id_takes_no_task_away(by_hand: Simulator, store: Store) -> None:
    """`client.job(id)` is awaited while the job that bought it is uncertain: the real callback is taken."""
    clock = ManualClock()
    async with client_of(by_hand, store=store, clock=clock) as client:
        job = await uncertain(client, by_hand)
        (task_id,) = by_hand.ledger.task_ids
        bare = client.job(task_id)
        waiting = await started(bare.result())
        async with asyncio.timeout(LIVELY_S):
            while not by_hand.ledger.gets:
                clock.advance(0.01)
                await asyncio.sleep(0.005)
        assert await by_hand.finish(task_id) == 200
        assert [video.task_id for video in await job] == [task_id]
        assert [video.task_id for video in await pumped(clock, asyncio.wait_for(waiting, LIVELY_S))] == [task_id]
        owner = await client.find(task_id)
        assert owner is not None
        assert owner.id == job.id


async def test_an_uncertain_job_is_told_what_it_bought(by_hand: Simulator, store: Store) -> None:
    """By key or by id, also twice: it has its task, its callback and its waiter as any other job."""
    async with client_of(by_hand, store=store) as client:
        job = await uncertain(client, by_hand)
        (task_id,) = by_hand.ledger.task_ids
        waiting = await started(job.result())
        for name in ("order-42", job.id):
            told = await client.resolve(name, task_ids=[task_id])
            assert (told.id, told.state, told.task_ids) == (job.id, State.ACCEPTED, (task_id,))
        assert await by_hand.finish(task_id) == 200
        assert [video.task_id for video in await waiting] == [task_id]
        assert by_hand.ledger.paid_submits == 1


async def test_an_uncertain_job_is_told_that_it_bought_nothing(by_hand: Simulator, store: Store) -> None:
    """Its waiters hear `NotSent`; the same key buys it then, and a late callback of the first POST is not taken."""
    async with client_of(by_hand, store=store) as client:
        by_hand.script(faults.drop_before_read())
        job = await client.submit(model_v(), key="order-42")
        waiting = await started(job.result())
        for _ in range(2):
            assert (await client.resolve("order-42", not_bought=True)).state is State.NOT_SENT
        with pytest.raises(NotSent) as caught:
            await waiting
        assert caught.value.charged == "no"
        again = await client.submit(model_v(), key="order-42")
        assert (again.id, again.state) == (job.id, State.ACCEPTED)
        assert by_hand.ledger.paid_submits == 1


async def test_what_cannot_be_resolved_is_said(by_hand: Simulator, store: Store) -> None:
    """Unknown names, known fates, too many tasks, tasks of others, and nonsense: `InvalidRequest`, nothing changed."""
    async with client_of(by_hand, store=store) as client:
        bought = await client.submit(model_v("bought"), key="order-1")
        job = await uncertain(client, by_hand)
        for name, given in (
            ("nobody", {"not_bought": True}),
            ("order-1", {"not_bought": True}),
            ("order-1", {"task_ids": ["x"]}),
            ("order-42", {}),
            ("order-42", {"task_ids": ["x"], "not_bought": True}),
            ("order-42", {"task_ids": ["x", "y"]}),
            ("order-42", {"task_ids": []}),
            ("order-42", {"task_ids": "x"}),
            ("order-42", {"task_ids": [1]}),
            ("order-42", {"task_ids": list(bought.task_ids)}),
        ):
            with pytest.raises(InvalidRequest):
                await client.resolve(name, **given)
        assert (job.state, bought.state) == (State.UNCERTAIN, State.ACCEPTED)


# --- news and clocks -------------------------------------------------------------------------------------------------


async def test_a_lost_notification_delays_news_by_a_few_heartbeats(by_hand: Simulator, wire: Wire) -> None:
    """The connection lives and loses every notification: who waits hears what another replica wrote all the same."""
    schema = fresh_schema()
    deaf = pg_store(wire.dsn, schema=schema, heartbeat_s=0.05)
    async with (
        client_of(by_hand, store=pg_store(schema=schema)) as one,
        client_of(by_hand, store=deaf) as two,
    ):
        job = await one.submit(model_v(), key="order-42")
        twin = await two.find("order-42")
        assert twin is not None
        waiting = await started(twin.result())
        await asyncio.sleep(0.05)
        wire.is_deaf = True
        assert await by_hand.finish(job.task_ids[0]) == 200
        async with asyncio.timeout(LIVELY_S):
            assert [video.task_id for video in await waiting] == list(job.task_ids)


async def test_a_wait_looks_into_the_store_before_it_times_out(by_hand: Simulator, wire: Wire) -> None:
    """Every notification is lost, and the heartbeat is far away: the end of the wait finds the job done."""
    schema, clock = fresh_schema(), ManualClock()
    async with (
        client_of(by_hand, store=pg_store(schema=schema)) as one,
        client_of(by_hand, store=pg_store(wire.dsn, schema=schema), clock=clock) as two,
    ):
        job = await one.submit(model_v(), key="order-42")
        twin = await two.find("order-42")
        assert twin is not None
        waiting = await started(twin.result(timeout=20))
        await asyncio.sleep(0.05)
        wire.is_deaf = True
        assert await by_hand.finish(job.task_ids[0]) == 200
        clock.advance(21)
        async with asyncio.timeout(LIVELY_S):
            assert [video.task_id for video in await waiting] == list(job.task_ids)


async def test_a_clock_that_was_8_days_behind_expires_no_job(by_hand: Simulator, tmp_path: Path) -> None:
    """The job was made while the clock was 8 days behind; the next client's clock is right: it is waited for."""
    behind, right = ManualClock(1_800_000_000.0 - 8 * DAY_S), ManualClock(1_800_000_000.0)
    async with client_of(by_hand, store=SQLiteStore(tmp_path / "jobs.db"), clock=behind) as client:
        job = await client.submit(model_v(), key="order-42")
    async with client_of(by_hand, store=SQLiteStore(tmp_path / "jobs.db"), clock=right) as client:
        again = await client.find("order-42")
        assert again is not None
        for _ in range(20):
            right.advance(60)
            await settle(20)
            await asyncio.sleep(0.005)
        assert len(by_hand.ledger.gets) > 2
        assert again.state is State.ACCEPTED
        by_hand.set_result(job.task_ids[0])
        waiting = asyncio.create_task(again.result(math.inf))
        while not waiting.done():
            right.advance(60)
            await asyncio.sleep(0.005)
        assert len(await waiting) == 1


async def test_a_memory_store_forgets_refused_jobs_without_a_key(by_hand: Simulator) -> None:
    """Of jobs that were rejected, or never sent, the last few are kept; those with a key are kept until `purge`."""
    store = MemoryStore(keep=2)
    async with client_of(by_hand, store=store) as client:
        by_hand.default(faults.business_error(100001, "no", http=400))
        for key in (*[None] * 10, "a", "b", "c"):
            with pytest.raises(Rejected):
                await client.submit(model_v(), key=key)
        assert len([record async for record in store.jobs()]) == 2 + 3
