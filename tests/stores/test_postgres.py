"""What a PostgresStore promises beyond the contract of every store: processes, networks that break, one truth."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import pickle
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import asyncpg
import pg
import pytest
from pg import PASSWORD, Wire, fresh_schema, pg_store
from support import callback_body, client_of, model_v, settle, started
from test_store_contract import NOW, answer, good, heard, job, lost

from xiling_async import (
    Client,
    ConfigurationError,
    MemoryStore,
    PostgresOptions,
    PostgresStore,
    StoreError,
    WebhookReceiver,
)
from xiling_async.models.lifecycle import Event, PollScheduled, ResendStarted, Verdict
from xiling_async.models.record import LEFT_BEHIND, JobRecord, State
from xiling_async.simulator import Simulator
from xiling_async.stores.postgres import listener, queries
from xiling_async.stores.postgres.address import Address
from xiling_async.stores.postgres.driver import Driver
from xiling_async.stores.postgres.schema import MIGRATIONS, Names, migrate, quoted, unquoted
from xiling_async.testing.clock import ManualClock

LIVELY_S = 20.0  # what must happen happens within this, or the test fails; in truth it takes milliseconds
QUICK = {"timeout": 0.3, "command_timeout": 0.3}


class Notes:
    """A watcher that writes down what it is told."""

    def __init__(self, *job_ids: str) -> None:
        self.records: dict[str, JobRecord] = {}
        self.versions = dict.fromkeys(job_ids, -1)
        self.told_of: list[str] = []
        self._news = asyncio.Event()

    def known(self, job_id: str) -> int | None:
        return self.versions.get(job_id)

    def watched(self) -> list[str]:
        return list(self.versions)

    def told(self, record: JobRecord) -> None:
        self.records[record.id] = record
        self.versions[record.id] = record.version
        self.told_of.append(record.id)
        self._news.set()

    def missing(self, job_ids: Iterable[str]) -> None:
        pass

    def handover_changed(self) -> None:
        pass

    def in_hand(self) -> frozenset[str]:
        return frozenset()

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(LIVELY_S):
            while not holds():
                self._news.clear()
                await self._news.wait()

    async def state(self, job_id: str, state: State) -> JobRecord:
        await self.until(lambda: job_id in self.records and self.records[job_id].state is state)
        return self.records[job_id]


@pytest.fixture
def schema() -> str:
    return fresh_schema()


@pytest.fixture
async def wire() -> AsyncIterator[Wire]:
    async with Wire() as made:
        yield made


@pytest.fixture
async def by_hand() -> AsyncIterator[Simulator]:
    async with Simulator(manual=True) as simulator:
        yield simulator


@contextlib.asynccontextmanager
async def opened(store: PostgresStore) -> AsyncIterator[PostgresStore]:
    await store.open()
    try:
        yield store
    finally:
        await store.close()


@contextlib.asynccontextmanager
async def raw() -> AsyncIterator[Any]:
    """Somebody else's connection to the database."""
    connection = await asyncpg.connect(pg.server().dsn)
    try:
        yield connection
    finally:
        await connection.close()


async def until_true(look: Callable[[], Awaitable[Any]]) -> Any:
    """Ask until it is so: for what another process, the database, does in its own time."""
    async with asyncio.timeout(LIVELY_S):
        while not (found := await look()):
            await asyncio.sleep(0.01)
        return found


# --- several replicas ----------------------------------------------------------------------------------------------


async def test_what_one_writes_the_others_hear_of(schema: str) -> None:
    """A watched job, by its commit; not others, not due times that move, and one's own changes not at all."""
    async with opened(pg_store(schema=schema)) as one, opened(pg_store(schema=schema)) as two:
        mine, theirs = Notes(job(1).id), Notes(job(1).id)
        one.listen(mine)
        two.listen(theirs)
        await one.add(job(1))
        await one.add(job(2))
        mine.versions[job(1).id] = 99
        for number in (2, 1):
            await one.change(job(number).id, answer(f"a{number}", f"b{number}"))
        record = await theirs.state(job(1).id, State.ACCEPTED)
        assert record == await two.get(job(1).id)
        await one.change(job(1).id, PollScheduled(at=NOW, due_at=NOW + 60))
        await one.change(job(1).id, heard("b1", good("b1")))
        await theirs.until(lambda: None not in theirs.records[job(1).id].outcomes[1:])
        assert theirs.told_of == [job(1).id] * 2
        assert mine.told_of == []


async def test_a_callback_to_one_client_wakes_a_waiter_of_another(by_hand: Simulator, schema: str) -> None:
    """Both find the job by its key; whoever's receiver is called, both have the result; nobody polls."""
    async with (
        client_of(by_hand, store=pg_store(schema=schema)) as one,
        client_of(by_hand, store=pg_store(schema=schema)) as two,
    ):
        bought = await one.submit(model_v(), key="order-42")
        found = await two.find("order-42")
        assert found is not None
        waiting = [await started(handle.result()) for handle in (bought, found)]
        assert await by_hand.finish(bought.task_ids[0]) == 200
        async with asyncio.timeout(LIVELY_S):
            results = await asyncio.gather(*waiting)
        assert results[0] == results[1]
    assert len(by_hand.ledger.gets) == 0


