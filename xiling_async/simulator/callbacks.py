"""Jobs that are worked on, and their callbacks: as many, as often and as badly as the faults want."""

import asyncio

import aiohttp
from yarl import URL

from xiling_async.simulator import faults
from xiling_async.simulator.creates import Creates, Job, Task, callback_body
from xiling_async.simulator.ledger import CallbackRecord, Ledger

AT_ONCE = 64  # callbacks under way at the same time


class CallbackSender:
    """POSTs callbacks and writes each one down."""

    def __init__(self, origin: str, ledger: Ledger, timeout: float) -> None:
        self._origin = origin
        self._ledger = ledger
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),  # the semaphore bounds it
            timeout=aiohttp.ClientTimeout(total=timeout),
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def close(self) -> None:
        await self._session.close()

    async def tell(self, task: Task, state: str) -> int | None:
        """Report this state as the job's faults want it; the receiver's last answer, None without one."""
        given = task.job.given
        if faults.find(given, faults.LostCallback):
            return None
        duplicate = faults.find(given, faults.DuplicateCallback)
        retry = faults.find(given, faults.CallbackRetry)
        answered: int | None = None
        for _ in range(duplicate.times if duplicate else 1):
            for _ in range(1 + (retry.times if retry else 0)):
                answered = await self.send(task, state)
                if answered is not None and 200 <= answered < 300:
                    break
        return answered

    async def tell_end(self, task: Task) -> int | None:
        """Report the end of a task; what follows it out of order does not change the answer."""
        answered = await self.tell(task, task.status)
        if faults.find(task.job.given, faults.OutOfOrder):
            await self.tell(task, task.job.kind.running)
        return answered

    async def tell_ends(self, job: Job) -> None:
        """Report the end of every task, one after the other."""
        backwards = faults.find(job.given, faults.OutOfOrder) is not None
        for task in reversed(job.tasks) if backwards else job.tasks:
            await self.tell_end(task)

    async def send(self, task: Task, state: str) -> int | None:
        """One callback, once: the receiver's HTTP status, None when there is no receiver or no answer."""
        url = task.job.callback_url
        if url is None:
            return None
        async with self._slots:
            task.callbacks += 1
            attempt = task.callbacks
            answered = await self._post(url, callback_body(task, self._origin, state))
        self._ledger.callback(CallbackRecord(task.id, url, state, answered, attempt))
        return answered

    async def _post(self, url: str, body: bytes) -> int | None:
        try:
            # encoded=True: the path of the URL is the receiver's secret, and arrives as it was given.
            async with self._session.post(
                URL(url, encoded=True),
                data=body,
                headers={"Content-Type": "application/json"},
                allow_redirects=False,
            ) as response:
                await response.read()
                return response.status
        except (aiohttp.ClientError, TimeoutError, ValueError):
            return None


class Generations:
    """The jobs that are being worked on."""

    def __init__(self, creates: Creates, sender: CallbackSender, ledger: Ledger) -> None:
        self.running: set[asyncio.Task[None]] = set()
        self._creates = creates
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
            self._creates.run(job)
            await asyncio.sleep(seconds)
        if faults.find(job.given, faults.ProgressCallback):
            self._creates.run(job)
            for task in job.tasks:
                await self._sender.tell(task, task.status)
        self._creates.end(job)
        await self._sender.tell_ends(job)
