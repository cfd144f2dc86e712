"""JSON as bytes: written of what a request has checked, read strictly or not at all."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from typing import Any, Final, NoReturn

try:
    import orjson
except ImportError:
    fast_dumps: Callable[[Any], bytes] | None = None
else:
    fast_dumps = orjson.dumps

NESTING: Final = 64  # the documented answers have 3 levels; what is deep here must not break a recursion elsewhere
_SPACE: Final = " \t\n\r"  # what RFC 8259 calls white space

_encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def written(value: Any) -> bytes:
    """UTF-8 JSON of what a request has checked. With orjson where it is installed (extra `speedups`), but for what it
    refuses and Python writes: whole numbers beyond 64 bits."""
    if fast_dumps is not None:
        with contextlib.suppress(TypeError):
            return fast_dumps(value)
    return plainly_written(value)


def plainly_written(value: Any) -> bytes:
    """Without orjson."""
    return _encoder.encode(value).encode()


def read(body: bytes) -> Any:
    """What this UTF-8 JSON says. Raises `ValueError` (bad UTF-8, bad JSON, NaN, a name that occurs twice, a number
    beyond all bounds) or `RecursionError`."""
    text = body.decode("utf-8").strip(_SPACE)
    found, end = _decoder.raw_decode(text)  # `decode` looks for the space around it with two regular expressions
    if end != len(text):
        raise ValueError("something follows")
    if body.count(b"{") + (body.count(b"[") if b"[" in body else 0) > NESTING:
        _check_depth(found)
    if b"\\" in body and (b"\\ud" in body or b"\\uD" in body):
        # Half a surrogate pair (an emoji cut in two) is not text, and no store could keep it; the rest is worth it.
        found = _decoder.decode(json.dumps(found, ensure_ascii=False).encode("utf-8", "replace").decode())
    return found


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError("a number beyond all bounds")
    return number


_decoder = json.JSONDecoder(object_pairs_hook=_no_duplicates, parse_constant=_no_constant, parse_float=_finite)


def _check_depth(found: Any) -> None:
    layer = [found]
    for _ in range(NESTING + 1):
        holders = [item for item in layer if isinstance(item, (dict, list))]
        layer = [inner for item in holders for inner in (item.values() if isinstance(item, dict) else item)]
    if layer:
        raise ValueError("nested too deeply")
