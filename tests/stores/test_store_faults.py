"""When the disk fails: nothing half-written, nothing sent that is not written down, and all works again afterwards.

And when the clock does: a jump of the machine's time between two lives of a client loses and repeats nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
from disk import Disk, Nth
from support import client_of, model_v, settle, started, token_of

from xiling_async import Client, Job, SQLiteStore, StoreError, SubmitUncertain, Timeouts, WebhookReceiver
from xiling_async.models.lifecycle import Accepted, OutcomeReported
from xiling_async.models.record import LEFT_BEHIND, Failed, JobRecord, State
from xiling_async.simulator import Simulator, faults
from xiling_async.testing.clock import ManualClock

T = TypeVar("T")

NOW = 1_800_000_000.0
DAY_S = 24 * 3600.0
SECRET = "a secret of sixteen bytes or more"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "jobs.db"


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
async def by_hand() -> AsyncIterator[Simulator]:
    async with Simulator(manual=True) as simulator:
        yield simulator


def job(number: int = 1) -> JobRecord:
    return JobRecord(
        id=f"{number:032x}", kind="image_to_video", key=f"k{number}", request=model_v("x" * 900), asked=1,
        created_at=NOW, changed_at=NOW,
    )  # fmt: skip


def accepted(number: int = 1) -> Accepted:
    return Accepted(attempt=1, at=NOW, task_ids=(f"t{number}",), due_at=NOW)


def heard(number: int = 1) -> OutcomeReported:
    return OutcomeReported(attempt=1, at=NOW, task_id=f"t{number}", outcome=Failed(f"t{number}", "no"), due_at=NOW)


def is_sound(file: Path) -> bool:
    """Whether the file is a whole database whose tables agree."""
    with contextlib.closing(sqlite3.connect(file)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        if not connection.execute("SELECT 1 FROM sqlite_master").fetchone():
            return True  # it was never begun
        theirs = connection.execute(
            "SELECT json_extract(value, '$[0]'), jobs.id FROM jobs, json_each(tasks)"
        ).fetchall()
        return connection.execute("SELECT task_id, job_id FROM tasks ORDER BY 1").fetchall() == sorted(theirs)


# --- the n-th statement fails --------------------------------------------------------------------------------------


async def scenario(store: SQLiteStore, told: dict[str, Any]) -> None:
    """A life of two jobs; `told` is what the store said was durable."""
    await store.open()
    told["secret"] = await store.secret(b"s" * 32)
    for number in (1, 2):
        told[f"job {number}"] = await store.add(job(number))
    assert await store.recover_orphans(NOW, doubt_s=60, per_second=20) == 2
    for number in (1, 2):
        told[f"job {number}"] = job(number).next_version(state=State.UNCERTAIN, refusal=LEFT_BEHIND, due_at=NOW + 60)
    for number in (1, 2):
        told[f"job {number}"] = (await store.change(job(number).id, accepted(number))).record
    told["job 1"] = (await store.change(job(1).id, heard(1))).record
    (told["job 2"],) = await store.claim(NOW, limit=9, lease_s=60)
    assert await store.next_due() == NOW + 60
    told["purged"] = await store.purge(-1e12)
    assert [record.id async for record in store.unfinished()] == [job(2).id]
    await store.close()


async def held_now(file: Path) -> dict[str, Any]:
    """What a new process finds."""
    store = SQLiteStore(file)
    await store.open()
    held: dict[str, Any] = {"secret": await store.secret(b"another")}
    for number in (1, 2):
        held[f"job {number}"] = await store.get(job(number).id)
        assert await store.by_key(f"k{number}") == held[f"job {number}"]
    await store.close()
    return held


def agrees(held: dict[str, Any], told: dict[str, Any], *, is_ahead: bool = False) -> bool:
    """Whether the file is as it was told, or (`is_ahead`) one step further, of which the caller heard an error."""
    for number in (1, 2):
        said, found = told.get(f"job {number}"), held[f"job {number}"]
        version = -1 if found is None else found.version
        if number == 1 and found is None and told.get("job 1") is not None and told["job 1"].state.is_final:
            continue  # purged, or about to be
        if said == found or (is_ahead and version > (-1 if said is None else said.version)):
            continue
        return False
    return held["secret"] in (told.get("secret"), b"another") or is_ahead


async def one_life(file: Path, n: int, *, is_done_already: bool) -> bool:
    """A life whose n-th statement fails, and what it left; whether there were so many."""
    disk, told, nth = Disk(), dict[str, Any](), Nth(n)
    if is_done_already:
        disk.fails_after = nth
    else:
        disk.fails = nth
    store = SQLiteStore(file, connect=disk.connect)
    error: StoreError | None = None
    try:
        await scenario(store, told)
        assert told["purged"] == 1
    except StoreError as failed:
        error = failed
        await store.close()
    # After a purge the file is made smaller: what fails there loses nothing but space, and is only logged.
    is_of_vacuum = nth.has_come and told.get("purged") is not None and disk.statements[n - 1].startswith("PRAGMA")
    assert (error is not None) == (nth.has_come and not is_of_vacuum), "every statement counts"
    assert await asyncio.to_thread(is_sound, file)
    assert agrees(await held_now(file), told, is_ahead=is_done_already), disk.statements[-3:]
    return nth.has_come


@pytest.mark.parametrize("is_done_already", [False, True], ids=["not done", "done already"])
async def test_whichever_statement_fails_the_file_is_as_it_was_told(tmp_path: Path, is_done_already: bool) -> None:
    """The n-th statement fails, for every n: a StoreError, and a new process finds what had been promised, no less.

    "Done already": the disk did it and reported an error; then the file may be that one step ahead.
    """
    n, came = 0, [True]
    while all(came):
        lives = [
            one_life(tmp_path / f"{n}.db", n, is_done_already=is_done_already) for n in range(n + 1, n + 11)
        ]  # ten at once: it is the disk they wait for
        n, came = n + 10, await asyncio.gather(*lives)
    assert 60 < n < 200


async def twice(work: Callable[[], Awaitable[T]]) -> T:
    with contextlib.suppress(StoreError):
        return await work()
    return await work()


async def test_whichever_statement_fails_the_store_goes_on(tmp_path: Path) -> None:
    """The n-th statement fails, for every n, also the ROLLBACK that follows: the caller's second try succeeds."""
    for n in range(1, 500):
        disk, nth = Disk(), Nth(n)
        broken = False

        def fails(statement: str, nth: Nth = nth) -> bool:
            nonlocal broken
            was, broken = broken, nth(statement)
            return broken or (was and statement == "ROLLBACK")

        disk.fails = fails
        store = SQLiteStore(tmp_path / f"{n}.db", connect=disk.connect)
        await twice(store.open)
        await twice(partial(store.add, job()))
        for event in (accepted(), heard()):
            await twice(partial(store.change, job().id, event))
        held = await twice(partial(store.get, job().id))
        assert held is not None
        assert (held.state, held.version) == (State.FAILED, 2)
        await store.close()
        if not nth.has_come:
            break
    assert 30 < n < 499


