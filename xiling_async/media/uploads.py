"""Local pictures up: checked before anything is sent, uploaded before anything is paid for, once per content.

An upload costs nothing, so it is repeated; what fails here was not bought. What a client
has uploaded it remembers by its SHA-256.
"""

from __future__ import annotations

import asyncio
import functools
import secrets
from collections import OrderedDict
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

from attrs import frozen
from yarl import URL

from xiling_async._internal.clock import Clock
from xiling_async._internal.tasks import Shared, Tasks
from xiling_async._internal.threads import Threads
from xiling_async.api import wire
from xiling_async.api.calls import UPLOADS_AT_ONCE, Calls
from xiling_async.errors import ClientClosed, InvalidRequest, NotSent, Problem
from xiling_async.media.images import ACCEPTED, LIMIT_BYTES, Picture, Unfit, inspected
from xiling_async.models.request import Request
from xiling_async.telemetry.stats import UNWATCHED, Monitor

T = TypeVar("T")
Rq = TypeVar("Rq", bound=Request[Any])
Source = Path | bytes | AsyncIterator[bytes]

REMEMBERED: Final = 1024
REMEMBERED_S: Final = 24 * 3600.0  # how long the service keeps uploads is not documented; its results live 7 days


@frozen
class _Spoiled:
    """The file was not what had been checked, so its upload was not ended; `why` belongs to this source alone."""

    source: Path | bytes
    why: str


class Uploads:
    """The uploads of one client."""

    def __init__(
        self, calls: Calls, clock: Clock, *, monitor: Monitor = UNWATCHED, remembered: int = REMEMBERED
    ) -> None:
        self._monitor = monitor
        self._calls = calls
        self._clock = clock
        self._remembered = remembered
        self._threads = Threads(UPLOADS_AT_ONCE, "xiling upload", clock)
        self._tasks = Tasks()
        self._running: dict[bytes, Shared[str | _Spoiled]] = {}  # by SHA-256
        self._known: OrderedDict[bytes, tuple[float, str]] = OrderedDict()  # until when, and the URL; oldest first
        self._closed = False

    @property
    def in_flight(self) -> int:
        return len(self._running)

    async def close(self) -> None:
        """End every upload: nothing depends on it but jobs that were not bought yet."""
        self._closed = True
        try:
            await self._tasks.cancel()
        finally:
            await self._threads.close()

    async def sendable(self, request: Rq, files: Mapping[str, Path]) -> Rq:
        """The request with the URLs of its local `files`, which are by field. Raises `InvalidRequest` before anything
        was sent, and what uploads raise; in either case nothing was bought."""
        by_path: dict[Path, str] = {}
        for name, path in files.items():
            by_path[path] = f"{by_path[path]}, {name}" if path in by_path else name
        if not by_path:
            return request
        pictures = await self._checked(type(request).__name__, by_path.items())
        urls = await self._together((self._url_of(picture) for picture in pictures), "xiling wait for upload")
        return request.with_urls(dict(zip(by_path, urls, strict=True)))

    async def upload(self, source: Source) -> URL:
        """The URL of this picture. Raises as `sendable` does."""
        if isinstance(source, (bytearray, memoryview)):
            source = bytes(source)
        if isinstance(source, AsyncIterable):
            source = await _collected(source)
        if not isinstance(source, (Path, bytes)):
            raise _invalid("source", source, "is not a picture", "a pathlib.Path, bytes or an async iterator of bytes")
        pictures = await self._checked("upload", [(source, "source")])
        (url,) = await self._together((self._url_of(picture) for picture in pictures), "xiling wait for upload")
        return URL(url, encoded=True)

    # --- checking ------------------------------------------------------------------------------------------------

    async def _checked(self, what: str, named: Iterable[tuple[Path | bytes, str]]) -> list[Picture]:
        """Each of these pictures, or every reason why one of them is none."""
        checked = await self._together((self._look_at(source, name) for source, name in named), "xiling check")
        problems = [each for each in checked if isinstance(each, Problem)]
        if problems:
            raise InvalidRequest.of(what, problems)
        return [each for each in checked if isinstance(each, Picture)]

    async def _look_at(self, source: Path | bytes, name: str) -> Picture | Problem:
        try:
            return await self._threads.run(inspected, source)
        except Unfit as why:
            return _problem(name, source, str(why), ACCEPTED)

    # --- once per content ----------------------------------------------------------------------------------------

    async def _url_of(self, picture: Picture) -> str:
        """Where this picture is, uploaded now, by another caller at this moment, or before."""
        while True:
            until, url = self._known.get(picture.sha256, (0.0, ""))
            if until > self._clock.time():
                return url
            result = await self._shared(picture).wait()
            if isinstance(result, str):
                return result
            if result.source == picture.source:  # else another file of this content was spoiled: ours is not
                raise NotSent(
                    f"The upload of {picture} failed: while it was sent, the file changed ({result.why}). Nothing was "
                    "bought: submit it again when the file stays as it is."
                )

    def _shared(self, picture: Picture) -> Shared[str | _Spoiled]:
        """The upload of this content: one for all who want it; it ends when the last of them has gone."""
        shared = self._running.get(picture.sha256)
        if shared is None or shared.is_over:
            task = self._tasks.start(self._send(picture), name=f"xiling upload {picture.file_name}")
            shared = self._running[picture.sha256] = Shared(task)
            task.add_done_callback(functools.partial(self._forget, picture.sha256, shared))
        return shared

    def _forget(self, sha256: bytes, shared: Shared[str | _Spoiled], _: object) -> None:
        if self._running.get(sha256) is shared:
            del self._running[sha256]

    def _remember(self, sha256: bytes, url: str) -> None:
        self._known.pop(sha256, None)
        self._known[sha256] = (self._clock.time() + REMEMBERED_S, url)
        if len(self._known) > self._remembered:
            self._known.popitem(last=False)

    def forget(self, sent: Request[Any]) -> None:
        """The service could not fetch an image of this request: it may have dropped our uploads. The next submit of
        these pictures uploads them again."""
        values = [item for value in sent.fields().values() for item in (value if isinstance(value, list) else [value])]
        for sha256, (_, url) in tuple(self._known.items()):
            if url in values:
                del self._known[sha256]

    async def _together(self, works: Iterable[Coroutine[Any, Any, T]], name: str) -> list[T]:
        """All of these at once; the first that fails, or a cancellation, ends the others."""
        self._check_open()
        tasks = [self._tasks.start(work, name=name) for work in works]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            return [task.result() for task in tasks if task.done()]  # not all are done only if one has failed
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if self._closed and caller is not None and not caller.cancelling():
                raise _closed() from None
            raise
        finally:
            for task in tasks:
                task.cancel()

    def _check_open(self) -> None:
        if self._closed:
            raise _closed()

    # --- one upload ----------------------------------------------------------------------------------------------

    async def _send(self, picture: Picture) -> str | _Spoiled:
        with self._monitor.uploading(picture.size_bytes, self._clock) as transfer:
            source = _Source(picture, self._threads)
            result = await self._calls.upload(source)
            transfer.tries = result.tries
            if result.error is not None:
                raise result.error
            if result.url is None:
                transfer.error = NotSent.__name__
                return _Spoiled(picture.source, str(source.spoiled))
            self._remember(picture.sha256, result.url)
            return result.url


