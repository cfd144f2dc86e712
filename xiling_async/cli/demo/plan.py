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
class Trouble:
    """One thing that goes wrong: the simulator's word for it, and what it does, for people.

    `directive` asks for it in the prompt; `script` is for what no directive can say; `label`, where the name is not
    enough.
    """

    name: str
    story: str
    label: str = field(default=Factory(lambda self: self.name, takes_self=True))
    directive: str = ""
    script: tuple[faults.Fault, ...] = ()


NONE: Final = Trouble(name="none", story="", label="no fault")
TROUBLES: Final = (
    Trouble(name="drop_after_accept", story="taken, answer lost", directive="[sim:drop_after_accept]"),
    Trouble(name="early_callback", story="callback first", directive="[sim:early_callback]"),
    Trouble(name="rate_limited", story="429 at first", directive="[sim:rate_limited={pause_s}]"),
    Trouble(name="duplicate_callback", story="sent twice", directive="[sim:duplicate_callback]"),
    Trouble(
        name="status", label="status 500", story="the job was taken",
        script=(faults.status(500, accept=True),),
    ),
    Trouble(name="out_of_order", story="old news last", directive="[sim:out_of_order]"),
    Trouble(name="garbage", story="a web page came back", directive="[sim:garbage]"),
    Trouble(name="progress_callback", story="news first", directive="[sim:progress_callback]"),
    Trouble(name="failed", story="generation failed", directive="[sim:failed=The scene could not be drawn]"),
)  # fmt: skip


@frozen(kw_only=True)
class Take:
    """One job as it is planned. The prompt is its own, so that its POSTs can be found in the ledger."""

    number: int
    title: str
    request: ImageToVideo
    trouble: Trouble


@define(eq=False)
class Row:
    """One job as it goes: what the screen shows, and what the audit asks about."""

    take: Take
    job: Job[Video] | None = None
    is_sent: bool = False
    is_over: bool = False
    at_submit: State | None = None  # the job's state when `submit` returned
    outcomes: tuple[Succeeded[Video] | Failed, ...] = ()
    saved: list[str] = Factory(list)  # task ids whose file is there
    problem: str = ""

    @property
    def fault(self) -> str:
        """What the screen calls its trouble; nothing for none."""
        return "" if self.take.trouble is NONE else self.take.trouble.label

    @property
    def state(self) -> str:
        if self.problem:
            return "problem"
        return "sending" if self.job is None else self.job.state.value


def plan(jobs: int, *, seed: int, speed: float, photo: Path | None = None) -> list[Take]:
    """So many jobs, two of three with a trouble. `speed`: 2 is twice as fast. `photo`: what all pictures are to be."""
    dice = random.Random(seed)  # noqa: S311 - a plan that can be repeated, no secret
    troubled = round(jobs * 2 / 3)
    troubles = [*islice(cycle(TROUBLES), troubled), *[NONE] * (jobs - troubled)]
    modes = list(islice(cycle(MODES), jobs))
    dice.shuffle(troubles)
    dice.shuffle(modes)
    # A script is for the next create that arrives, so those jobs are sent before any other, one by one.
    troubles.sort(key=lambda trouble: not trouble.script)
    return [
        _take(number, mode, trouble, dice, speed, photo)
        for number, (mode, trouble) in enumerate(zip(modes, troubles, strict=True), start=1)
    ]


def _take(number: int, mode: Mode, trouble: Trouble, dice: random.Random, speed: float, photo: Path | None) -> Take:
    title = f"{dice.choice(SCENES)} #{number}"
    # Retry-After is in whole seconds.
    wanted = trouble.directive.format(pause_s=round(RETRY_AFTER_S / speed))
    latency_s = dice.uniform(*LATENCY_S) / speed
    pictures = [
        photo or f"https://example.com/{number}-{picture}.jpg" for picture in range(dice.choice(mode.reference_images))
    ]
    request = ImageToVideo(
        model=mode.model,
        prompt=f"{title} [sim:latency={latency_s:.3f}] {wanted}".rstrip(),
        image_url=(photo or f"https://example.com/{number}.jpg") if mode.image_url == NEEDED else None,
        reference_images=pictures or None,
        aspect_ratio=dice.choice(ASPECT_RATIOS),
        aspect_resolution=dice.choice(mode.aspect_resolution),
        duration=dice.choice(mode.duration),
        generate_count=dice.choice(COUNTS),
    )
    return Take(number=number, title=title, request=request, trouble=trouble)
