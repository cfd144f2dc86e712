"""How far our jobs are: a line on stderr for each change, and on a terminal one that counts the time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from rich.console import Console, Group, RenderableType
from rich.spinner import Spinner
from rich.text import Text

from xiling_async.cli import output
from xiling_async.cli.live import LiveDisplay
from xiling_async.cli.watch import Watch
from xiling_async.models.record import JobRecord, State, Succeeded

_TOLD: Final = {
    State.NOT_SENT: "not reached: nothing was sent",
    State.UNCERTAIN: "uncertain: it was sent, and its answer was lost",
    State.EXPIRED: "expired",
    State.UNKNOWN: "unknown: no callback came in time",
}


class JobsDisplay(LiveDisplay):
    """The jobs of this watch, on `out`: never on standard output, which is for the results.

    `below`: what else is to be seen on a terminal now.
    """

    def __init__(self, out: Console, watch: Watch, below: Callable[[], RenderableType | None] | None = None) -> None:
        super().__init__(out)
        self._below = below
        self._watch = watch
        self._before: dict[str, JobRecord] = {}
        self._spinner = Spinner("dots")

    async def refresh(self) -> None:
        await self._watch.refresh()

    async def pause(self) -> None:
        with suppress(TimeoutError):
            async with self._clock.timeout(math.inf if self._live is None else output.REPAINT_S):
                await self._watch.changed()

    def tell(self) -> None:
        """A line for each change that is news to people."""
        for record in self._watch.news():
            for line in _lines(self._before.get(record.id), record, self._elapsed()):
                mark = f"{record.id[:8]}  " if len(self._watch.jobs) > 1 else ""
                output.say(self._out, mark + line)
            self._before[record.id] = record

    def _elapsed(self) -> str:
        return output.clock_of(self._clock.time() - self._began_at)

    def render(self) -> RenderableType:
        below = None if self._below is None else self._below()
        if below is None:
            return self._line()
        return Group(self._line(), below) if self._watch.jobs else below

    def _line(self) -> Spinner:
        jobs = self._watch.jobs.values()
        states = Counter(record.state.value for record in jobs)
        text = ", ".join(state if len(jobs) == 1 else f"{number} {state}" for state, number in states.items())
        done = sum(map(ended, jobs))
        asked = sum(record.asked for record in jobs)
        if not jobs:
            text = "getting ready"
        tasks = f"  {done}/{output.count(asked, 'task')}" if jobs else ""
        failing = max((record.failed_asks for record in jobs if not record.state.is_final), default=0)
        trouble = f"  (the service did not answer {output.count(failing, 'question')})" if failing else ""
        self._spinner.update(text=Text(f"{self._elapsed()}  {text}{tasks}{trouble}", no_wrap=True, overflow="ellipsis"))
        return self._spinner


def ended(record: JobRecord) -> int:
    """How many tasks have an outcome."""
    return sum(outcome is not None for outcome in record.outcomes)


def _lines(before: JobRecord | None, now: JobRecord, elapsed: str) -> list[str]:
    """What is new since `before`."""
    if before is not None and (before.state, before.task_ids, ended(before)) == (now.state, now.task_ids, ended(now)):
        is_mute = now.failed_asks and not before.failed_asks
        return ["the service did not answer with a status; asking again"] if is_mute else []
    lines = []
    if now.task_ids and (before is None or before.task_ids != now.task_ids):
        first = f"accepted: job {now.id}" if now.attempt else "waiting for a task by its id"
        lines = [first, *(f"  task {task_id}" for task_id in now.task_ids)]
    text = _state_line(now, elapsed)
    return [*lines, text] if text else lines


def _state_line(now: JobRecord, elapsed: str) -> str:
    match now.state:
        case State.SENDING:
            again = f" (attempt {now.attempt})" if now.attempt > 1 else ""
            return f"sending: job {now.id}, {output.count(now.asked, 'task')}{again}"
        case State.REJECTED if now.refusal is not None and now.refusal.error == "RateLimited":
            return f"busy: the service asks to wait {now.refusal.retry_after or 0:g} s"
        case State.ACCEPTED if ended(now):
            return f"{ended(now)} of {output.count(now.asked, 'task')} done after {elapsed}"
        case State.DONE | State.FAILED:
            good = sum(isinstance(outcome, Succeeded) for outcome in now.outcomes)
            if not all(now.outcomes):
                return f"{now.state.value}, after {elapsed}"
            return f"{now.state.value}: {good} of {output.count(now.asked, 'task')} succeeded, after {elapsed}"
        case state:
            return _TOLD.get(state, "")
