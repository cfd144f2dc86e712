"""Jobs in progress and their callbacks, with the faults of their scripts."""

import asyncio

import aiohttp
from yarl import URL

from xiling_async.simulator import faults
from xiling_async.simulator.creates import Creates
from xiling_async.simulator.ledger import CallbackRecord, Ledger
from xiling_async.simulator.tasks import Job, Task

CONCURRENT_CALLBACKS = 64


class Generations:
    """The jobs in progress; sends their callbacks."""

    def __init__(self, creates: Creates, ledger: Ledger, origin: str, callback_timeout: float) -> None:
        self.running: set[asyncio.Task[None]] = set()
        self._creates = creates
        self._ledger = ledger
        self._origin = origin
        self._slots = asyncio.Semaphore(CONCURRENT_CALLBACKS)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),  # the semaphore is the limit
            timeout=aiohttp.ClientTimeout(total=callback_timeout),
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    def begin(self, job: Job, answered: asyncio.Event, latency: float) -> asyncio.Task[None]:
        """Start this job once its create was answered; it takes `latency` seconds."""
        generation = asyncio.create_task(self._generate(job, answered, latency))
        self.running.add(generation)
        generation.add_done_callback(self._ended)
        return generation

    async def stop(self) -> None:
        for generation in self.running:
            generation.cancel()
        await asyncio.gather(*self.running, return_exceptions=True)

    async def close(self) -> None:
        await self._session.close()

    def _ended(self, generation: asyncio.Task[None]) -> None:
        self.running.discard(generation)
        self._ledger.happened()

    async def _generate(self, job: Job, answered: asyncio.Event, latency: float) -> None:
        await answered.wait()
        scripted = job.fault(faults.latency)
        seconds = latency if scripted is None else scripted.seconds
        if seconds > 0:
            self._creates.start(job)
            await asyncio.sleep(seconds)
        if job.fault(faults.progress_callback):
            self._creates.start(job)
            for task in job.tasks:
                await self.report(task, task.status)
        self._creates.end(job)
        for task in reversed(job.tasks) if job.fault(faults.out_of_order) else job.tasks:
            await self.report_end(task)

    async def report_end(self, task: Task) -> int | None:
        """Report the current status as the end; out of order, a stale report follows. Returns as `report`."""
        status = await self.report(task, task.status)
        if task.job.fault(faults.out_of_order):
            await self.report(task, task.job.kind.running_status)
        return status

    async def report(self, task: Task, state: str) -> int | None:
        """Call back as often as the script says; the last HTTP status, None without an answer."""
        if task.job.fault(faults.lost_callback):
            return None
        duplicate = task.job.fault(faults.duplicate_callback)
        retry = task.job.fault(faults.callback_retry)
        status: int | None = None
        for _ in range(duplicate.times if duplicate else 1):
            for _ in range(1 + (retry.times if retry else 0)):
                status = await self.send(task, state)
                if status is not None and 200 <= status < 300:
                    break
        return status

    async def send(self, task: Task, state: str) -> int | None:
        """One callback: the receiver's HTTP status, None without a receiver or an answer."""
        url = task.job.callback_url
        if url is None:
            return None
        async with self._slots:
            task.callbacks += 1
            attempt = task.callbacks
            status = await self._post(url, task.callback_body(self._origin, state))
        self._ledger.callback(CallbackRecord(task.id, url, state, status, attempt))
        return status

    async def _post(self, url: str, body: bytes) -> int | None:
        try:
            async with self._session.post(
                URL(url, encoded=True),  # the path is the receiver's secret: unchanged
                data=body,
                headers={"Content-Type": "application/json"},
                allow_redirects=False,
            ) as response:
                await response.read()
                return response.status
        except (aiohttp.ClientError, TimeoutError, ValueError):
            return None
