"""What it takes to be there: the memory of a million pending jobs, and the time of the import.

`python benchmarks/footprint.py [--quick]`. A pending job is its record in a `MemoryStore`, with a request of its own;
then also its entry in the registry with the future of one waiter; then also a handle, and a task that awaits it. The
import is timed in processes of their own, beyond `import aiohttp, cattrs`, the best of many; what belongs to an extra
must not be imported with it. The last two tables are the profile: of what both are made.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import subprocess
import sys
import tracemalloc
from typing import Any, Final

from report import resident_bytes, show

from xiling_async import Client, ImageToVideo, MemoryStore
from xiling_async.jobs.job import Job, JobContext
from xiling_async.jobs.registry import Registry
from xiling_async.models.record import JobRecord, State
from xiling_async.models.request import Request
from xiling_async.models.settings import Timeouts

TARGET_BYTES: Final = 1024
TARGET_IMPORT_MS: Final = 40
NEVER: Final = ("rich", "typer", "jinja2", "asyncpg", "opentelemetry", "xiling_async.simulator", "xiling_async.cli")
NOW: Final = 1_800_000_000.0
TIMED: Final = f"""
import aiohttp, cattrs, json, sys, time
wall, cpu = time.perf_counter(), time.process_time()
import xiling_async
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
print(json.dumps([1000 * wall, 1000 * cpu, [name for name in {NEVER!r} if name in sys.modules], len(sys.modules)]))
"""


IN_PARTS: Final = """
import aiohttp, attrs, cattrs, json, time
ms, classes = {}, []

def timed(name, work):
    begun = time.perf_counter()
    done = work()
    ms[name] = ms.get(name, 0.0) + 1000 * (time.perf_counter() - begun)
    return done

def of(decorator):
    def decorate(cls=None, **options):
        if cls is None:
            return lambda cls: decorate(cls, **options)
        classes.append(cls)
        return timed("attrs makes our classes", lambda: decorator(cls, **options))
    return decorate

