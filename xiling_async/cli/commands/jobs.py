"""`xiling jobs`: what a store remembers; nothing is asked, sent or changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.text import Text

from xiling_async._internal.clock import SystemClock
from xiling_async.cli import output, runtime
from xiling_async.cli.output import age_of, count, printable
from xiling_async.cli.progress import ended
from xiling_async.cli.report import as_json as json_of
from xiling_async.cli.report import remembered
from xiling_async.cli.stores import AnyStoreOption, existing_store
from xiling_async.models.query import JobQuery
from xiling_async.models.record import JobRecord, State
from xiling_async.stores import SQLiteStore, Store

ENDED: Final = 10  # two lines each: a screen of 24 lines
_KEY_CELLS: Final = 24


def jobs(
    *,
    store: AnyStoreOption,
    state: Annotated[
        list[State] | None,
        typer.Option(metavar="STATE", help=f"Only these; repeat it for more: {', '.join(State)}."),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help=f"Also what ended before the last {ENDED}.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a line: as of `xiling submit --json`, nothing cut.")
    ] = False,
) -> None:
    """List the jobs that a store remembers, the newest last.

    Every unfinished job, and the last 10 that ended (--all: all of them): state, age, model, tasks done of all, key,
    prompt; below, the job id and the task ids, each good for `xiling wait`. Into a pipe goes one line a job, cut
    nowhere, its columns separated by tabs: state, age, model, tasks, key, job id, task ids, prompt.

    Nothing is asked of the service, sent or changed. The store may be in use: the list shows it as it is now. Keep the
    password of a database out of the command line: PGPASSWORD and ~/.pgpass are read.

    \b
    Examples:
      xiling jobs --store jobs.db
      xiling jobs --store jobs.db --state accepted --state uncertain
      xiling jobs --store postgresql://me@db.example.com/videos
    """
    kept = existing_store(store, read_only=True)
    out, err = output.console(), output.console(stderr=True)
    states, most = frozenset(state or State), None if everything else ENDED
    with output.logged_errors(err):
        records, is_more = runtime.run(_read(kept, states, most))
    if as_json:
        for record in records:
            output.write(out, json_of(remembered(record)))
    else:
        _list(out, records)
    if is_more:
        output.say(err, f"Only the last {count(ENDED, 'job')} that ended; --all shows the others too.")
    if not records:
        output.say(err, f"No such job in {store if isinstance(kept, SQLiteStore) else kept}.")


async def _read(store: Store, states: frozenset[State], most: int | None) -> tuple[list[JobRecord], bool]:
    """The jobs to show, the newest last, and whether there are older ones that ended."""
    await store.open()
    try:
        return await chosen(store, states, most)
    finally:
        await store.close()


async def chosen(store: Store, states: frozenset[State], most: int | None) -> tuple[list[JobRecord], bool]:
    """The unfinished jobs in these states, and the last `most` that ended; whether there are more of those."""
    is_more = False
    found = [] if most is None else [record async for record in store.unfinished() if record.state in states]
    room = most
    async for record in store.jobs(JobQuery(states=states, newest_first=True)):
        if most is not None and not record.state.is_final:
            continue
        if room == 0:
            is_more = True
            break
        room = None if room is None else room - 1
        found.append(record)
    return sorted(found, key=lambda record: record.created_at), is_more


def _list(out: Console, records: Sequence[JobRecord]) -> None:
    now = SystemClock().time()
    if not out.file.isatty():
        for record in records:
            fields = [*_fields(record, now), record.key or "", record.id, ",".join(record.task_ids), _prompt(record)]
            output.write(out, "\t".join(map(printable, fields)))
        return
    key_cells = min(_KEY_CELLS, max((len(record.key or "") for record in records), default=0))
    for record in records:
        _show(out, record, now, key_cells)


def _show(out: Console, record: JobRecord, now: float, key_cells: int) -> None:
    state, age, model, tasks = _fields(record, now)
    line = Text(f"{state:9}", style=output.STYLES.get(state, ""))
    line.append(f"  {age:>4}  {model:2}  {tasks}  ", style="default")
    if key_cells:
        key = Text(printable(record.key or ""), style="bold")
        key.truncate(key_cells, overflow="ellipsis", pad=True)
        line.append_text(key).append("  ")
    line.append(printable(_prompt(record)), style="default")
    out.print(line, no_wrap=True, overflow="ellipsis")
    ids = [f"  {record.id}", *record.task_ids[:1]]
    for below in ("  ".join(ids), *(f"{'':36}{task_id}" for task_id in record.task_ids[1:])):
        out.print(Text(below, style="dim"), soft_wrap=True)


def _fields(record: JobRecord, now: float) -> tuple[str, str, str, str]:
    model = str(getattr(record.request, "model", "?"))
    return record.state.value, age_of(now - record.created_at), model, f"{ended(record)}/{record.asked}"


def _prompt(record: JobRecord) -> str:
    return " ".join(str(getattr(record.request, "prompt", "")).split())
