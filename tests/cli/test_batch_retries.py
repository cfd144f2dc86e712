"""`xiling batch` buys failed tasks again, and no more than it may: held against the simulator's own ledger."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from test_batch import OUT, PORT, QUICK, jsonl, paid, results, scenes
from test_submit import ended, started, xiling

from xiling_async.simulator import Simulator, faults

ONE_BY_ONE = ("--in-flight", "1")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def bought(sim: Simulator) -> list[tuple[str, int]]:
    """What was paid for, in order: prompt and number of videos."""
    bodies: list[dict[str, Any]] = [dict(post.body or {}) for post in sim.ledger.posts if post.paid]
    return [(body["prompt"], body["generate_count"]) for body in bodies]


def fail(sim: Simulator, *which: Sequence[int]) -> None:
    """For each of the next creates, the tasks that fail; none: all of them."""
    for places in which:
        sim.script(faults.failed("no face", which=places or None))


async def test_failed_tasks_of_a_row_are_bought_again(sim: Simulator) -> None:
    """Only those, and the row has all its videos; the same command, and the one without --retries, buy nothing more."""
    words = ("batch", str(jsonl(*scenes(2, generate_count=3))), *OUT, *PORT, *ONE_BY_ONE)
    fail(sim, (0, 2), (1,))
    done = await xiling(sim, *words, "--retries", "3")
    assert done.code == 0, done.out
    assert bought(sim) == [("scene 0", 3), ("scene 0", 2), ("scene 0", 1), ("scene 1", 3)]
    assert done.out.splitlines()[:3] == ["2 rows: 2 done", "4 jobs bought now", "6 videos in out"]
    lines = results()
    assert Counter(line["task_id"] for line in lines) == dict.fromkeys(sim.ledger.task_ids, 1)
    assert Counter((line["line"], line["ok"]) for line in lines) == {(1, True): 3, (1, False): 3, (2, True): 3}
    assert {line["key"] for line in lines if line["line"] == 1} == {lines[0]["key"]}
    assert len({line["job_id"] for line in lines if line["line"] == 1}) == 3
    assert all(Path("out", f"{line['task_id']}.mp4").exists() for line in lines if line["ok"])
    page = Path("out/index.html").read_text()
    assert page.count('<li class="clip" data-status="done"') == 6 == page.count('<li class="clip"')
    for options in (("--retries", "3"), (), ("--retry-failed",)):
        again = await xiling(sim, *words, *options)
        assert (again.code, again.out.splitlines()[1]) == (0, "0 jobs bought now, 4 before")
    assert (len(sim.ledger.posts), len(results())) == (4, 9)


async def test_so_often_and_no_more(sim: Simulator) -> None:
    """--retries N is of all runs together; --retry-failed buys once more in each run, and only what has failed."""
    words = ("batch", str(jsonl(*scenes(2))), *OUT, *PORT, *ONE_BY_ONE)
    fail(sim, (), (), ())
    done = await xiling(sim, *words, "--retries", "2")
    assert (done.code, paid(sim)) == (1, (4, 4))
    assert "line 1: bought: 1 of 1 task failed at the service" in done.out
    assert "--retry-failed does, once" in done.out
    assert (await xiling(sim, *words, "--retries", "2")).code == 1
    assert (await xiling(sim, *words, "--retries", "1")).code == 1
    assert paid(sim) == (4, 4)
    asked = await xiling(sim, *words, "--retry-failed", "--dry-run")
    assert asked.out.splitlines()[1:] == [
        "2 jobs bought before: not bought again", "to buy: 0 jobs, 0 videos", "to buy again: 1 failed video",
    ]  # fmt: skip
    fail(sim, ())
    assert (await xiling(sim, *words, "--retry-failed")).code == 1
    assert paid(sim) == (5, 5)
    assert (await xiling(sim, *words, "--retry-failed")).code == 0
    assert (await xiling(sim, *words, "--retry-failed")).code == 0
    assert paid(sim) == (6, 6)
    assert Counter(line["ok"] for line in results()) == {True: 2, False: 4}


async def test_new_rows_do_not_wait_for_those_that_are_bought_again() -> None:
    """With rows of several kinds, as many jobs run at once as may."""
    async with Simulator(manual=True) as sim:
        words = ("batch", str(jsonl(*scenes(2))), *OUT, *PORT, "--in-flight", "3")
        async with started(sim, *words) as process:
            await sim.ledger.until(lambda: len(sim.ledger.posts) == 2)
            for task_id in list(sim.ledger.task_ids):
                await sim.finish(task_id, "FAILED")
            assert (await ended(process)).code == 1
        jsonl(*scenes(6))
        async with started(sim, *words, "--retry-failed") as process:
            await sim.ledger.until(lambda: len(sim.ledger.posts) == 5)
            assert {prompt for prompt, _ in bought(sim)[2:]} > {"scene 0", "scene 1"}
            for number in range(6):
                await sim.ledger.until(lambda number=number: len(sim.ledger.task_ids) > 2 + number)  # type: ignore[misc]
                assert len(sim.ledger.posts) <= 2 + number + 3
                await sim.finish(sim.ledger.task_ids[2 + number])
            done = await ended(process)
        assert (done.code, paid(sim)) == (0, (8, 8)), done.out


@pytest.mark.parametrize("option", [("--retries", "1"), ("--retry-failed",)], ids=" ".join)
async def test_killed_while_it_buys_again(option: tuple[str, ...]) -> None:
    """Killed when the retries of some rows are bought, and some are at the service: each is bought once."""
    async with Simulator(manual=True) as sim:
        words = ("batch", str(jsonl(*scenes(4))), *OUT, *QUICK)
        async with started(sim, *words, *(option if "--retries" in option else ())) as process:
            await sim.ledger.until(lambda: len(sim.ledger.posts) == 4)
            for task_id in list(sim.ledger.task_ids):
                sim.set_result(task_id, "FAILED")
            if option == ("--retry-failed",):
                assert (await ended(process)).code == 1
            else:
                await sim.ledger.until(lambda: len(sim.ledger.task_ids) >= 6)
                process.kill()
                await ended(process)
        for _ in range(2):
            async with started(sim, *words, *option) as process:
                await sim.ledger.until(lambda: len(sim.ledger.task_ids) >= 7)
                process.send_signal(signal.SIGKILL)
                await ended(process)
        async with started(sim, *words, *option) as process:
            everything_bought = asyncio.create_task(sim.ledger.until(lambda: len(sim.ledger.task_ids) == 8))
            over = asyncio.create_task(process.wait())  # a POST that was killed on its way is never sent again
            await asyncio.wait({everything_bought, over}, return_when=asyncio.FIRST_COMPLETED)
            everything_bought.cancel()
            for task_id in sim.ledger.task_ids[4:]:
                sim.set_result(task_id)
            done = await ended(process)
            await over
        assert max(Counter(bought(sim)).values()) == 2
        in_doubt = done.out.count("may have been bought: ")
        assert done.code == int(in_doubt > 0)
        assert 8 - in_doubt <= sim.ledger.paid_submits <= 8
        assert len(results()) == 8 - in_doubt


async def test_a_retry_whose_answer_was_lost(sim: Simulator) -> None:
    """It may have been bought: it is said, and never sent again, by no option."""
    words = ("batch", str(jsonl(*scenes(1))), *OUT, *QUICK)
    fail(sim, ())
    sim.script(faults.drop_after_accept())
    done = await xiling(sim, *words, "--retries", "5")
    assert done.code == 1
    assert "line 1: may have been bought: " in done.out and "1 row: 0 done, 1 not" in done.out
    for option in (("--retries", "9"), ("--retry-failed",), ()):
        assert (await xiling(sim, *words, *option)).code == 1
    assert paid(sim) == (2, 2)


async def test_no_more_videos_than_may_be(sim: Simulator) -> None:
    """--max-videos: the rows beyond are named as not bought, exit code 1; each later run goes on with as many."""
    words = ("batch", str(jsonl(*scenes(4, generate_count=2))), *OUT, *PORT, "--max-videos", "5")
    foretold = await xiling(sim, *words, "--dry-run")
    assert foretold.out.splitlines()[-1] == "at most 5 videos in one run"
    done = await xiling(sim, *words)
    assert (done.code, paid(sim)) == (1, (2, 2))
    assert done.out.splitlines()[:2] == ["4 rows: 2 done, 2 not", "2 jobs bought now"]
    assert done.out.count(": not bought: --max-videos was reached before it") == 2
    assert "tried again by the same command" in done.out
    assert len(results()) == 4
    assert "--max-videos 5" in Path("out/index.html").read_text()
    done = await xiling(sim, *words)
    assert (done.code, paid(sim), len(results())) == (0, (4, 4), 8)


async def test_what_is_bought_again_counts(sim: Simulator) -> None:
    """A retry beyond --max-videos is not bought; its row stays failed, and a later run goes on."""
    words = ("batch", str(jsonl(*scenes(1))), *OUT, *PORT, "--retries", "1", "--max-videos", "1")
    fail(sim, ())
    done = await xiling(sim, *words)
    assert (done.code, paid(sim)) == (1, (1, 1))
    assert "line 1: bought: --max-videos was reached before it" in done.out
    done = await xiling(sim, *words)
    assert (done.code, paid(sim)) == (0, (2, 2))
