"""One file, downloaded into its partial file: resumed where it was cut, checked against what its host announced.

What an exchange came to is a value, never an exception: an exception of aiohttp may hold the URL, and with it the
signature. Errors name the task and the host, and nothing else of the URL.
"""

from __future__ import annotations

import random
from typing import Any, Final

import aiohttp
from attrs import frozen
from yarl import URL

from xiling_async.api import backoff
from xiling_async.errors import DownloadError, IntegrityError, ResultExpired
from xiling_async.media import headers as media_headers
from xiling_async.media import ssrf
from xiling_async.media.disk_writer import BlockWriter, Disk, Progress, report
from xiling_async.media.headers import Announced, Contradiction, Headers
from xiling_async.media.http import (
    LONGEST_PAUSE_S,
    Corrupt,
    Failed,
    LinkExpired,
    MediaLink,
    MediaTransport,
    Retryable,
    Setback,
)
from xiling_async.media.partial_file import PartialFile

MAX_BYTES: Final = 4 * 1024**3
TRIES: Final = 5  # repeats in a row that make no progress
RATE_LIMIT_WAITS: Final = 8  # in a row
PROGRESS_BYTES: Final = 512  # fewer new bytes are no progress: a host that sends byte by byte is not asked for ever
EXCHANGES: Final = 100  # of one transfer, and one more for each 64 KiB that came: no trickle lasts for ever
EXCHANGE_BYTES: Final = 64 * 1024
MIN_RATE: Final = 1024  # bytes a second, over each window of `Timeouts.stall` seconds
SLOW_RATE: Final = 16 * 1024  # bytes a second: below this a transfer makes way for others that wait for a slot
REDIRECTS: Final = 3
MOVED: Final = frozenset({301, 302, 303, 307, 308})
# Google Cloud Storage answers 400 to an expired signature, other storages 401 or 403.
GONE: Final = frozenset({400, 401, 403, 404, 410})
TOO_MANY_REQUESTS: Final = 429
REQUEST_TIMEOUT: Final = 408


@frozen(kw_only=True)
class DownloadOptions:
    """How to download. `what`: a word of the kind, "both", or None for the file that matters most. `free_bytes`: as
    much of the disk stays free; 0: all of it may be used. The rest is as in `Client.download`."""

    what: str | None = "video"
    allow_private: bool = False
    overwrite: bool = False
    progress: Progress | None = None
    max_bytes: int = MAX_BYTES
    free_bytes: int = 0


