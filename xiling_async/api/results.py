"""What one exchange with the API came to, judged; no I/O."""

from __future__ import annotations

from random import Random
from typing import Any, Final

from attrs import define, field

from xiling_async._internal.redact import scrub
from xiling_async.api import backoff, retry_rules, wire
from xiling_async.api.failures import error_from, refusal, upload_error
from xiling_async.api.retry_rules import RETRY_ACTIONS, ExchangeResult, RetryAction
from xiling_async.api.transport import Answer
from xiling_async.errors import NotSent, ProtocolError, ServiceUnavailable, XilingError
from xiling_async.models.record import Outcome, Refusal
from xiling_async.models.request import Kind, Request

WAY_BACK: Final = " If its callback arrives at a receiver with the same store, the job is adopted and can be awaited."
NO_WAY_BACK: Final = " No receiver was configured, so it had no callback URL, and nothing can adopt it."
MOST_SPARE_IDS: Final = 16  # beyond what was asked for; the rest of an answer with more is not kept


@define(kw_only=True)
class Call:
    """What a judgement needs to know. `api_key`: the service may quote it, and must not be quoted with it.

    `now`: Unix seconds.
    """

    now: float
    api_key: str = field(repr=False)

    def scrubbed(self, error: BaseException) -> str:
        return scrub(f"{type(error).__name__}: {error}", self.api_key)

    def protocol_error(self, message: str, path: str, answer: Answer, **known: Any) -> ProtocolError:
        return wire.protocol_error(message, path, answer.body, self.api_key, **known)

    def pause_s(self, answer: Answer) -> float:
        return backoff.pause_after_429(answer.headers.get("Retry-After"), self.now)


# --- creates -------------------------------------------------------------------------------------------------------


@define(kw_only=True)
class Create:
    """One paid POST of a job. `request` has URLs only; `asked`: how many tasks it may make."""

    kind: Kind[Any]
    request: Request[Any]
    callback_url: str | None = field(repr=False)
    job_id: str
    asked: int


@define(kw_only=True)
class CreateResult:
    """What a paid POST came to: `task_ids`, or why there are none.

    `action`: what may be done next, None after a success. `is_sent`: something may have arrived at the service.
    `pause_s`: how long the service wants to be left alone. `error`: what was wrong with the answer, for the caller.
    """

    task_ids: tuple[str, ...] = ()
    refusal: Refusal | None = None
    action: RetryAction | None = None
    is_sent: bool = True
    pause_s: float = 0.0
    error: ProtocolError | None = None

    @classmethod
    def from_exception(cls, error: BaseException, create: Create, call: Call, *, has_left: bool) -> CreateResult:
        """`has_left`: the body was asked for, so that it may have arrived."""
        happened = retry_rules.of_exception(error, has_left=has_left) or ExchangeResult.CUT
        action, why = RETRY_ACTIONS[happened].create, call.scrubbed(error)
        if action is RetryAction.UNCERTAIN:
            return cls.uncertain(f"{why}.", create)
        if happened is ExchangeResult.UNREACHABLE:
            message = f"The service could not be reached ({why}). Nothing was sent, nothing was bought: "
            message += "look at the base URL and the network, then submit it again."
        else:
            message = f"The request could not be sent ({why}). Nothing was sent, nothing was bought: "
            message += "look at the request, the base URL and the session."
        return cls(refusal=Refusal(error="NotSent", message=message), action=action, is_sent=False)

    @classmethod
    def from_response(cls, answer: Answer, create: Create, call: Call) -> CreateResult:
        frame = wire.envelope(answer.body)
        happened = retry_rules.of_status(answer.status, has_api_body=frame is not None)
        malformed: wire.Malformed | None = None
        if happened is ExchangeResult.ANSWERED:
            try:
                return cls._accepted(wire.created_ids(frame), answer, create, call)
            except wire.Malformed as why:
                happened = ExchangeResult.REFUSED if frame is not None and frame.code != 0 else ExchangeResult.BAD_BODY
                malformed = why
        action = RETRY_ACTIONS[happened].create
        if action is RetryAction.UNCERTAIN:
            where = malformed or wire.Malformed("$", f"HTTP {answer.status}, not an answer of the API")
            message = f"The answer to a create proves nothing: {where}"
            doubt = call.protocol_error(message, where.path, answer, job_id=create.job_id)
            return cls.uncertain(str(doubt), create, doubt)
        pause_s = call.pause_s(answer) if action is RetryAction.WAIT else None
        refused = refusal(create.kind, answer.status, frame, api_key=call.api_key, retry_after=pause_s)
        return cls(refusal=refused, action=action, pause_s=pause_s or 0.0)

    @classmethod
    def uncertain(cls, why: str, create: Create, error: ProtocolError | None = None) -> CreateResult:
        way_back = NO_WAY_BACK if create.callback_url is None else WAY_BACK
        return cls(
            refusal=Refusal(error="SubmitUncertain", message=why + way_back), action=RetryAction.UNCERTAIN, error=error
        )

    @classmethod
    def _accepted(cls, ids: tuple[str, ...], answer: Answer, create: Create, call: Call) -> CreateResult:
        task_ids = ids[: create.asked + MOST_SPARE_IDS]
        if len(ids) == create.asked:
            return cls(task_ids=task_ids)
        kept = "are kept" if len(task_ids) == len(ids) else f"the first {len(task_ids)} of them are kept"
        message = (
            f"Asked for {create.asked} tasks, the service answered with {len(ids)}. They were paid for and {kept}: "
            f"`error.job` awaits them, client.find({create.job_id!r}) gives the job. Do not submit it again"
        )
        error = call.protocol_error(
            message, "$.data.task_ids", answer, job_id=create.job_id, task_ids=task_ids, charged="yes"
        )
        return cls(task_ids=task_ids, error=error)


