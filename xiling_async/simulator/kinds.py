"""The endpoint families the service offers: what tells one kind of task from another."""

from collections.abc import Callable, Mapping

import attrs

from xiling_async.simulator.parameters import Problem, check_image_to_video


@attrs.frozen(kw_only=True)
class Kind:
    """One endpoint family: POST and GET under one path."""

    path: str
    task_type: str
    prefix: str  # of its task ids
    running: str  # the status of a task that is being worked on
    results: Mapping[str, str]  # field of the result to type of its file
    check: Callable[[Mapping[str, object]], Problem | None]
    facts: Callable[[Mapping[str, object]], dict[str, object]]  # told by GET alone, of a finished task


_SIDES = {"720p": (1280, 720), "1080p": (1920, 1080), "4k": (3840, 2160)}


def _video_facts(body: Mapping[str, object]) -> dict[str, object]:
    """Duration and size as they were ordered; the file itself is a small sample."""
    long_side, short_side = _SIDES.get(str(body.get("aspect_resolution")), (320, 180))
    portrait = is_portrait(body)
    return {
        "duration": body.get("duration"),
        "width": short_side if portrait else long_side,
        "height": long_side if portrait else short_side,
    }


def is_portrait(body: Mapping[str, object]) -> bool:
    return body.get("aspect_ratio") == "9:16"


IMAGE_TO_VIDEO = Kind(
    path="image_to_video",
    task_type="image_to_video",
    prefix="i2v",
    running="PROCESSING",
    results={"video_url": "mp4", "thumbnail_url": "webp"},
    check=check_image_to_video,
    facts=_video_facts,
)

KINDS = (IMAGE_TO_VIDEO,)