class _Source:
    """A picture for `Calls.upload`: a new body for each try."""

    def __init__(self, picture: Picture, threads: Threads) -> None:
        self._picture = picture
        self._threads = threads
        self._last: _Body | None = None

    def __str__(self) -> str:
        return str(self._picture)

    def body(self) -> _Body:
        self._last = _Body(self._picture, self._threads)
        return self._last

    @property
    def spoiled(self) -> Exception | None:
        return None if self._last is None else self._last.spoiled


class _Body:
    """The multipart body of an upload as aiohttp pulls it. No generator: one that is left in the middle would have to
    be closed, and a caller that is cancelled waits for nothing."""

    def __init__(self, picture: Picture, threads: Threads) -> None:
        boundary = secrets.token_hex(16)
        self._head, self._tail = wire.file_part(picture.file_name, picture.media_type, boundary)
        self._reader = picture.reader()
        self._threads = threads
        self.content_type = f"multipart/form-data; boundary={boundary}"
        self.size_bytes = len(self._head) + picture.size_bytes + len(self._tail)
        self.spoiled: Unfit | None = None

    def __aiter__(self) -> _Body:
        return self

    async def __anext__(self) -> bytes:
        if self._head:
            head, self._head = self._head, b""
            return head
        try:
            piece = await self._threads.run(self._reader.next_piece)
        except Unfit as why:
            self.spoiled = why
            raise
        if not piece:
            piece, self._tail = self._tail, b""
        if not piece:
            raise StopAsyncIteration
        return piece


async def _collected(source: AsyncIterable[bytes]) -> bytes:
    collected = bytearray()
    try:
        async for piece in source:
            if not isinstance(piece, (bytes, bytearray, memoryview)):
                raise _invalid("source", piece, "is not a piece of a picture", "an async iterator of bytes")
            collected += piece
            if len(collected) > LIMIT_BYTES:
                raise _invalid("source", "<bytes>", f"has more than {LIMIT_BYTES} bytes", ACCEPTED)
    finally:
        close: Callable[[], Awaitable[None]] | None = getattr(source, "aclose", None)
        if close is not None:
            await close()
    return bytes(collected)


def _problem(name: str, source: object, rule: str, accepted: str) -> Problem:
    return Problem(field=name, value=_named(source), rule=rule, accepted=accepted)


def _named(source: object) -> object:
    return "<bytes>" if isinstance(source, bytes) else str(source) if isinstance(source, Path) else source


def _invalid(name: str, source: object, rule: str, accepted: str) -> InvalidRequest:
    return InvalidRequest.of("upload", [_problem(name, source, rule, accepted)])


def _closed() -> ClientClosed:
    return ClientClosed("The client was closed before the pictures were uploaded: nothing was bought.")
