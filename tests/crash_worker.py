"""The victim: a process that buys jobs with a durable store, awaits them, and can be killed at any step.

Run as a program it is a fork server: it has imported everything once, and forks a worker for each order it reads, so
that a run costs milliseconds. It has no loop and no thread, so that it may fork.

    stdin   one order a line, as JSON (`Order`)
    stdout  one line for each step of the worker, then `exit`: see `Voice`
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import sqlite3
import sys
import traceback
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import attrs

from xiling_async import (
    Client,
    ImageToVideo,
    Job,
    Limits,
    Polling,
    SQLiteStore,
    Succeeded,
    Timeouts,
    Video,
    WebhookReceiver,
    XilingError,
)
from xiling_async.models.lifecycle import Change, Event, OutcomeReported
from xiling_async.models.query import ALL_JOBS, JobQuery
from xiling_async.models.record import JobRecord, State
from xiling_async.stores.base import HandedOver, Store, Watcher


@attrs.frozen(kw_only=True)
class Order:
    """What a worker shall do. `jobs`: key, prompt, number of outputs.

    `dies`: where it kills itself: before or after the n-th step of a name (`FatalStore`), or before the n-th SQL
    statement ("at sql 17"); empty for never. `writes_late`: the broken variant, whose intent is not durable.
    """

    base_url: str
    api_key: str
    db: str
    port: int
    results: str
    jobs: list[tuple[str, str, int]]
    dies: str = ""
    writes_late: bool = False


class Voice:
    """What the worker says: to the one who watches it, and (`write`) to the file where its user keeps results."""

    def __init__(self, results: str) -> None:
        self._file = os.open(results, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def say(self, what: str, **known: object) -> None:
        os.write(1, json.dumps({"said": what, **known}).encode() + b"\n")

    def write(self, what: str, **known: object) -> None:
        """One system call: it is in the file, whole, when this returns."""
        os.write(self._file, json.dumps({"said": what, **known}).encode() + b"\n")
        self.say(what, **known)

    def die(self, where: str) -> None:
        self.say("fired", where=where)
        os.kill(os.getpid(), signal.SIGKILL)


class FatalStore:
    """A store that says what it does, and kills its own process before or after a named step.

    Steps are called `open`, `secret`, `recover_orphans`, `add`, and by the event for changes (an `OutcomeReported`
    with an outcome is an `Outcome`): `dies="before Accepted 1"`.
    """

    def __init__(self, inner: Store, voice: Voice, dies: str) -> None:
        self._inner = inner
        self._voice = voice
        self._when, self._what, number = dies.split() if dies else ("", "", "0")
        self._left = int(number)

    def _reach(self, when: str, what: str) -> None:
        self._voice.say("step", step=f"{when} {what}")
        if (when, what) == (self._when, self._what):
            self._left -= 1
            if self._left == 0:
                self._voice.die(f"{when} {what}")

    async def open(self) -> None:
        self._reach("before", "open")
        await self._inner.open()
        self._reach("after", "open")

    async def close(self) -> None:
        await self._inner.close()

    @property
    def is_shared(self) -> bool:
        return self._inner.is_shared

    def listen(self, watcher: Watcher) -> None:
        self._inner.listen(watcher)

    async def secret(self, fresh: bytes) -> bytes:
        self._reach("before", "secret")
        kept = await self._inner.secret(fresh)
        self._reach("after", "secret")
        return kept

    async def add(self, record: JobRecord) -> JobRecord:
        self._reach("before", "add")
        held = await self._inner.add(record)
        self._reach("after", "add")
        return held

    async def change(self, job_id: str, event: Event) -> Change:
        is_outcome = isinstance(event, OutcomeReported) and event.outcome is not None
        name = "Outcome" if is_outcome else type(event).__name__
        self._reach("before", name)
        change = await self._inner.change(job_id, event)
        self._reach("after", name)
        return change

    async def recover_orphans(self, now: float, *, doubt_s: float, per_second: float) -> int:
        self._reach("before", "recover_orphans")
        count = await self._inner.recover_orphans(now, doubt_s=doubt_s, per_second=per_second)
        self._reach("after", "recover_orphans")
        return count

    async def get(self, job_id: str) -> JobRecord | None:
        return await self._inner.get(job_id)

    async def by_key(self, key: str) -> JobRecord | None:
        return await self._inner.by_key(key)

    async def by_task(self, task_id: str) -> JobRecord | None:
        return await self._inner.by_task(task_id)

    def unfinished(self) -> AsyncIterator[JobRecord]:
        return self._inner.unfinished()

    def jobs(self, query: JobQuery = ALL_JOBS) -> AsyncIterator[JobRecord]:
        return self._inner.jobs(query)

    def unsaved(self, since: float) -> AsyncIterator[JobRecord]:
        return self._inner.unsaved(since)

    async def hand_over(self, now: float, *, lease_s: float) -> HandedOver | None:
        return await self._inner.hand_over(now, lease_s=lease_s)

    async def next_handover(self, now: float) -> float | None:
        return await self._inner.next_handover(now)

    async def claim(self, now: float, *, limit: int, lease_s: float) -> list[JobRecord]:
        return await self._inner.claim(now, limit=limit, lease_s=lease_s)

    async def next_due(self) -> float | None:
        return await self._inner.next_due()

    async def purge(self, older_than: timedelta | float, *, now: float | None = None) -> int:
        return await self._inner.purge(older_than, now=now)


class LateStore(SQLiteStore):
    """The negative control: an intent is kept in memory until something is known of its POST, as most clients do."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._intents: dict[str, JobRecord] = {}

    async def add(self, record: JobRecord) -> JobRecord:
        held = None if record.key is None else await self.by_key(record.key)
        return held or self._intents.setdefault(record.id, record)

    async def change(self, job_id: str, event: Event) -> Change:
        if job_id in self._intents:
            await super().add(self._intents.pop(job_id))
        return await super().change(job_id, event)

    async def get(self, job_id: str) -> JobRecord | None:
        return self._intents.get(job_id) or await super().get(job_id)

    async def by_key(self, key: str) -> JobRecord | None:
        late = [record for record in self._intents.values() if record.key == key]
        return late[0] if late else await super().by_key(key)


