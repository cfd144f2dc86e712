"""What is remembered of a job: its state, its tasks' outcomes, why it was refused; times in Unix seconds."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Final

from attrs import define, field, frozen

from xiling_async._internal.outcomes import Failed, Outcome, Succeeded
from xiling_async.models.metadata import NO_METADATA
from xiling_async.models.request import Request, values_of

__all__ = ["LEFT_BEHIND", "Failed", "JobRecord", "Outcome", "Refusal", "State", "Succeeded"]


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

    __hash__ = str.__hash__  # that of the text it is equal to: `job.state in {"done", "failed"}`

    @property
    def is_final(self) -> bool:
        """No waiter has to wait any longer."""
        return self in _FINAL


_FINAL: Final = frozenset(State) - {State.SENDING, State.UNCERTAIN, State.ACCEPTED}
HANDED_OVER: Final = frozenset({State.DONE, State.FAILED, State.EXPIRED, State.UNKNOWN})  # by `Client.completed`
NOT_BOUGHT: Final = frozenset({State.NOT_SENT, State.REJECTED})


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
    `due_at`: when the poller should look at it next, None for never. `version` grows with every change.
    `is_adopted`: the store had lost the job and its callback's token brought it back; its outcomes are taken from
    status answers only. `unconfirmed`: so many of the last task ids were named by callbacks only, not by the answer of
    the service. `attempt` is 0 for a job that was made from a bare task id: it sent no POST, and owns no task.
    `metadata`: the caller's own words. `retry_of`: the id of the job whose failed tasks this one buys again.
    `handover_at`: from when the job, once it has ended, may be given to a consumer (`Client.completed`): 0 at once, a
    later time while a consumer has it, None when it was acknowledged.

    A record is never changed: `next_version` makes the next (test_floors.py checks it; to freeze it would take a tenth
    of a job's time).
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
    is_adopted: bool = False
    unconfirmed: int = 0
    metadata: Mapping[str, str] = NO_METADATA
    retry_of: str | None = None
    handover_at: float | None = 0.0

    @property
    def ended_at(self) -> float | None:
        """When the job came to the end that it is at; None while it is under way."""
        return self.changed_at if self.state.is_final else None

    @property
    def confirmed_ids(self) -> tuple[str, ...]:
        """The task ids that the service's own answer named."""
        return self.task_ids[: len(self.task_ids) - self.unconfirmed]

    @property
    def owned_ids(self) -> tuple[str, ...]:
        """The task ids that no other job may have."""
        return self.task_ids if self.attempt else ()

    def next_version(self, **changes: Any) -> JobRecord:
        """The record with these changes."""
        return JobRecord(**{**values_of(self), "version": self.version + 1, **changes})


def bare_job_id(task_id: str) -> str:
    """The id of the job that stands for a task of which nothing but its id is known."""
    return hashlib.sha256(f"task {task_id}".encode()).hexdigest()[:32]


def bare_job(task_id: str, kind: str, now: float) -> JobRecord:
    """The job that stands for a task of which nothing but its id is known."""
    return JobRecord(
        id=bare_job_id(task_id), attempt=0, kind=kind, key=None, request=None, asked=1, created_at=now, changed_at=now,
        state=State.ACCEPTED, task_ids=(task_id,), outcomes=(None,), due_at=now,
    )  # fmt: skip


LEFT_BEHIND: Final = Refusal(
    error="SubmitUncertain",
    message="The process ended while the request was on its way. If it had a callback URL, its callback adopts it.",
)
