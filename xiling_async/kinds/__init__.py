"""The kinds of tasks, by name (stores) and by number (callback tokens)."""

from typing import Any, Final

from xiling_async.kinds.image_to_video import ImageToVideo, Video
from xiling_async.models.request import Kind

KINDS: Final[tuple[Kind[Any], ...]] = (ImageToVideo.kind,)
BY_NAME: Final = {kind.name: kind for kind in KINDS}
BY_NUMBER: Final = {kind.number: kind for kind in KINDS}

__all__ = ["BY_NAME", "BY_NUMBER", "KINDS", "ImageToVideo", "Video"]
