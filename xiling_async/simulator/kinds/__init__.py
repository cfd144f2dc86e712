"""The endpoint families: one file each, listed here."""

from xiling_async.simulator.kinds.base import Kind
from xiling_async.simulator.kinds.image_to_video import ImageToVideo

KINDS: tuple[Kind, ...] = (ImageToVideo(),)
