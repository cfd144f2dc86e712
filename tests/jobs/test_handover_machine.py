"""Hand-over, retry and purge against a plain list of jobs: any sequence of them ends the same, on every store."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncGenerator, Coroutine, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import asyncpg
import attrs
import pytest
from crash import reserved_port
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from pg import fresh_schema, pg_store, server
from support import client_of, model_v, settle

from xiling_async import (
    Client,
    ClientClosed,
    InvalidRequest,
    Job,
    MemoryStore,
    Rejected,
    SQLiteStore,
    Store,
    WebhookReceiver,
)
from xiling_async.jobs import engine
from xiling_async.simulator import Simulator, faults
from xiling_async.stores.base import HandedOver
from xiling_async.testing.clock import ManualClock

T = TypeVar("T")

MEMORY: Final = "/dev/shm"  # no power is cut here: a disk would only make it slow
LEASE_S: Final = 60.0
LIVELY_S: Final = 10.0  # what must happen happens within this; in truth it takes milliseconds
CONSUMERS: Final = 2
RESTARTS: Final = 3  # at most: two clients of a database take a quarter of a second to open

WHICH: Final = st.integers(0, CONSUMERS - 1)
KEYS: Final = st.sampled_from((None, None, "a", "b"))
ENDS: Final = st.tuples(*[st.sampled_from(("SUCCEEDED", "FAILED"))] * 2)  # of the two tasks that a job has at most
PLACES: Final = st.integers(0, 1_000)  # of a job, by the number of jobs that there are


@attrs.define
class ModelJob:
    """What must be remembered of a job. `handover_at` as in `JobRecord`."""

    id: str
    key: str | None
    task_ids: tuple[str, ...]
    metadata: Mapping[str, str]
    retry_of: str | None = None
    state: str = "accepted"
    ends: list[str] = attrs.field(factory=list)
    ended_at: float | None = None
    handover_at: float | None = 0.0

    @property
    def is_handed_over(self) -> bool:
        return self.state in ("done", "failed")


class Machine(RuleBasedStateMachine):
    """`model`: the jobs, the oldest first. A consumer is a loop over `Client.completed`; `waiting`: its next step."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.loop.set_debug(False)  # whatever the interpreter runs with: it takes ten times as long
        self.clock = ManualClock()
        self.model: list[ModelJob] = []
        self.has_consumer = False
        self.restarts = 0
        self.counts = {"handed_over": 0, "again": 0, "acknowledged": 0}  # since the clients were opened
        self.consumers: list[AsyncGenerator[Job[Any], None] | None] = [None] * CONSUMERS
        self.waiting: dict[int, asyncio.Task[Job[Any]]] = {}
        self.opened = contextlib.ExitStack()
        self.folder = Path(self.opened.enter_context(
            tempfile.TemporaryDirectory(dir=MEMORY if Path(MEMORY).is_dir() else None)
        ))  # fmt: skip
        self.ports = [self.opened.enter_context(reserved_port()) for _ in range(self.clients_of_a_store)]
        self.sim = Simulator(manual=True)
        self.run(self.sim.__aenter__())
        self.clients: list[Client] = []
        self.run(self._open())

    # --- what the stores differ in

    clients_of_a_store = 1

    def new_store(self) -> Store:
        raise NotImplementedError

    async def let_time_pass(self, seconds: float) -> None:
        self.clock.advance(seconds)

    # --- helpers

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(work, LIVELY_S))

    async def _open(self) -> None:
        self.counts = dict.fromkeys(self.counts, 0)
        receivers = [WebhookReceiver(f"http://127.0.0.1:{port}/xiling", port=port) for port in self.ports]
        self.clients = [
            client_of(self.sim, receiver=receiver, store=self.new_store(), clock=self.clock) for receiver in receivers
        ]
        await asyncio.gather(*(client.open() for client in self.clients))

    async def _close(self) -> list[Job[Any] | BaseException]:
        """Close the clients; how the steps of the consumers that waited ended."""
        for client in self.clients:
            await client.aclose()
        self.clients.clear()
        ends = await asyncio.gather(*self.waiting.values(), return_exceptions=True)
        self.waiting.clear()
        for jobs in self.consumers:
            if jobs is not None:
                await jobs.aclose()
        self.consumers = [None] * CONSUMERS
        return ends

    def teardown(self) -> None:
        try:
            self.run(self._close())
            self.run(self.sim.__aexit__(None, None, None))
        finally:
            self.loop.close()
            self.opened.close()

    def client(self, which: int) -> Client:
        return self.clients[which % len(self.clients)]

    def a_job(self, place: int, *preferred: str) -> ModelJob:
        """One in these states if there is one and the dice say so, else any."""
        jobs = [job for job in self.model if job.state in preferred and place % 4] or self.model
        return jobs[place % len(jobs)]

    def by_key(self, key: str) -> ModelJob | None:
        return next((job for job in self.model if job.key == key), None)

    def available(self) -> list[ModelJob]:
        """What can be handed over now, the oldest end first."""
        now = self.clock.time()
        ready = [job for job in self.model if job.is_handed_over and job.handover_at is not None]
        return sorted((job for job in ready if (job.handover_at or 0) <= now), key=lambda job: (job.ended_at, job.id))

    async def _step(self, work: Coroutine[Any, Any, T]) -> T:
        """Do this; then the consumers that wait are handed what is available, and nothing else."""
        result = await work
        while self.waiting and (available := self.available()):
            expected = {job.id: job for job in available[: len(self.waiting)]}
            while expected:
                done, _ = await asyncio.wait(self.waiting.values(), return_when="FIRST_COMPLETED", timeout=LIVELY_S)
                assert done, f"nobody is handed {list(expected)}"
                for which in [which for which, task in self.waiting.items() if task in done]:
                    job = expected.pop(self.waiting.pop(which).result().id)
                    self.counts["handed_over"] += 1
                    self.counts["again"] += job.handover_at != 0
                    job.handover_at = self.clock.time() + LEASE_S
        await settle(20)
        assert not [task for task in self.waiting.values() if task.done()], "it was handed what is not available"
        return result

    def step(self, work: Coroutine[Any, Any, T]) -> T:
        return self.run(self._step(work))

    # --- what may happen

    @rule(which=WHICH, key=KEYS)
    def submit(self, which: int, key: str | None) -> None:
        """The same key is the same job, also after its end; a key that was forgotten buys again."""
        self.clock.advance(1)
        metadata = {"number": str(len(self.model))}
        job = self.step(self.client(which).submit(model_v(count=2), key=key, metadata=metadata))
        held = None if key is None else self.by_key(key)
        if held is None:
            self.model.append(ModelJob(job.id, key, job.task_ids, metadata))
        else:
            assert (job.id, job.task_ids) == (held.id, held.task_ids)

    @precondition(lambda self: all(job.state != "rejected" for job in self.model))
    @rule(which=WHICH)
    def submit_in_vain(self, which: int) -> None:
        """The service refuses it: it has ended and is not handed over."""
        self.clock.advance(1)
        self.sim.script(faults.status(400))

        async def refused() -> str:
            with pytest.raises(Rejected) as caught:
                await self.client(which).submit(model_v())
            return caught.value.job_id or ""

        job_id = self.step(refused())
        self.model.append(ModelJob(job_id, None, (), {}, state="rejected", ended_at=self.clock.time()))

    @precondition(lambda self: any(job.state == "accepted" for job in self.model))
    @rule(place=PLACES, ends=ENDS)
    def end(self, place: int, ends: tuple[str, ...]) -> None:
        """The tasks of a job end, one after the other; with the last one the job does."""
        self.clock.advance(1)
        running = [job for job in self.model if job.state == "accepted"]
        self._end(running[place % len(running)], ends)

    def _end(self, job: ModelJob, ends: tuple[str, ...]) -> None:
        for task_id, status in zip(job.task_ids, ends, strict=False):
            job.ends.append(status)
            if len(job.ends) == len(job.task_ids):
                job.state = "failed" if "FAILED" in job.ends else "done"
                job.ended_at = self.clock.time()
            assert self.step(self.sim.finish(task_id, status)) == 200

    @rule(which=WHICH, key=KEYS, ends=ENDS)
    def buy_and_end(self, which: int, key: str | None, ends: tuple[str, ...]) -> None:
        """A job from its submit to its end."""
        self.submit(which, key)
        job = self.by_key(key) if key else self.model[-1]
        if job is not None and job.state == "accepted":
            self._end(job, ends)

    @precondition(lambda self: len(self.waiting) < CONSUMERS)
    @rule(which=WHICH)
    def ask(self, which: int) -> None:
        """A consumer asks for its next job; while it waits for one it does not ask again."""
        self.has_consumer = True
        if which not in self.waiting:
            jobs = self.consumers[which] or self.client(which).completed(lease=LEASE_S)
            self.consumers[which] = jobs
            self.waiting[which] = self.loop.create_task(anext(jobs))
            self.step(settle())

    @precondition(lambda self: self.waiting)
    @rule(which=WHICH)
    def leave(self, which: int) -> None:
        """A consumer leaves its loop, maybe while it waits: what it was handed stays leased."""
        task, jobs = self.waiting.pop(which, None), self.consumers[which]
        self.consumers[which] = None

        async def go() -> None:
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
                assert task.cancelled()
            if jobs is not None:
                await jobs.aclose()

        self.step(go())

    @precondition(lambda self: self.model)
    @rule(which=WHICH, place=PLACES)
    def acknowledge(self, which: int, place: int) -> None:
        """Whoever says it, with or without a lease; twice changes nothing; not before the end."""
        job = self.a_job(place, "done", "failed")

        async def ack() -> None:
            handle = await self.client(which).find(job.id)
            assert handle is not None
            if job.is_handed_over:
                await handle.ack()
            else:
                with pytest.raises(InvalidRequest):
                    await handle.ack()

        if job.is_handed_over:
            self.counts["acknowledged"] += job.handover_at is not None
            job.handover_at = None
        self.step(ack())

    @precondition(lambda self: any(job.handover_at for job in self.model))
    @rule(seconds=st.sampled_from((LEASE_S / 3, LEASE_S + 1, LEASE_S + 1)))
    def wait(self, seconds: float) -> None:
        """Leases run out, or do not."""
        self.step(self.let_time_pass(seconds))

    @precondition(lambda self: self.model)
    @rule(which=WHICH, place=PLACES)
    def retry(self, which: int, place: int) -> None:
        """The failed tasks of a failed job, once for each generation."""
        self.clock.advance(1)
        job, posts = self.a_job(place, "failed"), len(self.sim.ledger.posts)

        async def retried() -> Job[Any] | None:
            handle = await self.client(which).find(job.id)
            assert handle is not None
            if job.state == "failed":
                return await self.client(which).retry(handle)
            with pytest.raises(InvalidRequest):
                await self.client(which).retry(handle)
            return None

        bought = self.step(retried())
        if bought is None:
            assert len(self.sim.ledger.posts) == posts
            return
        root, _, generation = (job.key or job.id).partition("~")
        key = f"{root}~{int(generation or 0) + 1}"
        held = self.by_key(key)
        assert (bought.key, bought.retry_of, len(bought.task_ids)) == (key, job.id, job.ends.count("FAILED"))
        assert len(self.sim.ledger.posts) == posts + (held is None)
        if held is None:
            self.model.append(ModelJob(bought.id, key, bought.task_ids, job.metadata, retry_of=job.id))
        else:
            assert (bought.id, bought.task_ids) == (held.id, held.task_ids)

    @precondition(lambda self: any(job.ended_at for job in self.model))
    @rule(which=WHICH, older_than=st.sampled_from((0.5, 100.5)))
    def purge(self, which: int, older_than: float) -> None:
        """Old ends are forgotten; where there are consumers, only what was acknowledged, or bought nothing."""
        before = self.clock.time() - older_than
        kept = [
            job
            for job in self.model
            if job.ended_at is None
            or job.ended_at >= before
            or (self.has_consumer and job.is_handed_over and job.handover_at is not None)
        ]
        assert self.step(self.client(which).purge(older_than=older_than)) == len(self.model) - len(kept)
        self.model = kept

    @precondition(lambda self: self.model and self.restarts < RESTARTS)
    @rule()
    def restart(self) -> None:
        """The clients are closed, which ends their loops; new ones are opened: what was leased is leased."""
        self.restarts += 1
        self.clock.advance(1)
        assert all(isinstance(end, ClientClosed) for end in self.run(self._close()))
        self.run(self._open())

    # --- what must hold

    @invariant()
    def every_client_lists_the_model(self) -> None:
        expected = [
            (job.id, job.key, job.state, dict(job.metadata), job.retry_of, job.ended_at, job.task_ids)
            for job in self.model
        ]
        for client in self.clients:
            assert self.run(_listed(client)) == expected

    @invariant()
    def the_counts_are_those_of_the_model(self) -> None:
        total = dict.fromkeys(self.counts, 0)
        for client in self.clients:
            for name, count in client.stats().handover.items():
                total[name] += count
        assert total == self.counts


