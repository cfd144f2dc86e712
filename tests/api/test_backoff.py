"""How long to wait, as arithmetic."""

from __future__ import annotations

from email.utils import formatdate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xiling_async.api.backoff import (
    BASE_S,
    CAP_S,
    LONGEST_PAUSE_S,
    first_ask_s,
    full_jitter,
    next_ask_s,
    retry_after,
)

NOW = 1_800_000_000.0
ALMOST_1 = 1 - 2**-53


@given(st.integers(0, 10_000), st.floats(0, ALMOST_1))
def test_jitter_is_between_nothing_and_the_cap(tries: int, luck: float) -> None:
    """Full jitter: U(0, min(20 s, 0.5 s * 2**tries)), however many tries there were."""
    wait_s = full_jitter(tries, lambda: luck)
    assert 0 <= wait_s <= CAP_S
    assert wait_s <= BASE_S * 2 ** min(tries, 20)


def test_jitter_doubles_up_to_the_cap() -> None:
    """The upper bounds, one by one."""
    bounds = [full_jitter(tries, lambda: 1.0) for tries in range(8)]
    assert bounds == [0.5, 1, 2, 4, 8, 16, 20, 20]
    assert full_jitter(5, lambda: 0.0) == 0


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("", None),
        ("   ", None),
        ("0", 0),
        ("7", 7),
        (" 7 ", 7),
        ("007", 7),
        ("0000000000000000005", 5),
        ("299", 299),
        ("301", LONGEST_PAUSE_S),
        ("9" * 400, LONGEST_PAUSE_S),
        ("9" * 10_000, LONGEST_PAUSE_S),
        ("-1", None),
        ("+5", None),
        ("1.5", 1.5),
        ("1e3", None),
        ("1_000", None),
        ("٣", None),  # a digit, but not HTTP's
        ("²", None),
        ("nan", None),
        ("inf", None),
        ("soon", None),
        ("5, 6", None),
        ("5 s", None),
        ("Wed", None),
        ("Wed, 99 Foo 2026 99:99:99 GMT", None),
        ("\0", None),
        (formatdate(NOW + 90, usegmt=True), 90),
        (formatdate(NOW, usegmt=True), 0),
        (formatdate(NOW - 90, usegmt=True), 0),
        (formatdate(NOW + 90_000, usegmt=True), LONGEST_PAUSE_S),
        ("Fri, 31 Dec 9999 23:59:59 GMT", LONGEST_PAUSE_S),
        ("Mon, 01 Jan 0001 00:00:00 GMT", 0),
        ("Fri, 31 Dec 9999 23:59:59 -2359", LONGEST_PAUSE_S),
    ],
)
def test_retry_after(header: str | None, seconds: float | None) -> None:
    """Seconds or a date, clamped; what is neither is nothing."""
    assert retry_after(header, NOW) == seconds


def test_a_date_without_a_zone_is_utc() -> None:
    """ "-0000" means that no zone is known; HTTP's dates are UTC."""
    assert retry_after(formatdate(NOW + 60, usegmt=True).replace("GMT", "-0000"), NOW) == 60


@given(st.text() | st.from_regex(r"[A-Z][a-z]{2}, \d+ [A-Z][a-z]{2} \d+ \d+:\d+:\d+ [-+A-Z0-9]*"), st.floats(0, 4e9))
def test_no_header_can_break_it(header: str, now: float) -> None:
    """Any text gives nothing, or seconds within the clamp."""
    seconds = retry_after(header, now)
    assert seconds is None or 0 <= seconds <= LONGEST_PAUSE_S


@pytest.mark.parametrize(
    ("grace_s", "has_receiver", "wait_s"), [(None, True, 300), (None, False, 30), (45, True, 45), (45, False, 30)]
)
def test_the_callback_is_trusted_first(grace_s: float | None, has_receiver: bool, wait_s: float) -> None:
    """With a receiver the first GET waits for the grace (ten times the pace); without one nothing is trusted."""
    assert first_ask_s(30, grace_s, lambda: 0.0, has_receiver=has_receiver) == wait_s
    assert first_ask_s(30, grace_s, lambda: 1.0, has_receiver=has_receiver) == pytest.approx(wait_s * 1.1)


def test_no_grace_asks_at_once() -> None:
    """A grace of 0 is a grace of 0."""
    assert first_ask_s(30, 0, lambda: 0.5, has_receiver=True) == 0


def test_asking_grows_sparser_with_age() -> None:
    """The kind's pace while the task is young, then ever longer; twice as long after each ask without an answer."""
    middle = lambda: 0.5  # noqa: E731
    assert next_ask_s(30, 0, 1200, 0, middle) == pytest.approx(30)
    assert next_ask_s(30, 1200, 1200, 0, middle) == pytest.approx(30)
    assert next_ask_s(30, 2400, 1200, 0, middle) == pytest.approx(90)
    assert [next_ask_s(30, 0, 1200, failed, middle) / 30 for failed in range(7)] == pytest.approx(
        [1, 2, 4, 8, 16, 16, 16]
    )


@given(st.floats(-1e9, 1e9), st.integers(0, 10_000), st.floats(0, ALMOST_1))
def test_the_next_ask_is_never_in_the_past(age_s: float, failed: int, luck: float) -> None:
    """Whatever the clock says, the pace is kept: never faster than nine tenths of it."""
    assert next_ask_s(30, age_s, 1200, failed, lambda: luck) >= 27
