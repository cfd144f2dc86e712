"""Many at once through one `submit`: pulled lazily, never more than so many unfinished; one failure harms no neighbour.

Nothing is started but while the consumer asks for the next one, and what is done but not yet taken counts as well: so
a slow consumer slows the source, and memory does not grow with its length.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar, cast

from attrs import frozen

from xiling_async._internal.redact import scrub
from xiling_async.errors import ClientClosed, InvalidRequest, Problem, TaskFailed, XilingError
from xiling_async.jobs.engine import Engine
from xiling_async.jobs.exchange import Order
from xiling_async.jobs.job import Job
from xiling_async.models.record import Succeeded
from xiling_async.models.request import Request

R = TypeVar("R")
Item = Request[R] | tuple[str, Request[R]]
Items = Iterable[Item[R]] | AsyncIterable[Item[R]]


@frozen(kw_only=True)
class Finished(Generic[R]):
    """What became of one item of `Client.map`.

    `index`: its place in the source, from 0. `job`: None if there is none (it was refused before anything was sent).
    `results`: of its tasks that succeeded, in task order. `error`: why there are not all of them; `charged` of it says
    what it means for the money.
    """

    index: int
    key: str | None
    request: Request[R]
    job: Job[R] | None
    results: tuple[R, ...] = ()
    error: XilingError | None = None

    @property
    def ok(self) -> bool:
        """Every task of it succeeded."""
        return self.error is None


def checked(items: Items[R]) -> Items[R]:
    """Raises `InvalidRequest` for what cannot be the source, and for the wrong items of a list, before any is sent."""
    if isinstance(items, (str, bytes, Request)) or not isinstance(items, (Iterable, AsyncIterable)):
        raise InvalidRequest(
            f"map takes an iterable of requests or (key, request) pairs, not {type(items).__name__}. Nothing was sent."
        )
    if isinstance(items, (list, tuple)):
        _check_keys([_pair(place, item) for place, item in enumerate(items)])
    return items


def _pair(place: int, item: object) -> tuple[str | None, Request[Any]]:
    key, request = item if isinstance(item, tuple) and len(item) == 2 else (None, item)
    if not isinstance(request, Request) or (item is not request and (not isinstance(key, str) or not key)):
        what = f"({type(key).__name__}, {type(request).__name__})" if item is not request else type(item).__name__
        raise InvalidRequest(
            f"Item {place} of map is neither a request nor a (key, request) pair: {what}. It was not sent."
        )
    return key, request


def _check_keys(pairs: list[tuple[str | None, Request[Any]]]) -> None:
    first: dict[str, Request[Any]] = {}
    problems = [
        Problem(field="key", value=key, rule=f"names another request at item {place}", accepted="a key of its own")
        for place, (key, request) in enumerate(pairs)
        if key is not None and first.setdefault(key, request) != request
    ]
    if problems:
        raise InvalidRequest.of("map", problems)


class FanOut(Generic[R]):
    """One call of `map`. The engine owns its tasks, and cancels them when it is closed.

    Nothing is sent but while the consumer waits for the next result: one that stops asking buys nothing more.
    """

    def __init__(self, items: Items[R], engine: Engine, *, in_flight: int, ordered: bool) -> None:
        self._source: Iterator[Item[R]] | AsyncIterator[Item[R]]
        self._source = aiter(items) if isinstance(items, AsyncIterable) else iter(items)
        self._engine = engine
        self._tasks = engine.maps
        self._in_flight = in_flight
        self._ordered = ordered
        self._pull: asyncio.Task[Item[R]] | None = None  # of an asynchronous source: it may take its time
        self._exhausted = False
        self._source_error: Exception | None = None  # what the source raised: raised when all that was started is done
        self._pulled = 0
        self._taken = 0
        self._running: set[asyncio.Task[Finished[R]]] = set()
        self._order: deque[asyncio.Task[Finished[R]]] = deque()  # in which they are given out
        self._changed = asyncio.Event()
        self._wanted = asyncio.Event()  # set while the consumer waits

    async def results(self) -> AsyncGenerator[Finished[R], None]:
        """Each item as it finishes, or in the order of the source. However this ends, nothing is left running."""
        try:
            while True:
                self._wanted.set()
                pulled = self._fill()
                if self._order and self._order[0].done():
                    for order in pulled:  # a slow consumer does not starve the senders
                        await order.moved.wait()
                    self._wanted.clear()
                    yield self._take(self._order.popleft())
                elif self._exhausted and not self._running:
                    break
                else:
                    self._changed.clear()
                    await self._changed.wait()
        finally:
            await self._stop()
        if self._source_error is not None:
            raise self._source_error

    def _take(self, task: asyncio.Task[Finished[R]]) -> Finished[R]:
        self._taken += 1
        if task.cancelled():  # not by us: the owner of the tasks is closing
            raise ClientClosed("The client was closed while `map` was running: what was bought stays in its store.")
        return task.result()

    # --- the source ----------------------------------------------------------------------------------------------

    def _fill(self) -> list[Order]:
        """Start as many as there may be; those that were started now."""
        started: list[Order] = []
        while not self._exhausted and self._pulled - self._taken < self._in_flight:
            try:
                if isinstance(self._source, AsyncIterator):
                    if self._pull is None:
                        self._pull = self._tasks.start(_next(self._source), name="xiling map source")
                        self._pull.add_done_callback(lambda _: self._changed.set())
                    if not self._pull.done():
                        break
                    pull, self._pull = self._pull, None
                    item = pull.result()
                else:
                    item = next(self._source)
                key, request = _pair(self._pulled, item)
                started.append(Order(request=request, key=key, wanted=self._wanted))
                self._start(started[-1])
            except (StopIteration, StopAsyncIteration):
                self._exhausted = True
            except asyncio.CancelledError:
                raise ClientClosed("The client was closed while `map` was running: nothing more was sent.") from None
            except Exception as error:
                self._exhausted, self._source_error = True, error
        return started

    def _start(self, order: Order) -> None:
        task = self._tasks.start(self._run(self._pulled, order), name=f"xiling map {self._pulled}")
        self._pulled += 1
        self._running.add(task)
        if self._ordered:
            self._order.append(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Finished[R]]) -> None:
        self._running.discard(task)
        if not self._ordered:
            self._order.append(task)
        self._changed.set()

    async def _run(self, index: int, order: Order) -> Finished[R]:
        job: Job[R] | None = None
        key, request = order.key, order.request
        try:
            job = await self._engine.submit(order)
            results = await job.result()
        except ClientClosed:
            raise
        except Exception as raised:
            error = raised if isinstance(raised, XilingError) else _unexpected(raised, job)
            known = job or cast("Job[R] | None", getattr(error, "job", None))
            return Finished(index=index, key=key, request=request, job=known, results=_good(error), error=error)
        finally:
            order.moved.set()
        return Finished(index=index, key=key, request=request, job=job, results=results)

    async def _stop(self) -> None:
        tasks = {*self._running, *(() if self._pull is None else (self._pull,))}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        close: Callable[[], Awaitable[None]] | None = getattr(self._source, "aclose", None)
        if close is not None:
            await close()


async def _next(source: AsyncIterator[Item[R]]) -> Item[R]:
    return await anext(source)


def _unexpected(error: Exception, job: Job[Any] | None) -> XilingError:
    """An error that is not one of ours, of a store or a clock of the user's: it ends its item, not the whole run."""
    known: dict[str, Any] = {} if job is None else {"job_id": job.id, "task_ids": job.task_ids}
    message = f"This item ended with {type(error).__name__}: {scrub(str(error))}. Look at its job before you repeat it."
    wrapped = XilingError(message, charged="yes" if job is not None and job.task_ids else "maybe", **known)
    wrapped.__cause__ = error
    return wrapped


def _good(error: Exception) -> tuple[Any, ...]:
    outcomes = error.outcomes if isinstance(error, TaskFailed) else ()
    return tuple(outcome.result for outcome in outcomes if isinstance(outcome, Succeeded))
