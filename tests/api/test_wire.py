"""The service's JSON: what is documented is understood, everything else is refused with its path."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xiling_async._internal.json import NESTING
from xiling_async._internal.redact import SAMPLE_BYTES
from xiling_async.api.wire import (
    TASK_ID_CHARACTERS,
    Envelope,
    Malformed,
    Report,
    callback,
    create_body,
    created_ids,
    envelope,
    parse,
    protocol_error,
    status,
)
from xiling_async.kinds import ImageToVideo, Video
from xiling_async.models.record import Failed, Succeeded

KIND = ImageToVideo.kind
REQUEST = ImageToVideo.unchecked(model="V", prompt="波 🌊 \0")
SIGNED = "https://media.example/v.mp4?Signature=SECRETSIGNATURE"
DATA: dict[str, Any] = {
    "task_id": "i2v-1",
    "status": "SUCCEEDED",
    "video_url": SIGNED,
    "thumbnail_url": "https://media.example/v.webp",
    "error_message": "",
}
ASKED: dict[str, Any] = {**DATA, "duration": 8, "width": 1920, "height": 1080}
MANY_DIGITS = "1" + "0" * 400


def body(data: object = DATA, **frame: object) -> bytes:
    return json.dumps({"code": 0, "msg": "ok", "task_type": "image_to_video", "data": data, **frame}).encode()


def heard(**changed: object) -> Report:
    return callback(KIND, body({**DATA, **changed}))


def told(**changed: object) -> Report:
    frame = envelope(body({**ASKED, **changed}))
    assert frame is not None
    return status(KIND, "i2v-1", frame)


def video(report: Report) -> Video:
    assert isinstance(report.outcome, Succeeded)
    assert isinstance(report.outcome.result, Video)
    return report.outcome.result


# --- parsing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("escape", ["\\ud800", "\\uDFFF", "\\ud83d\\ud83d", "\\udf0a\\ud83c"])
def test_half_a_character_is_replaced(escape: str) -> None:
    """An emoji cut in two costs that character, not the message that it stands in; what comes out is text."""
    found = parse(f'{{"message": "no {escape} here", "whole": "\\ud83c\\udf0a"}}'.encode())
    assert set(found["message"]) <= set("no ? here")
    assert found["whole"] == "\U0001f30a"


@pytest.mark.parametrize(
    "raw",
    [
        b"", b" ", b"{", b"nul", b"'a'", b"{'a': 1}", b"[1,]", b'{"a": 1,}', b"{} {}", b"{}x", b"01", b"+1", b".5",
        b"1.", b"0x1",        b"NaN", b"Infinity", b"-Infinity", b"[NaN]", b'{"a": -Infinity}', b"1e999",
        b"[-1e999]", b'{"a": 1E400}',
        b'{"a": 1, "a": 1}', b'{"a": 1, "\\u0061": 2}', b'[{"b": {"a": 1, "a": 2}}]',
        b"\xef\xbb\xbf{}", '{"a": 1}'.encode("utf-16"), '"é"'.encode("latin-1"), b'"\xff"',
        b'"\xed\xa0\x80"', b'"\xc0\xaf"',b'"a\nb"', b'"\0"',
        b"9" * 5_000, b"[" + b"9" * 100_000 + b"]",
        b"[" * 100_000, b"[" * 100_000 + b"]" * 100_000, b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b"[" * (NESTING + 1) + b"1" + b"]" * (NESTING + 1), b'{"a":' * (NESTING + 1) + b"1" + b"}" * (NESTING + 1),
        b"<html>502 Bad Gateway</html>",
    ],
    ids=lambda raw: repr(raw[:24]),
)  # fmt: skip
def test_what_is_not_strictly_json_is_refused(raw: bytes) -> None:
    """Not NaN, not a name twice, not another encoding, not half a character, not a number or a nest without bounds."""
    with pytest.raises(Malformed) as caught:
        parse(raw)
    assert caught.value.path == "$"
    assert envelope(raw) is None
    with pytest.raises(Malformed):
        callback(KIND, raw)


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        (b"null", None), (b" [1, 2.5, true] ", [1, 2.5, True]), (b'{"a": {"a": 1}}', {"a": {"a": 1}}),
        (b"-0.0", 0), (b"1e308", 1e308),        ('"é波🌊"'.encode(), "é波🌊"), (b'"\\u00e9\\ud83c\\udf0a"', "é🌊"),
        (b'"\\\\ud800"', "\\ud800"),
        (b'"\\u0000"', "\0"),
        (b'{"a": 1, "A": 2, "": 3}', {"a": 1, "A": 2, "": 3}), (b"[[],[]]" , [[], []]),
        (b"[" + b"[]," * 100 + b"[]]", [[]] * 101),
    ],
    ids=lambda raw: repr(raw)[:24],
)  # fmt: skip
def test_what_is_json_is_parsed(raw: bytes, value: object) -> None:
    """White space, every script, escapes and many shallow lists are fine."""
    assert parse(raw) == value


def test_a_nest_of_the_limit_is_parsed() -> None:
    """Exactly so many levels pass."""
    assert parse(b"[" * NESTING + b"1" + b"]" * NESTING)
    assert parse(b'{"a":' * NESTING + b"1" + b"}" * NESTING)


@given(st.binary() | st.text().map(str.encode) | st.text('[]{}":,0eE-.aNI\\ud8').map(str.encode))
def test_any_bytes_are_json_or_malformed(raw: bytes) -> None:
    """`parse` raises nothing else, and what it gives can be written again."""
    try:
        value = parse(raw)
    except Malformed:
        return
    assert json.loads(json.dumps(value, allow_nan=False, ensure_ascii=False).encode()) == value


def test_malformed_says_where_and_why() -> None:
    """Its text has both, and it travels."""
    error = Malformed("$.data", "expected an object")
    assert str(error) == "$.data: expected an object"
    again = pickle.loads(pickle.dumps(error))
    assert (again.path, again.why, str(again)) == (error.path, error.why, str(error))


# --- out -----------------------------------------------------------------------------------------------------------


def test_a_create_is_the_requests_fields_and_the_callback_url() -> None:
    """Nothing more; without a receiver there is no callback_url; the request is not changed by it."""
    fields = REQUEST.fields()
    assert json.loads(create_body(REQUEST, None)) == fields
    assert json.loads(create_body(REQUEST, "https://me.example/t")) == {
        **fields,
        "callback_url": "https://me.example/t",
    }
    assert REQUEST.fields() == fields
    assert "波 🌊".encode() in create_body(REQUEST, None)


# --- the envelope --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "frame"),
    [
        (b'{"code": 0, "msg": "ok", "data": {"a": 1}}', Envelope(code=0, message="ok", data={"a": 1})),
        (b'{"code": 100001, "msg": "Parameter error"}', Envelope(code=100001, message="Parameter error", data=None)),
        (b'{"code": -1, "msg": null, "data": null}', Envelope(code=-1, message="", data=None)),
        (b'{"code": 0, "msg": 5, "data": [], "more": 1}', Envelope(code=0, message="", data=[])),
        (b'{"code": "0", "data": {}}', None),
        (b'{"code": 0.0, "data": {}}', None),
        (b'{"code": true, "data": {}}', None),
        (b'{"code": null, "data": {}}', None),
        (b'{"msg": "ok", "data": {}}', None),
        (b"[]", None),
        (b"0", None),
        (b'"code"', None),
    ],
)  # fmt: skip
def test_the_envelope(raw: bytes, frame: Envelope | None) -> None:
    """A whole number as `code` makes it the API's; a strange `msg` is no reason to lose the rest."""
    assert envelope(raw) == frame


