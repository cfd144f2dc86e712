"""Promise 8: `kill -9` at every step and at random instants; no job is bought twice, every outcome is delivered."""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
from collections.abc import AsyncIterator, Iterator
from enum import Enum, auto
from pathlib import Path
from typing import Final

import pytest
from attrs import frozen
from crash import Forge, Lane, Totals, bring_to_an_end, call_back_again, forge, is_told, judge
from support import settle

from xiling_async.simulator import faults
from xiling_async.simulator.faults import Fault

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no fork, no kill -9")

IDLE_S: Final = 0.3  # a worker of whom nothing was heard for so long is killed where it stands
STEPS: Final = 45  # about what is said and seen of three jobs
JOBS: Final = 3  # new ones for each kill
KILLS: Final = 5  # of one store, before its jobs are brought to an end

# What happens to a job: as directives in its prompt, most often nothing.
FATES: Final = (
    *[""] * 8,
    "[sim:latency=0.004]",
    "[sim:latency=0.02]",
    "[sim:early_callback]",
    "[sim:early_callback] [sim:drop_after_accept]",
    "[sim:drop_after_accept]",
    "[sim:drop_after_accept] [sim:lost_callback]",
    "[sim:drop_mid_answer]",
    "[sim:hang=0.02] [sim:duplicate_callback]",
    "[sim:garbage] [sim:out_of_order]",
    "[sim:status=500]",
    "[sim:rate_limited=0]",
    "[sim:lost_callback] [sim:status_fault=500,404]",
    "[sim:progress_callback] [sim:latency=0.004]",
    "[sim:failed]",
)


@pytest.fixture(scope="module")
def smith() -> Iterator[Forge]:
    with forge() as made:
        yield made


# --- a wire that can be held ------------------------------------------------------------------------------------------


