"""An endpoint family of the service (`Kind`), and one paid create of it (`Request`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Final, Generic, Protocol, Self, TypeVar, cast
from urllib.parse import quote

from attrs import NOTHING, AttrsInstance, fields, fields_dict, frozen
from yarl import URL

from xiling_async._internal.redact import shown
from xiling_async.errors import InvalidRequest, Problem, ServiceError

R_co = TypeVar("R_co", covariant=True)
JSON = Any  # what `json.loads` gives: checked where it is read (wire.py), never trusted


@cache
def _names_of(kind: type[AttrsInstance]) -> tuple[str, ...]:
    return tuple(attribute.name for attribute in fields(kind))


def values_of(instance: AttrsInstance) -> dict[str, Any]:
    """The values of the fields of an attrs object by their names, in order."""
    return {name: getattr(instance, name) for name in _names_of(type(instance))}


class Progress(StrEnum):
    """What a status of the service means for a task."""

    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


@frozen
class Media:
    """A file that a result has: which field of it is the URL, and the types that are documented for it."""

    field: str
    types: tuple[str, ...]


@frozen(kw_only=True)
class Kind(Generic[R_co]):
    """An endpoint family of the service: where it lives, how it speaks, how patient one must be with it.

    `number` names the kind inside callback tokens (0-255) and never changes. Times are in seconds.
    """

    name: str
    number: int
    request: type[Request[R_co]]
    result: type[R_co]  # it has a `task_id`, and the fields that `media` names
    media: Mapping[str, Media]  # by the word that `Client.download` has for it; the one that matters first
    path: str
    max_tasks: int
    statuses: Mapping[str, Progress]
    refusals: Mapping[int, type[ServiceError]]  # by business code
    not_found: int  # the business code of an unknown task
    unreachable: int | None = None  # the business code of an image URL that the service could not fetch
    poll_every_s: float
    longest_s: float
    result_ttl_s: float

    def status_path(self, task_id: str) -> str:
        return f"{self.path}/{quote(task_id, safe='')}"


class Result(Protocol):
    """What every kind of task gives: the task it comes from, and the service's own JSON."""

    @property
    def task_id(self) -> str: ...

    @property
    def raw(self) -> Mapping[str, JSON]: ...


@frozen(kw_only=True)
class Request(Generic[R_co]):
    """One paid create: subclasses are the kinds of tasks that the service offers. They know their own rules."""

    kind: ClassVar[Kind[Any]]

    @property
    def task_count(self) -> int:
        """How many tasks, each with one output, this request asks for."""
        return 1

    def for_tasks(self, places: Sequence[int]) -> Self:
        """The request that buys only the tasks at these places again: what `Client.retry` sends."""
        raise NotImplementedError

    def fields(self) -> dict[str, JSON]:
        """The wire's own field names with the values to send; absent ones are left out.

        Raises `InvalidRequest` while the request holds local files: what is sent of them is their URL.
        """
        raise NotImplementedError

    def local_files(self) -> dict[str, Path]:
        """The files to upload before this can be sent, by field (`reference_images[1]`: the second of a list)."""
        files: dict[str, Path] = {}
        for name, value in values_of(self).items():
            if isinstance(value, Path):
                files[name] = value
            elif isinstance(value, tuple):
                files |= {f"{name}[{place}]": item for place, item in enumerate(value) if isinstance(item, Path)}
        return files

    def with_urls(self, urls: Mapping[Path, str]) -> Self:
        """The same request with each of these files replaced by its URL; no rule is checked again."""

        def replaced(value: JSON) -> JSON:
            if isinstance(value, tuple):
                return tuple(replaced(item) for item in value)
            return urls.get(value, value) if isinstance(value, Path) else value

        return self.restored({name: replaced(value) for name, value in values_of(self).items()})

    def check_sendable(self) -> None:
        """Raises `InvalidRequest` if there are files that have no URL yet."""
        accepted = "the URL that `client.upload` gives it"
        problems = [
            Problem(field=name, value=str(path), rule="is a local file", accepted=accepted)
            for name, path in self.local_files().items()
        ]
        if problems:
            raise InvalidRequest.of(f"{type(self).__name__} holds files that only `client.submit` sends", problems)

    @classmethod
    def restored(cls, values: Mapping[str, JSON]) -> Self:
        """A request of these values with no rule checked: it was checked, or deliberately not, when it was made."""
        request = cls.__new__(cls)
        for name, attribute in fields_dict(cls).items():
            value = values.get(name, None if attribute.default is NOTHING else attribute.default)
            convert = cast("Callable[[JSON], JSON] | None", attribute.converter)
            object.__setattr__(request, name, value if convert is None else convert(value))
        return request


HOST_CHARACTERS: Final = 253  # of a name (RFC 1035, 2.3.4)
LABEL_CHARACTERS: Final = 63  # of what is between its dots
URL_CHARACTERS: Final = 8192  # the longest URL that is taken for one; signed links have about 1,000


def is_http_url(value: object) -> bool:
    """An absolute http(s) URL as text, of bounded length, with nothing in it that a line of text cannot hold."""
    if not isinstance(value, str) or len(value) > URL_CHARACTERS or not value.isprintable() or " " in value:
        return False
    try:
        url = URL(value)
        return url.scheme in ("http", "https") and bool(url.host)
    except ValueError:
        return False


def has_valid_host(url: URL) -> bool:
    """Whether there is a host that a resolver can be asked for; to others the idna codec raises `UnicodeError`."""
    name = url.raw_host or ""
    labels = name.removesuffix(".").split(".")
    return len(name) <= HOST_CHARACTERS and all(0 < len(label) <= LABEL_CHARACTERS for label in labels)


def is_name(name: str) -> bool:
    """Whether a store can hold it as a key or an id: text that is not empty, without NUL or half a surrogate pair."""
    return bool(name) and not any(character == "\0" or "\ud800" <= character <= "\udfff" for character in name)


def check_name(what: str, name: object, *, most: int | None = None) -> None:
    """Raises `InvalidRequest` for what cannot be a key or an id, of at most `most` characters."""
    if not isinstance(name, str) or not is_name(name) or (most is not None and len(name) > most):
        limit = "" if most is None else f" of at most {most} characters"
        raise InvalidRequest(
            f"{what} must be text{limit} that is not empty, not {shown(name)[:100]}. Nothing was sent."
        )
