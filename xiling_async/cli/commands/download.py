"""`xiling download`: the files of tasks that have ended."""

from __future__ import annotations

import asyncio
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from attrs import evolve

from xiling_async.api.failures import error_of
from xiling_async.cli import session
from xiling_async.cli.report import Ending, Stopped
from xiling_async.cli.session import Session
from xiling_async.client import Client
from xiling_async.errors import Rejected, StoreError, TaskFailed, Unauthorized, WaitTimeout, XilingError
from xiling_async.jobs.job import Job
from xiling_async.models.record import Failed, JobRecord, Outcome


class What(StrEnum):
    """Which files of a result."""

    VIDEO = "video"
    THUMBNAIL = "thumbnail"
    BOTH = "both"


def download(
    names: Annotated[
        list[str], typer.Argument(metavar="TASK_ID", help="With --store also a key or a job id: all its tasks.")
    ],
    *,
    out: Annotated[
        Path, typer.Option(file_okay=False, writable=True, metavar="FOLDER", help="Made when missing.")
    ] = Path(),
    store: Annotated[
        Path | None, typer.Option(dir_okay=False, metavar="FILE", help="Look the tasks up in this SQLite file.")
    ] = None,
    what: Annotated[What, typer.Option(help="Which files.")] = What.VIDEO,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Fetch again what is there already.")] = False,
    base_url: session.BaseUrlOption = None,
) -> None:
    """Download the results of tasks that have ended.

    A file is called by its task id; it is there whole, or not at all. What was cut goes on where it was cut, also when
    the command is repeated. stdout gets the path of each file and nothing else; progress goes to stderr. The API key
    is read from XILING_API_KEY or KEEVX_API_KEY. With --store the service is asked only of what the store does not
    know the end of. Results live 7 days at the service.

    Exit codes: 0 every file is there; 1 one is not: its task failed or is unknown, or the download failed; 3 a task is
    still running; 130 Ctrl-C.

    \b
    Example:
      xiling download i2v-0123456789abcdef0123456789abcdef --out clips
    """
    of = Session(
        store=store, base_url=base_url, public_url=None, port=None, timeout=session.WAIT_S, poll_every=None,
        folder=out, what=what.value, overwrite=overwrite,
    )  # fmt: skip
    if store is not None and not store.exists():
        raise StoreError(f"{store} does not exist: no store to look into.")
    endings = of.run(downloaded(of, list(dict.fromkeys(names))))
    if any(isinstance(ending.error, Stopped) for ending in endings):
        raise Stopped("Stopped. What has come is kept: the same command goes on from there.")
    session.deliver(endings, files=of.files)


async def downloaded(of: Session, names: list[str]) -> list[Ending]:
    """Each of these tasks saved, in the order of their names."""
    async with of.opened() as client:
        endings = await asyncio.gather(*(_named(of, client, name) for name in names))
        return [ending for several in endings for ending in several]


async def _named(of: Session, client: Client, name: str) -> list[Ending]:
    try:
        record = await _record(of, client, name)
    except XilingError as error:
        return [Ending(None, error)]
    tasks = dict(zip(record.task_ids, record.outcomes, strict=True))
    if not tasks:
        return [Ending(record, error_of(record) or _still_running(of, name, record))]
    wanted = [name] if name in tasks else list(tasks)
    parts = [
        Ending(evolve(record, task_ids=(task_id,), outcomes=(tasks[task_id],)), _missing(of, task_id, tasks, record))
        for task_id in wanted
    ]
    return await asyncio.gather(*(of.saved(client, part) for part in parts))


async def _record(of: Session, client: Client, name: str) -> JobRecord:
    """The job of this name, as new as need be. Raises what says why there is none."""
    job: Job[Any] | None = client.job(name) if of.store is None else await client.find(name)
    if job is None:
        raise StoreError(
            f"{of.store} has no job with task id, key or job id {name!r}. Without --store the service is asked."
        )
    if not job.state.is_final and job.task_ids:
        try:
            await job.refresh()
        except Unauthorized:
            raise
        except Rejected as error:
            message = error.service_message or f"HTTP {error.status}"
            raise Rejected(f"The service does not know the task {job.task_ids[0]} ({message}).") from None
    record = await of.jobs.get(job.id)
    assert record is not None, "it was asked about, or found there"
    return record


def _missing(of: Session, task_id: str, tasks: dict[str, Outcome | None], record: JobRecord) -> XilingError | None:
    """Why this task has no result."""
    outcome = tasks[task_id]
    if isinstance(outcome, Failed):
        why = outcome.message or "no reason given"
        return TaskFailed(f"Task {task_id} failed at the service: {why}. It has no result.", task_ids=(task_id,))
    if outcome is None:
        return (error_of(record) if record.state.is_final else None) or _still_running(of, task_id, record)
    return None


def _still_running(of: Session, name: str, record: JobRecord) -> WaitTimeout:
    again = of.command("wait", [name])
    return WaitTimeout(
        f"{name} is still {'running' if record.task_ids else 'being sent'}: it has no result yet. Wait for it with: "
        f"{again}",
        job_id=record.id,
        task_ids=record.task_ids,
    )
