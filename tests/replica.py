"""One replica of three: works through all orders by their keys, takes callbacks of all, may be killed at any moment.

`python replica.py '{...}'`: what it was started with; a line of JSON for each order that came to an end.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from typing import Any

from xiling_async import (
    Client,
    ImageToVideo,
    Limits,
    Polling,
    PostgresOptions,
    PostgresStore,
    StoreError,
    SubmitUncertain,
    TaskFailed,
    Timeouts,
    WebhookReceiver,
)

DOUBT_S = 5.0
PAUSE_S = 0.1  # before what the database could not take is tried again


def order(number: int) -> ImageToVideo:
    return ImageToVideo(
        model="V",
        prompt=f"order {number}",
        image_url="https://example.com/sea.jpg",
        aspect_ratio="16:9",
        aspect_resolution="1080p",
        duration=8,
        generate_count=1 + number % 2,
    )


def say(**told: Any) -> None:
    sys.stdout.write(json.dumps(told) + "\n")
    sys.stdout.flush()


async def work(client: Client, left: set[int], *, keyed: bool, seed: int) -> None:
    """Each order until it came to an end; a key makes it one job however often, and by whomever, it is submitted."""
    numbers = sorted(left)
    random.Random(seed).shuffle(numbers)
    items = ((f"order-{number}", order(number)) if keyed else order(number) for number in numbers)
    async for done in client.map(items, in_flight=50):
        number = numbers[done.index]
        if done.ok or isinstance(done.error, (TaskFailed, SubmitUncertain)):
            left.discard(number)
            say(order=number, end=type(done.error).__name__, results=len(done.results))
        elif not isinstance(done.error, StoreError):
            say(order=number, trouble=repr(done.error))


async def main(given: dict[str, Any]) -> None:
    left = set(range(given["orders"]))
    while left:
        store = PostgresStore(
            given["dsn"], schema=given["schema"], options=PostgresOptions(pool_size=4, heartbeat_s=0.5)
        )
        receiver = WebhookReceiver(given["public_url"], port=given["port"])
        try:
            async with Client(
                "sim-key",
                base_url=given["base_url"],
                receiver=receiver,
                store=store,
                limits=Limits(submits=16, gets_per_second=100),
                timeouts=Timeouts(uncertain=DOUBT_S),
                polling=Polling(every=0.5, grace=2),
            ) as client:
                say(open=True)
                while left:
                    await work(client, left, keyed=given["keyed"], seed=given["seed"])
                    await asyncio.sleep(PAUSE_S)
        except StoreError:
            await asyncio.sleep(PAUSE_S)  # the database is away: open it again
    say(finished=True)


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
