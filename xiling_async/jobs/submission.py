"""Buying a job: intent, POST, answer written down; the only place that spends money.

A create is sent again only when it cannot have been bought: it never reached the service, or the service answered 429.
Everything else that goes wrong leaves the job `uncertain`, for its callback to adopt.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final, Literal

from attrs import define, field

from xiling_async._internal.tasks import Shared, Tasks
from xiling_async.api.calls import Calls
from xiling_async.api.failures import error_of
from xiling_async.errors import ClientClosed, InvalidRequest, Problem, ProtocolError
from xiling_async.jobs.context import Context
from xiling_async.jobs.entry import JobEntry, still_sending_error
from xiling_async.jobs.exchange import Exchange, Order, Sent
from xiling_async.jobs.registry import Registry
from xiling_async.media.uploads import Uploads
from xiling_async.models.lifecycle import AnswerLost
from xiling_async.models.record import LEFT_BEHIND, JobRecord, State
from xiling_async.models.request import Request

SENDING_SLACK_S: Final = 60.0  # beyond its deadline, for a POST of another process: by then that one counts as dead
_NOT_BOUGHT: Final = (State.NOT_SENT, State.REJECTED)


@define(kw_only=True)
class Purchase:
    """A job that was, or may have been, bought; `doubt`: what was wrong with the answer of the service."""

    entry: JobEntry
    doubt: ProtocolError | None = None


@define(kw_only=True, eq=False)
class _Parcel:
    """One POST in the queue of the senders. `outcome`: of the POST; None: put back; or why it was not sent."""

    order: Order
    request: Request[Any]  # with URLs only
    entry: JobEntry | None
    outcome: asyncio.Future[Sent | BaseException | None] = field(factory=lambda: _new_future())

    def done(self, outcome: Sent | BaseException | None) -> None:
        if not self.outcome.done():  # else its caller has gone
            self.outcome.set_result(outcome)


def _new_future() -> asyncio.Future[Any]:
    return asyncio.get_running_loop().create_future()


class Submission:
    """Turns orders into jobs.

    At most `Limits.submits` senders, started when they are needed, take POSTs from one queue. Callers only await the
    outcome, so cancelling one harms no POST.
    """

    def __init__(
        self,
        context: Context,
        *,
        registry: Registry,
        calls: Calls,
        uploads: Uploads,
        exchange: Exchange,
    ) -> None:
        self._context = context
        self._registry = registry
        self._calls = calls
        self._uploads = uploads
        self._exchange = exchange
        self._queue: asyncio.Queue[_Parcel | None] = asyncio.Queue()
        self._senders = Tasks()
        self._idle = 0  # senders that wait for the queue
        self._in_flight = 0
        self._keyed_work = Tasks()
        self._keyed: dict[str, tuple[Order, Shared[Purchase | None]]] = {}
        self._closed = False

    async def close(self) -> None:
        """No more from the queue; then let the POSTs that have left bring their answers home (each has a deadline)."""
        self._closed = True
        self._registry.release_waiters()  # one of them may wait for a job that another process sends
        self._calls.creates.end()
        while not self._queue.empty():
            parcel = self._queue.get_nowait()
            if parcel is not None:
                parcel.done(_closed())
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
        if running.request != order.request:
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
            if order.held is not None:
                self._registry.jobs_in_hand.release(order.held)
                order.held = None

    async def _purchased(self, order: Order) -> Purchase | None:
        entry = None if order.key is None else await self._registry.by_key(order.key)
        sendable: Request[Any] | None = None
        tries = 0
        while True:
            if entry is not None:
                entry = await self._settled(entry, order)
                if entry.record.state not in _NOT_BOUGHT:
                    return Purchase(entry=entry)
            if not self._calls.creates.is_open:
                order.moved.set()
            if sendable is None:  # uploads come before the intent: one that fails leaves nothing behind
                files = order.request.local_files()
                if files:
                    order.moved.set()
                sendable = await self._uploads.sendable(order.request, files)
            if self._is_patient(order):
                await self._calls.creates.reachable()
            sent = await self._send(_Parcel(order=order, request=sendable, entry=entry))
            if sent is None:
                return None
            entry, result = sent.entry, sent.result
            if result is None:
                continue  # the key was bought, or is being bought, by another process
            if entry.record.state not in _NOT_BOUGHT:
                return Purchase(entry=entry, doubt=result.error)
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
        entry = await self._registry.fresh(entry)
        _check_same(entry.record, order)
        order.moved.set()
        if self._closed:
            raise _closed()
        await self._answered(entry)
        _check_same(entry.record, order)
        return entry

    async def _answered(self, entry: JobEntry) -> None:
        """Wait until no POST of this job is under way, for as long as one of another process can take.

        A job that is being sent as the store has it, and that no submit has in hand, becomes uncertain. Raises
        `SubmitUncertain` when another process has not answered in time, `ClientClosed`, `StoreError`.
        """
        record, timeouts = entry.record, self._context.timeouts
        if record.state is not State.SENDING:
            return
        if not self._registry.is_in_hand(record.id):
            now = self._context.clock.time()
            lost = AnswerLost(attempt=record.attempt, at=now, refusal=LEFT_BEHIND, due_at=now + timeouts.uncertain)
            await self._registry.apply(record.id, lost)
            return
        limit_s = timeouts.connect + timeouts.answer + SENDING_SLACK_S
        try:
            async with self._context.clock.timeout(limit_s):
                await self._registry.wait(entry, lambda record: record.state is not State.SENDING)
        except TimeoutError:
            await self._registry.reread(entry)
            if entry.record.state is State.SENDING:
                raise still_sending_error(record, limit_s) from None

    # --- the senders -------------------------------------------------------------------------------------------------

    async def _send(self, parcel: _Parcel) -> Sent | None:
        if self._closed:
            raise _closed()
        self._queue.put_nowait(parcel)
        if self._queue.qsize() > self._idle:
            if len(self._senders) < self._context.limits.submits:
                self._senders.start(self._work(), name="xiling sender")
            else:
                parcel.order.moved.set()
        outcome = await parcel.outcome
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    async def _work(self) -> None:
        while (parcel := await self._next()) is not None:
            try:
                parcel.done(await self._carry(parcel))
            except Exception as error:
                parcel.done(error)
            except asyncio.CancelledError:  # closing was cut short: the row tells the next client
                parcel.done(_closed(charged="maybe"))
                raise
            del parcel  # while a sender waits for the next one, it keeps no job alive

    async def _next(self) -> _Parcel | None:
        self._idle += 1
        try:
            return await self._queue.get()
        finally:
            self._idle -= 1

    async def _carry(self, parcel: _Parcel) -> Sent | None:
        if parcel.outcome.done():  # its caller has gone
            return None
        await self._calls.creates.turn()
        order = parcel.order
        is_put_back = not order.is_wanted or (self._is_patient(order) and not self._calls.creates.may_probe())
        if parcel.outcome.done() or is_put_back:
            self._calls.creates.give_back()
            return None
        self._in_flight += 1
        try:
            sent = await self._exchange.send(order, parcel.request, parcel.entry)
        finally:
            self._in_flight -= 1
        if sent.result is not None and order.held is None and not parcel.outcome.done():
            order.held = sent.entry.record.id  # also in the pause before the next POST
            self._registry.jobs_in_hand.hold(order.held)
        return sent


def _check_same(record: JobRecord, order: Order) -> None:
    """What was refused or never arrived bought nothing: its key is free for another request."""
    # A job without a request came back by its callback, and its key says which it is.
    if record.request not in (order.request, None) and record.state not in _NOT_BOUGHT:
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
