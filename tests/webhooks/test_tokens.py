"""Callback URLs: what we signed is recognised, nothing else is."""

from __future__ import annotations

import base64
import hashlib
import hmac
import itertools
import re
import struct

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from xiling_async.webhooks.tokens import CallbackToken, TokenSigner

NOW = 1_800_000_000.0
URL = "https://media.example.com/xiling"
OLD, NEW = b"the old secret, 16+", b"the new secret, 16+"
JOB = "0123456789abcdef" * 2
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
SIGNER = TokenSigner([NEW], URL)


def token(signer: TokenSigner = SIGNER, **fields: object) -> str:
    given = {"kind_number": 1, "tasks": 2, "job_id": JOB, "attempt": 3, "expires_at": NOW + 60, **fields}
    return signer.sign(CallbackToken(**given)).rpartition("/")[2]  # type: ignore[arg-type]


@given(
    kind_number=st.integers(0, 255),
    tasks=st.integers(0, 255),
    job_id=st.binary(min_size=16, max_size=16).map(bytes.hex),
    attempt=st.integers(0, 65_535),
    expires_at=st.floats(NOW, 2**40 - 1),
)
def test_what_was_signed_is_recognised(
    kind_number: int, tasks: int, job_id: str, attempt: int, expires_at: float
) -> None:
    """Every field comes back (the expiry in whole seconds), from one path segment of at most 80 safe characters."""
    signed = CallbackToken(kind_number=kind_number, tasks=tasks, job_id=job_id, attempt=attempt, expires_at=expires_at)
    url = SIGNER.sign(signed)
    base, _, text = url.rpartition("/")
    assert base == URL
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,80}", text)
    assert SIGNER.verify(text, NOW) == evolve(signed, expires_at=int(expires_at))


def test_the_url_does_not_depend_on_a_slash_at_the_end() -> None:
    """`https://x/` and `https://x` are one address."""
    with_slash = TokenSigner([NEW], f"{URL}/")
    assert token(with_slash) == token()
    signed = CallbackToken(kind_number=1, tasks=1, job_id=JOB, attempt=1, expires_at=NOW)
    assert with_slash.sign(signed).count("//") == 1


def test_every_single_character_change_is_refused() -> None:
    """80 places, 63 other characters each, and every place left out or doubled."""
    signed = token()
    for place, character in itertools.product(range(len(signed)), ALPHABET):
        changed = signed[:place] + character + signed[place + 1 :]
        assert (SIGNER.verify(changed, NOW) is not None) == (changed == signed)
        assert SIGNER.verify(signed[:place] + character + signed[place:], NOW) is None
    for place in range(len(signed)):
        assert SIGNER.verify(signed[:place] + signed[place + 1 :], NOW) is None


def test_every_single_bit_flip_is_refused() -> None:
    """480 bits: none is spare."""
    raw = base64.urlsafe_b64decode(token())
    assert len(raw) == 60
    for bit in range(len(raw) * 8):
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        assert SIGNER.verify(base64.urlsafe_b64encode(flipped).decode(), NOW) is None


def test_two_tokens_cannot_be_mixed() -> None:
    """The head of one with the MAC of another is nothing, wherever they are cut."""
    one, other = token(job_id="00" * 16), token(job_id="ff" * 16)
    for cut in range(1, 80):
        mixed = one[:cut] + other[cut:]
        assert mixed in (one, other) or SIGNER.verify(mixed, NOW) is None


@pytest.mark.parametrize(
    "other",
    ["https://media.example.com", f"{URL}/x", f"{URL}x", "http://media.example.com/xiling", "https://evil.example"],
)
def test_a_token_is_good_for_one_public_url(other: str) -> None:
    """The same secret behind another URL does not recognise it: a test system's tokens are no use elsewhere."""
    assert TokenSigner([NEW], other).verify(token(), NOW) is None


def test_a_token_expires() -> None:
    """Good until its last second, and never after."""
    signed = token(expires_at=NOW + 60)
    assert SIGNER.verify(signed, NOW + 60) is not None
    assert SIGNER.verify(signed, NOW + 60.001) is None
    assert SIGNER.verify(signed, float("inf")) is None


@pytest.mark.parametrize(("wanted", "signed"), [(-5.0, 0), (0.0, 0), (1e300, 2**40 - 1)])
def test_an_expiry_beyond_the_field_is_clamped(wanted: float, signed: int) -> None:
    """Before 1970 or after the year 36812 is the nearest time that fits."""
    verified = SIGNER.verify(token(expires_at=wanted), 0)
    assert verified is not None
    assert verified.expires_at == signed


def test_secrets_can_be_rotated() -> None:
    """New tokens come from the first secret; those of the others stay good until their secret is taken away."""
    rotated = TokenSigner([NEW, OLD], URL)
    old = token(TokenSigner([OLD], URL))
    assert token(rotated) == token()
    assert rotated.verify(old, NOW) is not None
    assert rotated.verify(token(), NOW) is not None
    assert SIGNER.verify(old, NOW) is None


