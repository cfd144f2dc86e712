"""What a command knows of its jobs: by the client's events, and from its store."""

from __future__ import annotations

import asyncio

from support import client_of, model_v

from xiling_async import MemoryStore, State, WebhookReceiver
from xiling_async.cli.watch import Watch
from xiling_async.models.record import JobRecord
from xiling_async.simulator import Simulator


class SlowStore(MemoryStore):
    """Reading a job waits until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.let_go = asyncio.Event()
        self.is_slow = False

    async def get(self, job_id: str) -> JobRecord | None:
        if self.is_slow:
            await self.let_go.wait()
        return await super().get(job_id)


async def test_what_another_one_is_reading_is_waited_for(sim: Simulator) -> None:
    """The display reads a job that is over; the command that refreshes meanwhile sees its results all the same."""
    store = SlowStore()
    watch = Watch(store)
    async with client_of(sim, store=store, receiver=WebhookReceiver(port=0), on_event=watch.on_event) as client:
        job = await client.submit(model_v())
        await job
        store.is_slow = True
        display, command = asyncio.create_task(watch.refresh()), asyncio.create_task(watch.refresh())
        await asyncio.sleep(0)
        store.let_go.set()
        await command
        assert watch.jobs[job.id].state is State.DONE
        assert None not in watch.jobs[job.id].outcomes
        await display
