"""`xiling jobs`: what a store remembers; nothing is asked, sent or changed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.text import Text

from xiling_async._internal.clock import SystemClock
from xiling_async.cli import output, runtime
from xiling_async.cli.ages import age_of, seconds_of
from xiling_async.cli.output import count, printable
from xiling_async.cli.progress import ended
from xiling_async.cli.report import as_json as json_of
from xiling_async.cli.report import remembered
from xiling_async.errors import StoreError
from xiling_async.models.query import JobQuery
from xiling_async.models.record import JobRecord, State
from xiling_async.stores import PostgresStore, SQLiteStore, Store

ENDED: Final = 10  # two lines each: a screen of 24 lines
_KEY_CELLS: Final = 24
StoreOption = Annotated[
    str, typer.Option(metavar="FILE|URL", help="The SQLite file of --store of the other commands, or postgresql://…")
]


def jobs(
    *,
    store: StoreOption,
    state: Annotated[
        list[State] | None,
        typer.Option(metavar="STATE", help=f"Only these; repeat it for more: {', '.join(State)}."),
    ] = None,
    metadata: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Only those with this metadata; repeat it for more."),
    ] = None,
    since: Annotated[str | None, typer.Option(metavar="AGE", help="Only those made since: 2d, 12h, 90m, 45s.")] = None,
    everything: Annotated[bool, typer.Option("--all", help=f"Also what ended before the last {ENDED}.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a line: as of `xiling submit --json`, nothing cut.")
    ] = False,
) -> None:
    """List the jobs that a store remembers, the newest last.

    Every unfinished job, and the last 10 that ended (--all: all of them): state, age, model, tasks done of all, key,
    prompt; below, the job id and the task ids, each good for `xiling wait`, and the metadata. Into a pipe goes one line
    a job, cut nowhere, its columns separated by tabs: state, age, model, tasks, key, job id, task ids, prompt.

    Nothing is asked of the service, sent or changed. The store may be in use: the list shows it as it is now. Keep the
    password of a database out of the command line: PGPASSWORD and ~/.pgpass are read.

    \b
    Examples:
      xiling jobs --store jobs.db
      xiling jobs --store jobs.db --state accepted --state uncertain
      xiling jobs --store jobs.db --metadata user=42 --since 2d --all
      xiling jobs --store postgresql://me@db.example.com/videos
    """
    opened = store_of(store, read_only=True)
    out, err = output.console(), output.console(stderr=True)
    query = JobQuery(
        states=frozenset(state or State),
        metadata=_pairs(metadata or []),
        since=None if since is None else SystemClock().time() - seconds_of(since, "--since"),
        newest_first=True,
    )
    with output.logged_errors(err):
        records, is_more = runtime.run(_read(opened, query, None if everything else ENDED))
    if as_json:
        for record in records:
            output.write(out, json_of(remembered(record)))
    else:
        _list(out, records)
    if is_more:
        output.say(err, f"Only the last {count(ENDED, 'job')} that ended; --all shows the others too.")
    if not records:
        output.say(err, f"No such job in {store if isinstance(opened, SQLiteStore) else opened}.")


def _pairs(texts: list[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts]
    for name, sign, value in pairs:
        if not name or not sign:
            raise typer.BadParameter(f"{name + sign + value!r} is not NAME=VALUE", param_hint="--metadata")
    return {name: value for name, _, value in pairs}


def store_of(name: str, *, read_only: bool) -> Store:
    """The store of this file or database, not opened yet. Raises `StoreError` if there is no such file."""
    if name.startswith(("postgresql://", "postgres://")):
        return PostgresStore(name, migrate=False)  # a listing makes no tables
    file = Path(name)
    if not file.is_file() or not file.stat().st_size:
        raise StoreError(f"{name} is not a store: {'it is empty' if file.is_file() else 'there is no such file'}.")
    return SQLiteStore(file, read_only=read_only)


async def _read(store: Store, query: JobQuery, most: int | None) -> tuple[list[JobRecord], bool]:
    """The jobs to show, the newest last, and whether there are older ones that ended."""
    await store.open()
    try:
        return await chosen(store, query, most)
    finally:
        await store.close()


async def chosen(store: Store, query: JobQuery, most: int | None) -> tuple[list[JobRecord], bool]:
    """The unfinished jobs of the query, and the last `most` that ended; whether there are more of those."""
    is_more = False
    listed = [] if most is None else [record async for record in store.unfinished() if query.matches(record)]
    left = most
    async for record in store.jobs(query):
        if most is not None and not record.state.is_final:
            continue
        if left == 0:
            is_more = True
            break
        left = None if left is None else left - 1
        listed.append(record)
    return sorted(listed, key=lambda record: record.created_at), is_more


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
    for below in ("  ".join(ids), *(f"{'':36}{task_id}" for task_id in record.task_ids[1:]), *_metadata(record)):
        out.print(Text(below, style="dim"), soft_wrap=True)


def _metadata(record: JobRecord) -> list[str]:
    pairs = [f"{printable(name)}={printable(value)}" for name, value in record.metadata.items()]
    return [f"  {'  '.join(pairs)}"] if pairs else []


def _fields(record: JobRecord, now: float) -> tuple[str, str, str, str]:
    model = str(getattr(record.request, "model", "?"))
    return record.state.value, age_of(now - record.created_at), model, f"{ended(record)}/{record.asked}"


def _prompt(record: JobRecord) -> str:
    return " ".join(str(getattr(record.request, "prompt", "")).split())
