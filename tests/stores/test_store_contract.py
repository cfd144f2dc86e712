"""What every store owes (store/base.py), written once and held against each of them through the protocol alone.

A new store is one more row of `FACTORIES`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import attrs
import pytest
from pg import pg_store

from xiling_async._internal.clock import SystemClock
from xiling_async.kinds import ImageToVideo, Video
from xiling_async.models.lifecycle import (
    Abandoned,
    Accepted,
    AnswerLost,
    Event,
    OutcomeReported,
    PollScheduled,
    Refused,
    ResendStarted,
    Verdict,
    decide,
)
from xiling_async.models.query import JobQuery
from xiling_async.models.record import LEFT_BEHIND, Failed, JobRecord, Outcome, Refusal, State, Succeeded
from xiling_async.stores.base import SPREAD_S, Store
from xiling_async.stores.memory import MemoryStore
from xiling_async.stores.sqlite import SQLiteStore

FACTORIES: dict[str, Callable[[Path], Store]] = {
    "memory": lambda folder: MemoryStore(),
    "sqlite": lambda folder: SQLiteStore(folder / "jobs.db"),
    "postgres": lambda folder: pg_store(),
}

NOW = 1_800_000_000.25
NO = Refusal(error="RateLimited", message="slowly: é波\0", status=429, code=7, service_message="s", retry_after=2.5)
DOUBT = Refusal(error="SubmitUncertain", message="cut")
REQUEST = ImageToVideo(
    model="KL", prompt="波 🌊 \"quoted\" 'too' \0 %s ? ; --", reference_images=["https://e.example/a.jpg?sig=x"],
    aspect_ratio="16:9", aspect_resolution="720p", duration=5, generate_count=4,
)  # fmt: skip
STRANGE_TEXTS = [
    "",
    " ",
    "\0",
    "a\0b",
    "é",
    "e\u0301",
    "波",
    "🌊",
    "'; DROP TABLE jobs; --",
    "%",
    "_",
    "\\",
    '"',
    "\n",
    "A" * 5_000,
]


@pytest.fixture(params=FACTORIES)
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    made = FACTORIES[request.param](tmp_path)
    await made.open()
    yield made
    await made.close()


def job(number: int = 1, **known: Any) -> JobRecord:
    fresh = JobRecord(
        id=f"{number:032x}", kind="image_to_video", key=None, request=REQUEST, asked=2, created_at=NOW + number,
        changed_at=NOW + number,
    )  # fmt: skip
    return attrs.evolve(fresh, **known)


def good(task_id: str, **raw: Any) -> Succeeded[Video]:
    return Succeeded(task_id, Video(task_id=task_id, video_url=f"https://m.example/{task_id}?s=1", width=1, raw=raw))


def answer(*task_ids: str, attempt: int = 1, due_at: float | None = NOW + 300) -> Accepted:
    return Accepted(attempt=attempt, at=NOW + 5, task_ids=task_ids, due_at=due_at)


def heard(task_id: str, outcome: Outcome | None = None, attempt: int = 1) -> OutcomeReported:
    return OutcomeReported(attempt=attempt, at=NOW + 9, task_id=task_id, outcome=outcome, due_at=NOW + 400)


def lost() -> AnswerLost:
    return AnswerLost(attempt=1, at=NOW + 5, refusal=DOUBT, due_at=NOW + 3600)


def refused(*, sent: bool = True) -> Refused:
    return Refused(attempt=1, at=NOW + 5, refusal=NO, sent=sent)


async def applied(store: Store, record: JobRecord, *events: Event) -> JobRecord:
    """The stored job after these events, each of which must apply."""
    held = await store.add(record)
    for event in events:
        change = await store.change(record.id, event)
        assert change.verdict is Verdict.APPLIED, event
        assert change.record is not None
        held = change.record
    return held


async def reopened(store: Store) -> None:
    await store.close()
    await store.open()


def test_every_store_is_a_store(tmp_path: Path) -> None:
    """Each has the methods of the protocol, and making one needs no loop and touches nothing."""
    for number, factory in enumerate(FACTORIES.values()):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert isinstance(factory(folder), Store)
        assert list(folder.iterdir()) == []


# --- what `add` says, who owns a task, what is in hand ---------------------------------------------------------------


class InHand:
    """A watcher that has these jobs in hand, and waits for none."""

    def __init__(self, *job_ids: str) -> None:
        self.job_ids = frozenset(job_ids)

    def known(self, job_id: str) -> int | None:
        return None

    def watched(self) -> list[str]:
        return []

    def told(self, record: JobRecord) -> None:
        pass

    def missing(self, job_ids: Iterable[str]) -> None:
        pass

    def handover_changed(self) -> None:
        pass

    def in_hand(self) -> frozenset[str]:
        return self.job_ids


async def test_add_gives_its_own_record_only_when_it_was_written(store: Store) -> None:
    """The very same object for the writer; another one for all who come later, also with an equal record: one sends."""
    records = [job(1, key="k") for _ in range(8)]
    held = await asyncio.gather(*(store.add(record) for record in records))
    assert [one is record for one, record in zip(held, records, strict=True)].count(True) == 1
    assert all(one == records[0] for one in held)


async def test_a_job_of_a_bare_task_id_owns_no_task(store: Store) -> None:
    """It keeps its task from nobody: the job that bought it has it, and is found by it, before and after a purge."""
    bare = job(1, request=None, attempt=0, state=State.ACCEPTED, task_ids=("a",), outcomes=(None,), asked=1)
    assert await store.add(bare) is bare
    assert await store.by_task("a") is None
    owner = await applied(store, job(2), answer("a", "b"))
    await applied(store, bare, attrs.evolve(heard("a", good("a"), attempt=0), is_status=True))
    assert await store.by_task("a") == owner
    assert await store.purge(-1e12) == 1
    assert await store.by_task("a") == owner


async def test_ids_that_a_callback_named_give_way(store: Store) -> None:
    """The answer's ids take their place, also of an ended job; the others are free again."""
    early = await applied(store, job(1, asked=1, request=None), heard("invented", good("invented")))
    assert early.state is State.DONE
    answered = await applied(store, early, answer("real"))
    assert (answered.state, answered.task_ids) == (State.ACCEPTED, ("real",))
    assert await store.by_task("invented") is None
    assert await store.by_task("real") == answered
    await applied(store, job(2), answer("invented", "b"))


