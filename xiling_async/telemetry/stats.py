"""Counts what happens, and tells those who listen; who does not listen costs nothing but the counting."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType, TracebackType
from typing import Final, Literal

from attrs import frozen

from xiling_async._internal.clock import Clock
from xiling_async.models.record import JobRecord, State
from xiling_async.telemetry.events import (
    CallbackRefused,
    CallbackTaken,
    Downloaded,
    Event,
    Hook,
    JobChanged,
    Polled,
    Submitted,
    Uploaded,
)

log = logging.getLogger("xiling_async.telemetry.events")

_ENDS: Final = frozenset(state.value for state in State if state.is_final)
_REASONS: Final = {
    400: "malformed",
    404: "not_found",  # no token of ours, or of somebody who may not call
    408: "too_slow",
    409: "strange",  # not a task of this job
    413: "too_large",
    415: "encoded",
    503: "unavailable",  # the client is not open, or the store could not write
}


@frozen(kw_only=True)
class Stats:
    """What one client has seen since it was opened; other processes with the same store count for themselves.

    `jobs`: how often a job came into each state. `unfinished`: jobs without an end, those found in the store at the
    start too. `in_flight`: "submits", "uploads" and "downloads" under way now. `submits`, `callbacks`, `polls`: by
    result. `callbacks_refused`: by reason. `retries`: of "submit", "upload", "download". `uploads`, `downloads`: by
    "done" and "failed". `mean_time_to_done`: seconds from the intent to `done`; None while no job is.
    `gate_closed_until`: after a 429, Unix seconds; None while it is open. `unsaved`: results that are known, and whose
    file is not in the folder of `save_to` yet.
    """

    jobs: Mapping[State, int]
    unfinished: int
    in_flight: Mapping[str, int]
    submits: Mapping[str, int]
    callbacks: Mapping[str, int]
    callbacks_refused: Mapping[str, int]
    polls: Mapping[str, int]
    retries: Mapping[str, int]
    uploads: Mapping[str, int]
    downloads: Mapping[str, int]
    mean_time_to_done: float | None
    gate_closed_until: float | None
    unsaved: int = 0

    @property
    def gets(self) -> int:
        """Status GETs of every result."""
        return sum(self.polls.values())

    @property
    def uncertain(self) -> int:
        """How often nobody knew whether a POST had bought something."""
        return self.jobs.get(State.UNCERTAIN, 0)


class Transfer:
    """An upload or a download while it goes on: `tries` so far, and the name of the `error` that ended it."""

    def __init__(self, end: Callable[[Transfer, float], None], clock: Clock) -> None:
        self._end = end
        self._clock = clock
        self.tries = 0
        self.error: str | None = None
        self.began_at = clock.time()

    def __enter__(self) -> Transfer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.error = kind.__name__
        self._end(self, self._clock.time())


class Monitor:
    """Counts, and tells the hooks; nothing is made for hooks that are not there. A hook's exceptions hurt nobody."""

    def __init__(self, hooks: Sequence[Hook] = ()) -> None:
        self._hooks = tuple(hooks)
        self._complained: set[int] = set()  # places of hooks whose exceptions were logged
        self._unfinished = 0
        self._done_s = 0.0
        self._jobs: Counter[str] = Counter()  # by value: the hash of a State takes longer than all the rest
        self._submits: Counter[str] = Counter()
        self._taken: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._polls: Counter[str] = Counter()
        self._retries: Counter[str] = Counter()
        self._uploads: Counter[str] = Counter()
        self._downloads: Counter[str] = Counter()

    def _tell(self, event: Event) -> None:
        log.debug("%s", event)
        for place, hook in enumerate(self._hooks):
            try:
                hook(event)
            except Exception:
                if place not in self._complained:
                    self._complained.add(place)
                    log.exception("an on_event hook failed; this is logged once, and the hook is called on")

    def found(self, unfinished: int) -> None:
        """So many jobs of the store had no end when the client was opened."""
        self._unfinished += unfinished

    def changed(self, record: JobRecord, was: State | None) -> None:
        """The record as it is now; what leaves it in its state is no news."""
        state = record.state
        if state is was:
            return
        self._jobs[state._value_] += 1
        self._unfinished += (was is None or was._value_ in _ENDS) - (state._value_ in _ENDS)
        if state is State.DONE:
            self._done_s += record.changed_at - record.created_at
        if self._hooks or log.isEnabledFor(logging.DEBUG):
            self._tell(JobChanged(
                job_id=record.id, key=record.key, kind=record.kind, state=state, was=was, task_ids=record.task_ids,
                created_at=record.created_at, at=record.changed_at,
            ))  # fmt: skip

    def submitted(
        self,
        record: JobRecord,
        result: Literal["accepted", "rejected", "not_sent", "uncertain"],
        error: str | None,
        *,
        began_at: float,
        at: float,
    ) -> None:
        self._submits[result] += 1
        if record.attempt > 1:
            self._retries["submit"] += 1
        if self._hooks or log.isEnabledFor(logging.DEBUG):
            self._tell(Submitted(
                job_id=record.id, key=record.key, kind=record.kind, attempt=record.attempt, result=result,
                error=error, task_ids=record.task_ids, began_at=began_at, at=at,
            ))  # fmt: skip

    def took(
        self,
        job_id: str,
        attempt: int,
        task_id: str,
        result: str,
        outcome: Literal["succeeded", "failed"] | None,
        *,
        began_at: float,
        at: float,
    ) -> None:
        self._taken[result] += 1
        if self._hooks or log.isEnabledFor(logging.DEBUG):
            self._tell(CallbackTaken(
                job_id=job_id, attempt=attempt, task_id=task_id, result=result, outcome=outcome, began_at=began_at,
                at=at,
            ))  # fmt: skip

    def refused(self, status: int, job_id: str | None, *, at: float) -> None:
        """`status`: HTTP's, of the answer."""
        reason = _REASONS.get(status, "other")
        self._refused[reason] += 1
        if self._hooks or log.isEnabledFor(logging.DEBUG):
            self._tell(CallbackRefused(reason=reason, status=status, job_id=job_id, at=at))

    def polled(
        self,
        job_id: str | None,
        task_id: str,
        result: Literal["succeeded", "failed", "running", "missing", "error"],
        error: str | None,
        *,
        began_at: float,
        at: float,
    ) -> None:
        self._polls[result] += 1
        if self._hooks or log.isEnabledFor(logging.DEBUG):
            self._tell(Polled(job_id=job_id, task_id=task_id, result=result, error=error, began_at=began_at, at=at))

    def uploading(self, size_bytes: int, clock: Clock) -> Transfer:
        """`with` it goes on; its end is told."""

        def end(transfer: Transfer, at: float) -> None:
            self._uploads["failed" if transfer.error else "done"] += 1
            self._retries["upload"] += max(0, transfer.tries - 1)
            if self._hooks or log.isEnabledFor(logging.DEBUG):
                self._tell(Uploaded(
                    size_bytes=size_bytes, tries=transfer.tries, error=transfer.error, began_at=transfer.began_at,
                    at=at,
                ))  # fmt: skip

        return Transfer(end, clock)

    def downloading(self, task_id: str, what: str, clock: Clock) -> Transfer:
        """`with` it goes on; its end is told."""

        def end(transfer: Transfer, at: float) -> None:
            self._downloads["failed" if transfer.error else "done"] += 1
            self._retries["download"] += max(0, transfer.tries - 1)
            if self._hooks or log.isEnabledFor(logging.DEBUG):
                self._tell(Downloaded(
                    task_id=task_id, what=what, tries=transfer.tries, error=transfer.error,
                    began_at=transfer.began_at, at=at,
                ))  # fmt: skip

        return Transfer(end, clock)

    def stats(self, in_flight: Mapping[str, int], gate_closed_until: float | None, unsaved: int = 0) -> Stats:
        done = self._jobs[State.DONE.value]
        return Stats(
            jobs=MappingProxyType({State(value): count for value, count in self._jobs.items()}),
            unfinished=max(0, self._unfinished),
            in_flight=MappingProxyType(dict(in_flight)),
            submits=_frozen(self._submits),
            callbacks=_frozen(self._taken),
            callbacks_refused=_frozen(self._refused),
            polls=_frozen(self._polls),
            retries=_frozen(self._retries),
            uploads=_frozen(self._uploads),
            downloads=_frozen(self._downloads),
            mean_time_to_done=self._done_s / done if done else None,
            gate_closed_until=gate_closed_until,
            unsaved=unsaved,
        )


def _frozen(counts: Mapping[str, int]) -> Mapping[str, int]:
    return MappingProxyType({name: count for name, count in counts.items() if count})


UNWATCHED: Final = Monitor()  # of parts that are used without a client