async def test_a_failing_transaction_of_many_is_done_one_by_one(file: Path, disk: Disk) -> None:
    """Its commit fails: each is tried alone, and told its own truth."""
    store = SQLiteStore(file, connect=disk.connect)
    await store.open()
    disk.gate.clear()
    first = await started(store.next_due())
    await asyncio.to_thread(disk.reached.wait)
    adding = [asyncio.create_task(store.add(job(number))) for number in range(1, 20)]
    await settle()
    failing = disk.commits + 2
    disk.fails = lambda statement: statement == "COMMIT" and disk.commits in (failing, failing + 3)
    disk.gate.set()
    await asyncio.wait(adding)
    assert await first is None
    failed = [number for number, task in enumerate(adding, 1) if task.exception() is not None]
    assert failed == [3]
    assert "disk I/O error. Nothing of this step was stored" in str(adding[2].exception())
    assert {record.id async for record in store.unfinished()} == {job(n).id for n in range(1, 20) if n != 3}
    await store.close()


# --- the disk is full ----------------------------------------------------------------------------------------------


async def test_a_full_disk_is_an_error_and_nothing_half_written(file: Path, disk: Disk) -> None:
    """Each caller is told whether its job was kept; with space again the store works on, and all of it was true."""
    store = SQLiteStore(file, connect=disk.connect)
    await store.open()
    await store.add(job(0))
    disk.full = True
    kept = {job(0).id}
    for first in range(1, 200, 20):
        records = [job(number) for number in range(first, first + 20)]
        for record, done in zip(
            records, await asyncio.gather(*map(store.add, records), return_exceptions=True), strict=True
        ):
            if isinstance(done, BaseException):
                assert isinstance(done, StoreError)
                assert "database or disk is full" in str(done)
            else:
                kept.add(record.id)
    assert 1 <= len(kept) < 100
    assert await store.get(job(0).id) == job(0)
    disk.full = False
    assert {record.id async for record in store.unfinished()} == kept
    assert await store.add(job(500)) == job(500)
    await store.close()
    assert await asyncio.to_thread(is_sound, file)
    await store.open()
    assert {record.id async for record in store.unfinished()} == kept | {job(500).id}
    await store.close()


