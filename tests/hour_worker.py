"""An hour of a worker that does a bit of everything, in virtual time: what it holds is told every twenty minutes.

`python hour_worker.py '{...}'`: what it was started with; a line of JSON for each time that it looked at itself.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import json
import sys
import threading
import tracemalloc
from contextlib import aclosing
from pathlib import Path
from typing import Any, Final

from xiling_async import Client, ImageToVideo, SQLiteStore, Timeouts, WebhookReceiver
from xiling_async.testing.clock import ManualClock

MINUTES: Final = 60
STEP_S: Final = 5.0  # of the virtual clock
PAUSE_S: Final = 0.002  # real time for what a step of the clock has begun
QUIET_S: Final = 0.2  # real time after which nothing is under way any more
PURGE_EVERY: Final = 10  # minutes; what ended longer ago is forgotten
MEASURE_EVERY: Final = 20


def order(prompt: str) -> ImageToVideo:
    return ImageToVideo(
        model="V",
        prompt=prompt,
        image_url="https://example.com/sea.jpg",
        aspect_ratio="16:9",
        aspect_resolution="1080p",
        duration=8,
    )


class Worker:
    """`per_minute`: orders that are submitted one by one, and as many again in a map."""

    def __init__(self, client: Client, clock: ManualClock, per_minute: int) -> None:
        self.client = client
        self.clock = clock
        self.per_minute = per_minute
        self.dropped: set[str] = set()  # handed over, and not acknowledged the first time
        self.handed_over = 0

    async def consume(self) -> None:
        """Every tenth job is dropped; when it is handed over again after its lease, it is acknowledged."""
        async with aclosing(self.client.completed(lease=120)) as jobs:
            async for job in jobs:
                self.handed_over += 1
                if self.handed_over % 10 or job.id in self.dropped:
                    self.dropped.discard(job.id)
                    await job.ack()
                else:
                    self.dropped.add(job.id)

    async def submit(self, minute: int) -> None:
        """One fails, of one the callback is lost: the poller finds its end some minutes later."""
        for number in range(self.per_minute):
            what = {0: " [sim:failed]", 1: " [sim:lost_callback]"}.get(number, "")
            key = f"order-{minute}-{number}"
            await self.client.submit(order(f"boat{what}"), key=key, metadata={"minute": str(minute)})

    async def fan_out(self, minute: int) -> None:
        """One fails, and so does its retry."""
        items = ((f"map-{minute}-{number}", order("waves" if number else "waves [sim:failed]")) for number in
                 range(self.per_minute))  # fmt: skip
        async with aclosing(self.client.map(items, in_flight=4, retries=1)) as results:
            async for _ in results:
                pass

    async def minute(self, minute: int) -> None:
        await asyncio.gather(self.submit(minute), self.fan_out(minute))
        for _ in range(int(60 / STEP_S)):
            self.clock.advance(STEP_S)
            await asyncio.sleep(PAUSE_S)


def held(folder: Path, rows: int) -> dict[str, int]:
    """What the process holds now. Caches with a limit are emptied first: aiohttp and yarl keep the URLs of GETs."""
    cache_type = type(functools.lru_cache(len))
    for cache in [each for each in gc.get_objects() if type(each) is cache_type]:
        if cache.cache_info().maxsize is not None:
            cache.cache_clear()
    gc.collect()
    return {
        "memory": tracemalloc.get_traced_memory()[0],
        "descriptors": len(list(Path("/proc/self/fd").iterdir())),
        "tasks": len(asyncio.all_tasks()),
        "threads": threading.active_count(),
        "rows": rows,
        "file": (folder / "jobs.db").stat().st_size,
    }


async def main(given: dict[str, Any]) -> None:
    folder, clock = Path(given["folder"]), ManualClock()
    async with Client(
        "sim-key",
        base_url=given["base_url"],
        receiver=WebhookReceiver(port=0),
        store=SQLiteStore(folder / "jobs.db"),
        timeouts=Timeouts(wait=600),  # a `ManualClock` keeps the timer of a wait that is over until its time
        clock=clock,
    ) as client:
        worker = Worker(client, clock, given["per_minute"])
        consumer = asyncio.create_task(worker.consume())
        for minute in range(1, MINUTES + 1):
            await worker.minute(minute)
            if minute % PURGE_EVERY == 0:
                await client.purge(older_than=PURGE_EVERY * 60)
            if minute % MEASURE_EVERY == 0:
                await asyncio.sleep(QUIET_S)
                rows = [job.state async for job in client.jobs()]
                told = {"minute": minute, **held(folder, len(rows)), **client.stats().handover}
                sys.stdout.write(json.dumps(told) + "\n")
                sys.stdout.flush()
        consumer.cancel()
        await asyncio.wait([consumer])


if __name__ == "__main__":
    tracemalloc.start()
    asyncio.run(main(json.loads(sys.argv[1])))
