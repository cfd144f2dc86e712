"""`xiling wait`: wait for jobs that were bought before."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from xiling_async.cli import session
from xiling_async.cli.report import Ending
from xiling_async.cli.session import Session
from xiling_async.client import Client
from xiling_async.errors import InvalidRequest, StoreError, XilingError


def wait(
    names: Annotated[list[str], typer.Argument(metavar="NAME", help="A task id; with --store also a key or a job id.")],
    *,
    store: session.StoreOption = None,
    public_url: session.PublicUrlOption = None,
    port: session.PortOption = None,
    timeout: session.TimeoutOption = session.WAIT_S,
    poll_every: session.PollOption = None,
    out: session.OutOption = None,
    base_url: session.BaseUrlOption = None,
    as_json: session.JsonOption = False,
) -> None:
    """Wait for jobs that were bought before.

    It prints the URL of each video, or with --out the path of its file, and buys nothing. Output and exit codes are
    those of `xiling submit`; where jobs end differently, the exit code is the lowest that is not 0.

    \b
    Examples:
      xiling wait i2v-0123456789abcdef0123456789abcdef
      xiling wait order-42 --store jobs.db --out clips
    """
    of = Session(
        store=store, base_url=base_url, public_url=public_url, port=port, timeout=timeout, poll_every=poll_every,
        folder=out,
    )  # fmt: skip
    of.check()
    if store is not None and not store.exists():
        endings = [Ending(None, StoreError(f"{store} does not exist: no store to look into."))]
    else:
        endings = of.run(awaited(of, list(dict.fromkeys(names))))
    session.deliver(endings, machine=as_json, files=of.files)


async def awaited(of: Session, names: list[str]) -> list[Ending]:
    """Each of these jobs awaited, in the order of their names."""
    async with of.opened() as client:
        return list(await asyncio.gather(*(_one(of, client, name) for name in names)))


async def _one(of: Session, client: Client, name: str) -> Ending:
    try:
        job = client.job(name) if of.store is None else await client.find(name)
    except XilingError as error:
        return Ending(None, error)
    if job is None:
        unknown = f"{of.store} has no job with key, id or task id {name!r}. Without --store the service is asked."
        return Ending(None, InvalidRequest(unknown))
    ending = await of.ending_of(job, ask_now=True)
    if ending.error is not None and not ending.error.task_ids:
        ending.error.task_ids = job.task_ids
    return await of.saved(client, ending)
