"""What may be shown: no key, token, password or signature survives, and nothing makes it slow."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xiling_async._internal.redact import HIDDEN, LONG_CHARACTERS, SAMPLE_BYTES, sample, scrub, shown
from xiling_async.webhooks.tokens import CallbackToken, TokenSigner

KEY = "key-0123456789"
SIGNATURE = "SECRETSIGNATURE"
TOKEN = (
    TokenSigner([b"s" * 32], "https://me.example")
    .sign(CallbackToken(kind_number=1, tasks=1, job_id="ab" * 16, attempt=1, expires_at=2e9))
    .rpartition("/")[2]
)


@pytest.mark.parametrize("key", ["k", "api", "v1", "kee", "a.b", "it", "no", "sim"])
def test_a_short_key_is_not_cut_out_of_words(key: str) -> None:
    """A key that is part of other words leaves them whole; where it stands alone, or in a header, it is hidden."""
    text = "https://api.keevx.com/v1/image_to_video: it is not known; see simulator.k.example, a.b.example and no-one"
    assert scrub(text, key).replace(f" {HIDDEN} ", f" {key} ").replace(f": {HIDDEN} ", f": {key} ") == text
    alone = (f"key {key} refused", f"'{key}'", f'{{"key":"{key}"}}', f"key={key}&x", f"({key})", f"no {key}.", key)
    for said in alone:
        hidden = scrub(said, key)
        assert HIDDEN in hidden and not re.search(rf"(?<![\w.-]){re.escape(key)}(?![\w.-])", hidden.replace("no", "-"))
    assert key not in scrub(f"Authorization: Bearer {key}", key).partition("Bearer")[2]
    assert "abcdefgh" not in scrub("xabcdefghx", "abcdefgh")  # a long one never is a part of other words


class Unshowable:
    """Its repr raises what it was given."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __repr__(self) -> str:
        raise self.error


@pytest.mark.parametrize(
    "url",
    [
        f"https://media.example/v.mp4?Signature={SIGNATURE}",
        f"https://media.example/v.mp4?Expires=1&Signature={SIGNATURE}&x=2",
        f"https://media.example/v.mp4#{SIGNATURE}",
        f"https://media.example/v.mp4?#{SIGNATURE}",
        f"https://media.example?{SIGNATURE}",
        f"HTTPS://media.example/v.mp4?Signature={SIGNATURE}",
        f"gs+https://media.example/v.mp4?Signature={SIGNATURE}",
        f"https://media.example/v.mp4?name='sea'&Signature={SIGNATURE}",
        f"https://user:{SIGNATURE}@media.example/v.mp4",
        f"https://{SIGNATURE}@media.example/v.mp4",
        f"https://user:p@{SIGNATURE}@media.example/",
        f"https://user:pass@media.example/v.mp4?Signature={SIGNATURE}",
        f"https://media.example/{KEY}/v.mp4?Signature={SIGNATURE}",
        f"https://media.example/{KEY}?{KEY}&Signature={SIGNATURE}",
        rf"https:\/\/media.example\/v.mp4?Signature={SIGNATURE}",
        rf"https:\/\/user:{SIGNATURE}@media.example\/v.mp4",
        rf"https://media.example/v.mp4?a=1\u0026Signature={SIGNATURE}",
    ],
)
def test_a_url_loses_its_query_fragment_and_user(url: str) -> None:
    """Whatever is behind `?` or `#`, or before `@`, is gone: bare, in JSON, and in a repr of either."""
    for text in (url, json.dumps({"video_url": url}), repr(url), repr(json.dumps([url, "next"])), f"<{url}>"):
        clean = scrub(text, KEY)
        assert SIGNATURE not in clean
        assert KEY not in clean
        assert "media.example" in clean


def test_the_rest_of_a_text_stays() -> None:
    """Hiding ends where the URL ends: quotes, brackets and spaces, and what comes behind them."""
    text = """see "https://a.example/b?c=d", 'https://e.example/?f', <https://g.example#h> or https://i.example/j"""
    assert scrub(text) == (
        f"""see "https://a.example/b?{HIDDEN}", 'https://e.example/?{HIDDEN}', """
        f"""<https://g.example?{HIDDEN}> or https://i.example/j"""
    )


