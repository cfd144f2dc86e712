"""The file of a SQLite store: who may open it, what is refused, whether it is still there, and copies of it."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Final

from xiling_async._internal.file_lock import Locked, check_owner, lock_file, this_process
from xiling_async.errors import StoreError
from xiling_async.stores.base import UnusableDatabase
from xiling_async.stores.sqlite_schema import migrate_copy, prepare

IN_USE_HERE: Final = "is in use by another client of this process: share the client instead. Nothing was sent."
_SIDE_FILES: Final = ("-wal", "-journal", "-shm")  # SQLite believes what stands in them
_TEXT: Final = partial(str, encoding="utf-8", errors="surrogateescape")  # one damaged text must not hide other rows
_WAL_HEADER_BYTES: Final = 32
_TRIES: Final = 50


class DatabaseFile:
    """`path` is looked up when it is opened. `connect`: `sqlite3.connect`, or another in its place for tests."""

    def __init__(self, path: Path, connect: Callable[..., sqlite3.Connection], *, read_only: bool) -> None:
        self.path = path
        self.begin = "BEGIN" if read_only else "BEGIN IMMEDIATE"
        self.read_only = read_only
        self._connect = connect
        self._opened: list[tuple[Path, os.stat_result]] = []  # the files that SQLite has open, as they were then

    @contextlib.contextmanager
    def connected(self) -> Iterator[sqlite3.Connection]:
        """A connection for the block. Raises `StoreError` for what is refused."""
        with contextlib.ExitStack() as stack:
            try:
                connection = self._copied(stack) if self.read_only else self._locked(stack)
            except Exception as error:
                raise self._refused(error) from error
            yield connection

    def _locked(self, stack: contextlib.ExitStack) -> sqlite3.Connection:
        path = self.path.resolve()
        stack.callback(lock_file(path.with_name(path.name + "-owner")))
        # Made here and not by SQLite, so that no other user can read it; its -wal takes the same mode. A file that
        # exists is left to SQLite: to close a descriptor of it would drop locks (see file_lock.py).
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        _check(path)
        if not os.access(path, os.W_OK):  # SQLite itself would speak of an I/O error
            raise PermissionError(f"{path} is read-only")
        connection = self._connect(path, timeout=0.5, isolation_level=None)
        stack.callback(connection.close)
        connection.text_factory = _TEXT
        prepare(connection)
        self._opened = [(file, status) for file in (path, _side(path, "-wal")) if (status := _status(file)) is not None]
        return connection

    def check_in_place(self) -> None:
        """Raises `FileNotFoundError` if the files of these names are not the ones that SQLite has open: what is
        written would be gone when they are closed."""
        for path, before in self._opened:
            now = _status(path)
            if now is None or not os.path.samestat(now, before):
                raise FileNotFoundError(
                    f"{path} was {'removed' if now is None else 'replaced'} while it was in use, so what is written "
                    "now would be lost; close the client, put the file back, and start again"
                )

    # --- copies --------------------------------------------------------------------------------------------------

    def _copied(self, stack: contextlib.ExitStack) -> sqlite3.Connection:
        """A connection to a copy of the file as it is now, also while a process has it in use; it cannot be written."""
        path = self.path.resolve()
        _check(path)
        copy = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="xiling-"))) / "copy.db"
        for _ in range(_TRIES):
            if _copy(path, copy):
                break
        else:
            raise UnusableDatabase("it is written too busily to be copied; try again")
        connection = self._connect(copy, isolation_level=None)
        stack.callback(connection.close)
        connection.text_factory = _TEXT
        migrate_copy(connection)
        return connection

    def back_up(self, connection: sqlite3.Connection, target: Path) -> None:
        """Write all that is committed into a new file, whole or not at all. Raises `OSError`, `sqlite3.Error`."""
        if os.path.lexists(target):
            raise FileExistsError(f"there is a file {target} already")
        part = target.with_name(target.name + ".part")
        os.close(os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        try:
            connection.execute("VACUUM INTO ?", (str(part),))
            with part.open("rb+") as written:
                os.fsync(written.fileno())
            part.rename(target)
        except BaseException:
            part.unlink()
            raise
        if sys.platform != "win32":  # there a folder cannot be opened
            folder = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    # --- errors --------------------------------------------------------------------------------------------------

    def _refused(self, error: Exception) -> StoreError:
        if isinstance(error, Locked) and str(error) == this_process():
            return StoreError(f"{self.path} {IN_USE_HERE}")
        is_locked = isinstance(error, sqlite3.OperationalError) and "locked" in str(error)
        if isinstance(error, Locked) or is_locked:
            owner = "another program" if is_locked else error
            return StoreError(
                f"{self.path} is held by {owner}. One process at a time may use a SQLiteStore: stop that one, "
                "or let several share a PostgresStore. Nothing was sent."
            )
        return StoreError(f"{self.path} cannot be used as a store: {error}. Nothing was sent.")


def _side(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _check(path: Path) -> None:
    """Raises `OSError` if the database, or a file that SQLite reads with it, may be the work of another user."""
    check_owner(path, path.stat())
    for suffix in _SIDE_FILES:
        side = _side(path, suffix)
        with contextlib.suppress(FileNotFoundError):
            status = side.lstat()
            if not stat.S_ISREG(status.st_mode):
                raise PermissionError(f"{side} is not a file; SQLite would read what it points to")
            check_owner(side, status)


def _copy(path: Path, copy: Path) -> bool:
    """Whether the database and its write-ahead log could be copied as of one moment.

    The log is copied last. While its header is the same before and after, it was not begun again in between, so it
    holds every page that a checkpoint may have changed in the database meanwhile; and SQLite ignores its torn end.
    """
    wal, wal_copy = _side(path, "-wal"), _side(copy, "-wal")
    wal_copy.unlink(missing_ok=True)
    before = _header(wal)
    shutil.copyfile(path, copy)
    with contextlib.suppress(FileNotFoundError):
        shutil.copyfile(wal, wal_copy)
    return before == _header(wal_copy) == _header(wal)


def _header(wal: Path) -> bytes:
    try:
        with wal.open("rb") as file:
            return file.read(_WAL_HEADER_BYTES)
    except FileNotFoundError:
        return b""
