"""Promise 15: `kill -9` of consumers at random instants; every ended job is dealt with, one holder at a time."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import os
import random
import signal
import sqlite3
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Final

import attrs
import pytest
from consumer_worker import LEDGER, PROGRAM, Ledger, Order
from pg import fresh_schema, pg_store, server
from support import model_v

import xiling_async
from xiling_async import SQLiteStore, Store, Succeeded, Video
from xiling_async.models.lifecycle import Accepted, OutcomeReported
from xiling_async.models.record import JobRecord

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no fork, no kill -9")

ENVIRONMENT: Final = {**os.environ, "PYTHONPATH": str(Path(xiling_async.__file__).parents[1])}
MEMORY: Final = "/dev/shm"  # no power is cut here: a disk would only make it slow
LEASE_S: Final = 1.0
LATE_S: Final = 2.0  # after its lease a job has a new holder within this
ROUNDING_S: Final = 0.002  # the ledger counts milliseconds
LIVELY_S: Final = 20.0  # what must happen happens within this, or the test fails
JOBS_PER_KILL: Final = 12
STEPS_PER_KILL: Final = 40  # at most, of all consumers
PAUSE_S: Final = 0.003  # at most, then
EPOCH: Final = 1_800_000_000.0


# --- the stores -------------------------------------------------------------------------------------------------------


@attrs.frozen
class SQLitePlace:
    """A file: one consumer at a time, and nothing else writes. `reader`: reads a copy while the consumer is at work."""

    store: str
    schema: str = ""
    consumers: int = 1
    jobs_that_end_meanwhile: int = 0  # of a hundred

    def writer(self) -> Store:
        return SQLiteStore(self.store)

    def reader(self) -> Store:
        return SQLiteStore(self.store, read_only=True)


@attrs.frozen
class PostgresPlace:
    """A database: three consumers, while half of the jobs end."""

    schema: str = attrs.field(factory=fresh_schema)
    store: str = attrs.field(factory=lambda: server().dsn)
    consumers: int = 3
    jobs_that_end_meanwhile: int = 50

    def writer(self) -> Store:
        return pg_store(schema=self.schema)

    def reader(self) -> Store:
        return self.writer()


Place = SQLitePlace | PostgresPlace


async def end_jobs(store: Store, numbers: Iterable[int]) -> None:
    """Jobs that have ended, one after the other."""
    for number in numbers:
        job_id, task_id, at = f"{number:032x}", f"task-{number}", EPOCH + number
        await store.add(JobRecord(
            id=job_id, kind="image_to_video", key=f"order-{number}", request=model_v(), asked=1, created_at=at,
            changed_at=at,
        ))  # fmt: skip
        await store.change(job_id, Accepted(attempt=1, at=at, task_ids=(task_id,), due_at=at))
        video = Video(task_id=task_id, video_url=f"https://media.example/{task_id}.mp4")
        outcome = Succeeded(task_id, video)
        await store.change(job_id, OutcomeReported(attempt=1, at=at, task_id=task_id, outcome=outcome, due_at=None))


# --- the consumers ----------------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class Consumer:
    """A process that is started again whenever it was killed."""

    name: str
    process: asyncio.subprocess.Process
    pid: int = 0
    lives: int = 0
    is_open: bool = False

    @property
    def life(self) -> str:
        return f"{self.name}.{self.lives}"


class Campaign:
    """Consumers of one place, killed and started again until every job is acknowledged."""

    def __init__(self, place: Place, folder: Path, *, acks_first: bool, seed: int = 1) -> None:
        self.place = place
        self.path = folder / "ledger.db"
        with contextlib.closing(sqlite3.connect(self.path)) as database:
            database.executescript(LEDGER)
        self.ledger = Ledger(str(self.path), "witness")
        self.kills = 0
        self.steps = 0
        self._acks_first = acks_first
        self._dice = random.Random(seed)
        self._stepped = asyncio.Condition()
        self._crashes: list[str] = []
        self._consumers: list[Consumer] = []

    @contextlib.asynccontextmanager
    async def _running(self) -> AsyncIterator[None]:
        pipe = asyncio.subprocess.PIPE
        listeners = []
        try:
            for number in range(self.place.consumers):
                process = await asyncio.create_subprocess_exec(
                    sys.executable, str(PROGRAM), stdin=pipe, stdout=pipe, env=ENVIRONMENT
                )
                consumer = Consumer(f"consumer-{number}", process)
                self._consumers.append(consumer)
                listeners.append(asyncio.create_task(self._listen(consumer)))
                self._start(consumer)
            yield
        finally:
            for consumer in self._consumers:
                if consumer.pid:
                    os.kill(consumer.pid, signal.SIGKILL)
                assert consumer.process.stdin is not None
                consumer.process.stdin.close()
            await asyncio.gather(*listeners)

    def _start(self, consumer: Consumer) -> None:
        consumer.lives += 1
        order = Order(
            store=self.place.store, schema=self.place.schema, ledger=str(self.path), lease_s=LEASE_S,
            life=consumer.life, acks_first=self._acks_first,
        )  # fmt: skip
        assert consumer.process.stdin is not None
        consumer.process.stdin.write(json.dumps(attrs.asdict(order)).encode() + b"\n")

    async def _listen(self, consumer: Consumer) -> None:
        assert consumer.process.stdout is not None
        async for line in consumer.process.stdout:
            what, _, rest = line.decode().strip().partition(" ")
            match what:
                case "forked":
                    consumer.pid = int(rest)
                case "exit":
                    consumer.pid, consumer.is_open = 0, False
                case "crash":
                    self._crashes.append(rest)
                case _:
                    consumer.is_open = True
                    self.steps += 1
            async with self._stepped:
                self._stepped.notify_all()
        await consumer.process.wait()

    async def _until_stepped(self, steps: int) -> bool:
        """Wait until so many steps were said; False: nothing more is done for now."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LEASE_S / 4), self._stepped:
                await self._stepped.wait_for(lambda: self.steps >= steps)
        assert not self._crashes, self._crashes
        return self.steps >= steps

    async def _kill(self, consumer: Consumer) -> None:
        os.kill(consumer.pid, signal.SIGKILL)
        async with asyncio.timeout(LIVELY_S), self._stepped:
            await self._stepped.wait_for(lambda: not consumer.pid)
        self.ledger.note(f"killed {consumer.life}")
        self.kills += 1
        self._start(consumer)

    @contextlib.asynccontextmanager
    async def _reading(self) -> AsyncIterator[Store]:
        reader = self.place.reader()
        await reader.open()
        try:
            yield reader
        finally:
            await reader.close()

    async def _is_over(self) -> bool:
        """Whether every job is acknowledged."""
        async with self._reading() as reader:
            return await reader.next_handover(time.time()) is None

    async def _kill_until(self, meanwhile: asyncio.Task[None], kills: float) -> None:
        """Kill consumers at random instants, until no job is left."""
        while True:
            came = await self._until_stepped(self.steps + self._dice.randrange(1, STEPS_PER_KILL))
            await asyncio.sleep(self._dice.random() * PAUSE_S)
            at_work = [consumer for consumer in self._consumers if consumer.is_open]
            if came and at_work and self.kills < kills:
                await self._kill(self._dice.choice(at_work))
            elif not came and meanwhile.done() and await self._is_over():
                return

    async def run(self, jobs: int) -> list[str]:
        """What was violated with so many jobs."""
        at_first = jobs - jobs * self.place.jobs_that_end_meanwhile // 100
        async with asyncio.timeout(LIVELY_S + jobs / 10):
            store = self.place.writer()
            await store.open()
            await end_jobs(store, range(at_first))
            if at_first == jobs:
                await store.close()  # else it goes on beside the consumers
            async with self._running():
                meanwhile = asyncio.create_task(end_jobs(store, range(at_first, jobs)))
                await self._kill_until(meanwhile, jobs / JOBS_PER_KILL)
            await store.close()
            async with self._reading() as reader:
                kept = {record.id async for record in reader.jobs() if record.handover_at is None}
        ids = {f"{number:032x}" for number in range(jobs)}
        return [*(f"NOT ACKNOWLEDGED: {job_id}" for job_id in ids - kept), *self._violations(ids)]

    # --- judging

    def _violations(self, jobs: set[str]) -> Iterable[str]:
        dealt = {job_id for (job_id,) in self.ledger.database.execute("SELECT job_id FROM dealt")}
        yield from (f"LOST: {job_id}" for job_id in jobs - dealt)
        lives = self._lives()
        rows = self.ledger.database.execute("SELECT job_id, what, at, claimed_at FROM steps WHERE job_id NOT NULL "
                                            "ORDER BY number")  # fmt: skip
        held: dict[str, list[tuple[float, float]]] = defaultdict(list)
        acknowledged: dict[str, list[float]] = defaultdict(list)
        for job_id, what, at, claimed_at in rows:
            if what == "held":
                held[job_id].append((claimed_at, at))
            elif what == "acknowledged":
                acknowledged[job_id].append(at)
        for job_id in jobs:
            if len(acknowledged[job_id]) > 1:
                yield f"ACKNOWLEDGED {len(acknowledged[job_id])} TIMES: {job_id}"
            yield from _of_a_job(job_id, sorted(held[job_id]), acknowledged[job_id], lives)

    def _lives(self) -> list[tuple[float, float]]:
        """From when to when each consumer lived."""
        sql = "SELECT life, what, at FROM steps WHERE job_id IS NULL"
        rows = self.ledger.database.execute(sql).fetchall()
        ends = {what.partition(" ")[2]: at for _, what, at in rows if what.startswith("killed ")}
        return sorted((at, ends.get(life, math.inf)) for life, what, at in rows if what == "open")

    def count(self, what: str) -> int:
        ((count,),) = self.ledger.database.execute("SELECT COUNT(*) FROM steps WHERE what = ?", (what,))
        return int(count)

    def worst_delay_s(self) -> float:
        """How long after the end of its lease a job had its next holder, at worst."""
        sql = "SELECT job_id, claimed_at FROM steps WHERE what = 'held' ORDER BY claimed_at"
        last: dict[str, float] = {}
        worst = 0.0
        for job_id, claimed_at in self.ledger.database.execute(sql):
            if job_id in last:
                worst = max(worst, claimed_at - last[job_id] - LEASE_S)
            last[job_id] = claimed_at
        return worst

    def __str__(self) -> str:
        counts = ", ".join(f"{self.count(what)} {what}" for what in ("held", "dealt", "known", "acknowledged"))
        return f"{self.kills} kills: {counts}; handed over again {self.worst_delay_s():.2f} s after the lease at worst"