class Valve:
    """A connection to the service on which what is sent stays in flight until it is let through."""

    def __init__(self, server: asyncio.Server) -> None:
        self.base_url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        self.holds_something = asyncio.Event()
        self._held = b""
        self._port = 0

    def leads_to(self, port: int) -> None:
        self._port = port

    async def hold(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while piece := await reader.read(65536):
                self._held += piece
                if b"\r\n\r\n{" in self._held and self._held.endswith(b"}"):
                    self.holds_something.set()
        writer.close()

    async def let_through(self) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(self._held)
        await reader.readuntil(b"\r\n\r\n")
        writer.close()
        await writer.wait_closed()


@contextlib.asynccontextmanager
async def valve() -> AsyncIterator[Valve]:
    made: list[Valve] = []
    server = await asyncio.start_server(lambda reader, writer: made[0].hold(reader, writer), "127.0.0.1", 0)
    made.append(Valve(server))
    try:
        yield made[0]
    finally:
        server.close()
        await settle()


# --- named failpoints ------------------------------------------------------------------------------------------------


class Mail(Enum):
    """What becomes of the callbacks of a job whose worker died."""

    COMES = auto()  # they are sent, or sent again, when a worker listens again
    LOST = auto()  # they were sent once, while nobody listened


@frozen
class Failpoint:
    """Where the worker dies, how often the service saw the POST by the end, and what the user then knows.

    `dies` is a step of the worker's own store; else the name is a step on the wire, driven by `_die_on_the_wire`.
    """

    name: str
    dies: str
    posts: int
    paid: int
    comes: str  # the end when callbacks come
    lost: str  # the end when they are lost
    script: tuple[Fault, ...] = ()

    def __str__(self) -> str:
        return self.name.replace(" ", "-")


SLOW: Final = (faults.rate_limited(0),)
CUT: Final = (faults.drop_after_accept(),)

FAILPOINTS: Final = (
    #         where it dies                            its own step         posts paid callback comes, is lost
    Failpoint("before the intent commit",              "before add 1",          1, 1, "ended", "ended"),
    Failpoint("after the intent commit",               "after add 1",           0, 0, "uncertain", "uncertain"),
    Failpoint("POST sent, never read",                 "",                      0, 0, "uncertain", "uncertain"),
    Failpoint("POST sent, read after the death",       "",                      1, 1, "ended", "uncertain"),
    Failpoint("read, not accepted yet",                "",                      1, 0, "uncertain", "uncertain",
              (faults.hang_before_accept(),)),
    Failpoint("accepted, not answered yet",            "",                      1, 1, "ended", "uncertain"),
    Failpoint("answer received, before its commit",    "before Accepted 1",     1, 1, "ended", "uncertain"),
    Failpoint("after the commit of the answer",        "after Accepted 1",      1, 1, "ended", "ended"),
    Failpoint("first callback, before its commit",     "before Outcome 1",      1, 1, "ended", "ended"),
    Failpoint("first callback, before its 200",        "after Outcome 1",       1, 1, "ended", "ended"),
    Failpoint("last callback, before its commit",      "before Outcome 2",      1, 1, "ended", "ended"),
    Failpoint("last callback, before its 200",         "after Outcome 2",       1, 1, "ended", "ended"),
    Failpoint("after the 200",                         "",                      1, 1, "ended", "ended"),
    Failpoint("429, before its commit",                "before Refused 1",      1, 0, "uncertain", "uncertain", SLOW),
    Failpoint("429, after its commit",                 "after Refused 1",       2, 1, "ended", "ended", SLOW),
    Failpoint("429, before the second intent",         "before ResendStarted 1", 2, 1, "ended", "ended", SLOW),
    Failpoint("429, after the second intent",          "after ResendStarted 1", 1, 0, "uncertain", "uncertain", SLOW),
    Failpoint("answer cut, before that is written",    "before AnswerLost 1",   1, 1, "ended", "uncertain", CUT),
    Failpoint("answer cut, after that is written",     "after AnswerLost 1",    1, 1, "ended", "uncertain", CUT),
)  # fmt: skip
JOB: Final = ("one", "one", 2)


@pytest.mark.parametrize("mail", Mail, ids=lambda mail: mail.name.lower())
@pytest.mark.parametrize("failpoint", FAILPOINTS, ids=str)
async def test_promise_8_killed_at_each_step(failpoint: Failpoint, mail: Mail, smith: Forge, tmp_path: Path) -> None:
    """Dies there, starts again: sent and paid as often as the table says; delivered, or listed as uncertain."""
    async with valve() as before, smith.lane(tmp_path / "lane", manual=True) as lane:
        before.leads_to(lane.sim.port)
        if failpoint.name.startswith("POST sent"):
            lane.base_url = before.base_url
        lane.sim.script(*failpoint.script)
        await lane.start([JOB], dies=failpoint.dies)
        if failpoint.dies:
            await _let_it_die(lane)
        else:
            await _die_on_the_wire(lane, failpoint.name, before)
        lane.base_url = lane.sim.base_url
        if mail is Mail.LOST:
            for task_id in _unfinished(lane):
                assert await lane.sim.finish(task_id) is None, "nobody listens"
        await lane.start([JOB])
        await lane.until_said("bought")
        for task_id in _unfinished(lane):
            if mail is Mail.COMES:
                assert await lane.sim.finish(task_id) == 200
            else:
                lane.sim.set_result(task_id)
        if mail is Mail.COMES:
            await call_back_again(lane)
        await lane.until(lambda: is_told(lane, JOB[0]))
        await lane.enough()

        totals = Totals()
        judge(lane, [JOB[0]], totals, repeats=mail is Mail.COMES)
        assert totals.violations == []
        assert (len(lane.sim.ledger.posts), lane.sim.ledger.paid_submits) == (failpoint.posts, failpoint.paid)
        end = "ended" if totals.delivered == 2 else "uncertain"
        assert end == (failpoint.comes if mail is Mail.COMES else failpoint.lost)
        assert totals.uncertain + totals.unpaid == (end == "uncertain")


async def _let_it_die(lane: Lane) -> None:
    """It kills itself; where that is in a callback, the callbacks are sent."""
    if lane.dies.split()[1] == "Outcome":
        await lane.until_said("bought")
        answers = [await lane.sim.finish(task_id) for task_id in lane.sim.ledger.task_ids[: int(lane.dies.split()[2])]]
        assert answers[-1] is None, "it died before its 200"
    await lane.dead()
    assert lane.has_fired, lane.said


async def _die_on_the_wire(lane: Lane, name: str, before: Valve) -> None:
    match name:
        case "POST sent, never read" | "POST sent, read after the death":
            await before.holds_something.wait()
            await lane.kill()
            assert lane.sim.ledger.posts == []
            if name.endswith("after the death"):
                await before.let_through()
                await lane.sim.wait_for_posts(1)
        case "read, not accepted yet":
            await lane.sim.wait_for_posts(1)
            await lane.kill()
            assert lane.sim.ledger.paid_submits == 0
        case "accepted, not answered yet":
            lane.sim.hold_answers()
            await lane.sim.wait_for_posts(1)
            await lane.kill()
            lane.sim.release_answers()
            assert lane.sim.ledger.paid_submits == 1
        case "after the 200":
            await lane.until_said("bought")
            assert [await lane.sim.finish(task_id) for task_id in lane.sim.ledger.task_ids] == [200, 200]
            await lane.kill()
        case _:
            raise AssertionError(f"no such failpoint: {name}")


def _unfinished(lane: Lane) -> list[str]:
    return [task_id for task_id, status in lane.sim.ledger.tasks.items() if status == "PENDING"]


@pytest.mark.parametrize(
    "dies", [f"{when} {what} 1" for when in ("before", "after") for what in ("secret", "recover_orphans")]
)
async def test_killed_while_it_recovers(dies: str, smith: Forge, tmp_path: Path) -> None:
    """Two deaths in a row, the second one in the middle of the restart: nothing is lost, nothing is bought again."""
    async with smith.lane(tmp_path / "lane", manual=True) as lane:
        lane.sim.hold_answers()
        await lane.start([JOB])
        await lane.sim.wait_for_posts(1)
        await lane.kill()
        lane.sim.release_answers()
        await lane.start([JOB], dies=dies)
        await lane.dead()
        assert lane.has_fired
        await lane.start([JOB])
        await lane.until_said("bought", state="uncertain")
        assert [await lane.sim.finish(task_id) for task_id in lane.sim.ledger.task_ids] == [200, 200]
        await lane.until_said("ended")
        await lane.enough()
        totals = Totals()
        judge(lane, [JOB[0]], totals, repeats=True)
        assert (totals.violations, totals.adopted, len(lane.sim.ledger.posts)) == ([], 1, 1)


@pytest.mark.parametrize("dies", ["before Outcome 1", "after Outcome 1"])
async def test_killed_while_a_get_is_written(dies: str, smith: Forge, tmp_path: Path) -> None:
    """The poller's own commit is no different: it asks again, and what was written is not asked for again."""
    async with smith.lane(tmp_path / "lane") as lane:
        lane.sim.default(faults.lost_callback())
        await lane.start([JOB], dies=dies)
        await lane.dead()
        assert lane.has_fired
        asked = [get.task_id for get in lane.sim.ledger.gets]
        await bring_to_an_end(lane, [JOB], repeats=False)
        totals = Totals()
        judge(lane, [JOB[0]], totals, repeats=False)
        assert (totals.violations, totals.delivered, totals.paid) == ([], 2, 1)
        again = [get.task_id for get in lane.sim.ledger.gets][len(asked) :]
        assert (asked[0] in again) == dies.startswith("before")


async def test_a_sender_that_never_repeats_and_a_receiver_that_dies(smith: Forge, tmp_path: Path) -> None:
    """Each callback is sent once, the worker dies at each of them: the poller finds every outcome by GET."""
    jobs = [(f"{number}", f"{number}", 2) for number in range(6)]
    async with smith.lane(tmp_path / "lane", manual=True) as lane:
        await lane.start(jobs)
        for key, _, _ in jobs:
            await lane.until_said("bought", key=key)
        for number, task_id in enumerate(lane.sim.ledger.task_ids):
            if number:
                await lane.start(jobs, dies=("before Outcome 1", "after Outcome 1")[number % 2])
                await lane.until_said("open")
                assert await lane.sim.finish(task_id) is None, "it died before its 200"
                await lane.dead()
                assert lane.has_fired
            else:
                await lane.kill()
                assert await lane.sim.finish(task_id) is None, "nobody listens"
        assert lane.sim.ledger.callbacks[0].status is None
        await bring_to_an_end(lane, jobs, repeats=False)
        totals = Totals()
        judge(lane, [key for key, _, _ in jobs], totals, repeats=False)
        assert (totals.violations, totals.paid, totals.delivered) == ([], 6, 12)
        assert (totals.uncertain, len(lane.sim.ledger.posts), len(lane.sim.ledger.callbacks)) == (0, 6, 12)


async def test_killed_at_each_statement(
    smith: Forge, tmp_path: Path, deep: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """The n-th SQL statement of a worker is its last, for every n (every third without --deep), also inside commits."""
    totals, number, step = Totals(), 1, 1 if deep else 3
    while True:
        async with smith.lane(tmp_path / str(number), seed=number) as lane:
            await lane.start([JOB], dies=f"at sql {number}")
            if not await _fires(lane):
                await lane.kill()
                break
            await lane.dead()
            totals.kills += 1
            await bring_to_an_end(lane, [JOB], repeats=number % 2 == 0)
            judge(lane, [JOB[0]], totals, repeats=number % 2 == 0)
        number += step
    with capsys.disabled():
        print(f"\nkilled at SQL statement 1 to {number}: {totals}")
    assert totals.violations == []
    assert totals.kills * step > 40


async def _fires(lane: Lane) -> bool:
    """Whether the worker dies of itself before its job has ended."""
    await lane.until(lambda: lane.has_fired or lane.find("ended"))
    return lane.has_fired


# --- random instants -------------------------------------------------------------------------------------------------


async def history(lane: Lane, seed: int, totals: Totals, *, kills: int, writes_late: bool = False) -> None:
    """One store: new jobs with each worker, each worker killed somewhere, then all is brought to an end and judged."""
    dice = random.Random(seed)
    repeats = dice.random() < 0.5
    jobs: list[tuple[str, str, int]] = []
    for _ in range(kills):
        for _ in range(JOBS):
            key = f"{seed}-{len(jobs)}"
            jobs.append((key, f"{key} {dice.choice(FATES)}", dice.choice((1, 1, 2, 4))))
        steps = dice.randrange(STEPS)
        seen = _progress(lane)
        await lane.start(jobs[-2 * JOBS :], writes_late=writes_late)
        try:
            async with asyncio.timeout(IDLE_S):
                await lane.sim.ledger.until(lambda seen=seen, steps=steps: _progress(lane) >= seen + steps)  # type: ignore[misc]
        except TimeoutError:
            totals.idle_kills += 1
        await asyncio.sleep(dice.random() * 0.003)
        await lane.kill()
        totals.kills += 1
        if repeats and dice.random() < 0.3:
            await lane.sim.settled()
    await bring_to_an_end(lane, jobs, repeats=repeats, writes_late=writes_late)
    judge(lane, [key for key, _, _ in jobs], totals, repeats=repeats)


def _progress(lane: Lane) -> int:
    ledger = lane.sim.ledger
    return lane.progress + len(ledger.posts) + len(ledger.callbacks) + len(ledger.gets)


async def campaign(folder: Path, histories: range, *, kills: int, writes_late: bool = False) -> Totals:
    """Many histories, on two lanes at a time: one computes while the other one waits for the disk."""
    totals = Totals()
    seeds = iter(histories)

    async def run() -> None:
        with forge() as made:
            for seed in seeds:
                async with made.lane(folder / str(seed), seed=seed) as lane:
                    await history(lane, seed, totals, kills=kills, writes_late=writes_late)

    async with asyncio.TaskGroup() as lanes:
        for _ in range(2):
            lanes.create_task(run())
    return totals


async def test_promise_8_killed_at_random_instants(
    tmp_path: Path, deep: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """300 kills (5,000 with --deep): no job paid twice, none sent again, none lost; what is not told is uncertain."""
    totals = await campaign(tmp_path, range(1000 if deep else 60), kills=KILLS)
    with capsys.disabled():
        print(f"\nkilled at random instants: {totals}")
    assert totals.violations == []
    assert totals.kills >= 300
    assert min(totals.adopted, totals.uncertain, totals.unpaid) > 0, "the interesting cases did occur"
    assert totals.idle_kills < totals.kills / 2


async def test_the_harness_sees_what_a_late_intent_loses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The negative control: with the intent written after the answer, the same kills are found to buy jobs twice."""
    totals = await campaign(tmp_path, range(12), kills=KILLS, writes_late=True)
    with capsys.disabled():
        print(f"\nthe same with the intent written late: {totals}")
    assert sum("PAID 2 TIMES" in violation for violation in totals.violations) >= 3
