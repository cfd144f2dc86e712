"""Every asyncio task of the client has an owner here, so that leaving `async with` leaves none behind."""

import asyncio
from collections.abc import Coroutine
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Tasks:
    """The tasks of one owner: kept alive while they run, cancelled and awaited together at the end."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._running)

    def start(self, work: Coroutine[Any, Any, T], *, name: str) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._running.add(task)
        task.add_done_callback(self._ended)
        return task

    async def run_shielded(self, work: Coroutine[Any, Any, T], *, name: str) -> T:
        """The result of this work, which goes on when the caller that waits here is cancelled."""
        task = self.start(work, name=name)
        await asyncio.wait([task])
        return task.result()

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # its callers have it; if they are gone, the store has the state

    async def drain(self) -> None:
        """Wait until all that runs has ended; if this wait is cancelled, cancel them and wait all the same."""
        try:
            while self._running:
                await asyncio.wait(tuple(self._running))
        except asyncio.CancelledError:
            await self.cancel()
            raise

    async def cancel(self) -> None:
        """Cancel all that runs and wait until it has ended, also when this wait is cancelled."""
        cancelled: asyncio.CancelledError | None = None
        while self._running:
            running = tuple(self._running)
            for task in running:
                if not task.cancelling():  # a second time could interrupt what it puts in order
                    task.cancel()
            try:
                await asyncio.wait(running)
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            raise cancelled


class Shared(Generic[T]):
    """One piece of work with several callers: it is cancelled when the last of them has gone, not before.

    Once `abandoned`, no caller may join any more.
    """

    def __init__(self, task: asyncio.Task[T]) -> None:
        self._task = task
        self._callers = 0
        self.abandoned = False

    @property
    def is_over(self) -> bool:
        """It has ended, or is being ended: a new caller must begin again."""
        return self.abandoned or self._task.done()

    async def wait(self) -> T:
        self._callers += 1
        try:
            return await asyncio.shield(self._task)
        finally:
            self._callers -= 1
            if not self._callers and not self._task.done():
                self.abandoned = True
                self._task.cancel()


async def wait_out(*tasks: asyncio.Future[Any]) -> None:
    """Wait until these tasks have ended, even if the caller is cancelled meanwhile; that is raised afterwards.

    For work that ends soon by itself and must not be left behind. The results stay with the tasks.
    """
    cancelled: asyncio.CancelledError | None = None
    while running := [task for task in tasks if not task.done()]:
        try:
            await asyncio.wait(running)
        except asyncio.CancelledError as error:
            cancelled = error
    for task in tasks:
        if not task.cancelled():
            task.exception()  # it has been looked at
    if cancelled is not None:
        raise cancelled


async def finish(work: Coroutine[Any, Any, T], *, name: str) -> T:
    """The result of this work, which runs in a task of its own and has ended when this returns or raises."""
    return await ended(asyncio.create_task(work, name=name))


async def ended(task: asyncio.Task[T]) -> T:
    """The result of this task, which has ended when this returns or raises.

    If the caller is cancelled, so is the task, once: a later cancellation does not interrupt its cleanup.
    """
    try:
        await asyncio.wait([task])
    except asyncio.CancelledError:
        task.cancel()
        await wait_out(task)
        raise
    return task.result()