async def test_any_replica_takes_any_callback(by_hand: Simulator, schema: str) -> None:
    """The secret is shared: the job of one client, its callback at another's receiver."""
    async with client_of(by_hand, store=pg_store(schema=schema)) as two:
        receiver = WebhookReceiver("https://media.example/cb")
        other = WebhookReceiver("https://media.example/cb")
        async with (
            client_of(by_hand, receiver=receiver, store=pg_store(schema=schema)) as one,
            client_of(by_hand, receiver=other, store=pg_store(schema=schema)),
        ):
            bought = await one.submit(model_v())
            (url,) = [record.callback_url for record in by_hand.ledger.posts]
            assert url is not None
            reply = await other.handle(url, callback_body(bought.task_ids[0]))
            assert reply.status == 200
            async with asyncio.timeout(LIVELY_S):
                assert (await bought)[0].task_id == bought.task_ids[0]
        assert two is not None


async def test_secrets_are_rotated_without_a_moment_of_deafness(by_hand: Simulator, schema: str) -> None:
    """Replica by replica, first to know the new one, then to use it, then to forget the old one: whatever two of them
    run side by side, each takes the callbacks of the other."""
    old, new = "the old secret of callbacks", "the new secret of callbacks"
    steps: list[list[str | bytes]] = [[old], [old, new], [new, old], [new]]
    for before, after in itertools.pairwise(steps):
        mounted = [WebhookReceiver("https://media.example/cb", secret=secret) for secret in (before, after)]
        async with (
            client_of(by_hand, receiver=mounted[0], store=pg_store(schema=schema)) as one,
            client_of(by_hand, receiver=mounted[1], store=pg_store(schema=schema)) as two,
        ):
            for client, other in ((one, mounted[1]), (two, mounted[0])):
                bought = await client.submit(model_v())
                url = by_hand.ledger.posts[-1].callback_url
                assert url is not None
                assert (await other.handle(url, callback_body(bought.task_ids[0]))).status == 200
                async with asyncio.timeout(LIVELY_S):
                    assert (await bought)[0].task_id == bought.task_ids[0]


async def test_one_key_is_one_job_for_all_replicas(by_hand: Simulator, schema: str) -> None:
    """Eight clients' worth of submits at once, over two stores: one POST, and all have its job."""
    async with (
        client_of(by_hand, store=pg_store(schema=schema)) as one,
        client_of(by_hand, store=pg_store(schema=schema)) as two,
    ):
        for number in range(10):
            submits = [client.submit(model_v(), key=f"order-{number}") for client in (one, two)]
            async with asyncio.timeout(LIVELY_S):
                jobs = await asyncio.gather(*submits)
            assert len({handle.id for handle in jobs}) == 1
            assert len({handle.task_ids for handle in jobs}) == 1
            assert len(by_hand.ledger.posts) == by_hand.ledger.paid_submits == number + 1


async def test_sweepers_of_several_processes_share_what_is_due(schema: str) -> None:
    """Claims at once by two stores: each job once, all of them."""
    async with opened(pg_store(schema=schema)) as one, opened(pg_store(schema=schema)) as two:
        for number in range(1, 61):
            await one.add(job(number, state=State.ACCEPTED, due_at=NOW))
        claims = await asyncio.gather(*(s.claim(NOW, limit=9, lease_s=60) for _ in range(5) for s in (one, two)))
        claimed = [record.id for claim in claims for record in claim]
        assert len(claimed) == len(set(claimed)) == 60


async def test_a_resend_has_one_winner(schema: str) -> None:
    """A job that was not bought is sent again by one replica only."""
    async with opened(pg_store(schema=schema)) as one, opened(pg_store(schema=schema)) as two:
        for number in range(1, 21):
            await one.add(job(number, state=State.NOT_SENT))
            changes = await asyncio.gather(*(s.change(job(number).id, ResendStarted(at=NOW)) for s in (one, two)))
            assert sorted(change.verdict.value for change in changes) == ["applied", "refused"]


async def test_a_look_at_a_shared_store_every_minute(sim: Simulator) -> None:
    """What another replica wrote falls due here too, though nobody said so."""

    class Shared(MemoryStore):
        is_shared = True

    clock, store = ManualClock(), Shared()
    async with client_of(sim, store=store, clock=clock) as client:
        await settle()
        await store.add(job(1, state=State.ACCEPTED, asked=1, task_ids=("x",), outcomes=(None,), due_at=clock.time()))
        await settle()
        assert not sim.ledger.gets
        clock.advance(61)
        await sim.ledger.until(lambda: len(sim.ledger.gets) == 1)
        assert await client.find("x") is not None


# --- dead owners ---------------------------------------------------------------------------------------------------

CHILD = """
import asyncio, sys
sys.path[:0] = sys.argv[3].split(":")
from test_store_contract import job
from xiling_async import PostgresOptions, PostgresStore

async def main():
    store = PostgresStore(sys.argv[1], schema=sys.argv[2], options=PostgresOptions(heartbeat_s=0.25))
    await store.open()
    await store.recover_orphans(0.0, doubt_s=60, per_second=20)
    await store.add(job(int(sys.argv[4])))
    print("added", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@contextlib.asynccontextmanager
async def sender(schema: str, number: int) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process that is sending this job, until it is killed."""
    words = (pg.server().dsn, schema, ":".join(map(str, Path(__file__).parents[:2])), str(number))
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", CHILD, *words, stdout=asyncio.subprocess.PIPE)
    assert child.stdout is not None
    try:
        assert await child.stdout.readline() == b"added\n"
        yield child
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()


async def test_what_a_killed_process_was_sending_becomes_uncertain(schema: str) -> None:
    """At a replica that lives on, which hears of it; what one that lives is sending is not touched meanwhile."""
    async with opened(pg_store(schema=schema, heartbeat_s=0.1)) as store:
        notes = Notes(job(1).id, job(2).id)
        store.listen(notes)
        assert await store.recover_orphans(NOW, doubt_s=60, per_second=20) == 0
        async with sender(schema, 1) as living:
            async with sender(schema, 2):
                pass
            record = await notes.state(job(2).id, State.UNCERTAIN)
            assert record.refusal == LEFT_BEHIND
            assert record.due_at == pytest.approx(record.changed_at + 60)
            assert (await store.get(job(1).id)) == job(1), "its process has outlived the other by a whole life"
            living.kill()
            await living.wait()
        await notes.state(job(1).id, State.UNCERTAIN)


