"""JSON as bytes: requests are written, answers are read strictly or not at all."""

from __future__ import annotations

import json
import math
from typing import Any, Final, NoReturn

NESTING: Final = 64  # the documented answers have 3 levels; what is deep here must not break a recursion elsewhere

_encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def written(value: Any) -> bytes:
    """The value as UTF-8 JSON."""
    return _encoder.encode(value).encode()


def read(body: bytes) -> Any:
    """The value of UTF-8 JSON. Raises `ValueError` (bad UTF-8, bad JSON, NaN, a duplicate name, an infinite number) or
    `RecursionError`."""
    value = _decoder.decode(body.decode())
    if body.count(b"{") + body.count(b"[") > NESTING:
        _check_depth(value)
    if b"\\" in body and (b"\\ud" in body or b"\\uD" in body):
        # Half a surrogate pair (an emoji cut in two) is not text, and no store can keep it: it becomes a "?".
        value = _decoder.decode(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace").decode())
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a name occurs twice")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError("a number is infinite")
    return number


_decoder = json.JSONDecoder(object_pairs_hook=_no_duplicates, parse_constant=_no_constant, parse_float=_finite)


def _check_depth(value: Any) -> None:
    layer = [value]
    for _ in range(NESTING + 1):
        holders = [item for item in layer if isinstance(item, (dict, list))]
        layer = [inner for item in holders for inner in (item.values() if isinstance(item, dict) else item)]
    if layer:
        raise ValueError("nested too deeply")