async def test_an_answer_takes_what_only_a_callback_gave_to_others(store: Store) -> None:
    """In one change: they are uncertain again, or keep the rest; what another answer named is nobody else's."""
    empty = await applied(store, job(1, asked=1, request=None), heard("a", good("a")))
    partly = await applied(store, job(2), heard("b", good("b")), heard("c"))
    assert (empty.unconfirmed, partly.unconfirmed) == (1, 2)
    await store.add(job(3))
    change = await store.change(job(3).id, answer("a", "b"))
    assert change.verdict is Verdict.APPLIED
    assert {(other.was, other.record and other.record.id) for other in change.others} == {
        (State.DONE, empty.id), (State.ACCEPTED, partly.id)
    }  # fmt: skip
    if not isinstance(store, MemoryStore):
        await reopened(store)
    first, second, owner = [await store.get(job(number).id) for number in (1, 2, 3)]
    assert first is not None and second is not None and owner is not None
    assert (first.state, first.task_ids, first.outcomes) == (State.UNCERTAIN, (), ())
    assert (second.state, second.task_ids, second.unconfirmed) == (State.ACCEPTED, ("c",), 1)
    assert (owner.task_ids, owner.unconfirmed, owner.outcomes) == (("a", "b"), 0, (None, None))
    assert await store.by_task("a") == await store.by_task("b") == owner
    assert (await store.change(first.id, heard("a"))).verdict is Verdict.UNKNOWN_TASK
    await store.add(job(4))
    assert (await store.change(job(4).id, answer("b", "c"))).verdict is Verdict.UNKNOWN_TASK
    assert await store.get(second.id) == second


async def test_a_job_in_hand_is_not_forgotten(store: Store) -> None:
    """A submit pauses between two POSTs of it: a purge leaves it, and takes all others that ended."""
    for number in (1, 2):
        await applied(store, job(number), refused())
    store.listen(InHand(job(1).id))
    assert await store.purge(-1e12) == 1
    assert await store.get(job(1).id) is not None
    store.listen(InHand())
    assert await store.purge(-1e12) == 1


async def test_that_a_job_was_adopted_is_remembered(store: Store) -> None:
    """By its row, through every change, so that its callbacks are never believed."""
    record = await applied(store, job(1, request=None, asked=1, is_adopted=True), heard("a", good("a")))
    if not isinstance(store, MemoryStore):
        await reopened(store)
    held = await store.get(record.id)
    assert held == record
    assert (record.is_adopted, record.outcomes) == (True, (None,))


# --- writing and finding -------------------------------------------------------------------------------------------


async def test_an_empty_store_knows_nothing(store: Store) -> None:
    """Nothing is found, nothing is due, nothing is unfinished."""
    for name in ("", "x", "0" * 32):
        assert await store.get(name) is None
        assert await store.by_key(name) is None
        assert await store.by_task(name) is None
    assert [record async for record in store.unfinished()] == []
    assert await store.next_due() is None
    assert await store.claim(NOW * 2, limit=10, lease_s=60) == []
    assert await store.recover_orphans(NOW, doubt_s=60, per_second=20) == 0
    assert await store.purge(0) == 0
    change = await store.change("0" * 32, lost())
    assert (change.verdict, change.record) == (Verdict.NO_JOB, None)


