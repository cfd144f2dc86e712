"""Which jobs a listing has."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, Final

from attrs import frozen

from xiling_async._internal.redact import shown
from xiling_async.errors import InvalidRequest
from xiling_async.models.metadata import NO_METADATA, checked_metadata
from xiling_async.models.record import JobRecord, State
from xiling_async.models.request import Request
from xiling_async.models.settings import as_number


@frozen(kw_only=True)
class JobQuery:
    """Which jobs a listing has, and in which order: the oldest first, or `newest_first`.

    `states`: in one of these (None: in any). `kind`: its name. `metadata`: with all of these pairs. `since`: made at
    this time (Unix seconds) or later.
    """

    states: frozenset[State] | None = None
    kind: str | None = None
    metadata: Mapping[str, str] = NO_METADATA
    since: float | None = None
    newest_first: bool = False

    def matches(self, record: JobRecord) -> bool:
        return (
            (self.states is None or record.state in self.states)
            and self.kind in (None, record.kind)
            and (self.since is None or record.created_at >= self.since)
            and self.metadata.items() <= record.metadata.items()
        )


ALL_JOBS: Final = JobQuery()
OPEN_JOBS: Final = JobQuery(states=frozenset(state for state in State if not state.is_final))


def checked_query(
    state: State | str | Collection[State | str] | None,
    kind: type[Request[Any]] | str | None,
    metadata: Mapping[str, str] | None,
    since: float | None,
) -> JobQuery:
    """The query of `Client.jobs`. Raises `InvalidRequest` for what cannot be one."""
    if since is not None and (as_number(since) is None or not math.isfinite(since)):
        raise InvalidRequest(f"since must be a time in Unix seconds, not {shown(since)}.")
    return JobQuery(
        states=None if state is None else _states(state),
        kind=None if kind is None else _kind_name(kind),
        metadata=checked_metadata(metadata),
        since=since,
    )


def _states(state: State | str | Collection[State | str]) -> frozenset[State]:
    try:
        return frozenset(map(State, [state] if isinstance(state, str) else state))
    except (TypeError, ValueError):
        names = ", ".join(State)
        raise InvalidRequest(f"state must be one of {names}, or several of them, not {shown(state)}.") from None


def _kind_name(kind: type[Request[Any]] | str) -> str:
    if isinstance(kind, str):
        return kind
    if not isinstance(kind, type) or not issubclass(kind, Request) or kind is Request:
        raise InvalidRequest(f"kind must be a class of requests such as ImageToVideo, not {shown(kind)}.")
    return kind.kind.name


def checked_age(older_than: float) -> float:
    """The seconds of `Client.purge`. Raises `InvalidRequest` for what cannot be an age."""
    age_s = as_number(older_than)
    if age_s is None or not 0 <= age_s < math.inf:
        raise InvalidRequest(
            f"older_than must be a number of seconds, 0 or more, not {shown(older_than)}. Nothing was forgotten."
        )
    return age_s