@pytest.mark.parametrize("text", ["", "no URL at all", "what? #1 is me@example.com", "https://a.example/b/c", "://?x"])
def test_what_is_no_secret_is_left_alone(text: str) -> None:
    """A text without secrets comes back unchanged."""
    assert scrub(text, KEY) == text


@pytest.mark.parametrize("around", ["{}", "/{}", "/hook/{} HTTP/1.1", "'{}'", "\n{}", "x={}&y", "({})", "n{}"])
def test_a_callback_token_is_hidden_wherever_it_stands(around: str) -> None:
    """A token is known by its shape, also in a repr where an escape's letter stands before it."""
    text = around.format(TOKEN)
    assert TOKEN not in scrub(text)
    assert TOKEN not in shown(text)
    assert TOKEN not in shown(text.encode())


def test_shorter_words_are_no_tokens() -> None:
    """Task ids, job ids and hashes stay readable."""
    for word in ("i2v-" + "0f" * 16, "ab" * 16, "0" * 79):
        assert scrub(word) == word


@pytest.mark.parametrize("word", ["Bearer", "bearer", "BEARER  "])
def test_a_bearer_token_is_hidden_though_nobody_named_it(word: str) -> None:
    """The Authorization header never shows, not even with somebody else's key."""
    clean = scrub(f"{{'Authorization': '{word} {SIGNATURE}'}}")
    assert SIGNATURE not in clean
    assert clean.endswith("'}")


def test_empty_secrets_hide_nothing() -> None:
    """An empty secret is none, and does not tear the text apart."""
    assert scrub("text x", "", "x") == "text <hidden>"


@given(st.text(), st.text(min_size=LONG_CHARACTERS))
def test_a_given_secret_never_survives(text: str, secret: str) -> None:
    """Whatever the text and the (long) secret are, the secret is not in what is shown."""
    clean = scrub(f"{text}{secret}{text}", secret)
    assert secret not in clean.replace(HIDDEN, "")


@given(st.text(alphabet="ab:/?#@'\\ <>" + "\u00fc"))
def test_scrubbing_twice_is_scrubbing_once(text: str) -> None:
    """What is clean stays as it is."""
    assert scrub(scrub(text)) == scrub(text)


@pytest.mark.parametrize("piece", ["a", "a://", "a:", "bearer ", "a://b@", "'", "a://'", "-", "\\", "a:\\/\\/"])
def test_a_megabyte_of_anything_is_scrubbed_at_once(piece: str) -> None:
    """An answer cannot stop the loop: the work grows with the length, not with its square (else: minutes)."""
    text = piece * (1_000_000 // len(piece))
    assert len(scrub(text)) <= len(text) + len(HIDDEN) * text.count("@") + len(HIDDEN) * text.count("bearer")


@given(st.binary(max_size=2_000))
def test_a_sample_is_short_text(body: bytes) -> None:
    """Any bytes give a text of at most 512 bytes."""
    assert len(sample(body).encode()) <= SAMPLE_BYTES


def test_a_sample_is_scrubbed_before_it_is_cut() -> None:
    """A secret across the cut does not leave its first half."""
    for place in range(SAMPLE_BYTES - 90, SAMPLE_BYTES + 5):
        body = b"-" * 3 + b" " * (place - 3) + TOKEN.encode() + b" " + KEY.encode()
        assert TOKEN[:8] not in sample(body, KEY)
    assert sample("ü".encode() * 400) == "ü" * 256
    assert sample(b"a " * 255 + b"b" + "ü".encode()) == "a " * 255 + "b"


@pytest.mark.parametrize("value", [Unshowable(ValueError(SIGNATURE)), 10**5_000, [Unshowable(TypeError())]], ids=type)
def test_showing_never_raises(value: object) -> None:
    """What cannot be shown is named by its type."""
    assert shown(value).startswith(f"<{type(value).__name__} that cannot be shown")
    assert SIGNATURE not in shown(value)


def test_showing_a_deep_nest_does_not_raise() -> None:
    """A value nested beyond the recursion limit is named by its type too."""
    nest: list[object] = []
    for _ in range(100_000):
        nest = [nest]
    assert shown(nest) == "<list that cannot be shown: RecursionError>"
    while nest:  # freed level by level
        nest = nest.pop()  # type: ignore[assignment]
