"""The HTTP sessions for media: they send no key, follow no redirect, and connect to public addresses only.

They also decide when a request may leave: at most `Limits.downloads` at once, none to a host that asked for a pause.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from typing import Any, Final, Protocol
from weakref import WeakValueDictionary

import aiohttp
from attrs import field, frozen
from yarl import URL

from xiling_async._internal.clock import Clock
from xiling_async._internal.redact import shown
from xiling_async.errors import DownloadError, StoreError, XilingError
from xiling_async.media.ssrf import public_socket
from xiling_async.models.record import Outcome, Succeeded
from xiling_async.models.request import Kind
from xiling_async.models.settings import Limits, Timeouts

MEDIA_BUFFER_BYTES: Final = 256 * 1024  # of a connection: as much as asyncio takes from the system at once
USUAL_PAUSE_S: Final = 30.0  # after a 429 that names none
LONGEST_PAUSE_S: Final = 60.0  # a host that asks for more is asked again after this
PAUSED_HOSTS: Final = 1024  # hosts that are remembered, of either sort; beyond this the pause that ends first is
# forgotten, or the oldest stall


# What an exchange came to that did not bring the whole file.


@frozen
class Retryable:
    """It may work at the next try. `pause_s`: what the host asked for. `limited`: it answered 429. `stalled`: it sent
    too little for too long."""

    reason: str
    pause_s: float | None = None
    limited: bool = False
    stalled: bool = False


@frozen
class LinkExpired:
    reason: str


@frozen
class Corrupt:
    """What came cannot be the announced file."""

    reason: str


@frozen
class Failed:
    """It cannot work."""

    error: Exception


Setback = Retryable | LinkExpired | Corrupt | Failed


class Results(Protocol):
    """What the service and the store know of a task whose files are downloaded."""

    async def outcome(self, kind: Kind[Any], task_id: str) -> Outcome | None:
        """What the service says of it now. Raises `XilingError`."""
        ...

    async def ended_at(self, task_id: str) -> float | None:
        """When it ended, Unix seconds; None where that is not known. Raises `StoreError`."""
        ...


@frozen(kw_only=True)
class MediaLink:
    """Where a file of a result is, and how to ask for a new link when this one has expired."""

    kind: Kind[Any]
    task_id: str
    what: str
    url: str | None = field(repr=False)
    results: Results

    def __str__(self) -> str:
        return f"The {self.what} of task {shown(self.task_id)}"

    async def renewed(self) -> str | None:
        """The link that the service gives now; None: it gives none. Raises `DownloadError`."""
        try:
            outcome = await self.results.outcome(self.kind, self.task_id)
        except XilingError as error:
            raise DownloadError(
                f"The link to the {self.what} of task {shown(self.task_id)} has expired, and the service could not be "
                f"asked for a new one: {error}",
                task_ids=(self.task_id,),
                retry_after=error.retry_after,
            ) from error
        return link_of(outcome.result, self.kind.media[self.what].field) if isinstance(outcome, Succeeded) else None

    async def lifetime(self) -> str:
        """A sentence that says how long results live."""
        days = f"Results live {self.kind.result_ttl_s / 86400:g} days"
        try:
            ended_at = await self.results.ended_at(self.task_id)
        except StoreError:
            ended_at = None
        if ended_at is None:
            return f"{days}."
        end = datetime.fromtimestamp(ended_at + self.kind.result_ttl_s, UTC)
        return f"{days}, this one until {end:%Y-%m-%d %H:%M} UTC."


def link_of(result: object, name: str) -> str | None:
    """The link in this field of a result, if there is one."""
    link: object = getattr(result, name)
    return link if isinstance(link, str) and link else None


class MediaTransport:
    """Gets files from anywhere, with no key, no cookie, no proxy and no `.netrc`; as they come, never unpacked.

    Two sessions that share nothing: one cannot connect to an address that is not public, the other can.
    `tls`: whom to trust, for tests.
    """

    def __init__(
        self,
        *,
        timeouts: Timeouts,
        clock: Clock,
        limits: Limits,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.timeouts = timeouts
        self.clock = clock
        self.limits = limits
        self.waiting = 0  # requests that wait for one of the slots
        self._tls = tls
        self._sessions: dict[bool, aiohttp.ClientSession] = {}  # made when they are needed
        self._timeout = aiohttp.ClientTimeout(total=None, connect=timeouts.connect)
        self._slots = asyncio.Semaphore(limits.downloads)
        self._slots_of_host: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()  # by host and port
        self._stalled: dict[str, None] = {}  # host and port
        self._slots_of_stalled = asyncio.Semaphore(max(1, limits.downloads // 4))
        self._paused_until: dict[str, float] = {}  # by host and port

    async def close(self) -> None:
        async with AsyncExitStack() as last:
            while self._sessions:
                last.push_async_callback(self._sessions.popitem()[1].close)

    def pause(self, url: URL, seconds: float | None) -> None:
        """Send the host and port of this URL nothing for so long, at most `LONGEST_PAUSE_S`; others go on."""
        until = self.clock.time() + min(USUAL_PAUSE_S if seconds is None else seconds, LONGEST_PAUSE_S)
        self._paused_until[url.authority] = max(until, self._paused_until.get(url.authority, 0.0))
        if len(self._paused_until) > PAUSED_HOSTS:
            del self._paused_until[min(self._paused_until, key=self._paused_until.__getitem__)]

    def stalled(self, url: URL) -> None:
        """The host of this URL kept a slot and sent next to nothing: until it sends a file, it shares one slot (or one
        of four, if there are more) with all others like it."""
        self._stalled[url.authority] = None
        if len(self._stalled) > PAUSED_HOSTS:
            del self._stalled[next(iter(self._stalled))]

    def has_sent(self, url: URL) -> None:
        """A response of the host of this URL came to its end."""
        self._stalled.pop(url.authority, None)

    @asynccontextmanager
    async def entry_of(self, url: URL) -> AsyncIterator[None]:
        """Hold one of the slots, once the host of this URL is not paused. Waiting for the host takes no slot, and no
        place in the queue for one: requests to one host do not stand before those to another."""
        host = url.authority
        while True:
            await self._not_paused(host)
            of_host = self._slots_for(host)
            async with AsyncExitStack() as held:
                self.waiting += 1
                try:
                    await held.enter_async_context(of_host)
                    await held.enter_async_context(self._slots)
                finally:
                    self.waiting -= 1
                if host not in self._paused_until and of_host is self._slots_for(host):  # else that came meanwhile
                    yield
                    return

    def _slots_for(self, host: str) -> asyncio.Semaphore:
        if host in self._stalled:
            return self._slots_of_stalled
        return self._slots_of_host.setdefault(host, asyncio.Semaphore(self.limits.downloads))

    async def _not_paused(self, host: str) -> None:
        while (left_s := self._paused_until.get(host, 0.0) - self.clock.time()) > 0:
            await self.clock.sleep(left_s)
        self._paused_until.pop(host, None)

    async def get(self, url: URL, headers: Mapping[str, str], *, allow_private: bool) -> aiohttp.ClientResponse:
        """The response, its body unread; the caller releases it. Raises whatever aiohttp and the codecs raise."""
        session = self._sessions.get(allow_private)
        if session is None:
            session = self._sessions[allow_private] = self._session(allow_private=allow_private)
        async with self.clock.timeout(self.timeouts.connect + self.timeouts.stall):
            return await session.get(
                url, headers=headers, timeout=self._timeout, allow_redirects=False, raise_for_status=False
            )

    def _session(self, *, allow_private: bool) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(
            limit=0,
            ssl=True if self._tls is None else self._tls,
            socket_factory=None if allow_private else public_socket,
        )
        return aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            auto_decompress=False,
            read_bufsize=MEDIA_BUFFER_BYTES,
        )
