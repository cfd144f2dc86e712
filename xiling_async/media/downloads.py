"""Finished media down: what, where to, and how many at once; a file is either absent or whole."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final
from weakref import WeakValueDictionary

from attrs import frozen

from xiling_async._internal.clock import Clock
from xiling_async._internal.redact import shown
from xiling_async._internal.tasks import Tasks
from xiling_async.api.retry import RetryBudget
from xiling_async.api.throttle import Gate
from xiling_async.errors import ClientClosed, ConfigurationError, DownloadError, InvalidRequest, StoreError, XilingError
from xiling_async.kinds import KINDS
from xiling_async.media.exchange import Means, Order, Progress
from xiling_async.media.file_types import kind_of
from xiling_async.media.http import MediaTransport
from xiling_async.media.partial_file import Busy, Part
from xiling_async.media.paths import NoTarget, Target, targets_of
from xiling_async.media.spool import Disk, DiskTrouble
from xiling_async.media.transfer import Fetch
from xiling_async.models.record import Outcome, Succeeded
from xiling_async.models.request import Kind
from xiling_async.models.settings import Limits, Timeouts
from xiling_async.telemetry.stats import UNWATCHED, Monitor

MAX_BYTES: Final = 4 * 1024**3
BOTH: Final = "both"

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_FORBIDDEN: Final = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


@frozen(kw_only=True)
class Wish:
    """One call of `Client.download`; `what` is a word of the kind, or "both"."""

    result: Any
    to: str | os.PathLike[str]
    what: str
    allow_private: bool
    overwrite: bool
    progress: Progress | None
    max_bytes: int


class Downloads:
    """The downloads of one client.

    `outcome`: what the service says of a task now; `ended_at`: when it ended, Unix seconds, where that is known.
    """

    def __init__(
        self,
        *,
        transport: MediaTransport,
        clock: Clock,
        limits: Limits,
        timeouts: Timeouts,
        random: Callable[[], float],
        outcome: Callable[[Kind[Any], str], Awaitable[Outcome | None]],
        ended_at: Callable[[str], Awaitable[float | None]],
        monitor: Monitor = UNWATCHED,
    ) -> None:
        self._monitor = monitor
        self._transport = transport
        self._outcome = outcome
        self._ended_at = ended_at
        self._gate = Gate(clock)
        self._disk = Disk(limits.downloads + 1, clock)  # one for those that only look where to
        self._means = Means(
            transport=transport,
            disk=self._disk,
            clock=clock,
            timeouts=timeouts,
            gate=self._gate,
            budget=RetryBudget(),
            random=random,
        )
        self._permits = asyncio.Semaphore(limits.downloads)
        self._targets: WeakValueDictionary[Path, asyncio.Lock] = WeakValueDictionary()
        self._running = Tasks()
        self._closed = False

    @property
    def in_flight(self) -> int:
        return len(self._running)

    async def close(self) -> None:
        """End every download: what has come stays in its part where it can be resumed."""
        self._closed = True
        await self._running.cancel()
        await self._disk.close()
        await self._transport.close()

    async def download(self, wish: Wish) -> tuple[Path, ...]:
        """The files, one for each thing that was asked for. Raises as `Client.download` says."""
        # In a task of its own: closing the client ends it, and waits until its part and its connection are closed.
        work = self._running.start(self._download(wish), name="xiling download")
        try:
            return await work
        except asyncio.CancelledError:
            me = asyncio.current_task()
            if self._closed and work.cancelled() and not (me and me.cancelling()):
                raise ClientClosed(
                    "The client was closed during this download. What has come is kept where it can be resumed: "
                    "download it again with a new client.",
                    charged="yes",
                ) from None
            raise

    async def there_already(self, wish: Wish) -> Path | None:
        """What stands where the (first) file of this wish would be: of a task's own name, that file, whole."""
        _, task_id, wanted = _wanted(wish)
        with self._in_words(wish, task_id):
            target, *_ = await self._disk.do(partial(targets_of, wish.to, task_id, wanted))
            return await self._disk.do(target.in_the_way)

    async def make_folder(self, folder: Path) -> None:
        """Raises `ConfigurationError` when there cannot be such a folder."""
        try:
            await self._disk.do(partial(folder.mkdir, parents=True, exist_ok=True))
        except DiskTrouble as trouble:
            words = f"Results cannot be kept in {shown(str(folder))}: {_words(trouble.error)}. Nothing was sent."
            raise ConfigurationError(words) from trouble.error

    async def _download(self, wish: Wish) -> tuple[Path, ...]:
        kind, task_id, wanted = _wanted(wish)
        with self._in_words(wish, task_id):
            targets = await self._disk.do(partial(targets_of, wish.to, task_id, wanted))
            async with self._alone(targets), self._permits:
                return await self._fetched(wish, kind, task_id, targets)

    @contextmanager
    def _in_words(self, wish: Wish, task_id: str) -> Iterator[None]:
        """What the disk said, as a `DownloadError`."""
        where = shown(str(wish.to))
        known: Any = {"task_ids": (task_id,)}
        try:
            yield
        except NoTarget as why:
            raise DownloadError(f"Task {shown(task_id)} cannot be kept in {where}: {why}.", **known) from None
        except Busy:
            words = f"Task {shown(task_id)} is being downloaded to {where} by another client right now."
            raise DownloadError(words, **known) from None
        except DiskTrouble as trouble:
            words = f"Task {shown(task_id)} cannot be kept in {where}: {_words(trouble.error)}."
            raise DownloadError(words, **known) from trouble.error

    @asynccontextmanager
    async def _alone(self, targets: Sequence[Target]) -> AsyncIterator[None]:
        """One download for each part at a time; always taken in the same order."""
        async with AsyncExitStack() as held:
            for path in sorted({target.part for target in targets}):
                lock = self._targets.setdefault(path, asyncio.Lock())
                await held.enter_async_context(lock)
            yield

    async def _fetched(self, wish: Wish, kind: Kind[Any], task_id: str, targets: Sequence[Target]) -> tuple[Path, ...]:
        """Everything is whole before the first file gets its name."""
        if not wish.overwrite:
            for target in targets:
                self._refuse(await self._disk.do(target.in_the_way), task_id)
        parts: list[Part] = []

        def open_part(target: Target) -> None:
            parts.append(Part.open(target.part, f"{kind.name} {task_id} {target.what}"))

        def leave() -> None:
            for part in parts:
                part.leave()

        try:
            for target in targets:
                await self._disk.do(partial(open_part, target))
                await self._run(Fetch(self._order(wish, kind, task_id, target.what), parts[-1], self._means))
            paths = [
                target.path(kind_of(await self._disk.do(part.head)))
                for target, part in zip(targets, parts, strict=True)
            ]
            for place, path in enumerate(paths):
                overwrite = wish.overwrite and path not in paths[:place]
                await self._placed(parts[place], path, task_id, overwrite=overwrite)
        finally:
            await self._disk.do(leave)
        return tuple(target.said / path.name for target, path in zip(targets, paths, strict=True))

    async def _run(self, fetch: Fetch) -> None:
        with self._monitor.downloading(fetch.order.task_id, fetch.order.what, self._means.clock) as transfer:
            try:
                await fetch.run()
            finally:
                transfer.tries = fetch.exchanges

    async def _placed(self, part: Part, path: Path, task_id: str, *, overwrite: bool) -> None:
        try:
            await self._disk.do(partial(part.place, path, overwrite=overwrite))
        except DiskTrouble as trouble:
            if not isinstance(trouble.error, FileExistsError):
                raise
            self._refuse(path, task_id)

    def _refuse(self, path: Path | None, task_id: str) -> None:
        if path is not None:
            words = f"{shown(str(path))} exists already: task {shown(task_id)} is not downloaded over it"
            raise DownloadError(f"{words}. Remove it, choose another name, or say overwrite=True.", task_ids=(task_id,))

    def _order(self, wish: Wish, kind: Kind[Any], task_id: str, what: str) -> Order:
        name = kind.media[what].field

        async def fresh() -> str | None:
            try:
                outcome = await self._outcome(kind, task_id)
            except XilingError as error:
                raise DownloadError(
                    f"The link to the {what} of task {shown(task_id)} is dead, and the service could not be asked for "
                    f"a new one: {error}",
                    task_ids=(task_id,),
                    retry_after=error.retry_after,
                ) from error
            return _link(outcome.result, name) if isinstance(outcome, Succeeded) else None

        async def lives_until() -> str:
            days = f"Results live {kind.result_ttl_s / 86400:g} days"
            try:
                ended_at = await self._ended_at(task_id)
            except StoreError:
                ended_at = None
            if ended_at is None:
                return f"{days}."
            end = datetime.fromtimestamp(ended_at + kind.result_ttl_s, UTC)
            return f"{days}, this one until {end:%Y-%m-%d %H:%M} UTC."

        return Order(
            task_id=task_id,
            what=what,
            url=_link(wish.result, name),
            allow_private=wish.allow_private,
            max_bytes=wish.max_bytes,
            progress=wish.progress,
            fresh=fresh,
            lives_until=lives_until,
        )


