"""Rows of yesterday and of tomorrow: what a store has written can be read, and is as it was."""

from __future__ import annotations

import json
from typing import Any

import attrs
import pytest
from support import model_kl, model_s, model_v

from xiling_async import ImageToVideo
from xiling_async.kinds import Video
from xiling_async.models.record import Failed, JobRecord, Refusal, State, Succeeded
from xiling_async.models.request import Request
from xiling_async.stores.rows import COLUMNS, record_of, request_of, request_row, row_of

NOW = 1_800_000_000.125
VIDEO = Video(
    task_id="a",
    video_url="https://m.example/a.mp4?signature=1",
    thumbnail_url=None,
    duration=8,
    width=1920,
    height=1080,
    raw={"deep": [{"é": 1.5, "big": 2**70}], "null": None},
)
RECORD = JobRecord(
    id="0" * 32,
    kind="image_to_video",
    key="order-42",
    request=model_v("波 🌊 \0 \"quoted\" 'too'", count=3),
    asked=3,
    created_at=NOW,
    changed_at=NOW + 1 / 3,
    state=State.ACCEPTED,
    attempt=2,
    task_ids=("a", "b", "c"),
    outcomes=(Succeeded("a", VIDEO), Failed("b", "no"), None),
    refusal=Refusal(error="RateLimited", message="slowly", status=429, code=7, retry_after=2.5),
    due_at=NOW + 30,
    failed_asks=2,
    version=9,
    unconfirmed=1,
)


def row_with(record: JobRecord = RECORD, **columns: Any) -> tuple[Any, ...]:
    """The row of this record, with other values in some columns."""
    return tuple((dict(zip(COLUMNS, row_of(record), strict=True)) | columns).values())


def test_a_record_comes_back_from_its_row() -> None:
    """Field for field, with the types that it had."""
    held = record_of(row_of(RECORD))
    assert held == RECORD
    assert held.outcomes[0] == Succeeded("a", VIDEO)
    assert isinstance(held.outcomes[0], Succeeded)
    assert held.outcomes[0].result.raw == VIDEO.raw
    assert type(held.state) is State
    # tasks: ids and outcomes together, and which ids only a callback named
    assert len(row_of(RECORD)) == len(COLUMNS) == len(attrs.fields(JobRecord)) - 2


def test_a_row_is_plain_ascii() -> None:
    """No text of a service can be one that a database refuses: not half an emoji, not a NUL."""
    record = attrs.evolve(RECORD, outcomes=(None, Failed("b", "half an emoji \ud83d, a NUL \0"), None))
    row = row_of(record)
    assert all(value.isascii() and "\0" not in value for value in row if isinstance(value, str))
    assert record_of(row) == record


@pytest.mark.parametrize(
    "request_",
    [
        model_v(),
        model_v(count=4),
        model_kl(),
        model_s(),
        ImageToVideo.unchecked(model="Z", new=[1, {"a": None}], reference_images=["u", "v"], duration="long"),
        ImageToVideo.unchecked(generate_count=2),
        ImageToVideo.unchecked(),
    ],
    ids=["V", "V4", "KL", "S", "unchecked", "unchecked count", "unchecked nothing"],
)
def test_a_request_comes_back_equal(request_: Request[Any]) -> None:
    """Also one that no rule knows: the same key must find the same request after a restart."""
    held = request_of("image_to_video", request_row(request_))
    assert held == request_
    assert held is not None
    assert held.fields() == request_.fields()
    assert held.task_count == request_.task_count


def test_a_request_that_is_not_known_stays_so() -> None:
    """A job made from a bare task id has none."""
    assert request_row(None) is None
    assert request_of("image_to_video", None) is None


def test_a_request_of_another_day_still_opens() -> None:
    """Fields that are new are what their class says, those that are gone are left out, stricter rules are not asked."""
    values = json.loads(request_row(model_v()) or "")
    del values["generate_audio"], values["end_image_url"], values["duration"]
    held = request_of("image_to_video", json.dumps({**values, "prompt": "", "gone": 1}))
    assert held is not None
    kept = {name: value for name, value in model_v().fields().items() if name != "duration"}
    assert held.fields() == {**kept, "generate_audio": False, "prompt": ""}


def test_an_outcome_of_another_day_still_opens() -> None:
    """A result with fields too many and too few, and one of another type than today's."""
    result = {"task_id": "a", "duration": "eight", "width": 7.5, "gone": {"x": 1}}
    (held,) = record_of(row_with(tasks=json.dumps([["a", {"succeeded": result}]]))).outcomes
    assert isinstance(held, Succeeded)
    assert type(held.result) is Video
    assert attrs.asdict(held.result) == {
        "task_id": "a", "video_url": None, "thumbnail_url": None, "duration": "eight", "width": 7.5, "height": None,
        "raw": {},
    }  # fmt: skip


def test_a_refusal_of_another_day_still_opens() -> None:
    """With what is known of it."""
    held = record_of(row_with(refusal=json.dumps({"error": "Rejected", "why": "new"})))
    assert held.refusal == Refusal(error="Rejected", message=None)  # type: ignore[arg-type]


def test_a_kind_that_this_version_does_not_know_is_kept() -> None:
    """Its request is not known, its results are what the JSON says, and its rows can be written again."""
    tasks = json.dumps([["a", {"succeeded": {"text": "hello"}}], ["b", {"failed": "no"}], ["c", None]])
    held = record_of(row_with(kind="smell_generate", tasks=tasks))
    assert held.request is None
    assert held.outcomes == (Succeeded("a", {"text": "hello"}), Failed("b", "no"), None)
    assert record_of(row_of(held)) == held


@pytest.mark.parametrize(
    ("column", "value"), [("state", "dreaming"), ("tasks", "[["), ("tasks", "[1]"), ("tasks", '[["a", {}]]')]
)
def test_what_no_version_wrote_is_an_error(column: str, value: str) -> None:
    """A guess would be worse: the job might be bought again."""
    with pytest.raises((ValueError, TypeError, LookupError)):
        record_of(row_with(RECORD, **{column: value}))