# --- the ids of a create -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "ids"),
    [
        (["a"], ("a",)),
        (["b", "a", "c"], ("b", "a", "c")),
        (["a", "b", "a"], ("a", "b")),
        (["x" * TASK_ID_CHARACTERS], ("x" * TASK_ID_CHARACTERS,)),
        (["a/b?c#d%e", "...a", "波"], ("a/b?c#d%e", "...a", "波")),
    ],
)
def test_created_ids(found: list[str], ids: tuple[str, ...]) -> None:
    """Each once, in the order of the answer, opaque."""
    assert created_ids(envelope(body({"task_ids": found}))) == ids


NO_IDS: list[object] = [
    None, 1, True, "", " ", "a b", "a\n", "\0", "\u202e", ".", "..", "....", ["a"], {}, "x" * (TASK_ID_CHARACTERS + 1),
]  # fmt: skip


@pytest.mark.parametrize(
    ("raw", "path"),
    [
        (b"<html>", "$"),
        (body(None), "$.data"),
        (body([]), "$.data"),
        (body("a"), "$.data"),
        (body({}), "$.data.task_ids"),
        (body({"task_ids": None}), "$.data.task_ids"),
        (body({"task_ids": []}), "$.data.task_ids"),
        (body({"task_ids": "a"}), "$.data.task_ids"),
        (body({"task_ids": {"a": 1}}), "$.data.task_ids"),
        *((body({"task_ids": ["a", value]}), "$.data.task_ids[1]") for value in NO_IDS),
    ],
)  # fmt: skip
def test_an_answer_without_ids_is_malformed(raw: bytes, path: str) -> None:
    """The path says what is wrong; no id is made up (`null` is no "None")."""
    with pytest.raises(Malformed) as caught:
        created_ids(envelope(raw))
    assert caught.value.path == path


