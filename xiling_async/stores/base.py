"""What a store promises.

A store remembers jobs. It decides nothing: `lifecycle.decide` says what an event does to a record, and a store applies
that inside one transaction. What it owes:

1. When `add` or `change` returns, the new record is durable (in the store's own sense: a `MemoryStore` is not).
   When it raises `StoreError`, nothing was changed.
2. A key belongs to one job for ever, a task id to one job for ever (a `change` that would break that is
   `UNKNOWN_TASK`). But a task that only a callback gave to a job goes to the job whose answer names it
   (`ownership.give_way`), and both are changed in one transaction. A job that was made from a bare task id (`attempt`
   0) owns no task: it never keeps one from the job that bought it.
3. A verdict other than `APPLIED` changed nothing.
4. A job that a submit of this process has in hand is never forgotten (`Watcher.in_hand`).
5. Changes of one record are applied one after another; each returned record has the `version` of its change.

| what is written                    | when                          | if the process dies right after |
| ---------------------------------- | ----------------------------- | --- |
| the intent (`add`, `ResendStarted`)       | before its POST               | uncertain: costs waiting, not money |
| the answer                         | before `submit` returns       | the restart knows the ids |
| a callback or a status             | before its 200                | a repeat changes nothing |
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from datetime import timedelta
from typing import Final, Protocol, runtime_checkable

from attrs import frozen

from xiling_async.models.lifecycle import Change, Event
from xiling_async.models.query import ALL_JOBS, JobQuery
from xiling_async.models.record import JobRecord


class UnusableDatabase(Exception):
    """This file or database cannot hold a store; the message says why."""


@frozen
class HandedOver:
    """A job for a consumer. `is_again`: a consumer had it before, and did not acknowledge it."""

    record: JobRecord
    is_again: bool


class Watcher(Protocol):
    """Who waits for jobs that other processes may change."""

    def known(self, job_id: str) -> int | None:
        """The version that is known of this job; None if it has no waiter in this process."""
        ...

    def watched(self) -> list[str]:
        """The ids of all jobs that have a waiter in this process."""
        ...

    def told(self, record: JobRecord) -> None:
        """This is the newest that the store holds of a job."""
        ...

    def missing(self, job_ids: Iterable[str]) -> None:
        """The store holds none of these jobs, which have waiters in this process."""
        ...

    def handover_changed(self) -> None:
        """Another process may have ended, claimed or acknowledged a job: what is to be handed over is another now."""
        ...

    def in_hand(self) -> frozenset[str]:
        """The ids of the jobs that a submit of this process is buying now, also while it pauses between two POSTs."""
        ...


@runtime_checkable
class Store(Protocol):
    """Times are Unix seconds. Every method raises `StoreError` when the store cannot do its work."""

    @property
    def is_shared(self) -> bool:
        """Whether other processes use it too: then jobs fall due, and change, that are not known in this process."""
        ...

    async def open(self) -> None:
        """Make it ready; the client calls it when it is entered."""
        ...

    async def close(self) -> None:
        """Write what is left and let go of everything; a closed store can be opened again."""
        ...

    def listen(self, watcher: Watcher) -> None:
        """From now on tell this watcher, in the event loop, what other processes make of the jobs that it knows. A
        store that was cut off from the news tells the newest of all that is watched when it is back. A store that
        has no other user tells nothing, and asks only what is in hand."""
        ...

    async def secret(self, fresh: bytes) -> bytes:
        """The secret of callback URLs that this store keeps: `fresh` if it had none."""
        ...

    async def add(self, record: JobRecord) -> JobRecord:
        """Write a new job; or, if its id, its key or one of its tasks is known, change nothing. Returns `record` itself
        if it was written, else the job that the store holds."""
        ...

    async def change(self, job_id: str, event: Event) -> Change:
        """Apply an event to a job and make it durable."""
        ...

    async def get(self, job_id: str) -> JobRecord | None: ...

    async def by_key(self, key: str) -> JobRecord | None: ...

    async def by_task(self, task_id: str) -> JobRecord | None: ...

    def unfinished(self) -> AsyncIterator[JobRecord]:
        """The jobs that are not at an end, oldest first; the store may change while one reads."""
        ...

    def jobs(self, query: JobQuery = ALL_JOBS) -> AsyncIterator[JobRecord]:
        """The jobs of the query, read page by page; the store may change while one reads."""
        ...

    def unsaved(self, since: float) -> AsyncIterator[JobRecord]:
        """The jobs that changed at this time or later and have a result without a file; the store may change while one
        reads. It takes time by their number, not by that of all jobs."""
        ...

    async def claim(self, now: float, *, limit: int, lease_s: float) -> list[JobRecord]:
        """Up to `limit` jobs that are due, for one sweeper alone: they fall due again `lease_s` seconds from now."""
        ...

    async def next_due(self) -> float | None:
        """When the next job falls due."""
        ...

    async def hand_over(self, now: float, *, lease_s: float) -> HandedOver | None:
        """The job for a consumer: of those that have ended and were not acknowledged (`record.HANDED_OVER`), and that
        no other consumer has, the one that ended first. For `lease_s` seconds no other consumer gets it. From the first
        call on, `purge` keeps what was not acknowledged."""
        ...

    async def next_handover(self, now: float) -> float | None:
        """In how many seconds `hand_over` may have a job: 0 now; None: when one ends, not before."""
        ...

    async def recover_orphans(self, now: float, *, doubt_s: float, per_second: float) -> int:
        """Take over what a dead process left: its `sending` jobs become `uncertain` for at most `doubt_s` seconds, and
        open jobs fall due spread over the time that `per_second` asks a second take, at most a minute. Returns how
        many jobs are unfinished."""
        ...

    async def purge(self, older_than: timedelta | float, *, now: float | None = None) -> int:
        """Forget jobs that ended more than `older_than` (seconds) before `now` (Unix seconds; None: by the clock) and
        are not in hand, with their keys, and give their space back. If the store has consumers, of the jobs that are
        handed over only those that were acknowledged. Returns how many."""
        ...


SPREAD_S: Final = 60.0  # reliability.md, "Restart": due times are spread over the first minute


def seconds(span: timedelta | float) -> float:
    return span.total_seconds() if isinstance(span, timedelta) else float(span)
