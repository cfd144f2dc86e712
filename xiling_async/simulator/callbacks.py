"""The callback sender: tells the receiver what became of a task, as often and as badly as the faults want."""

import asyncio

import aiohttp
from yarl import URL

from xiling_async.simulator import faults
from xiling_async.simulator.jobs import Job, Task, callback_body
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
