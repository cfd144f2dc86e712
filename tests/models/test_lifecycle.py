"""What may happen to a job: every state with every event, the orders that hurt, and what holds in any order."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import model_v

from xiling_async.models import lifecycle
from xiling_async.models.lifecycle import (
    LEGAL,
    Abandoned,
    Accepted,
    AnswerLost,
    Event,
    FileSaved,
    OutcomeReported,
    PollScheduled,
    Refused,
    ResendStarted,
    Verdict,
    decide,
)
from xiling_async.models.record import Failed, JobRecord, Outcome, Refusal, State, Succeeded

NO = Refusal(error="Rejected", message="no", status=400, code=100001)
UNSENT = Refusal(error="NotSent", message="nobody there")
DOUBT = Refusal(error="SubmitUncertain", message="cut")
APPLIED, REPEAT, CONFLICT, UNKNOWN_TASK, REFUSED = (
    Verdict.APPLIED, Verdict.REPEAT, Verdict.CONFLICT, Verdict.UNKNOWN_TASK, Verdict.REFUSED,
)  # fmt: skip


def good(task_id: str, word: str = "good") -> Succeeded[str]:
    return Succeeded(task_id, word)


def bad(task_id: str) -> Failed:
    return Failed(task_id, "bad")


def job(asked: int = 2, **known: object) -> JobRecord:
    return attrs.evolve(
        JobRecord(id="j", kind="image_to_video", key=None, request=None, asked=asked, created_at=0, changed_at=0),
        **known,  # type: ignore[arg-type]
    )


def answer(*task_ids: str, attempt: int = 1, at: float = 5) -> Accepted:
    return Accepted(attempt=attempt, at=at, task_ids=task_ids, due_at=at + 10)


def heard(task_id: str, outcome: Outcome | None = None, attempt: int = 1, at: float = 7) -> OutcomeReported:
    return OutcomeReported(attempt=attempt, at=at, task_id=task_id, outcome=outcome, due_at=at + 20)


def refused(*, sent: bool, attempt: int = 1) -> Refused:
    return Refused(attempt=attempt, at=5, refusal=NO if sent else UNSENT, sent=sent)


def lost(attempt: int = 1) -> AnswerLost:
    return AnswerLost(attempt=attempt, at=5, refusal=DOUBT, due_at=3605)


def after(record: JobRecord, *events: Event) -> JobRecord:
    """The record after these events, each of which must apply."""
    for event in events:
        change = decide(record, event)
        assert change.verdict is APPLIED, event
        assert change.record is not None
        record = change.record
    return record


IN_STATE: dict[State, JobRecord] = {
    State.SENDING: job(),
    State.UNCERTAIN: after(job(), lost()),
    State.ACCEPTED: after(job(), answer("a", "b")),
    State.DONE: after(job(), answer("a", "b"), heard("a", good("a")), heard("b", good("b"))),
    State.FAILED: after(job(), answer("a", "b"), heard("a", good("a")), heard("b", bad("b"))),
    State.EXPIRED: after(job(), answer("a", "b"), heard("a", good("a")), Abandoned(at=9)),
    State.NOT_SENT: after(job(), refused(sent=False)),
    State.REJECTED: after(job(), refused(sent=True)),
    State.UNKNOWN: after(job(), lost(), Abandoned(at=9)),
}


def test_every_state_can_be_reached() -> None:
    """The examples are what they say, and there is one of each state."""
    assert set(IN_STATE) == set(State)
    assert all(record.state is state for state, record in IN_STATE.items())


# --- the table -----------------------------------------------------------------------------------------------------

# Event, and what it makes of each state; a verdict alone: nothing changes. The columns are the states.
COLUMNS = (
    State.SENDING, State.UNCERTAIN, State.ACCEPTED, State.DONE, State.FAILED, State.EXPIRED, State.NOT_SENT,
    State.REJECTED, State.UNKNOWN,
)  # fmt: skip
TABLE: dict[str, tuple[Event, tuple[State | Verdict, ...]]] = {
    "resent": (ResendStarted(at=9), (
        REFUSED, REFUSED, REFUSED, REFUSED, REFUSED, REFUSED, State.SENDING, State.SENDING, REFUSED)),
    "accepted": (answer("a", "b"), (
        State.ACCEPTED, State.ACCEPTED, REPEAT, REPEAT, REPEAT, State.ACCEPTED, REFUSED, REFUSED, State.ACCEPTED)),
    "accepted in another order": (answer("b", "a"), (
        State.ACCEPTED, State.ACCEPTED, State.ACCEPTED, State.DONE, State.FAILED, State.ACCEPTED, REFUSED, REFUSED,
        State.ACCEPTED)),
    "accepted with other ids": (answer("x", "y"), (
        State.ACCEPTED, State.ACCEPTED, State.ACCEPTED, State.ACCEPTED, State.ACCEPTED, State.ACCEPTED, REFUSED,
        REFUSED, State.ACCEPTED)),
    "refused by the service": (refused(sent=True), (
        State.REJECTED, State.REJECTED, REFUSED, REFUSED, REFUSED, REFUSED, REFUSED, REFUSED, State.REJECTED)),
    "never sent": (refused(sent=False), (
        State.NOT_SENT, State.NOT_SENT, REFUSED, REFUSED, REFUSED, REFUSED, REFUSED, REFUSED, State.NOT_SENT)),
    "lost": (lost(), (
        State.UNCERTAIN, REFUSED, REFUSED, REFUSED, REFUSED, REFUSED, REFUSED, REFUSED, REFUSED)),
    "heard a sign of life of a": (heard("a"), (
        State.ACCEPTED, State.ACCEPTED, REPEAT, REPEAT, REPEAT, State.ACCEPTED, State.ACCEPTED, State.ACCEPTED,
        State.ACCEPTED)),
    "heard the end of b": (heard("b", good("b")), (
        State.ACCEPTED, State.ACCEPTED, State.ACCEPTED, REPEAT, CONFLICT, State.DONE, State.ACCEPTED, State.ACCEPTED,
        State.ACCEPTED)),
    "heard the failure of b": (heard("b", bad("b")), (
        State.ACCEPTED, State.ACCEPTED, State.ACCEPTED, CONFLICT, REPEAT, State.FAILED, State.ACCEPTED, State.ACCEPTED,
        State.ACCEPTED)),
    "heard of a stranger": (heard("x", good("x")), (
        State.ACCEPTED, State.ACCEPTED, UNKNOWN_TASK, UNKNOWN_TASK, UNKNOWN_TASK, UNKNOWN_TASK, State.ACCEPTED,
        State.ACCEPTED, State.ACCEPTED)),
    "gave up": (Abandoned(at=9), (
        REFUSED, State.UNKNOWN, State.EXPIRED, REFUSED, REFUSED, REFUSED, REFUSED, REFUSED, REFUSED)),
    "asked": (PollScheduled(at=9, due_at=39), (
        REFUSED, REFUSED, State.ACCEPTED, REFUSED, REFUSED, REFUSED, REFUSED, REFUSED, REFUSED)),
    "kept the result of b": (FileSaved(at=9, task_id="b", file="/out/b.mp4"), (
        REFUSED, REFUSED, UNKNOWN_TASK, State.DONE, UNKNOWN_TASK, UNKNOWN_TASK, REFUSED, REFUSED, REFUSED)),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "state"), [(name, state) for name, state in itertools.product(TABLE, COLUMNS)], ids=str
)
def test_every_state_with_every_event(name: str, state: State) -> None:
    """A legal event leads where the table says and counts one version; any other changes nothing at all."""
    event, expected = TABLE[name]
    wanted = expected[COLUMNS.index(state)]
    record = IN_STATE[state]
    change = decide(record, event)
    if isinstance(wanted, Verdict):
        assert change.verdict is wanted
        assert change.record is record
    else:
        assert change.verdict is APPLIED
        assert change.record is not None
        assert change.record.state is wanted
        assert change.record.version == record.version + 1


def test_the_docstring_tells_the_same_table() -> None:
    """The "from" column of the module's docstring is what `LEGAL` and the cases above say."""
    rows = {}
    for line in (lifecycle.__doc__ or "").splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == 5 and cells[1] in {event.__name__ for event in LEGAL}:
            rows[cells[1]] = cells[2].replace(";", ",")
    assert len(rows) == len(LEGAL)
    for event, states in LEGAL.items():
        told = rows[event.__name__]
        named = {State(word.strip()) for word in told.removeprefix("any but").split(",")}
        if event is OutcomeReported:  # of a finished job it is legal to hear; nothing comes of it
            assert set(State) - named == states - {State.DONE, State.FAILED}
        else:
            assert (set(State) - named if told.startswith("any but") else named) == states