async def test_what_a_closed_store_left_becomes_uncertain_at_once(schema: str) -> None:
    """It says good-bye; the next takeover finds its jobs without an owner."""
    async with opened(pg_store(schema=schema)) as gone:
        await gone.add(job(1))
    async with opened(pg_store(schema=schema)) as store:
        assert await store.recover_orphans(NOW, doubt_s=60, per_second=20) == 1
        record = await store.get(job(1).id)
        assert record is not None
        assert (record.state, record.refusal, record.due_at) == (State.UNCERTAIN, LEFT_BEHIND, NOW + 60)
        assert (await store.change(job(1).id, ResendStarted(at=NOW))).verdict is Verdict.REFUSED


async def test_a_start_among_the_living_touches_nothing_of_theirs(schema: str) -> None:
    """Neither what they are sending nor when their jobs fall due."""
    async with opened(pg_store(schema=schema)) as alive, opened(pg_store(schema=schema)) as starting:
        await alive.add(job(1))
        await alive.add(job(2, state=State.ACCEPTED, due_at=NOW + 1e6))
        await alive.add(job(3, state=State.UNCERTAIN, due_at=NOW + 1e6))
        assert await starting.recover_orphans(NOW, doubt_s=60, per_second=20) == 3
        for number in (1, 2, 3):
            record = await starting.get(job(number).id)
            assert record is not None
            assert record.version == 0


async def test_a_cut_off_owner_is_never_sent_for(by_hand: Simulator, schema: str, wire: Wire) -> None:
    """Its network fails in the middle of a POST: the other replica calls the job uncertain and sends nothing; when the
    owner is back, its answer counts, for both."""
    cut_off = pg_store(wire.dsn, schema=schema, heartbeat_s=0.05, connect=QUICK)
    async with (
        client_of(by_hand, store=cut_off) as one,
        client_of(by_hand, store=pg_store(schema=schema, heartbeat_s=0.05)) as two,
    ):
        by_hand.hold_answers()
        buying = asyncio.create_task(one.submit(model_v(), key="order-42"))
        await by_hand.wait_for_posts(1)
        joining = await started(two.submit(model_v(), key="order-42"))
        await wire.down()
        async with asyncio.timeout(LIVELY_S):
            doubtful = await joining
        assert doubtful.state is State.UNCERTAIN
        waiting = await started(doubtful.result())
        await wire.up()
        by_hand.release_answers()
        async with asyncio.timeout(LIVELY_S):
            bought = await buying
            assert await by_hand.finish(bought.task_ids[0]) == 200
            assert (await waiting)[0].task_id == bought.task_ids[0]
        assert bought.id == doubtful.id
    assert len(by_hand.ledger.posts) == by_hand.ledger.paid_submits == 1


# --- the network breaks --------------------------------------------------------------------------------------------


async def life(store: PostgresStore, number: int) -> None:
    """A job's life, each step of which must have happened exactly once."""
    held = await store.add(job(number, key=f"k{number}", asked=1, request=None))
    assert held.id == job(number).id
    events: list[Event] = [lost(), answer(f"t{number}", due_at=NOW), PollScheduled(at=NOW, due_at=NOW + 1)]
    for version, event in enumerate(events, 1):
        change = await store.change(held.id, event)
        assert change.record is not None
        assert (change.verdict, change.record.version) == (Verdict.APPLIED, version)
        assert change.was is (State.SENDING, State.UNCERTAIN, State.ACCEPTED)[version - 1]
    change = await store.change(held.id, heard(f"t{number}", good(f"t{number}")))
    assert change.record is not None
    assert (change.verdict, change.record.version, change.record.state) == (Verdict.APPLIED, 4, State.DONE)
    assert await store.by_task(f"t{number}") == await store.by_key(f"k{number}") == change.record


@pytest.mark.parametrize("is_said", [False, True], ids=["before", "after"])
async def test_a_connection_cut_at_any_moment_is_no_loss(schema: str, wire: Wire, is_said: bool) -> None:
    """With the n-th thing that is said, for every n, before or after the server heard it: the caller notices nothing,
    and nothing is done twice."""
    wire.is_said = is_said
    async with opened(pg_store(wire.dsn, schema=schema, pool_size=1, heartbeat_s=60)) as store:
        for number in range(1, 100):
            wire.cut_number, cuts = number, wire.cuts
            await life(store, number)
            if wire.cuts == cuts:
                break
        wire.cut_number = 0
    assert 15 < number < 99
    assert wire.cuts == number - 1


async def test_a_cut_commit_of_many_at_once(schema: str, wire: Wire) -> None:
    """Every connection is cut again and again while a hundred jobs live: each has lived once."""
    async with opened(pg_store(wire.dsn, schema=schema)) as store:
        luck = random.Random(5)

        async def vandal() -> None:
            for _ in range(8):
                await asyncio.sleep(luck.uniform(0.02, 0.1))
                wire.cut()

        cutting = asyncio.create_task(vandal())
        lives = await asyncio.gather(*(life(store, number) for number in range(1, 101)), return_exceptions=True)
        await cutting
        for failed in (end for end in lives if end is not None):
            assert isinstance(failed, StoreError), failed  # it had no luck four times in a row
        assert sum(end is None for end in lives) > 50


