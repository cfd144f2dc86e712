"""Saves results in a folder: each is downloaded as soon as it is known, and the store remembers its file.

A few workers for each media host share one queue, so that a million finished jobs cost no million tasks, and a host
that pauses or drips delays its own files only. What fails is tried again, ever more rarely, until its link has expired;
what is outstanding when the client closes is saved by the next client with the same store and folder.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from attrs import define, evolve, field, frozen

from xiling_async._internal.clock import Clock
from xiling_async._internal.tasks import Tasks
from xiling_async.errors import ClientClosed, DownloadError, ResultExpired, StoreError, XilingError
from xiling_async.jobs.registry import Registry
from xiling_async.kinds import BY_NAME
from xiling_async.media.downloads import Downloads, host_of
from xiling_async.media.transfer import MAX_BYTES, DownloadOptions
from xiling_async.models.lifecycle import FileSaved
from xiling_async.models.record import JobRecord, Succeeded
from xiling_async.models.settings import Limits
from xiling_async.stores.base import Store

log = logging.getLogger("xiling_async.jobs.auto_save")

WORKERS: Final = 8  # of one media host: more would only queue for Limits.downloads
HOSTS: Final = 64  # with workers of their own; files of further hosts share one queue
RETRY_S: Final = 60.0  # after the first failure; twice as long after each further one
LONGEST_RETRY_S: Final = 3600.0


@frozen
class SaveOptions:
    """Where results are saved, and how. `stall_s`: how long closing waits for what is not saved yet."""

    folder: Path
    allow_private: bool
    limits: Limits
    stall_s: float


@define(eq=False)
class Unsaved:
    """A result that has no file yet. `expires_at`: when its link has surely expired, Unix seconds."""

    job_id: str
    task_id: str
    host: str  # that has its file
    expires_at: float
    result: Any  # None: the store has it
    is_queued: bool = False
    tries: int = 0
    retry_at: float = 0.0
    error: XilingError | None = None  # of the last try
    saved: asyncio.Future[Path | XilingError] | None = None  # made when there is a waiter


@define(eq=False)
class _HostQueue:
    """What is to be saved from one media host, and how many workers are at it."""

    items: deque[Unsaved] = field(factory=deque)
    workers: int = 0


class AutoSave:
    """Each result becomes `<task_id>.<type>` in a folder, which is made when it is missing."""

    def __init__(
        self, options: SaveOptions, *, store: Store, registry: Registry, downloads: Downloads, clock: Clock
    ) -> None:
        self._options = options
        self._store = store
        self._registry = registry
        self._downloads = downloads
        self._clock = clock
        self._unsaved: dict[str, Unsaved] = {}  # by task id
        self._queues: dict[str, _HostQueue] = {}  # by host, as long as it has workers
        # One at a time with a limit of the folder's size: what a file of unknown size leaves is known when it is saved.
        self._is_single = options.limits.saved_bytes is not None
        self._is_running = False
        self._has_failed = asyncio.Event()
        self._workers = Tasks()  # they end when nothing is queued
        self._retries = Tasks()
        self._is_closing = False

    @property
    def outstanding(self) -> int:
        """Results that are known and have no file yet."""
        return len(self._unsaved)

    async def start(self) -> None:
        """Raises `ConfigurationError` when there cannot be such a folder."""
        longest_s = max(kind.result_ttl_s for kind in BY_NAME.values())
        await self._downloads.open_folder(self._options.folder, lifetime_s=longest_s)
        self._is_running = True
        self._retries.start(self._retry(), name="xiling auto-save: retry")
        self._workers.start(self._catch_up(), name="xiling auto-save: earlier results")

    async def close(self) -> None:
        """Try everything that is outstanding once more, for at most `stall_s` seconds; log what is left."""
        self._is_closing = True
        try:
            await self._retries.cancel()
            for item in self._unsaved.values():
                self._enqueue(item)
            with suppress(TimeoutError):
                async with self._clock.timeout(self._options.stall_s):
                    await self._workers.drain()
        finally:
            self._is_running = False
            try:
                await self._workers.cancel()
            finally:
                self._give_up()

    def _give_up(self) -> None:
        left, self._unsaved = list(self._unsaved.values()), {}
        for item in left:
            self._resolve(item, ClientClosed(
                f"The client was closed before the result of task {item.task_id} was saved. A new client with the same "
                "store and `save_to` saves it.",
                charged="yes", job_id=item.job_id, task_ids=(item.task_id,),
            ))  # fmt: skip
        if left:
            log.warning(
                "%d results are not saved in %s: the client was closed before. A new client with the same store and "
                "`save_to` saves them, as long as their links live. The first is task %s of job %s (%s)",
                len(left), self._options.folder, left[0].task_id, left[0].job_id,
                left[0].error or "it was not finished in time",
            )  # fmt: skip

    # --- what is to be saved -------------------------------------------------------------------------------------

    def changed(self, record: JobRecord) -> None:
        """A record has changed: results in it that have no file are saved next."""
        self._add(record, keeps_results=True)

    def _add(self, record: JobRecord, *, keeps_results: bool) -> None:
        kind = BY_NAME.get(record.kind)
        if kind is None:
            return
        for outcome in record.outcomes:
            if isinstance(outcome, Succeeded) and outcome.file is None and outcome.task_id not in self._unsaved:
                host, expires_at = host_of(kind, outcome.result), record.changed_at + kind.result_ttl_s
                result = outcome.result if keeps_results else None
                item = self._unsaved[outcome.task_id] = Unsaved(record.id, outcome.task_id, host, expires_at, result)
                self._enqueue(item)

    def _enqueue(self, item: Unsaved) -> None:
        if not item.is_queued:
            item.is_queued = True
            has_own = not self._is_single and (item.host in self._queues or len(self._queues) < HOSTS)
            host = item.host if has_own else ""
            queue = self._queues.setdefault(host, _HostQueue())
            queue.items.append(item)
            if self._is_running and queue.workers < (1 if self._is_single else WORKERS):
                queue.workers += 1
                self._workers.start(self._work(host, queue), name="xiling auto-save")

    async def saved(self, record: JobRecord) -> tuple[Path, ...]:
        """The files of all results in this record, once they are saved. Raises why one cannot be."""
        if self._is_closing:
            raise ClientClosed("The client is closed: nothing more is saved.", charged="yes", job_id=record.id)
        self.changed(record)
        succeeded = [outcome for outcome in record.outcomes if isinstance(outcome, Succeeded)]
        return tuple([await self._saved(outcome) for outcome in succeeded])

    async def _saved(self, outcome: Succeeded[Any]) -> Path:
        item = self._unsaved.get(outcome.task_id)
        if outcome.file is not None:
            return Path(outcome.file)
        if item is None:  # saved while another one was awaited
            stored = _succeeded(await self._store.by_task(outcome.task_id), outcome.task_id)
            if stored is not None and stored.file is not None:
                return Path(stored.file)
            raise DownloadError(
                f"The result of task {outcome.task_id} was not saved, and the store does not know it any more.",
                task_ids=(outcome.task_id,),
            )
        if item.saved is None:
            item.saved = asyncio.get_running_loop().create_future()
        saved = await asyncio.shield(item.saved)
        if isinstance(saved, XilingError):
            raise saved
        return saved

    def why_unsaved(self, record: JobRecord) -> XilingError | None:
        """What went wrong last with a result of this record that has no file yet."""
        items = (self._unsaved.get(task_id) for task_id in record.task_ids)
        return next((item.error for item in items if item is not None and item.error is not None), None)

    # --- at work -------------------------------------------------------------------------------------------------

    async def _catch_up(self) -> None:
        """Results of earlier clients, as long as their links can live."""
        try:
            longest_s = max(kind.result_ttl_s for kind in BY_NAME.values())
            async for record in self._store.unsaved(self._clock.time() - longest_s):
                kind = BY_NAME.get(record.kind)
                if kind is not None and self._clock.time() - record.changed_at < kind.result_ttl_s:
                    self._add(record, keeps_results=False)  # there may be many: the store has them
        except StoreError as error:
            log.warning("earlier results cannot be looked up, so they are not saved by this client: %s", error)

    async def _retry(self) -> None:
        """Queue again what is due; runs only while something has failed."""
        reported_at = self._clock.time()
        while True:
            await self._has_failed.wait()
            await self._clock.sleep(RETRY_S)
            now = self._clock.time()
            for item in self._unsaved.values():
                if item.retry_at <= now:
                    self._enqueue(item)
            if not self._unsaved:
                self._has_failed.clear()
            elif now - reported_at >= LONGEST_RETRY_S:
                reported_at = now
                log.warning("%d results are not saved in %s yet", len(self._unsaved), self._options.folder)

    async def _work(self, host: str, queue: _HostQueue) -> None:
        while queue.items:
            item = queue.items.popleft()
            try:
                await self._try(item)
            finally:
                item.is_queued = False
        queue.workers -= 1
        if not queue.workers:
            del self._queues[host]

    async def _try(self, item: Unsaved) -> None:
        try:
            path = await self._save(item)
        except XilingError as error:
            self._failed(item, error)
        except Exception as error:  # whatever it is, it harms no other result
            log.exception("job %s: saving the result of task %s failed", item.job_id, item.task_id)
            message = f"The result of task {item.task_id} cannot be saved ({type(error).__name__}; the log says more)."
            self._failed(item, DownloadError(message, task_ids=(item.task_id,)))
        else:
            del self._unsaved[item.task_id]
            if path is not None:
                self._resolve(item, path)

    def _failed(self, item: Unsaved, error: XilingError) -> None:
        now = self._clock.time()
        item.error = error
        item.tries += 1
        item.retry_at = now + min(LONGEST_RETRY_S, RETRY_S * 2.0 ** min(item.tries - 1, 10))
        if isinstance(error, ResultExpired) or now >= item.expires_at:
            del self._unsaved[item.task_id]
            log.error("job %s: the result of task %s is lost, it was not saved: %s", item.job_id, item.task_id, error)
            self._resolve(item, error)
            return
        self._has_failed.set()
        report = log.warning if item.tries == 1 else log.info
        report("job %s: the result of task %s is not saved yet: %s", item.job_id, item.task_id, error)

    def _resolve(self, item: Unsaved, end: Path | XilingError) -> None:
        if item.saved is not None and not item.saved.done():
            item.saved.set_result(end)

    async def _save(self, item: Unsaved) -> Path | None:
        """The file; None: the store does not know the result any more."""
        result = item.result
        if result is None:
            stored = _succeeded(await self._store.get(item.job_id), item.task_id)
            if stored is None:
                return None
            result = stored.result
        to = f"{self._options.folder}{os.sep}"
        options = DownloadOptions(
            what=None, allow_private=self._options.allow_private, free_bytes=self._options.limits.free_bytes
        )
        # There already: an earlier process put it in its place and died before it wrote that down.
        path = await self._downloads.there_already(result, to, options)
        if path is None:
            options = evolve(options, max_bytes=await self._room())
            (path,) = await self._downloads.download(result, to, options)
        path = path.absolute()
        await self._registry.apply(item.job_id, FileSaved(at=self._clock.time(), task_id=item.task_id, file=str(path)))
        return path

    async def _room(self) -> int:
        """The largest file that may be saved now. Raises `DownloadError` when the folder has reached its limit."""
        limit = self._options.limits.saved_bytes
        if limit is None:
            return MAX_BYTES
        left = limit - await self._downloads.size_of(self._options.folder)
        if left <= 0:
            raise DownloadError(
                f"{self._options.folder} has reached its limit of {limit} bytes (Limits.saved_bytes). Move files "
                "away: what is not saved yet follows by itself, as long as its link lives."
            )
        return min(MAX_BYTES, left)


def _succeeded(record: JobRecord | None, task_id: str) -> Succeeded[Any] | None:
    outcomes = () if record is None else record.outcomes
    return next((each for each in outcomes if isinstance(each, Succeeded) and each.task_id == task_id), None)