# --- failing closed, end to end ------------------------------------------------------------------------------------


def begins(*words: str) -> Callable[[str], bool]:
    return lambda statement: statement.startswith(words)


async def test_what_cannot_be_written_is_not_sent(sim: Simulator, file: Path, disk: Disk) -> None:
    """The intent fails: no POST, nothing charged; afterwards the same key is bought, once."""
    async with client_of(sim, store=SQLiteStore(file, connect=disk.connect)) as client:
        for failing in (begins("INSERT INTO jobs"), begins("COMMIT"), begins("BEGIN")):
            disk.fails = failing
            with pytest.raises(StoreError) as caught:
                await client.submit(model_v(), key="order-42")
            assert caught.value.charged == "no"
            disk.fails = begins("nothing")
        assert not sim.ledger.posts
        assert (await (await client.submit(model_v(), key="order-42")))[0].task_id
    assert sim.ledger.paid_submits == 1


async def test_an_answer_that_cannot_be_written_is_given_to_the_caller(sim: Simulator, file: Path, disk: Disk) -> None:
    """The error has the task ids that were paid for; its callback, or a restart, still finds them."""
    async with client_of(sim, store=SQLiteStore(file, connect=disk.connect)) as client:
        sim.hold_answers()
        submitting = asyncio.create_task(client.submit(model_v(), key="order-42"))
        await sim.wait_for_posts(1)
        disk.fails = begins("UPDATE jobs SET asked")
        sim.release_answers()
        with pytest.raises(StoreError) as caught:
            await submitting
        disk.fails = begins("nothing")
        assert caught.value.charged == "yes"
        assert caught.value.task_ids == sim.ledger.task_ids
        assert caught.value.job_id is not None
        (url,) = [record.callback_url for record in sim.ledger.posts]
        await sim.settled()
        await sim.callback(sim.ledger.task_ids[0])
        job = await client.find(caught.value.job_id)
        assert job is not None
        assert (await job)[0].task_id == sim.ledger.task_ids[0]
        assert (await client.submit(model_v(), key="order-42")).id == job.id
    assert sim.ledger.paid_submits == len(sim.ledger.posts) == 1
    assert token_of(url)


