"""How long to wait before asking again, as arithmetic: no I/O, no clock, randomness handed in."""

import math
from collections.abc import Callable
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Final

BASE_S: Final = 0.5
CAP_S: Final = 20.0
RATE_LIMIT_S: Final = 30.0  # the vendor's own wait after a 429 (service.md, "Errors and waiting")
LONGEST_PAUSE_S: Final = 300.0  # a larger Retry-After is clamped: a wrong header must not stop a worker for days


def full_jitter(tries: int, random: Callable[[], float]) -> float:
    """Seconds before try number `tries + 1` (tries ≥ 0): U(0, min(20 s, 0.5 s · 2ⁿ)); `random` gives [0, 1)."""
    return random() * min(CAP_S, BASE_S * 2.0 ** min(tries, 30))


def retry_after(header: str | None, now: float) -> float | None:
    """Seconds that a Retry-After header asks for (RFC 9110, 10.2.3: seconds or a date), clamped.

    None if it is absent or bad. `now`: Unix seconds.
    """
    if header is None:
        return None
    text = header.strip()
    if text.isascii() and text.isdigit():
        # Longer numbers are beyond any clamp, and int() of thousands of digits raises.
        return min(LONGEST_PAUSE_S, float(text[:12]))
    try:
        moment = parsedate_to_datetime(text)
        seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() - now
    except (ValueError, OverflowError, TypeError, IndexError):
        return None
    return min(LONGEST_PAUSE_S, max(0.0, seconds)) if math.isfinite(seconds) else None


class RetryBudget:
    """At most so many repeats: 10 tokens, one a repeat, a tenth back for a success, so that a storm is not multiplied.

    The numbers are those of gRPC's retry throttling (proposal A6), scaled down.
    """

    def __init__(self, tokens: float = 10.0, refund: float = 0.1) -> None:
        self._most = tokens
        self._tokens = tokens
        self._refund = refund

    def succeeded(self) -> None:
        self._tokens = min(self._most, self._tokens + self._refund)

    def take(self) -> bool:
        """Whether one more repeat is allowed; it is counted."""
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True
