"""Registry and store against a plain dictionary: any sequence of events, waiters and restarts ends the same."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Final, TypeVar

import attrs
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support import model_v, settle

from xiling_async import ClientClosed, Failed, MemoryStore, SQLiteStore, State, Succeeded, Video
from xiling_async.jobs.entry import JobEntry
from xiling_async.jobs.registry import Registry
from xiling_async.models.lifecycle import (
    Abandoned,
    Accepted,
    AnswerLost,
    Change,
    Event,
    OutcomeReported,
    PollScheduled,
    Refused,
    ResendStarted,
)
from xiling_async.models.record import JobRecord, Refusal
from xiling_async.stores.base import Store

T = TypeVar("T")

MEMORY: Final = "/dev/shm"  # no power is cut here: a disk would only make it slow
WHY: Final = Refusal(error="SubmitUncertain", message="why")
DOUBT_S: Final = 500.0
LEASE_S: Final = 120.0
ENDS: Final = ("done", "failed")
NOT_BOUGHT: Final = ("not_sent", "rejected")
FINAL: Final = (*ENDS, *NOT_BOUGHT, "expired", "unknown")

KEYS: Final = st.sampled_from((None, "a", "b"))
POOL: Final = tuple(f"t{number}" for number in range(7))  # few, so that jobs claim each other's
TASKS: Final = st.sampled_from(POOL)
IDS: Final = st.lists(TASKS, min_size=1, max_size=4, unique=True).map(tuple)
OUTCOMES: Final = st.sampled_from((None, "ok", "ok", "bad"))
ATTEMPTS: Final = st.sampled_from((0, 0, 0, 0, -1, 1))  # off by so many


@attrs.define(eq=False)
class Waiter:
    """Somebody who waits for the end of a job; `cancelled` by us."""

    job_id: str
    slot: JobEntry
    task: asyncio.Task[JobRecord]
    cancelled: bool = False


class ChangeLog(list[JobRecord]):
    """Every record that the registry reports as changed."""

    def changed(self, record: JobRecord) -> None:
        self.append(record)


class Machine(RuleBasedStateMachine):
    """`model`: job id to a plain dictionary of what must be remembered of it."""

    jobs: Bundle[str] = Bundle("jobs")

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.loop.set_debug(False)  # whatever the interpreter runs with: it takes ten times as long
        self.folder = tempfile.TemporaryDirectory(dir=MEMORY if Path(MEMORY).is_dir() else None)
        self.now = 1_000_000.0
        self.model: dict[str, dict[str, Any]] = {}
        self.owner: dict[str, str] = {}
        self.waiters: list[Waiter] = []
        self.told = ChangeLog()
        self.store: Store = self.new_store()
        self.run(self.store.open())
        self.registry = Registry(self.store, observers=[self.told])

    def new_store(self) -> Store:
        return MemoryStore()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        async def work_and_settle() -> T:
            result = await work
            await settle(4)
            return result

        return self.loop.run_until_complete(work_and_settle())

    def teardown(self) -> None:
        try:
            self.run(self.registry.close())
            self.run(self.store.close())
            assert all(waiter.task.done() for waiter in self.waiters)
            for waiter in self.waiters:
                waiter.task.cancelled() or waiter.task.exception()
        finally:
            self.loop.close()
            self.folder.cleanup()

    def apply(self, job_id: str, event: Event, expected: str) -> None:
        """Apply this event; its verdict is the expected one, and whoever must hear of it has heard."""
        before, heard = self.run(self.store.get(job_id)), len(self.told)
        change = self.run(self.registry.apply(job_id, event))
        assert change.verdict.value == expected
        if expected == "applied":
            assert before is not None
            told = [record.version for record in self.told[heard:] if record.id == job_id]
            assert told == [before.version + 1]
        else:
            assert (change.record, len(self.told)) == (before, heard), "nothing has changed"

    # --- what may happen

    @rule(target=jobs, key=KEYS, count=st.integers(1, 4))
    def open(self, key: str | None, count: int) -> Any:
        self.now += 1
        job_id = f"{len(self.model) + 1:032x}"
        held = [known for known, job in self.model.items() if key is not None and job["key"] == key]
        record = JobRecord(
            id=job_id, kind="image_to_video", key=key, request=model_v(count=count), asked=count, created_at=self.now,
            changed_at=self.now,
        )  # fmt: skip
        slot = self.run(self.registry.open(record))
        assert slot.record.id == (held[0] if held else job_id)
        if held:
            return multiple()
        self.model[job_id] = {
            "key": key, "state": "sending", "attempt": 1, "ids": (), "ends": {}, "asked": count, "wanted": count,
            "due": None, "named": 0,
        }  # fmt: skip
        return job_id

    @rule(job_id=jobs, ids=IDS, off=ATTEMPTS)
    def answered(self, job_id: str, ids: tuple[str, ...], off: int) -> None:
        job, due = self.model[job_id], self._later()
        event = Accepted(attempt=job["attempt"] + off, at=self.now, task_ids=ids, due_at=due)
        room = max(0, max(job["asked"], job["wanted"]) - len(ids))
        merged = (*ids, *[task_id for task_id in job["ids"] if task_id not in ids][:room])
        is_later = off > 0 and not job["ids"]
        if off and not is_later:
            expected = "unknown_task"
        elif job["state"] in NOT_BOUGHT and not is_later:
            expected = "refused"
        elif job["state"] in ("accepted", *ENDS) and merged == job["ids"] and len(merged) == job["asked"]:
            is_news = job["named"] != len(merged) - len(ids)
            self._verdict(job_id, event, "applied" if is_news else "already so")
            job["named"] = len(merged) - len(ids)
            return
        else:
            expected = self._belongs(job_id, merged, is_answer=True)
        self._verdict(job_id, event, expected)
        if expected == "applied":
            self._give_way(job_id, merged)
            job["attempt"] += off
            job["named"] = len(merged) - len(ids)
            job["ends"] = {task_id: end for task_id, end in job["ends"].items() if task_id in merged}
            self._progressed(job_id, merged, len(merged), due)

    @rule(job_id=jobs, sent=st.booleans(), off=ATTEMPTS)
    def refused(self, job_id: str, sent: bool, off: int) -> None:
        job = self.model[job_id]
        is_legal = job["state"] in ("sending", "uncertain", "unknown")
        expected = "unknown_task" if off else "applied" if is_legal else "refused"
        self._verdict(job_id, Refused(attempt=job["attempt"] + off, at=self.now, refusal=WHY, sent=sent), expected)
        if expected == "applied":
            job.update(state="rejected" if sent else "not_sent", due=None)

    @rule(job_id=jobs, off=ATTEMPTS)
    def lost(self, job_id: str, off: int) -> None:
        job, due = self.model[job_id], self._later()
        expected = "unknown_task" if off else "applied" if job["state"] == "sending" else "refused"
        self._verdict(job_id, AnswerLost(attempt=job["attempt"] + off, at=self.now, refusal=WHY, due_at=due), expected)
        if expected == "applied":
            job.update(state="uncertain", due=due)

    @rule(job_id=jobs, task_id=TASKS, outcome=OUTCOMES, off=ATTEMPTS)
    def heard(self, job_id: str, task_id: str, outcome: str | None, off: int) -> None:
        job, due = self.model[job_id], self._later()
        is_over, is_new = job["state"] in ENDS, task_id not in job["ids"]
        ids = (*job["ids"], task_id) if is_new else job["ids"]
        before = job["ends"].get(task_id)
        if (off and (off < 0 or job["ids"])) or (is_new and len(job["ids"]) >= max(job["asked"], job["wanted"])):
            expected = "unknown_task"
        elif before is not None and outcome is not None:
            expected = "already so" if before == outcome else "conflict"
        elif outcome is None and (is_over or (not is_new and job["state"] == "accepted")):
            expected = "already so"
        else:
            expected = self._belongs(job_id, ids)
        end = _end(task_id, outcome)
        event = OutcomeReported(attempt=job["attempt"] + off, at=self.now, task_id=task_id, outcome=end, due_at=due)
        self._verdict(job_id, event, expected)
        if expected == "applied":
            job["attempt"] += off
            job["named"] += is_new
            if outcome is not None:
                job["ends"][task_id] = outcome
            due = job["due"] if job["state"] == "accepted" else due
            self._progressed(job_id, ids, max(job["asked"], len(ids)), due)

    @rule(job_id=jobs, was=st.sampled_from((None, State.UNCERTAIN, State.ACCEPTED)))
    def gave_up(self, job_id: str, was: State | None) -> None:
        job = self.model[job_id]
        is_legal = job["state"] in ("uncertain", "accepted") and was in (None, job["state"])
        self._verdict(job_id, Abandoned(at=self.now, was=was), "applied" if is_legal else "refused")
        if is_legal:
            job.update(state="expired" if job["state"] == "accepted" else "unknown", due=None)

    @rule(job_id=jobs, failed=st.booleans())
    def asked(self, job_id: str, failed: bool) -> None:
        job, due = self.model[job_id], self._later()
        is_legal = job["state"] == "accepted"
        self._verdict(
            job_id, PollScheduled(at=self.now, due_at=due, failed=failed), "applied" if is_legal else "refused"
        )
        if is_legal:
            job["due"] = due

    @rule(job_id=jobs)
    def resent(self, job_id: str) -> None:
        job = self.model[job_id]
        is_legal = job["state"] in NOT_BOUGHT
        self._verdict(job_id, ResendStarted(at=self.now), "applied" if is_legal else "refused")
        if is_legal:
            job.update(state="sending", attempt=job["attempt"] + 1, due=None)

    @rule(outcome=OUTCOMES)
    def heard_of_nobody(self, outcome: str | None) -> None:
        event = OutcomeReported(attempt=1, at=self.now, task_id="t0", outcome=_end("t0", outcome), due_at=None)
        assert self.run(self.registry.apply("f" * 32, event)).verdict.value == "no job"

    @rule(seconds=st.sampled_from((0.0, 50.0, 400.0, 2000.0)), limit=st.sampled_from((1, 2, 64)))
    def claim(self, seconds: float, limit: int) -> None:
        """Those that are due, the longest first, at most `limit`; they are leased."""
        self.now += seconds
        due = sorted((job["due"], job_id) for job_id, job in self.model.items() if job["due"] is not None)
        expected = [job_id for due_at, job_id in due if due_at <= self.now][:limit]
        claimed = self.run(self.store.claim(self.now, limit=limit, lease_s=LEASE_S))
        assert {record.id for record in claimed} == set(expected)
        for record in claimed:
            assert record.due_at == self.now + LEASE_S
            self.model[record.id]["due"] = record.due_at

    @rule(is_new=st.booleans())
    def restart(self, is_new: bool) -> None:
        """The client ends and another one begins: what was being sent is uncertain, waiters are sent home."""
        self.now += 1
        self.run(self.registry.close())
        for waiter in self.waiters:
            assert waiter.task.done()
            if not waiter.cancelled and waiter.task.exception() is not None:
                assert isinstance(waiter.task.exception(), ClientClosed)
        self.waiters.clear()
        self.run(self.store.close())
        if is_new:
            self.store = self.reopened(self.store)
        self.run(self.store.open())
        count = self.run(self.store.recover_orphans(self.now, doubt_s=DOUBT_S, per_second=10))
        is_open = [job for job in self.model.values() if job["state"] not in FINAL]
        assert count == len(is_open)
        for job_id, job in self.model.items():
            if job["state"] == "sending":
                job.update(state="uncertain", due=self.now + DOUBT_S)
            elif job["state"] == "uncertain":
                job["due"] = min(job["due"], self.now + DOUBT_S)
            elif job["state"] == "accepted":
                record = self.run(self.store.get(job_id))
                assert record is not None and record.due_at is not None
                assert self.now <= record.due_at <= self.now + min(60, len(is_open) / 10)
                job["due"] = record.due_at
        self.registry = Registry(self.store, observers=[self.told])

    def reopened(self, store: Store) -> Store:
        return store

    @precondition(lambda self: len(self.waiters) < 6)
    @rule(job_id=jobs, by=st.sampled_from(("id", "key", "task")))
    def wait(self, job_id: str, by: str) -> None:
        """Somebody finds the job by one of its names, and waits for its end."""
        job = self.model[job_id]
        name = job_id if by == "id" else job["key"] if by == "key" else next(iter(job["ids"]), None)
        slot = self.run(self.registry.find(job_id if name is None else name))
        assert slot is not None
        slot = self.run(self.registry.up_to_date(slot))
        assert slot.record.id == job_id
        work = self.registry.wait(slot, lambda record: record.state.is_final)
        self.waiters.append(Waiter(job_id, slot, self.loop.create_task(work)))
        self.run(settle(2))

    @precondition(lambda self: self.waiters)
    @rule(luck=st.randoms(use_true_random=False))
    def cancel_a_waiter(self, luck: Any) -> None:
        waiter = luck.choice(self.waiters)
        waiter.cancelled = waiter.task.cancel() or waiter.cancelled
        self.run(settle(2))

    # --- what must hold

    @invariant()
    def the_store_holds_the_model(self) -> None:
        self.run(self._compare())

    async def _compare(self) -> None:
        for job_id, job in self.model.items():
            record = await self.store.get(job_id)
            assert record is not None
            told = {outcome.task_id: outcome for outcome in record.outcomes if outcome is not None}
            assert {
                "key": record.key, "state": record.state.value, "attempt": record.attempt, "ids": record.task_ids,
                "ends": {task_id: "ok" if isinstance(end, Succeeded) else "bad" for task_id, end in told.items()},
                "asked": record.asked, "wanted": job["wanted"], "due": record.due_at, "named": record.unconfirmed,
            } == job  # fmt: skip
            assert told == {task_id: _end(task_id, end) for task_id, end in job["ends"].items()}
            assert [outcome and outcome.task_id for outcome in record.outcomes] == [
                task_id if task_id in told else None for task_id in record.task_ids
            ]
            if job["key"] is not None:
                assert await self.store.by_key(job["key"]) == record
        owners = {task_id: job_id for job_id, job in self.model.items() for task_id in job["ids"]}
        for task_id in POOL:
            owner = await self.store.by_task(task_id)
            assert (None if owner is None else owner.id) == owners.get(task_id)
        due = [job["due"] for job in self.model.values() if job["due"] is not None]
        assert await self.store.next_due() == min(due, default=None)

    @invariant()
    def waiters_hear_of_the_end_and_of_nothing_else(self) -> None:
        for waiter in self.waiters:
            if waiter.cancelled:
                assert waiter.task.done()
            elif waiter.task.done():
                assert waiter.task.result().state.is_final
            else:
                assert self.model[waiter.job_id]["state"] not in FINAL
            assert waiter.slot.record.state.value == self.model[waiter.job_id]["state"]

    # --- helpers

    def _later(self) -> float:
        self.now += 1
        return self.now + 300

    def _belongs(self, job_id: str, ids: tuple[str, ...], *, is_answer: bool = False) -> str:
        """A task of another job is a strange one; an answer may take one that only a callback gave to the other."""
        others = {
            task_id
            for other, job in self.model.items()
            if other != job_id
            for task_id in job["ids"][: len(job["ids"]) - job["named"] * is_answer]
        }
        return "unknown_task" if others & set(ids) else "applied"

    def _give_way(self, job_id: str, ids: tuple[str, ...]) -> None:
        for other, job in self.model.items():
            if other != job_id and set(job["ids"]) & set(ids):
                kept = tuple(task_id for task_id in job["ids"] if task_id not in ids)
                named = job["named"] - (len(job["ids"]) - len(kept))
                ends = {task_id: end for task_id, end in job["ends"].items() if task_id in kept}
                due = self.now if kept else self.now + 3600
                job.update(state="accepted" if kept else "uncertain", ids=kept, named=named, ends=ends, due=due)

    def _verdict(self, job_id: str, event: Event, expected: str) -> None:
        self.apply(job_id, event, "repeat" if expected == "already so" else expected)

    def _progressed(self, job_id: str, ids: tuple[str, ...], asked: int, due: float | None) -> None:
        job = self.model[job_id]
        is_over = len(ids) >= asked and set(job["ends"]) == set(ids)
        state = "accepted" if not is_over else "failed" if "bad" in job["ends"].values() else "done"
        job.update(state=state, ids=ids, asked=asked, due=None if is_over else due)


def _end(task_id: str, outcome: str | None) -> Succeeded[Video] | Failed | None:
    match outcome:
        case "ok":
            return Succeeded(task_id, Video(task_id=task_id, video_url=f"https://media.example/{task_id}.mp4"))
        case "bad":
            return Failed(task_id, "No face")
        case _:
            return None


class SQLiteMachine(Machine):
    """The same over a file; a restart may be another process's: a fresh store on the same file."""

    def new_store(self) -> Store:
        return SQLiteStore(Path(self.folder.name) / "jobs.db")

    def reopened(self, store: Store) -> Store:
        return self.new_store()


@pytest.mark.parametrize("machine", [Machine, SQLiteMachine])
def test_registry_and_store_do_what_the_dictionary_does(machine: type[Machine], deep: bool) -> None:
    """Memory and SQLite: every verdict, record, index, due time and waiter is what the dictionary says."""
    # Without --deep the same sequences each time.
    run_state_machine_as_test(machine, settings=settings(stateful_step_count=40, derandomize=not deep))


class _HastyStore(MemoryStore):
    async def change(self, job_id: str, event: Event) -> Change:
        if isinstance(event, Abandoned):
            event = attrs.evolve(event, was=None)
        return await super().change(job_id, event)


class _HastyMachine(Machine):
    def new_store(self) -> Store:
        return _HastyStore()


def test_the_machine_sees_a_store_that_gives_up_what_was_adopted() -> None:
    """The negative control: a store that does not look which state was waited in is told from the dictionary."""
    quickly = settings(max_examples=100, phases=[Phase.generate], report_multiple_bugs=False, derandomize=True)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(_HastyMachine, settings=quickly)