async def test_who_was_cut_off_reads_again_what_is_awaited(by_hand: Simulator, schema: str, wire: Wire) -> None:
    """The callback came while nobody could tell: the waiter wakes when the line stands again."""
    async with (
        client_of(by_hand, store=pg_store(schema=schema)) as one,
        client_of(by_hand, store=pg_store(wire.dsn, schema=schema)) as two,
    ):
        bought = await one.submit(model_v(), key="order-42")
        found = await two.find("order-42")
        assert found is not None
        waiting = await started(found.result())
        await wire.down()
        assert await by_hand.finish(bought.task_ids[0]) == 200
        await settle()
        assert not waiting.done()
        await wire.up()
        async with asyncio.timeout(LIVELY_S):
            assert (await waiting)[0].task_id == bought.task_ids[0]
    assert not by_hand.ledger.gets


async def test_a_line_that_fails_while_it_reads_anew_reads_again(schema: str, wire: Wire) -> None:
    """Cut once more in the middle of catching up: all that is watched is still told, over more than a page."""
    numbers = range(1, 30)
    async with opened(pg_store(schema=schema)) as one, opened(pg_store(wire.dsn, schema=schema)) as two:
        for number in numbers:
            await one.add(job(number))
        notes = Notes(*(job(number).id for number in range(1, 2 * listener.PAGE)))
        two.listen(notes)
        await wire.down()
        for number in numbers:
            await one.change(job(number).id, lost())
        wire.cut_at = [b"ANY"]
        await wire.up()
        await notes.until(lambda: len(notes.records) == len(numbers))
        assert wire.cuts == 1
        assert {record.state for record in notes.records.values()} == {State.UNCERTAIN}


async def test_a_hung_database_is_an_error_in_time(schema: str, wire: Wire) -> None:
    """No answer, no reset: a StoreError after the time that was given, and all works when it answers again."""
    async with opened(pg_store(wire.dsn, schema=schema, connect=QUICK, pool_size=2)) as store:
        await store.add(job(1))
        wire.passes.clear()
        async with asyncio.timeout(LIVELY_S):
            for work in (store.get(job(1).id), store.add(job(2)), store.change(job(1).id, lost())):
                with pytest.raises(StoreError, match="did not answer in time"):
                    await work
        wire.passes.set()
        assert (await until_true(lambda: calm(store.get(job(1).id)))).state is State.SENDING


async def test_a_commit_that_hangs_is_told_from_one_that_failed(schema: str, wire: Wire) -> None:
    """Nobody knows whether it was done, and the error says so; when the database answers again the row tells."""
    async with opened(pg_store(wire.dsn, schema=schema, connect=QUICK)) as store:
        await store.add(job(1))
        wire.hangs, wire.cut_at = True, [b"FOR UPDATE", b"COMMIT"]
        with pytest.raises(StoreError, match=r"did not answer in time\. Whether this step was stored is not known"):
            await store.change(job(1).id, lost())
        wire.passes.set()
        held = await until_true(lambda: calm(store.get(job(1).id)))
        assert held.version in (0, 1)


async def test_who_vanished_in_the_middle_of_a_transaction_locks_nobody_out_for_long(schema: str, wire: Wire) -> None:
    """Its machine lost its power: no reset reaches the server, which ends the transaction by itself (from 17 on)."""
    async with (
        opened(pg_store(schema=schema)) as other,
        opened(pg_store(wire.dsn, schema=schema, connect=QUICK)) as store,
    ):
        await store.add(job(1))
        wire.hangs, wire.is_torn, wire.cut_at = True, True, [b"FOR UPDATE", b"written AS"]
        with pytest.raises(StoreError, match="did not answer in time"):
            await store.change(job(1).id, lost())
        assert (await other.change(job(1).id, lost())).verdict is Verdict.APPLIED
        wire.passes.set()


async def calm(work: Awaitable[Any]) -> Any:
    with contextlib.suppress(StoreError):
        return await work
    return None


async def test_a_job_that_is_stuck_leaves_the_pool_to_the_others(schema: str) -> None:
    """A hundred callbacks of one job whose row is locked: they hold one connection, wait no longer than is said, and
    meanwhile the others' jobs go on."""
    store_of_two = pg_store(schema=schema, pool_size=2, connect={"command_timeout": 0.3})
    async with opened(store_of_two) as store, raw() as other:
        for number in (1, 2):
            await store.add(job(number))
        async with other.transaction():
            await other.execute(f"SELECT 1 FROM {schema}.xiling_jobs WHERE id = $1 FOR UPDATE", job(1).id)
            stuck = [await started(store.change(job(1).id, lost())) for _ in range(100)]
            assert (await store.change(job(2).id, lost())).verdict is Verdict.APPLIED
            ends = await asyncio.gather(*stuck[1:], return_exceptions=True)
            assert {type(end) for end in ends} == {StoreError}
        with pytest.raises(StoreError, match="Nothing of this step was stored"):
            await stuck[0]
        assert (await store.change(job(1).id, lost())).verdict is Verdict.APPLIED


async def test_a_lock_that_somebody_holds_is_an_error_in_time(schema: str) -> None:
    """Another program locked the row: StoreError, nothing changed; afterwards it goes on."""
    async with opened(pg_store(schema=schema, connect={"command_timeout": 0.3})) as store, raw() as other:
        await store.add(job(1))
        async with other.transaction():
            await other.execute(f"SELECT 1 FROM {schema}.xiling_jobs FOR UPDATE")
            with pytest.raises(StoreError, match="Nothing of this step was stored"):
                await store.change(job(1).id, lost())
        assert (await store.change(job(1).id, lost())).verdict is Verdict.APPLIED