# --- callbacks -----------------------------------------------------------------------------------------------------


def test_a_callback_as_documented() -> None:
    """The seed's example: a video, what the service did not say is None, its own JSON is in `raw`."""
    report = heard()
    assert report.task_id == "i2v-1"
    assert video(report) == Video(
        task_id="i2v-1", video_url=SIGNED, thumbnail_url="https://media.example/v.webp", raw=DATA
    )
    assert video(report).raw == DATA


def test_unknown_fields_are_kept_in_raw() -> None:
    """What the library does not know yet is neither refused nor lost."""
    extra = {"fps": 24, "cover": {"url": [SIGNED, None]}, "raw": "their own"}
    assert video(heard(**extra)).raw == {**DATA, **extra}
    assert callback(KIND, body({**DATA}, more=[1])).outcome is not None


@pytest.mark.parametrize("thumbnail", ["", None])
def test_a_thumbnail_may_be_nothing(thumbnail: object) -> None:
    """null and "" mean the same as absent."""
    assert video(heard(thumbnail_url=thumbnail)).thumbnail_url is None
    without = {name: value for name, value in DATA.items() if name != "thumbnail_url"}
    assert video(callback(KIND, body(without))).thumbnail_url is None


def test_sizes_in_a_callback_are_taken() -> None:
    """A callback that carries what only GET is documented to carry; null is nothing."""
    full = video(heard(duration=8.5, width=1920, height=1080))
    assert (full.duration, full.width, full.height) == (8.5, 1920, 1080)
    none = video(heard(duration=None, width=None, height=None))
    assert (none.duration, none.width, none.height) == (None, None, None)


NOT_TEXT: list[object] = [0, 5, True, False, 1.5, [], ["a"], {}, {"a": "b"}]
NOT_A_NUMBER: list[object] = ["8", "", True, False, [], {}, [8], 10**400]
MISTYPED = {
    "task_id": [*NOT_TEXT, None, "", " ", "..", "a b"],
    "status": [*NOT_TEXT, None],
    "video_url": [*NOT_TEXT, None, ""],
    "thumbnail_url": NOT_TEXT,
    "error_message": NOT_TEXT,
    "duration": NOT_A_NUMBER,
    "width": [*NOT_A_NUMBER[:-1], 1920.0, 1.5],
    "height": [*NOT_A_NUMBER[:-1], 1080.0],
}


@pytest.mark.parametrize("field", MISTYPED)
def test_a_mistyped_field_makes_a_callback_malformed(field: str) -> None:
    """Nothing is coerced, and the path names the field."""
    for value in MISTYPED[field]:
        with pytest.raises(Malformed) as caught:
            heard(**{field: value})
        assert caught.value.path == f"$.data.{field}", value
        assert caught.value.why


