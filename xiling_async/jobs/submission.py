"""Buying a job: intent, POST, answer written down; the only place that spends money.

A create is sent again only when it cannot have been bought: it never reached the service, or the service answered 429.
Everything else that goes wrong leaves the job `uncertain`, for its callback to adopt.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Final, Literal

from attrs import define

from xiling_async._internal.clock import Clock
from xiling_async._internal.tasks import Shared, Tasks
from xiling_async.api import retry, wire
from xiling_async.api.calls import Finding, Post
from xiling_async.api.classify import Step
from xiling_async.api.failures import error_of
from xiling_async.api.throttle import Gate, Outage, Rate, Tempo
from xiling_async.api.transport import Transport
from xiling_async.errors import ClientClosed, InvalidRequest, Problem, ProtocolError, StoreError
from xiling_async.jobs.entry import JobEntry as Slot
from xiling_async.jobs.registry import Registry
from xiling_async.media.uploads import Uploads
from xiling_async.models.lifecycle import Accepted, Lost, Refused, Resent, Verdict
from xiling_async.models.record import JobRecord, State
from xiling_async.models.request import Kind, Request
from xiling_async.models.settings import Limits, Timeouts
from xiling_async.telemetry.stats import UNWATCHED, Monitor

log = logging.getLogger("xiling_async.jobs.submission")

RESENDS: Final = 5  # of a create that never arrived: with full jitter about 8 s on the average
RATE_LIMIT_WAITS: Final = 8  # of a create that got a 429: at the vendor's 30 s about 4 minutes
SENDING_SLACK_S: Final = 60.0  # beyond its deadline, for a POST of another process: by then that one counts as dead
PATIENCE_S: Final = 600.0  # of a batch, with a service that has answered before and is away now
_NOT_BOUGHT: Final = (State.NOT_SENT, State.REJECTED)


@define(kw_only=True)
class Purchase:
    """A job that was, or may have been, bought; `doubt`: why its answer could not be understood."""

    slot: Slot
    doubt: ProtocolError | None = None


class Submission:
    """Turns requests into jobs. `callback_url(kind, tasks, job_id, attempt)` is None without a receiver;
    `first_due(kind)` is when the sweeper should look at a job that was accepted now."""

    def __init__(
        self,
        *,
        registry: Registry,
        transport: Transport,
        uploads: Uploads,
        clock: Clock,
        gate: Gate,
        limits: Limits,
        timeouts: Timeouts,
        random: Callable[[], float],
        callback_url: Callable[[Kind[Any], int, str, int], str | None],
        first_due: Callable[[Kind[Any]], float | None],
        api_key: str,
        monitor: Monitor = UNWATCHED,
    ) -> None:
        self._monitor = monitor
        self._registry = registry
        self._transport = transport
        self._uploads = uploads
        self._clock = clock
        self._timeouts = timeouts
        self._random = random
        self._callback_url = callback_url
        self._first_due = first_due
        self._api_key = api_key
        self._gate = gate
        self._rate = None if limits.submits_per_second is None else Rate(limits.submits_per_second, clock)
        self._tempo = Tempo(clock)
        self._outage = Outage(gate, self._tempo, clock, random)
        self._permits = asyncio.Semaphore(limits.submits)
        self._budget = retry.RetryBudget()
        self._posts = Tasks()
        self._keyed_work = Tasks()
        self._closed = False
        self._keyed: dict[str, tuple[Request[Any], Shared[Purchase]]] = {}

    async def close(self) -> None:
        """Let the POSTs that have left bring their answers home (each has a deadline); start no more."""
        self._closed = True
        self._registry.release_waiters()  # one of them may wait for a job that another process sends
        self._gate.give_up()
        await self._posts.drain()
        await self._keyed_work.drain()

    @property
    def in_flight(self) -> int:
        """POSTs under way."""
        return len(self._posts)

    async def submit(self, request: Request[Any], key: str | None, *, patient: bool = False) -> Purchase:
        """Buy the job, or find the one that this key bought. Raises what design.md says of `Client.submit`.

        `patient`: a service that has answered before and is away now is waited for, `PATIENCE_S` seconds.
        """
        if key is None:
            return await self._purchase(request, None, patient=patient)
        running, shared = self._keyed.get(key, (request, None))
        if running != request:
            raise _other_request(key)
        if shared is None or shared.abandoned:
            work = self._keyed_work.start(self._purchase(request, key, patient=patient), name=f"xiling submit {key!r}")
            shared = Shared(work)
            entry = self._keyed[key] = (request, shared)
            work.add_done_callback(lambda _: self._forget(key, entry))
        return await shared.join()

    def _forget(self, key: str, entry: object) -> None:
        if self._keyed.get(key) is entry:
            del self._keyed[key]

    async def _purchase(self, request: Request[Any], key: str | None, *, patient: bool) -> Purchase:
        with ExitStack() as hands:
            return await self._purchased(request, key, hands, patient=patient)

    async def _purchased(self, request: Request[Any], key: str | None, hands: ExitStack, *, patient: bool) -> Purchase:
        slot = None if key is None else await self._registry.by_key(key)
        sent: Request[Any] | None = None
        tries = 0
        while True:
            if slot is not None:
                slot = await self._registry.fresh(slot)
                _check_same(slot.record, request)
                limit_s = self._timeouts.connect + self._timeouts.answer + SENDING_SLACK_S
                await self._registry.answered(slot, limit_s=limit_s, doubt_s=self._timeouts.uncertain)
                if slot.record.state not in _NOT_BOUGHT:
                    return Purchase(slot=slot)
            if sent is None:  # uploads come before the intent: one that fails leaves nothing behind
                sent = await self._uploads.sendable(request)
            await self._turn(patient=patient)
            slot, finding = await self._one_post(request, sent, key, slot)
            if finding is None:
                continue  # the key was bought, or is being bought, by somebody else
            hands.enter_context(self._registry.in_hands(slot.record.id))
            if finding.complaint is not None and isinstance(finding.event, Accepted):
                raise finding.complaint
            if slot.record.state not in _NOT_BOUGHT:
                return Purchase(slot=slot, doubt=finding.complaint)
            if slot.record.refusal is not None and slot.record.refusal.code == request.kind.unreachable:
                self._uploads.forget(sent)
            await self._pause_or_raise(slot.record, finding.step, tries, patient=patient)
            tries += 1

    async def _pause_or_raise(self, record: JobRecord, step: Step | None, tries: int, *, patient: bool) -> None:
        if step is Step.WAIT and tries < RATE_LIMIT_WAITS:
            return  # the gate is closed: it is the pause
        if step is Step.AGAIN and patient and self._outage.may_wait(PATIENCE_S):
            return
        if step is Step.AGAIN and tries < RESENDS and self._budget.take():
            await self._gate.pause(retry.full_jitter(tries, self._random))
            return
        error = error_of(record)
        assert error is not None, "a job that was not bought has a reason"
        raise error

    async def _one_post(
        self, request: Request[Any], sent: Request[Any], key: str | None, slot: Slot | None
    ) -> tuple[Slot, Finding | None]:
        """One exchange in a task of our own: a caller that is cancelled does not lose the ids."""
        return await self._posts.outlive(self._permitted(request, sent, key, slot), name="xiling POST")

    async def _turn(self, *, patient: bool) -> None:
        """Take a permit while the gate is open; it may have closed while we queued."""
        while True:
            await self._gate.passed()
            if patient:
                await self._outage.passed()
            await self._permits.acquire()
            if (wait_s := self._wait_s()) > 0:
                try:
                    await self._gate.pause(wait_s)
                except BaseException:
                    self._permits.release()
                    raise
            if self._gate.is_open and not self._closed and (self._outage.is_over or not patient):
                return
            self._permits.release()
            if self._closed:
                raise ClientClosed("The client was closed before this request was sent: nothing was bought.")

    def _wait_s(self) -> float:
        """Take the next turn that the pace gives; seconds until it comes."""
        wait_s = self._tempo.reserve()
        return wait_s if self._rate is None else max(wait_s, self._rate.reserve())

    async def _permitted(
        self, request: Request[Any], sent: Request[Any], key: str | None, slot: Slot | None
    ) -> tuple[Slot, Finding | None]:
        try:
            return await self._exchange(request, sent, key, slot)
        finally:
            self._permits.release()

    async def _exchange(
        self, request: Request[Any], sent: Request[Any], key: str | None, slot: Slot | None
    ) -> tuple[Slot, Finding | None]:
        record = self._new_record(request, key) if slot is None else slot.record
        with self._registry.in_hands(record.id):
            return await self._exchanged(record, sent, slot)

    async def _exchanged(self, record: JobRecord, sent: Request[Any], slot: Slot | None) -> tuple[Slot, Finding | None]:
        slot, is_ours = await self._intend(record, slot)
        if not is_ours:
            return slot, None
        record, kind = slot.record, sent.kind
        url = self._callback_url(kind, record.asked, record.id, record.attempt)
        began_at = self._clock.time()
        try:
            answer = await self._transport.post(kind.path, wire.create_body(sent, url))
        except Exception as error:  # whatever it is, the POST may have left by then
            post = self._post(record, kind, is_adoptable=url is not None)
            finding = post.broke(error)
        else:
            post = self._post(record, kind, is_adoptable=url is not None)
            finding = post.answered(answer)
        self._learn(finding)
        try:
            await self._write_down(post, slot, finding.event)
        finally:
            self._monitor.submitted(slot.record, *_told(finding.event), began_at=began_at, at=post.now)
        return slot, finding

    def _learn(self, finding: Finding) -> None:
        """What a POST tells of the service, for the pace of all others."""
        self._tempo.count()
        if finding.step is Step.AGAIN:
            self._outage.unreachable()
        elif finding.step is Step.UNCERTAIN:
            self._outage.doubtful()
        else:
            self._outage.answered()
        if finding.pause_s:
            self._gate.close_for(finding.pause_s)
            self._tempo.standstill()

    def _post(self, record: JobRecord, kind: Kind[Any], *, is_adoptable: bool) -> Post:
        now = self._clock.time()
        return Post(
            record=record, kind=kind, now=now, due_at=self._first_due(kind), is_adoptable=is_adoptable,
            doubt_until=now + self._timeouts.uncertain, api_key=self._api_key,
        )  # fmt: skip

    def _new_record(self, request: Request[Any], key: str | None) -> JobRecord:
        now = self._clock.time()
        return JobRecord(
            id=self._registry.new_id(key), kind=request.kind.name, key=key, request=request, asked=request.task_count,
            created_at=now, changed_at=now,
        )  # fmt: skip

    async def _intend(self, record: JobRecord, slot: Slot | None) -> tuple[Slot, bool]:
        """Write that a POST is about to leave. False: this job is not ours to send."""
        if slot is None:
            slot = await self._registry.open(record)
            return slot, slot.record is record
        change = await self._registry.commit(record.id, Resent(at=self._clock.time()))
        if change.verdict is Verdict.NO_JOB:
            raise StoreError(
                f"Job {record.id} has vanished from the store while it was submitted. Nothing was bought: submit it "
                "again.",
                charged="no", job_id=record.id,
            )  # fmt: skip
        return slot, change.verdict is Verdict.APPLIED

    async def _write_down(self, post: Post, slot: Slot, event: Accepted | Lost | Refused) -> None:
        change = await self._registry.record_answer(slot, event)
        if change.verdict is Verdict.STRANGE and isinstance(event, Accepted):
            event = post.lost("The service answered with task ids that belong to another job.")
            await self._registry.record_answer(slot, event)
        if slot.record.state is State.UNCERTAIN:
            log.warning("job %s attempt %d: fate unknown, not sent again", slot.record.id, slot.record.attempt)
        elif isinstance(event, Accepted):
            self._budget.succeeded()


def _told(
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


def _check_same(record: JobRecord, request: Request[Any]) -> None:
    if record.request not in (request, None):  # None: the job came back by its callback, and its key says which it is
        raise _other_request(record.key or "", record)


def _other_request(key: str, record: JobRecord | None = None) -> InvalidRequest:
    problem = Problem(
        field="key", value=key, rule="already names a job with another request", accepted="a key of its own"
    )
    error = InvalidRequest.of("submit", [problem])
    error.job_id = record.id if record else None
    return error
