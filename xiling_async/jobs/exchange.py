"""One paid POST of a job: the intent is written, then it is sent, then what came of it is written."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any, Final, Literal

from attrs import define, field

from xiling_async.api.calls import Calls
from xiling_async.api.results import Create, CreateResult
from xiling_async.api.retry_rules import RetryAction
from xiling_async.errors import ProtocolError, StoreError, SubmitUncertain, XilingError
from xiling_async.jobs.entry import SHOWN, JobEntry, check_ids
from xiling_async.jobs.poller import PollSchedule
from xiling_async.jobs.registry import Registry
from xiling_async.models.lifecycle import Accepted, AnswerLost, Change, Refused, ResendStarted, Verdict
from xiling_async.models.metadata import NO_METADATA
from xiling_async.models.record import LEFT_BEHIND, NOT_BOUGHT, JobRecord, Refusal, State
from xiling_async.models.request import Request
from xiling_async.models.settings import Timeouts
from xiling_async.telemetry.events import Submitted
from xiling_async.telemetry.stats import UNWATCHED, Monitor
from xiling_async.webhooks.receiver import WebhookReceiver

log = logging.getLogger("xiling_async.jobs.submission")

TOKEN_LIFE_S: Final = 7 * 24 * 3600.0  # results live 7 days: a later callback would have a dead link
SOON_S: Final = 10.0  # so long a submit waits for a store that could not write its answer
SENDING_SLACK_S: Final = 60.0  # beyond its deadline, for a POST of another process: by then that one counts as dead
Answer = Accepted | AnswerLost | Refused


@define(kw_only=True, eq=False)
class Order:
    """What one caller wants to buy.

    `wanted`: set while the caller waits for its job (a consumer of `map` may stop asking); None: always. Such a caller
    also waits for a service that is away. `entry`: the job, once its intent is written. `moved`: set when the POST
    leaves, or has to wait for something. `job_in_hand`: the id of its job, from the first POST to the end of the
    purchase.
    """

    request: Request[Any]
    key: str | None = None
    metadata: Mapping[str, str] = NO_METADATA
    retry_of: str | None = None
    wanted: asyncio.Event | None = None
    entry: JobEntry | None = None
    job_in_hand: str | None = None
    moved: asyncio.Event = field(factory=asyncio.Event)

    @property
    def is_patient(self) -> bool:
        return self.wanted is not None

    @property
    def is_wanted(self) -> bool:
        return self.wanted is None or self.wanted.is_set()


@define(kw_only=True)
class Purchase:
    """A job, and what its last POST came to. `result`: None if this order did not send it."""

    entry: JobEntry
    result: CreateResult | None = None

    @property
    def answer_error(self) -> ProtocolError | None:
        """What was wrong with the answer of the service."""
        return None if self.result is None else self.result.error

    @property
    def is_paid(self) -> bool:
        """This order has bought the job, or may have."""
        return self.result is not None and self.entry.record.state not in NOT_BOUGHT


class Exchange:
    """Sends POSTs, each at most once, and records what is known of them."""

    def __init__(
        self,
        schedule: PollSchedule,
        *,
        registry: Registry,
        calls: Calls,
        receiver: WebhookReceiver | None,
        timeouts: Timeouts,
        monitor: Monitor = UNWATCHED,
    ) -> None:
        self._schedule = schedule
        self._clock = schedule.clock
        self._registry = registry
        self._calls = calls
        self._receiver = receiver
        self._timeouts = timeouts
        self._monitor = monitor

    async def send(self, order: Order, request: Request[Any], entry: JobEntry | None) -> Purchase:
        """Send the next POST of this order. `request`: its request with URLs only; `entry`: its job, if it has one."""
        self._calls.check()  # raises for a session that cannot send, before the intent
        record = self._new_record(order) if entry is None else entry.record
        in_hand = self._registry.jobs_in_hand
        in_hand.hold(record.id)
        try:
            entry, is_ours = await self._intend(order, record, entry)
            order.entry = entry
            order.moved.set()
            return Purchase(entry=entry, result=await self._exchanged(entry, request) if is_ours else None)
        finally:
            in_hand.release(record.id)

    async def await_answer(self, entry: JobEntry) -> None:
        """Wait until no POST of this job is under way, for as long as one of another process can take.

        A job that is being sent as the store has it, and that no submit has in hand, becomes uncertain. Raises
        `SubmitUncertain` when another process has not answered in time, `ClientClosed`, `StoreError`.
        """
        record = entry.record
        if record.state is not State.SENDING:
            return
        if not self._registry.is_in_hand(record.id):
            await self._registry.apply(record.id, self._lost(record, LEFT_BEHIND))
            return
        limit_s = self._timeouts.connect + self._timeouts.answer + SENDING_SLACK_S
        try:
            async with self._clock.timeout(limit_s):
                await self._registry.wait(entry, lambda record: record.state is not State.SENDING)
        except TimeoutError:
            await self._registry.reread(entry)
            if entry.record.state is State.SENDING:
                raise _still_sending_error(record, limit_s) from None

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
            self._monitor.emit(Submitted(
                job_id=record.id, key=record.key, kind=record.kind, attempt=entry.record.attempt, result=outcome,
                error=error, task_ids=entry.record.task_ids, began_at=began_at, at=event.at, metadata=record.metadata,
            ))  # fmt: skip
        return result

    def _new_record(self, order: Order) -> JobRecord:
        now, request = self._clock.time(), order.request
        return JobRecord(
            id=self._registry.new_id(order.key), kind=request.kind.name, key=order.key, request=request,
            asked=request.task_count, created_at=now, changed_at=now, metadata=order.metadata, retry_of=order.retry_of,
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

    def _event(self, result: CreateResult, record: JobRecord, create: Create) -> Answer:
        now, attempt = self._clock.time(), record.attempt
        if result.refusal is None:
            due_at = self._schedule.first_due(create.kind)
            return Accepted(attempt=attempt, at=now, task_ids=result.task_ids, due_at=due_at)
        if result.action is RetryAction.UNCERTAIN:
            return self._lost(record, result.refusal)
        return Refused(attempt=attempt, at=now, refusal=result.refusal, sent=result.is_sent)

    def _lost(self, record: JobRecord, refusal: Refusal) -> AnswerLost:
        now = self._clock.time()
        return AnswerLost(attempt=record.attempt, at=now, refusal=refusal, due_at=now + self._timeouts.uncertain)

    async def _write_down(self, entry: JobEntry, event: Answer, create: Create) -> None:
        change = await self._record(entry, event)
        if change.verdict is Verdict.UNKNOWN_TASK and isinstance(event, Accepted):
            why = "The service answered with task ids that belong to another job."
            refusal = CreateResult.uncertain(why, create).refusal
            assert refusal is not None
            await self._record(entry, self._lost(entry.record, refusal))
        if entry.record.state is State.UNCERTAIN:
            log.warning("job %s attempt %d: fate unknown, not sent again", entry.record.id, entry.record.attempt)

    async def _record(self, entry: JobEntry, event: Answer) -> Change:
        """Commit what became of a POST. What the store cannot write now is held in memory, where the job is awaited,
        polled and adopted, and written in the background. Raises `StoreError`, which says what was bought, if that
        takes longer than `SOON_S`."""
        before = entry.record
        try:
            change = await self._registry.commit(before.id, event)
        except BaseException as error:
            self._registry.hold(entry, event)
            if not isinstance(error, Exception):
                raise
            log.warning("job %s: %s could not be written yet: %s", before.id, what := _summary(event), error)
            if await self._registry.is_written(before.id, limit_s=SOON_S):
                return Change(Verdict.APPLIED, entry.record)
            log.error("job %s: %s could not be written down; trying again until it is: %s", before.id, what, error)
            raise _unwritten_error(before, event, error) from error
        if isinstance(event, Accepted):
            check_ids(before, event, change)
        return change


def _named(
    event: Answer,
) -> tuple[Literal["accepted", "rejected", "not_sent", "uncertain"], str | None]:
    """What became of a POST in one word, and the name of its error."""
    match event:
        case Accepted():
            return "accepted", None
        case Refused():
            return "rejected" if event.sent else "not_sent", event.refusal.error
        case AnswerLost():
            return "uncertain", event.refusal.error


def _summary(event: Answer) -> str:
    """What became of a POST, for the log."""
    return f"bought tasks {', '.join(event.task_ids[:SHOWN])}" if isinstance(event, Accepted) else "its result"


def _unwritten_error(record: JobRecord, event: Answer, cause: BaseException) -> StoreError:
    """The POST is over, and the store could not write its result: what that means for the money, and what to do."""
    reason = str(cause) if isinstance(cause, XilingError) else type(cause).__name__
    later = "The result is kept in memory and written as soon as the store takes it"
    match event:
        case Accepted(task_ids=ids):
            return StoreError(
                f"The job WAS bought: its task ids are {', '.join(ids)}. {later}; until then client.job(task_id) "
                f"awaits it. Do not submit it again without its key. ({reason})",
                charged="yes", job_id=record.id, task_ids=ids,
            )  # fmt: skip
        case Refused():
            return StoreError(
                f"Nothing was bought: {event.refusal.message} {later}. ({reason})", charged="no", job_id=record.id
            )
        case AnswerLost():
            return StoreError(
                f"The job may have been bought, and is never sent again: {event.refusal.message} {later}. ({reason})",
                charged="maybe", job_id=record.id,
            )  # fmt: skip


def _still_sending_error(record: JobRecord, limit_s: float) -> SubmitUncertain:
    return SubmitUncertain(
        f"Another process has been sending job {record.id} for more than {limit_s:g} s and has not written what became "
        "of it. It may have been bought, so it is not sent from here. Wait for that process, or tell the job what was "
        "bought: client.resolve().",
        job_id=record.id,
    )
