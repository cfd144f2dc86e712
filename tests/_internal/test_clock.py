"""The clocks: one of this machine, one driven by hand."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, cast

import blockbuster
import pytest
from virtual import SeededLoop

from xiling_async._internal.clock import Clock, SystemClock
from xiling_async._internal.redact import shown
from xiling_async.testing.clock import ManualClock, SkippingClock

T = TypeVar("T")

START = 1_800_000_000.0


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


# --- by hand -------------------------------------------------------------------------------------------------------


def test_time_stands_still_until_it_is_advanced() -> None:
    """Only `advance` moves the time."""
    clock = ManualClock()
    assert clock.time() == clock.time() == START
    clock.advance(1.5)
    assert clock.time() == START + 1.5
    assert ManualClock(now=7).time() == 7


def test_timers_are_called_in_order_each_at_its_own_time() -> None:
    """By time, and for the same time in the order in which they were set."""
    clock = ManualClock(now=0)
    called: list[tuple[str, float]] = []

    def note(name: str) -> Callable[[], None]:
        return lambda: called.append((name, clock.time()))

    for name, delay_s in [("c", 3.0), ("a", 1.0), ("late", 10.5), ("b1", 2.0), ("b2", 2.0), ("past", -5.0)]:
        clock.call_later(delay_s, note(name))
    clock.advance(0)
    assert called == [("past", 0)]
    clock.advance(10)
    assert called == [("past", 0), ("a", 1), ("b1", 2), ("b2", 2), ("c", 3)]
    assert clock.time() == 10
    assert clock.pending == 1
    clock.advance(0.5)
    assert called[-1] == ("late", 10.5)
    assert clock.pending == 0


def test_a_timer_that_was_called_off_is_not_called() -> None:
    """`cancel` before its time takes it away; after it, and twice, nothing happens."""
    clock = ManualClock()
    called: list[int] = []
    early, late = clock.call_later(1, lambda: called.append(1)), clock.call_later(2, lambda: called.append(2))
    late.cancel()
    late.cancel()
    assert clock.pending == 1
    clock.advance(5)
    early.cancel()
    assert called == [1]


def test_a_timer_may_set_timers_and_advance_the_clock() -> None:
    """What falls due while time passes is called too, and the time never goes back."""
    clock = ManualClock(now=0)
    called: list[float] = []

    def again() -> None:
        called.append(clock.time())
        if len(called) < 3:
            clock.call_later(1, again)

    clock.call_later(1, again)
    clock.advance(2.5)
    assert called == [1, 2]
    clock.call_later(0.6, lambda: clock.advance(100))
    clock.advance(1)
    assert called == [1, 2, 3]
    assert clock.time() == 103.1


async def test_sleepers_wake_when_their_time_has_come() -> None:
    """Each sleeper sleeps for as long as it asked for, not a moment less."""
    clock = ManualClock()
    woken: list[float] = []

    async def sleeper(delay_s: float) -> None:
        await clock.sleep(delay_s)
        woken.append(delay_s)

    tasks = [asyncio.create_task(sleeper(delay_s)) for delay_s in (3.0, 1.0, 2.0)]
    await turns()
    clock.advance(0.999)
    await turns()
    assert woken == []
    clock.advance(0.001)
    await turns()
    assert woken == [1]
    clock.advance(60)
    await asyncio.gather(*tasks)
    assert sorted(woken) == [1, 2, 3]


@pytest.mark.parametrize("delay_s", [0.0, -1.0])
async def test_no_sleep_is_one_turn_of_the_loop(delay_s: float) -> None:
    """Sleeping for nothing lets the others run and needs no `advance`."""
    clock = ManualClock()
    other = asyncio.create_task(turns(1))
    await clock.sleep(delay_s)
    await clock.sleep(delay_s)
    assert other.done()
    assert clock.pending == 0


async def test_a_cancelled_sleeper_leaves_no_timer() -> None:
    """Cancelling ends the sleep at once, also in the very moment it is over."""
    clock = ManualClock()
    task = asyncio.create_task(clock.sleep(5))
    await turns()
    assert clock.pending == 1
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert clock.pending == 0

    late = asyncio.create_task(clock.sleep(5))
    await turns()
    late.cancel()
    clock.advance(5)
    await asyncio.wait([late])
    assert late.cancelled()


@pytest.fixture(params=[ManualClock, SystemClock])
def clock(request: pytest.FixtureRequest) -> Clock:
    made: Clock = request.param()
    return made


async def test_a_timeout_ends_what_takes_too_long() -> None:
    """At its time, not before; it is a `TimeoutError`, and the task is not left half cancelled."""
    clock = ManualClock()

    async def work() -> str:
        try:
            async with clock.timeout(10):
                await asyncio.Event().wait()
        except TimeoutError:
            task = asyncio.current_task()
            assert task is not None
            return f"timed out, cancelling={task.cancelling()}"
        return "never"

    task = asyncio.create_task(work())
    await turns()
    clock.advance(9.999)
    await turns()
    assert not task.done()
    clock.advance(0.001)
    assert await task == "timed out, cancelling=0"
    assert clock.pending == 0


async def test_work_that_ends_in_time_is_left_alone(clock: Clock) -> None:
    """Nothing is raised, and no timer stays."""
    async with clock.timeout(1_000):
        await asyncio.sleep(0)
    if isinstance(clock, ManualClock):
        assert clock.pending == 0
        clock.advance(10_000)
    await turns()


async def test_the_result_wins_when_it_comes_with_the_timeout() -> None:
    """A block that is left before the loop's next turn was in time."""
    clock = ManualClock()
    async with clock.timeout(10):
        clock.advance(10)
    await turns()


