"""The rule table of image to video: what it allows can be built, what it forbids cannot, and every reason is told."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
from pathlib import Path, PurePath
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from xiling_async.api.wire import create_body
from xiling_async.errors import InvalidRequest
from xiling_async.kinds import BY_NAME, BY_NUMBER, KINDS, ImageToVideo, Video

IMAGE, END = "https://example.com/sea.jpg", "https://example.com/night.jpg"
SIGNED = "https://example.com/sea.jpg?Signature=SECRETSIGNATURE"
TEXT = {"prompt": "waves at dawn", "aspect_ratio": "16:9"}
V: dict[str, Any] = {**TEXT, "model": "V", "image_url": IMAGE, "aspect_resolution": "1080p", "duration": 8}
VM: dict[str, Any] = {
    **TEXT, "model": "V", "reference_images": [IMAGE], "aspect_resolution": "1080p", "duration": 8,
}  # fmt: skip
KL: dict[str, Any] = {**TEXT, "model": "KL", "reference_images": [IMAGE], "aspect_resolution": "720p", "duration": 5}
S: dict[str, Any] = {**TEXT, "model": "S", "image_url": IMAGE, "aspect_resolution": "720p", "duration": 6}
ROWS = {"V": V, "V multi-image": VM, "KL": KL, "S": S}

# The seed's table once more, written down independently of the module's.
RESOLUTIONS = {
    "V": {"720p", "1080p", "4k"},
    "V multi-image": {"720p", "1080p", "4k"},
    "KL": {"720p", "1080p"},
    "S": {"720p"},
}
DURATIONS = {"V": {4, 6, 8}, "V multi-image": {8}, "KL": {5, 10}, "S": {6, 8, 12}}
MOST_REFERENCES = {"V": 0, "V multi-image": 3, "KL": 7, "S": 0}
AUDIO = {"V", "V multi-image"}


def broken(**fields: Any) -> dict[str, str]:
    """The rules that these fields break, by field; empty if the request can be built."""
    try:
        ImageToVideo(**fields)
    except InvalidRequest as error:
        assert error.charged == "no"
        assert all(str(problem) in str(error) for problem in error.problems)
        return {problem.field: problem.rule for problem in error.problems}
    return {}


# --- the table -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS)
def test_exactly_the_documented_combinations_can_be_built(row: str) -> None:
    """Each row with every resolution and duration of the page: what is in the row passes, what is not is named."""
    for resolution, duration in itertools.product(("720p", "1080p", "4k"), (4, 5, 6, 8, 10, 12)):
        wrong = set()
        if resolution not in RESOLUTIONS[row]:
            wrong.add("aspect_resolution")
        if duration not in DURATIONS[row]:
            wrong.add("duration")
        assert set(broken(**{**ROWS[row], "aspect_resolution": resolution, "duration": duration})) == wrong


@pytest.mark.parametrize("row", ROWS)
def test_audio_is_for_model_v(row: str) -> None:
    """`generate_audio=True` is refused elsewhere; False is what everybody has."""
    assert set(broken(**ROWS[row], generate_audio=True)) == (set() if row in AUDIO else {"generate_audio"})
    assert broken(**ROWS[row], generate_audio=False) == {}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("count", range(9))
def test_the_number_of_reference_images(row: str, count: int) -> None:
    """V takes 1-3, KL 1-7, S none; none at all is the start-frame mode of V."""
    fields = {**ROWS[row], "reference_images": [IMAGE] * count}
    found = broken(**fields)
    if row == "V multi-image" and count == 0:
        assert found == {"image_url": "is required by model V (start-frame mode)"}
    elif count <= MOST_REFERENCES[row] and (count or row != "KL"):
        assert found == {}
    else:
        assert set(found) == {"reference_images"}


@pytest.mark.parametrize("row", ROWS)
def test_the_start_frame(row: str) -> None:
    """S and V's start-frame mode need one, KL takes none; V with both inputs is told so, not guessed at."""
    fields = {**ROWS[row], "image_url": IMAGE}
    expected = {"V": set(), "S": set(), "KL": {"image_url"}, "V multi-image": {"reference_images"}}
    assert set(broken(**fields)) == expected[row]
    without = broken(**{**ROWS[row], "image_url": None})
    assert without == ({"image_url": f"is required by model {row} (start-frame mode)"} if row in ("V", "S") else {})


