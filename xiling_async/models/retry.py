"""What buys the failed tasks of a job again: the request, and the key that makes it one purchase for all who ask."""

from __future__ import annotations

import re
from typing import Any, Final

from xiling_async.errors import InvalidRequest
from xiling_async.models.record import Failed, JobRecord, State
from xiling_async.models.request import Request

_GENERATION: Final = re.compile(r"(?s)(.+)~([1-9][0-9]*)")


def retry_key(record: JobRecord) -> str:
    """`order-42~1` for the job `order-42`, `order-42~2` for its retry; of a job without a key its id stands for it."""
    name = record.key or record.id
    generation = _GENERATION.fullmatch(name) if record.retry_of is not None else None
    return f"{name}~1" if generation is None else f"{generation[1]}~{int(generation[2]) + 1}"


def retry_request(record: JobRecord) -> Request[Any]:
    """The request for exactly the failed tasks. Raises `InvalidRequest` for a job that did not fail, and for one whose
    request is not known."""
    if record.state is not State.FAILED:
        raise _not_retried(record, f"it is {record.state.value}: only a failed job can be bought again")
    if record.request is None:
        raise _not_retried(record, "its request is not known, since it was found by a task id or a callback alone")
    places = [place for place, outcome in enumerate(record.outcomes) if isinstance(outcome, Failed)]
    return record.request.for_tasks(places)


def _not_retried(record: JobRecord, why: str) -> InvalidRequest:
    error = InvalidRequest(f"Job {record.id} cannot be bought again: {why}. Nothing was sent.")
    error.job_id, error.task_ids = record.id, record.task_ids
    return error
