"""`xiling submit`: buy one job, and wait for its videos."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from xiling_async.cli import output, session
from xiling_async.cli.report import Ending
from xiling_async.cli.session import Session
from xiling_async.errors import ProtocolError, XilingError
from xiling_async.kinds.image_to_video import ASPECT_RATIOS, DURATIONS_S, MODES, NONE, RESOLUTIONS, ImageToVideo
from xiling_async.models.record import NOT_BOUGHT, State


def _offers(what: str) -> str:
    """What the rule table has in a column, by model and mode: for the help."""
    rows = [(f"{mode.model} {mode.name}", ", ".join(map(str, getattr(mode, what)))) for mode in MODES]
    return "; ".join(f"{name}: {values}" for name, values in rows)


_References = Annotated[
    list[str] | None, typer.Option(metavar="IMAGE", help="A reference image: V, KL. Repeat it for more.")
]
_Resolution = Annotated[str | None, typer.Option(help=f"The lowest if not given. {_offers('aspect_resolution')}.")]
_Duration = Annotated[
    int | None, typer.Option(metavar="SECONDS", help=f"The shortest if not given. {_offers('duration')}.")
]
_Key = Annotated[
    str | None, typer.Option(help="Your name of the job. The same --key is the same job: never bought twice.")
]
_NoWait = Annotated[bool, typer.Option("--no-wait", help="Print the job id and its task ids, and end. Needs --store.")]


def submit(
    prompt: Annotated[str, typer.Argument(help="What happens in the video; at most 1000 characters.")],
    *,
    model: Annotated[str, typer.Option(help="V, KL or S.")] = "V",
    image: Annotated[str | None, typer.Option(metavar="IMAGE", help="The start frame (image_url): V, S.")] = None,
    end_image: Annotated[str | None, typer.Option(metavar="IMAGE", help="The last frame (end_image_url): V.")] = None,
    reference: _References = None,
    ratio: Annotated[str, typer.Option(help="16:9 or 9:16.")] = ASPECT_RATIOS[0],
    resolution: _Resolution = None,
    duration: _Duration = None,
    audio: Annotated[bool, typer.Option("--audio", help="With sound: V.")] = False,
    count: Annotated[int, typer.Option(help="How many videos, 1 to 4; each is a task.")] = 1,
    store: session.StoreOption = None,
    key: _Key = None,
    no_wait: _NoWait = False,
    out: session.OutOption = None,
    public_url: session.PublicUrlOption = None,
    port: session.PortOption = None,
    timeout: session.TimeoutOption = session.WAIT_S,
    poll_every: session.PollOption = None,
    base_url: session.BaseUrlOption = None,
    as_json: session.JsonOption = False,
) -> None:
    """Buy one job; print the URLs of its videos or download them.

    An IMAGE is a URL, or a local file that is uploaded first.
    The API key is read from XILING_API_KEY or KEEVX_API_KEY. stdout gets the URLs (they are signed, and live 7 days)
    or, with --out, the paths of the files, and nothing else, so it can be piped; progress goes to stderr. With --store
    and --key the command can be repeated after anything: Ctrl-C, a crash, a lost answer. It goes on, and buys nothing
    twice. `xiling download` repeats a download that failed.

    --json gives job_id, key, state, task_ids, outcomes (of each task: all that is known of the video, raw is the
    service's own JSON; file with --out), charged (no, maybe, yes), error (its type, or null), message, request and
    times.

    Exit codes: 0 every task succeeded, and is saved with --out; 1 it failed or was refused, or it is uncertain whether
    it was bought; 2 the options or the request are wrong, nothing was sent; 3 still running after --timeout; 130
    Ctrl-C.

    \b
    Example:
      xiling submit "waves at dawn" --image https://example.com/sea.jpg \\
        --store jobs.db --key order-42 --out clips
    """
    _check(store, key, out, no_wait=no_wait)
    of = Session(
        store=store, base_url=base_url, public_url=public_url, port=port, timeout=timeout, poll_every=poll_every,
        folder=out,
    )  # fmt: skip
    of.check()
    try:
        request = request_of(
            prompt, model=model, image=image, end_image=end_image, references=reference or [], ratio=ratio,
            resolution=resolution, duration=duration, audio=audio, count=count,
        )  # fmt: skip
    except XilingError as error:
        endings = [Ending(None, error)]
    else:
        endings = of.run(bought(of, request, key, wait=not no_wait))
    session.deliver(endings, machine=as_json, ids_only=no_wait, files=of.files)


def _check(store: Path | None, key: str | None, out: Path | None, *, no_wait: bool) -> None:
    """Raises a usage error for options that could not keep their promise."""
    if store is None and (key is not None or no_wait):
        option = "--no-wait" if key is None else "--key"
        raise typer.BadParameter("needs --store: without it the job is forgotten with this process", param_hint=option)
    if no_wait and out is not None:
        raise typer.BadParameter("there is nothing to save with --no-wait", param_hint="--out")


def request_of(
    prompt: str,
    *,
    model: str,
    image: str | None,
    end_image: str | None,
    references: list[str],
    ratio: str,
    resolution: str | None,
    duration: int | None,
    audio: bool,
    count: int,
) -> ImageToVideo:
    """The request; what is not given is the least that the model offers in this mode. Raises `InvalidRequest`."""
    modes = [mode for mode in MODES if mode.model == model]
    is_multi_image = bool(references) and image is None
    fitting = [mode for mode in modes if (mode.reference_images != NONE) is is_multi_image]
    row = next(iter(fitting or modes), None)
    fields: dict[str, Any] = {  # text of the user: the request itself checks it
        "model": model, "prompt": prompt, "image_url": _picture(image), "end_image_url": _picture(end_image),
        "reference_images": [_picture(name) or "" for name in references], "aspect_ratio": ratio,
        "aspect_resolution": resolution or (row.aspect_resolution if row else RESOLUTIONS)[0],
        "duration": duration if duration is not None else (row.duration if row else DURATIONS_S)[0],
        "generate_audio": audio, "generate_count": count,
    }  # fmt: skip
    return ImageToVideo(**fields)


def _picture(name: str | None) -> str | Path | None:
    """What is not a URL is a local file: it is checked and uploaded before anything is bought."""
    return name if not name or "://" in name else Path(name)


async def bought(of: Session, request: ImageToVideo, key: str | None, *, wait: bool = True) -> list[Ending]:
    """Submit, or find the job that this key has bought, and wait for it. Raises what `Client.submit` raises."""
    async with of.opened() as client:
        known = None if key is None else await of.jobs.by_key(key)
        is_bought = known is not None and known.request == request and known.state not in NOT_BOUGHT
        if known is not None and known.request == request:
            of.watch.follow(known)
        if is_bought:
            output.say(of.out, "this key already has its job: nothing is bought")
        complaint = None
        try:
            job = await client.submit(request, key=key)
        except ProtocolError as odd:  # bought, but not what was asked for: the videos are the user's all the same
            owner = await client.find(odd.job_id) if odd.job_id and odd.task_ids else None
            if owner is None:
                raise
            job, complaint = owner, odd
        record = await of.jobs.get(job.id)
        assert record is not None, "it was submitted"
        if not wait:
            doubt = session.in_doubt(record, job) if record.state is State.UNCERTAIN else None
            return [Ending(record, complaint or doubt)]
        ending = await of.ending_of(job, ask_now=is_bought)
        return [await of.saved(client, Ending(ending.record, ending.error or complaint))]
