"""The LISTEN connection of a PostgreSQL store: it receives notifications and sends heartbeats.

Notifications sent while it is down are lost, so after each reconnect all watched jobs are read again: a lost
notification delays an update but never loses it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import re
import secrets
from functools import partial
from typing import Any, Final, Protocol

from xiling_async._internal.clock import SystemClock
from xiling_async._internal.tasks import wait_out
from xiling_async.stores.base import Watcher
from xiling_async.stores.postgres.address import without_frames
from xiling_async.stores.postgres.driver import Driver
from xiling_async.stores.postgres.queries import HANDOVER, Queries
from xiling_async.stores.postgres.schema import Connection, unquoted

log = logging.getLogger("xiling_async.stores")

PAGE: Final = 500
PAUSE_S: Final = 0.1  # before the first reconnect; doubled at each try
LONGEST_PAUSE_S: Final = 5.0
REREAD_BEATS: Final = (
    6  # heartbeats between two reads of all watched jobs: a notification may be lost on any connection
)
_ANY_VERSION: Final = 2**63  # newer than any known version
_VERSION: Final = re.compile(r"[0-9]{1,18}")


class Heart(Protocol):
    """Shows the other processes that this store lives."""

    heartbeat_s: float

    async def beat(self, connection: Connection) -> None: ...


class Listener:
    """Listens on the channel of the store's tables while it is open, and reconnects by itself."""

    def __init__(self, driver: Driver, queries: Queries, heart: Heart) -> None:
        self._driver = driver
        self._queries = queries
        self._heart = heart
        self._clock = SystemClock()
        self._task: asyncio.Task[None] | None = None
        self._stale: dict[str, int] = {}  # jobs to read again, with the version that was announced
        self._awake = asyncio.Event()
        self._greeted = asyncio.Event()
        self._first: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        self.greeting = secrets.token_hex(8)
        self.watcher: Watcher | None = None

    async def open(self) -> None:
        """Raises what the first connection raises; later ones are tried until one stands."""
        self._task = asyncio.get_running_loop().create_task(self._live(), name="xiling store listener")
        error = await self._first
        if error is not None:
            raise error

    async def close(self) -> None:
        """Also when this is cancelled, nothing goes on afterwards."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await wait_out(task)

    async def is_greeted(self) -> bool:
        """Whether `greeting`, which was sent before as a notification, arrives."""
        with contextlib.suppress(TimeoutError):
            async with self._clock.timeout(self._driver.connect_s):
                await self._greeted.wait()
        return self._greeted.is_set()

    # --- in the task ---------------------------------------------------------------------------------------------

    async def _live(self) -> None:
        try:
            connection = await self._connected()
        except Exception as error:
            self._tell_opener(without_frames(error))
            return
        self._tell_opener(None)
        while True:
            try:
                await self._serve(connection)
            except Exception as error:
                log.warning("the store gets no notifications until it is connected again: %s", self._driver.why(error))
            finally:
                connection.terminate()
            connection = await self._connected_again()
            self._reread_watched()
            log.warning("the store is connected again; %d watched jobs are read again", len(self._stale))

    def _tell_opener(self, error: Exception | None) -> None:
        if not self._first.done():  # else the opener was cancelled, and closes this
            self._first.set_result(error)

    def _reread_watched(self) -> None:
        if self.watcher is not None:
            self.watcher.handover_changed()
            self._stale.update(dict.fromkeys(self.watcher.watched(), _ANY_VERSION))

    async def _connected_again(self) -> Any:
        pause_s = PAUSE_S
        while True:
            await self._clock.sleep(pause_s * random.uniform(0.5, 1))  # noqa: S311 - no secret
            pause_s = min(pause_s * 2, LONGEST_PAUSE_S)
            with contextlib.suppress(Exception):
                return await self._connected()

    async def _connected(self) -> Any:
        connection = await self._driver.listening()
        try:
            connection.add_termination_listener(lambda _: self._awake.set())
            listening = connection.add_listener(self._queries.channel, self._notified)
            await self._driver.bounded(connection, listening, self._driver.limit_s)
            await self._heart.beat(connection)
        except BaseException:
            connection.terminate()
            raise
        return connection

    async def _serve(self, connection: Any) -> None:
        """Until the connection breaks; that is raised."""
        beat_at = self._clock.time() + self._heart.heartbeat_s
        beats = 0
        while True:
            self._awake.clear()
            if connection.is_closed():
                raise ConnectionError("the connection was cut")
            if self._clock.time() >= beat_at:
                await self._heart.beat(connection)
                beat_at = self._clock.time() + self._heart.heartbeat_s
                beats += 1
                if beats % REREAD_BEATS == 0:
                    self._reread_watched()
            await self._read_stale(connection)
            with contextlib.suppress(TimeoutError):
                async with self._clock.timeout(beat_at - self._clock.time()):
                    await self._awake.wait()

    async def _read_stale(self, connection: Any) -> None:
        while self._stale:
            page = dict(self._stale.popitem() for _ in range(min(PAGE, len(self._stale))))
            wanted = [job_id for job_id, version in page.items() if self._is_news(job_id, version)]
            if not wanted:
                continue
            found = await self._driver.on(connection, partial(self._queries.many, job_ids=wanted))
            if self.watcher is not None:
                for record in found:
                    self.watcher.told(record)
                self.watcher.missing(set(wanted) - {record.id for record in found} - self._queries.reader.skipped)

    def _is_news(self, job_id: str, version: int) -> bool:
        """Whether this job is awaited here and that version is not known yet; an echo of our own change is not news."""
        known = None if self.watcher is None else self.watcher.known(job_id)
        return known is not None and known < version

    def _notified(self, connection: object, process: int, channel: str, payload: str) -> None:
        """`<job id> <version>`, `HANDOVER`, or the greeting. Every session of the database can send a notification:
        what does not parse, or is about a job that is not awaited here, is dropped."""
        name, _, version = payload.rpartition(" ")
        if payload == self.greeting:
            self._greeted.set()
        elif payload == HANDOVER:
            if self.watcher is not None:
                self.watcher.handover_changed()
        elif _VERSION.fullmatch(version) and self._is_news(unquoted(name), int(version)):
            self._stale[unquoted(name)] = int(version)
            self._awake.set()
