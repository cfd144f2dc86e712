"""The HTTP sessions: the API's, which alone carries the key, and those for media; they repeat and follow nothing."""

from __future__ import annotations

from collections.abc import AsyncIterable, Mapping
from typing import Final

import aiohttp
from attrs import define
from yarl import URL

from xiling_async._internal.clock import Clock
from xiling_async.errors import ClientClosed, ConfigurationError
from xiling_async.models.settings import Timeouts

ANSWER_BYTES: Final = 1024 * 1024  # answers are a few hundred bytes; a larger one is none of the API's
# An idle connection is given up before a server or a balancer does: a stale one costs an uncertain submit.
KEEP_ALIVE_S: Final = 3.0
SLOWEST_UPLOAD: Final = 64 * 1024  # bytes a second, half a megabit: a slower one is taken for stuck


class AnswerTooLarge(aiohttp.ClientPayloadError):
    """The answer's body is larger than any answer of the API can be."""


@define(kw_only=True)
class Answer:
    """A whole answer: bounded body, headers as they came."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Body:
    """A request's body of known size, which knows whether it was asked for. What was never asked for never left."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.has_left = False

    def __aiter__(self) -> Body:
        return self

    async def __anext__(self) -> bytes:
        if self.has_left:
            raise StopAsyncIteration
        self.has_left = True
        return self.content


class Transport:
    """Posts and gets below one base URL. Exceptions of aiohttp pass through: retry_rules.py says what they prove."""

    def __init__(
        self,
        base_url: URL,
        api_key: str,
        *,
        timeouts: Timeouts,
        clock: Clock,
        headers: Mapping[str, str],
        session: aiohttp.ClientSession | None,
    ) -> None:
        self._base = str(base_url).rstrip("/")
        self._headers = {**headers, "Authorization": f"Bearer {api_key}", "Accept": "application/json"}
        self._timeouts = timeouts
        self._clock = clock
        self._session = session
        self._is_borrowed = session is not None
        # No total: it would run while a request queues. `connect` is DNS, TCP and TLS; the rest is timed by our clock.
        self._timeout = aiohttp.ClientTimeout(total=None, connect=timeouts.connect)

    def open(self) -> None:
        """Raises `ConfigurationError` for a borrowed session that cannot be used."""
        if self._session is None:
            # limit=0: the senders are the limit; waiting here would look like a slow connect.
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
            self._session = aiohttp.ClientSession(
                connector=connector, cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=True
            )
        self.check()

    def check(self) -> None:
        """Raises `ConfigurationError` if the borrowed session would send something else, or nothing; `ClientClosed`."""
        session = self._session
        if session is None:
            raise ClientClosed("The client is closed: nothing was sent. Open a new one with the same store.")
        if not self._is_borrowed:
            return
        why = None
        if session.closed:
            why = "is closed: pass one that stays open as long as the client"
        elif session.auth is not None:
            why = "has auth=, which would take the place of the API key: pass one without it"
        elif session.raise_for_status:
            why = "has raise_for_status, which hides the body of the service's answers: pass one without it"
        if why is not None:
            raise ConfigurationError(f"The session {why}. Nothing was sent, nothing was bought.")

    async def close(self) -> None:
        session, self._session = self._session, None
        if session is not None and not self._is_borrowed:
            await session.close()

    async def post(self, path: str, body: Body) -> Answer:
        """Send JSON. `body.has_left` tells afterwards whether any of it can have been sent."""
        length = str(len(body.content))
        headers = {**self._headers, "Content-Type": "application/json", "Content-Length": length}
        return await self._exchange("POST", path, body, headers)

    async def get(self, path: str) -> Answer:
        return await self._exchange("GET", path, None, self._headers)

    async def upload(self, path: str, body: AsyncIterable[bytes], *, size_bytes: int, content_type: str) -> Answer:
        """Stream a body of known length. It may take `Timeouts.connect + answer`, and a second for each 64 KiB."""
        headers = {**self._headers, "Content-Type": content_type, "Content-Length": str(size_bytes)}
        return await self._exchange("POST", path, body, headers, allowance_s=size_bytes / SLOWEST_UPLOAD)

    async def _exchange(
        self,
        method: str,
        path: str,
        body: AsyncIterable[bytes] | None,
        headers: Mapping[str, str],
        *,
        allowance_s: float = 0.0,
    ) -> Answer:
        self.check()
        assert self._session is not None
        url = URL(f"{self._base}/{path}", encoded=True)
        data = None if body is None else aiohttp.AsyncIterablePayload(body)
        async with (
            self._clock.timeout(self._timeouts.connect + self._timeouts.answer + allowance_s),
            self._session.request(
                method, url, data=data, headers=headers, timeout=self._timeout, allow_redirects=False,
                raise_for_status=False, middlewares=(),
            ) as response,
        ):  # fmt: skip
            return Answer(status=response.status, headers=response.headers, body=await _bounded(response))


async def _bounded(response: aiohttp.ClientResponse) -> bytes:
    if response.content.is_eof():  # a small answer is here whole by the time its headers are read
        body = response.content.read_nowait()
        if len(body) <= ANSWER_BYTES:
            return body
        raise AnswerTooLarge(f"more than {ANSWER_BYTES} bytes")
    chunks: list[bytes] = []
    size = 0
    async for chunk in response.content.iter_any():
        size += len(chunk)
        if size > ANSWER_BYTES:
            raise AnswerTooLarge(f"more than {ANSWER_BYTES} bytes")
        chunks.append(chunk)
    return b"".join(chunks)
