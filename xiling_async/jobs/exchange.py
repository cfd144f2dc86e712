"""One paid POST of a job: the intent is written, then it is sent, then what came of it is written."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Final, Literal

from attrs import define, field

from xiling_async.api.calls import Calls
from xiling_async.api.classify import RetryAction
from xiling_async.api.results import Create, CreateResult
from xiling_async.errors import StoreError
from xiling_async.jobs.context import Context
from xiling_async.jobs.entry import JobEntry
from xiling_async.jobs.poller import Poller
from xiling_async.jobs.registry import Registry
from xiling_async.models.lifecycle import Accepted, AnswerLost, Refused, ResendStarted, Verdict
from xiling_async.models.record import JobRecord, Refusal, State
from xiling_async.models.request import Request
from xiling_async.telemetry.events import Submitted
from xiling_async.webhooks.receiver import WebhookReceiver

log = logging.getLogger("xiling_async.jobs.submission")

TOKEN_LIFE_S: Final = 7 * 24 * 3600.0  # results live 7 days: a later callback would tell of a dead link


@define(kw_only=True, eq=False)
class Order:
    """What one caller wants to buy.

    `wanted`: set while the caller waits for its job (a consumer of `map` may stop asking); None: always. Such a caller
    also waits for a service that is away. `entry`: the job, once its intent is written. `moved`: set when the POST
    leaves, or has to wait for something. `held`: the id of its job in hand, from the first POST to the end of the
    purchase.
    """

    request: Request[Any]
    key: str | None = None
    wanted: asyncio.Event | None = None
    entry: JobEntry | None = None
    held: str | None = None
    moved: asyncio.Event = field(factory=asyncio.Event)

    @property
    def is_patient(self) -> bool:
        return self.wanted is not None

    @property
    def is_wanted(self) -> bool:
        return self.wanted is None or self.wanted.is_set()


@define(kw_only=True)
class Sent:
    """What one POST of a job came to. `result`: None if the job was not ours to send."""

    entry: JobEntry
    result: CreateResult | None


class Exchange:
    """Sends POSTs, each at most once, and writes down what is known of them."""

    def __init__(
        self,
        context: Context,
        *,
        registry: Registry,
        calls: Calls,
        poller: Poller,
        receiver: WebhookReceiver | None,
    ) -> None:
        self._context = context
        self._clock = context.clock
        self._registry = registry
        self._calls = calls
        self._poller = poller
        self._receiver = receiver

    async def send(self, order: Order, request: Request[Any], entry: JobEntry | None) -> Sent:
        """Send the next POST of this order. `request`: its request with URLs only; `entry`: its job, if it has one."""
        self._calls.check()  # a session that cannot send is told before the intent
        record = self._new_record(order) if entry is None else entry.record
        in_hand = self._registry.jobs_in_hand
        in_hand.hold(record.id)
        try:
            entry, is_ours = await self._intend(order, record, entry)
            order.entry = entry
            order.moved.set()
            return Sent(entry=entry, result=await self._exchanged(entry, request) if is_ours else None)
        finally:
            in_hand.release(record.id)

    async def _exchanged(self, entry: JobEntry, request: Request[Any]) -> CreateResult:
        record = entry.record
        create = Create(
            kind=request.kind, request=request, callback_url=self._callback_url(record), job_id=record.id,
            asked=record.asked,
        )  # fmt: skip
        began_at = self._clock.time()
        result = await self._calls.create(create)
        event = self._event(result, record, create)
        try:
            await self._write_down(entry, event, create)
        finally:
            outcome, error = _named(event)
            self._context.monitor.emit(Submitted(
                job_id=record.id, key=record.key, kind=record.kind, attempt=entry.record.attempt, result=outcome,
                error=error, task_ids=entry.record.task_ids, began_at=began_at, at=event.at,
            ))  # fmt: skip
        return result

    def _new_record(self, order: Order) -> JobRecord:
        now, request = self._clock.time(), order.request
        return JobRecord(
            id=self._registry.new_id(order.key), kind=request.kind.name, key=order.key, request=request,
            asked=request.task_count, created_at=now, changed_at=now,
        )  # fmt: skip

    async def _intend(self, order: Order, record: JobRecord, entry: JobEntry | None) -> tuple[JobEntry, bool]:
        """Write that a POST is about to leave. False: this job is not ours to send."""
        if entry is None:
            entry = await self._registry.open(record)
            return entry, entry.record is record
        resent = ResendStarted(at=self._clock.time(), request=order.request)
        change = await self._registry.commit(record.id, resent)
        if change.verdict is Verdict.NO_JOB:
            raise StoreError(
                f"Job {record.id} has vanished from the store while it was submitted. Nothing was bought: submit it "
                "again.",
                charged="no", job_id=record.id,
            )  # fmt: skip
        return entry, change.verdict is Verdict.APPLIED

    def _callback_url(self, record: JobRecord) -> str | None:
        if self._receiver is None:
            return None
        assert record.request is not None, "what is sent is known"
        return self._receiver.callback_url(
            kind_number=record.request.kind.number,
            tasks=min(record.asked, 255),
            job_id=record.id,
            attempt=record.attempt,
            expires_at=self._clock.time() + TOKEN_LIFE_S,
        )

    def _event(self, result: CreateResult, record: JobRecord, create: Create) -> Accepted | AnswerLost | Refused:
        now, attempt = self._clock.time(), record.attempt
        if result.refusal is None:
            due_at = self._poller.first_due(create.kind)
            return Accepted(attempt=attempt, at=now, task_ids=result.task_ids, due_at=due_at)
        if result.action is RetryAction.UNCERTAIN:
            return self._lost(record, result.refusal)
        return Refused(attempt=attempt, at=now, refusal=result.refusal, sent=result.is_sent)

    def _lost(self, record: JobRecord, refusal: Refusal) -> AnswerLost:
        now = self._clock.time()
        return AnswerLost(
            attempt=record.attempt, at=now, refusal=refusal, due_at=now + self._context.timeouts.uncertain
        )

    async def _write_down(self, entry: JobEntry, event: Accepted | AnswerLost | Refused, create: Create) -> None:
        change = await self._registry.record_answer(entry, event)
        if change.verdict is Verdict.UNKNOWN_TASK and isinstance(event, Accepted):
            why = "The service answered with task ids that belong to another job."
            refusal = CreateResult.uncertain(why, create).refusal
            assert refusal is not None
            await self._registry.record_answer(entry, self._lost(entry.record, refusal))
        if entry.record.state is State.UNCERTAIN:
            log.warning("job %s attempt %d: fate unknown, not sent again", entry.record.id, entry.record.attempt)


def _named(
    event: Accepted | AnswerLost | Refused,
) -> tuple[Literal["accepted", "rejected", "not_sent", "uncertain"], str | None]:
    """What became of a POST in one word, and the name of its error."""
    match event:
        case Accepted():
            return "accepted", None
        case Refused():
            return "rejected" if event.sent else "not_sent", event.refusal.error
        case AnswerLost():
            return "uncertain", event.refusal.error
