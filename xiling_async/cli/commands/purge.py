"""`xiling purge`: forget jobs that ended long ago, and give their space back."""

from __future__ import annotations

from typing import Annotated

import typer

from xiling_async.cli import output, runtime
from xiling_async.cli.ages import seconds_of
from xiling_async.cli.commands.jobs import StoreOption, store_of
from xiling_async.cli.output import count
from xiling_async.stores import Store


def purge(
    *,
    store: StoreOption,
    older_than: Annotated[str, typer.Option(metavar="AGE", help="How long ago they ended: 30d, 12h, 90m, 45s.")],
) -> None:
    """Forget jobs that ended long ago, and give their space back.

    Their keys are forgotten with them: such a key buys again when it is submitted. Unfinished jobs stay. Where an
    application takes ended jobs from the store (`Client.completed`), those that it has not acknowledged stay too. Files
    of videos are not touched. A SQLite store must not be in use; a database may be.

    Exit codes: 0 done; 1 there is no such store, or it is in use; 2 the options are wrong: nothing was forgotten.

    \b
    Examples:
      xiling purge --store jobs.db --older-than 30d
      xiling purge --store postgresql://me@db.example.com/videos --older-than 90d
    """
    age_s = seconds_of(older_than, "--older-than")
    forgotten = runtime.run(_purged(store_of(store, read_only=False), age_s))
    output.say(output.console(), f"{count(forgotten, 'job')} forgotten.")


async def _purged(store: Store, age_s: float) -> int:
    await store.open()
    try:
        return await store.purge(age_s)
    finally:
        await store.close()
