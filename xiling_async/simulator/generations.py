"""The automatic life of jobs: work for a time, the end of all tasks, and the callbacks that tell of it."""

import asyncio

from xiling_async.simulator import faults
from xiling_async.simulator.callbacks import CallbackSender
from xiling_async.simulator.creates import Desk
from xiling_async.simulator.jobs import Job
from xiling_async.simulator.ledger import Ledger


class Generations:
    """The jobs that are being worked on."""

    def __init__(self, desk: Desk, sender: CallbackSender, ledger: Ledger) -> None:
        self.running: set[asyncio.Task[None]] = set()
        self._desk = desk
        self._sender = sender
        self._ledger = ledger

    def begin(self, job: Job, answered: asyncio.Event, latency: float) -> asyncio.Task[None]:
        """Work on this job, for so many seconds, once its create was answered."""
        generation = asyncio.create_task(self._generate(job, answered, latency))
        self.running.add(generation)
        generation.add_done_callback(self._ended)
        return generation

    async def stop(self) -> None:
        for generation in self.running:
            generation.cancel()
        await asyncio.gather(*self.running, return_exceptions=True)

    def _ended(self, generation: asyncio.Task[None]) -> None:
        self.running.discard(generation)
        self._ledger.happened()

    async def _generate(self, job: Job, answered: asyncio.Event, latency: float) -> None:
        """Work, progress where asked for, the end of all tasks, callbacks."""
        await answered.wait()
        own = faults.find(job.given, faults.Latency)
        seconds = latency if own is None else own.seconds
        if seconds > 0:
            self._desk.run(job)
            await asyncio.sleep(seconds)
        if faults.find(job.given, faults.ProgressCallback):
            self._desk.run(job)
            for task in job.tasks:
                await self._sender.tell(task, task.status)
        self._desk.end(job)
        await self._sender.tell_ends(job)
