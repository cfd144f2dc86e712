"""The digests that a storage announces, worked out while a file is written; no I/O."""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import importlib
import sys
from array import array
from collections.abc import Callable, Mapping
from typing import Final, Protocol

# Of those that are announced the first is checked: md5 runs beside the loop at disk speed, crc32c in Python does not.
PREFERRED: Final = {"md5": 16, "crc32c": 4}  # and their bytes

Extend = Callable[[int, bytes], int]


class Digest(Protocol):
    def update(self, data: bytes | memoryview, /) -> None: ...

    def digest(self) -> bytes: ...


def announced(headers: list[str]) -> dict[str, str]:
    """The digests in `x-goog-hash` (repeated, or with commas), in base64 as they came; what is no digest is left out.

    https://cloud.google.com/storage/docs/xml-api/reference-headers#xgooghash
    """
    found: dict[str, str] = {}
    for item in ",".join(headers).split(","):
        name, _, value = item.strip().partition("=")
        if is_digest(name, value):
            found[name] = value
    return found


def is_digest(name: str, value: str) -> bool:
    try:
        return len(base64.b64decode(value, validate=True)) == PREFERRED.get(name)
    except (binascii.Error, ValueError):
        return False


def chosen(digests: Mapping[str, str]) -> str | None:
    """The name of the digest that will be checked."""
    return next((name for name in PREFERRED if name in digests), None)


def new(name: str) -> Digest:
    """A digest of this name, "md5" or "crc32c", of nothing yet."""
    return hashlib.md5(usedforsecurity=False) if name == "md5" else Crc32c()


def text_of(digest: Digest) -> str:
    return base64.b64encode(digest.digest()).decode("ascii")


class Crc32c:
    """CRC-32C (RFC 3720, B.4) by `google_crc32c` where it is installed, else by tables: some 10 MB/s."""

    def __init__(self, extend: Extend | None = None) -> None:
        self._extend = extend or _best_extend()
        self._value = 0

    def update(self, data: bytes | memoryview, /) -> None:
        self._value = self._extend(self._value, bytes(data))

    def digest(self) -> bytes:
        return self._value.to_bytes(4, "big")


@functools.cache
def _best_extend() -> Extend:
    try:
        extend: Extend = importlib.import_module("google_crc32c").extend
    except ImportError:
        return extend_by_tables
    return extend


def extend_by_tables(value: int, data: bytes) -> int:
    """Four bytes at a time, each half of them with one look into a table of 65,536."""
    bytewise, low, high = _tables()
    whole = len(data) & ~3
    words = array("I", data[:whole])
    if sys.byteorder == "big":
        words.byteswap()
    crc = value ^ 0xFFFFFFFF
    for word in words:
        word ^= crc
        crc = low[word & 0xFFFF] ^ high[word >> 16]
    for byte in data[whole:]:
        crc = crc >> 8 ^ bytewise[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


@functools.cache
def _tables() -> tuple[list[int], array[int], array[int]]:
    """What 8 bits become, and what the lower and the upper 16 bits of a word do after all its 32 have gone through."""
    bytewise = list(range(256))
    for _ in range(8):
        bytewise = [value >> 1 ^ (0x82F63B78 if value & 1 else 0) for value in bytewise]  # Castagnoli's, reflected

    def through(word: int) -> int:
        for _ in range(4):
            word = word >> 8 ^ bytewise[word & 0xFF]
        return word

    halves = range(1 << 16)
    return bytewise, array("I", map(through, halves)), array("I", (through(half << 16) for half in halves))
