"""What the demo orders: jobs of every model, and what shall go wrong with each; the same seed, the same plan."""

from __future__ import annotations

import random
from itertools import cycle, islice
from pathlib import Path
from typing import Final

from attrs import Factory, define, field, frozen

from xiling_async.jobs.job import Job
from xiling_async.kinds.image_to_video import ASPECT_RATIOS, MODES, NEEDED, ImageToVideo, Mode, Video
from xiling_async.models.record import Failed, State, Succeeded
from xiling_async.simulator import faults

LATENCY_S: Final = (0.3, 4.0)  # long enough to be seen, short enough to be waited for
RETRY_AFTER_S: Final = 1.0
COUNTS: Final = (1, 1, 2, 3, 4)  # of outputs of a job
SCENES: Final = (
    "waves at dawn", "a fox in the snow", "rain on a tin roof", "a paper boat", "steam over a teacup",
    "lanterns on a river", "a kite over dunes", "a cat at the window", "a train in the fog", "fireflies in a jar",
    "a lighthouse at night", "wheat in the wind",
)  # fmt: skip


@frozen(kw_only=True)
class PlannedFault:
    """One thing that goes wrong: the simulator's word for it, and what it does, for people.

    `directive` asks for it in the prompt; `script` is for what no directive can say; `label`, where the name is not
    enough.
    """

    name: str
    description: str
    label: str = field(default=Factory(lambda self: self.name, takes_self=True))
    directive: str = ""
    script: tuple[faults.Fault, ...] = ()


NONE: Final = PlannedFault(name="none", description="", label="no fault")
FAULTS: Final = (
    PlannedFault(name="drop_after_accept", description="taken, answer lost", directive="[sim:drop_after_accept]"),
    PlannedFault(name="early_callback", description="callback first", directive="[sim:early_callback]"),
    PlannedFault(name="rate_limited", description="429 at first", directive="[sim:rate_limited={pause_s}]"),
    PlannedFault(name="duplicate_callback", description="sent twice", directive="[sim:duplicate_callback]"),
    PlannedFault(
        name="status", label="status 500", description="the job was taken",
        script=(faults.status(500, accept=True),),
    ),
    PlannedFault(name="out_of_order", description="old news last", directive="[sim:out_of_order]"),
    PlannedFault(name="garbage", description="a web page came back", directive="[sim:garbage]"),
    PlannedFault(name="progress_callback", description="news first", directive="[sim:progress_callback]"),
    PlannedFault(name="failed", description="generation failed", directive="[sim:failed=The scene could not be drawn]"),
)  # fmt: skip


@frozen(kw_only=True)
class PlannedJob:
    """One job as it is planned. The prompt is its own, so that its POSTs can be found in the ledger."""

    number: int
    title: str
    request: ImageToVideo
    fault: PlannedFault


@define(eq=False)
class Row:
    """One job as it goes: what the screen shows, and what the audit asks about."""

    planned: PlannedJob
    job: Job[Video] | None = None
    is_sent: bool = False
    is_over: bool = False
    at_submit: State | None = None  # the job's state when `submit` returned
    outcomes: tuple[Succeeded[Video] | Failed, ...] = ()
    saved: list[str] = Factory(list)  # task ids whose file is there
    problem: str = ""

    @property
    def fault(self) -> str:
        """What the screen calls its fault; nothing for none."""
        return "" if self.planned.fault is NONE else self.planned.fault.label

    @property
    def state(self) -> str:
        if self.problem:
            return "problem"
        return "sending" if self.job is None else self.job.state.value


def plan(jobs: int, *, seed: int, speed: float, photo: Path | None = None) -> list[PlannedJob]:
    """So many jobs, two of three with a fault. `speed`: 2 is twice as fast. `photo`: what all pictures are to be."""
    rng = random.Random(seed)  # noqa: S311 - a plan that can be repeated, no secret
    faulty = round(jobs * 2 / 3)
    planned_faults = [*islice(cycle(FAULTS), faulty), *[NONE] * (jobs - faulty)]
    modes = list(islice(cycle(MODES), jobs))
    rng.shuffle(planned_faults)
    rng.shuffle(modes)
    # A script is for the next create that arrives, so those jobs are sent before any other, one by one.
    planned_faults.sort(key=lambda fault: not fault.script)
    return [
        _planned_job(number, mode, fault, rng, speed, photo)
        for number, (mode, fault) in enumerate(zip(modes, planned_faults, strict=True), start=1)
    ]


def _planned_job(
    number: int, mode: Mode, fault: PlannedFault, rng: random.Random, speed: float, photo: Path | None
) -> PlannedJob:
    title = f"{rng.choice(SCENES)} #{number}"
    # Retry-After is in whole seconds.
    wanted = fault.directive.format(pause_s=round(RETRY_AFTER_S / speed))
    latency_s = rng.uniform(*LATENCY_S) / speed
    pictures = [
        photo or f"https://example.com/{number}-{picture}.jpg" for picture in range(rng.choice(mode.reference_images))
    ]
    request = ImageToVideo(
        model=mode.model,
        prompt=f"{title} [sim:latency={latency_s:.3f}] {wanted}".rstrip(),
        image_url=(photo or f"https://example.com/{number}.jpg") if mode.image_url == NEEDED else None,
        reference_images=pictures or None,
        aspect_ratio=rng.choice(ASPECT_RATIOS),
        aspect_resolution=rng.choice(mode.aspect_resolution),
        duration=rng.choice(mode.duration),
        generate_count=rng.choice(COUNTS),
    )
    return PlannedJob(number=number, title=title, request=request, fault=fault)