@pytest.mark.parametrize("make", [lambda n: answer("a", "b", attempt=n), lambda n: refused(sent=True, attempt=n),
                                  lost, lambda n: heard("a", good("a"), attempt=n)])  # fmt: skip
@pytest.mark.parametrize("state", State)
def test_another_attempt_is_strange_in_every_state(make: Callable[[int], Event], state: State) -> None:
    """An event of an earlier POST than the job's own changes nothing; nor does one of a later POST that bought nothing,
    or once the job's tasks are known."""
    record = IN_STATE[state]
    later = [] if isinstance(make(2), OutcomeReported | Accepted) and not record.task_ids else [2]
    for attempt in (0, -1, *later):
        change = decide(record, make(attempt))
        assert (change.verdict, change.record) == (UNKNOWN_TASK, record)


@pytest.mark.parametrize("state", [state for state, record in IN_STATE.items() if not record.task_ids])
def test_a_later_attempt_that_bought_something_is_believed(state: State) -> None:
    """The store has lost its last changes: the attempt that its row does not know brings the job's tasks."""
    for event in (heard("a", attempt=3), heard("a", good("a"), attempt=3), answer("a", "b", attempt=3)):
        change = decide(IN_STATE[state], event)
        assert change.record is not None
        assert (change.verdict, change.was) == (APPLIED, state)
        assert (change.record.attempt, change.record.state, change.record.refusal) == (3, State.ACCEPTED, None)