def _wanted(wish: Wish) -> tuple[Kind[Any], str, dict[str, Sequence[str]]]:
    """The kind of the result, its task, and the types of the files that are wanted. Raises `InvalidRequest`."""
    kind = next((kind for kind in KINDS if isinstance(wish.result, kind.result)), None)
    if kind is None:
        raise InvalidRequest(f"download takes a result such as Video, not {type(wish.result).__name__}.")
    words = (*kind.media, BOTH)
    if wish.what not in words:
        raise InvalidRequest(f"what must be one of {', '.join(map(repr, words))}, not {shown(wish.what)}.")
    if not isinstance(wish.to, (str, os.PathLike)):
        raise InvalidRequest(f"`to` must be a path or text, not {type(wish.to).__name__}.")
    if isinstance(wish.max_bytes, bool) or not isinstance(wish.max_bytes, int) or wish.max_bytes < 1:
        raise InvalidRequest(f"max_bytes must be a whole number above 0, not {shown(wish.max_bytes)}.")
    names = kind.media if wish.what == BOTH else (wish.what,)
    return kind, str(wish.result.task_id), {name: kind.media[name].types for name in names}


def _link(result: Any, name: str) -> str | None:
    link: object = getattr(result, name)
    return link if isinstance(link, str) and link else None


def _words(error: OSError) -> str:
    if error.errno in _FULL:
        return "the disk is full"
    if error.errno in _FORBIDDEN:
        return "writing there is not permitted"
    return (error.strerror or type(error).__name__).lower()
