"""Counts events, and passes them to the log and to the hooks of the user."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
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
    ExchangeEvent,
    HandoverEvent,
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


@frozen(kw_only=True)
class Stats:
    """What one client has seen since it was opened; other processes with the same store count for themselves.

    `jobs`: how often a job came into each state. `unfinished`: jobs without an end, those found in the store at the
    start too. `in_flight`: "submits", "uploads" and "downloads" under way now. `tasks`: "succeeded" and "failed".
    `submits`, `callbacks`, `polls`: by result. `callbacks_refused`: by reason. `retries`: of "submit", "upload",
    "download". `uploads`, `downloads`: by "done" and "failed". `mean_time_to_done`: seconds from the intent to `done`;
    None while no job is. `paused_until`: after a 429, Unix seconds; None while it is open. `unsaved`: results that
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
    paused_until: float | None
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

    tries: int = 0
    error: str | None = None


class Monitor:
    """Counts each event, then passes it to the log (DEBUG) and to the hooks.

    Whatever a hook raises is logged once and stops nothing; only `KeyboardInterrupt` and `SystemExit` go on.
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

    def emit(self, event: ExchangeEvent | HandoverEvent) -> None:
        match event:
            case Submitted():
                self._submits[event.result] += 1
                self._retries["submit"] += event.attempt > 1
            case CallbackTaken():
                self._callbacks[event.result] += 1
            case CallbackRefused():
                self._refused[event.reason] += 1
            case Polled():
                self._polls[event.result] += 1
            case Uploaded():
                self._uploads["failed" if event.error else "done"] += 1
                self._retries["upload"] += max(0, event.tries - 1)
            case Downloaded():
                self._downloads["failed" if event.error else "done"] += 1
                self._retries["download"] += max(0, event.tries - 1)
            case JobHandedOver():
                self._handover["handed_over"] += 1
                self._handover["again"] += event.is_again
            case JobAcknowledged():
                self._handover["acknowledged"] += 1
        self._publish(event)

    def found(self, unfinished: int) -> None:
        """The number of unfinished jobs in the store when the client was opened."""
        self._unfinished += unfinished

    def changed(self, record: JobRecord, was: State | None, outcome: Outcome | None = None) -> None:
        """A job changed: emit the outcome of a task that came with the change, and the new state, if it is new.

        `record`: as it is now. Counted from the record, since most of the events of a job are these: making them for
        no listener takes 3 % of the instructions of a create.
        """
        is_heard = bool(self._hooks) or log.isEnabledFor(logging.DEBUG)
        if outcome is not None:
            name: Literal["succeeded", "failed"] = "succeeded" if outcome.ok else "failed"
            self._tasks[name] += 1
            if is_heard:
                self._publish(TaskEnded(
                    job_id=record.id, key=record.key, kind=record.kind, task_id=outcome.task_id, outcome=name,
                    created_at=record.created_at, at=record.changed_at,
                ))  # fmt: skip
        if record.state is was:
            return
        self._jobs[record.state] += 1
        self._unfinished += (was is None or was.is_final) - record.state.is_final
        if record.state is State.DONE:
            self._done_s += record.changed_at - record.created_at
        if is_heard:
            self._publish(JobChanged(
                job_id=record.id, key=record.key, kind=record.kind, state=record.state, was=was,
                task_ids=record.task_ids, created_at=record.created_at, at=record.changed_at,
            ))  # fmt: skip

    def _publish(self, event: Event) -> None:
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

    def uploading(self, size_bytes: int, clock: Clock) -> AbstractContextManager[Transfer]:
        """Emits `Uploaded` at the end of the `with` block, however it ends."""
        return self._transfer(partial(Uploaded, size_bytes=size_bytes), clock)

    def downloading(self, task_id: str, what: str, clock: Clock) -> AbstractContextManager[Transfer]:
        """Emits `Downloaded` at the end of the `with` block, however it ends."""
        return self._transfer(partial(Downloaded, task_id=task_id, what=what), clock)

    @contextmanager
    def _transfer(self, event: Callable[..., Uploaded | Downloaded], clock: Clock) -> Iterator[Transfer]:
        transfer, began_at = Transfer(), clock.time()
        try:
            yield transfer
        except BaseException as error:
            transfer.error = type(error).__name__
            raise
        finally:
            self.emit(event(tries=transfer.tries, error=transfer.error, began_at=began_at, at=clock.time()))

    def stats(self, in_flight: Mapping[str, int], paused_until: float | None, unsaved: int = 0) -> Stats:
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
            paused_until=paused_until,
            unsaved=unsaved,
            handover=_frozen(self._handover),
        )


def _frozen(counts: Mapping[str, int]) -> Mapping[str, int]:
    return MappingProxyType({name: count for name, count in counts.items() if count})


UNWATCHED: Final = Monitor()  # of parts that are used without a client
