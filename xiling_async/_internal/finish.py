"""Work that must come to its end, also when its caller is cancelled."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def finish(work: Coroutine[Any, Any, T], *, name: str) -> T:
    """The result of this work, which runs in a task of its own and has ended when this returns or raises."""
    return await ended(asyncio.create_task(work, name=name))


async def ended(task: asyncio.Task[T]) -> T:
    """The result of this task, which has ended when this returns or raises.

    The first cancellation of the caller is passed on to the task, which is awaited all the same; later ones do not
    interrupt what it still puts in order. Then the caller is cancelled.
    """
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            if cancelled is None:
                task.cancel()
            cancelled = error
    if cancelled is None:
        return task.result()
    if not task.cancelled():
        task.exception()  # it is retrieved; the cancellation is what the caller hears of
    raise cancelled
