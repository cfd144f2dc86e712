"""The contents of result files: small playable samples, generated bodies, and their digests."""

import base64
import functools
import hashlib
import random
from collections.abc import Iterator
from pathlib import Path

import attrs

_TYPES = {"mp4": "video/mp4", "webp": "image/webp"}

# A generated body is one block, repeated.
BLOCK_BYTES = 1024 * 1024
# Larger files have no digest unless it was computed before: no request waits for it.
MD5_LIMIT_BYTES = 32 * 1024 * 1024
CRC32C_LIMIT_BYTES = 256 * 1024
# Large enough that the loop over the pieces is cheap compared with the socket.
PIECE_BYTES = 128 * 1024
_CHANGED_BYTES = 8


@attrs.frozen
class Content:
    """The bytes of one file: a block, repeated or cut to `size`."""

    block: bytes = attrs.field(repr=False)
    size: int
    content_type: str
    known_md5: bytes | None = attrs.field(default=None, repr=False)

    def pieces(self, start: int, stop: int, piece_bytes: int = PIECE_BYTES) -> Iterator[memoryview]:
        """The bytes from `start` up to `stop`, at most `piece_bytes` at a time."""
        block = memoryview(self.block)
        while start < stop:
            offset = start % len(block)
            piece = block[offset : offset + min(piece_bytes, stop - start)]
            yield piece
            start += len(piece)

    @functools.cached_property
    def etag(self) -> str:
        return f'"{_md5(self.block).hexdigest()}-{self.size:x}"'

    @functools.cached_property
    def digests(self) -> dict[str, bytes]:
        """Those that are cheap or known: `crc32c` and `md5`, in this order, as Google's storage."""
        digests: dict[str, bytes] = {}
        if self.size <= CRC32C_LIMIT_BYTES:
            digests["crc32c"] = crc32c(b"".join(self.pieces(0, self.size))).to_bytes(4, "big")
        if self.known_md5 is not None:
            digests["md5"] = self.known_md5
        elif self.size <= MD5_LIMIT_BYTES:
            digests["md5"] = self.md5()
        return digests

    def md5(self) -> bytes:
        digest = _md5()
        for piece in self.pieces(0, self.size, BLOCK_BYTES):
            digest.update(piece)
        return digest.digest()

    def changed(self, number: int) -> "Content":
        """Version `number` of this content, of the same size and beginning; 0 is the original."""
        tail = _md5(b"%d" % number).digest()[: min(_CHANGED_BYTES, len(self.block))]
        last = min(self.size, len(self.block)) - len(tail)
        if number == 0 or last < 0:
            return self
        return Content(self.block[:last] + tail + self.block[last + len(tail) :], self.size, self.content_type)


def _md5(content: bytes = b"") -> "hashlib._Hash":
    return hashlib.md5(content, usedforsecurity=False)


def goog_hash(digests: dict[str, bytes]) -> str:
    """The value of `x-goog-hash`, as Google's storage sends it: base64 digests."""
    return ",".join(f"{name}={base64.b64encode(digest).decode()}" for name, digest in digests.items())


def _crc32c_table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)  # the polynomial of Castagnoli, reflected
        table.append(value)
    return tuple(table)


_CRC32C = _crc32c_table()


def crc32c(content: bytes) -> int:
    """CRC-32C (RFC 3720, B.4)."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc = crc >> 8 ^ _CRC32C[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def _read(name: str) -> Content:
    path = Path(__file__).with_name("samples") / name
    block = path.read_bytes()
    return Content(block, len(block), _TYPES[path.suffix[1:]])


# Read at import: no request waits for a disk.
_SAMPLES = {name: _read(name) for name in ("landscape.mp4", "landscape.webp", "portrait.mp4", "portrait.webp")}


def sample(suffix: str, *, portrait: bool) -> Content | None:
    """The sample of this file type and orientation, or None."""
    return _SAMPLES.get(f"{'portrait' if portrait else 'landscape'}.{suffix}")


@functools.lru_cache(maxsize=16)
def of_bytes(data: bytes) -> Content:
    """These bytes as a video."""
    return Content(data, len(data), _TYPES["mp4"])


@functools.lru_cache(maxsize=16)
def big(size: int, *, hashed: bool) -> Content:
    """A generated video: it begins with the sample, then fixed noise follows."""
    content = Content(_big_block(), size, _TYPES["mp4"])
    return attrs.evolve(content, known_md5=content.md5()) if hashed else content


@functools.cache
def _big_block() -> bytes:
    beginning = _SAMPLES["landscape.mp4"].block
    return beginning + random.Random(0).randbytes(BLOCK_BYTES - len(beginning))  # noqa: S311 - noise, not secrets


def signature(name: str, version: int) -> str:
    """The signature in version `version` of the URL of a file."""
    return hashlib.sha256((f"{name}#{version}" if version else name).encode()).hexdigest()


def signed_url(origin: str, name: str, version: int) -> str:
    """The URL of a result, with a query that looks signed and valid for 7 days."""
    return f"{origin}/media/{name}?X-Goog-Signature={signature(name, version)}&X-Goog-Expires=604800"
