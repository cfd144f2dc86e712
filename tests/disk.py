"""How a SQLiteStore opens its file in tests: every statement is noted, and each can be made to wait or to fail."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterable
from typing import Any


class Disk:
    """`connect` is what a store is given.

    `fails(statement)`: raise before it is done, as a broken disk would; `fails_after`: when it is done already.
    `gate`: while it is shut, transactions wait before they begin. `full`: the file may grow no more.
    `seen`: what the pragmas were when the connection was closed.
    """

    def __init__(self, *, fails: Callable[[str], bool] = lambda statement: False) -> None:
        self.fails = fails
        self.fails_after: Callable[[str], bool] = lambda statement: False
        self.full = False
        self.gate = threading.Event()
        self.gate.set()
        self.reached = threading.Event()
        self.statements: list[str] = []
        self.threads: set[int] = set()
        self.seen: dict[str, Any] = {}

    def connect(self, path: str, **options: Any) -> sqlite3.Connection:
        disk = self
        disk._pause("open")

        class Connection(sqlite3.Connection):
            def execute(self, statement: str, values: Any = (), /) -> sqlite3.Cursor:
                disk._pause(statement)
                if statement.startswith("BEGIN"):
                    super().execute(f"PRAGMA max_page_count = {1 if disk.full else 2**31 - 2}")
                disk._before(statement)
                done = super().execute(statement, values)
                disk._after(statement, done)
                return done

            def executemany(self, statement: str, values: Iterable[Any], /) -> sqlite3.Cursor:
                disk._before(statement)
                done = super().executemany(statement, values)
                disk._after(statement, done)
                return done

            def executescript(self, script: str, /) -> sqlite3.Cursor:
                disk._before(script)
                done = super().executescript(script)
                disk._after(script, done)
                return done

            def close(self) -> None:
                for name in ("locking_mode", "journal_mode", "synchronous", "fullfsync", "application_id"):
                    (disk.seen[name],) = super().execute(f"PRAGMA {name}").fetchone()
                super().close()

        return sqlite3.connect(path, factory=Connection, **options)

    @property
    def commits(self) -> int:
        return self.statements.count("COMMIT")

    def _pause(self, statement: str) -> None:
        if statement.startswith(("open", "BEGIN")) and not self.gate.is_set():
            self.reached.set()
            self.gate.wait(30)

    def _before(self, statement: str) -> None:
        self.statements.append(statement)
        self.threads.add(threading.get_ident())
        if self.fails(statement):
            raise sqlite3.OperationalError("disk I/O error")

    def _after(self, statement: str, done: sqlite3.Cursor) -> None:
        if self.fails_after(statement):
            done.close()  # what was read is not to be had
            raise sqlite3.OperationalError("disk I/O error")


class Nth:
    """True for the n-th call alone."""

    def __init__(self, n: int) -> None:
        self.left = n

    def __call__(self, statement: str) -> bool:
        self.left -= 1
        return self.left == 0

    @property
    def has_come(self) -> bool:
        return self.left <= 0