@pytest.mark.parametrize("row", ROWS)
def test_the_end_frame_is_for_the_start_frame_mode_of_v(row: str) -> None:
    """`end_image_url` goes with V's `image_url` only."""
    assert set(broken(**ROWS[row], end_image_url=END)) == (set() if row == "V" else {"end_image_url"})


def test_an_end_frame_alone_is_not_enough() -> None:
    """V with only an end frame lacks its start frame."""
    assert set(broken(**{**V, "image_url": None, "end_image_url": END})) == {"image_url"}


def test_the_docstring_has_the_table() -> None:
    """What `help(ImageToVideo)` says of each model is what is enforced."""
    rows = {
        cells[1].strip(): cells[2:]
        for line in (ImageToVideo.__doc__ or "").splitlines()
        if len(cells := line.split("|")) == 7
    }
    for model, durations in (("V", "4, 6, 8; references: 8"), ("KL", "5, 10"), ("S", "6, 8, 12")):
        assert rows[model][2].strip() == durations
        assert set(rows[model][1].strip().split(", ")) == RESOLUTIONS[model]
        assert rows[model][3].strip() == ("yes" if model in AUDIO else "no")


# --- fields of their own -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("model", ["v", "", "X", None, 1, b"V", ["V"]]),
        ("prompt", ["", "  \n", None, 5, b"text", ["text"], "x" * 1001, "\ud800", "half \udfff pair"]),
        ("aspect_ratio", ["1:1", "16x9", "", None, 16 / 9]),
        ("aspect_resolution", ["1080P", "1080", 1080, "2k", "", None]),
        ("duration", ["6", 6.0, 7, 0, -6, None, True, [6], float("nan"), 10**5_000]),
        ("generate_audio", ["true", 1, 0, None, "", []]),
        ("generate_count", [0, 5, -1, "1", 1.0, True, False, None, 10**5_000]),
        (
            "image_url",
            [
                "", " ", "sea.jpg", "/tmp/sea.jpg", "example.com/sea.jpg", "//example.com/sea.jpg", "file:///sea.jpg",
                "ftp://example.com/sea.jpg", "data:image/png;base64,AAAA", "gs://bucket/sea.jpg", "http://", "https:///sea.jpg",
                "https://example.com/the sea.jpg", " https://example.com/sea.jpg", "https://example.com/sea.jpg\n",
                "https://example.com/\0", "https://example.com/\ud800", "https://[::1", "https://example.com:port/", "https://:80/",
                b"https://example.com/sea.jpg", 5, True, ["https://example.com/sea.jpg"], PurePath("sea.jpg"),
            ],
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_value_of_the_wrong_kind_is_named(field: str, values: list[Any]) -> None:
    """Types are strict: "6", True and 6.0 are no 6. Each wrong value is one problem of its field."""
    for value in values:
        assert set(broken(**{**V, field: value})) == {field}


@pytest.mark.parametrize("value", ["abc", b"abc", 5, {IMAGE}, {IMAGE: 1}, (url for url in [IMAGE]), IMAGE])
def test_reference_images_are_a_list(value: Any) -> None:
    """A bare text, a set (it has no order), a generator and other things are no list of URLs."""
    assert broken(**{**KL, "reference_images": value})["reference_images"]


def test_each_wrong_reference_is_named_by_its_place() -> None:
    """The second and the third of three: both, by number."""
    found = broken(**{**KL, "reference_images": [IMAGE, "sea.jpg", None]})
    assert found == {"reference_images[1]": "is not a URL", "reference_images[2]": "is not a URL"}


@pytest.mark.parametrize(
    "url", [IMAGE, "http://example.com/a", "HTTPS://EXAMPLE.COM/a", "https://例え.jp/海.jpg", SIGNED]
)
def test_urls_are_taken_as_they_are(url: str) -> None:
    """Any http(s) URL passes and is sent letter by letter: a signature survives no rewriting."""
    assert ImageToVideo(**{**V, "image_url": url}).fields()["image_url"] == url
    assert ImageToVideo(**{**KL, "reference_images": [url]}).fields()["reference_images"] == [url]


def test_yarl_urls_are_text_on_the_wire() -> None:
    """`yarl.URL` can be given wherever a URL is wanted."""
    request = ImageToVideo(**{**V, "image_url": URL(IMAGE), "end_image_url": URL(END)})
    assert (request.image_url, request.end_image_url) == (IMAGE, END)
    assert ImageToVideo(**{**KL, "reference_images": (URL(IMAGE), IMAGE)}).reference_images == (IMAGE, IMAGE)


@pytest.mark.parametrize("character", ["x", "字", "🌊", "\0"])
def test_a_prompt_has_at_most_1000_characters(character: str) -> None:
    """1000 of any script pass, 1001 do not."""
    assert broken(**{**V, "prompt": character * 1000}) == {}
    assert broken(**{**V, "prompt": character * 1001}) == {"prompt": "has 1001 characters"}


def test_generate_count_is_one_to_four() -> None:
    """All four, and `task_count` follows."""
    for count in (1, 2, 3, 4):
        assert ImageToVideo(**V, generate_count=count).task_count == count


# --- local files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [Path("sea.jpg"), Path("/nowhere/sea.jpg"), Path(), Path("a\0b"), Path("https://x")])
def test_a_path_stands_wherever_a_url_can(path: Path) -> None:
    """A request of local files is built without looking at them; other rules count them like URLs."""
    request = ImageToVideo(**{**V, "image_url": path, "end_image_url": path})
    assert request.local_files() == {"image_url": path, "end_image_url": path}
    several = ImageToVideo(**{**KL, "reference_images": [IMAGE, path, URL(IMAGE), path]})
    assert several.local_files() == {"reference_images[1]": path, "reference_images[3]": path}
    assert set(broken(**{**S, "reference_images": [path], "end_image_url": path})) == {
        "reference_images",
        "end_image_url",
    }
    assert ImageToVideo(**V).local_files() == ImageToVideo(**KL).local_files() == {}


def test_local_files_are_replaced_by_their_urls() -> None:
    """`with_urls` is another request; what it is not told of, and the request itself, stay."""
    sea, sky = Path("sea.jpg"), Path("sky.jpg")
    request = ImageToVideo(**{**KL, "reference_images": [sea, END, sky, sea]})
    half = request.with_urls({sea: IMAGE})
    assert half.reference_images == (IMAGE, END, sky, IMAGE)
    assert half.with_urls({sky: SIGNED, Path("other"): END}).fields()["reference_images"] == [IMAGE, END, SIGNED, IMAGE]
    assert request.local_files()
    assert ImageToVideo(**V).with_urls({sea: END}) == ImageToVideo(**V)


def test_a_request_of_local_files_has_no_wire_form() -> None:
    """What would send it says which fields hold files, and how they get there."""
    for send in (ImageToVideo.fields, lambda request: create_body(request, None)):
        with pytest.raises(InvalidRequest, match=r"client\.upload") as caught:
            send(ImageToVideo(**{**V, "image_url": Path("a.jpg"), "end_image_url": Path("b.jpg")}))
        assert [(problem.field, problem.value) for problem in caught.value.problems] == [
            ("image_url", "a.jpg"), ("end_image_url", "b.jpg"),
        ]  # fmt: skip


def test_unchecked_takes_no_local_files() -> None:
    """It sends exactly what it is given; for a file, that is the URL that `client.upload` gives."""
    with pytest.raises(InvalidRequest, match=r"client\.upload"):
        ImageToVideo.unchecked(model="V2", image_url=Path("sea.jpg"))


# --- all at once ---------------------------------------------------------------------------------------------------


def test_every_broken_rule_is_named_at_once() -> None:
    """A request with everything wrong hears of everything in one error."""
    found = broken(
        model="S", prompt="", aspect_ratio="1:1", aspect_resolution="4k", duration=5, image_url=None, end_image_url="x",
        reference_images=["y", "z"], generate_audio=True, generate_count=9,
    )  # fmt: skip
    assert set(found) == {
        "prompt", "aspect_ratio", "aspect_resolution", "duration", "image_url", "end_image_url", "reference_images",
        "reference_images[0]", "reference_images[1]", "generate_audio", "generate_count",
    }  # fmt: skip


def test_an_unknown_model_hides_no_other_problem() -> None:
    """Without a row of its own, the rest is still checked against all that is documented."""
    found = broken(
        model="Z", prompt="", aspect_ratio="", aspect_resolution="8k", duration=7, image_url="x", generate_count=0
    )
    assert set(found) == {
        "model", "prompt", "aspect_ratio", "aspect_resolution", "duration", "image_url", "generate_count",
    }  # fmt: skip
    assert set(broken(**{**V, "model": "Z", "duration": 12})) == {"model"}


def test_problems_say_what_would_be_accepted() -> None:
    """Each problem has the value, the rule and the way out."""
    with pytest.raises(InvalidRequest) as caught:
        ImageToVideo(**{**KL, "duration": 6, "reference_images": []})
    problems = {problem.field: problem for problem in caught.value.problems}
    assert problems["duration"].value == 6
    assert problems["duration"].accepted == "5 or 10"
    assert problems["reference_images"].accepted == "1 to 7 URLs"
    assert str(caught.value).startswith("ImageToVideo: 2 rules are broken, nothing was sent:\n  - ")


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({**V, "duration": "4"}, "duration: must be a number, not text ('4'); accepted: 4, 6 or 8"),
        ({**V, "duration": 6.0}, "duration: must be a whole number, not 6.0; accepted: 4, 6 or 8"),
        ({**V, "duration": 7}, "duration: 7 is not offered by model V (start-frame mode); accepted: 4, 6 or 8"),
        ({**V, "duration": None}, "duration: is required; accepted: 4, 6 or 8"),
        ({**V, "model": "v"}, "model: unknown model 'v'; did you mean 'V'?"),
        ({**V, "model": "veo3"}, "model: unknown model 'veo3'; accepted: V, KL or S"),
        ({**V, "model": 1}, "model: must be text, not int (1); accepted: V, KL or S"),
        ({**V, "aspect_ratio": "1:1"}, "aspect_ratio: unknown aspect_ratio '1:1'; accepted: 16:9 or 9:16"),
        (
            {**V, "aspect_resolution": "4K "},
            "aspect_resolution: unknown aspect_resolution '4K '; did you mean '4k'?",
        ),
        ({**V, "generate_audio": 1}, "generate_audio: must be a truth value, not int (1); accepted: True or False"),
        (
            {**V, "reference_images": [IMAGE]},
            "reference_images: model V takes image_url or reference_images, not both",
        ),
        (
            {**KL, "reference_images": [IMAGE] * 8},
            "reference_images: has 8 for model KL; accepted: 1 to 7 URLs",
        ),
        (
            {**S, "reference_images": [IMAGE]},
            "reference_images: model S takes none, not 1; use image_url",
        ),
        ({**V, "image_url": "sea.jpg"}, "image_url='sea.jpg': is not a URL; accepted: an http(s) URL as text, or a"),
    ],
    ids=lambda value: value.partition(" ")[0] if isinstance(value, str) else "",
)
def test_a_broken_rule_is_told_in_plain_words(fields: dict[str, Any], line: str) -> None:
    """The value once, the rule, and what would be accepted or was meant."""
    with pytest.raises(InvalidRequest) as caught:
        ImageToVideo(**fields)
    (problem,) = caught.value.problems
    assert str(problem).startswith(line)