async def test_an_infinite_timeout_never_ends(clock: Clock) -> None:
    """`math.inf` is "never", and needs no timer."""
    async with clock.timeout(math.inf):
        if isinstance(clock, ManualClock):
            clock.advance(1e12)
            assert clock.pending == 0
        await turns()


@pytest.mark.parametrize("delay_s", [0.0, -3.0])
async def test_no_time_at_all_is_a_timeout(clock: Clock, delay_s: float) -> None:
    """0 and less time out at the first wait."""
    with pytest.raises(TimeoutError):
        async with clock.timeout(delay_s):
            if isinstance(clock, ManualClock):
                clock.advance(0)
            await asyncio.Event().wait()


async def test_a_cancelled_wait_is_a_cancellation(clock: Clock) -> None:
    """Cancelling from outside is never turned into a timeout, and leaves no timer."""

    async def work() -> None:
        async with clock.timeout(1_000):
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await turns()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert getattr(clock, "pending", 0) == 0


async def test_an_error_passes_through_a_timeout(clock: Clock) -> None:
    """An error in the block is that error."""
    with pytest.raises(ZeroDivisionError):
        async with clock.timeout(1_000):
            raise ZeroDivisionError


# --- timeouts in a loop whose time is virtual ------------------------------------------------------------------------


def played(work: Coroutine[Any, Any, T]) -> T:
    return SeededLoop(random.Random(1), limit_s=1e6).play(work)


def test_timeouts_that_were_left_leave_no_timer() -> None:
    """A thousand timeouts of half an hour, each left at once: no timer waits for them."""

    async def many() -> int:
        for _ in range(1_000):
            async with SystemClock().timeout(1_800):
                await asyncio.sleep(0)
        timers = cast("SeededLoop", asyncio.get_running_loop())._scheduled
        return sum(not timer.cancelled() for timer in timers)

    assert played(many()) == 0


class BlockedLoop(SeededLoop):
    """Its time can leap, as if the process had been stopped: timers fall due that should have been long ago."""

    def leap(self, seconds: float) -> None:
        self._now += seconds


@pytest.mark.parametrize("leap_s", [5.0, 90.0])
def test_a_timer_that_fires_much_too_late_lets_the_loop_read_first(leap_s: float) -> None:
    """What arrived during the pause wins over the deadline of 4 s; if nothing did, the deadline holds all the same."""

    async def pause(arrives: bool) -> str:
        loop = cast("BlockedLoop", asyncio.get_running_loop())
        answer: asyncio.Future[str] = loop.create_future()

        def stop() -> None:
            loop.leap(leap_s)
            if arrives:
                loop.call_later(0.5, answer.set_result, "the answer")

        loop.call_later(1, stop)
        try:
            async with SystemClock().timeout(4):
                return await answer
        except TimeoutError:
            return "timeout"

    for arrives, told in ((True, "the answer"), (False, "timeout")):
        loop = BlockedLoop(random.Random(1), limit_s=1e6)
        assert loop.play(pause(arrives)) == told


def test_a_timeout_within_another_of_the_same_length() -> None:
    """The outer one ends first and is the one that is told of."""
    clock = SystemClock()

    async def work() -> list[str]:
        told = []
        try:
            async with clock.timeout(10):
                await asyncio.sleep(1)
                try:
                    async with clock.timeout(10):
                        await asyncio.Event().wait()
                except TimeoutError:
                    told.append("inner")
        except TimeoutError:
            told.append(f"outer at {asyncio.get_running_loop().time():g}")
        return told

    assert played(work()) == ["outer at 10"]


