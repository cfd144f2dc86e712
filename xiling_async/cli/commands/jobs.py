"""`xiling jobs`: what a store remembers; nothing is asked, sent or changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Final

import typer
from attrs import evolve
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
from xiling_async.models.metadata import checked_metadata
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
    a job, cut nowhere, its columns separated by tabs: state, age, model, tasks, key, job id, task ids, prompt. --json
    has everything: also created_at, ended_at, and in retry_of the job whose failed tasks this one buys again.

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


def _pairs(texts: list[str]) -> Mapping[str, str]:
    """Raises a usage error, and `InvalidRequest` for what cannot be metadata."""
    pairs: dict[str, str] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not name or not sign:
            raise typer.BadParameter(f"{text!r} is not NAME=VALUE", param_hint="--metadata")
        if pairs.setdefault(name, value) != value:
            raise typer.BadParameter(f"{name!r} has two values", param_hint="--metadata")
    return checked_metadata(pairs)


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
    """The jobs of the query (`newest_first`), of those that ended the last `most` only (None: all); whether there are
    more of those."""
    if most is None:
        return [record async for record in store.jobs(query)][::-1], False
    unfinished = [record async for record in store.unfinished() if query.matches(record)]
    final = frozenset(state for state in query.states or State if state.is_final)
    ended: list[JobRecord] = []
    async for record in store.jobs(evolve(query, states=final)):
        ended.append(record)
        if len(ended) > most:
            break
    return sorted(unfinished + ended[:most], key=lambda record: record.created_at), len(ended) > most


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
    if record.metadata:
        pairs = "  ".join(f"{name}={value}" for name, value in record.metadata.items())
        out.print(Text(f"  {printable(pairs)}", style="dim"), no_wrap=True, overflow="ellipsis")


def _fields(record: JobRecord, now: float) -> tuple[str, str, str, str]:
    model = str(getattr(record.request, "model", "?"))
    return record.state.value, age_of(now - record.created_at), model, f"{ended(record)}/{record.asked}"


def _prompt(record: JobRecord) -> str:
    return " ".join(str(getattr(record.request, "prompt", "")).split())
