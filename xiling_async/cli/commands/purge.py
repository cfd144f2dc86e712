"""`xiling purge`: forget jobs that ended long ago, and give their space back."""

from __future__ import annotations

from typing import Annotated

import typer

from xiling_async._internal.clock import SystemClock
from xiling_async.cli import output, runtime
from xiling_async.cli.ages import seconds_of
from xiling_async.cli.commands.jobs import StoreOption, store_of
from xiling_async.cli.output import count
from xiling_async.models.query import JobQuery
from xiling_async.models.record import HANDED_OVER
from xiling_async.stores import Store


def purge(
    *,
    store: StoreOption,
    older_than: Annotated[str, typer.Option(metavar="AGE", help="How long ago they ended: 30d, 12h, 90m, 45s.")],
) -> None:
    """Forget jobs that ended long ago, and give their space back.

    Their keys are forgotten with them: a key that was forgotten buys again when it is submitted. Unfinished jobs stay.
    Where an application takes ended jobs from the store (`Client.completed`), those that it has not acknowledged stay,
    too, and are counted. Files of videos are not touched. A SQLite store must not be in use; a database may be.

    Exit codes: 0 done; 1 there is no such store, or it is in use; 2 the options are wrong: nothing was forgotten.

    \b
    Examples:
      xiling purge --store jobs.db --older-than 30d
      xiling purge --store postgresql://me@db.example.com/videos --older-than 90d
    """
    age_s = seconds_of(older_than, "--older-than")
    out = output.console()
    with output.logged_errors(output.console(stderr=True)):
        forgotten, kept = runtime.run(_purged(store_of(store, read_only=False), age_s))
    output.say(out, f"{count(forgotten, 'job')} forgotten.")
    if kept:
        output.say(out, f"{count(kept, 'job')} kept: ended as long ago, and not acknowledged by a consumer yet.")


async def _purged(store: Store, age_s: float) -> tuple[int, int]:
    """How many jobs were forgotten, and how many of that age were kept."""
    now = SystemClock().time()
    await store.open()
    try:
        forgotten = await store.purge(age_s, now=now)
        return forgotten, await _unacknowledged(store, now - age_s)
    finally:
        await store.close()


async def _unacknowledged(store: Store, before: float) -> int:
    """How many jobs that ended before then a consumer has still to acknowledge.

    After a purge this reads few jobs: those, and the ones that were made before that time and ended after it.
    """
    number = 0
    async for record in store.jobs(JobQuery(states=HANDED_OVER)):
        if record.created_at >= before:
            break
        number += record.changed_at < before and record.handover_at is not None
    return number
