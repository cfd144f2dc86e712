"""Buying a job: intent, POST, answer written down; the only place that spends money.

A create is sent again only when it cannot have been bought: it never reached the service, or the service answered 429.
Everything else that goes wrong leaves the job `uncertain`, for its callback to adopt.
"""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from attrs import define

from xiling_async._internal.tasks import Shared, Tasks
from xiling_async.api.calls import Calls
from xiling_async.api.failures import error_of
from xiling_async.errors import ClientClosed, InvalidRequest, LimitReached, Problem
from xiling_async.jobs.entry import JobEntry
from xiling_async.jobs.exchange import Exchange, Order, Purchase
from xiling_async.jobs.registry import Registry
from xiling_async.media.uploads import Uploads
from xiling_async.models.record import NOT_BOUGHT, JobRecord
from xiling_async.models.request import Request
from xiling_async.models.settings import Limits


@define(kw_only=True, eq=False)
class _QueuedPost:
    """One POST in the queue of the senders. `outcome`: of the POST; None: put back; or why it was not sent."""

    order: Order
    request: Request[Any]  # with URLs only
    entry: JobEntry | None
    outcome: asyncio.Future[Purchase | BaseException | None]

    def done(self, outcome: Purchase | BaseException | None) -> None:
        if not self.outcome.done():  # else its caller has gone
            self.outcome.set_result(outcome)


class OutputLimit:
    """How many outputs this client may still buy (`Limits.outputs`). What may have been bought counts."""

    def __init__(self, most: int | None) -> None:
        self._most = most
        self._reserved = 0

    def check(self, count: int) -> None:
        """Raises `LimitReached` if so many more are too many."""
        if self._most is not None and self._reserved + count > self._most:
            raise LimitReached(
                f"Limits.outputs is {self._most}, and this client has bought, or is buying, {self._reserved} outputs: "
                f"a request for {count} more is not sent. Nothing was bought by it."
            )

    def reserve(self, count: int) -> None:
        """Raises `LimitReached`, and then reserves nothing."""
        self.check(count)
        self._reserved += count

    def release(self, count: int) -> None:
        """They were not bought."""
        self._reserved -= count


