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
PROMPT_LIMIT = 1000
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
    required: ClassVar[tuple[str, ...]]
    fields: ClassVar[Mapping[str, str]]  # name to the vendor's word for its type

    def check(self, body: Body) -> Problem | None:
        """The first problem of a create, or None. What the vendor's tables do not forbid is accepted."""
        message = self._type_problem(body)
        if message is None and len(str(body.get("prompt"))) > PROMPT_LIMIT:
            return Problem(PROMPT_TOO_LONG, f"Prompt too long: at most {PROMPT_LIMIT} characters")
        message = message or self.problem(body)
        return None if message is None else parameter_error(message)

    def _type_problem(self, body: Body) -> str | None:
        for name in self.required:
            if name not in body:
                return f"{name} is required"
        for name, type_name in self.fields.items():
            if name in body and not _is_of_type(body[name], type_name):
                return f"{name} must be of type {type_name}"
        return None

    @abstractmethod
    def problem(self, body: Body) -> str | None:
        """The first rule that a body of the right types breaks, or None."""

    def input_urls(self, body: Body) -> list[str]:
        """The URLs of all inputs, in a body that passed the check."""
        urls: list[str] = []
        for name in self.fields.keys() & body.keys() - {"callback_url"}:
            match self.fields[name], body[name]:
                case "uri", str() as url:
                    urls.append(url)
                case "uri[]", list() as items:
                    urls += items
        return urls

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


def _is_of_type(value: object, type_name: str) -> bool:
    """`true` and `8.0` are not integers, null is not a string."""
    match type_name:
        case "string":
            return isinstance(value, str)
        case "boolean":
            return isinstance(value, bool)
        case "integer":
            return isinstance(value, int) and not isinstance(value, bool)
        case "uri":
            return _is_http_url(value)
        case "uri[]":
            return isinstance(value, list) and all(_is_http_url(item) for item in value)
    raise ValueError(type_name)


def _is_http_url(value: object) -> bool:
    try:
        url = URL(value) if isinstance(value, str) else URL()
    except ValueError:
        return False
    return url.scheme in ("http", "https") and bool(url.host)
