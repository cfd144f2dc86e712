"""Which job a task belongs to when two claim it; pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from xiling_async.models.lifecycle import Accepted, Change, Event, Verdict
from xiling_async.models.record import JobRecord, Refusal, State

DOUBT_S: Final = 3600.0  # how long a job is uncertain when a callback named tasks for it that are another job's
_NOT_ITS_OWN: Final = Refusal(
    error="SubmitUncertain",
    message="A callback named tasks for this job that the service's answer gave to another job, so its own are not "
    "known. It is never sent again; its callback adopts it, or client.resolve() tells what it bought.",
)


def give_way(owners: Iterable[JobRecord], record: JobRecord, event: Event) -> tuple[Change, ...] | None:
    """What becomes of the other jobs that have tasks which `record` has after `event`. None: they keep them, and the
    event is `UNKNOWN_TASK`. The service's answer wins over a callback, which anyone who has seen its URL can send."""
    changes: list[Change] = []
    for owner in owners:
        if not isinstance(event, Accepted) or not set(record.owned_ids).isdisjoint(owner.confirmed_ids):
            return None
        changes.append(_without(owner, record.owned_ids, event.at))
    return tuple(changes)


def _without(record: JobRecord, task_ids: tuple[str, ...], at: float) -> Change:
    kept = [
        (task_id, outcome)
        for task_id, outcome in zip(record.task_ids, record.outcomes, strict=True)
        if task_id not in task_ids
    ]
    changes: dict[str, Any] = {
        "task_ids": tuple(task_id for task_id, _ in kept), "outcomes": tuple(outcome for _, outcome in kept),
        "unconfirmed": len(kept) - len(record.confirmed_ids), "changed_at": at,
    }  # fmt: skip
    if kept:
        changes |= {"state": State.ACCEPTED, "due_at": at}
    else:
        changes |= {"state": State.UNCERTAIN, "due_at": at + DOUBT_S, "refusal": _NOT_ITS_OWN}
    return Change(Verdict.APPLIED, record.next_version(**changes), record.state)