attrs.define, attrs.frozen = of(attrs.define), of(attrs.frozen)
timed("aiohttp.web, for the receiver's own server", lambda: __import__("aiohttp.web"))
timed("sqlite3", lambda: __import__("sqlite3"))
timed("ours", lambda: __import__("xiling_async"))
ms["all the rest of ours"] = ms.pop("ours") - ms["attrs makes our classes"]
ms[f"attrs makes our classes ({len(classes)})"] = ms.pop("attrs makes our classes")
print(json.dumps(ms))
"""


# --- memory ----------------------------------------------------------------------------------------------------------


def accepted(number: int, request: Request[Any] | None = None) -> JobRecord:
    """As a submit leaves it: nothing in it is shared with another one."""
    request = request or ImageToVideo(
        model="V",
        prompt=f"A running golden retriever, sunny meadow, high quality, cinematic feel, take {number}",
        image_url="https://example.com/start_frame.jpg",
        aspect_ratio="16:9",
        aspect_resolution="1080p",
        duration=6,
    )
    return JobRecord(
        id=f"{number * 2654435761 % 2**32:032x}", kind="image_to_video", key=None, request=request, asked=1,
        created_at=NOW + number, changed_at=NOW + number + 0.5, state=State.ACCEPTED, version=1,
        task_ids=(f"i2v-{number:032x}",), outcomes=tuple(None for _ in range(1)), due_at=NOW + number + 300,
    )  # fmt: skip


def _is_over(record: JobRecord) -> bool:
    return record.state.is_final


async def with_futures(jobs: int, *, waiters: int) -> float:
    """Bytes of each pending job; `waiters`: 0 or 1. Without one, nothing but the store knows the job."""
    registry = Registry(MemoryStore())
    loop = asyncio.get_running_loop()
    gc.collect()
    before = resident_bytes()
    held = []
    for number in range(jobs):
        entry = await registry.open(accepted(number))
        if waiters:
            entry._waiters.append((_is_over, loop.create_future()))  # as `changed` does; a task is the third row's
            held.append(entry)
    gc.collect()
    return (resident_bytes() - before) / jobs


async def with_tasks(jobs: int) -> float:
    """The same with a handle, and a task that awaits it."""
    client = Client("a-key", base_url="http://127.0.0.1:9")
    registry = Registry(MemoryStore())
    engine = client._engine
    context = JobContext(
        registry=registry,
        clock=client._settings.clock,
        timeouts=Timeouts(),
        poller=engine.poller,
        consumers=engine.consumers,
    )
    gc.collect()
    before = resident_bytes()
    tasks = []
    for number in range(jobs):
        job: Job[Any] = Job(await registry.open(accepted(number)), context)
        tasks.append(asyncio.create_task(job.result()))
        if number % 1000 == 0:
            await asyncio.sleep(0)
    await asyncio.sleep(0)
    gc.collect()
    each = (resident_bytes() - before) / jobs
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    return each


async def in_parts(jobs: int) -> dict[str, float]:
    """Bytes of each part of a pending job that is awaited, by tracemalloc: without what the allocator rounds up."""
    registry, loop = Registry(MemoryStore()), asyncio.get_running_loop()
    tracemalloc.start()
    found: dict[str, float] = {}

    def part(name: str) -> None:
        held = tracemalloc.get_traced_memory()[0]
        found[name] = (held - sum(found.values()) * jobs) / jobs

    requests = [accepted(number).request for number in range(jobs)]
    part("the request, with its prompt")
    records = [accepted(number, request) for number, request in enumerate(requests)]
    part("the record, its ids and dates")
    for record in records:
        await registry._store.add(record)
    part("in the store: by id, by task, by when it is due")
    entries = [registry.entry_of(record) for record in records]
    part("the entry, and its weak reference")
    for entry in entries:
        entry._waiters.append((_is_over, loop.create_future()))
    part("a waiter: its list, entry and future")
    tracemalloc.stop()
    return found


def alone(what: str, jobs: int) -> float:
    """In a process of its own, where nothing else has used the memory before."""
    again = [sys.executable, __file__, "--alone", what, str(jobs)]
    return float(subprocess.run(again, check=True, stdout=subprocess.PIPE, text=True).stdout)


# --- import ----------------------------------------------------------------------------------------------------------


def imported(times: int) -> tuple[float, float, list[str], int]:
    """Milliseconds by wall time and by CPU, the least of each; what should not be there; how many modules there are."""
    runs = []
    for _ in range(times + 1):  # the first one writes the bytecode
        ran = subprocess.run([sys.executable, "-c", TIMED], check=True, stdout=subprocess.PIPE, text=True)
        runs.append(json.loads(ran.stdout))
    return min(run[0] for run in runs), min(run[1] for run in runs), runs[-1][2], runs[-1][3]


def imported_parts(times: int) -> dict[str, float]:
    """Milliseconds of what takes most of the import, the least of each."""
    runs = [
        json.loads(
            subprocess.run([sys.executable, "-c", IN_PARTS], check=True, stdout=subprocess.PIPE, text=True).stdout
        )
        for _ in range(times)
    ]
    return {name: min(run[name] for run in runs) for name in runs[0]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few seconds, for CI: a look, not a measurement")
    parser.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.alone:
        what, jobs = given.alone
        gc.disable()  # it would look at all of them ever again, and find nothing
        run = with_tasks(int(jobs)) if what == "task" else with_futures(int(jobs), waiters=int(what == "future"))
        print(asyncio.run(run))
        return 0
    jobs, tasks = (50_000, 5_000) if given.quick else (1_000_000, 100_000)
    nobody, each, with_task = alone("nobody", tasks), alone("future", jobs), alone("task", tasks)
    wall_ms, cpu_ms, strangers, modules = imported(3 if given.quick else 20)
    show(
        "Footprint",
        ("what", "measured", "target"),
        [
            (f"a pending job that nobody waits for, {tasks:,} of them", f"{nobody:,.0f} bytes", ""),
            (f"a pending job with one waiter's future, {jobs:,} of them", f"{each:,.0f} bytes", f"<= {TARGET_BYTES}"),
            (f"the same with a task that awaits it, {tasks:,} of them", f"{with_task:,.0f} bytes", ""),
            ("import xiling_async, after aiohttp and cattrs, wall", f"{wall_ms:.1f} ms", f"<= {TARGET_IMPORT_MS} ms"),
            ("the same, CPU", f"{cpu_ms:.1f} ms", ""),
            ("modules of extras that it imports", ", ".join(strangers) or "none", "none"),
            ("modules in all", modules, ""),
        ],
    )
    rows = [(name, f"{size:,.0f}") for name, size in asyncio.run(in_parts(1_000 if given.quick else 20_000)).items()]
    show("A pending job with one waiter, in parts", ("part", "bytes"), rows)
    show("The import, in parts, ms", ("part", "ms"), [(name, f"{ms:.1f}") for name, ms in imported_parts(5).items()])
    return 0 if given.quick or (each <= TARGET_BYTES and wall_ms <= TARGET_IMPORT_MS and not strangers) else 1


if __name__ == "__main__":
    sys.exit(main())