async def test_what_comes_in_the_same_turn_as_the_deadline_was_in_time() -> None:
    """An answer that the loop reads in the turn in which the deadline passes is not thrown away."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[str] = loop.create_future()
    loop.call_at(loop.time(), answer.set_result, "answer")
    async with SystemClock().timeout(1e-6):  # both timers are due when the loop looks next
        assert await answer == "answer"


def test_a_timeout_leaves_no_cancellation_behind() -> None:
    """After it the task counts as not cancelled; a cancellation that came with the deadline is one."""

    async def work() -> tuple[int, bool]:
        task = asyncio.current_task()
        assert task is not None
        with pytest.raises(TimeoutError):
            async with SystemClock().timeout(1):
                await asyncio.Event().wait()
        after = task.cancelling()
        with pytest.raises(asyncio.CancelledError):
            async with SystemClock().timeout(1):
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    task.cancel()
                    await asyncio.sleep(0)
        is_cancelled = task.uncancel() == 0
        return after, is_cancelled

    assert played(work()) == (0, True)


# --- of this machine -----------------------------------------------------------------------------------------------


async def test_the_system_clock_is_unix_time_that_never_goes_back() -> None:
    """It says what the machine says, and never less than before."""
    clock = SystemClock()
    assert abs(clock.time() - time.time()) < 1
    moments = [clock.time() for _ in range(1_000)]
    assert moments == sorted(moments)


async def test_the_system_clock_calls_sleeps_and_calls_off() -> None:
    """`call_later` and `sleep` are the loop's own."""
    clock = SystemClock()
    called = asyncio.Event()
    never: list[int] = []
    clock.call_later(0, lambda: never.append(1)).cancel()
    clock.call_later(0, called.set)
    await called.wait()
    await clock.sleep(0)
    assert never == []


async def test_the_system_clock_measures_its_own_sleep() -> None:
    """A millisecond of sleep is at least that on the clock (the loop rounds by its own resolution)."""
    clock = SystemClock()
    before = clock.time()
    await clock.sleep(0.001)
    assert clock.time() - before >= 0.001 - time.get_clock_info("monotonic").resolution


# --- the tests' own safety net -------------------------------------------------------------------------------------


async def test_a_blocking_call_of_the_package_is_noticed() -> None:
    """`time.sleep` below the package's code fails an async test: here through somebody's slow repr."""

    class Slow:
        def __repr__(self) -> str:
            time.sleep(0)
            return "slow"

    assert shown(Slow()) == f"<Slow that cannot be shown: {blockbuster.BlockingError.__name__}>"


async def test_a_skipping_clock_waits_for_nothing() -> None:
    """It goes on to the next timer, one after the other, and to none that was called off."""
    clock = SkippingClock(0.0, quiet_s=0.01)
    called: list[float] = []
    for delay_s in (3600.0, 60.0):
        clock.call_later(delay_s, lambda: called.append(clock.time()))
    clock.call_later(7.0, lambda: called.append(clock.time())).cancel()
    await clock.sleep(86_400.0)
    assert called == [60.0, 3600.0]
    assert clock.time() == 86_400.0
    with pytest.raises(TimeoutError):
        async with clock.timeout(30.0):
            await asyncio.get_running_loop().create_future()
    assert clock.time() == 86_430.0


async def test_a_skipping_clock_stands_still_while_something_happens() -> None:
    """Who uses the clock keeps it where it is."""
    clock = SkippingClock(0.0, quiet_s=0.01)
    sleeper = asyncio.create_task(clock.sleep(10.0))
    for _ in range(20 * SkippingClock.QUIET_TURNS):
        await asyncio.sleep(0)
        assert clock.time() == 0.0
    clock.advance(10.0)
    await sleeper


async def test_a_skipping_clock_that_is_told_not_to_skip_stands() -> None:
    """Until it is advanced; one that may skip has gone on after so many turns of the loop."""
    for skips in (True, False):
        clock = SkippingClock(0.0, quiet_s=0.0)
        clock.skips = skips
        sleeper = asyncio.create_task(clock.sleep(10.0))
        for _ in range(20 * SkippingClock.QUIET_TURNS):
            await asyncio.sleep(0)
        assert sleeper.done() is skips
        clock.advance(10.0)
        await sleeper
