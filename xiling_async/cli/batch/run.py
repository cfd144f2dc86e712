"""One run of a batch: rows through `Client.map`, their files saved, written down, and shown on the page."""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from xiling_async._internal.clock import SystemClock
from xiling_async._internal.tasks import Tasks
from xiling_async.cli.batch import gallery
from xiling_async.cli.batch.display import BatchDisplay
from xiling_async.cli.batch.files import reason
from xiling_async.cli.batch.gallery import Page, Phase
from xiling_async.cli.batch.results import Results
from xiling_async.cli.batch.state import BatchState, RowState
from xiling_async.cli.saving import Saver
from xiling_async.client import Client
from xiling_async.errors import Unauthorized
from xiling_async.jobs.map import Finished
from xiling_async.kinds.image_to_video import ImageToVideo
from xiling_async.models.record import JobRecord, State, Succeeded
from xiling_async.models.retry import retry_key
from xiling_async.stores import Store

SETTLING: Final = 64  # rows whose files are being saved; the client itself downloads fewer at once
PAGE_S: Final = 2.0  # between two pages while things change
BEAT_S: Final = 30.0  # and while nothing does: the page tells that the batch is alive
PAGE_SHARE: Final = 20  # writing pages may take one part of so many of the time


class BatchSaver:
    """Where the files go: the video that matters, and the thumbnail, without which a clip is good all the same."""

    def __init__(self, folder: Path, client: Client, *, allow_private: bool) -> None:
        quiet = Console(quiet=True)  # a line for each file would be too many
        self.folder = folder
        self._client = client
        self._allow_private = allow_private
        self._videos = Saver(folder, quiet)
        self._thumbnails = Saver(folder, quiet, what="thumbnail")

    async def make(self) -> None:
        """Make the folder. Raises `ConfigurationError`."""
        await self._videos.make()

    async def save(self, entry: RowState, results: Sequence[Any]) -> None:
        """Save these, and note in the entry what is there and why something is not."""
        errors = await self._videos.save(self._client, results, allow_private=self._allow_private)
        pictured = [result for result in results if getattr(result, "thumbnail_url", None)]
        await self._thumbnails.save(self._client, pictured, allow_private=self._allow_private)
        entry.unsaved = tuple(errors)
        for result in results:
            for saver, names in ((self._videos, entry.files), (self._thumbnails, entry.thumbnails)):
                if result.task_id in saver.files:
                    names[result.task_id] = saver.files[result.task_id][0].name


async def jobs_of(store: Store, key: str) -> list[JobRecord]:
    """The job of this key, and those that bought its failed tasks again, in order."""
    jobs: list[JobRecord] = []
    record = await store.by_key(key)
    while record is not None and (not jobs or record.retry_of == jobs[-1].id):
        jobs.append(record)
        record = await store.by_key(retry_key(record)) if record.state is State.FAILED else None
    return jobs


class BatchRun:
    """`page`: where the page is, and what is on it now."""

    def __init__(
        self,
        client: Client,
        jobs: Store,
        state: BatchState,
        saver: BatchSaver,
        page: Callable[[Phase], tuple[Path, Page]],
        display: BatchDisplay,
    ) -> None:
        self._client = client
        self._jobs = jobs
        self._state = state
        self._saver = saver
        self._page = page
        self._display = display
        self._clock = SystemClock()
        self._results = Results(saver.folder)
        self._writing = asyncio.Lock()
        self._room = asyncio.Semaphore(SETTLING)
        self._buying = Tasks()
        self._settling = Tasks()
        self._painting = Tasks()
        self._broken: Exception | None = None
        self._runner: asyncio.Task[Any] | None = None

    async def run(self, in_flight: int) -> None:
        """Every row to its end. Raises what ends the whole batch: a key that is not accepted, a full disk."""
        await asyncio.to_thread(self._results.open)
        self._runner = asyncio.current_task()
        self._painting.start(self._paint(), name="xiling page")
        places = asyncio.Semaphore(in_flight)  # of all rows, however often each may be bought again
        by_retries: defaultdict[int, list[RowState]] = defaultdict(list)
        for entry in self._state.in_turn():
            by_retries[entry.retries].append(entry)
        try:
            for retries, entries in by_retries.items():
                self._buying.start(self._buy(entries, retries, places, in_flight), name=f"xiling rows {retries}")
            await self._buying.drain()
            await self._settling.drain()
        except asyncio.CancelledError:
            if self._broken is None or self._runner is None:
                raise
            self._runner.uncancel()  # it was us
        finally:
            self._runner = None
            await self._buying.cancel()
            await self._settling.cancel()
            await self._painting.cancel()
        if self._broken is not None:
            raise self._broken

    async def _buy(self, entries: Sequence[RowState], retries: int, places: asyncio.Semaphore, in_flight: int) -> None:
        async def pairs() -> AsyncIterator[tuple[str, ImageToVideo]]:
            for entry in entries:
                await places.acquire()
                yield entry.row.key, entry.row.request

        try:
            async with aclosing(self._client.map(pairs(), in_flight=in_flight, retries=retries)) as endings:
                async for ending in endings:
                    places.release()
                    await self._room.acquire()
                    self._settling.start(self._settle(ending), name=f"xiling settle {ending.key}")
        except Exception as error:
            self._break(error)

    async def _settle(self, ending: Finished[Any]) -> None:
        """Save what a row has brought, write it down, and tell."""
        try:
            if isinstance(ending.error, Unauthorized):  # so it will be with every other row
                raise ending.error
            entry = self._state.entries[ending.key or ""]
            self._state.saw(await jobs_of(self._jobs, entry.row.key))
            entry.error = ending.error
            outcomes = entry.record.outcomes if entry.record is not None else ()
            await self._saver.save(entry, [one.result for one in outcomes if isinstance(one, Succeeded)])
            async with self._writing:
                await asyncio.to_thread(self._results.add, entry.lines())
            self._state.ended(entry, self._clock.time())
            self._display.over(entry)
        except Exception as error:  # the key, the store or the results file: no row can go on without them
            self._break(error)
        finally:
            self._room.release()

    def _break(self, error: Exception) -> None:
        """The batch cannot go on."""
        if self._broken is None:
            self._broken = error
            if self._runner is not None:
                self._runner.cancel()

    async def _paint(self) -> None:
        """The page, written again when something has changed, and now and then when nothing has."""
        revision, written_at = -1, -math.inf
        while True:
            began_at = self._clock.time()
            if self._state.revision != revision or began_at - written_at >= BEAT_S:
                revision = self._state.revision
                folder, page = self._page(Phase.RUNNING)
                with suppress(OSError):  # it is told when the last one cannot be written either
                    await asyncio.to_thread(gallery.write, page, folder)
                    written_at = began_at
            await self._clock.sleep(max(PAGE_S, PAGE_SHARE * (self._clock.time() - began_at)))


def write_page(page: Callable[[Phase], tuple[Path, Page]], phase: Phase) -> str:
    """The page as it stays when the command has ended, or why it cannot; it blocks."""
    folder, last = page(phase)
    try:
        gallery.write(last, folder)
    except OSError as error:
        return f"The page {folder / gallery.NAME} cannot be written: {reason(error)}."
    return ""