async def test_an_intent_that_may_have_been_written_is_taken_back(by_hand: Simulator, schema: str, wire: Wire) -> None:
    """The database takes the intent and dies before it says so: nothing is sent; when it is back the key is free, and
    is bought once."""
    store = pg_store(wire.dsn, schema=schema, heartbeat_s=0.1)
    async with client_of(by_hand, store=store) as client, opened(pg_store(schema=schema)) as other:
        wire.cut_at, wire.is_said = [b'_jobs" (id', b"COMMIT"], True
        wire.when_cut = wire.refuse
        with pytest.raises(StoreError, match="Whether this step was stored is not known") as caught:
            await client.submit(model_v(), key="order-42")
        assert caught.value.charged == "no"
        held = await other.by_key("order-42")
        assert held is not None  # it was written
        await wire.up()

        async def taken_back() -> bool:
            now = await other.by_key("order-42")
            return now is not None and now.state is State.NOT_SENT

        await until_true(taken_back)
        assert not by_hand.ledger.posts
        async with asyncio.timeout(LIVELY_S):
            bought = await client.submit(model_v(), key="order-42")
        assert bought.id == held.id
    assert len(by_hand.ledger.posts) == by_hand.ledger.paid_submits == 1


async def test_a_database_that_is_away_closes_the_doors(by_hand: Simulator, schema: str) -> None:
    """Stopped: submits raise StoreError and send nothing, callbacks get 503; started: all goes on by itself."""
    server = pg.server()
    async with client_of(by_hand, store=pg_store(schema=schema)) as client:
        job_before = await client.submit(model_v(), key="before")
        waiting = await started(job_before.result())
        await asyncio.to_thread(server.stop)
        try:
            for key in ("before", "order-42", None):
                with pytest.raises(StoreError) as caught:
                    await client.submit(model_v(), key=key)
                assert caught.value.charged == "no"
            assert await by_hand.finish(job_before.task_ids[0]) == 503
            assert not waiting.done()
            with pytest.raises(StoreError, match="Nothing was sent"):
                await pg_store(schema=schema).open()
        finally:
            await asyncio.to_thread(server.start)
        assert len(by_hand.ledger.posts) == 1
        assert await by_hand.callback(job_before.task_ids[0]) == 200
        assert (await waiting)[0].task_id == job_before.task_ids[0]
        await client.submit(model_v(), key="order-42")
    assert len(by_hand.ledger.posts) == by_hand.ledger.paid_submits == 2


async def test_closing_does_not_wait_for_a_database_that_is_away(schema: str, wire: Wire) -> None:
    """The store is closed, and can be opened again."""
    store = pg_store(wire.dsn, schema=schema, connect=QUICK)
    await store.open()
    await wire.down()
    async with asyncio.timeout(LIVELY_S):
        await store.close()
    with pytest.raises(StoreError, match="is not open"):
        await store.next_due()
    await wire.up()
    async with opened(store):
        assert await store.next_due() is None


# --- poolers -------------------------------------------------------------------------------------------------------


async def test_a_pooler_that_loses_notifications_is_named(schema: str, wire: Wire) -> None:
    """In transaction mode LISTEN is taken and nothing arrives: the store says what it needs, and with that it works."""
    wire.is_deaf = True
    with pytest.raises(StoreError, match=r"notifications do not arrive.*listen_dsn=.*statement_cache_size.*Nothing"):
        await pg_store(wire.dsn, schema=schema, connect=QUICK).open()
    around = pg_store(wire.dsn, schema=schema, listen_dsn=pg.server().dsn, connect={"statement_cache_size": 0})
    async with opened(around) as store:
        notes = Notes(job(1).id)
        store.listen(notes)
        await store.add(job(1))
        await store.change(job(1).id, lost())
        await notes.state(job(1).id, State.UNCERTAIN)


async def test_nothing_is_left_in_a_session(schema: str) -> None:
    """Who gets the connection next from a pooler finds its settings, no transaction and no lock of ours."""
    async with opened(pg_store(schema=schema, pool_size=1)) as store:
        await life(store, 1)
        with pytest.raises(StoreError):
            await store.add(job(2, kind=None, request=None))
        pool: Any = store._driver._pool
        async with pool.acquire() as connection:
            assert not connection.is_in_transaction()
            for name in ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"):
                assert await connection.fetchval(f"SHOW {name}") == "0"
            mine = "SELECT COUNT(*) FROM pg_locks WHERE pid = pg_backend_pid() AND locktype = 'advisory'"
            assert await connection.fetchval(mine) == 0


async def test_what_was_paid_for_waits_for_the_disk(schema: str) -> None:
    """A database that is told not to wait for its disk is told otherwise, for our transactions."""
    seen = []

    async def look(connection: Any) -> None:
        seen.append(await connection.fetchval("SHOW synchronous_commit"))

    dsn = pg.server().dsn + "&options=-c%20synchronous_commit%3Doff"
    async with opened(pg_store(dsn, schema=schema)) as store:
        await store._driver.run(look)
    assert seen == ["on"]


# --- tables --------------------------------------------------------------------------------------------------------


async def test_many_that_start_at_once_make_one_set_of_tables(schema: str) -> None:
    """Eight stores, an empty database: all open, and the schema is there once."""
    stores = [pg_store(schema=schema) for _ in range(8)]
    await asyncio.gather(*(store.open() for store in stores))
    assert len(set(await asyncio.gather(*(store.secret(os.urandom(32)) for store in stores)))) == 1
    for store in stores:
        await store.close()