anything = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(),
    st.sampled_from([*"VS", "KL", "16:9", "9:16", "720p", "4k", 4, 5, 6, 8, IMAGE, [IMAGE], [IMAGE] * 4, [], ()]),
    st.lists(st.none() | st.text() | st.just(IMAGE), max_size=9),
)  # fmt: skip
FIELDS = [name for name in attrs.fields_dict(ImageToVideo) if name != "extra"]


some_fields = st.dictionaries(st.sampled_from(FIELDS), anything)


@given(st.fixed_dictionaries(dict.fromkeys(FIELDS, anything)) | some_fields.map(lambda changed: {**V, **changed}))
def test_anything_is_a_request_or_an_invalid_request(fields: dict[str, Any]) -> None:
    """Whatever is given, it is refused with reasons that travel, or it can be sent."""
    try:
        request = ImageToVideo(**fields)
    except InvalidRequest as error:
        assert error.problems
        assert repr(pickle.loads(pickle.dumps(error)).problems) == repr(error.problems)
    else:
        assert json.loads(create_body(request, None)) == request.fields()


# --- what is sent --------------------------------------------------------------------------------------------------


def test_absent_fields_are_left_out() -> None:
    """No null, no empty list, no field of ours."""
    assert ImageToVideo(**V).fields() == {**V, "generate_audio": False, "generate_count": 1}
    assert ImageToVideo(**V, reference_images=[]).fields() == ImageToVideo(**V).fields()
    assert ImageToVideo(**V, end_image_url=END).fields()["end_image_url"] == END