async def _listed(client: Client) -> list[tuple[Any, ...]]:
    return [
        (job.id, job.key, job.state, dict(job.metadata), job.retry_of, job.ended_at, job.task_ids)
        async for job in client.jobs()
    ]


class MemoryMachine(Machine):
    make_store: type[MemoryStore] = MemoryStore

    def __init__(self) -> None:
        self._store = self.make_store()
        super().__init__()

    def new_store(self) -> Store:
        return self._store


class SQLiteMachine(Machine):
    def new_store(self) -> Store:
        return SQLiteStore(self.folder / "jobs.db")


class PostgresMachine(Machine):
    """Two clients on one database, as two processes would be. Its clock measures the leases, so they are aged there."""

    clients_of_a_store = 2

    def __init__(self) -> None:
        self.schema = fresh_schema()
        super().__init__()

    def new_store(self) -> Store:
        return pg_store(schema=self.schema)

    async def let_time_pass(self, seconds: float) -> None:
        connection = await asyncpg.connect(server().dsn)
        aged = f"UPDATE {self.schema}.xiling_jobs SET handover_at = handover_at - {seconds} WHERE handover_at > 0"
        await connection.execute(aged)
        await connection.close()
        self.clock.advance(seconds)


@pytest.mark.parametrize("machine", [MemoryMachine, SQLiteMachine, PostgresMachine])
def test_hand_over_and_retry_do_what_the_list_does(machine: type[Machine], deep: bool) -> None:
    """Every job is handed over in the order of the ends, to one consumer at a time, until it is acknowledged; a retry
    buys each generation once; a purge forgets what it may."""
    examples = {MemoryMachine: 25, SQLiteMachine: 15, PostgresMachine: 4}[machine]
    run_state_machine_as_test(
        machine,
        settings=settings(stateful_step_count=30, max_examples=examples * 50 if deep else examples),
    )