async def test_schema_and_prefix_are_honoured() -> None:
    """Any schema name, any prefix; stores of other names in the same database know nothing of each other."""
    schema = f'Se"ma {fresh_schema()}'
    async with (
        opened(pg_store(schema=schema, table_prefix="")) as one,
        opened(pg_store(schema=schema, table_prefix="Other_")) as two,
        raw() as look,
    ):
        notes = Notes(job(1).id)
        two.listen(notes)
        for store in (one, two):
            await store.add(job(1, key="k"))
        await one.change(job(1).id, lost())
        held = await two.get(job(1).id)
        assert held is not None
        assert held.state is State.SENDING
        await two.change(job(1).id, lost())
        await notes.state(job(1).id, State.UNCERTAIN)
        assert notes.told_of == [job(1).id]
        tables = await look.fetch("SELECT tablename FROM pg_tables WHERE schemaname = $1", schema)
        names = ("jobs", "kept", "metadata", "owners", "tasks")
        assert {row[0] for row in tables} == {*names, *(f"Other_{name}" for name in names)}


async def test_without_a_schema_it_is_the_first_of_the_search_path(schema: str) -> None:
    """As every program would have it."""
    async with raw() as other:
        await other.execute(f"CREATE SCHEMA {schema}")
        dsn = f"{pg.server().dsn}&options=-c%20search_path%3D{schema}"
        async with opened(pg_store(dsn, schema=None)) as store:
            await store.add(job(1))
            assert await other.fetchval(f"SELECT COUNT(*) FROM {schema}.xiling_jobs") == 1
        with pytest.raises(StoreError, match="no schema of its search_path exists"):
            await pg_store(f"{pg.server().dsn}&options=-c%20search_path%3Dnowhere", schema=None).open()


async def test_tables_that_are_there_need_no_rights_to_make_them(schema: str) -> None:
    """The owner of the database opens it once; a role that may only read and write opens it then."""
    async with opened(pg_store(schema=schema)), raw() as other:
        role = f"clerk_{schema}"
        await other.execute(
            f"CREATE ROLE {role} LOGIN; GRANT USAGE ON SCHEMA {schema} TO {role};"
            f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {schema} TO {role}"
        )
        async with opened(pg_store(pg.server().dsn.replace("//postgres:", f"//{role}:"), schema=schema)) as store:
            await life(store, 1)


async def test_who_may_not_migrate_makes_nothing(schema: str) -> None:
    """Tables that are missing are named; those that are there are used."""
    with pytest.raises(
        StoreError,
        match=rf'there are no tables "{schema}"\."xiling_jobs" of schema {len(MIGRATIONS)}.*Nothing was sent',
    ):
        await pg_store(schema=schema, migrate=False).open()
    async with raw() as look:
        assert not await look.fetchval("SELECT COUNT(*) FROM pg_namespace WHERE nspname = $1", schema)
    async with opened(pg_store(schema=schema)), opened(pg_store(schema=schema, migrate=False)) as store:
        await life(store, 1)


async def test_the_command_line_lists_a_database_that_is_in_use(schema: str) -> None:
    """`xiling jobs --store postgresql://…`; it makes no tables, and shows no password."""
    dsn = f"{pg.server().dsn}&options=-c%20search_path%3D{schema}"

    async def listed() -> tuple[str, str]:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "xiling_async.cli", "jobs", "--store", dsn,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, err = await process.communicate()
        return out.decode(), err.decode()

    async with raw() as other:
        await other.execute(f"CREATE SCHEMA {schema}")
    out, err = await listed()
    assert (out, err.count("there are no tables")) == ("", 1)
    async with opened(pg_store(schema=schema)) as store:
        await store.add(job(1, key="order-42"))
        shown, complaints = await listed()
    assert ("order-42" in shown, complaints) == (True, "")
    assert "passw0rd" not in out + err + shown


async def test_a_newer_store_is_refused(schema: str) -> None:
    """It says which version wrote it, and touches nothing."""
    async with opened(pg_store(schema=schema)), raw() as other:
        await other.execute(f"UPDATE {schema}.xiling_kept SET value = '99' WHERE name = 'schema'")
        with pytest.raises(
            StoreError, match=rf"a newer xiling_async \(its schema is 99, this one knows {len(MIGRATIONS)}\)"
        ):
            await pg_store(schema=schema).open()


async def test_somebody_elses_tables_are_left_alone(schema: str) -> None:
    """A table of the same name is refused, and nothing is made beside it."""
    async with raw() as other:
        await other.execute(f"CREATE SCHEMA {schema}; CREATE TABLE {schema}.xiling_jobs (x INT)")
        with pytest.raises(StoreError, match=r"cannot be used as a store.*already exists"):
            await pg_store(schema=schema).open()
        assert await other.fetchval("SELECT COUNT(*) FROM pg_tables WHERE schemaname = $1", schema) == 1


async def test_older_tables_are_brought_up_step_by_step(schema: str) -> None:
    """Each script runs once, whoever starts; one that fails leaves all as it was."""
    names = Names(schema, "xiling_")
    async with opened(pg_store(schema=schema)) as store:
        await store.add(job(1, key="k"))
    later = (*MIGRATIONS, "ALTER TABLE {jobs} ADD COLUMN note TEXT", "UPDATE {jobs} SET note = 'seen ' || key")

    async def bring_up(*scripts: str) -> None:
        async with raw() as one, one.transaction():
            await migrate(one, names, scripts)

    with pytest.raises(asyncpg.UndefinedTableError):
        await bring_up(*MIGRATIONS, "ALTER TABLE {jobs} ADD COLUMN note TEXT; INSERT INTO nowhere VALUES (1)")
    await asyncio.gather(*(bring_up(*later) for _ in range(4)))
    async with raw() as look:
        assert await look.fetch(f"SELECT note FROM {schema}.xiling_jobs") == [("seen k",)]
        assert (
            await look.fetchval(f"SELECT value FROM {schema}.xiling_kept WHERE name = 'schema'")
            == str(len(later)).encode()
        )


