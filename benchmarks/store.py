"""Durable operations a second of SQLiteStore against aiosqlite, and what a million pending jobs cost.

`python benchmarks/store.py [--quick]` (needs the extra `bench`). Both sides write the same changes of the same jobs
into the same kind of file on the same disk, with `synchronous=FULL`; aiosqlite as one would write it by hand: one
connection, a lock, a transaction and a commit for each change. Rounds alternate, the best of each side counts.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import aiosqlite
from report import resident_bytes, show

from xiling_async import Client, ImageToVideo, MemoryStore, SQLiteStore, WebhookReceiver
from xiling_async.kinds import Video
from xiling_async.models.lifecycle import Accepted, OutcomeReported, decide
from xiling_async.models.record import JobRecord, State, Succeeded
from xiling_async.simulator import Simulator
from xiling_async.stores.base import Store
from xiling_async.stores.rows import COLUMNS, record_of, row_of
from xiling_async.stores.sqlite_schema import MIGRATIONS

CALLERS = 100
WAITERS = 200
NOW = 1_800_000_000.0
Write = Callable[[JobRecord, Accepted, OutcomeReported], Awaitable[None]]


# --- what is written -------------------------------------------------------------------------------------------------


def request(number: int) -> ImageToVideo:
    return ImageToVideo(
        model="V",
        prompt=f"A running golden retriever, sunny meadow, high quality, cinematic feel, take {number}",
        image_url="https://example.com/start_frame.jpg",
        aspect_ratio="16:9",
        aspect_resolution="1080p",
        duration=6,
    )


def intent(number: int, at: float = NOW) -> JobRecord:
    return JobRecord(
        id=job_id(number),
        kind="image_to_video",
        key=f"order-{number}",
        request=request(number),
        asked=1,
        created_at=at,
        changed_at=at,
    )


def job_id(number: int) -> str:
    """Spread like the random ids of real jobs."""
    return f"{number * 2654435761 % 2**32:032x}"


def accepted(number: int, at: float = NOW) -> Accepted:
    return Accepted(attempt=1, at=at, task_ids=(f"i2v-{number}",), due_at=at + 300)


def heard(number: int, at: float = NOW) -> OutcomeReported:
    task_id = f"i2v-{number}"
    raw = {
        "task_id": task_id,
        "status": "SUCCEEDED",
        "video_url": f"https://storage.example.com/{task_id}/sample_0.mp4?signature=0123456789abcdef",
        "thumbnail_url": f"https://storage.example.com/{task_id}.webp?signature=0123456789abcdef",
        "error_message": "",
    }
    video = Video(task_id=task_id, video_url=raw["video_url"], thumbnail_url=raw["thumbnail_url"], raw=raw)
    return OutcomeReported(attempt=1, at=at, task_id=task_id, outcome=Succeeded(task_id, video), due_at=at)


def _accepted(number: int, at: float) -> JobRecord:
    record = decide(intent(number, at), accepted(number, at)).record
    assert record is not None
    return record


def callback_body(task_id: str) -> bytes:
    data = heard(0).outcome.result.raw | {"task_id": task_id}  # type: ignore[union-attr]
    return json.dumps({"code": 0, "msg": "ok", "task_type": "image_to_video", "data": data}).encode()


# --- the first table -------------------------------------------------------------------------------------------------


async def rate(write: Write, jobs: int) -> float:
    """Durable changes a second with `CALLERS` at once: three a job."""
    left: Iterator[int] = iter(range(jobs))

    async def caller() -> None:
        for number in left:
            await write(intent(number), accepted(number), heard(number))

    begun = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    return 3 * jobs / (time.perf_counter() - begun)


async def ours(file: Path, jobs: int) -> float:
    store = SQLiteStore(file)

    async def write(record: JobRecord, answer: Accepted, told: OutcomeReported) -> None:
        await store.add(record)
        await store.change(record.id, answer)
        done = await store.change(record.id, told)
        assert done.record is not None and done.record.state is State.DONE

    await store.open()
    try:
        return await rate(write, jobs)
    finally:
        await store.close()


async def by_hand(file: Path, jobs: int) -> float:
    """The same statements through aiosqlite, a commit for each change."""
    marks = ", ".join("?" * len(COLUMNS))
    places = ", ".join(f"{name} = ?" for name in COLUMNS)
    async with aiosqlite.connect(file, isolation_level=None) as database:
        for pragma in ("locking_mode = exclusive", "journal_mode = wal", "synchronous = full"):
            await database.execute(f"PRAGMA {pragma}")
        for script in MIGRATIONS:
            await database.executescript(script)
        lock = asyncio.Lock()

        async def add(record: JobRecord) -> None:
            async with lock:
                await database.execute("BEGIN IMMEDIATE")
                await database.execute(f"INSERT INTO jobs ({', '.join(COLUMNS)}) VALUES ({marks})", row_of(record))
                await database.execute("COMMIT")

        async def change(job_id: str, event: Accepted | OutcomeReported) -> JobRecord:
            async with lock:
                await database.execute("BEGIN IMMEDIATE")
                found = await database.execute(f"SELECT {', '.join(COLUMNS)} FROM jobs WHERE id = ?", (job_id,))
                row = await found.fetchone()
                assert row is not None
                record = decide(record_of(row), event).record
                assert record is not None
                if isinstance(event, Accepted):
                    await database.execute("INSERT INTO tasks VALUES (?, ?)", (event.task_ids[0], job_id))
                await database.execute(f"UPDATE jobs SET {places} WHERE id = ?", (*row_of(record), job_id))
                await database.execute("COMMIT")
                return record

        async def write(record: JobRecord, answer: Accepted, told: OutcomeReported) -> None:
            await add(record)
            await change(record.id, answer)
            assert (await change(record.id, told)).state is State.DONE

        return await rate(write, jobs)


async def compare(folder: Path, jobs: int, rounds: int) -> None:
    best = {"aiosqlite, a commit each": 0.0, "SQLiteStore": 0.0}
    for number in range(rounds):
        for side, measured in zip(best, (by_hand, ours), strict=True):
            best[side] = max(best[side], await measured(folder / f"{measured.__name__}{number}.db", jobs))
    slow = next(iter(best.values()))
    show(
        f"durable changes a second, {jobs} jobs of 3 changes, {CALLERS} callers",
        ("side", "changes a second", "ratio"),
        [(side, f"{speed:,.0f}", f"{speed / slow:.1f}") for side, speed in best.items()],
    )


# --- the second table ------------------------------------------------------------------------------------------------


async def fill(file: Path, jobs: int) -> None:
    """A store with so many accepted jobs, as a process that died would leave it."""
    store = SQLiteStore(file)
    await store.open()
    await store.close()

    at = time.time() - 600
    one = dict(zip(COLUMNS, row_of(_accepted(0, at)), strict=True))

    def rows() -> Iterator[tuple[object, ...]]:
        for number in range(jobs):
            named = {"id": job_id(number), "key": f"order-{number}", "tasks": f'[["i2v-{number}",null]]'}
            yield tuple((one | named | {"created_at": at + number / jobs}).values())

    def write() -> None:
        connection = sqlite3.connect(file)
        connection.execute("PRAGMA synchronous = off")
        with connection:
            marks = ", ".join("?" * len(COLUMNS))
            connection.executemany(f"INSERT INTO jobs ({', '.join(COLUMNS)}) VALUES ({marks})", rows())
            connection.execute("INSERT INTO tasks SELECT json_extract(tasks, '$[0][0]'), id FROM jobs ORDER BY 1")
        connection.close()

    await asyncio.to_thread(write)


async def pending(folder: Path, jobs: int) -> None:
    file = folder / "pending.db"
    await fill(file, jobs)
    gc.collect()
    before = resident_bytes()
    receiver = WebhookReceiver(port=0)
    async with Simulator(manual=True) as sim:
        begun = time.perf_counter()
        client = Client(sim.api_key, base_url=sim.base_url, receiver=receiver, store=SQLiteStore(file))
        async with client:
            opened_s = time.perf_counter() - begun
            latencies = sorted(await callbacks(client, receiver, sim))
            gc.collect()
            each = (resident_bytes() - before) / jobs
            tasks = len(asyncio.all_tasks())
            timers = len(asyncio.get_running_loop()._scheduled)  # type: ignore[attr-defined]
            threads = threading.active_count()
            assert tasks + timers < 500, "no task and no timer a job"
            begun = time.perf_counter()
            scanned, held = await listed(client)
            scanned_s = time.perf_counter() - begun
            assert scanned == jobs
    p50, p99 = (latencies[int(len(latencies) * share)] * 1000 for share in (0.50, 0.99))
    show(
        f"{jobs:,} pending jobs in a SQLiteStore of {file.stat().st_size / 2**20:,.0f} MiB",
        ("what", "measured"),
        [
            ("taken over and open after a restart", f"{opened_s:.1f} s"),
            ("all of them listed (client.recover())", f"{scanned_s:.1f} s"),
            ("memory of the process for each", f"{each:.0f} bytes"),
            ("memory for each with a handle on it", f"{held:,.0f} bytes"),
            ("asyncio tasks, timers, threads", f"{tasks}, {timers}, {threads}"),
            (f"callback → waiter, {WAITERS} one after another, p50", f"{p50:.2f} ms"),
            ("the same, p99", f"{p99:.2f} ms"),
        ],
    )
    assert each <= 400 or not before, "a pending job costs its row"


async def callbacks(client: Client, receiver: WebhookReceiver, sim: Simulator) -> list[float]:
    """Seconds from a callback's body to its waiter, each."""
    latencies = []
    for number in range(WAITERS):
        job = await client.submit(request(number))
        waiter = asyncio.create_task(job.result())
        await asyncio.sleep(0)
        url = sim.ledger.posts[-1].callback_url
        assert url is not None
        begun = time.perf_counter()
        answer = asyncio.create_task(receiver.handle(url, callback_body(job.task_ids[0])))
        await waiter
        latencies.append(time.perf_counter() - begun)
        assert (await answer).status == 200
    return latencies


