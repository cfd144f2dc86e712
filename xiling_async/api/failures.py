"""From what is remembered of a job to the error its user sees: what happened, what it means, what to do next."""

from __future__ import annotations

from typing import Any, Final

from xiling_async._internal.redact import scrub
from xiling_async.api.wire import Envelope
from xiling_async.errors import (
    NotSent,
    RateLimited,
    Rejected,
    ResultExpired,
    ServiceError,
    ServiceUnavailable,
    SubmitUncertain,
    TaskFailed,
    Unauthorized,
    XilingError,
)  # fmt: skip
from xiling_async.models.record import LEFT_BEHIND, Failed, JobRecord, Refusal, State, Succeeded
from xiling_async.models.request import Kind

_BY_STATUS: Final[dict[int, type[ServiceError]]] = {
    400: Rejected, 401: Unauthorized, 403: Unauthorized, 404: Rejected, 413: Rejected, 415: Rejected, 422: Rejected,
    429: RateLimited,
}  # fmt: skip

_SERVICE_ERRORS: Final = {cls.__name__: cls for cls in (ServiceError, Unauthorized, Rejected, RateLimited)}

_NEXT: Final[dict[type[ServiceError], str]] = {
    Unauthorized: "Check the API key (XILING_API_KEY or KEEVX_API_KEY) and the base URL.",
    Rejected: "Change the request.",
    RateLimited: "Submit more slowly (Limits.submits_per_second), or later.",
    ServiceError: "Read the service's message; the same request will most likely be refused again.",
}
_NEXT_UPLOAD: Final = _NEXT | {
    Rejected: "Use another picture.",
    RateLimited: "Try again later.",
    ServiceUnavailable: "It was tried several times; try again later.",
}


def refusal(
    kind: Kind[Any],
    status: int,
    frame: Envelope | None,
    *,
    api_key: str,
    retry_after: float | None = None,
    read: bool = False,
) -> Refusal:
    """The service's no as it is remembered: by (endpoint, code), else by HTTP status, else a plain `ServiceError`.

    `read`: it is the answer to a status GET, which costs nothing and changes nothing. `api_key`: the service may
    quote it, and must not be quoted with it.
    """
    code, message, reason = _no(status, frame, api_key)
    error = RateLimited if status == 429 else kind.refusals.get(code or 0) or _BY_STATUS.get(status, ServiceError)
    return Refusal(
        error=error.__name__,
        message=f"The service did not tell the status of the task ({reason}). The job goes on; ask again later."
        if read
        else f"The service refused the {kind.name} request ({reason}). Nothing was bought. {_NEXT[error]}",
        status=status,
        code=code,
        service_message=message,
        retry_after=retry_after,
    )


def upload_error(
    what: str, status: int, frame: Envelope | None, *, api_key: str, retry_after: float | None = None
) -> ServiceError:
    """The service's no to an upload, by HTTP status: its business codes are not documented. An upload costs nothing."""
    code, message, reason = _no(status, frame, api_key)
    error = ServiceUnavailable if status >= 500 else _BY_STATUS.get(status, ServiceError)
    return error(
        f"The upload of {what} failed ({reason}). Nothing was bought. {_NEXT_UPLOAD[error]}",
        status=status,
        code=code,
        service_message=message,
        retry_after=retry_after,
    )


def _no(status: int, frame: Envelope | None, api_key: str) -> tuple[int | None, str, str]:
    """The business code, the service's message, and the reason as text: the status with both."""
    code = frame.code if frame else None
    message = scrub(frame.message, api_key) if frame else ""
    reason = f"HTTP {status}" + (f", code {code}" if code else "") + (f": {message}" if message else "")
    return code, message, reason


def error_of(record: JobRecord, *, job: object = None) -> XilingError | None:
    """The error that this record amounts to; None while it is awaited and when every task succeeded."""
    known: dict[str, Any] = {"job_id": record.id, "task_ids": record.task_ids}
    match record.state:
        case State.DONE | State.ACCEPTED | State.SENDING:
            return None
        case State.REJECTED | State.NOT_SENT:
            return error_from(record.refusal or Refusal(error="NotSent", message="Nothing was sent."), **known)
        case State.UNCERTAIN | State.UNKNOWN:
            return _uncertain(record, job, known)
        case State.FAILED:
            return _failed(record, job, known)
        case State.EXPIRED:
            good = sum(isinstance(outcome, Succeeded) for outcome in record.outcomes)
            kept = f" The {good} results that are known are in .outcomes." if good else ""
            return ResultExpired(
                f"The service has not told what became of job {record.id} (tasks {_names(record)}) for longer than "
                f"a job can take, or no longer keeps its result. It was paid for.{kept} A callback that still comes "
                "is taken; the vendor's own list of creations is the last resort.",
                outcomes=record.outcomes,
                **known,
            )


def _names(record: JobRecord) -> str:
    return ", ".join(record.task_ids) or "unknown"


def error_from(refusal: Refusal, **known: Any) -> XilingError:
    """The error that a remembered refusal stands for."""
    cls: type[ServiceError] | None = _SERVICE_ERRORS.get(refusal.error)
    if cls is None:
        return NotSent(refusal.message, **known)
    return cls(
        refusal.message,
        status=refusal.status,
        code=refusal.code,
        service_message=refusal.service_message,
        retry_after=refusal.retry_after,
        **known,
    )


def _uncertain(record: JobRecord, job: object, known: dict[str, Any]) -> SubmitUncertain:
    why = (record.refusal or LEFT_BEHIND).message
    return SubmitUncertain(
        f"The request of job {record.id} was sent, and its fate is not known: {why} It may have been bought, so it is "
        "never sent again. Look at the vendor's own list of creations, then tell the job what it bought "
        "by `client.resolve` (with a store: `xiling resolve`).",
        job=job,
        **known,
    )


def _failed(record: JobRecord, job: object, known: dict[str, Any]) -> TaskFailed:
    failed = [outcome for outcome in record.outcomes if isinstance(outcome, Failed)]
    reasons = "; ".join(f"{outcome.task_id}: {outcome.message or 'no reason given'}" for outcome in failed)
    good = len(record.outcomes) - len(failed)
    return TaskFailed(
        f"{len(failed)} of {len(record.outcomes)} tasks of job {record.id} failed at the service ({reasons}). The job "
        f"was paid for; whether failed tasks are refunded is not documented. The {good} good ones are in .outcomes.",
        job=job,
        outcomes=[outcome for outcome in record.outcomes if outcome is not None],
        **known,
    )
