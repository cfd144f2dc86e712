"""A store in a PostgreSQL database, for any number of processes: what one of them writes, the others hear of."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
from collections.abc import AsyncIterator, Mapping
from datetime import timedelta
from functools import partial
from typing import Any, Final, TypeVar
from weakref import WeakValueDictionary

from xiling_async._internal.clock import SystemClock
from xiling_async.errors import ConfigurationError, StoreError
from xiling_async.models.lifecycle import Change, Event, Resent, Verdict
from xiling_async.models.record import JobRecord
from xiling_async.stores.base import Watcher, seconds
from xiling_async.stores.postgres.driver import LONG_S, POOLER, Address, Driver, Work
from xiling_async.stores.postgres.listener import Line
from xiling_async.stores.postgres.queries import PgRows
from xiling_async.stores.postgres.schema import Connection, Unfit, is_prefix, is_schema, prepare

T = TypeVar("T")

LEAVE_S: Final = 3.0  # a database that is away does not keep a client from closing
BEATS: Final = 6  # so many heartbeats without a sign of life, and an owner counts as dead


class PostgresStore:
    """Remembers jobs in a PostgreSQL database (11 or newer, UTF8), for any number of processes at once: a key is one
    job for all of them, each may take the callbacks of all, and who waits is woken by whoever heard of it.

    `dsn`: `postgresql://user:password@host:port/database?sslmode=verify-full`. `schema`: made if it is missing; None:
    the first of the search path. `table_prefix`: letters, digits, `_`. `pool_size`: connections; one more listens.
    `heartbeat_s`: how often an open store shows that it lives; after six without a sign, what it was sending becomes
    uncertain, and is never sent again. `migrate`: whether it may make and change tables. `connect`: more arguments for
    `asyncpg.connect` (`ssl`, `timeout`, `command_timeout`, ...).

    Behind a pooler in session mode there is nothing to do. In transaction mode a pooler loses notifications and may
    lose prepared statements: give `listen_dsn`, a way to the same database that does not go through it, and
    `connect={"statement_cache_size": 0}`.
    """

    is_shared: bool = True

    def __init__(
        self,
        dsn: str,
        *,
        schema: str | None = None,
        table_prefix: str = "xiling_",
        pool_size: int = 8,
        heartbeat_s: float = 5.0,
        migrate: bool = True,
        listen_dsn: str | None = None,
        connect: Mapping[str, Any] | None = None,
    ) -> None:
        self._address = Address(dsn)
        listen = self._address if listen_dsn is None else Address(listen_dsn)
        if schema is not None and not is_schema(schema):
            raise ConfigurationError(f"schema must be a name of 1 to 63 bytes, not {schema!r}.")
        if not is_prefix(table_prefix):
            raise ConfigurationError(f"table_prefix must be at most 40 letters, digits and _, not {table_prefix!r}.")
        if not isinstance(pool_size, int) or pool_size < 1 or not heartbeat_s > 0:
            raise ConfigurationError("pool_size must be a number from 1, heartbeat_s one above 0.")
        self._schema = schema
        self._prefix = table_prefix
        self._heartbeat_s = heartbeat_s
        self._may_migrate = migrate
        self._owner = secrets.token_hex(8)
        self._driver = Driver(self._address, listen, pool_size=pool_size, options=connect or {})
        self._clock = SystemClock()
        self._is_open = False
        self._rows: PgRows | None = None
        self._line: Line | None = None
        self._watcher: Watcher | None = None
        self._doubt_s: float | None = None  # known once the client has taken over
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._orphans: set[str] = set()  # being sent as the table has it, and not in hand at the last heartbeat
        self._unsent: dict[str, str] = {}  # intents whose COMMIT was not answered, with their marks

    def __repr__(self) -> str:
        return f"<PostgresStore {self._address.name.removeprefix('PostgreSQL at ')}>"

    # --- life ----------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        self._driver.check_process()
        if self._is_open:
            raise StoreError(f"{self._address.name} is in use by another client of this process: share the client "
                             "instead, or give each a store. Nothing was sent.")  # fmt: skip
        self._is_open, self._doubt_s = True, None
        try:
            await self._opened()
        except BaseException as error:
            await self._let_go()
            if isinstance(error, Exception):
                raise self._driver.refused(error) from error
            raise

    async def _opened(self) -> None:
        await self._driver.open()
        names = await self._driver.run(
            lambda connection: prepare(connection, self._schema, self._prefix, may_migrate=self._may_migrate),
            limit_s=LONG_S,
        )
        self._rows = rows = PgRows(names, self._owner)
        self._line = line = Line(
            connect=self._driver.line,
            beat=self._beat,
            read=rows.many,
            why=self._driver.why,
            channel=names.channel,
            heartbeat_s=self._heartbeat_s,
            hello_s=self._driver.connect_s,
        )
        line.watcher = self._watcher
        await line.open()
        greeting = secrets.token_hex(8)
        await self._driver.run(lambda connection: rows.greet(connection, greeting))
        if not await line.has_heard(greeting):
            raise Unfit(f"its notifications do not arrive; {POOLER}")

    async def close(self) -> None:
        rows = self._rows
        if rows is not None and self._driver.is_ours:
            with contextlib.suppress(StoreError):  # if it is away: we are dead to the others soon, which is the same
                await self._driver.run(rows.leave, limit_s=LEAVE_S)
        await self._let_go()

    async def _let_go(self) -> None:
        self._rows = self._watcher = None
        line, self._line = self._line, None
        try:
            if line is not None and self._driver.is_ours:
                await line.close()
        finally:
            await self._driver.close()
            self._is_open = False

    def listen(self, watcher: Watcher) -> None:
        self._watcher = watcher
        if self._line is not None:
            self._line.watcher = watcher

    async def _beat(self, connection: Connection) -> None:
        """On the line, in autocommit: what it comes to is the same however often it is done."""
        rows = self._table
        place = f"process {os.getpid()} on {socket.gethostname()}"
        await rows.beat(connection, place, BEATS * self._heartbeat_s)
        for job_id, mark in tuple(self._unsent.items()):
            await rows.take_back(connection, job_id, mark, self._clock.time())
            self._unsent.pop(job_id, None)
        if self._doubt_s is not None:
            await rows.bury(connection, self._clock.time(), self._doubt_s, mine=False)
            await self._doubt_orphans(connection, self._doubt_s)

    async def _doubt_orphans(self, connection: Connection, doubt_s: float) -> None:
        """A job that the table has as being sent by this store, and that no submit has in hand at two heartbeats in a
        row, was left by a submit that broke off or by a COMMIT that landed late: it becomes uncertain."""
        orphans = await self._table.sending_here(connection) - self._in_hand()
        doubted, self._orphans = orphans & self._orphans, orphans
        if doubted:
            await self._table.doubt(connection, doubted, self._clock.time(), doubt_s)

    def _in_hand(self) -> frozenset[str]:
        return frozenset() if self._watcher is None else self._watcher.in_hand()

    @property
    def _table(self) -> PgRows:
        if self._rows is None:
            self._driver.check_process()
            raise StoreError(f"{self._address.name} is not open.")
        return self._rows

    # --- what base.py promises -----------------------------------------------------------------------------------

    async def secret(self, fresh: bytes) -> bytes:
        rows = self._table
        return await self._driver.run(lambda connection: rows.secret(connection, fresh))

    async def add(self, record: JobRecord) -> JobRecord:
        rows, mark = self._table, secrets.token_hex(8)
        return await self._intend(record.id, mark, lambda connection: rows.add(connection, record, mark))

    async def change(self, job_id: str, event: Event) -> Change:
        rows, mark = self._table, secrets.token_hex(8)
        before: Change | None = None  # what the last try came to, if only its COMMIT failed
        looks = False

        async def work(connection: Connection) -> Change:
            nonlocal looks, before
            looked, looks = looks, True  # a second try has a reason
            change = await rows.change(connection, job_id, event, mark, looks=looked)
            if before is not None and change.verdict is Verdict.APPLIED:
                change = Change(change.verdict, change.record, before.was)
            before = change
            return change

        async with self._turn(job_id):
            return await (self._intend(job_id, mark, work) if isinstance(event, Resent) else self._driver.run(work))

    @contextlib.asynccontextmanager
    async def _turn(self, job_id: str) -> AsyncIterator[None]:
        """One change of a job at a time in this process, as they were asked for: else each would hold a connection of
        the pool while it waits for the row."""
        turn = self._turns.setdefault(job_id, asyncio.Lock())
        try:
            async with self._clock.timeout(self._driver.queue_s):
                await turn.acquire()
        except TimeoutError as error:
            raise self._driver.failed(error) from error
        try:
            yield
        finally:
            turn.release()

    async def _intend(self, job_id: str, mark: str, work: Work[T]) -> T:
        """Write the intent of a POST. If that fails, the POST does not leave; nor may the row say that it did."""
        is_written = False

        async def noted(connection: Connection) -> T:
            nonlocal is_written
            result = await work(connection)
            is_written = True
            return result

        try:
            return await self._driver.run(noted)
        except BaseException:
            if is_written:  # all but its COMMIT is known to be done
                self._unsent[job_id] = mark
            raise

    async def get(self, job_id: str) -> JobRecord | None:
        rows = self._table
        return await self._driver.read(lambda connection: rows.get(connection, job_id))

    async def by_key(self, key: str) -> JobRecord | None:
        rows = self._table
        return await self._driver.read(lambda connection: rows.by_key(connection, key))

    async def by_task(self, task_id: str) -> JobRecord | None:
        rows = self._table
        return await self._driver.read(lambda connection: rows.by_task(connection, task_id))

    async def unfinished(self) -> AsyncIterator[JobRecord]:
        rows, after = self._table, (float("-inf"), "")
        while True:
            page, last = await self._driver.read(partial(rows.oldest_open, after=after))
            for record in page:
                yield record
            if last is None:
                return
            after = last

    async def jobs(self) -> AsyncIterator[JobRecord]:
        rows, before = self._table, (float("inf"), "")
        while True:
            page, last = await self._driver.read(partial(rows.newest, before=before))
            for record in page:
                yield record
            if last is None:
                return
            before = last

    async def claim(self, now: float, *, limit: int, lease_s: float) -> list[JobRecord]:
        rows = self._table
        return await self._driver.run(lambda connection: rows.claim(connection, now, limit, lease_s))

    async def next_due(self) -> float | None:
        return await self._driver.read(self._table.next_due)

    async def takeover(self, now: float, *, doubt_s: float, per_second: float) -> int:
        rows = self._table
        count = await self._driver.run(
            lambda connection: rows.takeover(connection, now, doubt_s, per_second), limit_s=LONG_S
        )
        self._doubt_s = doubt_s
        return count

    async def purge(self, older_than: timedelta | float) -> int:
        rows, before = self._table, self._clock.time() - seconds(older_than)
        purged = 0
        # Page by page: a submit does not wait for the whole of it.
        in_hand = self._in_hand()
        while count := await self._driver.run(lambda connection: rows.purge(connection, before, in_hand)):
            purged += count
        return purged