async def test_a_job_is_found_by_its_three_names(store: Store) -> None:
    """By id, by key, by each task id; and by nothing else."""
    one = await applied(store, job(1, key="order-42"), answer("a", "b"))
    two = await applied(store, job(2, key="order-43"), answer("c", "d"))
    for found in (
        await store.get(one.id),
        await store.by_key("order-42"),
        await store.by_task("a"),
        await store.by_task("b"),
    ):
        assert found == one
    assert await store.by_task("d") == two
    for name in ("order-42", "a"):
        assert await store.get(name) is None
    for name in ("order-4", "ORDER-42", "order-42 ", "a", one.id, ""):
        assert await store.by_key(name) is None
    for name in ("A", "a ", "order-42", one.id, ""):
        assert await store.by_task(name) is None


@pytest.mark.parametrize("text", STRANGE_TEXTS, ids=lambda text: ascii(text[:8]))
async def test_names_are_any_text(store: Store, text: str) -> None:
    """Keys and task ids are opaque: kept letter by letter, found by exactly themselves."""
    named = await applied(store, job(1, key=f"key{text}"), answer(f"task{text}", "other"))
    await reopened(store)
    assert await store.by_key(f"key{text}") == named
    assert await store.by_task(f"task{text}") == named
    held = await store.get(named.id)
    assert held is not None
    assert (held.key, held.task_ids) == (f"key{text}", (f"task{text}", "other"))


RICH = [
    job(1),
    job(
        2,
        key="k",
        request=None,
        asked=1,
        attempt=7,
        failed_asks=3,
        version=12,
        due_at=NOW + 0.125,
        changed_at=NOW + 1e-3,
    ),
    job(3, state=State.REJECTED, refusal=NO),
    job(4, state=State.UNCERTAIN, refusal=DOUBT, due_at=NOW),
    job(
        5, state=State.ACCEPTED, task_ids=("r5a", "r5b"), outcomes=(None, good("r5b", deep={"é": [1, None, 2.5, "\0"]}))
    ),
    job(6, state=State.FAILED, task_ids=("r6a", "r6b"), outcomes=(Failed("r6a", "no\0pe é波🌊"), good("r6b"))),
    job(7, state=State.EXPIRED, task_ids=("r7a",), outcomes=(None,)),
    job(8, request=ImageToVideo.unchecked(model="Z", new={"a": [1, None, "\0"]}, reference_images=["u"], duration="x")),
    job(9, request=ImageToVideo.unchecked()),
    job(10, created_at=0.0, changed_at=4e9 + 1 / 3),
]


@pytest.mark.parametrize("record", RICH, ids=lambda record: record.state.value)
async def test_a_record_comes_back_as_it_went_in(store: Store, record: JobRecord) -> None:
    """Every field, every kind of text and number, also after the store was closed."""
    assert await store.add(record) == record
    await reopened(store)
    held = await store.get(record.id)
    assert held == record
    assert held is not None
    assert type(held.state) is State
    if record.request is not None:
        assert type(held.request) is type(record.request)
        assert held.request.fields() == record.request.fields()
        assert held.request.task_count == record.request.task_count
    for before, after in zip(record.outcomes, held.outcomes, strict=True):
        assert type(after) is type(before)
        if isinstance(before, Succeeded) and isinstance(after, Succeeded):
            assert type(after.result) is Video
            assert after.result.raw == before.result.raw  # equality leaves it out


async def test_adding_a_known_id_changes_nothing(store: Store) -> None:
    """The held job is given back; whatever else the new record says is not written."""
    held = await applied(store, job(1, key="k"), answer("a", "b"))
    assert await store.add(job(1, key="other", asked=4)) == held
    assert await store.get(held.id) == held
    assert await store.by_key("other") is None


async def test_a_key_belongs_to_one_job(store: Store) -> None:
    """The first one, for ever; the second job is not written at all."""
    first = await store.add(job(1, key="k"))
    assert await store.add(job(2, key="k")) == first
    assert await store.get(job(2).id) is None
    assert await store.by_key("k") == first


async def test_no_key_is_no_key(store: Store) -> None:
    """Any number of jobs have none, and none of them is found by one."""
    for number in range(1, 4):
        assert (await store.add(job(number))).id == job(number).id
    assert await store.by_key("") is None
    assert await store.add(job(4, key="")) == job(4, key="")
    assert await store.add(job(5)) == job(5)


