"""Image to video: the published tables of the models, and the checks made from them."""

from typing import ClassVar

import attrs

from xiling_async.simulator.kinds.base import Body, Kind

COUNTS = range(1, 5)


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
        resolutions=("720p", "1080p"), durations=(5, 10), image_url=False, reference_images=True, reference_limit=7
    ),
    "S": Model(resolutions=("720p",), durations=(6, 8, 12), image_url=True, reference_images=False),
}
_SIDES = {"720p": (1280, 720), "1080p": (1920, 1080), "4k": (3840, 2160)}


class ImageToVideo(Kind):
    path = "image_to_video"
    task_type = "image_to_video"
    id_prefix = "i2v"
    running_status = "PROCESSING"
    result_files: ClassVar = {"video_url": "mp4", "thumbnail_url": "webp"}
    required = ("model", "prompt", "aspect_ratio", "aspect_resolution", "duration")
    fields: ClassVar = {
        "model": "string",
        "prompt": "string",
        "aspect_ratio": "string",
        "aspect_resolution": "string",
        "duration": "integer",
        "image_url": "uri",
        "end_image_url": "uri",
        "reference_images": "uri[]",
        "generate_audio": "boolean",
        "generate_count": "integer",
        "callback_url": "uri",
    }

    def status_fields(self, body: Body) -> dict[str, object]:
        """Duration and size as ordered; the file itself is a small sample."""
        long_side, short_side = _SIDES.get(str(body.get("aspect_resolution")), (320, 180))
        width, height = (short_side, long_side) if self.is_portrait(body) else (long_side, short_side)
        return {"duration": body.get("duration"), "width": width, "height": height}

    def problem(self, body: Body) -> str | None:
        """What the model does not support, in a body of the right types."""
        if body.get("generate_count", 1) not in COUNTS:
            return f"generate_count must be from {COUNTS[0]} to {COUNTS[-1]}"
        name = str(body["model"])
        model = MODELS.get(name)
        if model is None:
            return f"model must be one of {', '.join(MODELS)}"
        if body["aspect_ratio"] not in ("16:9", "9:16"):
            return "aspect_ratio must be one of 16:9, 9:16"
        if body["aspect_resolution"] not in model.resolutions:
            return f"aspect_resolution of model {name} must be one of {', '.join(model.resolutions)}"
        problem = _images(name, model, body)
        if problem is not None:
            return problem
        multi_image = bool(body.get("reference_images")) and "image_url" not in body
        durations = (model.multi_image_durations if multi_image else ()) or model.durations
        if body["duration"] not in durations:
            return f"duration of model {name} must be one of {', '.join(map(str, durations))}"
        if body.get("generate_audio") and not model.audio:
            return f"generate_audio is not supported by model {name}"
        return None


def _images(name: str, model: Model, body: Body) -> str | None:
    """What is wrong with the images. An empty list of references counts as none."""
    references = body.get("reference_images")
    present = {"image_url": "image_url" in body, "reference_images": bool(references)}
    rules = {"image_url": model.image_url, "reference_images": model.reference_images}
    for field, required in rules.items():
        if required is not None and required is not present[field]:
            return f"{field} is {'required' if required else 'not used'} by model {name}"
    if isinstance(references, list) and len(references) > model.reference_limit:
        return f"reference_images of model {name} are at most {model.reference_limit}"
    if "end_image_url" in body and not (model.end_image and present["image_url"]):
        return "end_image_url needs model V and image_url"
    return None
