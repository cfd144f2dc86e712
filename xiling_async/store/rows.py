"""The row form of what is remembered: JSON that yesterday's library wrote and tomorrow's must still read.

It is not the wire form: the service may rename a field, a rule may become stricter, the rows stay. Reading checks
nothing again, ignores what it does not know, and fills in what is missing.
"""

from __future__ import annotations

import json
from typing import Any

from attrs import asdict, fields_dict
from cattrs import Converter

from xiling_async.kinds import BY_NAME
from xiling_async.models import JSON, Failed, Outcome, Refusal, Request, Succeeded

_converter = Converter()


def _dumps(value: JSON) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def request_row(request: Request[Any] | None) -> str | None:
    if request is None:
        return None
    return _dumps(asdict(request, recurse=False))


def request_of(kind_name: str, row: str | None) -> Request[Any] | None:
    """The request as it was; None if it was not known, or is of a kind that this version does not know."""
    kind = BY_NAME.get(kind_name)
    if row is None or kind is None:
        return None
    values = json.loads(row)
    return kind.request.restored({name: values[name] for name in fields_dict(kind.request) if name in values})


def outcome_row(outcome: Outcome | None) -> str | None:
    if outcome is None:
        return None
    if isinstance(outcome, Failed):
        return _dumps({"failed": outcome.message})
    return _dumps({"succeeded": _converter.unstructure(outcome.result)})


def outcome_of(kind_name: str, task_id: str, row: str | None) -> Outcome | None:
    if row is None:
        return None
    values = json.loads(row)
    if "failed" in values:
        return Failed(task_id, values["failed"])
    kind = BY_NAME.get(kind_name)
    result = values["succeeded"]
    return Succeeded(task_id, result if kind is None else _converter.structure(result, kind.result))


def refusal_row(refusal: Refusal | None) -> str | None:
    return None if refusal is None else _dumps(asdict(refusal))


def refusal_of(row: str | None) -> Refusal | None:
    return None if row is None else _converter.structure(json.loads(row), Refusal)