async def test_racing_for_a_key_makes_one_job(store: Store) -> None:
    """Fifty at once: all get the same job, and there is one."""
    held = await asyncio.gather(*(store.add(job(number, key="k")) for number in range(1, 51)))
    assert len({record.id for record in held}) == 1
    assert [record.id async for record in store.unfinished()] == [held[0].id]


async def test_a_task_id_belongs_to_one_job(store: Store) -> None:
    """A change that would give it to another job is strange and changes nothing, in the answer and in a callback."""
    owner = await applied(store, job(1), answer("a", "b"))
    other = await store.add(job(2))
    for event in (answer("c", "a"), heard("b", good("b")), heard("a")):
        change = await store.change(other.id, event)
        assert (change.verdict, change.record) == (Verdict.UNKNOWN_TASK, other)
    assert await store.get(other.id) == other
    assert await store.by_task("a") == await store.by_task("b") == owner
    assert await store.by_task("c") is None


async def test_a_job_that_brings_its_task_ids_takes_them_from_nobody(store: Store) -> None:
    """Adding a job whose task is another's gives that one back."""
    owner = await applied(store, job(1), answer("a", "b"))
    assert await store.add(job(2, state=State.ACCEPTED, asked=1, task_ids=("b",), outcomes=(None,))) == owner
    assert await store.get(job(2).id) is None
    assert await store.by_task("b") == owner


async def test_the_answer_replaces_the_ids(store: Store) -> None:
    """Its order counts, outcomes keep their ids; what it does not name, and has no room for, is found no more."""
    early = await applied(store, job(1, asked=3, request=None), heard("b", good("b")), heard("x"))
    assert early.task_ids == ("b", "x")
    answered = await applied(store, job(1), answer("a", "b", "c"))
    assert (answered.task_ids, answered.outcomes) == (("a", "b", "c"), (None, good("b"), None))
    await reopened(store)
    assert await store.get(answered.id) == answered
    assert await store.by_task("x") is None
    assert [(await store.by_task(name)) == answered for name in "abc"] == [True] * 3


# --- changes -------------------------------------------------------------------------------------------------------


async def test_a_refused_change_changes_nothing(store: Store) -> None:
    """Whatever the verdict is called: the record is the one that was there, its version too."""
    record = job(1, request=None)
    done = await applied(store, record, answer("a", "b"), heard("a", good("a")), heard("b", good("b")))
    cases: list[tuple[Event, Verdict]] = [
        (lost(), Verdict.REFUSED),
        (ResendStarted(at=NOW), Verdict.REFUSED),
        (heard("a", good("a")), Verdict.REPEAT),
        (heard("a", Failed("a", "x")), Verdict.CONFLICT),
        (heard("z", good("z")), Verdict.UNKNOWN_TASK),
        (heard("a", attempt=2), Verdict.UNKNOWN_TASK),
    ]
    for event, verdict in cases:
        change = await store.change(done.id, event)
        assert (change.verdict, change.record) == (verdict, done)
    assert await store.get(done.id) == done


async def test_a_corrected_request_takes_the_place_of_the_refused_one(store: Store) -> None:
    """What is sent again under the same key is kept as it was sent, with as many tasks as it asks for."""
    corrected = attrs.evolve(REQUEST, prompt="shorter", generate_count=3)
    sent = await applied(store, job(asked=4), refused(), ResendStarted(at=NOW, request=corrected))
    await reopened(store)
    kept = await store.get(sent.id)
    assert kept is not None
    assert (kept.request, kept.asked, kept.attempt) == (corrected, 3, 2)


async def test_changes_at_once_are_applied_one_after_another(store: Store) -> None:
    """Forty callbacks of four tasks together: four applied, with four versions; the rest are repeats."""
    await applied(store, job(1, asked=4), answer(*"abcd"))
    changes = await asyncio.gather(*(store.change(job(1).id, heard(name, good(name))) for name in "abcd" * 10))
    versions = [change.record.version for change in changes if change.verdict is Verdict.APPLIED and change.record]
    assert sorted(versions) == [2, 3, 4, 5]
    assert {change.verdict for change in changes} == {Verdict.APPLIED, Verdict.REPEAT}
    held = await store.get(job(1).id)
    assert held is not None
    assert (held.state, held.version) == (State.DONE, 5)