@pytest.mark.parametrize("field", ["task_id", "status", "video_url"])
def test_a_missing_field_makes_a_callback_malformed(field: str) -> None:
    """What a success cannot do without."""
    with pytest.raises(Malformed) as caught:
        callback(KIND, body({name: value for name, value in DATA.items() if name != field}))
    assert caught.value.path == f"$.data.{field}"


@pytest.mark.parametrize("data", [None, [], [DATA], "x", 5, True])
def test_a_callback_without_data_is_malformed(data: object) -> None:
    """`data` is an object, or the callback says nothing."""
    with pytest.raises(Malformed) as caught:
        callback(KIND, body(data))
    assert caught.value.path == "$.data"
    with pytest.raises(Malformed):
        callback(KIND, json.dumps(data).encode())


@pytest.mark.parametrize(
    ("field", "values"),
    [("code", ["0", 0.0, True, [], {}]), ("msg", [5, True, ["ok"], {}]), ("task_type", [1, False, [], {}])],
)
def test_a_mistyped_frame_is_malformed(field: str, values: list[object]) -> None:
    """The frame is as documented too, where it is there."""
    for value in values:
        with pytest.raises(Malformed) as caught:
            callback(KIND, body(**{field: value}))
        assert caught.value.path == f"$.{field}"


@pytest.mark.parametrize("frame", [{"code": 7}, {"msg": "failed"}, {"task_type": "image_generate"}, {"msg": None}])
def test_the_frame_does_not_decide(frame: dict[str, object]) -> None:
    """`code` speaks of the transmission, `task_type` is wrong on the vendor's own pages: the status decides."""
    assert video(callback(KIND, body(**frame))) == video(heard())
    assert callback(KIND, json.dumps({"data": DATA}).encode()) == heard()


@pytest.mark.parametrize("named", ["PENDING", "PROCESSING", "QUEUED", "succeeded", "CANCELLED", "", "\0"])
def test_an_unknown_status_is_progress(named: str) -> None:
    """Only the documented ends are ends; a sign of life needs no URL."""
    assert heard(status=named) == Report(task_id="i2v-1", outcome=None)
    assert heard(status=named, video_url=None) == Report(task_id="i2v-1", outcome=None)
    assert told(status=named) == Report(task_id="i2v-1", outcome=None)


@pytest.mark.parametrize(
    ("message", "kept"),
    [("too dark", "too dark"), ("", ""), (None, ""), (f"no access: {SIGNED}",
    "no access: https://media.example/v.mp4?<hidden>")],
)  # fmt: skip
def test_a_failed_task_has_the_services_message(message: object, kept: str) -> None:
    """null and "" are no message; a signature in it is not kept."""
    assert heard(status="FAILED", error_message=message).outcome == Failed("i2v-1", kept)
    assert told(status="FAILED", error_message=message).outcome == Failed("i2v-1", kept)
    short = callback(KIND, body({"task_id": "i2v-1", "status": "FAILED"}))
    assert short.outcome == Failed("i2v-1", "")


# --- status --------------------------------------------------------------------------------------------------------


def test_a_status_answer_as_documented() -> None:
    """All fields of the vendor's page."""
    assert video(told()) == Video(
        task_id="i2v-1", video_url=SIGNED, thumbnail_url="https://media.example/v.webp", duration=8, width=1920,
        height=1080,
    )  # fmt: skip


@pytest.mark.parametrize("field", ["thumbnail_url", "duration", "width", "height", "error_message"])
def test_a_status_answer_is_forgiven_its_spare_fields(field: str) -> None:
    """A width as text must not cost a paid video: it is left out, and is in `raw` as it came."""
    for value in MISTYPED[field]:
        result = video(told(**{field: value}))
        assert result.video_url == SIGNED
        assert getattr(result, field, None) is None
        assert result.raw[field] == value