# --- negative controls ------------------------------------------------------------------------------------------------


class _ForgetfulStore(MemoryStore):
    """Its leases are not written: two consumers may have one job."""

    async def hand_over(self, now: float, *, lease_s: float) -> HandedOver | None:
        return await super().hand_over(now, lease_s=0.0)


class _ImpatientStore(MemoryStore):
    """It hands over the end that came last first."""

    async def hand_over(self, now: float, *, lease_s: float) -> HandedOver | None:
        self._ended = dict(reversed(self._ended.items()))
        return await super().hand_over(now, lease_s=lease_s)


def _quickly(machine: type[Machine]) -> None:
    quickly = settings(max_examples=100, phases=[Phase.generate], report_multiple_bugs=False, derandomize=True)
    run_state_machine_as_test(machine, settings=quickly)


@pytest.mark.parametrize("store", [_ForgetfulStore, _ImpatientStore])
def test_the_machine_sees_a_store_that_breaks_the_promise(store: type[MemoryStore]) -> None:
    """The negative controls: each is told from the list."""

    class Broken(MemoryMachine):
        make_store = store

    with pytest.raises((AssertionError, KeyError)):
        _quickly(Broken)


def test_the_machine_sees_retries_that_have_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control of buying again: without the derived key each caller buys for itself."""
    monkeypatch.setattr(engine, "retry_key", lambda record: None)
    with pytest.raises(AssertionError):
        _quickly(MemoryMachine)
