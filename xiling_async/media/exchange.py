"""One exchange of a download: the request, its redirects, what the answer says, its body into the part.

What it came to is a value, never an exception: an exception of aiohttp may hold the URL, and with it the signature.
Every sentence names the task and the host, and nothing more of the URL.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, Final

import aiohttp
from attrs import field, frozen
from yarl import URL

from xiling_async._internal.clock import Clock
from xiling_async._internal.redact import shown
from xiling_async.api import classify, retry
from xiling_async.api.classify import Happened, Step
from xiling_async.api.throttle import Gate
from xiling_async.errors import DownloadError
from xiling_async.media import headers as announced
from xiling_async.media import ssrf
from xiling_async.media.headers import Contradiction
from xiling_async.media.http import MediaTransport
from xiling_async.media.partial_file import Part
from xiling_async.media.spool import Disk, Spool
from xiling_async.models.settings import Timeouts

REDIRECTS: Final = 3
MOVED: Final = frozenset({301, 302, 303, 307, 308})
# Those of the issue of a dead link; Google's storage answers an expired signature with 400, others with 401.
GONE: Final = frozenset({400, 401, 403, 404, 410})
REQUEST_TIMEOUT: Final = 408

Progress = Callable[[int, int | None], object]


@frozen(kw_only=True)
class Order:
    """What is wanted. `fresh`: asks the service for a new link, once; `lives_until`: words on when links end."""

    task_id: str
    what: str
    url: str | None = field(repr=False)
    allow_private: bool
    max_bytes: int
    progress: Progress | None
    fresh: Callable[[], Awaitable[str | None]]
    lives_until: Callable[[], Awaitable[str]]

    @property
    def words(self) -> str:
        return f"The {self.what} of task {shown(self.task_id)}"


@frozen(kw_only=True)
class Means:
    """What all fetches of a client share."""

    transport: MediaTransport
    disk: Disk
    clock: Clock
    timeouts: Timeouts
    gate: Gate  # closed by a 429 of a media host; the API has its own
    budget: retry.RetryBudget
    random: Callable[[], float]


@frozen
class Setback:
    """It may work at the next try; None: as soon as back-off lets it."""

    why: str
    pause_s: float | None = None
    limited: bool = False


@frozen
class Gone:
    """The link is dead."""

    why: str


@frozen
class Spoiled:
    """What came cannot be the announced file."""

    why: str


@frozen
class Failed:
    """It cannot work."""

    error: Exception


Ending = Setback | Gone | Spoiled | Failed | None  # None: the answer came to its end


class StallWatch:
    """Closes an answer of which nothing has come for too long. One timer for all of it: a timeout for each block would
    cost more than the block. While nobody reads, nothing stalls."""

    def __init__(self, response: aiohttp.ClientResponse, clock: Clock, limit_s: float) -> None:
        self.stalled = False
        self._response = response
        self._clock = clock
        self._limit_s = limit_s
        self._since: float | None = None
        self._timer = clock.call_later(limit_s, self._look)

    def begins(self) -> None:
        """Somebody waits for a block."""
        self._since = self._clock.time()

    def ends(self) -> None:
        self._since = None

    def close(self) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        waited_s = 0.0 if self._since is None else self._clock.time() - self._since
        self.stalled = waited_s >= self._limit_s
        if self.stalled:
            self._response.close()
        else:
            self._timer = self._clock.call_later(self._limit_s - waited_s, self._look)


class Exchange:
    """Of one order and its open part; again and again."""

    def __init__(self, order: Order, part: Part, means: Means) -> None:
        self._order = order
        self._part = part
        self._means = means
        self.host = ""  # that was asked last

    def error(self, words: str, **known: Any) -> DownloadError:
        where = f" from {self.host}" if self.host else ""
        return DownloadError(f"{self._order.words}{where} {words}", task_ids=(self._order.task_id,), **known)

    async def attempt(self, link: str | None) -> Ending:
        """Whatever it comes to, what has come of the file is in the part."""
        if link is None:
            return Gone("no link was given")
        await self._means.gate.passed()
        found: URL | Ending = self._parsed(link)
        for _ in range(REDIRECTS + 1):
            if not isinstance(found, URL):
                return found
            found = await self._ask(found)
        return found if not isinstance(found, URL) else Failed(self.error(f"redirects more than {REDIRECTS} times."))

    def _parsed(self, link: str, base: URL | None = None) -> URL | Failed:
        try:
            url = ssrf.media_url(link if base is None else str(base.join(URL(link, encoded=True))))
            self.host = url.host or ""
            objection = ssrf.objection(url, allow_private=self._order.allow_private)
        except ValueError:
            objection = "it is no URL"
        if objection is None:
            return url
        self.host = "" if base is None else self.host
        whose = "its link" if base is None else "it was redirected to a link that"
        return Failed(self.error(f"is not fetched: {whose} is refused, {objection}."))

    async def _ask(self, url: URL) -> URL | Ending:
        """One request: where it redirects to, or what it came to."""
        part, start = self._part, None
        headers = {"Accept": "*/*", "Accept-Encoding": "identity"}
        if part.size and part.announced.is_resumable:
            # Of a whole file the last byte is asked for once more: the answer says whether it is still the same file.
            start = part.size if part.announced.total is None else min(part.size, part.announced.total - 1)
            headers["Range"] = f"bytes={start}-"
            if part.announced.validator is not None:
                headers["If-Range"] = part.announced.validator
        try:
            async with self._means.transport.get(url, headers, allow_private=self._order.allow_private) as response:
                location = response.headers.get("Location")
                if response.status not in MOVED or location is None:
                    return await self._take(response, start)
        except classify.FAILURES as error:
            return self._broke(error)
        return self._parsed(location, url)

    def _broke(self, error: BaseException) -> Ending:
        if isinstance(getattr(error, "os_error", None), ssrf.NotPublic):
            return Failed(self.error("is not fetched: that host has an address that is not public."))
        happened = classify.of_exception(error)
        why = "nothing came for too long" if isinstance(error, TimeoutError) else type(error).__name__
        if (
            isinstance(error, aiohttp.InvalidURL)
            or happened is None
            or classify.after_download(happened) is not Step.AGAIN
        ):
            return Failed(self.error(f"cannot be asked for ({why})."))
        if happened is Happened.GARBLED and not self._part.size:  # as when more is sent than was announced
            return Spoiled("what came is no HTTP, or goes on behind its announced end")
        return Setback(why)

    async def _take(self, response: aiohttp.ClientResponse, start: int | None) -> Ending:
        """The answer by its status and headers, then its body."""
        headers, status = response.headers, response.status
        if status == 416 and start is not None:
            return await self._unsatisfied(announced.unsatisfied_total(headers))
        if status not in (200, 206):
            return self._no_file(status, headers)
        if headers.get("Content-Encoding", "identity").strip().lower() != "identity":
            return Failed(self.error("is packed (Content-Encoding), although that was not asked for."))
        part, skip = self._part, 0
        try:
            if status == 200:
                said = announced.of_whole(headers)
                begin = partial(part.begin, said)
            else:
                later = announced.of_rest(headers, -1 if start is None else start)
                if not part.announced.fits(later):
                    raise Contradiction("the rest of another file")
                if None not in (part.announced.total, later.total) and part.announced.total != later.total:
                    return Spoiled(f"{part.announced.total} bytes were announced, then {later.total}")
                said = part.announced.with_more(later)
                begin, skip = partial(part.go_on, said), part.size - (start or 0)
        except Contradiction as why:
            if status == 200:
                return Spoiled(str(why))
            await self._means.disk.do(part.clear)
            return Setback(f"{why} came when the rest was asked for")
        if said.total is not None and said.total > self._order.max_bytes:
            return Failed(self.too_large(said.total))
        return await self._pour(response, begin, skip)

    async def _unsatisfied(self, total: int | None) -> Ending:
        before = self._part.announced.total
        if None not in (total, before) and total != before:
            return Spoiled(f"{before} bytes were announced, then {total}")
        await self._means.disk.do(self._part.clear)
        return Setback("there is nothing where the rest should be")

    def _no_file(self, status: int, headers: Mapping[str, str]) -> Ending:
        pause_s = retry.retry_after(headers.get("Retry-After"), self._means.clock.time())
        why = f"{self.host} answered HTTP {status}"
        if status in GONE:
            return Gone(why)
        if status == 429:
            return Setback(why, pause_s, limited=True)
        if status >= 500 or status == REQUEST_TIMEOUT:
            return Setback(why, pause_s)
        return Failed(self.error(f"could not be had: {why}."))

    async def _pour(self, response: aiohttp.ClientResponse, begin: Callable[[], None], skip: int) -> Ending:
        """The body into the part. Whatever ends it, what has come is written before this returns."""
        ending: Ending = None
        body, room = response.content, self._order.max_bytes - (0 if response.status == 200 else self._part.size)
        tell = None if self._order.progress is None else self.tell
        spool = Spool(self._means.disk, first=begin, write=self._part.write, written=tell)
        watch = StallWatch(response, self._means.clock, self._means.timeouts.stall)
        try:
            while spool.failure is None:
                watch.begins()
                data, is_end_of_chunk = await body.readchunk()
                watch.ends()
                if not data and not is_end_of_chunk:
                    break
                data, skip = data[skip:], max(0, skip - len(data))
                room -= len(data)
                if room < 0:
                    ending = Failed(self.too_large(None))
                    break
                await spool.put(data)
        except classify.FAILURES as error:
            ending = self._broke(TimeoutError() if watch.stalled else error)
        finally:
            watch.close()
            await spool.drain()
        if isinstance(ending, Failed):
            await self._means.disk.do(self._part.discard)
        return ending if spool.failure is None else Failed(spool.failure)

    def too_large(self, total: int | None) -> DownloadError:
        size = "more" if total is None else f"{total} bytes"
        return self.error(f"is {size}, above the cap of {self._order.max_bytes} bytes (max_bytes).")

    def tell(self) -> None:
        if self._order.progress is not None:
            self._order.progress(self._part.size, self._part.announced.total)