def _of_a_job(
    job_id: str, held: list[tuple[float, float]], acknowledged: list[float], lives: list[tuple[float, float]]
) -> Iterable[str]:
    """`held`: when each holder asked for it, and when it had it."""
    for (claimed_at, _), (next_claimed_at, next_at) in itertools.pairwise(held):
        lease_end = claimed_at + LEASE_S
        if next_at < lease_end - ROUNDING_S:
            yield f"TWO HOLDERS: {job_id}, {lease_end - next_at:.3f} s before the end of the lease"
        open_at = min((max(begin, lease_end) for begin, end in lives if end > lease_end), default=math.inf)
        if next_at > open_at + LATE_S:
            yield f"LATE: {job_id}, {next_at - open_at:.3f} s after it could be handed over again"
        if any(at < next_claimed_at for at in acknowledged):
            yield f"HANDED OVER AFTER IT WAS ACKNOWLEDGED: {job_id}"


@pytest.fixture
def folder() -> Iterable[Path]:
    with tempfile.TemporaryDirectory(dir=MEMORY if Path(MEMORY).is_dir() else None) as path:
        yield Path(path)


def _place(name: str, folder: Path) -> Place:
    return SQLitePlace(str(folder / "jobs.db")) if name == "sqlite" else PostgresPlace()