# --- status --------------------------------------------------------------------------------------------------------


@define(kw_only=True)
class StatusResult:
    """What a status GET came to: a report, or an error.

    `is_missing`: the service says that it does not know the task (now). `is_asked`: False if the service is away, and
    the question was put off. `began_at`: when the GET left, Unix seconds.
    """

    report: wire.Report | None = None
    is_missing: bool = False
    error: XilingError | None = None
    is_asked: bool = True
    began_at: float = 0.0
    happened: ExchangeResult = ExchangeResult.ANSWERED
    pause_s: float = 0.0

    @property
    def outcome(self) -> Outcome | None:
        return None if self.report is None else self.report.outcome

    @classmethod
    def put_off(cls, task_id: str) -> StatusResult:
        message = f"The service is away: it was not asked about {task_id}. Ask again later."
        return cls(error=NotSent(message), is_asked=False)

    @classmethod
    def from_exception(cls, error: Exception, task_id: str, call: Call) -> StatusResult:
        happened = retry_rules.of_exception(error) or ExchangeResult.NOT_BEGUN
        message = f"The service could not be asked about {task_id} ({call.scrubbed(error)}). Ask again later."
        return cls(error=NotSent(message), happened=happened)

    @classmethod
    def from_response(cls, answer: Answer, kind: Kind[Any], task_id: str, call: Call) -> StatusResult:
        frame = wire.envelope(answer.body)
        happened = retry_rules.of_status(answer.status, has_api_body=frame is not None)
        if happened is ExchangeResult.ANSWERED and frame is not None and frame.code == 0:
            try:
                return cls(report=wire.status(kind, task_id, frame))
            except wire.Malformed as malformed:
                message = f"The status of {task_id} makes no sense: {malformed}"
                return cls(error=call.protocol_error(message, malformed.path, answer))
        if happened is ExchangeResult.ANSWERED and frame is None:
            message = f"The status of {task_id} is not an answer of the API"
            return cls(error=call.protocol_error(message, "$", answer), happened=ExchangeResult.BAD_BODY)
        if happened is not ExchangeResult.ANSWERED and RETRY_ACTIONS[happened].free is RetryAction.AGAIN:
            message = f"The service could not tell the status of {task_id} (HTTP {answer.status}). Ask again later."
            return cls(error=ServiceUnavailable(message, status=answer.status), happened=happened)
        pause_s = call.pause_s(answer) if happened is ExchangeResult.LIMITED else None
        is_missing = answer.status == 404 or (frame is not None and frame.code == kind.not_found)
        refused = refusal(kind, answer.status, frame, api_key=call.api_key, retry_after=pause_s, read=True)
        return cls(is_missing=is_missing, error=error_from(refused), happened=happened, pause_s=pause_s or 0.0)


# --- uploads -------------------------------------------------------------------------------------------------------


@define(kw_only=True)
class UploadResult:
    """What an upload came to: the picture's `url`, or an error; neither if the file was not what had been checked.

    `tries`: how often it was sent.
    """

    url: str | None = None
    error: XilingError | None = None
    action: RetryAction | None = None
    happened: ExchangeResult = ExchangeResult.ANSWERED
    pause_s: float = 0.0
    tries: int = 1

    @classmethod
    def from_exception(cls, error: Exception, name: str, call: Call) -> UploadResult:
        happened = retry_rules.of_exception(error) or ExchangeResult.NOT_BEGUN
        message = (
            f"The upload of {name} failed ({call.scrubbed(error)}). Nothing was bought: look at the base URL and the "
            "network, then submit it again."
        )
        return cls(error=NotSent(message), action=RETRY_ACTIONS[happened].free, happened=happened)

    @classmethod
    def from_response(cls, answer: Answer, name: str, call: Call) -> UploadResult:
        frame = wire.upload_envelope(answer.body)
        happened = retry_rules.of_status(answer.status, has_api_body=frame is not None)
        if happened is ExchangeResult.ANSWERED:
            try:
                return cls(url=wire.uploaded_url(frame))
            except wire.Malformed as malformed:
                if frame is None or frame.code == 0:
                    message = f"The upload of {name} was answered with something else, nothing was bought: {malformed}"
                    error = call.protocol_error(message, malformed.path, answer, charged="no")
                    action = RETRY_ACTIONS[ExchangeResult.BAD_BODY].free
                    return cls(error=error, action=action, happened=ExchangeResult.BAD_BODY)
                happened = ExchangeResult.REFUSED
        action = RETRY_ACTIONS[happened].free
        pause_s = backoff.retry_after(answer.headers.get("Retry-After"), call.now)
        if pause_s is None and action is RetryAction.WAIT:
            pause_s = backoff.RATE_LIMIT_S
        refused = upload_error(name, answer.status, frame, api_key=call.api_key, retry_after=pause_s)
        return cls(error=refused, action=action, happened=happened, pause_s=pause_s or 0.0)

    def next_try_in(self, tries: int, rng: Random) -> float:
        """Seconds, after so many tries."""
        return max(self.pause_s, backoff.full_jitter(tries - 1, rng.random))
