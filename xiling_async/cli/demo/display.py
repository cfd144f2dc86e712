"""What the demo draws: the jobs as they go, in a table on a terminal, else a line each; and the summary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from xiling_async.cli.demo import checks
from xiling_async.cli.demo.checks import Facts
from xiling_async.cli.demo.plan import Row
from xiling_async.cli.live import LiveDisplay
from xiling_async.cli.output import STYLES, WIDEST, count, is_live, say
from xiling_async.simulator import Ledger
from xiling_async.simulator.ledger import TERMINAL

TIMES: Final = "×"  # noqa: RUF001
AROUND: Final = 6  # lines that are not jobs: title, rules, bar, and the cursor's own


class DemoDisplay(LiveDisplay):
    """The jobs while they run, as the simulator's ledger has them."""

    stays = True

    def __init__(self, out: Console, rows: Sequence[Row], ledger: Ledger) -> None:
        super().__init__(out)
        self._rows = rows
        self._ledger = ledger

    def render(self) -> RenderableType:
        return status_view(self._rows, self._ledger, self._out)

    def over(self, row: Row) -> None:
        """This job is over."""
        if self._live is None:
            say(self._out, _line(row, self._rows, self._ledger))


def status_view(rows: Sequence[Row], ledger: Ledger, out: Console) -> RenderableType:
    """The table of the jobs that fit, and how far all of them are."""
    width = min(out.width, WIDEST)
    table = Table(box=None, width=width, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("job", width=8, no_wrap=True)
    table.add_column("model", width=5, no_wrap=True)
    table.add_column("prompt", ratio=1, min_width=8, no_wrap=True, overflow="ellipsis")
    table.add_column("state", width=9, no_wrap=True)
    table.add_column("tasks", width=5, no_wrap=True)
    table.add_column("fault", width=18, no_wrap=True, overflow="ellipsis")
    ends = _ends(ledger)
    for row in window(rows, out.height - AROUND):
        table.add_row(
            _job_id(row),
            row.planned.request.model,
            Text(row.planned.title),
            Text(row.state, style=STYLES.get(row.state, "")),
            _tasks(row, ends),
            Text(row.fault),
        )
    over = sum(row.is_over for row in rows)
    bar = Table.grid(padding=(0, 2, 0, 0))
    text = f"{over}/{len(rows)} jobs  {videos(rows)}"
    bar.add_row(ProgressBar(total=len(rows), completed=over, width=max(10, width - len(text) - 2)), text)
    return Group(table, Text(), bar)


def videos(rows: Sequence[Row]) -> str:
    """How many videos are saved."""
    return count(sum(len(row.saved) for row in rows), "video")


def window(rows: Sequence[Row], lines: int) -> list[Row]:
    """The rows to show in so many lines: those under way, then the latest ones that are over; in their own order."""
    sent = [row for row in rows if row.is_sent]
    urgent = sorted(sent, key=lambda row: (row.is_over, -row.planned.number))
    chosen = urgent[: max(1, lines)]
    return sorted(chosen, key=lambda row: row.planned.number)


def _job_id(row: Row) -> str:
    return "" if row.job is None else row.job.id[:8]


def _ends(ledger: Ledger) -> frozenset[str]:
    """The tasks whose end was called back and taken."""
    return frozenset(call.task_id for call in ledger.callbacks if call.state in TERMINAL and checks.is_taken(call))


def _tasks(row: Row, ends: frozenset[str]) -> str:
    ids = () if row.job is None else row.job.task_ids
    done = len(row.outcomes) or sum(task_id in ends for task_id in ids)
    return f"{done}/{row.planned.request.generate_count}"


def _line(row: Row, rows: Sequence[Row], ledger: Ledger) -> str:
    digits = int(math.log10(len(rows))) + 1
    over = sum(one.is_over for one in rows)
    return (
        f"[{over:{digits}}/{len(rows)}] {_job_id(row):8}  {row.planned.request.model:2}  {row.state:9}  "
        f"{_tasks(row, _ends(ledger)):3}  {row.fault:18}  {row.planned.title}"
    )


def summary(out: Console, all_facts: Sequence[Facts], ledger: Ledger, folder: Path) -> None:
    """The figures of the ledger, what became of each fault, and where the files are."""
    counts = ledger.summary()
    received = sum(map(checks.is_taken, ledger.callbacks))
    say(out, "")
    say(
        out,
        f"{len(all_facts)} jobs, {counts['tasks']} tasks: {counts['succeeded']} succeeded, {counts['failed']} failed",
        "bold",
    )
    say(
        out,
        f"{counts['posts']} POSTs, {counts['paid_submits']} paid submits, {received} callbacks received, "
        f"{counts['gets']} status GETs",
        "bold",
    )
    if ledger.uploads:
        jobs = count(checks.pictured(all_facts, ledger), "job")
        say(out, f"{count(len(ledger.uploads), 'upload')} for {jobs}", "bold")
    say(out, "")
    _faults(out, checks.by_fault(all_facts, ledger))
    say(out, "")
    say(out, f"{videos([one.row for one in all_facts])} in {folder}")


def _faults(out: Console, lines: Sequence[tuple[str, int, str]]) -> None:
    if not is_live(out):
        for name, jobs, text in lines:
            say(out, f"{name} {TIMES}{jobs}: {text}")
        return
    grid = Table.grid(padding=(0, 2, 0, 0))
    for name, jobs, text in lines:
        grid.add_row(Text(f"{name} {TIMES}{jobs}", style="cyan", no_wrap=True), Text(text))
    out.print(grid)