class Submission:
    """Turns orders into jobs.

    At most `Limits.submits` senders, started when they are needed, take POSTs from one queue. Callers only await the
    outcome, so cancelling one harms no POST.
    """

    def __init__(
        self,
        exchange: Exchange,
        *,
        registry: Registry,
        calls: Calls,
        uploads: Uploads,
        limits: Limits,
    ) -> None:
        self._registry = registry
        self._calls = calls
        self._uploads = uploads
        self._exchange = exchange
        self._most_senders = limits.submits
        self._queue: asyncio.Queue[_QueuedPost | None] = asyncio.Queue()
        self._senders = Tasks()
        self._idle = 0  # senders that wait for the queue
        self._in_flight = 0
        self._keyed_work = Tasks()
        self._keyed: dict[str, tuple[Order, Shared[Purchase | None]]] = {}
        self._output_limit = OutputLimit(limits.outputs)
        self._closed = False

    async def close(self) -> None:
        """No more from the queue; then let the POSTs that have left bring their answers home (each has a deadline)."""
        self._closed = True
        self._registry.release_waiters()  # one of them may wait for a job that another process sends
        self._calls.creates.end()
        while not self._queue.empty():
            post = self._queue.get_nowait()
            if post is not None:
                post.done(_closed())
        for _ in range(len(self._senders)):
            self._queue.put_nowait(None)
        try:
            await self._senders.drain()
            self._registry.release_waiters()
            await self._keyed_work.drain()
        except asyncio.CancelledError:
            await self._keyed_work.cancel()
            raise

    @property
    def in_flight(self) -> int:
        """POSTs under way."""
        return self._in_flight

    async def submit(self, order: Order) -> Purchase:
        """Buy the job, or find the one that this key bought. Raises what `Client.submit` raises."""
        while True:
            if order.wanted is not None:
                await order.wanted.wait()
            purchase = await (self._purchase(order) if order.key is None else self._purchase_once(order, order.key))
            if purchase is not None:
                return purchase

    async def _purchase_once(self, order: Order, key: str) -> Purchase | None:
        """One purchase for all callers of this key."""
        if self._closed:
            raise _closed()
        running, shared = self._keyed.get(key, (order, None))
        if running.request != order.request or order.retry_of not in (None, running.retry_of):
            raise _other_request(key)
        if shared is None or shared.abandoned:
            work = self._keyed_work.start(self._purchase(order), name=f"xiling submit {key!r}")
            shared = Shared(work)
            entry = self._keyed[key] = (order, shared)
            work.add_done_callback(lambda _: self._forget(key, entry))
        try:
            return await shared.wait()
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if caller is None or caller.cancelling():
                raise
            raise _closed(charged="maybe") from None  # a close that was cut short ended the work, not the caller

    def _forget(self, key: str, entry: object) -> None:
        if self._keyed.get(key) is entry:
            del self._keyed[key]

    # --- one job -----------------------------------------------------------------------------------------------------

    async def _purchase(self, order: Order) -> Purchase | None:
        """None: it was put back before anything was sent."""
        try:
            return await self._purchased(order)
        finally:
            if order.job_in_hand is not None:
                self._registry.jobs_in_hand.release(order.job_in_hand)
                order.job_in_hand = None

    async def _purchased(self, order: Order) -> Purchase | None:
        entry = None if order.key is None else await self._registry.by_key(order.key)
        sendable: Request[Any] | None = None
        tries = 0
        while True:
            if entry is not None:
                entry = await self._settled(entry, order)
                if entry.record.state not in NOT_BOUGHT:
                    return Purchase(entry=entry)
            self._output_limit.check(order.request.task_count)
            if not self._calls.creates.is_open:
                order.moved.set()
            if sendable is None:  # uploads come before the intent: one that fails leaves nothing behind
                files = order.request.local_files()
                if files:
                    order.moved.set()
                sendable = await self._uploads.sendable(order.request, files)
            if self._is_patient(order):
                await self._calls.creates.reachable()
            outcome = asyncio.get_running_loop().create_future()
            purchase = await self._send(_QueuedPost(order=order, request=sendable, entry=entry, outcome=outcome))
            if purchase is None:
                return None
            entry, result = purchase.entry, purchase.result
            if result is None:
                continue  # the key was bought, or is being bought, by another process
            if entry.record.state not in NOT_BOUGHT:
                return purchase
            if entry.record.refusal is not None and entry.record.refusal.code == order.request.kind.unreachable:
                self._uploads.forget(sendable)
            tries += 1
            if not await self._calls.may_create_again(result, tries, is_patient=order.is_patient):
                error = error_of(entry.record)
                assert error is not None, "a job that was not bought has a reason"
                raise error

    def _is_patient(self, order: Order) -> bool:
        return order.is_patient and self._calls.creates.has_answered

    async def _settled(self, entry: JobEntry, order: Order) -> JobEntry:
        """The job of this key once it is known whether it was bought. What was not bought may be sent corrected."""
        entry = await self._registry.up_to_date(entry)
        _check_same(entry.record, order)
        order.moved.set()
        if self._closed:
            raise _closed()
        await self._exchange.await_answer(entry)
        _check_same(entry.record, order)
        return entry

    # --- the senders -------------------------------------------------------------------------------------------------

    async def _send(self, post: _QueuedPost) -> Purchase | None:
        if self._closed:
            raise _closed()
        self._queue.put_nowait(post)
        if self._queue.qsize() > self._idle:
            if len(self._senders) < self._most_senders:
                self._senders.start(self._work(), name="xiling sender")
            else:
                post.order.moved.set()
        outcome = await post.outcome
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    async def _work(self) -> None:
        while (post := await self._next()) is not None:
            try:
                post.done(await self._send_post(post))
            except Exception as error:
                post.done(error)
            except asyncio.CancelledError:  # closing was cut short: the row tells the next client
                post.done(_closed(charged="maybe"))
                raise
            del post  # while a sender waits for the next one, it keeps no job alive

    async def _next(self) -> _QueuedPost | None:
        self._idle += 1
        try:
            return await self._queue.get()
        finally:
            self._idle -= 1

    async def _send_post(self, post: _QueuedPost) -> Purchase | None:
        if post.outcome.done():  # its caller has gone
            return None
        await self._calls.creates.take_slot()
        order = post.order
        is_put_back = not order.is_wanted or (self._is_patient(order) and not self._calls.creates.may_probe())
        if post.outcome.done() or is_put_back:
            self._calls.creates.release_slot()
            return None
        try:
            self._output_limit.reserve(order.request.task_count)
        except LimitReached:
            self._calls.creates.release_slot()
            raise
        self._in_flight += 1
        is_paid = False
        try:
            purchase = await self._exchange.send(order, post.request, post.entry)
            is_paid = purchase.is_paid
        except BaseException:
            is_paid = order.entry is not None  # the intent was written, so the POST may have left
            raise
        finally:
            self._in_flight -= 1
            if not is_paid:
                self._output_limit.release(order.request.task_count)
        if purchase.result is not None and order.job_in_hand is None and not post.outcome.done():
            order.job_in_hand = purchase.entry.record.id  # also in the pause before the next POST
            self._registry.jobs_in_hand.hold(order.job_in_hand)
        return purchase


def _check_same(record: JobRecord, order: Order) -> None:
    """What was refused or never arrived bought nothing: its key is free for another request."""
    if order.retry_of not in (None, record.retry_of) and record.request is not None:
        raise _other_request(record.key or "", record)
    # A job without a request came back by its callback, and its key says which it is.
    if record.request not in (order.request, None) and record.state not in NOT_BOUGHT:
        raise _other_request(record.key or "", record)


def _other_request(key: str, record: JobRecord | None = None) -> InvalidRequest:
    problem = Problem(
        field="key", value=key, rule="already names a job with another request", accepted="a key of its own"
    )
    error = InvalidRequest.of("submit", [problem])
    error.job_id = record.id if record else None
    return error


def _closed(charged: Literal["no", "maybe"] = "no") -> ClientClosed:
    if charged == "no":
        return ClientClosed("The client was closed before this request was sent: nothing was bought.")
    return ClientClosed(
        "The client was closed while this request was being sent: it may have been bought. The job stays in the "
        "store; a new client with the same store finds it (recover, find).",
        charged="maybe",
    )
