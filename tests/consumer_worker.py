"""The victim of tests/jobs/test_consumer_kill.py: a consumer that writes what it does into a ledger of its own.

Run as a program it is a fork server, as crash_worker.py is: it has imported everything once, and forks a consumer for
each line of JSON that it reads.

    stdin   one order a line (`Order`)
    stdout  a line for each step of the consumer; `forked <pid>` before them, `exit <code>` after them
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import sqlite3
import sys
import traceback
from contextlib import aclosing
from pathlib import Path
from typing import Any, Final

import attrs

from xiling_async import Client, Job, PostgresStore, SQLiteStore, Store
from xiling_async.telemetry.events import Event, JobAcknowledged, JobHandedOver

PROGRAM: Final = Path(__file__)
DWELL_S: Final = 0.003  # at most, between two steps: there it is killed
EARLY_DWELL_S: Final = 0.02  # the same after an early acknowledgement: kills fall there also on a busy machine

# `at`: by the clock of the ledger, whichever process writes. `claimed_at`: just before the store was asked.
LEDGER: Final = """
PRAGMA journal_mode = WAL;
CREATE TABLE steps (
    number INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL DEFAULT ((julianday('now') - 2440587.5) * 86400),
    life TEXT NOT NULL, what TEXT NOT NULL, job_id TEXT, claimed_at REAL
);
CREATE TABLE dealt (job_id TEXT PRIMARY KEY, life TEXT NOT NULL);
"""


class Ledger:
    """What the application itself knows: what it was handed, what it has dealt with, what it has acknowledged."""

    def __init__(self, path: str, life: str) -> None:
        self._life = life
        self.database = sqlite3.connect(path, timeout=30, isolation_level=None)
        self.database.execute("PRAGMA synchronous = OFF")  # the process is killed, not the machine

    def note(self, what: str, job_id: str | None = None, claimed_at: float | None = None) -> None:
        sql = "INSERT INTO steps (life, what, job_id, claimed_at) VALUES (?, ?, ?, ?)"
        self.database.execute(sql, (self._life, what, job_id, claimed_at))

    def deal(self, job_id: str) -> bool:
        """Deal with the end of this job, once; whether it was not dealt with before."""
        sql = "INSERT INTO dealt VALUES (?, ?) ON CONFLICT DO NOTHING"
        return self.database.execute(sql, (job_id, self._life)).rowcount == 1


@attrs.frozen(kw_only=True)
class Order:
    """What a consumer shall do. `store`: a file, or the DSN of a database with `schema`. `acks_first`: the broken
    variant, which acknowledges before it has dealt with a job."""

    store: str
    schema: str
    ledger: str
    lease_s: float
    life: str
    acks_first: bool = False


class Consumer:
    def __init__(self, order: Order) -> None:
        self._order = order
        self._ledger = Ledger(order.ledger, order.life)
        self._claimed_at: dict[str, float] = {}
        self._acknowledged: set[str] = set()
        self._dice = random.Random(order.life)

    def on_event(self, event: Event) -> None:
        if isinstance(event, JobHandedOver):
            self._claimed_at[event.job_id] = event.at
        elif isinstance(event, JobAcknowledged):
            self._acknowledged.add(event.job_id)

    def _step(self, what: str, job_id: str | None = None, claimed_at: float | None = None) -> None:
        self._ledger.note(what, job_id, claimed_at)
        os.write(1, f"{what}\n".encode())

    async def run(self) -> None:
        order = self._order
        store: Store = PostgresStore(order.store, schema=order.schema) if order.schema else SQLiteStore(order.store)
        client = Client("sim-key", base_url="http://127.0.0.1:9/v1", store=store, on_event=self.on_event)
        async with client, aclosing(client.completed(lease=order.lease_s)) as jobs:
            self._step("open")
            async for job in jobs:
                self._step("held", job.id, self._claimed_at.pop(job.id))
                if order.acks_first:
                    await self._acknowledge(job)
                await self._dwell(EARLY_DWELL_S if order.acks_first else DWELL_S)
                self._step("dealt" if self._ledger.deal(job.id) else "known", job.id)
                await self._dwell(DWELL_S)
                if not order.acks_first:
                    await self._acknowledge(job)

    async def _acknowledge(self, job: Job[Any]) -> None:
        await job.ack()
        if job.id in self._acknowledged:  # else another consumer had done so, after the lease
            self._step("acknowledged", job.id)

    async def _dwell(self, most_s: float) -> None:
        await asyncio.sleep(self._dice.random() * most_s)


def _live(line: str) -> int:
    try:
        asyncio.run(Consumer(Order(**json.loads(line))).run())
    except BaseException:
        os.write(1, f"crash {traceback.format_exc()!r}\n".encode())
    return 1


def serve() -> None:
    gc.collect()
    gc.freeze()  # the children's collector does not touch, and so copy, what all of them share
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os._exit(_live(line))
        os.write(1, f"forked {pid}\n".encode())
        _, status = os.waitpid(pid, 0)
        os.write(1, f"exit {os.waitstatus_to_exitcode(status)}\n".encode())


if __name__ == "__main__":
    serve()
