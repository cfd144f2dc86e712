"""What a create and a callback are made of, part by part, for instructions.py: each runs one part so many times.

Whatever a part needs is made here, when this is imported, or costs the same however often the part runs.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import attrs
from lean import callback_request
from speed import REQUEST

from xiling_async import Client, MemoryStore, Polling
from xiling_async._internal.clock import SystemClock
from xiling_async.api import wire
from xiling_async.api.results import Call, Create, CreateResult
from xiling_async.api.transport import Answer
from xiling_async.jobs.callbacks import CallbackApplier
from xiling_async.jobs.job import Job, JobContext
from xiling_async.jobs.poller import PollSchedule
from xiling_async.jobs.registry import Registry
from xiling_async.kinds import ImageToVideo
from xiling_async.models.lifecycle import Accepted
from xiling_async.models.record import JobRecord, State, Succeeded
from xiling_async.models.settings import Timeouts
from xiling_async.webhooks.tokens import SECRET_BYTES, CallbackToken, TokenSigner

MOST = 256  # times that a part runs
NOW = 1_800_000_000.0
JOB_ID = "0123456789abcdef" * 2
TASK_ID = f"i2v-{JOB_ID}"
KIND = ImageToVideo.kind
CLOCK = SystemClock()
SIGNER = TokenSigner([bytes(SECRET_BYTES)], "http://127.0.0.1:8080")
TOKEN = CallbackToken(kind_number=1, tasks=1, job_id=JOB_ID, attempt=1, expires_at=NOW)
URL = SIGNER.sign(TOKEN)
CALLBACK = callback_request(URL, TASK_ID, 1.0).partition(b"\r\n\r\n")[2]
ANSWER = Answer(
    status=200, headers={}, body=b'{"code": 0, "msg": "ok", "data": {"task_ids": ["%b"]}}' % TASK_ID.encode()
)
Part = Callable[[int], object]


def intent(number: int) -> JobRecord:
    return JobRecord(
        id=f"{number:032x}", kind=KIND.name, key=None, request=REQUEST, asked=1, created_at=NOW, changed_at=NOW
    )


CREATE = Create(kind=KIND, request=REQUEST, callback_url=URL, job_id=JOB_ID, asked=1)
CALL = Call(now=NOW, api_key="sim-key")
RESULT = wire.callback(KIND, CALLBACK).outcome


def again(part: Callable[[], object]) -> Part:
    def run(times: int) -> None:
        for _ in range(times):
            part()

    return run


def in_a_loop(part: Callable[[], Awaitable[object]]) -> Part:
    async def run(times: int) -> None:
        for _ in range(times):
            await part()

    return lambda times: asyncio.run(run(times))


def with_jobs(part: Callable[[Registry, int], Coroutine[Any, Any, None]], *, accepted: bool) -> Part:
    """`part` gets a registry that knows `MOST` jobs, and how often it shall do what it does."""

    async def run(times: int) -> None:
        registry = Registry(MemoryStore())
        for number in range(MOST):
            entry = await registry.open(intent(number))
            if accepted:
                await registry.commit(entry.record.id, answered(number))
        await part(registry, times)

    return lambda times: asyncio.run(run(times))


def answered(number: int) -> Accepted:
    return Accepted(attempt=1, at=NOW, task_ids=(f"task-{number}",), due_at=NOW)


async def write_answers(registry: Registry, times: int) -> None:
    for number in range(times):
        await registry.commit(f"{number:032x}", answered(number))


async def settle(registry: Registry, times: int) -> None:
    schedule = PollSchedule(CLOCK, Polling(), random.Random(), has_receiver=True)
    callbacks = CallbackApplier(registry=registry, schedule=schedule, only_wakes=False)
    assert isinstance(RESULT, Succeeded)
    for number in range(times):
        token = CallbackToken(kind_number=1, tasks=1, job_id=f"{number:032x}", attempt=1, expires_at=NOW)
        told = Succeeded(f"task-{number}", RESULT.result)
        await callbacks.apply(token, wire.Report(task_id=told.task_id, outcome=told))


async def wake(registry: Registry, times: int) -> None:
    client = Client("a-key", base_url="http://127.0.0.1:9")
    engine = client._engine
    context = JobContext(
        registry=registry, clock=CLOCK, timeouts=Timeouts(), poller=engine.poller, consumers=engine.consumers
    )
    entries = [registry.entry_of(intent(number)) for number in range(MOST)]
    for entry in entries:
        entry.is_current = True
        entry.update(intent(0).next_version(state=State.ACCEPTED))
    waiters = [asyncio.create_task(Job[Any](entry, context).result()) for entry in entries]
    await asyncio.sleep(0)
    done = attrs.evolve(intent(0), state=State.DONE, outcomes=(RESULT,), version=99)
    for entry, waiter in list(zip(entries, waiters, strict=True))[:times]:
        entry.update(done)
        await waiter
    os._exit(0)  # to send the others home would be counted, too


async def _in_time() -> None:
    async with CLOCK.timeout(60):
        pass


def _open(times: int) -> None:
    async def run() -> None:
        registry = Registry(MemoryStore())
        for number in range(times):
            await registry.open(intent(number))

    asyncio.run(run())


PARTS: dict[str, Part] = {
    "create: look for local files": again(REQUEST.local_files),
    "create: the intent, written": _open,
    "create: the callback URL, signed": again(lambda: SIGNER.sign(TOKEN)),
    "create: the body": again(lambda: wire.create_body(REQUEST, URL)),
    "create: a timeout": in_a_loop(_in_time),
    "create: the answer, read strictly": again(lambda: CreateResult.from_response(ANSWER, CREATE, CALL)),
    "create: the answer, written": with_jobs(write_answers, accepted=False),
    "callback: the token, checked": again(lambda: SIGNER.verify(URL[-80:], NOW)),
    "callback: the body, read strictly": again(lambda: wire.callback(KIND, CALLBACK)),
    "callback: settled": with_jobs(settle, accepted=True),
    "callback: its waiter, resumed": with_jobs(wake, accepted=True),
}
