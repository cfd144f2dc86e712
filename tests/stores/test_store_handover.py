"""What every store owes to consumers, listings and retention (stores/base.py), held against each of them."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from test_store_contract import FACTORIES, NOW, applied, good, job, lost, refused, reopened

from xiling_async.models.lifecycle import (
    Abandoned,
    Accepted,
    Acknowledged,
    Event,
    FileSaved,
    OutcomeReported,
    Refused,
    Verdict,
)
from xiling_async.models.query import JobQuery
from xiling_async.models.record import Failed, JobRecord, State
from xiling_async.stores.base import Store

LEASE_S = 300.0


@pytest.fixture(params=FACTORIES)
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    made = FACTORIES[request.param](tmp_path)
    await made.open()
    yield made
    await made.close()


def ended(at: float, task_id: str, *, failed: bool = False) -> tuple[Event, Event]:
    outcome = Failed(task_id, "no") if failed else good(task_id)
    return (
        Accepted(attempt=1, at=at - 1, task_ids=(task_id,), due_at=at + 99),
        OutcomeReported(attempt=1, at=at, task_id=task_id, outcome=outcome, due_at=None),
    )


async def add_ended(store: Store, number: int, at: float, **known: Any) -> JobRecord:
    return await applied(store, job(number, asked=1, **known), *ended(at, f"t-{number}"))


async def handed_over(store: Store, *, now: float = NOW) -> list[str]:
    ids = []
    while (handed_over := await store.hand_over(now, lease_s=LEASE_S)) is not None:
        ids.append(handed_over.record.id)
    return ids


async def listed(store: Store, **query: Any) -> list[str]:
    return [record.id for record in [each async for each in store.jobs(JobQuery(**query))]]


async def acknowledge(store: Store, job_id: str) -> Verdict:
    return (await store.change(job_id, Acknowledged(at=NOW))).verdict


# --- hand-over -------------------------------------------------------------------------------------------------------


async def test_the_job_that_ended_first_is_handed_over_first(store: Store) -> None:
    """By the end, not by the beginning; and one lease at a time."""
    assert await store.hand_over(NOW, lease_s=LEASE_S) is None
    assert await store.next_handover(NOW) is None
    third, first, second = [await store.add(job(number, asked=1)) for number in (1, 2, 3)]
    for at, record in enumerate((first, second, third), 10):
        for event in ended(NOW + at, record.id):
            await store.change(record.id, event)
    assert await store.next_handover(NOW) == 0
    assert await handed_over(store) == [first.id, second.id, third.id]
    assert await store.hand_over(NOW, lease_s=LEASE_S) is None
    wait_s = await store.next_handover(NOW)
    assert wait_s is not None
    assert 0 < wait_s <= LEASE_S


async def test_every_end_that_may_have_cost_is_handed_over(store: Store) -> None:
    """Done, failed, expired and unknown; not what is under way, and not what bought nothing."""
    done = await add_ended(store, 1, NOW + 1)
    failed = await applied(store, job(2, asked=1), *ended(NOW + 2, "t-2", failed=True))
    accepted = Accepted(attempt=1, at=NOW, task_ids=("t-3",), due_at=NOW)
    expired = await applied(store, job(3), accepted, Abandoned(at=NOW + 3))
    unknown = await applied(store, job(4), lost(), Abandoned(at=NOW + 4))
    await applied(store, job(5))
    await applied(store, job(6), lost())
    await applied(store, job(7), attrs.evolve(accepted, task_ids=("t-7",)))
    await applied(store, job(8), refused())
    await applied(store, job(9), refused(sent=False))
    assert await handed_over(store) == [done.id, failed.id, expired.id, unknown.id]


async def test_an_acknowledged_job_is_not_handed_over_again(store: Store) -> None:
    record = await add_ended(store, 1, NOW)
    assert record.handover_at == 0
    handed_over = await store.hand_over(NOW, lease_s=LEASE_S)
    assert handed_over is not None
    assert not handed_over.is_again
    assert handed_over.record.handover_at
    assert handed_over.record.version > record.version
    assert await acknowledge(store, record.id) is Verdict.APPLIED
    assert await acknowledge(store, record.id) is Verdict.REPEAT
    assert await store.next_handover(NOW) is None
    await reopened_if_durable(store)
    kept = await store.get(record.id)
    assert kept is not None
    assert kept.handover_at is None


async def reopened_if_durable(store: Store) -> None:
    if type(store).__name__ != "MemoryStore":
        await reopened(store)


async def test_it_can_be_acknowledged_without_a_lease(store: Store) -> None:
    """Whoever has dealt with a job may say so."""
    record = await add_ended(store, 1, NOW)
    assert await acknowledge(store, record.id) is Verdict.APPLIED
    assert await handed_over(store) == []


async def test_what_is_not_ended_cannot_be_acknowledged(store: Store) -> None:
    await applied(store, job(1))
    await applied(store, job(2), refused())
    assert await acknowledge(store, job(1).id) is Verdict.REFUSED
    assert await acknowledge(store, job(2).id) is Verdict.REFUSED
    assert await acknowledge(store, "f" * 32) is Verdict.NO_JOB


async def test_a_second_end_is_handed_over_too(store: Store) -> None:
    """The application was told that the job had expired; then its result came after all."""
    accepted = Accepted(attempt=1, at=NOW, task_ids=("t-1",), due_at=NOW)
    record = await applied(store, job(1, asked=1), accepted, Abandoned(at=NOW + 3))
    assert await acknowledge(store, record.id) is Verdict.APPLIED
    heard = OutcomeReported(attempt=1, at=NOW + 9, task_id="t-1", outcome=good("t-1"), due_at=None)
    assert (await store.change(record.id, heard)).verdict is Verdict.APPLIED
    assert await handed_over(store) == [record.id]


async def test_a_file_that_is_saved_changes_no_lease(store: Store) -> None:
    record = await add_ended(store, 1, NOW)
    leased = await store.hand_over(NOW, lease_s=LEASE_S)
    assert leased is not None
    saved = FileSaved(at=NOW, task_id="t-1", file="t-1.mp4")
    change = await store.change(record.id, saved)
    assert change.record is not None
    assert change.record.handover_at == leased.record.handover_at
    assert await handed_over(store) == []


# --- listings --------------------------------------------------------------------------------------------------------


async def test_jobs_are_listed_by_what_they_are(store: Store) -> None:
    """The oldest first, by state, kind, metadata and age, alone and together."""
    words = [{"user": "42"}, {"user": "42", "order": "7"}, {"user": "43"}, {}]
    records = [await applied(store, job(number, metadata=metadata)) for number, metadata in enumerate(words, 1)]
    ids = [record.id for record in records]
    await store.change(ids[1], Refused(attempt=1, at=NOW, refusal=refused().refusal, sent=True))
    assert await listed(store) == ids
    assert await listed(store, newest_first=True) == ids[::-1]
    assert await listed(store, metadata={"user": "42"}) == ids[:2]
    assert await listed(store, metadata={"user": "42", "order": "7"}) == [ids[1]]
    assert await listed(store, metadata={"user": "42", "order": "8"}) == []
    assert await listed(store, states=frozenset({State.REJECTED})) == [ids[1]]
    assert await listed(store, states=frozenset({State.SENDING, State.REJECTED})) == ids
    assert await listed(store, states=frozenset({State.SENDING}), metadata={"user": "42"}) == [ids[0]]
    assert await listed(store, since=records[2].created_at) == ids[2:]
    assert await listed(store, kind="image_to_video") == ids
    assert await listed(store, kind="image_generate") == []
    assert await listed(store, states=frozenset()) == []


async def test_any_two_filters_go_together(store: Store) -> None:
    """Jobs of all states, two kinds, with common and rare metadata: each listing has what `JobQuery.matches` says."""
    chance = random.Random(14)
    records = []
    for number in range(1, 121):
        metadata = {"tenant": "a", **({"user": str(number % 40)} if number % 3 else {})} if number % 4 else {}
        kind = "image_generate" if number % 7 == 0 else "image_to_video"
        fresh = job(number, metadata=metadata, kind=kind, request=None, created_at=NOW + number // 3)
        records.append(await store.add(attrs.evolve(fresh, state=chance.choice([*State]))))
    records.sort(key=lambda record: (record.created_at, record.id))
    for _ in range(300):
        query = JobQuery(
            states=chance.choice([None, frozenset(chance.sample([*State], chance.randint(1, 4)))]),
            kind=chance.choice([None, "image_to_video", "image_generate"]),
            metadata=chance.choice(
                [{}, {"tenant": "a"}, {"user": "7"}, {"tenant": "a", "user": "7"}, {"user": "none"}]
            ),
            since=chance.choice([None, NOW + chance.randint(0, 45)]),
            newest_first=chance.choice([False, True]),
        )
        wanted = [record.id for record in records if query.matches(record)]
        assert [record.id async for record in store.jobs(query)] == wanted[:: -1 if query.newest_first else 1], query


async def test_metadata_and_retry_of_are_kept(store: Store) -> None:
    """Any text, by any name."""
    metadata = {"user": "42", "波": "🌊 \"quoted\" 'too'", "a.b": "$[0]", "%": "\\"}
    record = await applied(store, job(1, metadata=metadata, retry_of="f" * 32))
    await applied(store, job(2))
    await reopened_if_durable(store)
    kept, other = await store.get(record.id), await store.get(job(2).id)
    assert kept is not None and other is not None
    assert (dict(kept.metadata), kept.retry_of) == (metadata, "f" * 32)
    assert (dict(other.metadata), other.retry_of) == ({}, None)
    for name, value in metadata.items():
        assert await listed(store, metadata={name: value}) == [record.id]


async def test_a_listing_goes_on_while_jobs_come_and_go(store: Store) -> None:
    """Many pages: each job that is there all the time is listed once."""
    ids = [(await store.add(job(number))).id for number in range(1, 1202)]
    seen = []
    async for record in store.jobs():
        seen.append(record.id)
        if len(seen) == 3:
            await store.add(job(5_000))
    assert [job_id for job_id in seen if job_id in set(ids)] == ids


async def test_results_without_a_file_are_found(store: Store) -> None:
    record = await add_ended(store, 1, NOW + 10)
    await applied(store, job(2, asked=1), *ended(NOW + 10, "t-2", failed=True))
    await applied(store, job(3))
    saved = await add_ended(store, 4, NOW + 10)
    await store.change(saved.id, FileSaved(at=NOW, task_id="t-4", file="t-4.mp4"))
    await add_ended(store, 5, NOW)
    assert [each.id async for each in store.unsaved(NOW + 5)] == [record.id]


# --- retention -------------------------------------------------------------------------------------------------------


async def test_purge_keeps_what_no_consumer_has_acknowledged(store: Store) -> None:
    """Only where there are consumers: else nobody would ever acknowledge anything."""
    first, second = [await add_ended(store, number, NOW + number) for number in (1, 2)]
    nothing_bought = await applied(store, job(3), refused())
    assert await store.purge(10, now=NOW + 5) == 0
    await store.hand_over(NOW, lease_s=LEASE_S)
    await acknowledge(store, first.id)
    assert await store.purge(10, now=NOW + 100) == 2
    assert [record.id async for record in store.jobs()] == [second.id]
    assert await store.get(nothing_bought.id) is None
    await reopened_if_durable(store)
    assert await store.purge(10, now=NOW + 100) == 0


async def test_purge_without_consumers_forgets_every_end(store: Store) -> None:
    await add_ended(store, 1, NOW, metadata={"user": "42"})
    await applied(store, job(2))
    assert await store.purge(10, now=NOW + 100) == 1
    assert await listed(store, metadata={"user": "42"}) == []
    assert [record.id async for record in store.jobs()] == [job(2).id]