async def test_two_hundred_at_once(store: Store) -> None:
    """Changes and reads of fifty jobs together: each job ends as if they had come one by one."""
    await asyncio.gather(*(store.add(job(number, asked=4, key=f"k{number}")) for number in range(1, 51)))
    names = [(number, letter) for number in range(1, 51) for letter in "abcd"]
    random.Random(4).shuffle(names)

    async def caller(number: int, letter: str) -> int:
        task_id = f"{number}{letter}"
        change = await store.change(job(number).id, heard(task_id, good(task_id)))
        assert change.verdict is Verdict.APPLIED
        assert change.record is not None
        found = await store.by_task(task_id)
        assert found is not None
        assert found.version >= change.record.version
        assert await store.by_key(f"k{number}") is not None
        return change.record.version

    versions = await asyncio.gather(*(caller(*name) for name in names))
    for number in range(1, 51):
        mine = [version for (other, _), version in zip(names, versions, strict=True) if other == number]
        assert sorted(mine) == [1, 2, 3, 4]
        held = await store.get(job(number).id)
        assert held is not None
        assert (held.state, held.version) == (State.DONE, 4)
        assert sorted(held.task_ids) == [f"{number}{letter}" for letter in "abcd"]


async def test_a_race_for_a_task_id_has_one_winner(store: Store) -> None:
    """Many jobs are told of the same new task together: it is one's, and strange to the others."""
    for number in range(1, 31):
        await store.add(job(number))
    changes = await asyncio.gather(*(store.change(job(number).id, heard("t")) for number in range(1, 31)))
    (winner,) = [change.record for change in changes if change.verdict is Verdict.APPLIED]
    assert {change.verdict for change in changes} == {Verdict.APPLIED, Verdict.UNKNOWN_TASK}
    assert await store.by_task("t") == winner


async def test_a_cancelled_caller_breaks_nothing(store: Store) -> None:
    """The change happened or it did not; the store goes on."""
    await store.add(job(1, asked=4))
    for number, name in enumerate("abcd"):
        task = asyncio.create_task(store.change(job(1).id, heard(name)))
        for _ in range(number):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
    held = await store.get(job(1).id)
    assert held is not None
    assert held.version == len(held.task_ids) <= 4
    assert [(await store.by_task(name)) == held for name in held.task_ids] == [True] * held.version
    assert (await store.change(job(1).id, answer(*"abcd"))).verdict in (Verdict.APPLIED, Verdict.REPEAT)


def some_event(luck: random.Random, job_number: int) -> Event:
    task_ids = [f"{job_number}-{letter}" for letter in luck.sample("abcd", luck.randint(1, 4))]
    attempt, at = luck.choice([1, 1, 1, 2]), NOW + luck.randint(0, 1000)
    name = task_ids[0]
    outcome = luck.choice([None, good(name, n=luck.random()), Failed(name, "é")])
    events: list[Event] = [
        ResendStarted(at=at),
        Accepted(attempt=attempt, at=at, task_ids=tuple(task_ids), due_at=at),
        Refused(attempt=attempt, at=at, refusal=NO, sent=luck.random() < 0.5),
        AnswerLost(attempt=attempt, at=at, refusal=DOUBT, due_at=at),
        *[OutcomeReported(attempt=attempt, at=at, task_id=name, outcome=outcome, due_at=at)] * 4,
        Abandoned(at=at),
        PollScheduled(at=at, due_at=at + 30, failed=luck.random() < 0.5),
    ]
    return luck.choice(events)


async def test_a_store_does_what_the_lifecycle_decides(store: Store, deep: bool) -> None:
    """Random events against a plain dictionary: the same verdicts and records, and the same after a reopening."""
    luck = random.Random(20_261_122)
    model: dict[str, JobRecord] = {}
    for number in range(1, 400 if deep else 40):
        record = job(number, asked=luck.randint(1, 4), key=luck.choice([None, f"k{number}"]))
        model[record.id] = await store.add(record)
    for _ in range(20_000 if deep else 1_000):
        number = luck.randint(1, len(model))
        event, before = some_event(luck, number), model[job(number).id]
        change, wanted = await store.change(before.id, event), decide(before, event)
        assert change == wanted
        assert wanted.record is not None
        model[before.id] = wanted.record
    await reopened(store)
    for record in model.values():
        assert await store.get(record.id) == record
    unfinished = {record.id: record async for record in store.unfinished()}
    assert unfinished == {record.id: record for record in model.values() if not record.state.is_final}


# --- what is unfinished --------------------------------------------------------------------------------------------

ENDINGS: dict[State, list[Event]] = {
    State.SENDING: [],
    State.UNCERTAIN: [lost()],
    State.ACCEPTED: [answer("a", "b")],
    State.DONE: [answer("a", "b"), heard("a", good("a")), heard("b", good("b"))],
    State.FAILED: [answer("a", "b"), heard("a", good("a")), heard("b", Failed("b", ""))],
    State.EXPIRED: [answer("a", "b"), Abandoned(at=NOW + 9)],
    State.NOT_SENT: [refused(sent=False)],
    State.REJECTED: [refused()],
    State.UNKNOWN: [lost(), Abandoned(at=NOW + 9)],
}


