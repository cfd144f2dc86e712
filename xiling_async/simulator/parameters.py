"""The endpoint families, and their parameters as the service checks them: the published tables of the models."""

from collections.abc import Callable, Mapping

import attrs
from yarl import URL

PARAMETER_ERROR = 100001
IMAGE_TOO_LARGE = 100004
PROMPT_TOO_LONG = 100005
IMAGE_UNREACHABLE = 100006
IMAGE_FORMAT = 100007

PROMPT_LIMIT = 1000
COUNT_LIMIT = 4


@attrs.frozen
class Problem:
    """Why the parameters are refused: the business code and its message."""

    code: int
    msg: str


@attrs.frozen(kw_only=True)
class Model:
    """One column of the vendor's table."""

    resolutions: tuple[str, ...]
    durations: tuple[int, ...]
    multi_image_durations: tuple[int, ...] = ()  # with reference images alone; empty: as `durations`
    image_url: bool | None  # required, refused, or None: either
    reference_images: bool | None
    reference_limit: int = 0
    audio: bool = False
    end_image: bool = False


MODELS = {
    "V": Model(
        resolutions=("720p", "1080p", "4k"),
        durations=(4, 6, 8),
        multi_image_durations=(8,),
        image_url=None,
        reference_images=None,
        reference_limit=3,
        audio=True,
        end_image=True,
    ),
    "KL": Model(
        resolutions=("720p", "1080p"),
        durations=(5, 10),
        image_url=False,
        reference_images=True,
        reference_limit=7,
    ),
    "S": Model(resolutions=("720p",), durations=(6, 8, 12), image_url=True, reference_images=False),
}
REQUIRED = ("model", "prompt", "aspect_ratio", "aspect_resolution", "duration")
STRINGS = (
    "model",
    "prompt",
    "aspect_ratio",
    "aspect_resolution",
    "image_url",
    "end_image_url",
    "callback_url",
)
ADDRESSES = ("image_url", "end_image_url", "callback_url")


def check_image_to_video(body: Mapping[str, object]) -> Problem | None:
    """The first thing wrong with a create, or None. What the tables do not forbid is let through."""
    complaint = _shape(body)
    if complaint is not None:
        return Problem(PARAMETER_ERROR, f"Parameter error: {complaint}")
    if len(str(body["prompt"])) > PROMPT_LIMIT:
        return Problem(PROMPT_TOO_LONG, f"Prompt too long: at most {PROMPT_LIMIT} characters")
    complaint = _rules(body)
    return None if complaint is None else Problem(PARAMETER_ERROR, f"Parameter error: {complaint}")


def _shape(body: Mapping[str, object]) -> str | None:
    """What is missing or of the wrong type: `true` and `8.0` are not integers, null is not a string."""
    for name in REQUIRED:
        if name not in body:
            return f"{name} is required"
    for name in STRINGS:
        if name in body and not isinstance(body[name], str):
            return f"{name} must be a string"
    for name in ADDRESSES:
        if name in body and not is_address(body[name]):
            return f"{name} must be an http or https uri"
    if not _is_integer(body["duration"]):
        return "duration must be an integer"
    count = body.get("generate_count", 1)
    if not (_is_integer(count) and isinstance(count, int) and 1 <= count <= COUNT_LIMIT):
        return f"generate_count must be an integer from 1 to {COUNT_LIMIT}"
    if not isinstance(body.get("generate_audio", False), bool):
        return "generate_audio must be a boolean"
    references = body.get("reference_images", [])
    if not (isinstance(references, list) and all(is_address(item) for item in references)):
        return "reference_images must be a list of http or https uris"
    return None


def _rules(body: Mapping[str, object]) -> str | None:
    """What the model does not do. The types are known to be right."""
    name = str(body["model"])
    model = MODELS.get(name)
    if model is None:
        return f"model must be one of {', '.join(MODELS)}"
    if body["aspect_ratio"] not in ("16:9", "9:16"):
        return "aspect_ratio must be one of 16:9, 9:16"
    if body["aspect_resolution"] not in model.resolutions:
        return f"aspect_resolution of model {name} must be one of {', '.join(model.resolutions)}"
    complaint = _images(name, model, body)
    if complaint is not None:
        return complaint
    multi_image = bool(body.get("reference_images")) and "image_url" not in body
    durations = (model.multi_image_durations if multi_image else ()) or model.durations
    if body["duration"] not in durations:
        return f"duration of model {name} must be one of {', '.join(map(str, durations))}"
    if body.get("generate_audio") and not model.audio:
        return f"generate_audio is not supported by model {name}"
    return None


def _images(name: str, model: Model, body: Mapping[str, object]) -> str | None:
    """What is wrong with the pictures. An empty list of references counts as none."""
    references = body.get("reference_images")
    present = {"image_url": "image_url" in body, "reference_images": bool(references)}
    wanted = {"image_url": model.image_url, "reference_images": model.reference_images}
    for field, want in wanted.items():
        if want is not None and want is not present[field]:
            return f"{field} is {'required' if want else 'not used'} by model {name}"
    if isinstance(references, list) and len(references) > model.reference_limit:
        return f"reference_images of model {name} are at most {model.reference_limit}"
    if "end_image_url" in body and not (model.end_image and present["image_url"]):
        return "end_image_url needs model V and image_url"
    return None


def images(body: Mapping[str, object]) -> tuple[str, ...]:
    """Every picture that a lawful create names."""
    references = body.get("reference_images", [])
    named = [body.get("image_url"), body.get("end_image_url"), *(references if isinstance(references, list) else [])]
    return tuple(image for image in named if isinstance(image, str))


def is_address(value: object) -> bool:
    """Whether this is an absolute http or https uri."""
    try:
        url = URL(value) if isinstance(value, str) else URL()
    except ValueError:
        return False
    return url.scheme in ("http", "https") and bool(url.host)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


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
