"""How a job ended, for the reader: result URLs or JSON on standard output, the error and its exit code."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from attrs import asdict, frozen

from xiling_async.api.failures import error_of
from xiling_async.cli.output import printable
from xiling_async.errors import ConfigurationError, DownloadError, InvalidRequest, WaitTimeout, XilingError
from xiling_async.models.record import Failed, JobRecord, Outcome, State, Succeeded
from xiling_async.models.request import Request, is_http_url

URL_CHARACTERS: Final = 8192  # a signed link has about 1,000


class Stopped(XilingError):
    """Ctrl-C ended the wait; the message says what was bought by then, and how to go on."""


class Failures(Exception):
    """Several jobs did not succeed, each for a reason of its own."""

    def __init__(self, errors: Sequence[XilingError]) -> None:
        super().__init__(f"{len(errors)} jobs did not succeed")
        self.errors = errors


_CODES: Final[tuple[tuple[type[XilingError], int], ...]] = (
    (InvalidRequest, 2), (ConfigurationError, 2), (WaitTimeout, 3), (Stopped, 130),
)  # fmt: skip
_CHARGED: Final = {
    State.SENDING: "maybe", State.UNCERTAIN: "maybe", State.UNKNOWN: "maybe",
    State.NOT_SENT: "no", State.REJECTED: "no",
}  # fmt: skip


@frozen
class Ending:
    """How far a job came, and the error that says why it did not succeed. No record: there was no job.

    `unsaved`: why a result that there is has no file.
    """

    record: JobRecord | None
    error: XilingError | None = None
    unsaved: XilingError | None = None


def code_of(error: Exception) -> int:
    """The exit code that this error stands for."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), 1)


def message_of(error: Exception) -> str:
    """The error's own message: one line, but for the rules of a request, which are a line each."""
    lines = str(error).split("\n") if isinstance(error, InvalidRequest) else [" ".join(str(error).split())]
    return "\n".join(map(printable, lines))


def urls(record: JobRecord) -> list[str]:
    """The link of each task that succeeded, in task order; what is not an http(s) URL of a sane length is left out."""
    links = [outcome.result.video_url for outcome in record.outcomes if isinstance(outcome, Succeeded)]
    return [link for link in links if is_link(link)]


def is_link(value: object) -> bool:
    """Whether this is an http(s) URL that can be printed as a result."""
    return is_http_url(value) and len(str(value)) <= URL_CHARACTERS


def without_link(record: JobRecord) -> DownloadError | None:
    """Why not every task that succeeded has a link to print; None: all have one."""
    done = [outcome for outcome in record.outcomes if isinstance(outcome, Succeeded)]
    bad = [outcome.task_id for outcome in done if not is_link(outcome.result.video_url)]
    if not bad:
        return None
    return DownloadError(
        f"What the service gave as video_url of task {', '.join(bad)} is not an http(s) URL of at most "
        f"{URL_CHARACTERS:,} characters. The task was bought and has succeeded; --json shows what was given.",
        task_ids=bad,
    )


def paths(record: JobRecord, files: Mapping[str, Sequence[Path]]) -> list[str]:
    """The files that the results have, in task order."""
    return [str(path) for task_id in record.task_ids for path in files.get(task_id, ())]


def as_json(ending: Ending, files: Mapping[str, Sequence[Path]] | None = None) -> str:
    """One JSON object on one line. All names are always there; `outcomes[i]` is of `task_ids[i]`, null while it is
    awaited. Where files are wanted, each outcome has a `file`, null where there is none. Times are Unix seconds."""
    record, error = ending.record, ending.error or ending.unsaved
    fields: dict[str, Any] = {
        "job_id": None, "key": None, "kind": None, "state": None, "task_ids": [], "outcomes": [], "request": None,
        "created_at": None, "changed_at": None, "ended_at": None, "retry_of": None, "metadata": {},
    }  # fmt: skip
    charged: str = "no"
    if record is not None:
        fields |= {name: getattr(record, name) for name in ("key", "kind", "state", "created_at", "changed_at")}
        fields |= {"job_id": record.id, "ended_at": record.ended_at, "retry_of": record.retry_of}
        fields["metadata"] = dict(record.metadata)
        fields["task_ids"] = record.task_ids
        fields["outcomes"] = [_outcome(outcome, files) for outcome in record.outcomes]
        fields["request"] = None if record.request is None else _request(record.request)
        charged = _CHARGED.get(record.state, "yes")
    if error is not None:
        fields["job_id"] = fields["job_id"] or error.job_id
        fields["task_ids"] = fields["task_ids"] or error.task_ids
        charged = error.charged
    fields |= {"charged": charged, "error": None, "message": None}
    if error is not None:
        fields |= {"error": type(error).__name__, "message": str(error)}
    return json.dumps(fields, default=str)  # a local file of the request is a path


def remembered(record: JobRecord) -> Ending:
    """How a job stands, by its record alone."""
    return Ending(record, error_of(record))


def _request(request: Request[Any]) -> dict[str, Any]:
    """What was asked for, in the wire's own names."""
    values = asdict(request, recurse=False)
    extra = values.pop("extra", None)
    return extra or {name: value for name, value in values.items() if value is not None}


def _outcome(outcome: Outcome | None, files: Mapping[str, Sequence[Path]] | None) -> dict[str, Any] | None:
    if outcome is None:
        return None
    fields: dict[str, Any] = {"ok": not isinstance(outcome, Failed), "task_id": outcome.task_id}
    if files is not None:
        fields["file"] = next(map(str, files.get(outcome.task_id, ())), None)
    if isinstance(outcome, Failed):
        return {**fields, "message": outcome.message}
    # What a kind that this version does not know has left in a store is a mapping already.
    result = outcome.result if isinstance(outcome.result, Mapping) else asdict(outcome.result)
    return {**fields, **result}


def raise_errors(endings: Iterable[Ending]) -> None:
    """Raise what kept these jobs from succeeding."""
    errors = [error for ending in endings for error in (ending.error, ending.unsaved) if error is not None]
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise Failures(errors)
