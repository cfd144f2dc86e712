"""How far a batch is: on a terminal a bar and how many rows are at which step, else a line for each row that ends."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from xiling_async.cli import output
from xiling_async.cli.batch import gallery, results
from xiling_async.cli.batch.state import BatchState, RowState, words_of_problem
from xiling_async.cli.live import LiveDisplay
from xiling_async.cli.watch import Watch
from xiling_async.models.record import Failed, State

REPAINT_S: Final = 0.25
DOUBTS_SHOWN: Final = 20
COUNT_S: Final = 10.0  # between two lines of numbers where nothing can be painted over
STEPS: Final = {
    "waiting": "dim", "sending": "dim", "at the service": "cyan", "saving": "cyan",
    "uncertain": "yellow", "in doubt": "yellow", "done": "green", "failed": "red",
}  # fmt: skip
MONEY_STYLES: Final = {"no": "green", "maybe": "yellow", "yes": "magenta"}


class BatchDisplay(LiveDisplay):
    """The rows while they run; it also tells the state what is written of their jobs."""

    def __init__(self, out: Console, state: BatchState, watch: Watch) -> None:
        super().__init__(out)
        self._state = state
        self._watch = watch
        self._counted_at = self._began_at

    def render(self) -> RenderableType:
        return status_view(self._state, self._clock.time(), self._out.width)

    def tell(self) -> None:
        self._state.saw(self._watch.news())
        _say_doubts(self._out, self._state.doubts())
        now = self._clock.time()
        if self._live is None and now - self._counted_at >= COUNT_S:
            self._counted_at = now
            output.say(self._out, f"{_steps(self._state)}; {_pace(self._state, now)}")

    async def pause(self) -> None:
        await self._clock.sleep(REPAINT_S)

    def over(self, entry: RowState) -> None:
        """This row is over."""
        if self._live is None:
            output.say(self._out, row_line(entry, self._state))
        elif not entry.is_good:
            _complain(self._out, entry)


def _say_doubts(out: Console, doubts: Sequence[RowState]) -> None:
    """Rows that may have been bought and may have to be waited for to the end are named at once."""
    for entry in doubts[:DOUBTS_SHOWN]:
        output.say(
            out,
            f"line {entry.row.line}: may have been bought: it was sent, and its answer was lost; only its callback can "
            "tell. It is awaited until --timeout, and never sent again.",
            "yellow",
        )
    if len(doubts) > DOUBTS_SHOWN:
        output.say(out, f"... and {output.count(len(doubts) - DOUBTS_SHOWN, 'such row')} more", "yellow")


def status_view(state: BatchState, now: float, width: int) -> RenderableType:
    """A bar, the steps, the pace."""
    width = min(width, output.WIDEST)
    text = f"{state.over}/{len(state.entries)} rows  {output.count(state.videos, 'video')}"
    bar = Table.grid(padding=(0, 2, 0, 0))
    total = len(state.entries)
    bar.add_row(ProgressBar(total=total, completed=state.over, width=max(10, width - len(text) - 5)), text)
    steps = Text(no_wrap=True, overflow="ellipsis")
    for step, number in _numbers(state):
        steps.append(f"{number} {step}   ", style=STEPS[step])
    return Group(bar, steps, Text(_pace(state, now), style="dim", no_wrap=True, overflow="ellipsis"))


def _numbers(state: BatchState) -> list[tuple[str, int]]:
    steps = state.steps
    return [(step, steps[step]) for step in STEPS if steps[step]]


def _steps(state: BatchState) -> str:
    return ", ".join(f"{number} {step}" for step, number in _numbers(state))


def _pace(state: BatchState, now: float) -> str:
    text = output.clock_of(now - state.began_at)
    rate, left_s = state.rate(now), state.left_s(now)
    if state.over < len(state.entries) == state.over + state.steps["uncertain"]:
        return f"{text}   waiting for the callbacks of {output.count(state.steps['uncertain'], 'uncertain row')}"
    if rate is None or left_s is None:
        return text
    speed = f"{rate:.1f} rows a second" if rate >= 1 else f"{rate * 60:.1f} rows a minute"
    return f"{text}   {speed}   about {output.clock_of(math.ceil(left_s))} left"


def row_line(entry: RowState, state: BatchState) -> str:
    """How a row ended, and how many have."""
    digits = len(str(len(state.entries)))
    where = f"[{state.over:{digits}}/{len(state.entries)}] line {entry.row.line}"
    if entry.is_good:
        return f"{where}: done, {output.count(len(entry.files), 'video')}"
    text, money = words_of_problem(entry)
    return f"{where}: {money}: {text}"


def dry_run_summary(out: Console, state: BatchState, *, skipped: int, max_videos: int | None) -> None:
    """What a run would buy."""
    entries = list(state.entries.values())
    new = [entry.row.request for entry in entries if not entry.bought]
    known = len(entries) - len(new)
    output.say(out, f"{output.count(len(entries), 'row')} can be bought{_left_out(skipped)}. Nothing was sent.", "bold")
    if known:
        output.say(out, f"{output.count(known, 'job')} bought before: not bought again")
    models = Counter(request.model for request in new)
    text = ", ".join(f"{model}: {number}" for model, number in sorted(models.items()))
    videos = output.count(sum(request.task_count for request in new), "video")
    output.say(out, f"to buy: {output.count(len(new), 'job')}, {videos}{f' ({text})' if text else ''}")
    again = sum(map(_failed_tasks, entries))
    if again:
        output.say(out, f"to buy again: {output.count(again, 'failed video')}")
    if max_videos is not None:
        output.say(out, f"at most {output.count(max_videos, 'video')} in one run")


def _failed_tasks(entry: RowState) -> int:
    """How many failed tasks of earlier runs a run would buy again."""
    if entry.record is None or entry.record.state is not State.FAILED or entry.retries < len(entry.bought):
        return 0
    return sum(isinstance(outcome, Failed) for outcome in entry.record.outcomes)


def summary(out: Console, state: BatchState, folder: Path, *, skipped: int) -> None:
    """How it ended: numbers, every row that did not succeed with what that means, and where everything is."""
    entries, bad = list(state.entries.values()), state.bad
    now = sum(entry.bought_now for entry in entries)
    before = sum(entry.bought_before for entry in entries)
    text = f"{output.count(len(entries), 'row')}: {sum(entry.is_good for entry in entries)} done"
    output.say(out, text + (f", {len(bad)} not" if bad else "") + _left_out(skipped), "bold")
    output.say(out, f"{output.count(now, 'job')} bought now" + (f", {before} before" if before else ""))
    if bad:
        output.say(out, "")
        _table(out, bad)
        output.say(out, "")
        for line in _advice(bad):
            output.say(out, line)
    names = (f"{output.count(state.videos, 'video')} in {folder}", f"page: {folder / gallery.NAME}")
    for line in (*names, f"results: {folder / results.NAME}"):
        output.say_to_copy(out, line)


def _left_out(skipped: int) -> str:
    return f", {output.count(skipped, 'row')} left out as not valid" if skipped else ""


def _table(out: Console, bad: Sequence[RowState]) -> None:
    if not output.is_live(out):
        for entry in bad:
            text, money = words_of_problem(entry)
            output.say(out, f"line {entry.row.line}: {money}: {text}")
        return
    table = Table(
        box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold", width=min(out.width, output.WIDEST)
    )
    table.add_column("line", justify="right", no_wrap=True)
    table.add_column("money", no_wrap=True)
    table.add_column("what happened", ratio=1)
    for entry in bad:
        text, money = words_of_problem(entry)
        table.add_row(str(entry.row.line), Text(money, style=MONEY_STYLES[entry.charged]), Text(text))
    out.print(table)


def _advice(bad: Sequence[RowState]) -> Iterator[str]:
    """What to do next about each kind of failure."""
    statuses = {entry.status() for entry in bad if not entry.unsaved}
    if gallery.Status.REFUSED in statuses:
        yield "Rows that were not bought are tried again by the same command."
    if gallery.Status.FAILED in statuses:
        yield "What the service could not make is not bought again by itself: --retry-failed does, once."
    if gallery.Status.UNCERTAIN in statuses:
        yield (
            "What may have been bought is never sent again: with --port the same command waits for its callback; else "
            "look at the vendor's own list of creations, and say what it bought with `xiling resolve`."
        )
    if gallery.Status.RUNNING in statuses or any(entry.unsaved for entry in bad):
        yield "The same command goes on with what is bought and not here yet."


def _complain(out: Console, entry: RowState) -> None:
    text, money = words_of_problem(entry)
    line = Text(f"line {entry.row.line}: {money}: {text}", style="red", no_wrap=True, overflow="ellipsis")
    out.print(line)  # all of it is in the table at the end
