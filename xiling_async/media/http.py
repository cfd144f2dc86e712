"""The HTTP sessions for media: they carry no key, follow nothing, and connect to public addresses only."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Final

import aiohttp
from yarl import URL

from xiling_async._internal.clock import Clock
from xiling_async.media.ssrf import is_public, public_socket
from xiling_async.models.settings import Timeouts

MEDIA_BUFFER_BYTES: Final = 256 * 1024  # of a connection: as much as asyncio takes from the system at once


class MediaTransport:
    """Gets files from anywhere, with no key, no cookie, no proxy and no `.netrc`; as they come, never unpacked.

    Two sessions that share nothing: one cannot connect to an address that is not public, the other can.
    `tls`: whom to trust, for tests; `is_public`: which addresses are.
    """

    def __init__(
        self,
        *,
        timeouts: Timeouts,
        clock: Clock,
        tls: ssl.SSLContext | None = None,
        is_public: Callable[[str], bool] = is_public,
    ) -> None:
        self._timeouts = timeouts
        self._clock = clock
        self._tls = tls
        self._is_public = is_public
        self._sessions: dict[bool, aiohttp.ClientSession] = {}  # made when they are needed
        self._timeout = aiohttp.ClientTimeout(total=None, connect=timeouts.connect)

    async def close(self) -> None:
        while self._sessions:
            await self._sessions.popitem()[1].close()

    @asynccontextmanager
    async def get(
        self, url: URL, headers: Mapping[str, str], *, allow_private: bool
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The answer, its body unread. Exceptions of aiohttp pass through, as in `Transport`."""
        session = self._sessions.get(allow_private)
        if session is None:
            session = self._sessions[allow_private] = self._session(allow_private=allow_private)
        async with self._clock.timeout(self._timeouts.connect + self._timeouts.stall):
            response = await session.get(
                url, headers=headers, timeout=self._timeout, allow_redirects=False, raise_for_status=False
            )
        async with response:
            yield response

    def _session(self, *, allow_private: bool) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(
            limit=0,
            ssl=True if self._tls is None else self._tls,
            socket_factory=None if allow_private else public_socket(self._is_public),
        )
        return aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            auto_decompress=False,
            read_bufsize=MEDIA_BUFFER_BYTES,
        )
