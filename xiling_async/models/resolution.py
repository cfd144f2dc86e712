"""What a person says of a job whose POST has an unknown fate, as an event; pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from xiling_async.errors import InvalidRequest
from xiling_async.models.lifecycle import Accepted, Change, Refused, Verdict
from xiling_async.models.record import JobRecord, Refusal, State

RESOLVED_NOT_BOUGHT: Final = Refusal(
    error="NotSent", message="It was declared not bought (client.resolve): submit it again to buy it."
)
_IN_DOUBT: Final = (State.UNCERTAIN, State.UNKNOWN)
_KNOWN_IDS: Final = (State.ACCEPTED, State.DONE, State.FAILED, State.EXPIRED)


def checked_ids(task_ids: Iterable[str]) -> tuple[str, ...]:
    """The ids as given. Raises `InvalidRequest`."""
    ids = () if isinstance(task_ids, str) else tuple(task_ids)
    if not ids or not all(isinstance(task_id, str) and task_id for task_id in ids) or len(set(ids)) < len(ids):
        raise InvalidRequest(f"task_ids must be a list of different ids, not {task_ids!r}. Nothing was changed.")
    return ids


def resolved(record: JobRecord, task_ids: tuple[str, ...] | None, now: float) -> Accepted | Refused | None:
    """The event that tells the job what it bought (None: nothing). None: it knows that already.

    Raises `InvalidRequest` for a job whose fate is known, and for more tasks than it asked for.
    """
    if task_ids is None and record.state is State.NOT_SENT:
        return None
    if task_ids is not None and record.state in _KNOWN_IDS and set(task_ids) == set(record.task_ids):
        return None
    if record.state not in _IN_DOUBT:
        known = f" with tasks {', '.join(record.task_ids)}" if record.task_ids else ""
        raise InvalidRequest(
            f"Job {record.id} is {record.state.value}{known}: only an uncertain or unknown job is resolved by hand. "
            "Nothing was changed."
        )
    if task_ids is None:
        return Refused(attempt=record.attempt, at=now, refusal=RESOLVED_NOT_BOUGHT, sent=False)
    if len(task_ids) > record.asked:
        raise InvalidRequest(
            f"Job {record.id} asked for {record.asked} tasks, so it cannot have bought {len(task_ids)}. "
            "Nothing was changed."
        )
    return Accepted(attempt=record.attempt, at=now, task_ids=task_ids, due_at=now)


def check_applied(change: Change, event: Accepted | Refused) -> None:
    """Raises `InvalidRequest` when the store did not take it: something was faster, or a task is another job's."""
    if change.verdict in (Verdict.APPLIED, Verdict.REPEAT):
        return
    if change.verdict is Verdict.UNKNOWN_TASK and isinstance(event, Accepted):
        raise InvalidRequest(
            f"One of the tasks {', '.join(event.task_ids)} belongs to another job of this store. Nothing was changed."
        )
    state = "gone" if change.record is None else change.record.state.value
    raise InvalidRequest(f"The job is {state} by now. Nothing was changed.")