@pytest.mark.parametrize("value", [5, ["why"], {"code": 1}, True])
def test_a_failure_is_heard_whatever_its_message_is(value: object) -> None:
    """A mistyped message does not keep a task from ending when it is asked about."""
    assert told(status="FAILED", error_message=value).outcome == Failed("i2v-1", "")


@pytest.mark.parametrize("field", ["task_id", "status", "video_url"])
def test_a_status_answer_is_not_forgiven_what_it_must_say(field: str) -> None:
    """Without the id, the status or the URL there is no result."""
    for value in MISTYPED[field]:
        with pytest.raises(Malformed) as caught:
            told(**{field: value})
        assert caught.value.path == f"$.data.{field}", value


def test_a_status_answer_of_another_task_is_none() -> None:
    """It is not taken for the one that was asked about."""
    with pytest.raises(Malformed, match="another task"):
        told(task_id="i2v-2")


def test_a_number_of_hundreds_of_digits_is_no_duration() -> None:
    """Beyond what a float can hold: refused in a callback, left out of a status."""
    raw = body(DATA).replace(b'"error_message"', b'"duration": %s, "error_message"' % MANY_DIGITS.encode())
    with pytest.raises(Malformed, match="duration"):
        callback(KIND, raw)
    frame = envelope(raw)
    assert frame is not None
    assert video(status(KIND, "i2v-1", frame)).duration is None


# --- anything ------------------------------------------------------------------------------------------------------

odd = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
values = st.recursive(odd, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=4)
datas = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("video_url", "thumbnail_url", "error_message", "duration", "width", "height", "raw"), values),
        "task_id": st.just("i2v-1") | values,
        "status": st.sampled_from(["SUCCEEDED", "FAILED", "PENDING"]) | values,
        "more": values,
    },
)
frames = st.fixed_dictionaries({"data": datas | values}, optional={"code": st.just(0) | values, "msg": values})


@given(frames | values)
def test_any_callback_is_a_report_or_malformed(frame: object) -> None:
    """Whatever fields and values: a report of exactly what was said, or `Malformed`."""
    raw = json.dumps(frame).encode()
    try:
        report = callback(KIND, raw)
    except Malformed as error:
        assert error.path.startswith("$")
        return
    assert isinstance(frame, dict)
    data = frame["data"]
    assert report.task_id == data["task_id"]
    if isinstance(report.outcome, Succeeded):
        assert video(report).video_url == data["video_url"]
        assert video(report).width in (data.get("width"), None)
    elif report.outcome is None:
        assert data["status"] not in ("SUCCEEDED", "FAILED")


@given(datas | values)
def test_any_status_answer_is_a_report_or_malformed(data: object) -> None:
    """The same for the forgiving road."""
    frame = envelope(json.dumps({"code": 0, "data": data}).encode())
    if frame is None:
        return
    try:
        report = status(KIND, "i2v-1", frame)
    except Malformed as error:
        assert error.path.startswith("$.data")
    else:
        assert report.task_id == "i2v-1"


@given(st.binary() | st.binary().map(lambda raw: body(DATA).replace(b"i2v-1", raw)), st.integers(0, 300))
def test_any_bytes_are_a_report_or_malformed(raw: bytes, cut: int) -> None:
    """Bytes of any origin, whole or cut off: never another exception."""
    for piece in (raw, raw[:cut], raw[cut:], body(DATA)[:cut]):
        try:
            assert isinstance(callback(KIND, piece), Report)
        except Malformed:
            assert piece != body(DATA)


# --- complaints ----------------------------------------------------------------------------------------------------


def test_a_protocol_error_shows_a_scrubbed_beginning() -> None:
    """What was wrong, where, and at most 512 bytes of the answer without key or signature."""
    error = protocol_error("No ids", "$.data", b"the-key " + SIGNED.encode() + b" " * 5_000, "the-key", job_id="j")
    assert (error.json_path, error.job_id, error.charged) == ("$.data", "j", "maybe")
    assert len(error.sample.encode()) == SAMPLE_BYTES
    assert "SECRETSIGNATURE" not in f"{error} {error.sample}"
    assert "the-key" not in f"{error} {error.sample}"
    assert "No ids (at $.data)" in str(error)
