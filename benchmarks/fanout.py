"""Many jobs at once: `client.map` against `asyncio.gather` with a semaphore, and against fal-client and replicate.

`python benchmarks/fanout.py [--quick]` (the peers need the extra `peers`; one that is not installed is said to be so).
Every side runs in a process of its own on one core, the service (lean.py) in another one; each side gets its requests
from a generator, and 200 jobs at once. A job takes 2 s at the service, which then calls back, or says so when it is
asked. Memory is what the process holds at its worst above what it held when the client was open and one job was done.
CPU is the side's own process, without the service. "done → awaited" is from the moment at which the service has the
result to the line after the `await`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

from peers import PEERS, installed
from report import resident_bytes, show
from sides import LeanService, cores, forget_peak, peak_bytes, pin

from xiling_async import Client, ImageToVideo, MemoryStore, SQLiteStore, WebhookReceiver

IN_FLIGHT: Final = 200
TARGET_MIB: Final = 10
TARGET_GROWTH: Final = 1.2
TARGET_P99_MS: Final = 20
STEP_S: Final = 0.0001
STEPS: Final = 600_000
MIB: Final = 1024**2
Run = Callable[[], Awaitable[str]]
Result = dict[str, Any]


def requests(jobs: int) -> Iterator[ImageToVideo]:
    for number in range(jobs):
        yield ImageToVideo(
            model="V",
            prompt=f"A running golden retriever, sunny meadow, high quality, cinematic feel, take {number}",
            image_url="https://example.com/start_frame.jpg",
            aspect_ratio="16:9",
            aspect_resolution="1080p",
            duration=6,
        )


async def evenly(jobs: int, per_second: float) -> AsyncIterator[ImageToVideo]:
    begun = time.perf_counter()
    for number, request in enumerate(requests(jobs)):
        await asyncio.sleep(max(0.0, begun + number / per_second - time.perf_counter()))
        yield request


class Delays:
    """Counted in steps of 0.1 ms up to a minute, so that a hundred thousand of them take no memory of their own."""

    def __init__(self) -> None:
        self._counts = array("I", [0]) * (STEPS + 1)
        self.count = 0

    def note(self, url: str) -> None:
        """A result was awaited: its URL says when it was there."""
        seconds = time.perf_counter() - float(url.rpartition("done=")[2])
        self._counts[min(STEPS, max(0, int(seconds / STEP_S)))] += 1
        self.count += 1

    def at(self, share: float) -> float | None:
        """Milliseconds."""
        left = self.count * share
        for place, count in enumerate(self._counts):
            left -= count
            if left <= 0 and self.count:
                return (place + 1) * STEP_S * 1000
        return None


# --- the sides, each in a process of its own -------------------------------------------------------------------------


class Measured:
    """From here on: wall time, CPU, memory."""

    def __init__(self) -> None:
        self.delays = Delays()
        self.errors: dict[str, int] = {}
        forget_peak()
        self._held = resident_bytes()
        self._cpu_s, self._begun = time.process_time(), time.perf_counter()

    def result(self) -> Result:
        return {
            "wall_s": time.perf_counter() - self._begun,
            "cpu_s": time.process_time() - self._cpu_s,
            "growth_mib": max(0, peak_bytes() - self._held) / MIB,
            "p50_ms": self.delays.at(0.50),
            "p99_ms": self.delays.at(0.99),
            "done": self.delays.count,
            "errors": self.errors,
        }

    def failed(self, error: Exception) -> None:
        name = type(error).__name__
        self.errors[name] = self.errors.get(name, 0) + 1


async def by_map(client: Client, jobs: int, per_second: float) -> Result:
    await client.run(next(requests(1)))
    measured = Measured()
    source = evenly(jobs, per_second) if per_second else requests(jobs)
    async for done in client.map(source, in_flight=IN_FLIGHT):
        if done.error is not None:
            measured.failed(done.error)
        else:
            measured.delays.note(done.results[0].video_url)
    return measured.result()


async def by_gather(run: Callable[[ImageToVideo], Awaitable[str]], jobs: int) -> Result:
    """As one would write it: everything is started, a semaphore holds it back."""
    await run(next(requests(1)))
    measured = Measured()
    permits = asyncio.Semaphore(IN_FLIGHT)

    async def one(request: ImageToVideo) -> None:
        async with permits:
            try:
                measured.delays.note(await run(request))
            except Exception as error:
                measured.failed(error)

    await asyncio.gather(*(one(request) for request in requests(jobs)))
    return measured.result()


async def side(name: str, url: str, jobs: int, per_second: float) -> Result:
    async with AsyncExitStack() as stack:
        if name in PEERS:
            peer = await stack.enter_async_context(PEERS[name](url))
            assert peer.run is not None
            run: Run = peer.run
            return await by_gather(lambda request: run(), jobs)
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir=Path.cwd(), prefix="bench-"))  # /tmp may be memory
        store = SQLiteStore(Path(folder, "jobs.db")) if name == "map, SQLite" else MemoryStore()
        client = Client("sim-key", base_url=url, receiver=WebhookReceiver(port=0), store=store)
        await stack.enter_async_context(client)
        if name != "gather":
            return await by_map(client, jobs, per_second)

        async def of_ours(request: ImageToVideo) -> str:
            return (await client.run(request)).video_url

        return await by_gather(of_ours, jobs)


# --- the tables ------------------------------------------------------------------------------------------------------


def measure(service: LeanService, name: str, jobs: int, takes: float, per_second: float = 0) -> Result:
    service.control("set", takes=takes, callbacks="sent")
    options = ["--side", name, "--url", service.url, "--jobs", str(jobs), "--per-second", str(per_second)]
    ran = subprocess.run([sys.executable, __file__, *options], check=True, stdout=subprocess.PIPE, text=True)
    result: Result = json.loads(ran.stdout)
    counts = service.control("counts")
    called = sum(count for what, count in counts.items() if what.startswith("callback"))
    # The one job before the clock started is in these counts.
    sent = {"POST": counts.get("POST", 0), "callback": called, "GET": counts.get("GET", 0)}
    result["sent"] = {what: max(0, count) / (jobs + 1) for what, count in sent.items()}
    return result


def seen(result: Result) -> list[str]:
    sent = result["sent"]
    delays = ["-" if result[which] is None else f"{result[which]:.1f}" for which in ("p50_ms", "p99_ms")]
    return [
        f"{result['wall_s']:.1f}",
        f"{result['cpu_s']:.1f}",
        f"{result['growth_mib']:.1f}",
        f"{sent['POST']:.2f} + {sent['callback']:.2f} + {sent['GET']:.1f}",
        *delays,
        ", ".join(f"{count} {name}" for name, count in result["errors"].items()) or "-",
    ]


COLUMNS: Final = (
    "wall s", "CPU s", "peak MiB", "POST + callback + GET a job", "done → awaited p50 ms", "p99 ms", "errors",
)  # fmt: skip


def against_peers(service: LeanService, jobs: int, takes: float) -> None:
    names = {
        "map": "client.map",
        "gather": "gather + semaphore, client.run",
        "fal-client": "fal-client: gather + semaphore, subscribe",
        "replicate": "replicate: gather + semaphore, async_wait",
    }
    rows = []
    for name, words in names.items():
        if name in PEERS and installed(name) is None:
            rows.append([f"{words}: not installed", *["-"] * len(COLUMNS)])
            continue
        rows.append([words, *seen(measure(service, name, jobs, takes))])
    show(f"{jobs:,} jobs of {takes:g} s, {IN_FLIGHT} at once", ("side", *COLUMNS), rows)


def memory(service: LeanService, few: int, many: int, takes: float) -> bool:
    rows = []
    found: dict[tuple[str, int], Result] = {}
    for name, jobs in (("map", few), ("map", many), ("map, SQLite", few), ("gather", few)):
        result = found[name, jobs] = measure(service, name, jobs, takes)
        words = "gather + semaphore" if name == "gather" else f"client.{name}Store" if "," in name else "client.map"
        rows.append([f"{words}, {jobs:,} jobs", *seen(result)])
    show(f"Memory: jobs of {takes:g} s, {IN_FLIGHT} at once, the default store", ("side", *COLUMNS), rows)
    small, large = (found["map", jobs]["growth_mib"] for jobs in (few, many))
    sent = found["map", many]["sent"]
    show(
        "Targets of the fan-out",
        ("what", "measured", "target"),
        [
            (f"peak memory growth, {few:,} jobs", f"{small:.1f} MiB", f"<= {TARGET_MIB} MiB"),
            (f"the same of {many:,} jobs, as a multiple", f"{large / (small or 1):.2f}", f"<= {TARGET_GROWTH}"),
            ("POSTs a job", f"{sent['POST']:.2f}", "1"),
            ("callbacks a job", f"{sent['callback']:.2f}", "1"),
            ("GETs a job", f"{sent['GET']:.2f}", "0"),
        ],
    )
    return bool(small <= TARGET_MIB and large <= TARGET_GROWTH * small)


def long_jobs(service: LeanService, jobs: int, takes: float) -> None:
    """How often a job of some length is asked for, where nothing is short of CPU."""
    rows = []
    for name in ("map", "fal-client", "replicate"):
        if name in PEERS and installed(name) is None:
            rows.append([name, "not installed", "-", "-"])
            continue
        sent = measure(service, name, jobs, takes)["sent"]
        rows.append([name, *(f"{sent[what]:.1f}" for what in ("POST", "callback", "GET"))])
    show(f"HTTP requests of one job of {takes:g} s, {jobs} at once", ("side", "POST", "callback", "GET"), rows)


def evenly_paced(service: LeanService, jobs: int) -> bool:
    result = measure(service, "map", jobs, 1.0, per_second=200)
    rows = [(f"p{share}", f"{result[f'p{share}_ms']:.1f} ms", target) for share, target in ((50, ""), (99, "<= 20 ms"))]
    rows.append(("CPU of the client's core", f"{100 * result['cpu_s'] / result['wall_s']:.0f} %", ""))
    show(f"service done → awaited, 200 jobs a second, {jobs:,} jobs", ("what", "measured", "target"), rows)
    return float(result["p99_ms"]) <= TARGET_P99_MS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few seconds, for CI: a look, not a measurement")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument("--jobs", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--per-second", type=float, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        pin(cores()[1])
        print(json.dumps(asyncio.run(side(given.side, given.url, given.jobs, given.per_second))))
        return 0
    quick = given.quick
    with LeanService() as service:
        against_peers(service, 40 if quick else 1000, 0.2 if quick else 2.0)
        if not quick:
            long_jobs(service, 10, 5.0)
        fits = memory(service, *((200, 400) if quick else (10_000, 100_000)), 0.1)
        is_prompt = evenly_paced(service, 100 if quick else 4000)
    return 0 if quick or (fits and is_prompt) else 1


if __name__ == "__main__":
    sys.exit(main())