async def test_a_callback_that_cannot_be_written_is_answered_503(by_hand: Simulator, file: Path, disk: Disk) -> None:
    """The waiter hears nothing before the commit; the service's repeat is taken."""
    async with client_of(by_hand, store=SQLiteStore(file, connect=disk.connect)) as client:
        job = await client.submit(model_v())
        waiter = await started(job.result())
        for failing in (begins("UPDATE jobs SET asked"), begins("COMMIT"), begins("SELECT")):
            disk.fails = failing
            assert await by_hand.finish(job.task_ids[0]) == 503
            disk.fails = begins("nothing")
            await settle()
            assert not waiter.done()
            assert job.state is State.ACCEPTED
        assert await by_hand.callback(job.task_ids[0]) == 200
        assert (await waiter)[0].task_id == job.task_ids[0]
    held = SQLiteStore(file)
    await held.open()
    record = await held.get(job.id)
    assert record is not None
    assert record.state is State.DONE
    await held.close()


async def test_a_key_whose_row_cannot_be_read_is_not_bought_again(sim: Simulator, file: Path) -> None:
    """Nobody knows what it bought: the submit is refused, and nothing is sent."""
    async with client_of(sim, store=SQLiteStore(file)) as client:
        await (await client.submit(model_v(), key="order-42"))

    def spoil() -> None:
        with contextlib.closing(sqlite3.connect(file)) as connection, connection:
            connection.execute("UPDATE jobs SET state = 'dreaming'")

    await asyncio.to_thread(spoil)
    async with client_of(sim, store=SQLiteStore(file)) as client:
        with pytest.raises(StoreError) as caught:
            await client.submit(model_v(), key="order-42")
        assert caught.value.charged == "no"
    assert len(sim.ledger.posts) == 1


async def test_the_api_key_is_not_in_the_file(file: Path) -> None:
    """Nor in its log while the client is open."""
    async with Simulator("sk-very-secret-0123456789") as sim:
        async with client_of(sim, store=SQLiteStore(file)) as client:
            await (await client.submit(model_v(), key="order-42"))
            written = [path.read_bytes() for path in file.parent.iterdir()]
        written += [path.read_bytes() for path in file.parent.iterdir()]
        assert len(written) == 4
        assert any(b"order-42" in content for content in written)
        assert not any(b"sk-very-secret" in content for content in written)


# --- clocks that jump ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jump_s", [DAY_S, -DAY_S, 3650 * DAY_S, -3650 * DAY_S], ids=["+1d", "-1d", "+10y", "-10y"])
@pytest.mark.parametrize("calls_back", [True, False], ids=["receiver", "polling"])
async def test_a_clock_that_jumped_loses_nothing(
    by_hand: Simulator, file: Path, jump_s: float, calls_back: bool
) -> None:
    """Between two lives of a client: accepted jobs are asked about within a minute, doubt ends in its time, and
    nothing is sent again."""

    def client(clock: ManualClock) -> Client:
        receiver = WebhookReceiver(port=0, secret=SECRET) if calls_back else None
        options: dict[str, Any] = {"base_url": by_hand.base_url, "store": SQLiteStore(file), "clock": clock}
        return Client(by_hand.api_key, receiver=receiver, on_uncertain="raise", **options)

    async with client(ManualClock(NOW)) as before:
        bought = await before.submit(model_v("bought"), key="bought")
        by_hand.script(faults.drop_after_accept())
        with pytest.raises(SubmitUncertain):
            await before.submit(model_v("doubtful"), key="doubtful")
    by_hand.set_result(bought.task_ids[0])

    clock = ManualClock(NOW + jump_s)
    async with client(clock) as after:
        jobs = {job.key: job async for job in after.recover()}
        assert set(jobs) <= {"bought", "doubtful"}
        found = await after.submit(model_v("bought"), key="bought")
        assert found.task_ids == bought.task_ids
        waiting = await started(found.result())
        clock.advance(61)
        assert (await waiting)[0].task_id == bought.task_ids[0]
        await doubt_ends(after, clock)
    assert len(by_hand.ledger.posts) == 2


async def doubt_ends(client: Client, clock: ManualClock) -> None:
    doubtful: Job[Any] | None = await client.find("doubtful")
    assert doubtful is not None
    waiting = await started(doubtful.result(timeout=1e12))
    clock.advance(Timeouts().uncertain)
    with pytest.raises(SubmitUncertain):
        await waiting
    assert doubtful.state is State.UNKNOWN
