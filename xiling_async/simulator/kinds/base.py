"""What an endpoint family is, and what the parameter checks of all families share."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import attrs
from yarl import URL

PARAMETER_ERROR = 100001
IMAGE_TOO_LARGE = 100004
PROMPT_TOO_LONG = 100005
IMAGE_UNREACHABLE = 100006
IMAGE_FORMAT = 100007

Body = Mapping[str, object]
# Tasks that one create can make when the parameter checks are off.
LENIENT_COUNT_LIMIT = 100


@attrs.frozen
class Problem:
    """Why the parameters are refused: the business code and its message."""

    code: int
    msg: str


def parameter_error(message: str) -> Problem:
    return Problem(PARAMETER_ERROR, f"Parameter error: {message}")


class Kind(ABC):
    """One endpoint family: POST and GET under one path."""

    path: ClassVar[str]
    task_type: ClassVar[str]  # in callbacks
    id_prefix: ClassVar[str]
    running_status: ClassVar[str]  # of a task in progress
    result_files: ClassVar[Mapping[str, str]]  # field of the result to type of its file

    @abstractmethod
    def check(self, body: Body) -> Problem | None:
        """The first problem of a create, or None. What the vendor's tables do not forbid is accepted."""

    @abstractmethod
    def input_urls(self, body: Body) -> tuple[str, ...]:
        """The URLs of all inputs that a valid create names."""

    def status_fields(self, body: Body) -> dict[str, object]:
        """The fields of a finished task that only GET returns; null before the end."""
        return {}

    def is_portrait(self, body: Body) -> bool:
        return body.get("aspect_ratio") == "9:16"

    def output_count(self, body: Body) -> int:
        """How many outputs are ordered; with the checks off the field may hold anything."""
        count = body.get("generate_count", 1)
        if isinstance(count, bool) or not isinstance(count, int):
            return 1
        return min(max(count, 1), LENIENT_COUNT_LIMIT)


def is_http_url(value: object) -> bool:
    """Whether this is an absolute http or https URL."""
    try:
        url = URL(value) if isinstance(value, str) else URL()
    except ValueError:
        return False
    return url.scheme in ("http", "https") and bool(url.host)


def is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