def test_the_answers_ids_win_over_those_of_a_callback() -> None:
    """Ids that only a callback named give way, with their outcomes, also when they had brought the job to its end."""
    early = after(job(1), heard("invented", good("invented")))
    assert early.state is State.DONE
    answered = after(early, answer("real"))
    assert (answered.state, answered.task_ids, answered.outcomes) == (State.ACCEPTED, ("real",), (None,))
    assert answered.due_at is not None
    assert after(answered, heard("real", good("real"))).state is State.DONE


def test_an_adopted_job_takes_outcomes_from_status_answers_only() -> None:
    """What its token alone brought back believes no callback: it only learns that the task exists."""
    adopted = job(1, is_adopted=True)
    known = after(adopted, heard("a", good("a")))
    assert (known.state, known.outcomes) == (State.ACCEPTED, (None,))
    assert decide(known, heard("a", bad("a"))).verdict is REPEAT
    told = after(known, attrs.evolve(heard("a", good("a")), is_status=True))
    assert (told.state, told.outcomes, told.is_adopted) == (State.DONE, (good("a"),), True)


def test_an_answer_with_very_many_ids_is_cut() -> None:
    """What was asked for, twice over, and a few more: nothing that a store would work on for ever."""
    record = after(job(2), answer(*(f"t{number}" for number in range(110_000))))
    assert len(record.task_ids) == record.asked == 2 * 2 + lifecycle.SPARE_IDS
    early = after(job(2), heard("t7", good("t7")), answer(*(f"t{number}" for number in range(110_000))))
    assert (len(early.task_ids), early.outcomes[7]) == (20, good("t7"))


# --- what the events write -----------------------------------------------------------------------------------------


def test_a_new_attempt_starts_afresh() -> None:
    """ResendStarted counts the POST, forgets why the last one bought nothing, and binds later events to itself."""
    for state in (State.NOT_SENT, State.REJECTED):
        again = after(IN_STATE[state], ResendStarted(at=9))
        assert (again.attempt, again.refusal, again.due_at, again.changed_at) == (2, None, None, 9)
        assert decide(again, heard("a", good("a"), attempt=1)).verdict is UNKNOWN_TASK
        assert after(again, answer("a", "b", attempt=2)).task_ids == ("a", "b")


