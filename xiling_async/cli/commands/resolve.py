"""`xiling resolve`: say by hand what an uncertain job has bought."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from xiling_async.cli import output, session
from xiling_async.cli.report import Ending
from xiling_async.cli.session import Session
from xiling_async.errors import StoreError


def resolve(
    name: Annotated[str, typer.Argument(metavar="KEY|JOB_ID", help="The job: its key or its job id.")],
    *,
    store: Annotated[Path, typer.Option(dir_okay=False, metavar="FILE", help="The SQLite file that has the job.")],
    task_id: Annotated[
        list[str] | None, typer.Option(metavar="TASK_ID", help="A task that it bought. Repeat it for more.")
    ] = None,
    not_bought: Annotated[bool, typer.Option("--not-bought", help="It bought nothing.")] = False,
    base_url: session.BaseUrlOption = None,
) -> None:
    """Say by hand what an uncertain job has bought.

    Look at the vendor's list of creations first. With --task-id the job has these tasks from now on: `xiling wait`
    waits for them. With --not-bought its key is free to be submitted again. Nothing is sent or bought. Only a job whose
    state is uncertain or unknown can be resolved.

    Exit codes: 0 it is written down; 1 there is no such store; 2 the options are wrong, or the job's fate is known
    already: nothing was changed.

    \b
    Examples:
      xiling resolve order-42 --store jobs.db --task-id i2v-0123456789abcdef
      xiling resolve order-42 --store jobs.db --not-bought
    """
    if bool(task_id) is not_bought:
        raise typer.BadParameter("give either --task-id or --not-bought", param_hint="--task-id")
    if not store.exists():
        raise StoreError(f"{store} does not exist: no store to look into.")
    options = Session(
        store=store, base_url=base_url, public_url=None, port=None, timeout=session.WAIT_S, poll_every=None
    )
    (ending,) = options.run(_resolved(options, name, task_id))
    if ending.error is not None:
        raise ending.error
    assert ending.record is not None, "it was resolved"
    out = output.console()
    if not_bought:
        output.say(out, f"job {ending.record.id}: not bought. Its key may be submitted again.")
        return
    output.say(out, f"job {ending.record.id}: bought, {output.count(len(ending.record.task_ids), 'task')}.")
    output.say_to_copy(out, f"Wait for it with: {options.command('wait', [name])}")


async def _resolved(options: Session, name: str, task_ids: list[str] | None) -> list[Ending]:
    async with options.opened() as client:
        job = await client.resolve(name, task_ids=task_ids or None, not_bought=not task_ids)
        return [Ending(await options.jobs.get(job.id))]
