"""Counts events, and passes them to the log and to the hooks of the user."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import MappingProxyType
from typing import Final, Literal

from attrs import define, frozen

from xiling_async._internal.clock import Clock
from xiling_async.models.record import JobRecord, Outcome, State
from xiling_async.telemetry.events import (
    CallbackRefused,
    CallbackTaken,
    Downloaded,
    Event,
    Hook,
    JobAcknowledged,
    JobChanged,
    JobHandedOver,
    Polled,
    Submitted,
    TaskEnded,
    Uploaded,
)

log = logging.getLogger("xiling_async.telemetry.events")

_REASONS: Final = {
    400: "malformed",
    404: "not_found",  # not a token of ours, or a caller that is not allowed
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
    start too. `in_flight`: "submits", "uploads" and "downloads" under way now. `tasks`: "succeeded" and "failed".
    `submits`, `callbacks`, `polls`: by result. `callbacks_refused`: by reason. `retries`: of "submit", "upload",
    "download". `uploads`, `downloads`: by "done" and "failed". `mean_time_to_done`: seconds from the intent to `done`;
    None while no job is. `gate_closed_until`: after a 429, Unix seconds; None while it is open. `unsaved`: results that
    are known, and whose file is not in the folder of `save_to` yet. `handover`: "handed_over" to consumers, "again"
    (those of them that a consumer had before), and "acknowledged".
    """

    jobs: Mapping[State, int]
    unfinished: int
    in_flight: Mapping[str, int]
    tasks: Mapping[str, int]
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
    handover: Mapping[str, int] = MappingProxyType({})

    @property
    def gets(self) -> int:
        """Status GETs of every result."""
        return sum(self.polls.values())

    @property
    def uncertain(self) -> int:
        """How often it was not known whether a POST had bought something."""
        return self.jobs.get(State.UNCERTAIN, 0)


@define(kw_only=True)
class Transfer:
    """An upload or a download under way: `tries` so far, and the name of the `error` that ended it."""

    began_at: float
    tries: int = 0
    error: str | None = None


