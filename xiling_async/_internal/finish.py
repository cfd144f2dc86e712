"""Work that must come to its end, whatever happens to its caller."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def finish(work: Coroutine[Any, Any, T], *, name: str) -> T:
    """The result of this work, which runs in a task of its own and has ended when this returns or raises.

    The first cancellation of the caller is passed on to the work, which is awaited all the same; later ones do not
    interrupt what it still puts in order. Then the caller is cancelled.
    """
    task = asyncio.create_task(work, name=name)
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