def _fatal_connection(voice: Voice, at: int) -> type[sqlite3.Connection]:
    """A connection that kills its process before the statement of this number (from 1, of this process)."""
    statements = iter(range(1, at + 1))

    def count(statement: str) -> None:
        if next(statements, 0) == at:
            voice.die(f"sql {at}: {statement.split()[0]}")

    class FatalConnection(sqlite3.Connection):
        def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
            count(sql)
            return super().execute(sql, *values)

        def executemany(self, sql: str, *values: Any) -> sqlite3.Cursor:
            count(sql)
            return super().executemany(sql, *values)

        def executescript(self, sql: str) -> sqlite3.Cursor:
            count(sql)
            return super().executescript(sql)

    return FatalConnection


def _store(order: Order, voice: Voice) -> Store:
    if order.writes_late:
        return FatalStore(LateStore(order.db), voice, order.dies)
    if order.dies.startswith("at sql "):
        factory = _fatal_connection(voice, int(order.dies.split()[-1]))
        return SQLiteStore(
            order.db, connect=lambda *given, **options: sqlite3.connect(*given, factory=factory, **options)
        )
    return FatalStore(SQLiteStore(order.db), voice, order.dies)


# --- the worker ------------------------------------------------------------------------------------------------------


def request_of(prompt: str, count: int) -> ImageToVideo:
    return ImageToVideo(
        model="V",
        prompt=prompt,
        image_url="https://example.com/sea.jpg",
        aspect_ratio="16:9",
        aspect_resolution="1080p",
        duration=8,
        generate_count=count,
    )


def _told(outcomes: tuple[Any, ...]) -> list[tuple[str, str]]:
    """Each outcome as task id and what it holds; the result's own id and URL prove whose result it is."""
    told = []
    for outcome in outcomes:
        if isinstance(outcome, Succeeded):
            video = outcome.result
            own = video.task_id == outcome.task_id and outcome.task_id in video.video_url
            told.append((outcome.task_id, "SUCCEEDED" if own else "MIXED UP"))
        elif outcome is not None:
            told.append((outcome.task_id, "FAILED"))
    return told


async def _buy_and_await(client: Client, voice: Voice, key: str, prompt: str, count: int) -> Job[Video] | None:
    try:
        job = await client.submit(request_of(prompt, count), key=key)
        voice.write("bought", key=key, state=job.state, ids=job.task_ids, wanted=count)
        if job.state is State.UNCERTAIN:
            voice.say("uncertain", key=key)
        outcomes = await job.outcomes(float("inf"))
        voice.write("ended", key=key, outcomes=_told(outcomes))
    except XilingError as error:
        voice.write("refused", key=key, error=type(error).__name__, charged=error.charged)
    return None


async def work(order: Order) -> None:
    """Buy and await until all is told and somebody says that it is enough (SIGTERM); then say what is left open."""
    voice = Voice(order.results)
    enough = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, enough.set)
    store = _store(order, voice)
    async with Client(
        order.api_key,
        base_url=order.base_url,
        receiver=WebhookReceiver(f"http://127.0.0.1:{order.port}", port=order.port),
        store=store,
        limits=Limits(gets_per_second=2000),
        polling=Polling(every=0.04, grace=0.1),
        timeouts=Timeouts(uncertain=3600),
    ) as client:
        voice.say("open")
        users = [asyncio.create_task(_buy_and_await(client, voice, *job)) for job in order.jobs]
        await enough.wait()
        for (key, _, _), user in zip(order.jobs, users, strict=True):
            if not user.done():
                record = await store.by_key(key)
                assert record is not None, "a submit that was not answered yet"
                outcomes = _told(tuple(record.outcomes))
                voice.write("left", key=key, state=record.state, ids=record.task_ids, outcomes=outcomes)
                user.cancel()
        await asyncio.gather(*users, return_exceptions=True)


# --- the fork server -------------------------------------------------------------------------------------------------


def _worker(line: str) -> int:
    try:
        given = json.loads(line)
        asyncio.run(work(Order(**{**given, "jobs": [tuple(job) for job in given["jobs"]]})))
    except BaseException:
        os.write(1, json.dumps({"said": "crash", "trace": traceback.format_exc()}).encode() + b"\n")
        return 1
    return 0


def serve() -> None:
    gc.collect()
    gc.freeze()  # the children's collector does not touch, and so copy, what all of them share
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os._exit(_worker(line))
        os.write(1, json.dumps({"said": "forked", "pid": pid}).encode() + b"\n")
        _, status = os.waitpid(pid, 0)
        os.write(1, json.dumps({"said": "exit", "code": os.waitstatus_to_exitcode(status)}).encode() + b"\n")


PROGRAM = Path(__file__)

if __name__ == "__main__":
    serve()
