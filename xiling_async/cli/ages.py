"""Spans of time as people write them: 30d, 12h, 90m, 45s."""

from __future__ import annotations

import re
from typing import Final

import typer

UNITS: Final = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_SPAN: Final = re.compile(r"([0-9]{1,9})([dhms])")


def seconds_of(text: str, option: str) -> float:
    """The seconds of a span such as 30d. Raises `typer.BadParameter`, which names the option."""
    span = _SPAN.fullmatch(text.strip())
    if span is None:
        raise typer.BadParameter(f"{text!r} is not a span of time; examples: 30d, 12h, 90m, 45s", param_hint=option)
    return float(int(span[1]) * UNITS[span[2]])


def age_of(seconds: float) -> str:
    """As in 12s, 3m, 2h, 5d."""
    whole = max(int(seconds), 0)
    return next((f"{whole // unit}{name}" for name, unit in UNITS.items() if whole >= unit), "0s")