def test_the_same_secret_twice_is_one() -> None:
    """Naming a secret again changes nothing."""
    assert repr(TokenSigner([NEW, NEW], URL)) == repr(SIGNER)
    assert TokenSigner([NEW, OLD, NEW], URL).verify(token(), NOW) is not None


def test_secrets_whose_key_ids_collide_work_both() -> None:
    """A key id has 16 bits: one pair of secrets in 65,536 shares it, and neither may push the other out."""
    seen: dict[bytes, bytes] = {}
    for number in itertools.count():
        secret = b"secret number %08d" % number
        key_id = hashlib.sha256(b"xiling_async callback key id\0" + secret).digest()[:2]
        if key_id in seen:
            break
        seen[key_id] = secret
    both = TokenSigner([secret, seen[key_id]], URL)
    assert both.verify(token(TokenSigner([secret], URL)), NOW) is not None
    assert both.verify(token(TokenSigner([seen[key_id]], URL)), NOW) is not None
    assert both.verify(token(), NOW) is None


def test_another_version_is_refused() -> None:
    """A token of a version that this library does not know is refused, though its MAC is right."""
    for version in (0, 1, 2, 255):
        head = bytes([version]) + base64.urlsafe_b64decode(token())[1:28]
        mac = hmac.digest(NEW, head + b"\0" + URL.encode(), "sha256")
        signed = base64.urlsafe_b64encode(head + mac).decode()
        assert (SIGNER.verify(signed, NOW) is not None) == (version == 1)


def test_another_secret_is_refused() -> None:
    """With the right key id but the wrong secret, and with the secret that unknown key ids are compared with."""
    key_id = hashlib.sha256(b"xiling_async callback key id\0" + NEW).digest()[:2]
    fields = struct.pack(">BBB", 1, 1, 1), bytes(16), struct.pack(">H", 1), (2**40 - 1).to_bytes(5, "big")
    for shown_id, secret in itertools.product((key_id, b"\0\0", b"\xff\xff"), (OLD, bytes(32), b"")):
        head = fields[0] + shown_id + b"".join(fields[1:])
        mac = hmac.digest(secret, head + b"\0" + URL.encode(), "sha256")
        assert SIGNER.verify(base64.urlsafe_b64encode(head + mac).decode(), NOW) is None


@pytest.mark.parametrize(
    "text",
    [
        "", "A" * 80, "A" * 79, "A" * 81, "=" * 80, "ü" * 80, "\u0661" * 80, "\ud800" * 80, "A" * 79 + "\n",
        "A" * 80 + "\n", "A" * 79 + "=", "A" * 76 + "====", "../" * 26 + "..", "A" * 79 + "+",
        "A" * 79 + "/", "\0" * 80, "A" * 1_000_000,
    ],
    ids=lambda text: repr(text[:12]),
)  # fmt: skip
def test_an_invalid_token_is_refused(text: str) -> None:
    """Wrong lengths, wrong alphabets, other scripts' digits and nothing at all."""
    assert SIGNER.verify(text, NOW) is None


@pytest.mark.parametrize("around", ["{}\n", " {}", "{} ", "{}=", "/{}", "{}/", "%{}"])
def test_a_good_token_with_anything_around_it_is_refused(around: str) -> None:
    """Nothing is trimmed: there is one spelling of a token."""
    assert SIGNER.verify(around.format(token()), NOW) is None


@given(st.text() | st.text(ALPHABET, min_size=80, max_size=80))
def test_no_text_is_a_token(text: str) -> None:
    """Nothing that was not signed is recognised, and nothing raises."""
    assert SIGNER.verify(text, NOW) is None


@given(st.data())
def test_no_mutation_is_a_token(data: st.DataObject) -> None:
    """Several characters of a good token replaced at once: refused, unless it is the same token again."""
    signed = token()
    changed = list(signed)
    for place in data.draw(st.lists(st.integers(0, 79), min_size=1, max_size=10)):
        changed[place] = data.draw(st.sampled_from(ALPHABET))
    assert (SIGNER.verify("".join(changed), NOW) is not None) == ("".join(changed) == signed)


def test_a_signer_shows_no_secret() -> None:
    """Its repr counts."""
    assert repr(TokenSigner([NEW, OLD], URL)) == "<TokenSigner with 2 key ids>"


def test_what_is_out_of_range_cannot_be_signed() -> None:
    """A kind or an attempt that the token has no room for is an error, never another kind or attempt."""
    for fields in (
        {"kind_number": 256}, {"tasks": -1}, {"tasks": 256}, {"attempt": 65_536}, {"attempt": -1},
        {"job_id": "abcd"}, {"job_id": "ab" * 17}, {"job_id": "x" * 32}, {"job_id": ""},
    ):  # fmt: skip
        with pytest.raises((struct.error, ValueError)):
            token(**fields)