# --- rows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "\0", "\\0", "\\\\0\0", "a\\", "\\\\", "波\0\\"], ids=ascii)
def test_any_text_can_be_quoted(text: str) -> None:
    """And comes back; PostgreSQL takes no NUL."""
    assert "\0" not in quoted(text)
    assert unquoted(quoted(text)) == text


async def test_names_may_be_longer_than_an_index_takes(schema: str) -> None:
    """Ten thousand characters that no compression makes short; alike up to the last one."""
    noise = "".join(random.Random(1).choices("abcdefghijklmnopqrstuvwxyz波é0123456789", k=10_000))
    async with opened(pg_store(schema=schema)) as store:
        for number in (1, 2):
            await store.add(job(number, key=f"{noise}{number}"))
            await store.change(job(number).id, answer(f"{noise}{number}", f"{noise}{number}b"))
        for number in (1, 2):
            held = await store.by_key(f"{noise}{number}")
            assert held == await store.by_task(f"{noise}{number}")
            assert held is not None
            assert held.id == job(number).id


async def test_text_that_no_database_takes_is_an_error(schema: str) -> None:
    """Half an emoji as a key: StoreError, and the next one is fine."""
    async with opened(pg_store(schema=schema)) as store:
        with pytest.raises(StoreError, match="could not be written or read"):
            await store.add(job(1, key="\ud83d"))
        assert await store.add(job(1)) == job(1)


async def test_a_row_that_cannot_be_read_hides_no_other(schema: str, caplog: pytest.LogCaptureFixture) -> None:
    """Who asks for that job gets a StoreError; sweeping and recovering go on with the others."""
    async with opened(pg_store(schema=schema)) as store, raw() as other:
        for number in (1, 2, 3):
            await store.add(job(number, key=f"k{number}"))
            await store.change(job(number).id, answer(f"t{number}", due_at=NOW))
        await other.execute(f"UPDATE {schema}.xiling_jobs SET tasks = '[[' WHERE id = $1", job(2).id)
        for look in (store.get(job(2).id), store.by_key("k2"), store.by_task("t2"), store.change(job(2).id, lost())):
            with pytest.raises(StoreError):
                await look
        good_ids = {job(1).id, job(3).id}
        assert {record.id async for record in store.unfinished()} == good_ids
        assert {record.id for record in await store.claim(NOW, limit=9, lease_s=60)} == good_ids
        assert f"job {job(2).id} of the store cannot be read" in caplog.text


async def test_a_purge_goes_on_page_by_page(schema: str) -> None:
    """More jobs than one transaction forgets; their task ids go with them."""
    more = 2 * queries.PURGE + 1
    async with opened(pg_store(schema=schema)) as store, raw() as other:
        outcomes = {"task_ids": ("t1",), "outcomes": (good("t1"),), "asked": 1}
        await store.add(job(1, state=State.DONE, changed_at=0.0, **outcomes))
        jobs, tasks = f"{schema}.xiling_jobs", f"{schema}.xiling_tasks"
        await other.execute(
            f"INSERT INTO {jobs} SELECT copy.* FROM {jobs} AS job, generate_series(1, {more}) AS number, "
            f"jsonb_populate_record(job, jsonb_build_object('id', 'copy ' || number)) AS copy"
        )
        await other.execute(f"INSERT INTO {tasks} SELECT sha256(id::bytea), id FROM {jobs} WHERE id LIKE 'copy %'")
        assert await store.purge(60) == more + 1
        assert await other.fetchval(f"SELECT COUNT(*) FROM {tasks}") == 0


# --- life ----------------------------------------------------------------------------------------------------------


async def test_one_store_is_for_one_client(by_hand: Simulator, schema: str) -> None:
    """A second client with the same object is refused, and does not disturb the first."""
    store = pg_store(schema=schema)
    async with client_of(by_hand, store=store) as client:
        with pytest.raises(StoreError, match="in use by another client of this process"):
            await client_of(by_hand, store=store).__aenter__()
        assert (await client.submit(model_v())).task_ids


async def test_a_cancelled_caller_harms_nobody(schema: str) -> None:
    """Cancelled at any turn of the loop: the pool is whole, the row is as before or after."""
    async with opened(pg_store(schema=schema, pool_size=1)) as store:
        await store.add(job(1))
        for turns in range(40):
            change = asyncio.create_task(store.change(job(1).id, PollScheduled(at=NOW, due_at=NOW)))
            await settle(turns)
            change.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await change
            assert await store.get(job(1).id) is not None


async def test_a_cancelled_open_leaves_nothing_open(schema: str) -> None:
    """Cancelled at any turn: no connection stays, and the store can be opened."""
    store = pg_store(schema=schema)
    for turns in range(0, 200, 9):
        opening = asyncio.create_task(store.open())
        await settle(turns)
        opening.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await opening
            await store.close()
    async with opened(store):
        assert await store.next_due() is None


async def test_a_forked_child_is_refused(schema: str) -> None:
    """It would share the parent's sockets."""
    async with opened(pg_store(schema=schema)) as store:
        child = os.fork()
        if not child:
            said = []
            for method in (store.next_due, store.open):
                try:
                    method().send(None)
                except StoreError as error:
                    said.append("before a fork" in str(error))
            os._exit(0 if said == [True, True] else 1)
        assert (await asyncio.to_thread(os.waitpid, child, 0))[1] == 0
        assert await store.next_due() is None


# --- what may be shown, what is missing ----------------------------------------------------------------------------


