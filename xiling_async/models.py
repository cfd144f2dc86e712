"""The nouns: what a request is, what becomes of it, what is remembered, and the settings; frozen, with units."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from enum import StrEnum
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any, ClassVar, Final, Generic, Self, TypeVar, cast
from urllib.parse import quote

from attrs import NOTHING, AttrsInstance, define, field, fields, fields_dict, frozen
from yarl import URL

from xiling_async.errors import ConfigurationError, InvalidRequest, Problem, ServiceError

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
JSON = Any  # what `json.loads` gives: checked where it is read (wire.py), never trusted


@cache
def _fields_of(kind: Hashable) -> tuple[tuple[str, ...], Callable[[object], tuple[Any, ...]]]:
    names = tuple(fields_dict(cast("type[AttrsInstance]", kind)))
    return names, attrgetter(*names, "__class__")  # of one name alone it would not give a tuple


def names_of(kind: type[object]) -> tuple[str, ...]:
    """The names of the fields of an attrs class, in order."""
    return _fields_of(cast("Hashable", kind))[0]  # mypy takes the `__hash__` of its instances for its own


def values_of(instance: object) -> dict[str, Any]:
    """The values of the fields of an attrs object by their names, in order."""
    names, read = _fields_of(cast("Hashable", type(instance)))
    return dict(zip(names, read(instance), strict=False))


def are_plain(values: Iterable[object]) -> bool:
    """Whether there is nothing among them but texts, numbers, truth values and None: no file, no list."""
    return _PLAIN.issuperset(map(type, values))


_PLAIN: Final = frozenset({str, int, float, bool, type(None)})


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
class Kind(Generic[R]):
    """An endpoint family of the service: where it lives, how it speaks, how patient one must be with it.

    `number` names the kind inside callback tokens (0-255) and never changes. Times are in seconds.
    """

    name: str
    number: int
    request: type[Request[R]]
    result: type[R]  # it has a `task_id`, and the fields that `media` names
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


@frozen(kw_only=True)
class Request(Generic[R_co]):
    """One paid create: subclasses are the kinds of tasks that the service offers. They know their own rules."""

    kind: ClassVar[Kind[Any]]

    @property
    def task_count(self) -> int:
        """How many tasks, each with one output, this request asks for."""
        return 1

    def fields(self) -> dict[str, JSON]:
        """The wire's own field names with the values to send; absent ones are left out.

        Raises `InvalidRequest` while the request holds local files: what is sent of them is their URL.
        """
        raise NotImplementedError

    def local_files(self) -> dict[str, Path]:
        """The files to upload before this can be sent, by field (`reference_images[1]`: the second of a list)."""
        found: dict[str, Path] = {}
        values = values_of(self)
        if are_plain(values.values()):
            return found
        for name, value in values.items():
            if isinstance(value, Path):
                found[name] = value
            elif isinstance(value, tuple):
                found |= {f"{name}[{place}]": item for place, item in enumerate(value) if isinstance(item, Path)}
        return found

    def with_urls(self, urls: Mapping[Path, str]) -> Self:
        """The same request with each of these files replaced by its URL; no rule is checked again."""

        def sent(value: JSON) -> JSON:
            if isinstance(value, tuple):
                return tuple(sent(item) for item in value)
            return urls.get(value, value) if isinstance(value, Path) else value

        return self.restored({name: sent(value) for name, value in values_of(self).items()})

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


@frozen
class Succeeded(Generic[R_co]):
    """A task that ended well. `file`: where `Client(save_to=...)` has kept its result."""

    task_id: str
    result: R_co
    file: str | None = None


@frozen
class Failed:
    """A task that the service could not do; `message` is the service's own."""

    task_id: str
    message: str


Outcome = Succeeded[Any] | Failed


class State(StrEnum):
    """Where a job stands. `lifecycle.py` has the legal ways from one to another."""

    SENDING = "sending"  # the intent is written; the POST may be on its way
    UNCERTAIN = "uncertain"  # sent, fate unknown: its callback adopts it; never sent again
    ACCEPTED = "accepted"  # bought: the service works on it
    DONE = "done"  # every task succeeded
    FAILED = "failed"  # every task ended, at least one of them failed
    EXPIRED = "expired"  # the service did not tell the outcome in time; a later callback still wins
    NOT_SENT = "not_sent"  # never reached the service: nothing was bought
    REJECTED = "rejected"  # the service said no: nothing was bought
    UNKNOWN = "unknown"  # uncertain for too long; a later callback still wins

    @property
    def is_final(self) -> bool:
        """No waiter has to wait any longer."""
        return self in _FINAL


