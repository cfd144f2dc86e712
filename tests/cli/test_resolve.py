"""`xiling resolve`: an uncertain job is settled by hand, and its key is bought at most once more."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_submit import IMAGE, QUICK, STORED, paid, xiling

from xiling_async.simulator import Simulator, faults

KEY = ("--key", "order-42")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


async def uncertain(sim: Simulator, *given: faults.Fault) -> None:
    """A job whose answer was lost, in the store."""
    sim.script(*given)
    ran = await xiling(sim, "submit", "waves", *IMAGE, *STORED, *KEY, "--json")
    assert (ran.code, ran.told["state"]) == (1, "uncertain")


async def test_a_job_is_told_which_tasks_it_bought(sim: Simulator) -> None:
    """With the id from the vendor's list the job is awaited to its end; its key buys nothing more."""
    await uncertain(sim, faults.drop_after_accept())
    (task_id,) = sim.ledger.task_ids
    ran = await xiling(sim, "resolve", "order-42", *STORED, "--task-id", task_id)
    assert ran.code == 0, ran.err
    assert "xiling wait --store jobs.db" in ran.out
    done = await xiling(sim, "wait", "order-42", *STORED, *QUICK)
    assert (done.code, len(done.urls)) == (0, 1)
    again = await xiling(sim, "submit", "waves", *IMAGE, *STORED, *KEY, *QUICK)
    assert (again.code, paid(sim)) == (0, (1, 1))


async def test_a_job_that_bought_nothing_is_bought_when_its_key_comes_again(sim: Simulator) -> None:
    """`--not-bought` frees the key: the next submit is its one paid POST."""
    await uncertain(sim, faults.garbage())
    before = paid(sim)
    ran = await xiling(sim, "resolve", "order-42", *STORED, "--not-bought")
    assert ran.code == 0, ran.err
    again = await xiling(sim, "submit", "waves", *IMAGE, *STORED, *KEY, *QUICK)
    assert (again.code, paid(sim)) == (0, (before[0] + 1, before[1] + 1))


async def test_what_cannot_be_resolved(sim: Simulator) -> None:
    """No such job, a job whose fate is known, neither or both options, no store: in words, nothing changed."""
    assert (await xiling(sim, "resolve", "order-42", *STORED, "--not-bought")).code == 1
    assert (await xiling(sim, "submit", "waves", *IMAGE, *STORED, *KEY, *QUICK)).code == 0
    for words in (("order-43", "--not-bought"), ("order-42", "--not-bought"), ("order-42", "--task-id", "other")):
        ran = await xiling(sim, "resolve", *words, *STORED)
        assert (ran.code, ran.out) == (2, "")
        assert "Nothing was changed" in ran.error
    for options in ((), ("--not-bought", "--task-id", "t")):
        assert (await xiling(sim, "resolve", "order-42", *STORED, *options)).code == 2
    assert paid(sim) == (1, 1)