@pytest.mark.parametrize("state", State)
async def test_unfinished_are_those_that_somebody_may_wait_for(store: Store, state: State) -> None:
    """Sending, uncertain, accepted."""
    record = await applied(store, job(1), *ENDINGS[state])
    assert record.state is state
    assert [found async for found in store.unfinished()] == ([] if state.is_final else [record])


async def test_unfinished_come_oldest_first(store: Store) -> None:
    """By creation, in whatever order they were written, over more than any page; none twice, none missing."""
    numbers = list(range(1, 1_301))
    random.Random(7).shuffle(numbers)
    await asyncio.gather(*(store.add(job(number, created_at=NOW + number // 3)) for number in numbers))
    found = [record async for record in store.unfinished()]
    assert [record.created_at for record in found] == sorted(record.created_at for record in found)
    assert sorted(int(record.id, 16) for record in found) == list(range(1, 1_301))


async def test_the_store_may_change_while_the_unfinished_are_read(store: Store) -> None:
    """Each comes once, jobs come and go meanwhile, and nothing breaks."""
    for number in range(1, 31):
        await store.add(job(number))
    seen = []
    async for record in store.unfinished():
        seen.append(int(record.id, 16))
        await store.change(record.id, refused())
        await store.change(job(30).id, refused())
        await store.add(job(100 + len(seen), created_at=NOW - len(seen)))
        if len(seen) == 1:
            await store.purge(-1e12)
    assert len(seen) == len(set(seen))
    assert set(range(1, 30)) <= set(seen)


async def test_all_jobs_are_listed_newest_first(store: Store) -> None:
    """Ends and all, by when they were written, over more than any page; what changes meanwhile comes once."""
    await asyncio.gather(*(store.add(job(number)) for number in range(1, 1_101)))
    await applied(store, job(500), refused())
    seen = []
    newest_first = JobQuery(newest_first=True)
    async for record in store.jobs(newest_first):
        seen.append(int(record.id, 16))
        if len(seen) == 1:
            await store.add(job(2_000))
            await store.change(job(3).id, refused())
    assert seen == list(range(1_100, 0, -1))
    assert [record.id async for record in store.jobs(newest_first)][:2] == [job(2_000).id, job(1_100).id]


# --- what is due ---------------------------------------------------------------------------------------------------


async def test_claiming_gives_what_is_due_and_leases_it(store: Store) -> None:
    """Due jobs, the longest overdue first, at most `limit`; each is due again when its lease is over."""
    for number in (3, 1, 2):
        await applied(store, job(number), answer(f"{number}", due_at=NOW + number))
    await store.add(job(4))  # never due
    assert await store.next_due() == NOW + 1
    assert await store.claim(NOW + 0.5, limit=10, lease_s=60) == []
    first = await store.claim(NOW + 2, limit=1, lease_s=60)
    assert [record.id for record in first] == [job(1).id]
    assert first[0].due_at == NOW + 62
    assert await store.get(job(1).id) == first[0]
    rest = await store.claim(NOW + 10, limit=10, lease_s=60)
    assert [record.id for record in rest] == [job(2).id, job(3).id]
    assert await store.claim(NOW + 10, limit=10, lease_s=60) == []
    assert await store.next_due() == NOW + 62
    again = await store.claim(NOW + 62, limit=10, lease_s=60)
    assert [record.id for record in again] == [job(1).id]


async def test_a_lease_ends_with_what_happens(store: Store) -> None:
    """An answered ask sets its own due time; a job at its end is never due again."""
    await applied(store, job(1), answer("a", "b", due_at=NOW))
    (claimed,) = await store.claim(NOW, limit=1, lease_s=600)
    asked = await store.change(claimed.id, PollScheduled(at=NOW, due_at=NOW + 30))
    assert asked.record is not None
    assert asked.record.version == claimed.version + 1
    assert await store.next_due() == NOW + 30
    await applied(store, job(1), heard("a", good("a")), heard("b", good("b")))
    assert await store.next_due() is None
    assert await store.claim(NOW * 2, limit=10, lease_s=60) == []


async def test_due_times_may_move_in_any_direction(store: Store) -> None:
    """Later, earlier, the same again: only the newest counts, over thousands of moves."""
    luck = random.Random(3)
    due: dict[str, float] = {}
    for number in range(1, 21):
        await applied(store, job(number), answer(f"{number}", due_at=NOW))
    moves = [(job(luck.randint(1, 20)).id, NOW + luck.randint(1, 50)) for _ in range(1_000)]
    await asyncio.gather(*(store.change(name, PollScheduled(at=NOW, due_at=due_at)) for name, due_at in moves))
    due.update(moves)
    assert await store.next_due() == min(due.values())
    claimed = await store.claim(NOW + 25, limit=100, lease_s=1_000)
    assert {record.id for record in claimed} == {record_id for record_id, due_at in due.items() if due_at <= NOW + 25}
    assert len(claimed) == len({record.id for record in claimed})


async def test_two_sweepers_never_get_the_same_job(store: Store) -> None:
    """Claims at once share what is due between them."""
    for number in range(1, 41):
        await applied(store, job(number), answer(f"{number}", due_at=NOW))
    claims = await asyncio.gather(*(store.claim(NOW, limit=7, lease_s=60) for _ in range(8)))
    claimed = [record.id for claim in claims for record in claim]
    assert len(claimed) == len(set(claimed)) == 40
    assert max(map(len, claims)) <= 7


# --- after a crash -------------------------------------------------------------------------------------------------


def of_job(number: int, event: Event) -> Event:
    """The event with task ids of this job's own."""
    if isinstance(event, Accepted):
        return attrs.evolve(event, task_ids=tuple(f"{number}{name}" for name in event.task_ids))
    if isinstance(event, OutcomeReported):
        task_id = f"{number}{event.task_id}"
        outcome = Failed(task_id, "") if isinstance(event.outcome, Failed) else event.outcome and good(task_id)
        return attrs.evolve(event, task_id=task_id, outcome=outcome)
    return event


async def test_taking_over_what_a_dead_process_left(store: Store) -> None:
    """Sending becomes uncertain, doubt is bounded, accepted jobs are due soon, ends are left alone."""
    before: dict[State, JobRecord] = {}
    for number, (state, events) in enumerate(ENDINGS.items(), 1):
        own = [of_job(number, event) for event in events]
        before[state] = await applied(store, job(number), *own)
    later = NOW + 1_000
    assert await store.recover_orphans(later, doubt_s=500, per_second=0.5) == 3
    for state, old in before.items():
        new = await store.get(old.id)
        assert new is not None
        if state is State.SENDING:
            assert (new.state, new.refusal, new.due_at) == (State.UNCERTAIN, LEFT_BEHIND, later + 500)
            assert (new.attempt, new.changed_at) == (old.attempt, later)
        elif state is State.UNCERTAIN:
            assert (new.state, new.refusal, new.due_at) == (State.UNCERTAIN, DOUBT, later + 500)
        elif state is State.ACCEPTED:
            assert new.state is State.ACCEPTED
            assert new.due_at is not None
            assert later <= new.due_at <= later + 3 / 0.5
        else:
            assert new == old


async def test_a_doubt_that_ends_sooner_stays(store: Store) -> None:
    """A takeover gives an uncertain job no more time than it had."""
    await applied(store, job(1), lost())
    await store.recover_orphans(NOW + 3_000, doubt_s=5_000, per_second=20)
    held = await store.get(job(1).id)
    assert held is not None
    assert held.due_at == NOW + 3_600


@pytest.mark.parametrize("due_at", [None, NOW - 1e9, NOW + 1e9])
async def test_no_doubt_outlives_a_takeover_by_more_than_its_time(store: Store, due_at: float | None) -> None:
    """Whatever the clock was when the doubt began, and also if it was never to end."""
    await applied(store, job(1), attrs.evolve(lost(), due_at=due_at))
    assert await store.recover_orphans(NOW, doubt_s=60, per_second=20) == 1
    (claimed,) = await store.claim(NOW + 60, limit=9, lease_s=10)
    assert (claimed.id, claimed.state, claimed.due_at) == (job(1).id, State.UNCERTAIN, NOW + 70)


async def test_a_takeover_touches_no_end(store: Store) -> None:
    """However many jobs have ended: only the unfinished ones are counted, and only they fall due."""
    for number in range(1, 31):
        await applied(store, job(number), *ENDINGS[State.UNKNOWN if number % 3 else State.SENDING])
    assert await store.recover_orphans(NOW, doubt_s=60, per_second=20) == 10
    assert len(await store.claim(NOW + 60, limit=99, lease_s=10)) == 10


async def test_a_takeover_of_many_is_spread_over_a_minute(store: Store) -> None:
    """Never longer, and not all in one second."""
    for number in range(1, 201):
        await applied(store, job(number), answer(f"{number}", due_at=None))
    assert await store.recover_orphans(NOW, doubt_s=1, per_second=0.001) == 200
    due = [record.due_at async for record in store.unfinished() if record.due_at is not None]
    assert len(due) == 200
    assert NOW <= min(due) <= max(due) <= NOW + SPREAD_S
    assert len({int(moment) for moment in due}) > 20


async def test_a_takeover_wakes_what_was_never_due(store: Store) -> None:
    """An accepted job without a due time is asked about after a restart: its callback may have come meanwhile."""
    await applied(store, job(1), answer("a", due_at=None))
    assert await store.next_due() is None
    await store.recover_orphans(NOW, doubt_s=60, per_second=20)
    assert [record.id for record in await store.claim(NOW + 60, limit=9, lease_s=1)] == [job(1).id]


async def test_an_adopted_job_survives_a_takeover(store: Store) -> None:
    """After a takeover its callback still adopts what was being sent."""
    await store.add(job(1, asked=1))
    await store.recover_orphans(NOW, doubt_s=60, per_second=20)
    change = await store.change(job(1).id, heard("a", good("a")))
    assert change.record is not None
    assert (change.verdict, change.record.state, change.record.refusal) == (Verdict.APPLIED, State.DONE, None)


# --- forgetting ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("span", [3_600, 3_600.0, timedelta(hours=1)])
async def test_purging_forgets_old_ends_only(store: Store, span: timedelta | float) -> None:
    """Jobs that ended longer ago, with keys and task ids; younger ends and unfinished jobs of any age stay."""
    now = SystemClock().time()
    ended = {"state": State.DONE, "asked": 1}
    old = job(1, key="old", changed_at=now - 3_700, task_ids=("a",), outcomes=(good("a"),), **ended)
    young = job(2, key="young", changed_at=now - 3_500, task_ids=("b",), outcomes=(good("b"),), **ended)
    waiting = job(3, key="waiting", changed_at=0.0)
    for record in (old, young, waiting):
        await store.add(record)
    assert await store.purge(span) == 1
    assert await store.purge(span) == 0
    for gone in (await store.get(old.id), await store.by_key("old"), await store.by_task("a")):
        assert gone is None
    assert await store.by_key("young") == await store.by_task("b") == young
    assert await store.get(waiting.id) == waiting
    again = job(4, key="old", state=State.ACCEPTED, asked=1, task_ids=("a",), outcomes=(None,))
    assert await store.add(again) == again
    assert await store.by_task("a") == again


async def test_purging_many_forgets_them_all(store: Store) -> None:
    """With younger ones between them; what is left can be found as before."""
    now = SystemClock().time()
    numbers = range(1, 601)
    ended = {"state": State.DONE, "asked": 1}
    await asyncio.gather(
        *(
            store.add(
                job(
                    number, key=f"k{number}", changed_at=now if number % 10 == 0 else 0.0,
                    task_ids=(f"t{number}",), outcomes=(good(f"t{number}"),), **ended,
                )
            )
            for number in numbers
        )
    )  # fmt: skip
    assert await store.purge(60) == 540
    for number in numbers:
        by_id, by_task = await store.get(job(number).id), await store.by_task(f"t{number}")
        assert by_id == by_task == await store.by_key(f"k{number}")
        assert (by_id is None) == (number % 10 != 0)


async def test_every_end_can_be_purged(store: Store) -> None:
    """All six of them."""
    for number, state in enumerate(State, 1):
        await store.add(job(number, state=state, changed_at=0.0))
    assert await store.purge(0) == sum(state.is_final for state in State) == 6
    assert {record.state async for record in store.unfinished()} == {state for state in State if not state.is_final}


# --- life ----------------------------------------------------------------------------------------------------------


async def test_the_store_keeps_the_first_secret(store: Store) -> None:
    """Asked again, and opened again, it gives the one that it was given first; a race has one winner."""
    offered = [bytes([number]) * 32 for number in range(10)]
    kept = set(await asyncio.gather(*map(store.secret, offered)))
    assert len(kept) == 1
    assert kept <= set(offered)
    await reopened(store)
    assert {await store.secret(b"x" * 32)} == kept


async def test_a_store_can_be_closed_and_opened_again(store: Store) -> None:
    """What was written is there, what is written then is there as well; closing twice is closing."""
    one = await applied(store, job(1, key="k"), answer("a", "b"))
    for _ in range(3):
        await reopened(store)
    assert await store.by_key("k") == await store.by_task("b") == one
    two = await applied(store, job(2), answer("c", "d"))
    await reopened(store)
    assert await store.by_task("c") == two
    await store.close()
    await store.close()
    await store.open()
    assert [record async for record in store.unfinished()] == [one, two]


async def test_a_repr_shows_no_secret(store: Store) -> None:
    """Neither the secret of the URLs, nor what a request holds."""
    await store.secret(b"SECRETSECRETSECRETSECRET")
    await store.add(job(1, key="k"))
    assert "SECRET" not in repr(store)
    assert "waves" not in repr(store)
    assert "sig=x" not in repr(store)