async def test_the_password_is_shown_nowhere(
    by_hand: Simulator, schema: str, wire: Wire, caplog: pytest.LogCaptureFixture
) -> None:
    """Not in a repr, an error, a pickle of one, or the log: while it works, while it breaks, when it cannot open."""
    caplog.set_level(logging.DEBUG)
    shown: list[Any] = []
    store = pg_store(wire.dsn, schema=schema, connect=QUICK)
    async with client_of(by_hand, store=store) as client:
        shown += [repr(store), repr(client), str(store)]
        await client.submit(model_v(), key="k")
        await wire.down()
        with pytest.raises(StoreError) as away:
            await client.submit(model_v(), key="l")
    with pytest.raises(StoreError) as refused:
        await pg_store(wire.dsn, schema=schema).open()
    with pytest.raises(StoreError) as unknown:
        await pg_store(pg.server().dsn.replace("/postgres?", "/nowhere?")).open()
    for error in (away.value, refused.value, unknown.value):
        shown += [str(error), repr(error), pickle.dumps(error), str(error.__cause__)]
    assert "PostgreSQL at 127.0.0.1" in str(refused.value)
    for text in [*shown, caplog.text]:
        for secret in (PASSWORD, "pg-passw0rd"):
            assert secret not in str(text)


def test_an_error_that_quotes_the_password_is_scrubbed() -> None:
    """As it stands in the DSN, and as it is meant; whoever it was that quoted it."""
    one, two = Address("postgresql://u:p%40ss-w0rd@h/d?sslpassword=key-w0rd"), Address("postgresql://u:other-w0rd@h")
    driver = Driver(one, two, pool_size=1, options={"password": "given-w0rd"})
    for quoted_ in ("p%40ss-w0rd", "p@ss-w0rd", "key-w0rd", "other-w0rd", "given-w0rd", one.dsn):
        assert "w0rd" not in driver.why(ValueError(f"cannot use {quoted_!r}"))


@pytest.mark.parametrize(
    "dsn",
    [
        "",
        "mysql://u:pass-w0rd@h/d",
        "postgresql://u:pass-w0rd/x@h/d",
        "postgresql://u:pass-w0rd?x@h/d",
        "postgresql://u:pass-w0rd#x@h/d",
        "postgresql://u:pass-w0rd@x@h/d",
        "postgresql://u:@h:pass-w0rd/d",
        "postgresql://h/d?password=pass-w0rd@x",
        "host=h password=pass-w0rd",
        "postgresql://u:pass-w0rd @h/d",
        None,
        7,
    ],
)
def test_a_dsn_that_is_none_is_refused_and_not_shown(dsn: Any) -> None:
    """It may hold a password, wherever that is."""
    with pytest.raises(ConfigurationError) as caught:
        PostgresStore(dsn)
    assert "pass-w0rd" not in str(caught.value)
    assert "percent-encoded" in str(caught.value)


@pytest.mark.parametrize(
    ("dsn", "name"),
    [
        ("postgresql://", "its default place"),
        ("postgres://u:p%40ss@h", "h"),
        ("postgresql://u:p@h:5432/d?sslmode=require&password=q", "h:5432/d"),
        ("postgresql://h1:1,h2:2/d?target_session_attrs=read-write", "h1:1,h2:2/d"),
        ("postgresql://[::1]:5432/d", "[::1]:5432/d"),
        ("postgresql:///d?host=/var/run/postgresql", "/d"),
    ],
)
def test_where_it_is_may_be_shown(dsn: str, name: str) -> None:
    """Host, port and database; the rest not."""
    address = Address(dsn)
    assert address.name == f"PostgreSQL at {name}"
    assert set(address.secrets) <= {"p%40ss", "p@ss", "p", "q"}


def test_sslmode_is_honoured() -> None:
    """This server has no TLS: who requires it is refused, who does not mind is let in."""

    async def main() -> None:  # not in the loop of the tests: asyncpg looks for certificates in the loop
        async with Wire() as wire:
            for mode in ("require", "verify-full"):
                with pytest.raises(StoreError, match=r"rejected SSL upgrade|root\.crt"):
                    await pg_store(wire.dsn.replace("disable", mode)).open()
            async with opened(pg_store(wire.dsn.replace("disable", "prefer"))) as store:
                assert await store.next_due() is None

    asyncio.run(main())


@pytest.mark.parametrize(
    "options",
    [{"schema": ""}, {"schema": "x" * 64}, {"table_prefix": "a-b"}, {"table_prefix": "x" * 41}, {"pool_size": 0},
     {"heartbeat_s": 0}, {"owner": 7}, {"connect": "x"}, {"listen_dsn": "pass-w0rd"}, {"migrate": 1}],
    ids=str,
)  # fmt: skip
def test_options_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    """Before anything is connected."""
    with pytest.raises(ConfigurationError):
        pg_store("postgresql://h/d", **options)


def test_options_show_no_password() -> None:
    """Neither their repr nor a pickle."""
    options = PostgresOptions(listen_dsn="postgresql://u:pass-w0rd@h/d", connect={"password": "pass-w0rd"})
    assert "pass-w0rd" not in repr(options)
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(options)


def test_without_asyncpg_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the package itself does without."""
    monkeypatch.setitem(sys.modules, "asyncpg", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'xiling_async\[postgres\]'"):
        PostgresStore("postgresql://h/d")
    script = "import sys, xiling_async; sys.exit('asyncpg' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_a_client_takes_it(schema: str) -> None:
    """To make a client with one connects nowhere."""
    assert "PostgresStore" in repr(Client("sk-key", store=pg_store("postgresql://u:secret@h/d", schema=schema)))
