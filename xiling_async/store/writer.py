"""One thread that owns one SQLite connection, and commits what arrives together in one transaction.

A durable commit costs an fsync, so everything that waits while one runs shares the next. Each piece of work stands in a
savepoint of its own: one that fails takes nobody with it. Nobody hears of a result before the commit.
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

T = TypeVar("T")
Work = Callable[[sqlite3.Connection], T]

GROUP: Final = 512  # pieces of work in one transaction: bounds how long the first of them waits


@define(eq=False)
class _Piece:
    work: Work[Any]
    future: asyncio.Future[Any]
    result: Any = None
    error: BaseException | None = None


class Writer:
    """Runs functions of a connection in its thread. `connect` is called there too, and decides what is refused."""

    def __init__(self, connect: Callable[[], sqlite3.Connection], name: str) -> None:
        self._connect = connect
        self._name = name
        self._loop = asyncio.get_running_loop()
        self._pid = os.getpid()
        self._pieces: queue.SimpleQueue[_Piece | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False

    async def start(self) -> None:
        """Raises what `connect` raises."""
        started = self._loop.create_future()
        self._thread = threading.Thread(target=self._live, args=(started,), name=f"xiling {self._name}", daemon=True)
        self._thread.start()
        await started

    async def stop(self) -> None:
        """What was handed in is committed first."""
        self._closed = True
        self._pieces.put(None)
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    async def run(self, work: Work[T]) -> T:
        """The result of `work`, once it is durable. Raises `StoreError`; then nothing of it was written."""
        if os.getpid() != self._pid:
            raise StoreError(f"{self._name} was opened before a fork: open a store of its own in each process.")
        if self._closed:
            raise StoreError(f"{self._name} is closed.")
        piece = _Piece(work, self._loop.create_future())
        self._pieces.put(piece)
        result: T = await piece.future
        return result

    # --- in the thread -------------------------------------------------------------------------------------------

    def _live(self, started: asyncio.Future[None]) -> None:
        try:
            connection = self._connect()
        except BaseException as error:
            self._tell(_settle, started, None, error)
            return
        self._tell(_settle, started, None, None)
        with contextlib.closing(connection):
            while group := self._next_group():
                self._commit(connection, [piece for piece in group if piece is not None])
                self._tell(_settle_all, [piece for piece in group if piece is not None])
                if None in group:
                    return

    def _next_group(self) -> list[_Piece | None]:
        group = [self._pieces.get()]
        while group[-1] is not None and len(group) < GROUP:
            try:
                group.append(self._pieces.get_nowait())
            except queue.Empty:
                break
        return group

    def _commit(self, connection: sqlite3.Connection, group: list[_Piece]) -> None:
        try:
            connection.execute("BEGIN IMMEDIATE")
            for piece in group:
                self._try(connection, piece)
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            with contextlib.suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            for piece in group:
                piece.error = self._failed(error)

    def _try(self, connection: sqlite3.Connection, piece: _Piece) -> None:
        connection.execute("SAVEPOINT piece")
        try:
            piece.result = piece.work(connection)
        except Exception as error:
            piece.error = self._failed(error) if isinstance(error, sqlite3.Error) else error
            connection.execute("ROLLBACK TO piece")
        connection.execute("RELEASE piece")

    def _failed(self, error: sqlite3.Error) -> StoreError:
        failed = StoreError(f"{self._name} could not be written or read: {error}. Nothing of this step was stored.")
        failed.__cause__ = error
        return failed

    def _tell(self, tell: Callable[..., None], *what: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is gone, and with it everybody who waited
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
