"""Finished media down: which file, where to, and its name; a file is either absent or whole."""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, Final
from weakref import WeakValueDictionary

from attrs import define, frozen

from xiling_async._internal.redact import shown
from xiling_async._internal.tasks import Tasks, ended
from xiling_async.errors import ClientClosed, ConfigurationError, DownloadError, InvalidRequest
from xiling_async.kinds import KINDS
from xiling_async.media import partial_file
from xiling_async.media.disk_writer import Disk, DiskError
from xiling_async.media.file_types import kind_of
from xiling_async.media.http import MediaLink, MediaTransport, Results, link_of
from xiling_async.media.partial_file import Busy, PartialFile
from xiling_async.media.paths import NoTarget, Target, targets_of
from xiling_async.media.ssrf import media_url
from xiling_async.media.transfer import DownloadOptions, Transfer
from xiling_async.models.request import Kind
from xiling_async.telemetry.stats import UNWATCHED, Monitor

BOTH: Final = "both"
# Downloads that have a partial file open, as multiples of `Limits.downloads`: those that wait for a slot too, so that a
# host that pauses or drips keeps no slot; not all that were asked for, since files can run out.
OPEN_OF_HOST: Final = 4
OPEN: Final = 32

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_FORBIDDEN: Final = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


@frozen(kw_only=True)
class Wanted:
    """What a download is to bring, checked; `names`: words of the kind, the first with the name that the user says."""

    kind: Kind[Any]
    result: Any
    names: Sequence[str]

    @property
    def task_id(self) -> str:
        return str(self.result.task_id)

    def targets(self, to: str | os.PathLike[str]) -> list[Target]:
        """Blocks."""
        return targets_of(to, self.task_id, self.kind.media, self.names)


@define
class Item:
    """One of the files of a download, in hand."""

    target: Target
    part: PartialFile