def test_generate_audio_is_sent_for_model_v_only() -> None:
    """What a false one would do elsewhere is not documented."""
    assert ImageToVideo(**VM, generate_audio=True).fields()["generate_audio"] is True
    assert ImageToVideo(**KL).fields() == {**KL, "generate_count": 1}
    assert ImageToVideo(**S).fields() == {**S, "generate_count": 1}


def test_a_request_cannot_be_changed() -> None:
    """It is frozen, and what `fields` gives is the caller's own copy."""
    images = [IMAGE]
    request = ImageToVideo(**{**KL, "reference_images": images})
    images.append("sea.jpg")
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        request.duration = 10  # type: ignore[misc]
    request.fields()["reference_images"].append("sea.jpg")
    request.fields().clear()
    assert request.fields()["reference_images"] == [IMAGE]


def test_evolving_a_request_checks_it_again() -> None:
    """`attrs.evolve` makes another request under the same rules."""
    request = ImageToVideo(**V)
    assert attrs.evolve(request, duration=4).fields()["duration"] == 4
    with pytest.raises(InvalidRequest):
        attrs.evolve(request, duration=5)


@pytest.mark.parametrize("request_", [ImageToVideo(**V), ImageToVideo(**KL), ImageToVideo.unchecked(**KL, new=[1])])
def test_requests_are_values(request_: ImageToVideo) -> None:
    """Equal when their fields are, also after pickling and copying; `unchecked` is equal to its like."""
    for again in (pickle.loads(pickle.dumps(request_)), copy.deepcopy(request_), copy.copy(request_)):
        assert again == request_
        assert again.fields() == request_.fields()
    assert ImageToVideo(**V) != ImageToVideo(**{**V, "prompt": "waves at dusk"})
    assert ImageToVideo.unchecked(**V) != ImageToVideo.unchecked(**V, generate_count=2)


