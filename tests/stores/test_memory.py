"""What only the memory store does: it forgets, so that a worker does not grow for weeks."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

from support import callback_body, client_of, model_v, started, token_of

from xiling_async import MemoryStore, WebhookReceiver
from xiling_async.simulator import Simulator, faults


async def test_of_jobs_that_are_over_the_last_are_kept() -> None:
    """Ten of thirty without a key; all with one, all in flight, and all of unknown fate stay."""
    store, receiver = MemoryStore(keep=10), WebhookReceiver(port=0)
    async with Simulator(manual=True) as sim, client_of(sim, store=store, receiver=receiver) as client:
        sim.script(faults.drop_before_read())
        doubtful = await client.submit(model_v())
        pending = await client.submit(model_v())
        keyed = [await client.submit(model_v(), key=f"order-{number}") for number in range(5)]
        plain = [await client.submit(model_v()) for _ in range(30)]
        for job in (*keyed, *plain):
            await sim.finish(job.task_ids[0])
            await job
        assert [await client.find(job.id) is not None for job in plain] == [False] * 20 + [True] * 10
        assert [await client.find(job.task_ids[0]) is not None for job in plain] == [False] * 20 + [True] * 10
        for job in (doubtful, pending, *keyed):
            assert await client.find(job.id) is not None
        assert len(await plain[0]) == 1, "who has the handle has the result"
        url = next(post.callback_url for post in sim.ledger.posts if plain[0].task_ids[0] in post.task_ids)
        reply = await receiver.handle(f"/{token_of(url)}", callback_body(plain[0].task_ids[0]))
        assert reply.status == 200, "a very late repeat is taken in again, and asked about"


async def test_a_worker_does_not_grow() -> None:
    """After a hundred and fifty jobs it holds fifty."""
    store = MemoryStore(keep=50)
    async with Simulator() as sim, client_of(sim, store=store) as client:
        async for done in client.map(model_v(f"waves {number}") for number in range(150)):
            assert done.ok
        assert len([record async for record in store.jobs()]) == 50
        assert sim.ledger.paid_submits == 150


async def test_what_a_consumer_has_not_acknowledged_is_kept() -> None:
    """Thirty jobs without a key in a store that keeps five: with a consumer, five of those that were acknowledged."""
    store = MemoryStore(keep=5)
    async with Simulator() as sim, client_of(sim, store=store) as client:
        async with aclosing(client.completed()) as jobs:
            waiting = await started(anext(jobs))
            ended = [await client.submit(model_v(f"waves {number}")) for number in range(30)]
            await asyncio.gather(*ended)
            first = await waiting
            assert len([record async for record in store.jobs()]) == 30
            await first.ack()
            for _ in range(20):
                await (await anext(jobs)).ack()
        kept = [record async for record in store.jobs()]
        assert len(kept) == 9 + 5
        assert sum(record.handover_at is not None for record in kept) == 9