class Downloads:
    """The downloads of one client."""

    def __init__(self, transport: MediaTransport, results: Results, *, monitor: Monitor = UNWATCHED) -> None:
        self._transport = transport
        self._results = results
        self._monitor = monitor
        self._disk = Disk(transport.limits.downloads + 1, "xiling download", transport.clock)
        self._targets: WeakValueDictionary[Path, asyncio.Lock] = WeakValueDictionary()
        self._open_of_host: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        self._open = asyncio.Semaphore(OPEN * transport.limits.downloads)
        self._running = Tasks()
        self._closed = False

    @property
    def in_flight(self) -> int:
        return len(self._running)

    async def close(self) -> None:
        """End every download: what has come stays in its partial file where it can be resumed."""
        self._closed = True
        async with AsyncExitStack() as last:  # each of them, also when this is cancelled
            last.push_async_callback(self._transport.close)
            last.push_async_callback(self._disk.close)
            last.push_async_callback(self._running.cancel)

    async def download(self, result: object, to: str | os.PathLike[str], options: DownloadOptions) -> tuple[Path, ...]:
        """The files, one for each thing that was asked for. Raises as `Client.download` says."""
        # In a task of its own: closing the client ends it, and waits until its part and its connection are closed.
        work = self._running.start(self._download(result, to, options), name="xiling download")
        try:
            return await ended(work)
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if self._closed and work.cancelled() and not (caller and caller.cancelling()):
                raise ClientClosed(
                    "The client was closed during this download. What has come is kept where it can be resumed: "
                    "download it again with a new client.",
                    charged="yes",
                ) from None
            raise

    # --- folders -------------------------------------------------------------------------------------------------

    async def there_already(self, result: object, to: str | os.PathLike[str], options: DownloadOptions) -> Path | None:
        """The (first) file of this download, if there is one: a file of a task's own name is whole.

        A partial file that was left beside it is removed.
        """

        def look() -> Path | None:
            target, *_ = wanted.targets(to)
            path = target.in_the_way()
            if path is None or not stat.S_ISREG(path.lstat().st_mode):
                return None
            with suppress(OSError):
                partial_file.remove_unless_busy(target.part)
            return path

        wanted = _wanted(result, to, options)
        with self._in_words(to, wanted.task_id):
            return await self._disk.run(look)

    async def open_folder(self, folder: Path, *, lifetime_s: float) -> None:
        """Make the folder, and remove partial files in it that nothing resumes any more: beside a finished file, or
        older than results live. Raises `ConfigurationError` when there cannot be such a folder."""
        try:
            await self._disk.run(lambda: folder.mkdir(parents=True, exist_ok=True))
            with suppress(DiskError):
                await self._disk.run(partial_file.remove_stale, folder, self._transport.clock.time() - lifetime_s)
        except DiskError as trouble:
            message = f"Results cannot be saved in {shown(str(folder))}: {_reason(trouble.error)}. Nothing was sent."
            raise ConfigurationError(message) from trouble.error

    async def size_of(self, folder: Path) -> int:
        """Bytes of all regular files in this folder. Raises `DiskError`."""

        def count() -> int:
            with os.scandir(folder) as entries:
                statuses = [entry.stat(follow_symlinks=False) for entry in entries]
            return sum(status.st_size for status in statuses if stat.S_ISREG(status.st_mode))

        return await self._disk.run(count)

    # --- one download --------------------------------------------------------------------------------------------

    async def _download(self, result: object, to: str | os.PathLike[str], options: DownloadOptions) -> tuple[Path, ...]:
        wanted = _wanted(result, to, options)
        with self._in_words(to, wanted.task_id):
            targets = await self._disk.run(wanted.targets, to)
            async with self._alone(targets), self._open_file(wanted):
                return await self._fetched(wanted, targets, options)

    @contextmanager
    def _in_words(self, to: object, task_id: str) -> Iterator[None]:
        """What the disk said, as a `DownloadError`."""
        what, where = f"Task {shown(task_id)}", shown(str(to))
        known: Any = {"task_ids": (task_id,)}
        try:
            yield
        except NoTarget as why:
            raise DownloadError(f"{what} cannot be saved in {where}: {why}.", **known) from None
        except Busy:
            raise DownloadError(
                f"{what} is being downloaded to {where} by another client right now.", **known
            ) from None
        except DiskError as trouble:
            reason = _reason(trouble.error)
            raise DownloadError(f"{what} cannot be saved in {where}: {reason}.", **known) from trouble.error

    @asynccontextmanager
    async def _alone(self, targets: Sequence[Target]) -> AsyncIterator[None]:
        """One download for each partial file at a time; always taken in the same order."""
        async with AsyncExitStack() as held:
            for path in sorted({target.part for target in targets}):
                lock = self._targets.setdefault(path, asyncio.Lock())
                await held.enter_async_context(lock)
            yield

    @asynccontextmanager
    async def _open_file(self, wanted: Wanted) -> AsyncIterator[None]:
        """Waits while too many downloads, or too many from the same host, have files open."""
        host = host_of(wanted.kind, wanted.result, wanted.names[0])
        most = OPEN_OF_HOST * self._transport.limits.downloads
        of_host = self._open_of_host.setdefault(host, asyncio.Semaphore(most))
        async with of_host, self._open:
            yield

    async def _fetched(self, wanted: Wanted, targets: Sequence[Target], options: DownloadOptions) -> tuple[Path, ...]:
        """Everything is whole before the first file gets its name."""
        if not options.overwrite:
            for target in targets:
                self._refuse(await self._disk.run(target.in_the_way), wanted.task_id)
        items: list[Item] = []
        is_full = False

        def open_part(target: Target) -> None:
            part = PartialFile.open(target.part, f"{wanted.kind.name} {wanted.task_id} {target.what}")
            part.free_bytes = options.free_bytes
            items.append(Item(target, part))

        def leave() -> None:
            for item in items:
                # What is resumed later must not keep a full disk full.
                item.part.discard() if is_full else item.part.leave()

        try:
            for target in targets:
                await self._disk.run(open_part, target)
                await self._transfer(wanted, items[-1], options)
            return await self._placed(wanted.task_id, items, overwrite=options.overwrite)
        except DiskError as trouble:
            is_full = trouble.error.errno in _FULL
            raise
        finally:
            await self._disk.run(leave)

    async def _transfer(self, wanted: Wanted, item: Item, options: DownloadOptions) -> None:
        what = item.target.what
        url = link_of(wanted.result, wanted.kind.media[what].field)
        link = MediaLink(kind=wanted.kind, task_id=wanted.task_id, what=what, url=url, results=self._results)
        transfer = Transfer(link, item.part, options, self._transport, self._disk)
        with self._monitor.downloading(wanted.task_id, what, self._transport.clock) as watched:
            try:
                await transfer.run()
            finally:
                watched.tries = transfer.exchanges

    async def _placed(self, task_id: str, items: Sequence[Item], *, overwrite: bool) -> tuple[Path, ...]:
        """Give each file its name; no file of a result replaces another one of it."""
        paths = [item.target.path(kind_of(await self._disk.run(item.part.head))) for item in items]
        for place, (item, path) in enumerate(zip(items, paths, strict=True)):
            try:
                await self._disk.run(lambda: item.part.place(path, overwrite=overwrite and path not in paths[:place]))  # noqa: B023
            except DiskError as trouble:
                if not isinstance(trouble.error, FileExistsError):
                    raise
                self._refuse(path, task_id)
        return tuple(item.target.as_written / path.name for item, path in zip(items, paths, strict=True))

    def _refuse(self, path: Path | None, task_id: str) -> None:
        if path is not None:
            message = f"{shown(str(path))} exists already: task {shown(task_id)} is not downloaded over it"
            raise DownloadError(
                f"{message}. Remove it, choose another name, or pass overwrite=True.", task_ids=(task_id,)
            )


def host_of(kind: Kind[Any], result: object, what: str | None = None) -> str:
    """Host and port of a file of this result (None: of the one that matters most); "" if its link names none."""
    with suppress(Exception):  # untrusted text; what is wrong with it is reported when it is requested
        return media_url(link_of(result, kind.media[what or next(iter(kind.media))].field) or "").authority
    return ""


def _wanted(result: Any, to: object, options: DownloadOptions) -> Wanted:
    """What is to be downloaded. Raises `InvalidRequest`."""
    kind = next((kind for kind in KINDS if isinstance(result, kind.result)), None)
    if kind is None:
        raise InvalidRequest(f"download takes a result such as Video, not {type(result).__name__}.")
    choices = (*kind.media, BOTH)
    if options.what is not None and options.what not in choices:
        raise InvalidRequest(f"what must be one of {', '.join(map(repr, choices))}, not {shown(options.what)}.")
    if not isinstance(to, (str, os.PathLike)):
        raise InvalidRequest(f"`to` must be a path or text, not {type(to).__name__}.")
    size = options.max_bytes
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise InvalidRequest(f"max_bytes must be a whole number above 0, not {shown(size)}.")
    names = tuple(kind.media) if options.what == BOTH else (options.what or next(iter(kind.media)),)
    return Wanted(kind=kind, result=result, names=names)


def _reason(error: OSError) -> str:
    if error.errno in _FULL and error.strerror == os.strerror(error.errno):
        return "the disk is full"
    if error.errno in _FORBIDDEN:
        return "writing there is not permitted"
    return (error.strerror or type(error).__name__).lower()