_FINAL: Final = frozenset(State) - {State.SENDING, State.UNCERTAIN, State.ACCEPTED}


@frozen(kw_only=True)
class Refusal:
    """Why a create was refused, or what made its fate unknown: enough to raise the same error after a restart."""

    error: str  # the name of a class in errors.py
    message: str
    status: int | None = None
    code: int | None = None
    service_message: str = ""
    retry_after: float | None = None


@define(kw_only=True)
class JobRecord:
    """What is remembered of a job: the unit that stores keep. Times are Unix seconds.

    `attempt` counts the POSTs of this job that may have left (at most one of them can have been bought).
    `asked` is how many tasks it may have; `outcomes[i]` belongs to `task_ids[i]`, None while it is awaited.
    `due_at`: when the sweeper should look at it next, None for never. `version` grows with every change.

    Nobody changes one: `but` makes the next (test_floors.py holds everybody to it; to freeze it would take a tenth of
    a job's time).
    """

    id: str
    kind: str
    key: str | None
    request: Request[Any] | None = field(repr=False)
    asked: int
    created_at: float
    changed_at: float
    state: State = State.SENDING
    attempt: int = 1
    task_ids: tuple[str, ...] = ()
    outcomes: tuple[Outcome | None, ...] = ()
    refusal: Refusal | None = None
    due_at: float | None = None
    failed_asks: int = 0
    version: int = 0

    def but(self, **changes: Any) -> JobRecord:
        values = dict(zip(_RECORD, _RECORD_VALUES(self), strict=True))  # `evolve` takes three times as long
        values["version"] += 1
        values.update(changes)
        return JobRecord(**values)

    def progressed(
        self,
        *,
        state: State,
        task_ids: tuple[str, ...],
        outcomes: tuple[Outcome | None, ...],
        asked: int,
        changed_at: float,
        due_at: float | None,
    ) -> JobRecord:
        """`but`, for what every job goes through twice, in half the time."""
        return JobRecord(
            id=self.id, kind=self.kind, key=self.key, request=self.request, asked=asked, created_at=self.created_at,
            changed_at=changed_at, state=state, attempt=self.attempt, task_ids=task_ids, outcomes=outcomes,
            refusal=None, due_at=due_at, failed_asks=self.failed_asks, version=self.version + 1,
        )  # fmt: skip


_RECORD: Final = tuple(fields_dict(JobRecord))
_RECORD_VALUES: Final = attrgetter(*_RECORD)


def is_http_url(value: object) -> bool:
    """An absolute http(s) URL as text, with nothing in it that a line of text cannot hold."""
    try:
        fine = isinstance(value, str) and (url := URL(value)).scheme in ("http", "https") and bool(url.host)
    except ValueError:
        return False
    return fine and not any(character.isspace() for character in str(value)) and str(value).isprintable()


def _positive(what: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ConfigurationError(f"{what} must be a number above 0, not {value!r}.")


class _Checked:
    """Settings whose every number is above 0 (or None where that is allowed)."""

    __slots__ = ()

    def __attrs_post_init__(self) -> None:
        for setting in fields(cast("type[AttrsInstance]", type(self))):
            value = getattr(self, setting.name)
            if value is not None or setting.default is not None:
                _positive(f"{type(self).__name__}.{setting.name}", value)


@frozen
class Limits(_Checked):
    """How much at once: `submits` and `downloads` in flight, `submits_per_second`, `gets_per_second` (status GETs)."""

    submits: int = 64
    submits_per_second: float | None = None
    gets_per_second: float = 20
    downloads: int = 8


@frozen
class Timeouts(_Checked):
    """Seconds. `connect`: until a connection stands (DNS and TLS with it). `answer`: until an answer is read.

    `wait`: how long awaiting a job waits. `uncertain`: how long a submit of unknown fate may be adopted by
    its callback before awaiting it raises `SubmitUncertain`. `stall`: a download without a byte.
    """

    connect: float = 10
    answer: float = 60
    wait: float = 1800
    uncertain: float = 3600
    stall: float = 60


@frozen
class Polling:
    """Seconds. `every`: between two status GETs of a task (None: the kind's own pace, 30 s for video).

    `grace`: how long the callback is trusted before the first GET (None: ten times `every`). Without a receiver
    nothing is trusted: the first GET comes after `every`.
    """

    every: float | None = None
    grace: float | None = None

    def __attrs_post_init__(self) -> None:
        if self.every is not None:
            _positive("Polling.every", self.every)
        if self.grace is not None and self.grace != 0:
            _positive("Polling.grace", self.grace)
