"""Keeps results: each is downloaded as soon as it is known, and the store remembers where it is.

A few workers share one queue of task ids, so that a million finished jobs cost no million tasks. What failed is tried
again by the next client with the same store and folder.
"""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path
from typing import Final

from xiling_async._internal.clock import Clock
from xiling_async._internal.tasks import Tasks
from xiling_async.errors import StoreError, XilingError
from xiling_async.jobs.registry import Registry
from xiling_async.kinds import BY_NAME
from xiling_async.media.downloads import MAX_BYTES, Downloads, Wish
from xiling_async.models.lifecycle import Kept
from xiling_async.models.record import JobRecord, Succeeded
from xiling_async.stores.base import Store

log = logging.getLogger("xiling_async.jobs.auto_save")

WORKERS: Final = 8  # more would only queue for Limits.downloads


class Keeper:
    """A result becomes `<task_id>.<type>` in `folder`, which is made when it is missing."""

    def __init__(
        self,
        folder: Path,
        *,
        allow_private: bool,
        store: Store,
        registry: Registry,
        downloads: Downloads,
        clock: Clock,
    ) -> None:
        self._folder = folder
        self._allow_private = allow_private
        self._store = store
        self._registry = registry
        self._downloads = downloads
        self._clock = clock
        self._due: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
        self._queued: set[str] = set()
        self._tasks = Tasks()

    async def start(self) -> None:
        """Raises `ConfigurationError` when there cannot be such a folder."""
        await self._downloads.make_folder(self._folder)
        for _ in range(WORKERS):
            self._tasks.start(self._work(), name="xiling keeper")
        self._tasks.start(self._catch_up(), name="xiling keeper of earlier results")

    async def close(self) -> None:
        await self._tasks.cancel()

    def changed(self, record: JobRecord) -> None:
        """A record has changed: what it knows of results and has not kept is kept next."""
        for outcome in record.outcomes:
            if isinstance(outcome, Succeeded) and outcome.file is None and outcome.task_id not in self._queued:
                self._queued.add(outcome.task_id)
                self._due.put_nowait((record.id, outcome.task_id))

    async def _catch_up(self) -> None:
        """What was known before, as long as its links can live."""
        try:
            async for record in self._store.jobs():
                kind = BY_NAME.get(record.kind)
                if kind is not None and self._clock.time() - record.changed_at < kind.result_ttl_s:
                    self.changed(record)
        except StoreError as error:
            log.warning("earlier results cannot be looked up, so they are not kept now: %s", error)

    async def _work(self) -> None:
        while True:
            job_id, task_id = await self._due.get()
            try:
                await self._keep(job_id, task_id)
            except XilingError as error:
                log.warning("job %s: the result of task %s could not be kept: %s", job_id, task_id, error)
            except Exception:
                log.exception("job %s: the result of task %s could not be kept", job_id, task_id)
            finally:
                self._queued.discard(task_id)

    async def _keep(self, job_id: str, task_id: str) -> None:
        record = await self._store.get(job_id)
        for outcome in record.outcomes if record else ():
            if outcome is None or outcome.task_id != task_id or not isinstance(outcome, Succeeded):
                continue
            wish = Wish(
                result=outcome.result,
                to=f"{self._folder}{os.sep}",
                what="video",
                allow_private=self._allow_private,
                overwrite=False,
                progress=None,
                max_bytes=MAX_BYTES,
            )
            # There already: a former process had put it in its place and died before it wrote that down.
            path = await self._downloads.there_already(wish) or (await self._downloads.download(wish))[0]
            await self._registry.apply(job_id, Kept(at=self._clock.time(), task_id=task_id, file=str(path.absolute())))