def test_what_a_refusal_leaves() -> None:
    """The reason is kept, so that the same error can be raised after a restart."""
    assert IN_STATE[State.REJECTED].refusal == NO
    assert IN_STATE[State.NOT_SENT].refusal == UNSENT
    uncertain = IN_STATE[State.UNCERTAIN]
    assert (uncertain.refusal, uncertain.due_at, uncertain.changed_at) == (DOUBT, 3605, 5)


def test_what_an_answer_leaves() -> None:
    """The ids in order, nothing known of them yet, and when to ask."""
    record = IN_STATE[State.ACCEPTED]
    assert (record.task_ids, record.outcomes, record.due_at, record.refusal) == (("a", "b"), (None, None), 15, None)


def test_giving_up_keeps_what_is_known() -> None:
    """Expired and unknown jobs are never due; outcomes stay."""
    expired, unknown = IN_STATE[State.EXPIRED], IN_STATE[State.UNKNOWN]
    assert (expired.outcomes, expired.due_at) == ((good("a"), None), None)
    assert (unknown.refusal, unknown.due_at) == (DOUBT, None)


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("was", State)
def test_giving_up_in_another_state_is_refused(state: State, was: State) -> None:
    """Whoever waited for an adoption does not give up the job that was adopted meanwhile."""
    change = decide(IN_STATE[state], Abandoned(at=9, was=was))
    assert (change.verdict is APPLIED) == (state is was and state in LEGAL[Abandoned])
    assert (change.record is IN_STATE[state]) == (change.verdict is not APPLIED)


def test_asking_in_vain_is_counted() -> None:
    """Failed asks add up; one that was answered clears the count."""
    record = after(IN_STATE[State.ACCEPTED], *[PollScheduled(at=9, due_at=39, failed=True)] * 3)
    assert (record.failed_asks, record.due_at, record.state) == (3, 39, State.ACCEPTED)
    assert after(record, PollScheduled(at=9, due_at=69)).failed_asks == 0


# --- callbacks that come early, late, twice ------------------------------------------------------------------------


def test_a_callback_may_overtake_the_answer() -> None:
    """Kept while the POST is on its way; the answer puts the ids in its own order, outcomes keep their ids."""
    early = after(job(), heard("b", good("b")))
    assert (early.state, early.task_ids, early.due_at) == (State.ACCEPTED, ("b",), 27)
    answered = after(early, answer("a", "b"))
    assert (answered.task_ids, answered.outcomes) == (("a", "b"), (None, good("b")))
    done = after(answered, heard("a", good("a")))
    assert (done.state, done.outcomes, done.due_at) == (State.DONE, (good("a"), good("b")), None)


def test_all_callbacks_may_overtake_the_answer() -> None:
    """The job is done before the answer; the answer then only puts the ids in order, or says that they are right."""
    done = after(job(), heard("b", good("b")), heard("a", good("a")))
    assert (done.state, done.task_ids) == (State.DONE, ("b", "a"))
    ordered = after(done, answer("a", "b"))
    assert (ordered.state, ordered.outcomes) == (State.DONE, (good("a"), good("b")))
    assert decide(ordered, answer("a", "b")).verdict is REPEAT
    confirmed = after(done, answer("b", "a"))
    assert confirmed == attrs.evolve(done, unconfirmed=0, version=done.version + 1)
    assert decide(confirmed, answer("b", "a")).verdict is REPEAT


def test_the_post_may_fail_after_its_callback() -> None:
    """A callback has adopted the job; that its answer was cut, or that it never left, is no longer believed."""
    early = after(job(), heard("b", good("b")))
    for event in (lost(), refused(sent=True), refused(sent=False)):
        assert decide(early, event).verdict is REFUSED


