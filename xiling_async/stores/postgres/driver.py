"""How a store speaks to PostgreSQL: a pool, transactions that end in time, and what its errors mean."""

from __future__ import annotations

import contextlib
import importlib
import os
import random
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Final, TypeVar
from urllib.parse import parse_qs, unquote

from xiling_async._internal.clock import SystemClock
from xiling_async._internal.redact import scrub
from xiling_async.errors import ConfigurationError, StoreError
from xiling_async.stores.postgres.schema import Connection, Unfit

T = TypeVar("T")
Work = Callable[[Connection], Awaitable[T]]  # may be called again: what it does twice must be as done once

CONNECT_S: Final = 5.0
TRANSACTION_S: Final = 10.0  # of one transaction, with the wait for locks in it
LONG_S: Final = 120.0  # of one that touches all rows
QUEUE: Final = 3  # so many transactions long one waits for a connection of the pool
TRANSACTION_TIMEOUT: Final = 170_000  # the version of the server that has it
TRIES: Final = 4
PAUSE_S: Final = 0.03  # with full jitter, doubled from try to try: a database that is away is an error soon
_DSN: Final = re.compile(
    r"postgres(?:ql)?://(?:(?P<user>[^@/?#\s]*)@)?"
    r"(?P<place>(?:[\w.%-]*|\[[\da-fA-F:.]+\])(?::\d+)?(?:,(?:[\w.%-]*|\[[\da-fA-F:.]+\])(?::\d+)?)*"
    r"(?:/[^@?#\s]*)?)(?:\?(?P<options>[^@#\s]*))?"
)
POOLER: Final = (
    "through a pooler in transaction mode the store needs listen_dsn=, a way to the database that does not go through "
    "it or is in session mode, and connect={'statement_cache_size': 0}"
)


class Again(Exception):
    """Somebody was faster between two statements: the transaction is to be done once more."""


class _InDoubt(Exception):
    """The answer to COMMIT was lost; its cause says how."""


class Address:
    """A DSN, and what of it may be shown. Raises `ConfigurationError`, which shows nothing of it."""

    def __init__(self, dsn: str) -> None:
        parts = _DSN.fullmatch(dsn) if isinstance(dsn, str) else None
        if parts is None:
            raise ConfigurationError(
                "dsn must be postgresql://user:password@host:port/database?sslmode=..., with special characters of "
                "user, password and options percent-encoded (@ is %40). It is not shown here: it may hold a password."
            )
        self.dsn = dsn
        self.name = f"PostgreSQL at {unquote(parts['place']) or 'its default place'}"
        words = [(parts["user"] or "").partition(":")[2]]
        given = parse_qs(parts["options"] or "")
        words += [word for name in ("password", "sslpassword") for word in given.get(name, [])]
        self.secrets = tuple({word for raw in words for word in (raw, unquote(raw)) if word})


