"""`xiling purge`: forget jobs that ended long ago."""

from __future__ import annotations

from typing import Annotated

import typer

from xiling_async._internal.clock import SystemClock
from xiling_async.cli import output, runtime
from xiling_async.cli.output import count, seconds_of
from xiling_async.cli.stores import AnyStoreOption, existing_store
from xiling_async.models.query import JobQuery
from xiling_async.models.record import HANDED_OVER
from xiling_async.stores import Store


def purge(
    *,
    older_than: Annotated[
        float,
        typer.Option(
            parser=seconds_of, metavar="AGE", help="Forget what ended longer ago than this: 30d, 12h, 90m, 2w."
        ),
    ],
    store: AnyStoreOption = "jobs.db",
) -> None:
    """Forget jobs that ended long ago.

    Jobs that ended longer ago than --older-than are forgotten, with their keys, and their space is given back.
    Unfinished jobs stay. Where an application takes ended jobs from the store (`client.completed`), those that it has
    not acknowledged stay, too. Files that were downloaded are not touched, nothing is asked of the service.

    A key that was forgotten buys again: purge no job whose key may still be submitted. A SQLite file must not be in
    use. Keep the password of a database out of the command line: PGPASSWORD and ~/.pgpass are read.

    Exit codes: 0 done, also if there was nothing to forget; 1 there is no such store, or it is in use; 2 the options
    are wrong: nothing was forgotten.

    \b
    Examples:
      xiling purge --older-than 30d --store jobs.db
      xiling purge --older-than 12h --store postgresql://me@db.example.com/videos
    """
    chosen = existing_store(store, read_only=False)
    out = output.console()
    with output.logged_errors(output.console(stderr=True)):
        purged, kept = runtime.run(_purged(chosen, older_than))
    output.say(out, f"{count(purged, 'job')} forgotten.")
    if kept:
        output.say(out, f"{count(kept, 'job')} kept: ended as long ago, and not acknowledged by a consumer yet.")


async def _purged(store: Store, older_than_s: float) -> tuple[int, int]:
    """How many jobs were forgotten, and how many of that age were kept."""
    now = SystemClock().time()
    await store.open()
    try:
        purged = await store.purge(older_than_s, now=now)
        return purged, await _unacknowledged(store, now - older_than_s)
    finally:
        await store.close()


async def _unacknowledged(store: Store, before: float) -> int:
    """How many ended jobs of this age a consumer has still to acknowledge.

    Asked after a purge this reads few jobs: those, and the ones that were made before that time and ended after it.
    """
    number = 0
    async for record in store.jobs(JobQuery(states=HANDED_OVER)):
        if record.created_at >= before:
            break
        number += record.changed_at < before and record.handover_at is not None
    return number
