"""The gate, the even rate, the start after a standstill, patience while the service is away: all in virtual time."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from support import settle, started

from xiling_async.api.throttle import FAILURES_IN_A_ROW, MEAN_OVER_S, SLOWEST_START, Gate, Outage, Rate, Tempo
from xiling_async.testing.clock import ManualClock


def half() -> float:
    return 0.5


def over(outage: Outage) -> bool:
    return outage.is_over


def outage_of(clock: ManualClock) -> tuple[Outage, Tempo, Gate]:
    gate, tempo = Gate(clock), Tempo(clock)
    return Outage(gate, tempo, clock, half), tempo, gate


async def test_a_closed_gate_holds_everybody_until_its_time() -> None:
    """The longest closing counts; a shorter one does not open it sooner."""
    clock = ManualClock()
    gate = Gate(clock)
    gate.close_for(30)
    gate.close_for(5)
    waiting = [await started(gate.passed()) for _ in range(3)]
    clock.advance(29.9)
    await settle()
    assert not any(task.done() for task in waiting)
    clock.advance(0.1)
    await asyncio.gather(*waiting)
    assert clock.pending == 0


async def test_a_gate_that_gives_up_sends_everybody_home() -> None:
    clock = ManualClock()
    gate = Gate(clock)
    gate.close_for(300)
    waiting = await started(gate.passed())
    gate.give_up()
    await waiting
    assert gate.is_open


def test_a_rate_spreads_its_turns_and_saves_none_up() -> None:
    """Four a second; after a minute of silence still one at a time."""
    clock = ManualClock()
    rate = Rate(4, clock)
    assert [rate.reserve() for _ in range(4)] == pytest.approx([0, 0.25, 0.5, 0.75])
    clock.advance(60)
    assert [rate.reserve() for _ in range(3)] == pytest.approx([0, 0.25, 0.5])


def _seconds(tempo: Tempo, clock: ManualClock, turns: int) -> list[float]:
    """When each of so many that queue at once may go, from now."""
    return [tempo.reserve() for _ in range(turns)]


def test_a_start_after_a_standstill_keeps_the_pace_of_before() -> None:
    """Ten a second for 20 s, then a stop: twenty that queued up take about two seconds, not none."""
    clock = ManualClock()
    tempo = Tempo(clock)
    for _ in range(200):
        tempo.count()
        clock.advance(0.1)
    tempo.standstill()
    turns = _seconds(tempo, clock, 20)
    assert turns[0] == 0
    assert all(after > before for before, after in itertools.pairwise(turns))
    # The count decays over a minute: the mean of 20 s is seen a little too low, never too high.
    assert 1.9 <= turns[-1] <= 19 / 10 / 0.8
    assert max(sum(second <= turn < second + 1 for turn in turns) for second in range(3)) <= 2 * 10


def test_the_start_grows_faster_and_ends_with_its_queue() -> None:
    """A minute after the stop the pace has doubled; when nobody queues any more there is no limit."""
    clock = ManualClock()
    tempo = Tempo(clock)
    for _ in range(120):
        tempo.count()
        clock.advance(1)
    tempo.standstill()
    first = _seconds(tempo, clock, 3)
    clock.advance(MEAN_OVER_S)
    assert tempo.reserve() == 0, "the queue is gone"
    assert _seconds(tempo, clock, 50) == [0] * 50
    tempo.standstill()
    clock.advance(MEAN_OVER_S)
    later = _seconds(tempo, clock, 3)
    assert later[2] - later[1] == pytest.approx((first[2] - first[1]) / 2, rel=0.05)


def test_a_very_slow_past_does_not_hold_anybody_for_long() -> None:
    """One in a hundred seconds before: afterwards one a second."""
    clock = ManualClock()
    tempo = Tempo(clock)
    tempo.count()
    clock.advance(100)
    tempo.standstill()
    assert _seconds(tempo, clock, 2)[1] == pytest.approx(1 / SLOWEST_START)


def test_without_a_standstill_there_is_no_limit() -> None:
    clock = ManualClock()
    tempo = Tempo(clock)
    assert _seconds(tempo, clock, 10) == [0] * 10
    tempo.standstill()
    assert _seconds(tempo, clock, 10) == [0] * 10, "nothing was ever done: there is no pace to keep"


async def test_tries_get_rarer_while_the_service_is_away() -> None:
    """Half of 0.5, 1, 2, ... seconds; those that fail together are one try; an answer ends it."""
    clock = ManualClock()
    outage, _, _ = outage_of(clock)
    outage.answered()
    waits = []
    for _ in range(8):
        for _ in range(64):
            outage.unreachable()
        waiting, begun = await started(outage.passed()), clock.time()
        while not waiting.done():
            clock.advance(0.125)
            await settle(5)
        waits.append(clock.time() - begun)
    assert waits == [0.25, 0.5, 1, 2, 4, 8, 10, 10]
    assert outage.may_wait(600)
    assert not outage.may_wait(30)
    outage.answered()
    assert over(outage)
    assert not outage.may_wait(600), "there is nothing to wait for"
    outage.unreachable()
    assert not over(outage)
    clock.advance(0.25)
    assert over(outage), "it begins anew"


async def test_a_service_that_never_answered_is_not_waited_for() -> None:
    outage, _, _ = outage_of(ManualClock())
    outage.unreachable()
    assert not outage.may_wait(600)


async def test_a_row_of_doubtful_ends_is_an_outage() -> None:
    """Each POST that gets a 500 may cost money: after a few in a row the patient wait; one in between is none."""
    outage, _, gate = outage_of(ManualClock())
    for _ in range(FAILURES_IN_A_ROW - 1):
        outage.doubtful()
    outage.answered()
    for _ in range(FAILURES_IN_A_ROW - 1):
        outage.doubtful()
    assert over(outage)
    outage.doubtful()
    assert not over(outage)
    assert gate.is_open, "who is not patient does not wait"
    waiting = await started(outage.passed())
    gate.give_up()
    await waiting