@pytest.mark.parametrize("name", ["sqlite", "postgres"])
async def test_promise_15_consumers_that_are_killed(
    name: str, folder: Path, deep: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """200 ended jobs (2,000 with --deep), one consumer of a file or three of a database: each is dealt with and
    acknowledged once, none has two holders, and one whose holder was killed has another within 2 s after the lease."""
    jobs = 2_000 if deep else 200
    campaign = Campaign(_place(name, folder), folder, acks_first=False)
    violations = await campaign.run(jobs)
    with capsys.disabled():
        print(f"\n{name}: {campaign}")
    assert violations == []
    assert campaign.count("dealt") >= jobs - campaign.kills, "what is dealt with and not noted was killed in between"
    assert campaign.kills >= jobs / JOBS_PER_KILL / 2
    assert campaign.count("held") > jobs, "some were handed over again"


async def test_the_harness_sees_what_an_early_acknowledgement_loses(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The negative control: a consumer that acknowledges first is found to lose jobs, and nothing else."""
    campaign = Campaign(_place("sqlite", folder), folder, acks_first=True)
    violations = await campaign.run(200)
    with capsys.disabled():
        print(f"\nacknowledged first: {campaign}; {len(violations)} jobs lost")
    assert violations
    assert all(violation.startswith("LOST") for violation in violations)