@pytest.mark.parametrize(
    "state", [State.UNCERTAIN, State.UNKNOWN, State.NOT_SENT, State.REJECTED, State.SENDING, State.EXPIRED]
)
def test_a_callback_adopts_the_job(state: State) -> None:
    """Whatever was believed before: it was bought; the doubt is gone, and somebody will ask."""
    for event in (heard("b"), heard("b", good("b"))):
        adopted = after(IN_STATE[state], event)
        assert adopted.refusal is None
        assert adopted.task_ids in (("b",), ("a", "b"))
        if adopted.state is State.ACCEPTED:
            assert adopted.due_at == 27


def test_a_late_callback_wins_over_giving_up() -> None:
    """An expired job is done when its last outcome comes after all."""
    done = after(IN_STATE[State.EXPIRED], heard("b", good("b")))
    assert (done.state, done.outcomes) == (State.DONE, (good("a"), good("b")))


def test_a_callback_does_not_move_the_next_ask() -> None:
    """While others are awaited, the job stays due when it was due."""
    record = after(IN_STATE[State.ACCEPTED], heard("a", good("a")))
    assert record.due_at == IN_STATE[State.ACCEPTED].due_at


def test_a_job_takes_no_more_ids_than_it_asked_for() -> None:
    """The third id of two is a stranger: before the answer, after it, and at the end."""
    for asked in (1, 2, 3, 4):
        record = job(asked)
        for number in range(asked):
            record = after(record, heard(f"t{number}"))
        change = decide(record, heard("one too many", good("one too many")))
        assert (change.verdict, change.record) == (UNKNOWN_TASK, record)


def test_the_first_end_of_a_task_wins() -> None:
    """The same end again is a repeat, whatever its signature; another end is a conflict; neither changes a thing."""
    record = after(IN_STATE[State.ACCEPTED], heard("a", good("a")))
    assert decide(record, heard("a", good("a"))).verdict is REPEAT
    assert decide(record, heard("a", good("a", "another signature"))).verdict is REPEAT
    assert decide(record, heard("a", bad("a"))).verdict is CONFLICT
    assert decide(record, heard("a")).verdict is REPEAT
    failed = after(IN_STATE[State.ACCEPTED], heard("a", bad("a")))
    assert decide(failed, heard("a", good("a"))).verdict is CONFLICT


def test_fewer_ids_than_asked_for_are_the_job() -> None:
    """The answer says how many tasks there are: the job is at its end when they are."""
    done = after(job(3), answer("a"), heard("a", good("a")))
    assert (done.state, done.asked) == (State.DONE, 1)
    early = after(job(3), heard("a", good("a")))
    assert after(early, answer("a")).state is State.DONE


def test_a_task_that_the_answer_left_out_is_still_taken() -> None:
    """Three were asked for, the answer names one: what callbacks tell of the others counts, before and after."""
    asked_for = job(3, request=model_v(count=3))
    early = after(asked_for, heard("b", good("b")), answer("a"))
    assert (early.state, early.task_ids) == (State.ACCEPTED, ("a", "b"))
    late = after(asked_for, answer("a"), heard("a", good("a")), heard("b", good("b")))
    assert (late.state, late.task_ids, late.outcomes) == (State.DONE, ("a", "b"), (good("a"), good("b")))
    assert after(late, heard("c", bad("c"))).state is State.FAILED
    full = after(late, heard("c", good("c")))
    assert decide(full, heard("d", good("d"))).verdict is UNKNOWN_TASK
    assert decide(late, heard("c")).verdict is REPEAT


def test_more_ids_than_asked_for_are_the_job_too() -> None:
    """They were answered, so they were bought: none is thrown away."""
    record = after(job(1), answer("a", "b", "c"))
    assert (record.asked, record.task_ids) == (3, ("a", "b", "c"))


def test_one_failed_task_makes_a_failed_job() -> None:
    """Done means that all succeeded; the good outcomes of a failed job are kept."""
    makers: tuple[Callable[[str], Outcome], ...] = (good, bad)
    for ends in itertools.product(makers, repeat=3):
        record = after(job(3), answer("a", "b", "c"), *(heard(t, end(t)) for t, end in zip("cab", ends, strict=True)))
        assert record.state is (State.DONE if bad not in ends else State.FAILED)
        assert [outcome and outcome.task_id for outcome in record.outcomes] == ["a", "b", "c"]


