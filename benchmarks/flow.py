"""Jobs a second through submit → callback → await, against raw aiohttp doing the same exchange in the same run.

`python benchmarks/flow.py [--quick]`. The service runs in a process of its own; the client's side, ours or raw, has one
process. Rounds alternate; the ratio is the median of those of the rounds, each against the one before it, since a
shared machine is faster now and slower then. The raw side is what one would write by hand without a promise:
post, read the id, resolve a future by task id in a bare handler; no store, no token, no strict form, no retries.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import median

import aiohttp
from aiohttp import web
from attrs import frozen
from report import show
from speed import REQUEST

from xiling_async import Client, WebhookReceiver
from xiling_async._internal.clock import Clock
from xiling_async.api import wire
from xiling_async.models.lifecycle import Verdict
from xiling_async.webhooks.handler import Callbacks
from xiling_async.webhooks.tokens import CallbackToken

CALLERS = 64
Job = Callable[[], Awaitable[object]]


@asynccontextmanager
async def raw(base_url: str) -> AsyncIterator[Job]:
    waiting: dict[str, asyncio.Future[dict[str, object]]] = {}
    early: dict[str, dict[str, object]] = {}

    async def callback(request: web.BaseRequest) -> web.StreamResponse:
        data = json.loads(await request.read())["data"]
        future = waiting.get(data["task_id"])
        if future is None:
            early[data["task_id"]] = data
        else:
            future.set_result(data)
        return web.Response(text="ok")

    runner = web.ServerRunner(web.Server(callback, access_log=None))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    callback_url = f"http://127.0.0.1:{runner.addresses[0][1]}/callback"
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        headers = {"Authorization": "Bearer sim-key"}

        async def job() -> object:
            body = {**REQUEST.fields(), "callback_url": callback_url}
            async with session.post(f"{base_url}/image_to_video", json=body, headers=headers) as answer:
                task_id = (await answer.json())["data"]["task_ids"][0]
            if task_id in early:
                return early.pop(task_id)
            future = waiting[task_id] = asyncio.get_running_loop().create_future()
            data = await future
            del waiting[task_id]
            return data

        yield job
    await runner.cleanup()


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
    """Notes when a callback's body arrived, by the token of its URL's job."""

    def __init__(self) -> None:
        super().__init__(port=0)
        self.received: dict[str, float] = {}

    async def start(
        self, callbacks: Callbacks, clock: Clock, kept_secret: bytes, *, others_may_listen: bool = False
    ) -> None:
        await super().start(_Timed(callbacks, self.received), clock, kept_secret, others_may_listen=others_may_listen)


@asynccontextmanager
async def ours(base_url: str, latencies: list[float]) -> AsyncIterator[Job]:
    receiver = TimedReceiver()
    async with Client("sim-key", base_url=base_url, receiver=receiver) as client:

        async def job() -> object:
            submitted = await client.submit(REQUEST)
            result = await submitted
            latencies.append(time.perf_counter() - receiver.received.pop(submitted.id))
            return result

        yield job


@frozen
class Speed:
    """Of one side in one round."""

    per_second: float
    cpu_us: float  # of this process, a job


async def rate(job: Job, jobs: int) -> Speed:
    """With `CALLERS` at once."""
    left = iter(range(jobs))

    async def caller() -> None:
        for _ in left:
            await job()

    begun, cpu_begun = time.perf_counter(), time.process_time()
    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    return Speed(jobs / (time.perf_counter() - begun), (time.process_time() - cpu_begun) / jobs * 1e6)


async def measure(base_url: str, jobs: int, rounds: int) -> None:
    latencies: list[float] = []
    pairs: list[tuple[Speed, Speed]] = []
    for _ in range(rounds + 1):
        async with raw(base_url) as job:
            raw_speed = await rate(job, jobs)
        latencies.clear()
        async with ours(base_url, latencies) as job:
            pairs.append((raw_speed, await rate(job, jobs)))
    del pairs[0]  # it warmed up
    medians = [
        Speed(median(speed.per_second for speed in side), median(speed.cpu_us for speed in side))
        for side in zip(*pairs, strict=True)
    ]
    by_wall = median(mine.per_second / theirs.per_second for theirs, mine in pairs)
    by_cpu = median(theirs.cpu_us / mine.cpu_us for theirs, mine in pairs)
    latencies.sort()
    p50, p99 = (latencies[int(len(latencies) * share)] * 1000 for share in (0.50, 0.99))
    show(
        f"submit → callback → await, {jobs} jobs, {CALLERS} callers, loopback",
        ("side", "jobs a second", "ratio", "CPU a job", "ratio"),
        [
            (name, f"{speed.per_second:,.0f}", f"{wall:.2f}", f"{speed.cpu_us:.0f} µs", f"{cpu:.2f}")
            for name, speed, wall, cpu in (
                ("raw aiohttp", medians[0], 1.0, 1.0),
                ("xiling_async", medians[1], by_wall, by_cpu),
            )
        ],
    )
    show(
        f"callback's body read → waiter resumed, at full load ({CALLERS} at once)",
        ("p50", "p99"),
        [(f"{p50:.2f} ms", f"{p99:.2f} ms")],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few seconds, for CI: a look, not a measurement")
    quick = parser.parse_args().quick
    service = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("service.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert service.stdout is not None and service.stdin is not None
    base_url = f"http://127.0.0.1:{service.stdout.readline().strip()}"
    try:
        asyncio.run(measure(base_url, jobs=1000 if quick else 4000, rounds=1 if quick else 9))
    finally:
        service.stdin.close()
        service.wait(10)


if __name__ == "__main__":
    main()
