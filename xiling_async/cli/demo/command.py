"""`xiling demo`: simulator, receiver and client in one process, a few dozen jobs, and what goes wrong with them."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Annotated, Final

import typer
from attrs import frozen
from rich.console import Console

from xiling_async.cli import output, runtime
from xiling_async.cli.demo import checks, display
from xiling_async.cli.demo.display import DemoDisplay
from xiling_async.cli.demo.plan import NONE, Row, plan
from xiling_async.client import Client
from xiling_async.errors import InvalidRequest, XilingError
from xiling_async.jobs.job import Job
from xiling_async.kinds.image_to_video import Video
from xiling_async.media.images import ACCEPTED, Unfit, inspected
from xiling_async.models.record import Succeeded
from xiling_async.models.settings import Timeouts
from xiling_async.simulator import Ledger, Simulator
from xiling_async.webhooks.receiver import WebhookReceiver

IN_FLIGHT_PART: Final = 3  # a third of the jobs at once: about 10 s, however many they are
WAIT_S: Final = 60.0  # longer than any job of the plan, also at the slowest speed


def demo(
    photo: Annotated[
        Path | None, typer.Argument(metavar="PHOTO", help="A picture of yours, for every job; it is uploaded once.")
    ] = None,
    *,
    jobs: Annotated[int, typer.Option(min=1, max=500, help="How many jobs.")] = 36,
    out: Annotated[Path, typer.Option(file_okay=False, help="The folder for the videos.")] = Path("xiling-demo"),
    seed: Annotated[int, typer.Option(help="Of the plan: the same seed, the same jobs and faults.")] = 7,
    speed: Annotated[float, typer.Option(min=0.1, max=100, help="2 is twice as fast.")] = 1.0,
) -> None:
    """Watch jobs being delivered while all kinds of things go wrong.

    Jobs are bought, called back and downloaded. Nothing leaves this machine: the service is the simulator, no account
    is needed. The figures at the end are the simulator's own; the exit code is 1 if a paid job was not delivered or
    was paid for twice.

    \b
    Example (with a picture: xiling demo photo.jpg):
      xiling demo --jobs 12 --out videos
    """
    if photo is not None:
        _check(photo)
    rows = [Row(planned) for planned in plan(jobs, seed=seed, speed=speed, photo=photo)]
    console = output.console()
    out.mkdir(parents=True, exist_ok=True)
    faulty = sum(row.planned.fault is not NONE for row in rows)
    output.say(console, f"{jobs} jobs, {faulty} of them with a fault, at a simulator on this machine.")
    try:
        ledger = runtime.run(play(rows, folder=out, seed=seed, console=console))
    except KeyboardInterrupt:
        over = sum(row.is_over for row in rows)
        raise KeyboardInterrupt(f"stopped with {over} of {jobs} jobs done, {display.videos(rows)} in {out}") from None
    all_facts = checks.facts(rows, ledger)
    display.summary(console, all_facts, ledger, out)
    complaints = checks.complaints(all_facts, ledger)
    if complaints:
        raise XilingError("the demo failed: " + "; ".join(complaints))
    output.say(console, checks.DELIVERED, "bold green")


def _check(photo: Path) -> None:
    """An unusable picture is refused before anything begins."""
    try:
        inspected(photo)
    except Unfit as why:
        raise InvalidRequest(f"{photo} {why}; accepted: {ACCEPTED}") from None


async def play(rows: Sequence[Row], *, folder: Path, seed: int, console: Console, wait_s: float = WAIT_S) -> Ledger:
    """Run the jobs of these rows to their end, and give what the service wrote down.

    `wait_s`: seconds to wait for a job that was bought.
    """
    receiver = WebhookReceiver(port=0, secret=secrets.token_bytes(32))  # not the secret of a real receiver
    async with AsyncExitStack() as service:
        sim = await service.enter_async_context(Simulator(seed=seed))
        async with (
            Client(sim.api_key, base_url=sim.base_url, receiver=receiver, timeouts=Timeouts(wait=wait_s)) as client,
            DemoDisplay(console, rows, sim.ledger) as shown,
        ):
            stage = _Stage(sim=sim, client=client, folder=folder, display=shown)
            try:
                await stage.play_all(rows)
            except asyncio.CancelledError:
                await service.aclose()  # otherwise the client waits for the answers that are still to come
                raise
            await sim.settled()  # repeats and stale news still come after the jobs are over
    return sim.ledger


@frozen(kw_only=True)
class _Stage:
    """What every job of the demo needs."""

    sim: Simulator
    client: Client
    folder: Path
    display: DemoDisplay

    async def play_all(self, rows: Sequence[Row]) -> None:
        """Every row, a part of them at a time."""
        places = asyncio.Semaphore(max(2, len(rows) // IN_FLIGHT_PART))
        async with asyncio.TaskGroup() as group:
            for row in rows:
                await places.acquire()
                if row.planned.fault.script:  # it is for the next create that arrives: let no other overtake
                    self.sim.script(*row.planned.fault.script)
                    await self.buy(row)
                group.create_task(self.play(row)).add_done_callback(lambda _: places.release())

    async def play(self, row: Row) -> None:
        """Buy, await, save."""
        if not row.is_sent:
            await self.buy(row)
        if row.job is not None:
            await self._collect(row, row.job)
        row.is_over = True
        self.display.over(row)

    async def buy(self, row: Row) -> None:
        row.is_sent = True
        try:
            row.job = await self.client.submit(row.planned.request)
        except XilingError as error:
            row.problem = str(error)
        else:
            row.at_submit = row.job.state

    async def _collect(self, row: Row, job: Job[Video]) -> None:
        try:
            row.outcomes = await job.outcomes()
        except XilingError as error:
            row.problem = str(error)
        videos = [outcome.result for outcome in row.outcomes if isinstance(outcome, Succeeded)]
        await asyncio.gather(*(self._save(row, video) for video in videos))

    async def _save(self, row: Row, video: Video) -> None:
        """Keep one video. The simulator's files are on this machine; another run may have left one of this name."""
        try:
            await self.client.download(video, self.folder, allow_private=True, overwrite=True)
        except XilingError as error:
            row.problem = str(error)
        else:
            row.saved.append(video.task_id)
