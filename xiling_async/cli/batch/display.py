"""How far a batch is: on a terminal a bar and how many rows are at which step, else a line for each row that ends."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from xiling_async._internal.clock import SystemClock
from xiling_async.cli import output
from xiling_async.cli.batch import gallery, results
from xiling_async.cli.batch.state import Entry, Tally, words_of_problem
from xiling_async.cli.watch import Watch

REPAINT_S: Final = 0.25
TELL_S: Final = 10.0  # between two lines of numbers where nothing can be painted over
STEPS: Final = {
    "waiting": "dim", "sending": "dim", "at the service": "cyan", "saving": "cyan", "done": "green", "failed": "red",
}  # fmt: skip
MONEY_STYLES: Final = {"no": "green", "maybe": "yellow", "yes": "magenta"}


@asynccontextmanager
async def shown(out: Console, tally: Tally, watch: Watch) -> AsyncIterator[Callable[[Entry], None]]:
    """Show the rows while they run, and tell the tally what is written of their jobs. What is given is to be called
    with each row that is over."""
    live = Live(console=out, auto_refresh=False, transient=True) if output.is_live(out) else None
    painter = asyncio.create_task(_paint(out, live, tally, watch), name="xiling board")
    try:
        if live is None:
            yield lambda entry: output.say(out, _line(entry, tally))
        else:
            with live:
                yield lambda entry: _complain(out, entry)
    finally:
        painter.cancel()
        await asyncio.gather(painter, return_exceptions=True)
        tally.saw(watch.news())


async def _paint(out: Console, live: Live | None, tally: Tally, watch: Watch) -> None:
    clock = SystemClock()
    told_at = clock.time()
    while True:
        tally.saw(watch.news())
        now = clock.time()
        if live is not None:
            live.update(board(tally, now, out.width), refresh=True)
        elif now - told_at >= TELL_S:
            told_at = now
            output.say(out, f"{_steps(tally)}; {_pace(tally, now)}")
        await clock.sleep(REPAINT_S)


def board(tally: Tally, now: float, width: int) -> RenderableType:
    """A bar, the steps, the pace."""
    width = min(width, output.WIDEST)
    told = f"{tally.over}/{len(tally.entries)} rows  {output.count(tally.videos, 'video')}"
    bar = Table.grid(padding=(0, 2, 0, 0))
    total = len(tally.entries)
    bar.add_row(ProgressBar(total=total, completed=tally.over, width=max(10, width - len(told) - 5)), told)
    steps = Text(no_wrap=True, overflow="ellipsis")
    for step, number in _numbers(tally):
        steps.append(f"{number} {step}   ", style=STEPS[step])
    return Group(bar, steps, Text(_pace(tally, now), style="dim", no_wrap=True, overflow="ellipsis"))


def _numbers(tally: Tally) -> list[tuple[str, int]]:
    found = tally.steps
    return [(step, found[step]) for step in STEPS if found[step]]


def _steps(tally: Tally) -> str:
    return ", ".join(f"{number} {step}" for step, number in _numbers(tally))


def _pace(tally: Tally, now: float) -> str:
    told = output.clock_of(now - tally.began_at)
    rate, left_s = tally.rate(now), tally.left_s(now)
    if rate is None or left_s is None:
        return told
    speed = f"{rate:.1f} rows a second" if rate >= 1 else f"{rate * 60:.1f} rows a minute"
    return f"{told}   {speed}   about {output.clock_of(math.ceil(left_s))} left"


def _line(entry: Entry, tally: Tally) -> str:
    digits = len(str(len(tally.entries)))
    where = f"[{tally.over:{digits}}/{len(tally.entries)}] line {entry.row.line}"
    if entry.is_good:
        return f"{where}: done, {output.count(len(entry.files), 'video')}"
    told, money = words_of_problem(entry)
    return f"{where}: {money}: {told}"


def foretell(out: Console, tally: Tally, *, skipped: int) -> None:
    """What a run would buy."""
    entries = list(tally.entries.values())
    new = [entry.row.request for entry in entries if not entry.was_bought]
    known = len(entries) - len(new)
    output.say(out, f"{output.count(len(entries), 'row')} can be bought{_left_out(skipped)}. Nothing was sent.", "bold")
    if known:
        output.say(out, f"{output.count(known, 'job')} bought before: not bought again")
    models = Counter(request.model for request in new)
    told = ", ".join(f"{model}: {number}" for model, number in sorted(models.items()))
    videos = output.count(sum(request.task_count for request in new), "video")
    output.say(out, f"to buy: {output.count(len(new), 'job')}, {videos}{f' ({told})' if told else ''}")


def summary(out: Console, tally: Tally, folder: Path, *, skipped: int) -> None:
    """How it ended: numbers, every row that did not succeed with what that means, and where everything is."""
    entries, bad = list(tally.entries.values()), tally.bad
    now = sum(entry.is_bought and not entry.was_bought for entry in entries)
    before = sum(entry.was_bought for entry in entries)
    told = f"{output.count(len(entries), 'row')}: {sum(entry.is_good for entry in entries)} done"
    output.say(out, told + (f", {len(bad)} not" if bad else "") + _left_out(skipped), "bold")
    output.say(out, f"{output.count(now, 'job')} bought now" + (f", {before} before" if before else ""))
    if bad:
        output.say(out, "")
        _table(out, bad)
        output.say(out, "")
        for line in _advice(bad):
            output.say(out, line)
    names = (f"{output.count(tally.videos, 'video')} in {folder}", f"page: {folder / gallery.NAME}")
    for line in (*names, f"results: {folder / results.NAME}"):
        output.say_to_copy(out, line)


def _left_out(skipped: int) -> str:
    return f", {output.count(skipped, 'row')} left out as not valid" if skipped else ""


def _table(out: Console, bad: Sequence[Entry]) -> None:
    if not output.is_live(out):
        for entry in bad:
            told, money = words_of_problem(entry)
            output.say(out, f"line {entry.row.line}: {money}: {told}")
        return
    table = Table(
        box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold", width=min(out.width, output.WIDEST)
    )
    table.add_column("line", justify="right", no_wrap=True)
    table.add_column("money", no_wrap=True)
    table.add_column("what happened", ratio=1)
    for entry in bad:
        told, money = words_of_problem(entry)
        table.add_row(str(entry.row.line), Text(money, style=MONEY_STYLES[entry.charged]), Text(told))
    out.print(table)


def _advice(bad: Sequence[Entry]) -> Iterator[str]:
    """What to do next about each kind of misfortune."""
    found = {entry.status() for entry in bad if not entry.unsaved}
    if gallery.Status.REFUSED in found:
        yield "What was not bought, the same command tries again."
    if gallery.Status.FAILED in found:
        yield "What the service could not make is not bought again: give the row a new `key` to try it once more."
    if gallery.Status.UNCERTAIN in found:
        yield (
            "What may have been bought is never sent again: with --port the same command waits for its callback; else "
            "look at the vendor's own list of creations."
        )
    if gallery.Status.RUNNING in found or any(entry.unsaved for entry in bad):
        yield "What is bought and not here yet, the same command goes on with."


def _complain(out: Console, entry: Entry) -> None:
    if not entry.is_good:
        told, money = words_of_problem(entry)
        line = Text(f"line {entry.row.line}: {money}: {told}", style="red", no_wrap=True, overflow="ellipsis")
        out.print(line)  # all of it is in the table at the end
