"""A store in a PostgreSQL database, for any number of processes: what one of them writes, the others hear of."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
from collections.abc import AsyncIterator
from datetime import timedelta
from functools import partial
from typing import Final, TypeVar
from weakref import WeakValueDictionary

from xiling_async._internal.clock import SystemClock
from xiling_async.errors import ConfigurationError, StoreError
from xiling_async.models.lifecycle import Change, Event, ResendStarted, Verdict
from xiling_async.models.query import ALL_JOBS, OPEN_JOBS, JobQuery
from xiling_async.models.record import JobRecord
from xiling_async.models.settings import instance
from xiling_async.stores.base import HandedOver, UnusableDatabase, Watcher, seconds
from xiling_async.stores.listing import FIRST, Place, start
from xiling_async.stores.postgres.address import Address, without_frames
from xiling_async.stores.postgres.driver import LONG_S, POOLER, Driver, Work
from xiling_async.stores.postgres.listener import Listener
from xiling_async.stores.postgres.options import PostgresOptions
from xiling_async.stores.postgres.queries import Queries
from xiling_async.stores.postgres.schema import Connection, Names, is_schema, prepare

T = TypeVar("T")

LEAVE_S: Final = 3.0  # a database that is away does not keep a client from closing
BEATS: Final = 6  # so many heartbeats without a sign of life, and an owner counts as dead


class PostgresStore:
    """Remembers jobs in a PostgreSQL database (11 or newer, UTF8), for any number of processes at once: a key is one
    job for all of them, each may take the callbacks of all, and a waiter in one is woken by a callback to another.

    `dsn`: `postgresql://user:password@host:port/database?sslmode=verify-full`. `schema`: made if it is missing; None:
    the first of the search path. `migrate`: whether it may make and change tables.
    """

    is_shared: bool = True
    _place = "without a DSN"  # shown if the DSN is refused

    def __init__(
        self,
        dsn: str,
        *,
        schema: str | None = None,
        migrate: bool = True,
        options: PostgresOptions | None = None,
    ) -> None:
        try:
            self._address = Address(dsn)
        finally:
            del dsn  # a traceback may be shown with the variables of its frames
        options = (
            PostgresOptions() if options is None else instance("options", options, PostgresOptions, "PostgresOptions")
        )
        listen = self._address if options.listen_dsn is None else Address(options.listen_dsn)
        self._place = self._address.name.removeprefix("PostgreSQL at ")
        if schema is not None and not (isinstance(schema, str) and is_schema(schema)):
            raise ConfigurationError(f"schema must be a name of 1 to 63 bytes, not {schema!r}.")
        instance("migrate", migrate, bool, "True or False")
        self._schema = schema
        self._prefix = options.table_prefix
        self.heartbeat_s = options.heartbeat_s
        self._may_migrate = migrate
        self._trusted = options.owner
        self._owner = secrets.token_hex(8)
        self._driver = Driver(self._address, listen, pool_size=options.pool_size, options=options.connect)
        self._clock = SystemClock()
        self._is_open = False
        self._queries: Queries | None = None
        self._listener: Listener | None = None
        self._watcher: Watcher | None = None
        self._doubt_s: float | None = None  # known once the client has taken over
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._orphans: set[str] = set()  # being sent as the table has it, and not in hand at the last heartbeat
        self._unsent: dict[str, str] = {}  # intents whose COMMIT was not answered, with their marks

    def __repr__(self) -> str:
        return f"<PostgresStore {self._place}>"

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
            await self._let_go(in_a_hurry=True)
            if isinstance(error, Exception):
                raise self._driver.refused(error) from without_frames(error)
            raise without_frames(error) from None

    async def _opened(self) -> None:
        server = await self._driver.open()
        if server.encoding != "UTF8":
            raise UnusableDatabase(
                f"its encoding is {server.encoding}; the store needs a database with the encoding UTF8"
            )
        schema = self._schema or server.schema
        if schema is None:
            raise UnusableDatabase("no schema of its search_path exists: name one, PostgresStore(..., schema=...)")
        names = Names(schema, self._prefix)
        await self._driver.run(
            lambda connection: prepare(connection, names, may_migrate=self._may_migrate, trusted=self._trusted),
            limit_s=LONG_S,
        )
        self._queries = queries = Queries(names, self._owner)
        self._listener = listener = Listener(self._driver, queries, self)
        listener.watcher = self._watcher
        await listener.open()
        await self._driver.run(lambda connection: queries.greet(connection, listener.greeting))
        if not await listener.is_greeted():
            raise UnusableDatabase(f"its notifications do not arrive; {POOLER}")

    async def close(self) -> None:
        """Cancelled, it does the same in a hurry: no task, no heartbeat and no connection is left either way."""
        queries = self._queries
        in_a_hurry = True
        try:
            if queries is not None and self._driver.is_ours:
                # If the database is away, this owner counts as dead soon, which comes to the same.
                with contextlib.suppress(StoreError, TimeoutError):
                    async with self._clock.timeout(LEAVE_S):
                        await self._driver.run(queries.leave, limit_s=LEAVE_S)
            in_a_hurry = False
        finally:
            await self._let_go(in_a_hurry=in_a_hurry)

    async def _let_go(self, *, in_a_hurry: bool) -> None:
        self._queries = self._watcher = None
        listener, self._listener = self._listener, None
        try:
            if listener is not None and self._driver.is_ours:
                await listener.close()
        finally:
            try:
                await (self._driver.abort() if in_a_hurry else self._driver.close())
            finally:
                self._is_open = False

    def listen(self, watcher: Watcher) -> None:
        self._watcher = watcher
        if self._listener is not None:
            self._listener.watcher = watcher

    @property
    def unreadable(self) -> int:
        """How many jobs were skipped since it was opened, because their rows cannot be read; the log names them."""
        return 0 if self._queries is None else len(self._queries.reader.skipped)

    async def beat(self, connection: Connection) -> None:
        """Show the other processes that this one lives; done twice it is the same as done once."""
        queries, unsent, doubt_s = self._open_queries, dict(self._unsent), self._doubt_s
        place = f"process {os.getpid()} on {socket.gethostname()}"

        async def work(connection: Connection) -> set[str]:
            await queries.beat(connection, place, BEATS * self.heartbeat_s)
            for job_id, mark in unsent.items():
                await queries.take_back(connection, job_id, mark, self._clock.time())
            if doubt_s is None:
                return set()
            await queries.mark_dead_owners(connection, self._clock.time(), doubt_s, mine=False)
            # Without a watcher it is not known what is in hand.
            return set() if self._watcher is None else await self._doubt_orphans(connection, doubt_s)

        self._orphans = await self._driver.on(connection, work)
        for job_id, mark in unsent.items():
            if self._unsent.get(job_id) == mark:
                del self._unsent[job_id]

    async def _doubt_orphans(self, connection: Connection, doubt_s: float) -> set[str]:
        """A job that the table has as being sent by this store, and that no submit has in hand at two heartbeats in a
        row, was left by a submit that broke off or by a COMMIT that landed late: it becomes uncertain."""
        orphans = await self._open_queries.sending_here(connection) - self._in_hand()
        doubted = orphans & self._orphans
        if doubted:
            await self._open_queries.doubt(connection, doubted, self._clock.time(), doubt_s)
        return orphans

    def _in_hand(self) -> frozenset[str]:
        return frozenset() if self._watcher is None else self._watcher.in_hand()

    @property
    def _open_queries(self) -> Queries:
        if self._queries is None:
            self._driver.check_process()
            raise StoreError(f"{self._address.name} is not open.")
        return self._queries

    # --- what base.py promises -----------------------------------------------------------------------------------

    async def secret(self, fresh: bytes) -> bytes:
        queries = self._open_queries
        return await self._driver.run(lambda connection: queries.secret(connection, fresh))

    async def add(self, record: JobRecord) -> JobRecord:
        queries, mark = self._open_queries, secrets.token_hex(8)
        return await self._intend(record.id, mark, lambda connection: queries.add(connection, record, mark))

    async def change(self, job_id: str, event: Event) -> Change:
        queries, mark = self._open_queries, secrets.token_hex(8)
        before: Change | None = None  # what the last try came to, if only its COMMIT failed
        looks = False

        async def work(connection: Connection) -> Change:
            nonlocal looks, before
            looked, looks = looks, True  # a second try has a reason
            change = await queries.change(connection, job_id, event, mark, looks=looked)
            if before is not None and change.verdict is Verdict.APPLIED:
                change = Change(change.verdict, change.record, before.was)
            before = change
            return change

        async with self._turn(job_id):
            return await (
                self._intend(job_id, mark, work) if isinstance(event, ResendStarted) else self._driver.run(work)
            )

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
        queries = self._open_queries
        return await self._driver.read(lambda connection: queries.get(connection, job_id))

    async def by_key(self, key: str) -> JobRecord | None:
        queries = self._open_queries
        return await self._driver.read(lambda connection: queries.by_key(connection, key))

    async def by_task(self, task_id: str) -> JobRecord | None:
        queries = self._open_queries
        return await self._driver.read(lambda connection: queries.by_task(connection, task_id))

    async def unfinished(self) -> AsyncIterator[JobRecord]:
        async for record in self.jobs(OPEN_JOBS):
            yield record

    async def jobs(self, query: JobQuery = ALL_JOBS) -> AsyncIterator[JobRecord]:
        queries = self._open_queries
        place: Place | None = start(query)
        while place is not None:
            page, place = await self._driver.read(partial(queries.listed, query=query, place=place))
            for record in page:
                yield record

    async def unsaved(self, since: float) -> AsyncIterator[JobRecord]:
        queries = self._open_queries
        place: Place | None = FIRST
        while place is not None:
            page, place = await self._driver.read(partial(queries.unsaved, since=since, after=place))
            for record in page:
                yield record

    async def hand_over(self, now: float, *, lease_s: float) -> HandedOver | None:
        """By the clock of the database: `now` is not used."""
        queries = self._open_queries
        return await self._driver.run(lambda connection: queries.hand_over(connection, lease_s))

    async def next_handover(self, now: float) -> float | None:
        """By the clock of the database: `now` is not used."""
        return await self._driver.read(self._open_queries.next_handover)

    async def claim(self, now: float, *, limit: int, lease_s: float) -> list[JobRecord]:
        queries = self._open_queries
        return await self._driver.run(lambda connection: queries.claim(connection, now, limit, lease_s))

    async def next_due(self) -> float | None:
        return await self._driver.read(self._open_queries.next_due)

    async def recover_orphans(self, now: float, *, doubt_s: float, per_second: float) -> int:
        queries = self._open_queries
        count = await self._driver.run(
            lambda connection: queries.recover_orphans(connection, now, doubt_s, per_second), limit_s=LONG_S
        )
        self._doubt_s = doubt_s
        return count

    async def purge(self, older_than: timedelta | float, *, now: float | None = None) -> int:
        queries = self._open_queries
        before = (self._clock.time() if now is None else now) - seconds(older_than)
        purged = 0
        # Page by page: a submit does not wait for the whole of it.
        in_hand = self._in_hand()
        while count := await self._driver.run(lambda connection: queries.purge(connection, before, in_hand)):
            purged += count
        return purged
