"""How long to wait before asking again, as arithmetic: no I/O, no clock, randomness handed in."""

import re
from collections.abc import Callable
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Final

BASE_S: Final = 0.5
CAP_S: Final = 20.0
RATE_LIMIT_S: Final = 30.0  # the vendor's own wait after a 429 (service.md, "Errors and waiting")
SHORTEST_PAUSE_S: Final = 0.5  # "Retry-After: 0" does not mean: at once, without end
LONGEST_PAUSE_S: Final = 300.0  # a larger Retry-After is clamped: a wrong header must not stop a worker for days

_SECONDS: Final = re.compile(r"[0-9]+(\.[0-9]+)?", re.ASCII)


def full_jitter(tries: int, random: Callable[[], float]) -> float:
    """Seconds before try number `tries + 1` (tries ≥ 0): U(0, min(20 s, 0.5 s · 2ⁿ)); `random` gives [0, 1)."""
    return random() * min(CAP_S, BASE_S * 2.0 ** min(tries, 30))


def retry_after(header: str | None, now: float) -> float | None:
    """Seconds that a Retry-After header asks for (RFC 9110, 10.2.3: seconds or a date; fractions are seen), clamped.

    None if it is absent or bad. `now`: Unix seconds.
    """
    if header is None:
        return None
    text = header.strip()
    if _SECONDS.fullmatch(text):
        return min(LONGEST_PAUSE_S, float(text))  # float: int() of thousands of digits raises
    try:
        moment = parsedate_to_datetime(text)
        seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() - now
    except (ValueError, OverflowError, TypeError, IndexError):
        return None
    return min(LONGEST_PAUSE_S, max(0.0, seconds))


def pause_after_429(header: str | None, now: float) -> float:
    """Seconds for which the whole client pauses after a 429: what Retry-After says, else the vendor's own wait."""
    asked_for = retry_after(header, now)
    return RATE_LIMIT_S if asked_for is None else max(SHORTEST_PAUSE_S, asked_for)


def first_ask_s(every_s: float, grace_s: float | None, random: Callable[[], float], *, has_receiver: bool) -> float:
    """Seconds from the acceptance to the first status GET: the callback is trusted that long."""
    patience_s = every_s if not has_receiver else 10 * every_s if grace_s is None else grace_s
    return patience_s * (1 + 0.1 * random())


def next_ask_s(every_s: float, age_s: float, usual_s: float, failed_asks: int, random: Callable[[], float]) -> float:
    """Seconds to the next status GET: the kind's pace while the task is as young as tasks usually are (`usual_s`), ever
    sparser as it grows older, and twice as long after each ask that was not answered."""
    stretch = (1 + max(0.0, age_s) / usual_s) if age_s > usual_s else 1.0
    return every_s * stretch * 2.0 ** min(failed_asks, 4) * (0.9 + 0.2 * random())
