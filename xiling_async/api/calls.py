"""From what came back of one paid POST to what must be written down about it; no I/O."""

from __future__ import annotations

from typing import Any

from attrs import define, field

from xiling_async._internal.redact import scrub
from xiling_async.api import classify, retry, wire
from xiling_async.api.classify import Happened, Step
from xiling_async.api.failures import refusal
from xiling_async.api.transport import Answer
from xiling_async.errors import ProtocolError
from xiling_async.models.lifecycle import Accepted, Lost, Refused
from xiling_async.models.record import JobRecord, Refusal
from xiling_async.models.request import Kind

WAY_BACK = " If its callback arrives at a receiver with the same store, the job is adopted and can be awaited."
NO_WAY_BACK = " No receiver was configured, so it had no callback URL, and nothing can adopt it."


@define(kw_only=True)
class Finding:
    """The event to write; the step that classify.py allows next; what the caller should hear beyond that."""

    event: Accepted | Lost | Refused
    step: Step | None = None
    pause_s: float = 0.0
    complaint: ProtocolError | None = None


@define(kw_only=True)
class Post:
    """One POST of a job: all that is needed to judge what came back of it. Times are Unix seconds.

    `due_at`: when to look at the job next if it was accepted; `doubt_until`: how long it may stay uncertain.
    """

    record: JobRecord
    kind: Kind[Any]
    now: float
    due_at: float | None
    doubt_until: float
    is_adoptable: bool
    api_key: str = field(repr=False)

    def broke(self, error: BaseException) -> Finding:
        """The exchange ended in an exception; one that classify.py does not know proves nothing."""
        happened = classify.of_exception(error) or Happened.CUT
        why = scrub(f"{type(error).__name__}: {error}", self.api_key)
        if classify.after_create(happened) is Step.AGAIN:
            told = Refusal(
                error="NotSent",
                message=f"The service could not be reached ({why}). Nothing was sent, nothing was bought: "
                "look at the base URL and the network, then submit it again.",
            )
            return Finding(event=self._refused(told, sent=False), step=Step.AGAIN)
        return Finding(event=self.lost(f"{why}."), step=Step.UNCERTAIN)

    def answered(self, answer: Answer) -> Finding:
        """The service, or something in front of it, answered."""
        frame = wire.envelope(answer.body)
        happened = classify.of_status(answer.status, has_api_body=frame is not None)
        where: wire.Malformed | None = None
        if happened is Happened.ANSWERED:
            try:
                return self._accepted(wire.created_ids(frame), answer)
            except wire.Malformed as malformed:
                happened = Happened.REFUSED if frame is not None and frame.code != 0 else Happened.BAD_BODY
                where = malformed
        step = classify.after_create(happened)
        if step is Step.UNCERTAIN:
            where = where or wire.Malformed("$", f"HTTP {answer.status}, not an answer of the API")
            doubt = self._doubt(f"The answer to a create proves nothing: {where}", where.path, answer)
            return Finding(event=self.lost(str(doubt)), step=step, complaint=doubt)
        pause_s = None
        if step is Step.WAIT:
            pause_s = retry.pause_after_429(answer.headers.get("Retry-After"), self.now)
        told = refusal(self.kind, answer.status, frame, api_key=self.api_key, retry_after=pause_s)
        return Finding(event=self._refused(told, sent=True), step=step, pause_s=pause_s or 0.0)

    def lost(self, why: str) -> Lost:
        told = Refusal(error="SubmitUncertain", message=why + (WAY_BACK if self.is_adoptable else NO_WAY_BACK))
        return Lost(attempt=self.record.attempt, at=self.now, refusal=told, due_at=self.doubt_until)

    def _refused(self, told: Refusal, *, sent: bool) -> Refused:
        return Refused(attempt=self.record.attempt, at=self.now, refusal=told, sent=sent)

    def _accepted(self, task_ids: tuple[str, ...], answer: Answer) -> Finding:
        event = Accepted(attempt=self.record.attempt, at=self.now, task_ids=task_ids, due_at=self.due_at)
        if len(task_ids) == self.record.asked:
            return Finding(event=event)
        what = (
            f"Asked for {self.record.asked} tasks, the service answered with {len(task_ids)}. They were paid for and "
            f"are kept: client.find({self.record.id!r}) gives the job. Do not submit it anew"
        )
        known: dict[str, Any] = {"task_ids": task_ids, "charged": "yes"}
        return Finding(event=event, complaint=self._doubt(what, "$.data.task_ids", answer, **known))

    def _doubt(self, what: str, path: str, answer: Answer, **known: Any) -> ProtocolError:
        return wire.protocol_error(what, path, answer.body, self.api_key, job_id=self.record.id, **known)