class Transfer:
    """Downloads what is behind `link` into an open partial file."""

    def __init__(
        self, link: MediaLink, part: PartialFile, options: DownloadOptions, transport: MediaTransport, disk: Disk
    ) -> None:
        self._link = link
        self._url = link.url
        self._part = part
        self._options = options
        self._transport = transport
        self._disk = disk
        self._asked: URL | None = None  # the last one
        self._is_renewed = self._was_corrupt = False
        self._best = 0  # bytes: what goes beyond them is progress
        self._tries = self._waits = 0
        self.exchanges = 0

    async def run(self) -> None:
        """Returns when the partial file holds the whole file.

        Raises `DownloadError`, `DiskError`, and what `options.progress` raises.
        """
        total = self._part.announced.total
        if total is not None and total > self._options.max_bytes:
            raise (await self._too_large(total)).error
        if await self._is_whole_already():
            return
        self._best = self._part.size
        while True:
            self.exchanges += 1
            setback = await self._attempt()
            if self._part.size - self._best >= PROGRESS_BYTES:
                self._best, self._tries, self._waits = self._part.size, 0, 0
            if setback is None:
                fault = await self._fault()
                if fault is None:
                    return
                setback = Corrupt(fault)
            await self._recover(setback)

    # --- between two exchanges -----------------------------------------------------------------------------------

    async def _is_whole_already(self) -> bool:
        """Whether an earlier download has left all of it, and a digest proves that."""
        part = self._part
        if not part.announced.is_provable or part.announced.total != part.size:
            await self._fault()
            return False
        if await self._fault() is None:
            report(part, self._options.progress)
            return True
        await self._disk.run(part.clear)
        return False

    async def _fault(self) -> str | None:
        while await self._disk.run(self._part.catch_up):
            pass
        return self._part.fault()

    async def _recover(self, setback: Setback) -> None:
        match setback:
            case Failed(error):
                raise error
            case Corrupt(reason):
                await self._start_over(reason)
            case LinkExpired(reason):
                await self._renew_link(reason)
            case Retryable():
                await self._pause(setback)

    async def _pause(self, setback: Retryable) -> None:
        kept = " What came is kept: a later download resumes there." if self._part.size else ""
        if setback.limited:
            self._waits += 1
            if self._asked is not None:
                self._transport.pause(self._asked, setback.pause_s)
        else:
            self._tries += 1
            if setback.stalled and self._asked is not None:
                self._transport.stalled(self._asked)
        if self._tries > TRIES or self._waits > RATE_LIMIT_WAITS:
            count = self._waits if setback.limited else self._tries
            message = f"could not be downloaded: {setback.reason}; {count} attempts in a row made no progress.{kept}"
            raise self._error(message, retry_after=setback.pause_s)
        if self.exchanges >= EXCHANGES + self._part.size // EXCHANGE_BYTES:
            raise self._error(
                f"could not be downloaded: {setback.reason}; {self.exchanges} requests brought too little.{kept}"
            )
        if not setback.limited:
            pause_s = backoff.full_jitter(self._tries - 1, random.random) if self._tries else 0.0
            await self._transport.clock.sleep(max(pause_s, min(setback.pause_s or 0.0, LONGEST_PAUSE_S)))

    async def _start_over(self, reason: str) -> None:
        if self._was_corrupt:
            await self._disk.run(self._part.discard)
            raise IntegrityError(
                f"{self._link} from {self._host} is not what was announced, twice: {reason}. Nothing was kept.",
                task_ids=(self._link.task_id,),
            )
        self._was_corrupt = True
        self._best = 0
        await self._disk.run(self._part.clear)

    async def _renew_link(self, reason: str) -> None:
        """One status GET for a new link."""
        fresh = None
        if not self._is_renewed:
            self._is_renewed = True
            fresh = await self._link.renewed()
        if fresh is not None and fresh != self._url:
            self._url = fresh
            return
        await self._disk.run(self._part.discard)
        raise ResultExpired(
            f"{self._link} is no longer available: {reason}, and the service gives no other link. "
            f"{await self._link.lifetime()}",
            task_ids=(self._link.task_id,),
        )

    # --- one exchange --------------------------------------------------------------------------------------------

    async def _attempt(self) -> Setback | None:
        """The link with its redirects, each of them checked. What came of the file is in the partial file, whatever
        this returns; None: the response ended as it should."""
        if self._url is None:
            return LinkExpired("the result has no link")
        result: URL | Setback | None = self._checked(self._url)
        for _ in range(REDIRECTS + 1):
            if not isinstance(result, URL):
                return result
            result = await self._exchange(result)
        return Failed(self._error(f"redirects more than {REDIRECTS} times.")) if isinstance(result, URL) else result

    def _checked(self, link: str, base: URL | None = None) -> URL | Failed:
        try:
            url = ssrf.media_url(link, base)
            reason_refused = ssrf.reason_refused(url, allow_private=self._options.allow_private)
        except Exception:  # untrusted text: what yarl, idna and ipaddress raise for it is not a closed list
            reason_refused = "it is not a URL"
        if reason_refused is None:
            self._asked = url
            return url
        whose = "its link" if base is None else "it was redirected to a link that"
        return Failed(self._error(f"was not requested: {whose} is refused, {reason_refused}."))

    async def _exchange(self, url: URL) -> URL | Setback | None:
        """One request: where it redirects to, or what it came to."""
        part, start = self._part, None
        headers = {"Accept": "*/*", "Accept-Encoding": "identity"}
        if part.size and part.announced.is_resumable:
            # Of a whole file the last byte is asked for again: the answer says whether it is still the same file.
            start = part.size if part.announced.total is None else min(part.size, part.announced.total - 1)
            headers["Range"] = f"bytes={start}-"
            if part.announced.validator is not None:
                headers["If-Range"] = part.announced.validator
        async with self._transport.entry_of(url):
            try:
                response = await self._transport.get(url, headers, allow_private=self._options.allow_private)
            except Exception as error:
                return self._broken(error)
            try:
                location = response.headers.get("Location")
                if response.status in MOVED and location is not None:
                    return self._checked(location, url)
                return await self._take(response, start)
            finally:
                response.release()

    def _broken(self, error: Exception) -> Setback:
        """What an exception of the network says. It is not raised again: it may hold the URL."""
        name = type(error).__name__
        if isinstance(getattr(error, "os_error", None), ssrf.NotPublic):
            return Failed(self._error("was not requested: that host has an address that is not public."))
        if isinstance(error, TimeoutError):
            return Retryable("nothing came for too long", stalled=True)
        if isinstance(error, aiohttp.ClientPayloadError):
            return Retryable(name)
        if isinstance(error, aiohttp.ClientResponseError):  # the parser's word for what is not HTTP
            reason = "what came is not HTTP, or goes on behind its announced end"
            return Retryable(name) if self._part.size else Corrupt(reason)
        if isinstance(error, (aiohttp.ClientError, OSError)) and not isinstance(error, ValueError):
            return Retryable(name)
        return Failed(self._error(f"could not be requested ({name})."))

    async def _take(self, response: aiohttp.ClientResponse, start: int | None) -> Setback | None:
        """The response by its status and headers, then its body."""
        headers, status, part = response.headers, response.status, self._part
        if status == 416 and start is not None:
            return await self._unsatisfied(media_headers.unsatisfied_total(headers))
        if status not in (200, 206):
            return self._no_file(status, headers)
        if headers.get("Content-Encoding", "identity").strip().lower() != "identity":
            return Failed(self._error("is compressed (Content-Encoding), although that was not asked for."))
        try:
            announced = media_headers.of_whole(headers) if status == 200 else media_headers.of_rest(headers, start)
            if status == 206 and not part.announced.fits(announced):
                raise Contradiction("the rest of another file")
        except Contradiction as why:
            if status == 200:
                return Corrupt(str(why))
            await self._disk.run(part.clear)
            return Retryable(f"{why} came when the rest was asked for")
        if status == 206:
            if None not in (part.announced.total, announced.total) and part.announced.total != announced.total:
                return Corrupt(f"{part.announced.total} bytes were announced, then {announced.total}")
            announced = part.announced.with_more(announced)
        if announced.total is not None and announced.total > self._options.max_bytes:
            return await self._too_large(announced.total)
        return await self._receive_body(response, announced, start)

    async def _unsatisfied(self, total: int | None) -> Setback:
        before = self._part.announced.total
        if None not in (total, before) and total != before:
            return Corrupt(f"{before} bytes were announced, then {total}")
        await self._disk.run(self._part.clear)
        return Retryable("the host has nothing where the rest should be")

    def _no_file(self, status: int, headers: Headers) -> Setback:
        pause_s = backoff.retry_after(headers.get("Retry-After"), self._transport.clock.time())
        reason = f"{self._host} answered HTTP {status}"
        if status in GONE:
            return LinkExpired(reason)
        if status in (TOO_MANY_REQUESTS, REQUEST_TIMEOUT) or status >= 500:
            return Retryable(reason, pause_s, limited=status == TOO_MANY_REQUESTS)
        return Failed(self._error(f"could not be downloaded: {reason}."))

    async def _receive_body(
        self, response: aiohttp.ClientResponse, announced: Announced, start: int | None
    ) -> Setback | None:
        """The body into the partial file. Whatever ends it, what came is written before this returns."""
        part, options = self._part, self._options
        is_rest = response.status != 200
        skip, room = (part.size - (start or 0), options.max_bytes - part.size) if is_rest else (0, options.max_bytes)
        window_s, left_s, gained = self._transport.timeouts.stall, self._transport.timeouts.stall, 0
        async with BlockWriter(self._disk, part, announced, is_rest=is_rest, progress=options.progress) as writer:
            while True:
                began_at = self._transport.clock.time()
                try:
                    async with self._transport.clock.timeout(max(left_s, 0.0)):
                        data = await response.content.readany()
                except Exception as error:
                    if isinstance(error, TimeoutError) and gained:
                        return Retryable(f"fewer than {MIN_RATE} bytes a second came", stalled=True)
                    return self._broken(error)
                if not data:
                    self._transport.has_sent(response.url)
                    return None
                left_s -= self._transport.clock.time() - began_at
                gained += len(data)
                data, skip = data[skip:], max(0, skip - len(data))
                room -= len(data)
                if room < 0:
                    break
                await writer.add(data)
                if gained >= MIN_RATE * window_s:
                    if self._should_yield_slot(gained, window_s - left_s):
                        return Retryable("other downloads were waiting")
                    left_s, gained = window_s, 0
        return await self._too_large(None)

    def _should_yield_slot(self, gained: int, seconds: float) -> bool:
        """Whether a slow transfer should give its slot to one that waits, and resume later."""
        is_slow = gained < SLOW_RATE * seconds
        return is_slow and self._transport.waiting > 0 and self._part.announced.is_resumable

    # --- errors -------------------------------------------------------------------------------------------------

    @property
    def _host(self) -> str:
        return "" if self._asked is None else self._asked.host or ""

    def _error(self, reason: str, **known: Any) -> DownloadError:
        where = f" from {self._host}" if self._host else ""
        return DownloadError(f"{self._link}{where} {reason}", task_ids=(self._link.task_id,), **known)

    async def _too_large(self, total: int | None) -> Failed:
        await self._disk.run(self._part.discard)
        size = "more" if total is None else f"{total} bytes"
        return Failed(self._error(f"is {size}, above the cap of {self._options.max_bytes} bytes (max_bytes)."))
