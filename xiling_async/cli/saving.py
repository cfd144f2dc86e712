"""Results into files: each once, and with a bar on a terminal, else with a line when it begins and one when it ends."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Literal, cast

from rich.console import Console, RenderableType
from rich.constrain import Constrain
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Column

from xiling_async.cli import output
from xiling_async.client import Client
from xiling_async.errors import ConfigurationError, DownloadError, ResultExpired, XilingError
from xiling_async.kinds import KINDS
from xiling_async.media.paths import NoTarget, targets_of

log = logging.getLogger("xiling_async.cli.saving")

BOTH: Final = "both"
NAME_CELLS: Final = 20
ECHO_CELLS: Final = 3  # room for the ^C that a terminal writes: on a line of its own it would leave a bar behind


class Saver:
    """The folder that the results of one command are saved to; `files` has those that are there, by task.

    `what`: a word of `Client.download`; None: the file that matters. Without `overwrite` a file of a task's own name
    is what it seems to be (a download gives it its name when it is whole): it is not fetched again.
    """

    def __init__(self, folder: Path, out: Console, *, what: str | None = None, overwrite: bool = False) -> None:
        self.folder = folder
        self.files: defaultdict[str, list[Path]] = defaultdict(list)
        self._out = out
        self._what = what
        self._overwrite = overwrite
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        name = Column(width=NAME_CELLS, no_wrap=True, overflow="ellipsis")
        self._bars = Progress(
            TextColumn("{task.description}", markup=False, table_column=name), BarColumn(bar_width=None),
            DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(compact=True),
            console=out, auto_refresh=False, expand=True,
        )  # fmt: skip

    def bars(self) -> RenderableType | None:
        """A bar for each file that is under way; None: there is none."""
        if not self._bars.tasks:
            return None
        return Constrain(self._bars.get_renderable(), max(self._out.width - ECHO_CELLS, 1))

    async def make(self) -> None:
        """Make the folder where it is missing. Raises `ConfigurationError`."""
        try:
            await asyncio.to_thread(self.folder.mkdir, parents=True, exist_ok=True)
        except OSError as error:
            message = f"The folder {self.folder} cannot be made: {error.strerror}. Nothing was sent."
            raise ConfigurationError(message) from None

    async def save(self, client: Client, results: Sequence[Any], *, allow_private: bool) -> list[XilingError]:
        """Save all of these, as many at once as the client does; what was not saved is in the errors."""
        done = await asyncio.gather(*(self._save(client, result, allow_private=allow_private) for result in results))
        return [error for error in done if error is not None]

    async def _save(self, client: Client, result: Any, *, allow_private: bool) -> XilingError | None:
        """The files of one result, beginning with the one that matters."""
        task_id = str(getattr(result, "task_id", ""))
        async with self._locks[task_id]:  # two names may be of one task
            if task_id in self.files:
                return None
            try:
                paths = [
                    await self._one(client, result, what, types, allow_private=allow_private)
                    for what, types in self._wanted(result)
                ]
            except XilingError as error:
                error.task_ids = error.task_ids or (task_id,)
                return error
            except Exception as error:  # a URL of the service can raise anything: it is the failure of this result
                log.debug("task %s: its file could not be saved", task_id, exc_info=error)
                message = f"The result of task {task_id} was bought, but could not be saved ({type(error).__name__})."
                return DownloadError(message, task_ids=(task_id,))
            self.files[task_id] = paths
        return None

    def _wanted(self, result: Any) -> list[tuple[str, tuple[str, ...]]]:
        """The files that a result shall have: the word for it, and the types it may have."""
        kind = next((kind for kind in KINDS if isinstance(result, kind.result)), None)
        if kind is None:  # `Client.download` has the words for that
            return [(self._what or "", ())]
        names = list(kind.media) if self._what == BOTH else [self._what or next(iter(kind.media))]
        return [(name, kind.media[name].types) for name in names]

    async def _one(
        self, client: Client, result: Any, what: str, types: tuple[str, ...], *, allow_private: bool
    ) -> Path:
        if types and not self._overwrite:
            path = await asyncio.to_thread(self._there_already, result, what)
            if path is not None:
                output.say(self._out, f"there already: {path}")
                return path
        bar = _Bar(self._bars, self._out, f"{result.task_id}{'' if what == 'video' else f' {what}'}" if types else "")
        try:
            path = await client.download(
                result, self.folder, what=cast("Literal['video']", what), allow_private=allow_private,
                overwrite=self._overwrite, progress=bar.moved,
            )  # fmt: skip
        finally:
            bar.end()
        output.say(self._out, f"saved: {path.name}, {decimal(bar.size)}")
        return path

    def _there_already(self, result: Any, what: str) -> Path | None:
        kind = next(kind for kind in KINDS if isinstance(result, kind.result))
        try:
            (target,) = targets_of(self.folder, result.task_id, kind.media, [what])
            path = target.in_the_way()
        except (NoTarget, OSError):  # `Client.download` has the words for that
            return None
        return target.as_written / path.name if path is not None and path.is_file() else None


def unsaved(errors: Sequence[XilingError], wanted: int, command: Callable[[list[str]], str]) -> XilingError:
    """One error for all results that could not be saved. `command`: what fetches these tasks."""
    first = errors[0]
    message = str(first) if wanted == 1 else f"{len(errors)} of {wanted} results could not be saved: {first}"
    names = [task_id for error in errors if not isinstance(error, ResultExpired) for task_id in error.task_ids]
    again = f" Try again with: {command(names)}" if names else ""
    kind = type(first) if isinstance(first, DownloadError) else DownloadError
    return kind(message + again, task_ids=[task_id for error in errors for task_id in error.task_ids])


class _Bar:
    """Of one file: it is there from the first byte on."""

    def __init__(self, bars: Progress, out: Console, name: str) -> None:
        self._bars = bars
        self._out = out
        self._name = output.printable(name)
        self._id: Any = None
        self.size = 0

    def moved(self, size: int, total: int | None) -> None:
        self.size = size
        if self._id is None:
            self._id = self._bars.add_task(self._name, total=total)
            if not output.is_live(self._out):
                output.say(self._out, f"downloading: {self._name}{'' if total is None else f', {decimal(total)}'}")
        self._bars.update(self._id, completed=size, total=total)

    def end(self) -> None:
        if self._id is not None:
            self._bars.remove_task(self._id)
