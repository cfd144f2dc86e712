"""The service's JSON to and from nouns; no I/O.

Everything that comes in is bytes of unknown origin: it is parsed strictly (no NaN, no duplicate names, no coercion:
plain cattrs would turn `null` into "None" and "false" into True) or refused with the path of what is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, TypeVar

from attrs import NOTHING, define, fields, frozen, resolve_types
from cattrs import BaseValidationError, Converter, override, transform_error
from cattrs.gen import make_dict_structure_fn

from xiling_async._internal import json as strict_json
from xiling_async._internal.redact import sample, scrub
from xiling_async.errors import ProtocolError
from xiling_async.kinds import KINDS
from xiling_async.models.record import Failed, Outcome, Succeeded
from xiling_async.models.request import JSON, Kind, Progress, Request, is_http_url

T = TypeVar("T")

TASK_ID_CHARACTERS: Final = 256  # ids are opaque; the longest seen has 37 characters


@frozen
class Malformed(ValueError):
    """A body that is not what it should be; `path` says where."""

    path: str
    why: str

    def __str__(self) -> str:
        return f"{self.path}: {self.why}"


@define(kw_only=True)
class Envelope:
    """The service's common frame (service.md, "envelope A"). Success is `code == 0`; `message` is
    never tested, and must be scrubbed before it is shown."""

    code: int
    message: str
    data: JSON


@define(kw_only=True)
class Report:
    """What the service says of one task: its outcome, or None while it works on it."""

    task_id: str
    outcome: Outcome | None


# --- out ---------------------------------------------------------------------------------------------------------


def create_body(request: Request[Any], callback_url: str | None) -> bytes:
    """The JSON of a create: the request's own fields, and where to call back."""
    body = request.fields()
    if callback_url is not None:
        body["callback_url"] = callback_url
    return strict_json.written(body)


def file_part(file_name: str, content_type: str, boundary: str) -> tuple[bytes, bytes]:
    """What stands before and after a file in the multipart body of an upload (RFC 7578), its one part named `file`."""
    head = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{file_name}"\r\n'
        f"Content-Type: {content_type}\r\n\r\n"
    )
    return head.encode("ascii"), f"\r\n--{boundary}--\r\n".encode("ascii")


# --- in ----------------------------------------------------------------------------------------------------------


def parse(body: bytes) -> JSON:
    """Strict UTF-8 JSON. Raises `Malformed`."""
    try:
        return strict_json.read(body)
    except (ValueError, RecursionError) as why:
        raise Malformed("$", f"no JSON ({type(why).__name__})") from None


def _strict(kind: type[T]) -> Any:
    def hook(value: object, _: object) -> T:
        if type(value) is not kind:
            raise TypeError(f"expected {kind.__name__}, not {type(value).__name__}")
        return value

    return hook


def _number(value: object, _: object) -> float:
    if (type(value) is int and abs(value) < 2**53) or (type(value) is float and math.isfinite(value)):
        return value
    raise TypeError(f"expected a number, not {type(value).__name__}")


_strict_text = _strict(str)


def _text_or_none(value: object, _: object) -> str | None:
    # Absent, null and "" all mean "nothing" here: which of them comes before the end is not documented.
    if value is None or value == "":
        return None
    return _strict_text(value, str)  # type: ignore[no-any-return]


def _make_converter() -> Converter:
    converter = Converter()
    for plain in (str, int, bool):
        converter.register_structure_hook(plain, _strict(plain))
    converter.register_structure_hook(float, _number)
    converter.register_structure_hook(str | None, _text_or_none)
    return converter


_converter = _make_converter()
for _kind in KINDS:
    resolve_types(_kind.result)
# What the service said is kept as it was read, without a copy: nothing else refers to it.
_HOOKS: Final = {
    kind.name: make_dict_structure_fn(kind.result, _converter, raw=override(struct_hook=lambda raw, _: raw))
    for kind in KINDS
}

# By kind: the fields that a result must have, and those that it may have; `raw` is ours.
_NAMES: Final = {
    kind.name: (
        tuple(a.name for a in fields(kind.result) if a.default is NOTHING),
        tuple(a.name for a in fields(kind.result) if a.default is not NOTHING and a.name != "raw"),
    )
    for kind in KINDS
}


def _framed(body: bytes) -> dict[str, JSON] | None:
    try:
        value = parse(body)
    except Malformed:
        return None
    return value if isinstance(value, dict) and type(value.get("code")) is int else None


def envelope(body: bytes) -> Envelope | None:
    """The frame of an answer, or None if the body is not the API's at all (a gateway's page, an empty body)."""
    value = _framed(body)
    if value is None:
        return None
    message = value.get("msg")
    return Envelope(code=value["code"], message=message if isinstance(message, str) else "", data=value.get("data"))


def upload_envelope(body: bytes) -> Envelope | None:
    """The frame of the answer to an upload (service.md, "envelope B"; a refusal may come in envelope A), or None if it
    is not the API's; `data` is all of it."""
    value = _framed(body)
    if value is None:
        return None
    messages = value.get("message")
    message = messages.get("global") if isinstance(messages, dict) else value.get("msg")
    return Envelope(code=value["code"], message=message if isinstance(message, str) else "", data=value)


