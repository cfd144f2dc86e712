"""The result files: small playable samples, with the headers of the storage that serves the real ones."""

import base64
import functools
import hashlib
from pathlib import Path

import attrs
from aiohttp import web

_TYPES = {"mp4": "video/mp4", "webp": "image/webp"}


@attrs.frozen
class Sample:
    """One file that stands for a result."""

    content: bytes = attrs.field(repr=False)
    content_type: str

    @functools.cached_property
    def headers(self) -> dict[str, str]:
        """The digests in the form of Google's storage: `x-goog-hash`, each in base64."""
        md5 = hashlib.md5(self.content, usedforsecurity=False)
        crc = crc32c(self.content).to_bytes(4, "big")
        return {
            "Content-Type": self.content_type,
            "Accept-Ranges": "bytes",
            "ETag": f'"{md5.hexdigest()}"',
            "x-goog-hash": f"crc32c={_base64(crc)},md5={_base64(md5.digest())}",
        }


def _base64(digest: bytes) -> str:
    return base64.b64encode(digest).decode()


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


def _read(name: str) -> Sample:
    path = Path(__file__).with_name("media") / name
    return Sample(path.read_bytes(), _TYPES[path.suffix[1:]])


# Read at import, so that no request waits for a disk.
_SAMPLES = {name: _read(name) for name in ("landscape.mp4", "landscape.webp", "portrait.mp4", "portrait.webp")}


def sample(suffix: str, *, portrait: bool) -> Sample | None:
    """The file for a result of this type and shape; None: there is no such type."""
    return _SAMPLES.get(f"{'portrait' if portrait else 'landscape'}.{suffix}")


def signed_url(origin: str, name: str) -> str:
    """Where a result can be fetched, with a query that looks signed and lives 7 days."""
    signature = hashlib.sha256(name.encode()).hexdigest()
    return f"{origin}/media/{name}?X-Goog-Signature={signature}&X-Goog-Expires=604800"


def serve(request: web.Request, found: Sample) -> web.Response:
    """The file, or the one range of it that was asked for and (`If-Range`) still means the same file."""
    size = len(found.content)
    if request.headers.get("If-Range", found.headers["ETag"]) != found.headers["ETag"]:
        return web.Response(body=found.content, headers=found.headers)
    try:
        start, stop, _ = request.http_range.indices(size)
    except ValueError:  # malformed, or several ranges: the whole file is a lawful answer
        return web.Response(body=found.content, headers=found.headers)
    if "Range" not in request.headers:
        return web.Response(body=found.content, headers=found.headers)
    if start >= stop:
        return web.Response(status=416, headers={"Content-Range": f"bytes */{size}"})
    headers = found.headers | {"Content-Range": f"bytes {start}-{stop - 1}/{size}"}
    return web.Response(status=206, body=found.content[start:stop], headers=headers)
