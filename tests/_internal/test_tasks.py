"""Every asyncio task has an owner."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest

from xiling_async._internal.tasks import Shared, Tasks


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def stubborn(gate: asyncio.Event, seen: list[str]) -> str:
    """Work that is told to stop, and finishes what it began."""
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        seen.append("cancelled")
        await gate.wait()
        return "finished"
    raise AssertionError("nobody else wakes it")


# --- Tasks ---------------------------------------------------------------------------------------------------------


async def test_a_started_task_runs_and_is_forgotten_at_its_end() -> None:
    """It is counted while it runs, has the name that it was given, and gives its result."""
    tasks = Tasks()
    gate = asyncio.Event()
    task = tasks.start(gate.wait(), name="xiling one")
    assert len(tasks) == 1
    assert task.get_name() == "xiling one"
    gate.set()
    assert await task is True
    assert len(tasks) == 0


async def test_a_task_that_nobody_refers_to_is_not_collected() -> None:
    """The owner's reference keeps it alive through a collection."""
    tasks = Tasks()
    gates: list[asyncio.Future[None]] = []
    ended: list[int] = []

    async def work() -> None:
        gates.append(asyncio.get_running_loop().create_future())
        await gates[0]
        ended.append(1)

    tasks.start(work(), name="alone")
    await turns()
    gc.collect()
    gates[0].set_result(None)
    await tasks.drain()
    assert ended == [1]


async def test_an_error_that_nobody_awaits_is_no_noise() -> None:
    """The loop's handler for lost errors is not called: the store has the state."""
    noise: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: noise.append(context))
    tasks = Tasks()

    async def fail() -> None:
        raise ZeroDivisionError

    tasks.start(fail(), name="fails")
    await tasks.drain()
    gc.collect()
    await turns()
    assert noise == []
    assert len(tasks) == 0


async def test_an_error_reaches_who_awaits_it() -> None:
    """The owner takes nothing away from the caller."""
    tasks = Tasks()

    async def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await tasks.start(fail(), name="fails")


async def test_drain_waits_for_all_and_for_what_they_start() -> None:
    """Work that starts work is waited for as well; nothing is cancelled."""
    tasks = Tasks()
    ended: list[str] = []
    gate = asyncio.Event()

    async def child() -> None:
        await turns()
        ended.append("child")

    async def parent() -> None:
        await gate.wait()
        tasks.start(child(), name="child")
        ended.append("parent")

    tasks.start(parent(), name="parent")
    drained = asyncio.create_task(tasks.drain())
    await turns()
    assert not drained.done()
    gate.set()
    await drained
    assert ended == ["parent", "child"]


async def test_draining_or_cancelling_nothing_is_done_at_once() -> None:
    """With nothing running both return."""
    tasks = Tasks()
    await tasks.drain()
    await tasks.cancel()
    assert len(tasks) == 0


async def test_cancel_waits_until_they_have_ended() -> None:
    """Also for a task that takes its time to end, and for one that had not begun."""
    tasks = Tasks()
    gate, seen = asyncio.Event(), list[str]()
    slow = tasks.start(stubborn(gate, seen), name="stubborn")
    await turns()
    unborn = tasks.start(turns(), name="unborn")
    cancelling = asyncio.create_task(tasks.cancel())
    await turns()
    assert seen == ["cancelled"]
    assert not cancelling.done()
    gate.set()
    await cancelling
    assert slow.result() == "finished"
    assert unborn.cancelled()
    assert len(tasks) == 0


async def test_cancel_also_ends_what_is_started_meanwhile() -> None:
    """A task that starts another while it ends leaves none behind."""
    tasks = Tasks()

    async def phoenix(lives: int) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            if lives:
                tasks.start(phoenix(lives - 1), name="phoenix")

    tasks.start(phoenix(3), name="phoenix")
    await turns()
    await tasks.cancel()
    assert len(tasks) == 0


async def test_a_cancelled_drain_cancels_them_and_waits_all_the_same() -> None:
    """The caller's cancellation is passed on, and is raised only when all have ended."""
    tasks = Tasks()
    gate, seen = asyncio.Event(), list[str]()
    tasks.start(stubborn(gate, seen), name="stubborn")
    drained = asyncio.create_task(tasks.drain())
    await turns()
    drained.cancel()
    await turns()
    assert seen == ["cancelled"]
    assert not drained.done()
    gate.set()
    await asyncio.wait([drained])
    assert drained.cancelled()
    assert len(tasks) == 0


# --- Shared --------------------------------------------------------------------------------------------------------


async def test_all_callers_get_the_one_result() -> None:
    """The work is done once; who joins after its end gets the result too."""
    tasks = Tasks()
    gate = asyncio.Event()
    shared = Shared(tasks.start(gate.wait(), name="work"))
    callers = [asyncio.create_task(shared.wait()) for _ in range(3)]
    await turns()
    gate.set()
    assert await asyncio.gather(*callers) == [True, True, True]
    assert await shared.wait() is True
    assert not shared.abandoned


async def test_one_caller_that_leaves_harms_nobody() -> None:
    """The work goes on while anybody waits for it."""
    tasks = Tasks()
    gate = asyncio.Event()
    work = tasks.start(gate.wait(), name="work")
    shared = Shared(work)
    first, second = asyncio.create_task(shared.wait()), asyncio.create_task(shared.wait())
    await turns()
    first.cancel()
    await asyncio.wait([first])
    assert first.cancelled()
    assert not work.done()
    assert not shared.abandoned
    gate.set()
    assert await second is True


async def test_the_work_is_cancelled_when_the_last_caller_has_gone() -> None:
    """Then it is abandoned, and says so at once."""
    tasks = Tasks()
    work = tasks.start(asyncio.Event().wait(), name="work")
    shared = Shared(work)
    callers = [asyncio.create_task(shared.wait()) for _ in range(3)]
    await turns()
    for caller in callers:
        caller.cancel()
    await asyncio.wait(callers)
    assert shared.abandoned
    await tasks.drain()
    assert work.cancelled()


async def test_an_error_reaches_every_caller() -> None:
    """All that wait get the same error; none of them counts as gone before the end."""
    tasks = Tasks()
    gate = asyncio.Event()

    async def fail() -> None:
        await gate.wait()
        raise ZeroDivisionError

    shared = Shared(tasks.start(fail(), name="fails"))
    callers = [asyncio.create_task(shared.wait()) for _ in range(2)]
    await turns()
    gate.set()
    errors = await asyncio.gather(*callers, return_exceptions=True)
    assert [type(error) for error in errors] == [ZeroDivisionError, ZeroDivisionError]
    assert not shared.abandoned


async def test_a_caller_that_leaves_with_the_result_abandons_nothing() -> None:
    """Cancelled in the turn in which the work ended: the work stays done."""
    tasks = Tasks()
    gate = asyncio.Event()
    work = tasks.start(gate.wait(), name="work")
    shared = Shared(work)
    caller = asyncio.create_task(shared.wait())
    await turns()
    gate.set()
    await asyncio.sleep(0)
    caller.cancel()
    await asyncio.wait([caller])
    assert work.result() is True
    assert not shared.abandoned
