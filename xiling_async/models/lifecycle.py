"""What may happen to a job: the states, the events, and one pure function that applies one to the other.

Every store applies events with `decide`, inside a transaction of its own; a refused event changes nothing.

| event           | from                            | to |
| --------------- | ------------------------------- | --- |
| ResendStarted   | not_sent, rejected              | sending, the next attempt |
| Accepted        | any but not_sent, rejected      | accepted; done or failed when every task is known to have ended |
| Refused         | sending, uncertain, unknown     | not_sent, rejected |
| AnswerLost      | sending                         | uncertain |
| OutcomeReported | any but done, failed            | accepted; done or failed when it was the last outcome |
| Abandoned       | accepted; uncertain             | expired; unknown |
| PollScheduled   | accepted                        | accepted, due again later |
| FileSaved       | accepted, done, failed, expired | the same: a task's result has a file |
| Acknowledged    | done, failed, expired, unknown  | the same: the application has dealt with this end |

OutcomeReported is a callback or a status answer. A callback comes to a URL that only we can have signed, so it proves
that the service took the job: whatever state we believed in, the job is adopted. The first terminal outcome of a task
wins. The ids of the service's own answer replace ids that only a callback named, and are taken from another job that
has them from a callback only (`ownership.give_way`). A job that was adopted from its token alone (`is_adopted`) takes
outcomes from status answers only.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any, Final

from attrs import define, evolve, field

from xiling_async.models.record import HANDED_OVER, NOT_BOUGHT, Failed, JobRecord, Outcome, Refusal, State, Succeeded
from xiling_async.models.request import Request


# What lives for one exchange only is not frozen, here and elsewhere: attrs takes four times as long to make it.
@define(kw_only=True)
class ResendStarted:
    """One more POST is about to leave; the ones before never reached the service or were refused by it.

    `request`: what is sent now, if it was corrected; None: the same.
    """

    at: float
    request: Request[Any] | None = None


@define(kw_only=True)
class Accepted:
    """The service answered with task ids."""

    attempt: int
    at: float
    task_ids: tuple[str, ...]
    due_at: float | None


@define(kw_only=True)
class Refused:
    """The POST bought nothing: it never arrived (`not_sent`), or the service said no."""

    attempt: int
    at: float
    refusal: Refusal
    sent: bool


@define(kw_only=True)
class AnswerLost:
    """The POST left, and its answer did not come or could not be read."""

    attempt: int
    at: float
    refusal: Refusal
    due_at: float | None


@define(kw_only=True)
class OutcomeReported:
    """The service spoke of a task: its outcome, or (None) a sign of life. `due_at`: if it adopts the job.

    `is_status`: it is the answer to a status GET, not a callback.
    """

    attempt: int
    at: float
    task_id: str
    outcome: Outcome | None
    due_at: float | None
    is_status: bool = False


@define(kw_only=True)
class Abandoned:
    """No answer and no callback came in time. `was`: the state that was waited in; in another one it is refused."""

    at: float
    was: State | None = None


@define(kw_only=True)
class PollScheduled:
    """A status GET brought no outcome (`failed`: not even an answer), or should be made: ask at `due_at`."""

    at: float
    due_at: float
    failed: bool = False


@define(kw_only=True)
class FileSaved:
    """The result of a task is in this file now, whole."""

    at: float
    task_id: str
    file: str


SPARE_IDS: Final = 16  # of an answer with more ids than were asked for, so many are kept beyond twice the number


@define(kw_only=True)
class Acknowledged:
    """The application has dealt with the end of the job: it is not handed over again, unless it ends once more."""

    at: float


Event = (
    ResendStarted
    | Accepted
    | Refused
    | AnswerLost
    | OutcomeReported
    | Abandoned
    | PollScheduled
    | FileSaved
    | Acknowledged
)


class Verdict(Enum):
    """What became of an event. Only `APPLIED` changes the record."""

    APPLIED = "applied"
    REPEAT = "repeat"  # already so
    CONFLICT = "conflict"  # a second, different end of a task: the first one stays
    UNKNOWN_TASK = "unknown_task"  # an attempt or a task id that is not this job's
    REFUSED = "refused"  # not legal in this state
    NO_JOB = "no job"  # the store does not know the job


@define
class Change:
    """The verdict, and the record as it is now. `was`: the state before an `APPLIED` change, for those who count."""

    verdict: Verdict
    record: JobRecord | None
    was: State | None = field(default=None, eq=False)
    others: tuple[Change, ...] = field(default=(), eq=False)  # of the jobs that gave tasks up to this one


LEGAL: Final[dict[type[Event], frozenset[State]]] = {
    ResendStarted: NOT_BOUGHT,
    Accepted: frozenset(State) - NOT_BOUGHT,
    Refused: frozenset({State.SENDING, State.UNCERTAIN, State.UNKNOWN}),
    AnswerLost: frozenset({State.SENDING}),
    OutcomeReported: frozenset(State),
    Abandoned: frozenset({State.ACCEPTED, State.UNCERTAIN}),
    PollScheduled: frozenset({State.ACCEPTED}),
    FileSaved: frozenset({State.ACCEPTED, State.DONE, State.FAILED, State.EXPIRED}),
    Acknowledged: HANDED_OVER,
}


_OF_AN_ATTEMPT: Final = (OutcomeReported, Accepted, Refused, AnswerLost)


def decide(record: JobRecord, event: Event) -> Change:
    """Apply `event` to `record`; pure. The caller commits an `APPLIED` change before it wakes any waiter."""
    kind = type(event)
    if isinstance(event, _OF_AN_ATTEMPT) and event.attempt != record.attempt:
        return _of_another_attempt(record, event)
    if record.state not in LEGAL[kind]:
        return Change(Verdict.REFUSED, record)
    return _APPLY[kind](record, event)


def _of_another_attempt(record: JobRecord, event: OutcomeReported | Accepted | Refused | AnswerLost) -> Change:
    """A later attempt that bought something is believed: the store has lost its last changes (a restored backup).

    A job whose tasks are known was bought by the attempt that it is at, so it had no later one.
    """
    if event.attempt < record.attempt or record.task_ids or not isinstance(event, OutcomeReported | Accepted):
        return Change(Verdict.UNKNOWN_TASK, record)
    sending = evolve(record, attempt=event.attempt, state=State.SENDING)
    change = _APPLY[type(event)](sending, event)
    return Change(change.verdict, change.record, record.state)


def _resend_started(record: JobRecord, event: ResendStarted) -> Change:
    request, asked = record.request, record.asked
    if event.request is not None:
        request, asked = event.request, event.request.task_count
    return _applied(
        record, state=State.SENDING, attempt=record.attempt + 1, changed_at=event.at, refusal=None, due_at=None,
        request=request, asked=asked,
    )  # fmt: skip


def _refused(record: JobRecord, event: Refused) -> Change:
    state = State.REJECTED if event.sent else State.NOT_SENT
    return _applied(record, state=state, refusal=event.refusal, changed_at=event.at, due_at=None)


def _answer_lost(record: JobRecord, event: AnswerLost) -> Change:
    return _applied(record, state=State.UNCERTAIN, refusal=event.refusal, changed_at=event.at, due_at=event.due_at)


def _abandoned(record: JobRecord, event: Abandoned) -> Change:
    if event.was not in (None, record.state):
        return Change(Verdict.REFUSED, record)
    state = State.EXPIRED if record.state is State.ACCEPTED else State.UNKNOWN
    return _applied(record, state=state, changed_at=event.at, due_at=None)


def _poll_scheduled(record: JobRecord, event: PollScheduled) -> Change:
    return _applied(record, due_at=event.due_at, failed_asks=record.failed_asks + 1 if event.failed else 0)


def _acknowledged(record: JobRecord, event: Acknowledged) -> Change:
    if record.handover_at is None:
        return Change(Verdict.REPEAT, record)
    return _applied(record, handover_at=None)


def _applied(record: JobRecord, **changes: Any) -> Change:
    if changes.get("state", record.state) is not record.state:
        changes["handover_at"] = 0.0  # a new state leads to a new end
    return Change(Verdict.APPLIED, record.next_version(**changes), record.state)


def _accepted(record: JobRecord, event: Accepted) -> Change:
    """The answer's ids are the job's ids, in the answer's order; outcomes that came earlier keep their places.

    Ids that only a callback named give way to them. A task that a callback named and the answer left out stays as long
    as no more were made than were asked for. An answer with far more ids than that is cut.
    """
    answered = event.task_ids[: 2 * _allowed(record) + SPARE_IDS]
    if not record.task_ids and record.state not in (State.DONE, State.FAILED):  # as nearly always: no callback yet
        return _progressed(record, answered, (None,) * len(answered), len(answered), event.at, event.due_at, 0)
    known = dict(zip(record.task_ids, record.outcomes, strict=True))
    named = frozenset(answered)
    left_out = [task_id for task_id in known if task_id not in named]
    room = max(0, _allowed(record) - len(answered))
    task_ids = (*answered, *left_out[:room])
    is_known = task_ids == record.task_ids and len(task_ids) == record.asked
    unconfirmed = len(task_ids) - len(answered)
    if is_known and record.state in (State.ACCEPTED, State.DONE, State.FAILED):
        if unconfirmed == record.unconfirmed:
            return Change(Verdict.REPEAT, record)
        return _applied(record, unconfirmed=unconfirmed)
    outcomes = tuple(known.get(task_id) for task_id in task_ids)
    return _progressed(record, task_ids, outcomes, len(task_ids), event.at, event.due_at, unconfirmed)


def _allowed(record: JobRecord) -> int:
    """How many tasks a job may have: what its request asked for, or what the answer said if that was more."""
    return max(record.asked, record.request.task_count if record.request else 0)


def _outcome_reported(record: JobRecord, event: OutcomeReported) -> Change:
    if record.is_adopted and not event.is_status and event.outcome is not None:
        event = evolve(event, outcome=None)
    task_ids, outcomes, unconfirmed = record.task_ids, record.outcomes, record.unconfirmed
    is_over = record.state in (State.DONE, State.FAILED)
    if event.task_id not in task_ids:
        if len(task_ids) >= _allowed(record):
            return Change(Verdict.UNKNOWN_TASK, record)
        if is_over and event.outcome is None:
            return Change(Verdict.REPEAT, record)
        task_ids, outcomes = (*task_ids, event.task_id), (*outcomes, None)
        unconfirmed += 1
    place = task_ids.index(event.task_id)
    before = outcomes[place]
    if before is not None and event.outcome is not None:
        # A signature in a URL may differ from answer to answer: the same end a second time is a repeat.
        same = type(before) is type(event.outcome)
        return Change(Verdict.REPEAT if same else Verdict.CONFLICT, record)
    if event.outcome is not None:
        outcomes = (*outcomes[:place], event.outcome, *outcomes[place + 1 :])
    elif is_over or (task_ids == record.task_ids and record.state is State.ACCEPTED):
        return Change(Verdict.REPEAT, record)
    due_at = record.due_at if record.state is State.ACCEPTED else event.due_at
    return _progressed(record, task_ids, outcomes, max(record.asked, len(task_ids)), event.at, due_at, unconfirmed)


def _file_saved(record: JobRecord, event: FileSaved) -> Change:
    for place, outcome in enumerate(record.outcomes):
        if isinstance(outcome, Succeeded) and outcome.task_id == event.task_id:
            if outcome.file == event.file:
                return Change(Verdict.REPEAT, record)
            kept = evolve(outcome, file=event.file)
            outcomes = (*record.outcomes[:place], kept, *record.outcomes[place + 1 :])
            return _applied(record, outcomes=outcomes)
    return Change(Verdict.UNKNOWN_TASK, record)


def _progressed(
    record: JobRecord,
    task_ids: tuple[str, ...],
    outcomes: tuple[Outcome | None, ...],
    asked: int,
    at: float,
    due_at: float | None,
    unconfirmed: int,
) -> Change:
    """The record with these outcomes: still accepted, or at its end when every task asked for has one."""
    state = State.ACCEPTED
    if len(outcomes) >= asked and None not in outcomes:
        state = State.FAILED if Failed in map(type, outcomes) else State.DONE
        due_at = None
    return _applied(
        record, state=state, task_ids=task_ids, outcomes=outcomes, asked=asked, changed_at=at, due_at=due_at,
        unconfirmed=unconfirmed, refusal=None,
    )  # fmt: skip


_APPLY: Final[dict[type[Event], Callable[[JobRecord, Any], Change]]] = {
    ResendStarted: _resend_started,
    Accepted: _accepted,
    Refused: _refused,
    AnswerLost: _answer_lost,
    OutcomeReported: _outcome_reported,
    Abandoned: _abandoned,
    PollScheduled: _poll_scheduled,
    FileSaved: _file_saved,
    Acknowledged: _acknowledged,
}
