"""One thread that owns one SQLite connection, and commits what arrives together in one transaction.

A durable commit costs an fsync, so everything that waits while one runs shares the next. A piece of work that fails
does not fail the others: the group is then done again, each piece in a transaction of its own (a savepoint would not
do: a full disk ends the whole transaction). No caller gets a result before the commit.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import sqlite3
import threading
from collections.abc import Callable
from typing import Any, Final, TypeVar

from attrs import define

from xiling_async.errors import StoreError
from xiling_async.stores.sqlite_file import DatabaseFile

T = TypeVar("T")
Work = Callable[[sqlite3.Connection], T]  # may be called twice: it changes nothing but the database

GROUP: Final = 512  # pieces of work in one transaction: bounds how long the first of them waits


@define(eq=False)
class _Piece:
    work: Work[Any]
    future: asyncio.Future[Any]
    in_transaction: bool
    result: Any = None
    error: BaseException | None = None


class Writer:
    """Runs functions of a connection in its thread, which opens the file, and decides there what is refused.

    It belongs to the event loop and to the process that made it.
    """

    def __init__(self, file: DatabaseFile, name: str) -> None:
        self._file = file
        self._name = name
        self._loop = asyncio.get_running_loop()
        self._pid = os.getpid()
        self._pieces: queue.SimpleQueue[_Piece | None] = queue.SimpleQueue()
        self._started: asyncio.Future[None] = self._loop.create_future()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        # A daemon: a process that ends without `stop` loses nothing that anybody was told.
        self._thread = threading.Thread(target=self._live, name=f"xiling {name}", daemon=True)

    async def start(self) -> None:
        """Raises what opening the file raises; then, and when it is cancelled, nothing is left open."""
        self._thread.start()
        try:
            await self._started
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """What was handed in is committed first. A cancelled `stop` does the same: who opens the file next must find
        it free."""
        if os.getpid() != self._pid:
            return  # the thread and the file are the parent's
        self._pieces.put(None)
        cancelled: asyncio.CancelledError | None = None
        while self._thread.is_alive():
            try:
                await asyncio.wait({self._ended})
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            raise cancelled

    async def run(self, work: Work[T], *, in_transaction: bool = True) -> T:
        """The result of `work`, once it is durable; not after `stop`. `StoreError`: nothing of it was written.

        `in_transaction=False`: outside of any transaction, for what SQLite does only there.
        """
        self.check_process()
        piece = _Piece(work, self._loop.create_future(), in_transaction)
        self._pieces.put(piece)
        result: T = await piece.future
        return result

    def check_process(self) -> None:
        if os.getpid() != self._pid:
            raise StoreError(f"{self._name} was opened before a fork: open a store of its own in each process.")

    # --- in the thread -------------------------------------------------------------------------------------------

    def _live(self) -> None:
        try:
            with contextlib.ExitStack() as stack:
                try:
                    connection = stack.enter_context(self._file.connected())
                except BaseException as error:
                    self._tell(_settle, self._started, None, error)
                    return
                self._tell(_settle, self._started, None, None)
                self._work(connection)
        finally:
            self._tell(_settle, self._ended, None, None)

    def _work(self, connection: sqlite3.Connection) -> None:
        last = False
        while not last:
            group, last = self._next_group()
            together = [piece for piece in group if piece.in_transaction]
            if together:
                self._commit(connection, together)
            for piece in group:
                if not piece.in_transaction:
                    self._run_alone(connection, piece)
            if group:
                self._tell(_settle_all, group)

    def _next_group(self) -> tuple[list[_Piece], bool]:
        """What has been handed in by now, waiting for the first; and whether it is the last."""
        group: list[_Piece] = []
        piece = self._pieces.get()
        while piece is not None:
            group.append(piece)
            if len(group) == GROUP or self._pieces.empty():
                return group, False
            piece = self._pieces.get()
        return group, True

    def _commit(self, connection: sqlite3.Connection, group: list[_Piece]) -> None:
        error = self._transact(connection, group)
        if error is None:
            return
        if len(group) > 1:  # one of them, or all: each is told its own truth
            for piece in group:
                self._commit(connection, [piece])
        else:
            group[0].error = self._failed(error)

    def _transact(self, connection: sqlite3.Connection, group: list[_Piece]) -> Exception | None:
        try:
            if connection.in_transaction:  # left by a ROLLBACK that failed
                connection.execute("ROLLBACK")
            connection.execute(self._file.begin)
            for piece in group:
                piece.result = piece.work(connection)
            connection.execute("COMMIT")
            self._file.check_in_place()
        except Exception as error:
            with contextlib.suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            return error
        return None

    def _run_alone(self, connection: sqlite3.Connection, piece: _Piece) -> None:
        try:
            piece.result = piece.work(connection)
            self._file.check_in_place()
        except Exception as error:
            piece.error = self._failed(error)

    def _failed(self, error: Exception) -> StoreError:
        failed = StoreError(f"{self._name} could not be written or read: {error}. Nothing of this step was stored.")
        failed.__cause__ = error
        return failed

    def _tell(self, tell: Callable[..., None], *what: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is gone, and all callers with it
            self._loop.call_soon_threadsafe(tell, *what)


def _settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def _settle_all(group: list[_Piece]) -> None:
    for piece in group:
        _settle(piece.future, piece.result, piece.error)
