"""What happened, as frozen values for `Client(on_event=...)`.

They carry ids, names, counts, times (Unix seconds) and the metadata that you gave, and no secret: no key, no URL, no
prompt, no message of the service. Each is emitted after what it reports was written down. A new event is a class here,
a member of `Event`, and a case of `Monitor.emit`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import iscoroutinefunction
from typing import Final, Literal, cast

from attrs import frozen

from xiling_async.errors import ConfigurationError
from xiling_async.models.metadata import NO_METADATA
from xiling_async.models.record import State


@frozen(kw_only=True)
class JobChanged:
    """A job changed its state. `was`: the state before; None for a new job, and where it is not known."""

    job_id: str
    key: str | None
    kind: str
    state: State
    was: State | None
    task_ids: tuple[str, ...]
    created_at: float
    at: float


@frozen(kw_only=True)
class TaskEnded:
    """The outcome of one task of a job was written down, by a callback or by a status GET."""

    job_id: str
    key: str | None
    kind: str
    task_id: str
    outcome: Literal["succeeded", "failed"]
    created_at: float  # of the job
    at: float


@frozen(kw_only=True)
class Submitted:
    """One paid POST ended. `attempt`: above 1 it was sent again; `error`: a name of errors.py."""

    job_id: str
    key: str | None
    kind: str
    attempt: int
    result: Literal["accepted", "rejected", "not_sent", "uncertain"]
    error: str | None
    task_ids: tuple[str, ...]
    began_at: float
    at: float
    metadata: Mapping[str, str] = NO_METADATA


@frozen(kw_only=True)
class CallbackTaken:
    """A callback was answered 200. `result`: "applied", "repeat", or "conflict" (a second, different end: ignored)."""

    job_id: str
    attempt: int
    task_id: str
    result: str
    outcome: Literal["succeeded", "failed"] | None  # None: a report of progress
    began_at: float
    at: float


@frozen(kw_only=True)
class CallbackRefused:
    """A callback was refused. `reason`: one of `REFUSAL_REASONS`, or "other". `job_id`: of its token, where that is
    valid."""

    reason: str
    status: int
    job_id: str | None
    at: float


REFUSAL_REASONS: Final = {  # by the status of the response
    400: "malformed",
    404: "not_found",  # not a token of ours, or a caller that is not allowed
    408: "too_slow",
    409: "unknown_task",  # not a task of this job
    413: "too_large",
    415: "encoded",
    503: "unavailable",  # the client is not open, or the store could not write
}


@frozen(kw_only=True)
class Polled:
    """One status GET ended. `job_id`: None when a download asked for a new link."""

    job_id: str | None
    task_id: str
    result: Literal["succeeded", "failed", "running", "missing", "error"]
    error: str | None
    began_at: float
    at: float


@frozen(kw_only=True)
class Uploaded:
    """An upload ended after `tries` tries. `error`: None if it succeeded."""

    size_bytes: int
    tries: int
    error: str | None
    began_at: float
    at: float


@frozen(kw_only=True)
class Downloaded:
    """A download of one task's files ended after `tries` tries. `error`: None if it succeeded."""

    task_id: str
    what: str
    tries: int
    error: str | None
    began_at: float
    at: float


@frozen(kw_only=True)
class JobHandedOver:
    """A consumer (`Client.completed`) was given an ended job. `is_again`: one had it before and did not acknowledge it
    in time."""

    job_id: str
    key: str | None
    kind: str
    state: State
    is_again: bool
    at: float
    metadata: Mapping[str, str] = NO_METADATA


@frozen(kw_only=True)
class JobAcknowledged:
    """The application has dealt with an ended job (`Job.ack`)."""

    job_id: str
    key: str | None
    kind: str
    state: State
    at: float


ExchangeEvent = Submitted | CallbackTaken | CallbackRefused | Polled | Uploaded | Downloaded
HandoverEvent = JobHandedOver | JobAcknowledged
Event = JobChanged | TaskEnded | HandoverEvent | ExchangeEvent
Hook = Callable[[Event], object]


def hooks_of(on_event: Hook | Sequence[Hook] | None) -> tuple[Hook, ...]:
    """Raises `ConfigurationError` for what cannot be called with an event."""
    hooks: tuple[object, ...] = () if on_event is None else (on_event,)
    if isinstance(on_event, (list, tuple)) and not callable(on_event):
        hooks = tuple(on_event)
    for hook in hooks:
        call = type(hook).__call__ if callable(hook) else None
        if call is None or iscoroutinefunction(hook) or iscoroutinefunction(call):
            raise ConfigurationError(
                f"on_event must be a plain callable, or several, not {hook!r}: it is called in the event loop and "
                "must return at once; what takes time it hands to a task or a queue of its own."
            )
    return cast("tuple[Hook, ...]", hooks)