async def listed(client: Client, hold: int = 100_000) -> tuple[int, float]:
    """How many jobs are open; and the bytes for each of the first ones, while somebody holds a handle on them."""
    before = resident_bytes()
    each = 0.0
    handles = []
    count = 0
    async for job in client.recover():
        count += 1
        if count <= hold:
            handles.append(job)
            each = (resident_bytes() - before) / count if count == hold else each
    return count, each


async def in_memory(jobs: int) -> None:
    """Print the bytes for each pending job of a MemoryStore (in a process of its own)."""
    store: Store = MemoryStore()
    before = resident_bytes()
    for number in range(jobs):
        await store.add(intent(number, NOW + number))
        await store.change(job_id(number), accepted(number))
    print((resident_bytes() - before) / jobs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few seconds, for CI: a look, not a measurement")
    parser.add_argument("--in-memory", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.in_memory:
        asyncio.run(in_memory(given.in_memory))
        return
    jobs = 100_000 if given.quick else 1_000_000
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix="bench-") as folder:  # /tmp may be memory
        asyncio.run(compare(Path(folder), 500 if given.quick else 4000, rounds=1 if given.quick else 3))
        asyncio.run(pending(Path(folder), jobs))
    jobs = 20_000 if given.quick else jobs
    again = [sys.executable, __file__, "--in-memory", str(jobs)]
    each = float(subprocess.run(again, check=True, capture_output=True, text=True).stdout)
    show(f"{jobs:,} pending jobs in a MemoryStore", ("what", "measured"), [("memory for each", f"{each:,.0f} bytes")])


if __name__ == "__main__":
    main()