def uploaded_url(frame: Envelope | None) -> str:
    """Where the uploaded file is, letter by letter. Raises `Malformed`."""
    if frame is None:
        raise Malformed("$", "not an answer of the API")
    if frame.code != 0:
        raise Malformed("$.code", "not 0")
    if frame.data.get("success") is not True:
        raise Malformed("$.success", "not true")
    result = frame.data.get("result")
    if not isinstance(result, dict):
        raise Malformed("$.result", f"expected an object, not {type(result).__name__}")
    url = result.get("url")
    if not isinstance(url, str) or not is_http_url(url):
        raise Malformed("$.result.url", "no http(s) URL")
    return url


def _task_id(value: object, path: str) -> str:
    if not isinstance(value, str) or not value.strip(".") or len(value) > TASK_ID_CHARACTERS:
        raise Malformed(path, "no task id")
    if not value.isprintable() or " " in value:  # every other white space is not printable
        raise Malformed(path, "no task id")
    return value


def created_ids(frame: Envelope | None) -> tuple[str, ...]:
    """The task ids in the answer to a create, each once, in order. Raises `Malformed` when there are none."""
    if frame is None:
        raise Malformed("$", "not an answer of the API")
    if not isinstance(frame.data, dict):
        raise Malformed("$.data", f"expected an object, not {type(frame.data).__name__}")
    ids = frame.data.get("task_ids")
    if not isinstance(ids, list) or not ids:
        raise Malformed("$.data.task_ids", "no task ids")
    return tuple(dict.fromkeys(_task_id(value, f"$.data.task_ids[{place}]") for place, value in enumerate(ids)))


_CALLBACK_FRAME: Final = (("code", int), ("msg", str), ("task_type", str))


def callback(kind: Kind[Any], body: bytes) -> Report:
    """What a callback says. Raises `Malformed` for anything that is not exactly of the documented types.

    `code` says only that the callback was transmitted and `task_type` is wrong on two of the vendor's own pages:
    the task's fate is `data.status`.
    """
    frame = parse(body)
    if not isinstance(frame, dict):
        raise Malformed("$", "expected an object")
    for name, expected in _CALLBACK_FRAME:
        value = frame.get(name)
        if type(value) is not expected and value is not None:
            raise Malformed(f"$.{name}", f"expected {expected.__name__}, not {type(value).__name__}")
    return _report(kind, frame.get("data"), forgiving=False)


def status(kind: Kind[Any], task_id: str, frame: Envelope) -> Report:
    """What a status answer says of the task asked for. Raises `Malformed`.

    A mistyped field that is not needed (a width as text) is left out: it must not cost a paid video.
    """
    report = _report(kind, frame.data, forgiving=True)
    if report.task_id != task_id:
        raise Malformed("$.data.task_id", "another task than the one asked for")
    return report


def _report(kind: Kind[Any], data: JSON, *, forgiving: bool) -> Report:
    if not isinstance(data, dict):
        raise Malformed("$.data", f"expected an object, not {type(data).__name__}")
    task_id = _task_id(data.get("task_id"), "$.data.task_id")
    named = data.get("status")
    if not isinstance(named, str):
        raise Malformed("$.data.status", "no status")
    message = data.get("error_message")
    if not isinstance(message, str):
        if message is not None and not forgiving:
            raise Malformed("$.data.error_message", f"expected str, not {type(message).__name__}")
        message = ""
    progress = kind.statuses.get(named, Progress.RUNNING)  # an unknown status is progress, not an end
    outcome: Outcome | None = None
    if progress is Progress.SUCCEEDED:
        outcome = Succeeded(task_id, _result(kind, data, forgiving=forgiving))
    elif progress is Progress.FAILED:
        outcome = Failed(task_id, scrub(message))
    return Report(task_id=task_id, outcome=outcome)


def _result(kind: Kind[Any], data: Mapping[str, JSON], *, forgiving: bool) -> Any:
    needed, spare = _NAMES[kind.name]
    for name in needed:
        if not data.get(name):
            raise Malformed(f"$.data.{name}", "missing or empty, although the task succeeded")
    known = {**data, "raw": data}
    if forgiving:
        for name in spare:
            if name in data and not _fits(kind, name, data[name]):
                del known[name]
    try:
        return _HOOKS[kind.name](known, kind.result)
    except BaseValidationError as why:
        text, _, path = transform_error(why)[0].rpartition(" @ $")
        raise Malformed(f"$.data{path}", text) from None


def _fits(kind: Kind[Any], name: str, value: JSON) -> bool:
    try:
        _converter.structure(value, getattr(fields(kind.result), name).type)
    except (BaseValidationError, TypeError, ValueError):
        return False
    return True


def protocol_error(what: str, path: str, body: bytes, *secrets: str, **known: Any) -> ProtocolError:
    """A `ProtocolError` with a scrubbed sample of what the service answered."""
    shown = sample(body, *secrets)
    return ProtocolError(f"{what} (at {path}). It began: {shown!r}", json_path=path, sample=shown, **known)
