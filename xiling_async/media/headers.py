"""What a host announces of a file in the headers of its response, digests included; no I/O."""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import importlib
import re
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any, Final, Protocol

from attrs import field, frozen
from multidict import CIMultiDict, CIMultiDictProxy

Headers = CIMultiDict[str] | CIMultiDictProxy[str]

_CONTENT_RANGE: Final = re.compile(r"bytes +(\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", re.ASCII)
_UNSATISFIED: Final = re.compile(r"bytes +\*/(\d{1,18})", re.ASCII)
_VISIBLE: Final = re.compile(r"[!-~][ -~]{0,998}")
# Of those that are announced the first is checked. By name, with their bytes.
DIGESTS: Final = {"md5": 16, "crc32c": 4}


class Digest(Protocol):
    def update(self, data: bytes, /) -> None: ...

    def digest(self) -> bytes: ...


@functools.cache
def crc32c() -> type[Digest] | None:
    """CRC-32C (RFC 3720, B.4) of `google_crc32c`; None where it is not installed, or has no C code: in Python it is
    too slow."""
    try:
        module: Any = importlib.import_module("google_crc32c")
    except Exception:  # it warns where it has no C code, and warnings may be errors
        return None
    checksum: type[Digest] = module.Checksum
    return checksum if module.implementation == "c" else None


def digest_in_use(digests: Mapping[str, str]) -> str | None:
    """The name of the digest that is checked; None: none of these can be."""
    return next((name for name in DIGESTS if name in digests and (name == "md5" or crc32c())), None)


def new_digest(name: str) -> Digest:
    """A digest of nothing yet; `name` is of `digest_in_use`."""
    checksum = crc32c()
    return hashlib.md5(usedforsecurity=False) if name == "md5" or checksum is None else checksum()


def digest_text(digest: Digest) -> str:
    """In base64, as it is announced."""
    return base64.b64encode(digest.digest()).decode("ascii")


def is_digest(name: str, value: str) -> bool:
    try:
        return len(base64.b64decode(value, validate=True)) == DIGESTS.get(name)
    except (binascii.Error, ValueError):
        return False


class Contradiction(ValueError):
    """The headers say two things at once, or not what was asked for."""


@frozen(kw_only=True)
class Announced:
    """`validator`: what `If-Range` may be asked with. `total`: bytes of the file. `digests`: by name, in base64."""

    validator: str | None = None
    total: int | None = None
    digests: dict[str, str] = field(factory=dict)

    @property
    def is_provable(self) -> bool:
        """Whether a digest can prove the whole file."""
        return digest_in_use(self.digests) is not None

    @property
    def is_resumable(self) -> bool:
        """Whether the rest of this file can be asked for: by its validator, or because a digest proves the whole."""
        return self.validator is not None or self.is_provable

    def fits(self, later: Announced) -> bool:
        """Whether what a later answer says can be of the same file; how long it is is not compared."""
        if self.validator and later.validator and self.validator != later.validator:
            return False
        return all(later.digests.get(name, value) == value for name, value in self.digests.items())

    def with_more(self, later: Announced) -> Announced:
        """Both together, of the same file."""
        return Announced(
            validator=self.validator or later.validator,
            total=later.total if self.total is None else self.total,
            digests={**self.digests, **later.digests},
        )

    def as_json(self) -> dict[str, Any]:
        return {"validator": self.validator, "total": self.total, "digests": self.digests}

    @classmethod
    def from_json(cls, data: Any) -> Announced | None:
        """What `as_json` gave; None: it is not ours, or broken."""
        if not isinstance(data, dict):
            return None
        validator, total, digests = data.get("validator"), data.get("total"), data.get("digests")
        if validator is not None and not (isinstance(validator, str) and _VISIBLE.fullmatch(validator)):
            return None
        if total is not None and not (type(total) is int and total >= 0):
            return None
        if not isinstance(digests, dict) or not all(
            isinstance(value, str) and is_digest(name, value) for name, value in digests.items()
        ):
            return None
        return cls(validator=validator, total=total, digests=digests)


def of_whole(headers: Headers) -> Announced:
    """What a 200 says. Raises `Contradiction` for a body that nothing can prove whole: it may end anywhere."""
    length = _length(headers)
    announced = Announced(validator=_validator(headers), total=length, digests=_digests(headers))
    if length is None and not announced.is_provable and headers.get("Transfer-Encoding", "").lower() != "chunked":
        raise Contradiction("neither a length nor a digest is announced")
    return announced


def of_rest(headers: Headers, start: int | None) -> Announced:
    """What a 206 says to a request for all from `start` on (None: no range was asked for).

    Raises `Contradiction` when it is the answer to anything else."""
    match = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", "").strip())
    if match is None:
        raise Contradiction("no Content-Range of bytes")
    first, last = int(match[1]), int(match[2])
    total = None if match[3] == "*" else int(match[3])
    if first != start or last < first or (total is not None and last != total - 1):
        raise Contradiction("another range than the one that was asked for")
    length = _length(headers)
    if length is not None and length != last - first + 1:
        raise Contradiction("Content-Length and Content-Range differ")
    return Announced(validator=_validator(headers), total=total, digests=_digests(headers))


def unsatisfied_total(headers: Headers) -> int | None:
    """How long the file is, by a 416."""
    match = _UNSATISFIED.fullmatch(headers.get("Content-Range", "").strip())
    return None if match is None else int(match[1])


def _length(headers: Headers) -> int | None:
    text = headers.get("Content-Length", "").strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else None


def _digests(headers: Headers) -> dict[str, str]:
    """Those in `x-goog-hash` (repeated, or with commas), in base64 as they came; what is not a digest is left out.

    https://cloud.google.com/storage/docs/xml-api/reference-headers#xgooghash
    """
    pairs = (item.strip().partition("=") for item in ",".join(headers.getall("x-goog-hash", [])).split(","))
    return {name: value for name, _, value in pairs if is_digest(name, value)}


def _validator(headers: Headers) -> str | None:
    """A strong one (RFC 9110, 8.8): an ETag that is not weak, else a date that no later change can share."""
    etag = headers.get("ETag", "").strip()
    if etag.startswith('"') and _VISIBLE.fullmatch(etag):
        return etag
    modified = headers.get("Last-Modified", "").strip()
    try:
        age = parsedate_to_datetime(headers.get("Date", "")) - parsedate_to_datetime(modified)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return modified if age.total_seconds() >= 1 and _VISIBLE.fullmatch(modified) else None
