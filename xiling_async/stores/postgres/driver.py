"""How a store uses asyncpg: a pool, transactions with a deadline, retries, and what the driver's errors mean."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import random
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, Final, Generic, TypeVar

from attrs import define, frozen

from xiling_async._internal.clock import SystemClock
from xiling_async._internal.redact import scrub
from xiling_async._internal.tasks import wait_out
from xiling_async.errors import ConfigurationError, StoreError
from xiling_async.stores.base import UnusableDatabase
from xiling_async.stores.postgres.address import Address, without_frames
from xiling_async.stores.postgres.schema import Connection

T = TypeVar("T")
Work = Callable[[Connection], Awaitable[T]]  # may be called again, so doing it twice must be the same as doing it once

CONNECT_S: Final = 5.0
TRANSACTION_S: Final = 10.0  # of one transaction, including its waits for locks
LONG_S: Final = 120.0  # of a transaction that touches all rows
QUEUE: Final = 3  # transactions long: how long a caller waits for a connection of the pool
TRANSACTION_TIMEOUT: Final = 170_000  # the version of the server that has this setting
TRIES: Final = 4
PAUSE_S: Final = 0.03  # with full jitter, doubled at each try: a database that is away is reported soon
POOLER: Final = (
    "through a pooler in transaction mode the store needs PostgresOptions(listen_dsn=..., "
    "connect={'statement_cache_size': 0}): a way to the database that does not go through it or is in session mode"
)
# Qualified by hand: it runs with the role's own search_path, since it asks for the first schema of it.
_SERVER: Final = (
    "SELECT pg_catalog.current_setting('server_version_num'), pg_catalog.current_setting('server_encoding'), "
    "pg_catalog.current_setting('synchronous_commit'), pg_catalog.current_schema()"
)
# A neighbour in the same database can put functions, operators and types into schemas that the role's search_path
# finds before the server's own, or that fit the arguments better. They would run with our rights.
_BEGIN: Final = (
    "BEGIN ISOLATION LEVEL READ COMMITTED {access}; SET LOCAL search_path = pg_catalog, pg_temp; "
    "SET LOCAL statement_timeout = {limit_ms}; SET LOCAL lock_timeout = {lock_ms}; "
    "SET LOCAL idle_in_transaction_session_timeout = {limit_ms};"
)


class ConcurrentChange(Exception):
    """Another session was faster between two statements: the transaction is to be done again."""


@frozen
class Server:
    """What a server says of itself. `schema`: the first of the role's search path that exists."""

    version: int
    encoding: str
    waits_for_disk: bool
    schema: str | None


@define(eq=False)
class _Transaction(Generic[T]):
    pool: Any
    connection: Any
    begin: str
    work: Work[T]
    is_ending: bool = False