def test_reprs_hide_signatures() -> None:
    """Signed URLs of inputs and results lose their signatures when shown, in checked and unchecked requests."""
    for shown in (
        repr(ImageToVideo(**{**V, "image_url": SIGNED, "end_image_url": SIGNED})),
        repr(ImageToVideo(**{**KL, "reference_images": [SIGNED, SIGNED]})),
        repr(ImageToVideo.unchecked(model="Z", image_url=SIGNED, other={"urls": [SIGNED]})),
        repr(Video(task_id="t", video_url=SIGNED, thumbnail_url=SIGNED, raw={"video_url": SIGNED})),
    ):
        assert "SECRETSIGNATURE" not in shown
        assert "https://example.com/sea.jpg" in shown


def test_a_refused_request_hides_signatures_too() -> None:
    """The error about a signed URL does not print its signature."""
    with pytest.raises(InvalidRequest) as caught:
        ImageToVideo(**{**S, "reference_images": [SIGNED], "end_image_url": SIGNED})
    assert "SECRETSIGNATURE" not in f"{caught.value} {caught.value!r} {caught.value.problems}"


# --- unchecked -----------------------------------------------------------------------------------------------------


def test_unchecked_sends_exactly_what_it_was_given() -> None:
    """New models, new fields, missing fields and null: as they are, and nothing else."""
    fields = {"model": "V2", "duration": 99, "style": {"name": "noir", "n": [1, None]}, "prompt": None}
    assert ImageToVideo.unchecked(**fields).fields() == fields
    assert ImageToVideo.unchecked().fields() == {}
    assert ImageToVideo.unchecked(cls=1, self=2, extra=3).fields() == {"cls": 1, "self": 2, "extra": 3}


def test_unchecked_shows_the_fields_it_knows() -> None:
    """`request.model` and the like work; what was not given is None or its default."""
    request: Any = ImageToVideo.unchecked(model="V2", generate_count=6)
    assert (request.model, request.duration, request.generate_count, request.image_url) == ("V2", None, 6, None)
    assert isinstance(request, ImageToVideo)


