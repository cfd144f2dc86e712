"""The line of a PostgreSQL store: one connection of its own on which it hears of changes, and shows that it lives.

What is heard while the line is cut is lost; so whoever comes back reads again all that is waited for. A lost
notification costs time, never news.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable
from typing import Any, Final

from xiling_async._internal.clock import SystemClock
from xiling_async._internal.tasks import Tasks
from xiling_async.models.record import JobRecord
from xiling_async.stores.base import Watcher
from xiling_async.stores.postgres.schema import Connection, unquoted

log = logging.getLogger("xiling_async.stores")

PAGE: Final = 500
PAUSE_S: Final = 0.1  # before the first new try; doubled from try to try
LONGEST_PAUSE_S: Final = 5.0
REREAD_BEATS: Final = 6  # so many heartbeats apart, all jobs that are waited for are read again
_ANY: Final = 2**63  # newer than what is known, whatever that is


class Line:
    """`connect`: makes the connection. `beat`: says on it that we live; it comes every `heartbeat_s`. `read`: the
    newest records of some jobs. `why`: an error in words that hold no secret.
    `hello_s`: how long a first notification may take."""

    def __init__(
        self,
        *,
        connect: Callable[[], Awaitable[Any]],
        beat: Callable[[Connection], Awaitable[None]],
        read: Callable[[Connection, list[str]], Awaitable[list[JobRecord]]],
        why: Callable[[BaseException], str],
        channel: str,
        heartbeat_s: float,
        hello_s: float,
    ) -> None:
        self._connect = connect
        self._beat = beat
        self._read = read
        self._why = why
        self._channel = channel
        self._heartbeat_s = heartbeat_s
        self._hello_s = hello_s
        self._clock = SystemClock()
        self._tasks = Tasks()
        self._connection: Any = None
        self._stale: dict[str, int] = {}  # jobs whose newest record is to be read, with the version that was heard of
        self._awake = asyncio.Event()
        self._greeted: set[str] = set()
        self._greeting = asyncio.Event()
        self.watcher: Watcher | None = None

    async def open(self) -> None:
        """Raises what the first connection raises; later ones are tried until they stand."""
        connection = await self._connected()
        self._tasks.start(self._live(connection), name="xiling store line")

    async def close(self) -> None:
        await self._tasks.cancel()

    async def has_heard(self, greeting: str) -> bool:
        """Whether this payload, which was sent before, arrives."""
        try:
            async with self._clock.timeout(self._hello_s):
                while greeting not in self._greeted:
                    self._greeting.clear()
                    await self._greeting.wait()
        except TimeoutError:
            return False
        self._greeted.clear()
        return True

    # --- in the task ---------------------------------------------------------------------------------------------

    async def _live(self, connection: Any) -> None:
        while True:
            try:
                await self._serve(connection)
            except Exception as error:
                log.warning("the store hears of no changes until it is connected again: %s", self._why(error))
            finally:
                connection.terminate()
            connection = await self._connected_again()
            self._reread_watched()
            log.warning("the store is connected again; %d jobs that are watched are read anew", len(self._stale))

    def _reread_watched(self) -> None:
        if self.watcher is not None:
            self._stale.update(dict.fromkeys(self.watcher.watched(), _ANY))

    async def _connected_again(self) -> Any:
        pause_s = PAUSE_S
        while True:
            await self._clock.sleep(pause_s * random.uniform(0.5, 1))  # noqa: S311 - no secret
            pause_s = min(pause_s * 2, LONGEST_PAUSE_S)
            with contextlib.suppress(Exception):
                return await self._connected()

    async def _connected(self) -> Any:
        connection = await self._connect()
        try:
            connection.add_termination_listener(lambda _: self._awake.set())
            await connection.add_listener(self._channel, self._hear)
            await self._beat(connection)
        except BaseException:
            connection.terminate()
            raise
        return connection

    async def _serve(self, connection: Any) -> None:
        """Until the connection breaks; that is raised."""
        beat_at = self._clock.time() + self._heartbeat_s
        beats = 0
        while True:
            self._awake.clear()
            if connection.is_closed():
                raise ConnectionError("the connection was cut")
            if self._clock.time() >= beat_at:
                await self._beat(connection)
                beat_at = self._clock.time() + self._heartbeat_s
                beats += 1
                if beats % REREAD_BEATS == 0:  # a notification may be lost on a connection that lives
                    self._reread_watched()
            await self._read_anew(connection)
            with contextlib.suppress(TimeoutError):
                async with self._clock.timeout(beat_at - self._clock.time()):
                    await self._awake.wait()

    async def _read_anew(self, connection: Any) -> None:
        while self._stale:
            page = dict(self._stale.popitem() for _ in range(min(PAGE, len(self._stale))))
            wanted = [job_id for job_id, version in page.items() if self._is_news(job_id, version)]
            found = await self._read(connection, wanted) if wanted else []
            if self.watcher is not None:
                for record in found:
                    self.watcher.told(record)
                self.watcher.missing(set(wanted) - {record.id for record in found})

    def _is_news(self, job_id: str, version: int) -> bool:
        """Whether somebody waits for this job and does not know that version: an echo of our own change is none."""
        known = None if self.watcher is None else self.watcher.known(job_id)
        return known is not None and known < version

    def _hear(self, connection: object, process: int, channel: str, payload: str) -> None:
        """`<job id> <version>`; a payload of one word is a greeting."""
        name, _, version = payload.rpartition(" ")
        if not name:
            self._greeted.add(payload)
            self._greeting.set()
        elif self._is_news(unquoted(name), int(version)):
            self._stale[unquoted(name)] = int(version)
            self._awake.set()