class Driver:
    """Connections to one database; `listen`: the address for the listening connection. `options`: more arguments for
    `asyncpg.connect`.

    No setting of a session is relied on, and none is left behind, so that a pooler between us may hand out its
    connections as it likes; what holds for a transaction is said when it begins.

    An operation of asyncpg is never cancelled: asyncpg would open a second connection to cancel it on the server, and
    leave a task and a future behind. A caller that is cancelled, or waits too long, cuts the connection instead.
    """

    def __init__(self, address: Address, listen: Address, *, pool_size: int, options: Mapping[str, Any]) -> None:
        self._asyncpg = _asyncpg()
        self._address = address
        self._listen = listen
        self._pool_size = pool_size
        self._secrets = (address.dsn, listen.dsn, *address.secrets, *listen.secrets)
        if isinstance(options.get("password"), str):
            self._secrets += (options["password"],)
        self._options = {"timeout": CONNECT_S, "command_timeout": TRANSACTION_S, **options}
        self.limit_s: float = self._options.pop("command_timeout")
        self.queue_s = QUEUE * self.limit_s
        self.connect_s: float = self._options["timeout"]
        self._clock = SystemClock()
        self._operations: set[asyncio.Task[Any]] = set()
        self._pool: Any = None
        self._pid = 0
        self._server = Server(0, "", waits_for_disk=True, schema=None)
        postgres = self._asyncpg
        self._not_lost = (postgres.QueryCanceledError, postgres.DataError, TimeoutError)
        self._lost = (postgres.PostgresConnectionError, postgres.OperatorInterventionError, postgres.InterfaceError,
                      postgres.IdleInTransactionSessionTimeoutError, OSError, EOFError)  # fmt: skip
        self._passing = (postgres.SerializationError, postgres.DeadlockDetectedError,
                         postgres.InvalidCachedStatementError, ConcurrentChange)  # fmt: skip
        self._strange_statement = (postgres.InvalidSQLStatementNameError, postgres.DuplicatePreparedStatementError)

    # --- life ----------------------------------------------------------------------------------------------------

    async def open(self) -> Server:
        self._pid = os.getpid()
        self._pool = await self._asyncpg.create_pool(
            self._address.dsn, min_size=0, max_size=self._pool_size, reset=_no_reset, **self._options
        )
        version, encoding, synchronous_commit, schema = await self._retried(
            lambda connection: connection.fetchrow(_SERVER), self.limit_s, "BEGIN READ ONLY"
        )
        self._server = Server(int(version), encoding, synchronous_commit != "off", schema)
        return self._server

    async def close(self) -> None:
        """Wait for what is under way, and close. If it takes too long, or is cancelled, connections are cut instead;
        nothing is left either way."""
        pool, self._pool = self._pool, None
        if pool is None or not self.is_ours:
            return
        closing = self._started(self._end(pool, tuple(self._operations)))
        try:
            async with self._clock.timeout(self.limit_s):
                await asyncio.wait({closing})
        except TimeoutError:
            pass
        finally:
            pool.terminate()
            await wait_out(closing)

    async def abort(self) -> None:
        """Cut all connections."""
        pool, self._pool = self._pool, None
        if pool is not None and self.is_ours:
            pool.terminate()
            await wait_out(*self._operations)

    @staticmethod
    async def _end(pool: Any, running: tuple[asyncio.Task[Any], ...]) -> None:
        if running:
            await asyncio.wait(running)
        with contextlib.suppress(Exception):
            await pool.close()

    async def listening(self) -> Any:
        """A connection of its own, beside the pool."""
        return await self._asyncpg.connect(self._listen.dsn, **self._options)

    @property
    def is_ours(self) -> bool:
        """False in a forked child: there the sockets are the parent's."""
        return self._pid == os.getpid()

    def check_process(self) -> None:
        if self._pool is not None and not self.is_ours:
            raise StoreError(f"{self._address.name} was opened before a fork: open a store of its own in each process.")

    # --- transactions --------------------------------------------------------------------------------------------

    async def read(self, work: Work[T]) -> T:
        """The result of `work`, which only reads. Raises `StoreError`."""
        return await self._retried(work, self.limit_s, self._begin(self.limit_s, "READ ONLY"))

    async def run(self, work: Work[T], *, limit_s: float | None = None) -> T:
        """The result of `work` once its transaction is committed. Raises `StoreError`.

        What broke for a reason that passes (a cut connection, a deadlock) is done again. If the connection was cut
        while COMMIT was on its way, `work` finds what it wrote itself; it must recognise it.
        """
        limit_s = limit_s or self.limit_s
        return await self._retried(work, limit_s, self._begin(limit_s, "READ WRITE"))

    async def _retried(self, work: Work[T], limit_s: float, begin: str) -> T:
        in_doubt = False
        for tries in range(1, TRIES + 1):
            transaction: _Transaction[T] | None = None
            try:
                pool, connection = await self._acquired()
                transaction = _Transaction(pool, connection, begin, work)
                return await self.bounded(connection, self._transact(transaction), limit_s)
            except (StoreError, UnusableDatabase):
                raise
            except asyncio.CancelledError as error:
                raise without_frames(error) from None
            except Exception as error:
                is_lost = self.is_lost(error)
                if transaction is not None and transaction.is_ending:
                    in_doubt = in_doubt or is_lost or isinstance(error, TimeoutError)
                if tries == TRIES or not (is_lost or isinstance(error, self._passing)):
                    raise self.failed(error, in_doubt=in_doubt) from without_frames(error)
            await self._clock.sleep(random.uniform(0, PAUSE_S * 2**tries))  # noqa: S311 - no secret
        raise AssertionError("the last try returns or raises")

    async def _acquired(self) -> tuple[Any, Any]:
        self.check_process()
        pool = self._pool
        if pool is not None:
            connection = await pool.acquire(timeout=self.queue_s)
            if pool is self._pool:
                return pool, connection
            _cut(connection)
        raise StoreError(f"{self._address.name} is not open.")

    async def bounded(self, connection: Any, operation: Coroutine[Any, Any, T], limit_s: float) -> T:
        """The result of this operation on a connection, which is cut after `limit_s`, or when the caller is
        cancelled. Raises `TimeoutError`, or what the operation raises."""
        task = self._started(operation)
        try:
            async with self._clock.timeout(limit_s):
                await asyncio.wait({task})
        except BaseException as error:
            _cut(connection)
            await wait_out(task)
            if not isinstance(error, TimeoutError) or task.cancelled() or task.exception() is not None:
                raise
        return task.result()

    def _started(self, operation: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(operation, name="xiling store operation")
        self._operations.add(task)
        task.add_done_callback(self._operations.discard)
        return task

    async def _transact(self, transaction: _Transaction[T]) -> T:
        connection, is_fine = transaction.connection, False
        try:
            await connection.execute(transaction.begin)
            try:
                result = await transaction.work(connection)
            except Exception as error:
                if not self.is_lost(error):
                    await connection.execute("ROLLBACK")
                    is_fine = True
                raise
            transaction.is_ending = True
            await connection.execute("COMMIT")
            is_fine = True
            return result
        finally:
            with contextlib.suppress(Exception):  # a connection that was cut has left the pool by itself
                if not is_fine:  # the server rolls back what its client has left
                    _cut(connection)
                await transaction.pool.release(connection)

    async def on(self, connection: Any, work: Work[T]) -> T:
        """The result of `work`, committed, on a connection outside the pool. If it raises, the connection is not to be
        used again."""

        async def transaction() -> T:
            await connection.execute(self._begin(self.limit_s, "READ WRITE"))
            result = await work(connection)
            await connection.execute("COMMIT")
            return result

        return await self.bounded(connection, transaction(), self.limit_s)

    def _begin(self, limit_s: float, access: str) -> str:
        limit_ms, lock_ms = int(limit_s * 1000), int(min(limit_s, self.limit_s) * 1000)
        begin = _BEGIN.format(access=access, limit_ms=limit_ms, lock_ms=lock_ms)
        # What a client that lost its power has locked is released in time; before version 17 the server's TCP does it.
        if self._server.version >= TRANSACTION_TIMEOUT:
            begin += f"SET LOCAL transaction_timeout = {2 * limit_ms};"
        # A database may be told not to wait for its disk; what was paid for does.
        return begin if self._server.waits_for_disk else f"{begin}SET LOCAL synchronous_commit = on;"

    # --- errors --------------------------------------------------------------------------------------------------

    def is_lost(self, error: BaseException) -> bool:
        """Whether it says that the connection, or the server, went away: the next one may be better."""
        return isinstance(error, self._lost) and not isinstance(error, self._not_lost)

    def why(self, error: BaseException) -> str:
        """The error in words that hold no secret."""
        message, *_ = scrub(str(error), *self._secrets).split("\n", 1)  # hints go on for pages
        if isinstance(error, TimeoutError) and not message:
            return "it did not answer in time"
        if isinstance(error, self._asyncpg.LockNotAvailableError):
            message += " (another session of this database holds a lock that is needed; see pg_locks)"
        if isinstance(error, self._strange_statement):
            message += f" (is that a pooler? {POOLER})"
        return message.rstrip(".") or type(error).__name__

    def failed(self, error: BaseException, *, in_doubt: bool = False) -> StoreError:
        outcome = "Whether this step was stored is not known." if in_doubt else "Nothing of this step was stored."
        return StoreError(f"{self._address.name} could not be written or read: {self.why(error)}. {outcome}")

    def refused(self, error: BaseException) -> StoreError:
        if isinstance(error, StoreError) and error.__cause__ is not None:
            error = error.__cause__
        return StoreError(f"{self._address.name} cannot be used as a store: {self.why(error)}. Nothing was sent.")


def _cut(connection: Any) -> None:
    with contextlib.suppress(Exception):  # it is back in the pool already
        connection.terminate()


async def _no_reset(connection: Any) -> None:
    """No transaction leaves anything behind that would have to be reset."""


def _asyncpg() -> Any:
    try:
        return importlib.import_module("asyncpg")
    except ImportError:
        raise ConfigurationError(
            "PostgresStore needs asyncpg: pip install 'xiling_async[postgres]'. Nothing was sent."
        ) from None
