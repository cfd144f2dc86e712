"""One paid POST of a job: the intent is written, then it is sent, then what came of it is written."""

from __future__ import annotations

import asyncio
import logging
import secrets
from typing import Any, Final, Literal

from attrs import define, field, frozen

from xiling_async.api.calls import Calls
from xiling_async.api.classify import Step
from xiling_async.api.results import Create, CreateResult
from xiling_async.errors import StoreError, XilingError
from xiling_async.jobs.context import Context
from xiling_async.jobs.poller import Poller
from xiling_async.jobs.registry import Registry, Slot
from xiling_async.models.lifecycle import Accepted, Lost, Refused, Resent, Verdict
from xiling_async.models.record import JobRecord, Refusal, State
from xiling_async.models.request import Request
from xiling_async.webhooks.receiver import WebhookReceiver

log = logging.getLogger("xiling_async.jobs.submission")

TOKEN_LIFE_S: Final = 7 * 24 * 3600.0  # results live 7 days: a later callback would tell of a dead link


@define(kw_only=True, eq=False)
class Order:
    """What one caller wants to buy.

    `wanted`: set while the caller waits for its job (a consumer of `map` may stop asking); None: always. Such a caller
    also waits for a service that is away. `slot`: the job, once its intent is written. `moved`: set when the POST
    leaves, or has to wait for something.
    """

    request: Request[Any]
    key: str | None = None
    wanted: asyncio.Event | None = None
    slot: Slot | None = None
    moved: asyncio.Event = field(factory=asyncio.Event)

    @property
    def is_patient(self) -> bool:
        return self.wanted is not None

    @property
    def is_wanted(self) -> bool:
        return self.wanted is None or self.wanted.is_set()


@frozen(kw_only=True)
class Sent:
    """What one POST of a job came to. `result`: None if the job was not ours to send."""

    slot: Slot
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
        self._unwritten: dict[str, Accepted | Lost | Refused] = {}

    async def send(self, order: Order, request: Request[Any], slot: Slot | None) -> Sent:
        """Send the next POST of this order. `request`: its request with URLs only; `slot`: its job, if it has one."""
        self._calls.check()  # a session that cannot send is told before the intent
        slot, is_ours = await self._intend(order, slot)
        order.slot = slot
        order.moved.set()
        if not is_ours:
            return Sent(slot=slot, result=None)
        record = slot.record
        create = Create(
            kind=request.kind, request=request, callback_url=self._callback_url(record),
            job_id=record.id, asked=record.asked,
        )  # fmt: skip
        began_at = self._clock.time()
        result = await self._calls.create(create)
        event = self._event(result, record, create)
        try:
            await self._write_down(slot, event, create)
        finally:
            self._context.monitor.submitted(slot.record, *_named(event), began_at=began_at, at=event.at)
        return Sent(slot=slot, result=result)

    async def _intend(self, order: Order, slot: Slot | None) -> tuple[Slot, bool]:
        """Write that a POST is about to leave. False: this job is not ours to send."""
        now, request = self._clock.time(), order.request
        if slot is not None:
            resent = Resent(at=now, request=request)
            change = await self._registry.commit(slot.record.id, resent)
            if change.verdict is Verdict.NO_JOB:
                raise StoreError(
                    f"Job {slot.record.id} has vanished from the store. Nothing was bought: submit it again.",
                    job_id=slot.record.id,
                )
            return slot, change.verdict is Verdict.APPLIED
        new = JobRecord(
            id=secrets.token_hex(16), kind=request.kind.name, key=order.key, request=request,
            asked=request.task_count, created_at=now, changed_at=now,
        )  # fmt: skip
        slot = await self._registry.open(new)
        return slot, slot.record.id == new.id

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

    def _event(self, result: CreateResult, record: JobRecord, create: Create) -> Accepted | Lost | Refused:
        now, attempt = self._clock.time(), record.attempt
        if result.refusal is None:
            due_at = self._poller.first_due(create.kind)
            return Accepted(attempt=attempt, at=now, task_ids=result.task_ids, due_at=due_at)
        if result.step is Step.UNCERTAIN:
            return self._lost(record, result.refusal)
        return Refused(attempt=attempt, at=now, refusal=result.refusal, sent=result.is_sent)

    def _lost(self, record: JobRecord, refusal: Refusal) -> Lost:
        now = self._clock.time()
        return Lost(attempt=record.attempt, at=now, refusal=refusal, due_at=now + self._context.timeouts.uncertain)

    async def _write_down(self, slot: Slot, event: Accepted | Lost | Refused, create: Create) -> None:
        try:
            change = await self._registry.commit(slot.record.id, event)
            if change.verdict is Verdict.STRANGE and isinstance(event, Accepted):
                why = "The service answered with task ids that belong to another job."
                refusal = CreateResult.uncertain(why, create).refusal
                assert refusal is not None
                event = self._lost(slot.record, refusal)
                await self._registry.commit(slot.record.id, event)
        except StoreError as error:
            self._unwritten[slot.record.id] = event
            raise _unwritten(slot.record, event, error) from error
        if slot.record.state is State.UNCERTAIN:
            log.warning("job %s attempt %d: fate unknown, not sent again", slot.record.id, slot.record.attempt)

    async def write_again(self, slot: Slot) -> None:
        """What the store could not write when it was known: without it nobody would ever hear of this job again."""
        event = self._unwritten.get(slot.record.id)
        if event is not None:
            await self._registry.apply(slot.record.id, event)
            self._unwritten.pop(slot.record.id, None)


def _named(
    event: Accepted | Lost | Refused,
) -> tuple[Literal["accepted", "rejected", "not_sent", "uncertain"], str | None]:
    """What became of a POST in one word, and the name of its error."""
    match event:
        case Accepted():
            return "accepted", None
        case Refused():
            return "rejected" if event.sent else "not_sent", event.refusal.error
        case Lost():
            return "uncertain", event.refusal.error


def _unwritten(record: JobRecord, event: Accepted | Lost | Refused, cause: XilingError) -> StoreError:
    """The POST is over, its result could not be written: the caller is the only one who can keep it now."""
    match event:
        case Accepted(task_ids=ids):
            log.error("job %s: bought tasks %s could not be written down", record.id, ", ".join(ids))
            said = f"The job WAS bought: keep its task ids {', '.join(ids)}; client.job(task_id) awaits them."
            return StoreError(f"{said} ({cause})", charged="yes", job_id=record.id, task_ids=ids)
        case Refused():
            said = f"Nothing was bought: {event.refusal.message}"
            return StoreError(f"{said} ({cause})", charged="no", job_id=record.id)
        case _:
            said = f"The job may have been bought; it is never sent again: {event.refusal.message}"
            return StoreError(f"{said} ({cause})", charged="maybe", job_id=record.id)
