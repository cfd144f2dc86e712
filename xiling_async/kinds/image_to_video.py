"""Image to video: the request with its rule table, the result, the paths, the pace of polling.

The facts are those of the vendor's page "Create image-to-video task" (docs.keevx.com) and, where marked, of its newer
version and of the vendor's skill `baidu-xiling/keevx-image-to-video` 1.0.0. Nothing here was tried against the live
service.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Final, Literal, Self

from attrs import field, frozen
from yarl import URL

from xiling_async._internal.redact import shown
from xiling_async.errors import InvalidRequest, Problem, Rejected, Unauthorized
from xiling_async.models.request import JSON, Kind, Media, Progress, Request, is_http_url, values_of

PROMPT_CHARACTERS: Final = 1000
GENERATE_COUNT: Final = range(1, 5)
ASPECT_RATIOS: Final = ("16:9", "9:16")
RESOLUTIONS: Final = ("720p", "1080p", "4k")
DURATIONS_S: Final = (4, 5, 6, 8, 10, 12)

# The same for type checkers and the completion of editors.
Model = Literal["V", "KL", "S"]
AspectRatio = Literal["16:9", "9:16"]
Resolution = Literal["720p", "1080p", "4k"]
Duration = Literal[4, 5, 6, 8, 10, 12]
Image = str | Path | URL

NEEDED, ALLOWED, NEVER = "needed", "allowed", "never"


@frozen
class Mode:
    """One row of the rule table: what a model takes in one of its input modes."""

    model: Model
    name: str
    image_url: str
    end_image_url: str
    reference_images: range  # how many; range(0, 1): none
    aspect_resolution: tuple[Resolution, ...]
    duration: tuple[Duration, ...]  # seconds
    generate_audio: bool


NONE: Final = range(1)

# "Detailed Model Parameter Rules" of the vendor's page. end_image_url: its newer version. KL's 7 images: the skill.
MODES: Final = (
    #     model  mode           image_url  end_image  references    resolution                duration    audio
    Mode("V",   "start-frame", NEEDED,    ALLOWED,   NONE,         ("720p", "1080p", "4k"), (4, 6, 8),  True),
    Mode("V",   "multi-image", NEVER,     NEVER,     range(1, 4),  ("720p", "1080p", "4k"), (8,),       True),
    Mode("KL",  "multi-image", NEVER,     NEVER,     range(1, 8),  ("720p", "1080p"),       (5, 10),    False),
    Mode("S",   "start-frame", NEEDED,    NEVER,     NONE,         ("720p",),               (6, 8, 12), False),
)  # fmt: skip
MODELS: Final = tuple(dict.fromkeys(mode.model for mode in MODES))


@frozen(kw_only=True)
class Video:
    """A generated video. `duration` in seconds, `width` and `height` in pixels: None where the service did not say.

    The URLs are signed and live 7 days; another signature does not make it another video. `raw` is the
    service's own JSON, unknown fields kept.
    """

    task_id: str
    video_url: str = field(repr=shown, eq=shown)
    thumbnail_url: str | None = field(default=None, repr=shown, eq=shown)
    duration: float | None = None
    width: int | None = None
    height: int | None = None
    raw: Mapping[str, JSON] = field(factory=dict, repr=False, eq=False)


def _text(value: Image | None) -> str | Path | None:
    return str(value) if isinstance(value, URL) else value


def _texts(value: Sequence[Image] | None) -> Sequence[str | Path] | None:
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        return value  # None, or what the rules refuse
    return tuple(str(item) if isinstance(item, URL) else item for item in value) or None  # an empty list is none at all


@frozen(kw_only=True)
class ImageToVideo(Request[Video]):
    """A create of 1-4 videos from a start frame or from reference images; the fields are the wire's own.

    | model | input | aspect_resolution | duration (s) | generate_audio |
    | --- | --- | --- | --- | --- |
    | V | `image_url` (+ `end_image_url`), or 1-3 `reference_images` | 720p, 1080p, 4k | 4, 6, 8; references: 8 | yes |
    | KL | 1-7 `reference_images` | 720p, 1080p | 5, 10 | no |
    | S | `image_url` | 720p | 6, 8, 12 | no |

    `prompt`: at most 1000 characters. Images: JPG, PNG or WebP of at most 20 MB each, as URLs, or as `pathlib.Path`s
    of local files, which are checked and uploaded when the request is submitted. `aspect_ratio`: 16:9 or 9:16.
    Raises `InvalidRequest`, which names every broken rule at once.
    """

    model: Model
    prompt: str
    image_url: str | Path | None = field(default=None, converter=_text, repr=shown)
    end_image_url: str | Path | None = field(default=None, converter=_text, repr=shown)
    reference_images: Sequence[str | Path] | None = field(default=None, converter=_texts, repr=shown)
    aspect_ratio: AspectRatio
    aspect_resolution: Resolution
    duration: Duration
    generate_audio: bool = False
    generate_count: int = 1
    extra: Mapping[str, JSON] | None = field(default=None, init=False, repr=shown)

    kind: ClassVar[Kind[Video]]

    def __attrs_post_init__(self) -> None:
        problems = tuple(_problems(self))
        if problems:
            raise InvalidRequest.of("ImageToVideo", problems)

    @classmethod
    def unchecked(cls, /, **wire_fields: JSON) -> Self:
        """A request of exactly these wire fields, for what the rule table does not know yet (a new model, a new field).

        Only what would make the job unpayable or unrecognisable is refused (`InvalidRequest`): a `callback_url`
        (the receiver's own) and values that JSON has no form for.
        """
        problems = tuple(_unsendable(wire_fields))
        if problems:
            raise InvalidRequest.of("ImageToVideo.unchecked", problems)
        plain = json.loads(json.dumps(wire_fields))  # as a store gives it back, and a copy
        return cls.restored({**plain, "extra": plain})

    @property
    def task_count(self) -> int:
        count: object = self.generate_count
        return count if type(count) is int and count >= 1 else 1

    def for_tasks(self, places: Sequence[int]) -> Self:
        count = {"generate_count": len(places)}
        extra = None if self.extra is None else {**self.extra, **count}
        return self.restored({**values_of(self), **count, "extra": extra})

    def fields(self) -> dict[str, JSON]:
        if self.extra is not None:
            return copy.deepcopy(dict(self.extra))
        fields = {name: value for name, value in values_of(self).items() if value is not None}
        if any(isinstance(value, (Path, tuple)) for value in fields.values()):
            self.check_sendable()
            fields |= {name: list(value) for name, value in fields.items() if isinstance(value, tuple)}
        if self.model != "V":  # "Only supported by Model V": what a false one would do elsewhere is not documented
            del fields["generate_audio"]
        return fields


def _unsendable(wire_fields: Mapping[str, JSON]) -> Iterator[Problem]:
    for name, value in wire_fields.items():
        if name == "callback_url":
            yield Problem(field=name, value=value, rule="belongs to the receiver", accepted="leave it out")
        if isinstance(value, Path):
            accepted = "the URL that `client.upload` gives it"
            yield Problem(field=name, value=str(value), rule="is a local file", accepted=accepted)
            continue
        try:
            json.dumps({name: value}, allow_nan=False, ensure_ascii=False).encode()
        except (TypeError, ValueError, RecursionError) as why:
            yield Problem(field=name, value=value, rule=f"has no JSON form ({why})", accepted="plain JSON values")


def _one_of(name: str, value: object, allowed: Sequence[object], where: str = "") -> Iterator[Problem]:
    """The problem, if the value is not one of these. Types are strict: True is not 1, and 6.0 is not 6."""
    if any(type(value) is type(item) and value == item for item in allowed):
        return
    wanted, accepted = type(allowed[0]), _listed(allowed)
    meant = [item for item in allowed if isinstance(value, str) and value.strip().casefold() == str(item).casefold()]
    if value is None:
        rule = "is required"
    elif type(value) is float and wanted is int:
        rule = f"must be a whole number, not {value}"
    elif type(value) is not wanted:
        given = "text" if isinstance(value, str) else type(value).__name__
        rule = f"must be {_TYPE_NAMES[wanted]}, not {given} ({shown(value)})"
    elif meant:
        rule, accepted = f"unknown {name} {shown(value)}; did you mean {meant[0]!r}?", ""
    else:
        rule = f"{shown(value)} is not offered by {where}" if where else f"unknown {name} {shown(value)}"
    yield Problem(field=name, value=value, rule=rule, accepted=accepted)


_TYPE_NAMES: Final[Mapping[type, str]] = {str: "text", bool: "a truth value", int: "a number"}


def _listed(values: Sequence[object]) -> str:
    """`4, 6 or 8`"""
    *others, last = map(str, values)
    return f"{', '.join(others)} or {last}" if others else last


def _image(name: str, value: object) -> Iterator[Problem]:
    if not (isinstance(value, Path) or is_http_url(value)):  # the content of a file is checked by `Client.submit`
        accepted = "an http(s) URL as text, or a pathlib.Path"
        yield Problem(field=name, value=value, rule="is not a URL", accepted=accepted)


def _prompt(prompt: object) -> Iterator[Problem]:
    if not isinstance(prompt, str) or not prompt.strip():
        yield Problem(field="prompt", value=prompt, rule="is required", accepted="text")
    elif len(prompt) > PROMPT_CHARACTERS:
        accepted = f"at most {PROMPT_CHARACTERS} characters"
        yield Problem(field="prompt", value=prompt, rule=f"has {len(prompt)} characters", accepted=accepted)
    elif any("\ud800" <= character <= "\udfff" for character in prompt):
        yield Problem(field="prompt", value=prompt, rule="holds half a surrogate pair", accepted="Unicode text")


def _problems(request: ImageToVideo) -> Iterator[Problem]:
    """Every broken rule, first of the fields alone, then of the row of the table that the request is meant for."""
    yield from _one_of("model", request.model, MODELS)
    yield from _prompt(request.prompt)
    yield from _one_of("aspect_ratio", request.aspect_ratio, ASPECT_RATIOS)
    yield from _one_of("generate_audio", request.generate_audio, (True, False))
    yield from _one_of("generate_count", request.generate_count, GENERATE_COUNT)
    for name in ("image_url", "end_image_url"):
        if getattr(request, name) is not None:
            yield from _image(name, getattr(request, name))
    references: object = request.reference_images
    if references is not None and not isinstance(references, tuple):
        yield Problem(
            field="reference_images", value=references, rule="is not a list", accepted="a list of URLs or paths"
        )
        references = None
    for number, value in enumerate(references or ()):
        yield from _image(f"reference_images[{number}]", value)
    mode = _mode(request, has_references=bool(references))
    if mode is None:
        yield from _one_of("aspect_resolution", request.aspect_resolution, RESOLUTIONS)
        yield from _one_of("duration", request.duration, DURATIONS_S)
    else:
        yield from _row(request, mode, len(references or ()))


def _mode(request: ImageToVideo, *, has_references: bool) -> Mode | None:
    modes = [mode for mode in MODES if mode.model == request.model]
    if len(modes) > 1:  # the input decides; with both inputs, or none, the start frame is taken as meant
        wanted = "multi-image" if has_references and request.image_url is None else "start-frame"
        modes = [mode for mode in modes if mode.name == wanted]
    return modes[0] if modes else None


def _row(request: ImageToVideo, mode: Mode, references: int) -> Iterator[Problem]:
    where = f"model {mode.model} ({mode.name} mode)"
    for name in ("image_url", "end_image_url"):
        value, rule = getattr(request, name), getattr(mode, name)
        if value is None and rule == NEEDED:
            accepted = "an http(s) URL or a Path" + (", or reference_images instead" if mode.model == "V" else "")
            yield Problem(field=name, value=value, rule=f"is required by {where}", accepted=accepted)
        elif value is not None and rule == NEVER:
            yield Problem(field=name, value=value, rule=f"is not used by {where}", accepted="leave it out")
    if references not in mode.reference_images:
        yield _references(mode, references, has_start_frame=request.image_url is not None)
    yield from _one_of("aspect_resolution", request.aspect_resolution, mode.aspect_resolution, where)
    yield from _one_of("duration", request.duration, mode.duration, where)
    if request.generate_audio is True and not mode.generate_audio:
        yield Problem(field="generate_audio", value=True, rule=f"is not supported by {where}", accepted="False")


def _references(mode: Mode, references: int, *, has_start_frame: bool) -> Problem:
    """What is wrong with this number of reference images."""
    field = "reference_images"
    if mode.reference_images != NONE:
        accepted = f"1 to {mode.reference_images[-1]} URLs"
        return Problem(
            field=field, value=references, rule=f"has {references} for model {mode.model}", accepted=accepted
        )
    if mode.model == "V" and has_start_frame:
        return Problem(field=field, value=None, rule="model V takes image_url or reference_images, not both")
    return Problem(
        field=field, value=references, rule=f"model {mode.model} takes none, not {references}; use image_url"
    )


ImageToVideo.kind = Kind(
    name="image_to_video",
    number=1,
    request=ImageToVideo,
    result=Video,
    media={"video": Media("video_url", ("mp4",)), "thumbnail": Media("thumbnail_url", ("webp",))},
    path="image_to_video",
    max_tasks=GENERATE_COUNT[-1],
    statuses={
        "PENDING": Progress.RUNNING,
        "PROCESSING": Progress.RUNNING,
        "SUCCEEDED": Progress.SUCCEEDED,
        "FAILED": Progress.FAILED,
    },
    refusals=dict.fromkeys((100001, 100003, 100004, 100005, 100006, 100007), Rejected) | {100002: Unauthorized},
    not_found=100003,
    unreachable=100006,
    poll_every_s=30,  # the vendor's skill: every 30 s, up to 20 minutes
    longest_s=3 * 20 * 60,  # three times the vendor's limit: a poll that gives up does not mean that the task failed
    result_ttl_s=7 * 24 * 3600,
)