@pytest.mark.parametrize(
    ("count", "tasks"), [(3, 3), (6, 6), (0, 1), (-1, 1), ("3", 1), (None, 1), (True, 1), (2.0, 1), ([], 1)]
)
def test_unchecked_counts_its_tasks(count: Any, tasks: int) -> None:
    """Only a whole number above 0 is a number of tasks; everything else is one."""
    assert ImageToVideo.unchecked(generate_count=count).task_count == tasks
    assert ImageToVideo.unchecked().task_count == 1


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), {1, 2}, b"x", object(), URL(IMAGE), "\ud800", ["\udfff"],
     10**5_000, lambda: 0],
    ids=type,
)  # fmt: skip
def test_unchecked_refuses_what_json_cannot_say(value: Any) -> None:
    """It is refused before anything is written down or sent, wherever it stands."""
    for fields in ({"x": value}, {"x": [{"y": value}]}, {"x": 1, "z": value}):
        with pytest.raises(InvalidRequest, match="has no JSON form") as caught:
            ImageToVideo.unchecked(**fields)
        assert repr(pickle.loads(pickle.dumps(caught.value)).problems) == repr(caught.value.problems)
    with pytest.raises(InvalidRequest, match="has no JSON form"):
        ImageToVideo.unchecked(**{"\ud800": 1})


def test_unchecked_refuses_a_nest_without_end() -> None:
    """A list that holds itself, and one that is deeper than any stack."""
    endless: list[Any] = []
    endless.append(endless)
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for value in (endless, deep):
        with pytest.raises(InvalidRequest, match="has no JSON form"):
            ImageToVideo.unchecked(x=value)
    while deep:
        deep = deep.pop()


def test_the_callback_url_belongs_to_the_receiver() -> None:
    """Another one would make the job unrecognisable: refused in both ways of building a request."""
    with pytest.raises(InvalidRequest, match="belongs to the receiver"):
        ImageToVideo.unchecked(**V, callback_url="https://me.example")
    with pytest.raises(TypeError):
        ImageToVideo(**{**V, "callback_url": "https://me.example"})


def test_unchecked_is_not_changed_from_outside() -> None:
    """What was given, and what `fields` gives, are copies."""
    inner = {"a": [1]}
    request = ImageToVideo.unchecked(x=inner)
    inner["a"].append(2)
    request.fields()["x"]["a"].append(3)
    assert request.fields() == {"x": {"a": [1]}}


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
nested = st.recursive(
    plain, lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(st.text(), inner), max_leaves=5
)


@given(st.dictionaries(st.text(min_size=1), nested))
def test_unchecked_is_the_same_after_a_journey(fields: dict[str, Any]) -> None:
    """Whatever JSON says is accepted, sent, and equal when it is read back; the rest is refused."""
    try:
        request = ImageToVideo.unchecked(**fields)
    except InvalidRequest:
        return
    sent = json.loads(create_body(request, None))
    assert sent == request.fields()
    assert ImageToVideo.unchecked(**sent) == request


# --- the kind ------------------------------------------------------------------------------------------------------


def test_the_kind_is_known_by_name_and_number() -> None:
    """Names (stores) and numbers (tokens) are unique and never change."""
    assert BY_NAME["image_to_video"] is BY_NUMBER[1] is ImageToVideo.kind
    assert len(BY_NAME) == len(BY_NUMBER) == len(KINDS)
    assert all(0 <= kind.number <= 255 for kind in KINDS)


@pytest.mark.parametrize(
    ("task_id", "path"),
    [
        ("i2v-0f", "image_to_video/i2v-0f"),
        ("a/b", "image_to_video/a%2Fb"),
        ("../users", "image_to_video/..%2Fusers"),
        ("a?b#c%d e", "image_to_video/a%3Fb%23c%25d%20e"),
        ("ü", "image_to_video/%C3%BC"),
    ],
)
def test_a_task_id_is_one_segment_of_the_path(task_id: str, path: str) -> None:
    """Ids are opaque: none of them leads elsewhere."""
    assert ImageToVideo.kind.status_path(task_id) == path
