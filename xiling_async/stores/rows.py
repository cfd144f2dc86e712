"""The row form of what is remembered: JSON that yesterday's library wrote and tomorrow's must still read.

It is not the wire form: the service may rename a field, a rule may become stricter, the rows stay. Reading checks
nothing again, ignores what it does not know, and fills in what is missing. The JSON is plain ASCII, so that no text of
a service (half an emoji, a NUL) can be one that a database refuses.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from attrs import NOTHING, asdict, fields, fields_dict, resolve_types
from cattrs import Converter

from xiling_async._internal.redact import scrub
from xiling_async.kinds import BY_NAME
from xiling_async.models.metadata import NO_METADATA
from xiling_async.models.record import Failed, JobRecord, Outcome, Refusal, State, Succeeded
from xiling_async.models.request import JSON, Request

log = logging.getLogger("xiling_async.stores")

# One column each, in this order; a store may add columns of its own behind them.
COLUMNS: Final = (
    "id", "key", "kind", "request", "asked", "created_at", "changed_at", "state", "attempt", "tasks", "refusal",
    "due_at", "failed_asks", "version", "is_adopted", "metadata", "retry_of", "handover_at",
)  # fmt: skip

_CALLBACK: Final = "callback"

_converter = Converter(detailed_validation=False)
for _plain in (str, int, float, bool):  # as they were written: cattrs would make text of a None, and 1 of a 1.5
    _converter.register_structure_hook(_plain, lambda value, _: value)


class RowReader:
    """Reads many rows. One that cannot be read (a damaged file, a newer version's) is skipped, so that it hides no
    other, and logged once; asking for that very job raises `StoreError`. `skipped`: the ids of such jobs.

    `read`: the record of one row, whose first column is the job's id.
    """

    def __init__(self, read: Callable[[Sequence[Any]], JobRecord]) -> None:
        self._read = read
        self.skipped: set[str] = set()

    def records(self, rows: Iterable[Sequence[Any]]) -> list[JobRecord]:
        records = []
        for row in rows:
            try:
                records.append(self._read(row))
            except Exception as error:  # whatever stands in a row, its neighbours are read
                self._skip(str(row[0]), error)
        return records

    def _skip(self, job_id: str, error: Exception) -> None:
        if job_id not in self.skipped:
            self.skipped.add(job_id)
            log.error(
                "job %s of the store cannot be read and is skipped: %s: %s. What it bought is not known, and its key "
                "is not bought again.", scrub(job_id), type(error).__name__, scrub(str(error))[:200],
            )  # fmt: skip


def row_of(record: JobRecord) -> tuple[str | int | float | None, ...]:
    """The values of `COLUMNS`."""
    return (
        record.id, record.key, record.kind, request_row(record.request), record.asked, record.created_at,
        record.changed_at, record.state.value, record.attempt, tasks_row(record), refusal_row(record.refusal),
        record.due_at, record.failed_asks, record.version, record.is_adopted, metadata_row(record.metadata),
        record.retry_of, record.handover_at,
    )  # fmt: skip


def record_of(row: Iterable[Any]) -> JobRecord:
    """The record of the values of `COLUMNS`. Raises `ValueError` for what no version has written."""
    values = dict(zip(COLUMNS, row, strict=True))
    kind = values["kind"]
    tasks = json.loads(values.pop("tasks") or "[]")
    values["request"] = request_of(kind, values["request"])
    values["refusal"] = refusal_of(values["refusal"])
    values["state"] = State(values["state"])
    values["is_adopted"] = bool(values["is_adopted"])
    values["metadata"] = metadata_of(values["metadata"])
    values["task_ids"] = tuple(task_id for task_id, *_ in tasks)
    values["outcomes"] = tuple(_outcome_of(kind, task_id, said) for task_id, said, *_ in tasks)
    values["unconfirmed"] = sum(_CALLBACK in marks for _, _, *marks in tasks)
    return JobRecord(**values)


def metadata_row(metadata: Mapping[str, str]) -> str | None:
    return _dumps(dict(metadata)) if metadata else None


def metadata_of(row: str | None) -> Mapping[str, str]:
    return NO_METADATA if row is None else {str(name): str(value) for name, value in json.loads(row).items()}


def has_unsaved_result(record: JobRecord) -> bool:
    """Whether a task has succeeded and its result has no file: for a column of its own, with an index."""
    return any(isinstance(outcome, Succeeded) and outcome.file is None for outcome in record.outcomes)


def request_row(request: Request[Any] | None) -> str | None:
    if request is None:
        return None
    return _dumps({name: _path_row(getattr(request, name)) for name in fields_dict(type(request))})


def _path_row(value: JSON) -> JSON:
    """A local file is `{"path": …}`: which text was a path must still be known when the row is read."""
    if isinstance(value, tuple):
        return [_path_row(item) for item in value]
    return {"path": str(value)} if isinstance(value, Path) else value


def _path_of(value: JSON) -> JSON:
    if isinstance(value, list):
        return [_path_of(item) for item in value]
    if isinstance(value, dict) and value.keys() == {"path"} and isinstance(value["path"], str):
        return Path(value["path"])
    return value


def corrected_row(record: JobRecord) -> str | None:
    """The request of a changed record where it may be another one than before, since it is sent again; else None."""
    return request_row(record.request) if record.state is State.SENDING else None


def request_of(kind_name: str, row: str | None) -> Request[Any] | None:
    """The request as it was; None if it was not known, or is of a kind that this version does not know."""
    kind = BY_NAME.get(kind_name)
    if row is None or kind is None:
        return None
    values = json.loads(row)
    if not values.get("extra"):  # the fields of an `unchecked` request hold what the wire gets: no local files
        values = {name: _path_of(value) for name, value in values.items()}
    return kind.request.restored(values)


def tasks_row(record: JobRecord) -> str:
    """The tasks of a job with what is known of each: `[[task id, null | {"failed": …} | {"succeeded": …}], …]`; those
    that only a callback named have a third word, `"callback"`."""
    pairs = zip(record.task_ids, record.outcomes, strict=True)
    rows: list[list[JSON]] = [[task_id, _outcome_row(outcome)] for task_id, outcome in pairs]
    for row in rows[len(record.confirmed_ids) :]:
        row.append(_CALLBACK)
    return _dumps(rows)


def _outcome_row(outcome: Outcome | None) -> JSON:
    if outcome is None:
        return None
    if isinstance(outcome, Failed):
        return {"failed": outcome.message}
    row = {"succeeded": _converter.unstructure(outcome.result)}
    return row if outcome.file is None else {**row, "file": outcome.file}


def _outcome_of(kind_name: str, task_id: str, said: JSON) -> Outcome | None:
    if said is None:
        return None
    if "failed" in said:
        return Failed(task_id, said["failed"])
    kind = BY_NAME.get(kind_name)
    result = said["succeeded"]
    return Succeeded(task_id, result if kind is None else _restored(kind.result, result), said.get("file"))


def refusal_row(refusal: Refusal | None) -> str | None:
    return None if refusal is None else _dumps(asdict(refusal))


def refusal_of(row: str | None) -> Refusal | None:
    refusal: Refusal | None = None if row is None else _restored(Refusal, json.loads(row))
    return refusal


def _dumps(value: JSON) -> str:
    return json.dumps(value, separators=(",", ":"))


@functools.cache
def _fields(wanted: type[Any]) -> tuple[tuple[str, type[Any], Callable[[JSON, type[Any]], Any], bool], ...]:
    """Name, type, how it is read, and whether it must be given."""
    resolve_types(wanted)
    return tuple((f.name, f.type, _converter.get_structure_hook(f.type), f.default is NOTHING) for f in fields(wanted))


def _restored(wanted: type[Any], values: Mapping[str, JSON]) -> Any:
    """An object of these values: unknown ones are left out, missing ones are None (or what their class says), and one
    of another type than today's stays as it was written."""
    given = {}
    for name, kind, read, is_needed in _fields(wanted):  # type: ignore[arg-type]
        if name in values:
            given[name] = values[name]
            with contextlib.suppress(Exception):
                given[name] = read(values[name], kind)
        elif is_needed:
            given[name] = None
    return wanted(**given)