# --- any order -----------------------------------------------------------------------------------------------------

ids = st.sampled_from("abcx")
attempts = st.sampled_from([1, 1, 1, 2, 3])
moments = st.floats(0, 1e6)
task_lists = st.lists(ids, min_size=1, max_size=4, unique=True).map(tuple)
EVENTS: st.SearchStrategy[Event] = st.one_of(
    st.builds(ResendStarted, at=moments),
    st.builds(Accepted, attempt=attempts, at=moments, task_ids=task_lists, due_at=moments),
    st.builds(Refused, attempt=attempts, at=moments, refusal=st.just(NO), sent=st.booleans()),
    st.builds(AnswerLost, attempt=attempts, at=moments, refusal=st.just(DOUBT), due_at=moments),
    st.builds(
        lambda attempt, at, task_id, end: heard(task_id, end and end(task_id), attempt, at),
        attempts,
        moments,
        ids,
        st.sampled_from([None, good, bad]),
    ),
    st.builds(Abandoned, at=moments, was=st.none() | st.sampled_from(State)),
    st.builds(PollScheduled, at=moments, due_at=moments, failed=st.booleans()),
)  # fmt: skip


@given(st.integers(1, 4), st.lists(EVENTS, max_size=30))
def test_what_holds_in_any_order(asked: int, events: list[Event]) -> None:
    """The version grows with what was applied only; ends stay; ids, outcomes and due times fit the state."""
    record = job(asked)
    for event in events:
        before = record
        change = decide(before, event)
        assert change.record is not None
        record = change.record
        assert record.version == before.version + (change.verdict is APPLIED)
        assert (record is before) == (change.verdict is not APPLIED)
        if type(event) is ResendStarted and change.verdict is APPLIED:
            assert record.attempt == before.attempt + 1
        elif record.attempt != before.attempt:
            assert isinstance(event, OutcomeReported | Accepted)
            assert record.attempt == event.attempt > before.attempt
            assert not before.task_ids

        ends = dict(zip(before.task_ids, before.outcomes, strict=True))
        now = dict(zip(record.task_ids, record.outcomes, strict=True))
        assert len(now) == len(record.task_ids) <= record.asked
        if type(event) is not Accepted:
            assert record.asked == before.asked
            assert record.task_ids[: len(before.task_ids)] == before.task_ids
        for task_id, outcome in ends.items():
            if outcome is not None and task_id in now:
                assert now[task_id] is outcome
        if before.state in (State.DONE, State.FAILED) and type(event) is not Accepted:
            assert (record.state, now) == (before.state, ends)

        is_whole = len(now) == record.asked and None not in now.values()
        assert (record.state in (State.DONE, State.FAILED)) == (is_whole and record.state is not State.EXPIRED)
        assert bool(now) <= (record.state in (State.ACCEPTED, State.DONE, State.FAILED, State.EXPIRED))
        if record.state is State.DONE:
            assert all(isinstance(outcome, Succeeded) for outcome in now.values())
        if record.state.is_final:
            assert record.due_at is None
        needs_reason = record.state in (State.UNCERTAIN, State.UNKNOWN, State.NOT_SENT, State.REJECTED)
        assert needs_reason == (record.refusal is not None)


@given(
    st.permutations([answer("a", "b", "c"), *(heard(t, good(t)) for t in "abc"), *(heard(t, good(t)) for t in "abc")])
)
def test_the_end_does_not_depend_on_the_order(events: list[Event]) -> None:
    """An answer and its callbacks, each twice, in any order: the job is done, in the order of the answer."""
    record: JobRecord | None = job(3)
    for event in events:
        assert record is not None
        record = decide(record, event).record
    assert record is not None
    assert (record.state, record.task_ids, record.outcomes) == (State.DONE, tuple("abc"), tuple(map(good, "abc")))


def test_a_state_is_found_by_its_name() -> None:
    """It is equal to its name, so it has the hash of it."""
    assert all(state in {state.value} and state.value in {state} for state in State)
