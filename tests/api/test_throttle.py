"""When a request may leave: order, rate, pauses, outages; all in virtual time."""

from __future__ import annotations

import asyncio
import random

import pytest
from support import gone, settle, started

from xiling_async import ClientClosed
from xiling_async.api.throttle import FAILING_IN_A_ROW, PROBE_CAP_S, REPEATS, Throttle
from xiling_async.testing.clock import ManualClock

MONTH_S = 30 * 24 * 3600.0


class Even(random.Random):
    """Every roll is a half."""

    def random(self) -> float:
        return 0.5


def throttle_of(clock: ManualClock, per_second: float | None = None) -> Throttle:
    return Throttle(clock, Even(), per_second=per_second)


async def test_a_closed_throttle_holds_everybody_until_its_time() -> None:
    """The longest closing counts; a shorter one does not open it sooner."""
    clock = ManualClock()
    throttle = throttle_of(clock)
    throttle.pause_for(30)
    throttle.pause_for(5)
    waiting = [await started(throttle.take_slot()) for _ in range(3)]
    clock.advance(29.9)
    await settle()
    assert not any(task.done() for task in waiting)
    clock.advance(0.1)
    await asyncio.gather(*waiting)
    assert (clock.pending, throttle.paused_until) == (0, None)


async def test_its_end_is_not_open() -> None:
    """Whoever waits for a slot, a pause or an outage when it ends, or comes later, gets `ClientClosed`."""
    clock = ManualClock()
    throttle = throttle_of(clock)
    throttle.failed("task", is_unreachable=True)
    throttle.pause_for(300)
    waiting = [await started(work) for work in (throttle.take_slot(), throttle.pause(9), throttle.reachable())]
    throttle.end()
    for task in waiting:
        with pytest.raises(ClientClosed):
            await task
    with pytest.raises(ClientClosed):
        await throttle.take_slot()
    assert clock.pending == 0


async def test_slots_are_even_and_none_is_saved_up() -> None:
    """Four a second; after a month of silence still one at a time."""
    clock = ManualClock()
    throttle = throttle_of(clock, 4)
    for _ in range(2):
        left: list[float] = []
        begun = clock.time()

        async def leave(left: list[float] = left, begun: float = begun) -> None:
            await throttle.take_slot()
            left.append(clock.time() - begun)

        tasks = [await started(leave()) for _ in range(4)]
        for _ in range(8):
            clock.advance(0.125)
            await settle()
        await asyncio.gather(*tasks)
        assert left == pytest.approx([0, 0.25, 0.5, 0.75])
        clock.advance(MONTH_S)


async def test_a_slot_that_is_given_up_is_given_back() -> None:
    """2,000 who queue and go away, and ten who take their slot and do not use it, cost the next one nothing."""
    clock = ManualClock()
    throttle = throttle_of(clock, 20)
    await throttle.take_slot()
    for task in [asyncio.create_task(throttle.take_slot()) for _ in range(2_000)]:
        await asyncio.sleep(0)
        await gone(task)
    for _ in range(10):
        clock.advance(0.05)
        await throttle.take_slot()
        throttle.release_slot()
    await throttle.take_slot()
    following = await started(throttle.take_slot())
    clock.advance(0.05)
    await settle()
    assert following.done()


async def test_first_come_first_served() -> None:
    """Who comes later leaves later, also when some in between go away."""
    clock = ManualClock()
    throttle = throttle_of(clock, 10)
    order: list[int] = []

    async def leave(number: int) -> None:
        await throttle.take_slot()
        order.append(number)

    tasks = [await started(leave(number)) for number in range(10)]
    for number in (3, 4, 7):
        await gone(tasks[number])
    for _ in range(10):
        clock.advance(0.1)
        await settle()
    assert order == [0, 1, 2, 5, 6, 8, 9]


async def test_probes_get_rarer_while_the_service_is_away() -> None:
    """Three quarters of 0.5, 1, 2, ... 60 seconds; those that fail together are one try; an answer ends it."""
    clock = ManualClock()
    throttle = throttle_of(clock)
    throttle.answered()
    waits = []
    for _ in range(10):
        for _ in range(64):
            throttle.failed("task", is_unreachable=True)
        begun, waiting = clock.time(), await started(throttle.reachable())
        while not waiting.done():
            clock.advance(0.125)
            await settle(5)
        waits.append(clock.time() - begun)
        assert throttle.may_probe()
        assert not throttle.may_probe(), "there is one probe"
    assert waits[0] == pytest.approx(0.375)
    assert waits[-1] == pytest.approx(PROBE_CAP_S * 0.75)
    assert throttle.is_away_for_less_than(600)
    assert not throttle.is_away_for_less_than(30)
    waiting = await started(throttle.reachable())
    throttle.answered()
    await waiting
    assert throttle.may_probe()
    assert not throttle.is_away_for_less_than(600), "there is nothing to wait for"


async def test_a_service_that_never_answered_is_not_waited_for() -> None:
    """It is a wrong address, not an outage."""
    throttle = throttle_of(ManualClock())
    throttle.failed("task", is_unreachable=True)
    assert not throttle.is_away_for_less_than(600)


async def test_a_row_of_exchanges_without_a_clear_answer_is_an_outage() -> None:
    """A few in a row, of different tasks, and the patient wait; one clear answer in between is none."""
    throttle = throttle_of(ManualClock())
    for _ in range(2):
        throttle.answered()
        for number in range(FAILING_IN_A_ROW - 1):
            throttle.failed(f"task {number}", is_unreachable=False)
    assert throttle.may_probe()
    throttle.failed("one more", is_unreachable=False)
    assert throttle.probe_at is not None
    await throttle.take_slot()  # who cannot wait does not


def test_one_task_that_always_fails_is_no_outage() -> None:
    """However often it is asked about: the others would have to wait for it."""
    throttle = throttle_of(ManualClock())
    for _ in range(10 * FAILING_IN_A_ROW):
        throttle.failed("task", is_unreachable=False)
    assert throttle.probe_at is None


def test_repeats_are_bounded() -> None:
    """Ten, and one more for ten answers; a thousand good answers do not allow more than ten."""
    throttle = throttle_of(ManualClock())
    assert [throttle.take_repeat() for _ in range(12)] == [True] * int(REPEATS) + [False] * 2
    for _ in range(9):
        throttle.answered()
    assert not throttle.take_repeat()
    throttle.answered()
    assert [throttle.take_repeat() for _ in range(2)] == [True, False]
    for _ in range(1_000):
        throttle.answered()
    assert sum(throttle.take_repeat() for _ in range(100)) == REPEATS