class Monitor:
    """Where everything that happens is reported: each method counts it, and tells the log (DEBUG) and the hooks.

    An event is made only if someone listens. Whatever a hook raises is logged once and stops nothing; only
    `KeyboardInterrupt` and `SystemExit` go on.
    """

    def __init__(self, hooks: Sequence[Hook] = ()) -> None:
        self._hooks = tuple(hooks)
        self._failed_hooks: set[int] = set()  # places of hooks whose exceptions were logged
        self._unfinished = 0
        self._done_s = 0.0
        self._jobs: Counter[State] = Counter()
        self._tasks: Counter[str] = Counter()
        self._submits: Counter[str] = Counter()
        self._callbacks: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._polls: Counter[str] = Counter()
        self._uploads: Counter[str] = Counter()
        self._downloads: Counter[str] = Counter()
        self._retries: Counter[str] = Counter()
        self._handover: Counter[str] = Counter()

    @property
    def _is_heard(self) -> bool:
        return bool(self._hooks) or log.isEnabledFor(logging.DEBUG)

    def _tell(self, event: Event) -> None:
        log.debug("%s", event)
        for place, hook in enumerate(self._hooks):
            try:
                hook(event)
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException:  # a CancelledError too: it must not end a submit between its intent and its POST
                if place not in self._failed_hooks:
                    self._failed_hooks.add(place)
                    log.exception("an on_event hook failed; this is logged once, and the hook is still called")

    def found(self, unfinished: int) -> None:
        """The number of unfinished jobs in the store when the client was opened."""
        self._unfinished += unfinished

    def changed(self, record: JobRecord, was: State | None, outcome: Outcome | None = None) -> None:
        """The record as it is now, and the outcome of a task that came with the change. A change that leaves the job in
        its state is not an event of the job."""
        if outcome is not None:
            self._ended(record, outcome)
        if record.state is was:
            return
        self._jobs[record.state] += 1
        self._unfinished += (was is None or was.is_final) - record.state.is_final
        if record.state is State.DONE:
            self._done_s += record.changed_at - record.created_at
        if self._is_heard:
            self._tell(JobChanged(
                job_id=record.id, key=record.key, kind=record.kind, state=record.state, was=was,
                task_ids=record.task_ids, created_at=record.created_at, at=record.changed_at,
            ))  # fmt: skip

    def handed_over(self, record: JobRecord, *, is_again: bool, at: float) -> None:
        self._handover["handed_over"] += 1
        self._handover["again"] += is_again
        if self._is_heard:
            self._tell(JobHandedOver(
                job_id=record.id, key=record.key, kind=record.kind, state=record.state, is_again=is_again, at=at,
            ))  # fmt: skip

    def acknowledged(self, record: JobRecord, *, at: float) -> None:
        self._handover["acknowledged"] += 1
        if self._is_heard:
            self._tell(JobAcknowledged(
                job_id=record.id, key=record.key, kind=record.kind, state=record.state, at=at,
            ))  # fmt: skip

    def _ended(self, record: JobRecord, outcome: Outcome) -> None:
        name: Literal["succeeded", "failed"] = "succeeded" if outcome.ok else "failed"
        self._tasks[name] += 1
        if self._is_heard:
            self._tell(TaskEnded(
                job_id=record.id, key=record.key, kind=record.kind, task_id=outcome.task_id, outcome=name,
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
        if self._is_heard:
            self._tell(Submitted(
                job_id=record.id, key=record.key, kind=record.kind, attempt=record.attempt, result=result, error=error,
                task_ids=record.task_ids, began_at=began_at, at=at,
            ))  # fmt: skip

    def callback_accepted(
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
        self._callbacks[result] += 1
        if self._is_heard:
            self._tell(CallbackTaken(
                job_id=job_id, attempt=attempt, task_id=task_id, result=result, outcome=outcome, began_at=began_at,
                at=at,
            ))  # fmt: skip

    def refused(self, status: int, job_id: str | None, *, at: float) -> None:
        """`status`: HTTP's, of the answer."""
        reason = _REASONS.get(status, "other")
        self._refused[reason] += 1
        if self._is_heard:
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
        if self._is_heard:
            self._tell(Polled(job_id=job_id, task_id=task_id, result=result, error=error, began_at=began_at, at=at))

    def uploading(self, size_bytes: int, clock: Clock) -> AbstractContextManager[Transfer]:
        """Reports `Uploaded` at the end of the `with` block, however it ends."""
        return self._transfer(clock, "upload", self._uploads, lambda transfer: Uploaded(
            size_bytes=size_bytes, tries=transfer.tries, error=transfer.error, began_at=transfer.began_at,
            at=clock.time(),
        ))  # fmt: skip

    def downloading(self, task_id: str, what: str, clock: Clock) -> AbstractContextManager[Transfer]:
        """Reports `Downloaded` at the end of the `with` block, however it ends."""
        return self._transfer(clock, "download", self._downloads, lambda transfer: Downloaded(
            task_id=task_id, what=what, tries=transfer.tries, error=transfer.error, began_at=transfer.began_at,
            at=clock.time(),
        ))  # fmt: skip

    @contextmanager
    def _transfer(
        self, clock: Clock, name: str, counts: Counter[str], ended: Callable[[Transfer], Event]
    ) -> Iterator[Transfer]:
        transfer = Transfer(began_at=clock.time())
        try:
            yield transfer
        except BaseException as error:
            transfer.error = type(error).__name__
            raise
        finally:
            counts["failed" if transfer.error else "done"] += 1
            self._retries[name] += max(0, transfer.tries - 1)
            if self._is_heard:
                self._tell(ended(transfer))

    def stats(self, in_flight: Mapping[str, int], gate_closed_until: float | None, unsaved: int = 0) -> Stats:
        done = self._jobs[State.DONE]
        return Stats(
            jobs=MappingProxyType(dict(+self._jobs)),
            unfinished=max(0, self._unfinished),
            in_flight=MappingProxyType(dict(in_flight)),
            tasks=_frozen(self._tasks),
            submits=_frozen(self._submits),
            callbacks=_frozen(self._callbacks),
            callbacks_refused=_frozen(self._refused),
            polls=_frozen(self._polls),
            retries=_frozen(self._retries),
            uploads=_frozen(self._uploads),
            downloads=_frozen(self._downloads),
            mean_time_to_done=self._done_s / done if done else None,
            gate_closed_until=gate_closed_until,
            unsaved=unsaved,
            handover=_frozen(self._handover),
        )


def _frozen(counts: Mapping[str, int]) -> Mapping[str, int]:
    return MappingProxyType({name: count for name, count in counts.items() if count})


UNWATCHED: Final = Monitor()  # of parts that are used without a client