class Driver:
    """Connections to one database; `listen`: the way for the one that listens. `options`: more arguments for
    `asyncpg.connect`.

    No setting of a session is relied on, and none is left behind, so that a pooler between us may hand out its
    connections as it likes; what holds for a transaction is said when it begins.
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
        self._limit_s: float = self._options.pop("command_timeout")
        self.queue_s = QUEUE * self._limit_s
        self.connect_s: float = self._options["timeout"]
        self._clock = SystemClock()
        self._pool: Any = None
        self._pid = 0
        self._settings, self._has_transaction_timeout = "", False
        postgres = self._asyncpg
        self._not_lost = (postgres.QueryCanceledError, postgres.DataError, TimeoutError)
        self._lost = (postgres.PostgresConnectionError, postgres.OperatorInterventionError, postgres.InterfaceError,
                      postgres.IdleInTransactionSessionTimeoutError, OSError, EOFError)  # fmt: skip
        self._passing = (postgres.SerializationError, postgres.DeadlockDetectedError,
                         postgres.InvalidCachedStatementError, Again)  # fmt: skip
        self._strange_statement = (postgres.InvalidSQLStatementNameError, postgres.DuplicatePreparedStatementError)

    # --- life ----------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        self._pid = os.getpid()
        self._settings, self._has_transaction_timeout = "", False
        self._pool = await self._asyncpg.create_pool(
            self._address.dsn, min_size=0, max_size=self._pool_size, reset=_leave, **self._options
        )
        # A database may be told not to wait for its disk; what was paid for does.
        if await self.run(lambda connection: connection.fetchval("SHOW synchronous_commit")) == "off":
            self._settings = "SET LOCAL synchronous_commit = on;"
        # What a client that lost its power has locked is let go in time; before version 17 the server's TCP sees to it.
        version = await self.run(lambda connection: connection.fetchval("SHOW server_version_num"))
        self._has_transaction_timeout = int(version) >= TRANSACTION_TIMEOUT

    async def close(self) -> None:
        pool, self._pool = self._pool, None
        if pool is None or not self.is_ours:
            return
        try:
            async with self._clock.timeout(self._limit_s):
                await pool.close()
        except Exception:
            pool.terminate()

    async def line(self) -> Any:
        """A connection of its own, beside the pool."""
        return await self._asyncpg.connect(self._listen.dsn, command_timeout=self._limit_s, **self._options)

    @property
    def is_ours(self) -> bool:
        """Not a forked child's: there the sockets are the parent's."""
        return self._pid == os.getpid()

    def check_process(self) -> None:
        if self._pool is not None and not self.is_ours:
            raise StoreError(f"{self._address.name} was opened before a fork: open a store of its own in each process.")

    # --- transactions --------------------------------------------------------------------------------------------

    async def read(self, work: Work[T]) -> T:
        """The result of one SELECT, which needs no transaction around it. Raises `StoreError`."""
        return await self._tried(lambda: self._look(work))

    async def run(self, work: Work[T], *, limit_s: float | None = None) -> T:
        """The result of `work` once its transaction is committed. Raises `StoreError`.

        What broke for a reason that passes (a cut connection, a deadlock) is done again. If the connection was cut
        while COMMIT was on its way, `work` finds its own writing; it must know it again.
        """
        return await self._tried(lambda: self._transact(work, limit_s or self._limit_s))

    async def _tried(self, once: Callable[[], Awaitable[T]]) -> T:
        self.check_process()
        if self._pool is None:
            raise StoreError(f"{self._address.name} is not open.")
        in_doubt = False
        for tries in range(1, TRIES + 1):
            try:
                return await once()
            except (StoreError, Unfit):
                raise
            except Exception as error:
                cause = error.__cause__ if isinstance(error, _InDoubt) and error.__cause__ else error
                in_doubt = in_doubt or cause is not error
                if tries == TRIES or not (self.is_lost(cause) or isinstance(cause, self._passing)):
                    raise self.failed(cause, in_doubt=in_doubt) from cause
            await self._clock.sleep(random.uniform(0, PAUSE_S * 2**tries))  # noqa: S311 - no secret
        raise AssertionError("the last try returns or raises")

    @contextlib.asynccontextmanager
    async def _connection(self, limit_s: float) -> AsyncIterator[Connection]:
        """A connection of the pool for so long; what is not at its end then, or breaks, ends with its connection."""
        pool = self._pool
        connection = await pool.acquire(timeout=self.queue_s)
        is_fine = False
        try:
            async with self._clock.timeout(limit_s):
                yield connection
            is_fine = True
        except Exception as error:
            is_fine = not self.is_lost(error) and not isinstance(error, TimeoutError)
            raise
        finally:
            with contextlib.suppress(Exception):  # a connection that was cut has left the pool by itself
                if not is_fine or connection.is_in_transaction():  # the server rolls back what its client has left
                    connection.terminate()
                await pool.release(connection)

    async def _look(self, work: Work[T]) -> T:
        async with self._connection(self._limit_s) as connection:
            return await work(connection)

    async def _transact(self, work: Work[T], limit_s: float) -> T:
        is_ending = False
        try:
            async with self._connection(limit_s) as connection:
                await connection.execute(self._begin(limit_s))
                try:
                    result = await work(connection)
                except Exception as error:
                    if not self.is_lost(error):
                        await connection.execute("ROLLBACK")
                    raise
                is_ending = True
                await connection.execute("COMMIT")
                return result
        except Exception as error:
            if is_ending and (self.is_lost(error) or isinstance(error, TimeoutError)):
                raise _InDoubt from error
            raise

    def _begin(self, limit_s: float) -> str:
        limit_ms = int(limit_s * 1000)
        whole = f"SET LOCAL transaction_timeout = {2 * limit_ms};" if self._has_transaction_timeout else ""
        return (
            "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE;"
            f"SET LOCAL statement_timeout = {limit_ms}; SET LOCAL lock_timeout = {limit_ms};"
            f"SET LOCAL idle_in_transaction_session_timeout = {limit_ms};{whole}{self._settings}"
        )

    # --- errors --------------------------------------------------------------------------------------------------

    def is_lost(self, error: BaseException) -> bool:
        """Whether it says that the connection, or the server, went away: the next one may be better."""
        return isinstance(error, self._lost) and not isinstance(error, self._not_lost)

    def why(self, error: BaseException) -> str:
        """The error in words that hold no secret."""
        said, *_ = scrub(str(error), *self._secrets).split("\n", 1)  # hints go on for pages
        if isinstance(error, TimeoutError) and not said:
            return "it did not answer in time"
        if isinstance(error, self._strange_statement):
            said += f" (is that a pooler? {POOLER})"
        return said.rstrip(".") or type(error).__name__

    def failed(self, error: BaseException, *, in_doubt: bool = False) -> StoreError:
        outcome = "Whether this step was stored is not known." if in_doubt else "Nothing of this step was stored."
        return StoreError(f"{self._address.name} could not be written or read: {self.why(error)}. {outcome}")

    def refused(self, error: BaseException) -> StoreError:
        if isinstance(error, StoreError) and error.__cause__ is not None:
            error = error.__cause__
        return StoreError(f"{self._address.name} cannot be used as a store: {self.why(error)}. Nothing was sent.")


async def _leave(connection: Any) -> None:
    """Nothing to reset: no transaction leaves anything behind."""


def _asyncpg() -> Any:
    try:
        return importlib.import_module("asyncpg")
    except ImportError:
        raise ConfigurationError(
            "PostgresStore needs asyncpg: pip install 'xiling_async[postgres]'. Nothing was sent."
        ) from None
