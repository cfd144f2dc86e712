"""What a file is by its first bytes: never by its name, nor by what a server says of it."""

from __future__ import annotations

from typing import Final

HEAD_BYTES: Final = 64  # as many as are looked at
UNKNOWN: Final = "bin"  # the type of all other bytes
TYPES: Final = ("mp4", "mov", "webm", "mkv", "webp", "jpg", "png", "gif", "bmp", "avif", "heic", "ass", UNKNOWN)

# What begins with these bytes is of this type, which is also the end of its file's name.
_MAGIC: Final = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"[Script Info]", "ass"),
    (b"\xef\xbb\xbf[Script Info]", "ass"),
)
# ISO base media (ISO/IEC 14496-12): the major brand of the box `ftyp`, which comes first; any other is a plain mp4.
_BRANDS: Final = {
    b"qt  ": "mov",
    b"avif": "avif", b"avis": "avif",
    b"heic": "heic", b"heix": "heic", b"mif1": "heic", b"msf1": "heic",
}  # fmt: skip
_EBML: Final = b"\x1a\x45\xdf\xa3"  # Matroska (RFC 9559); `webm` is a DocType of it


def kind_of(head: bytes) -> str | None:
    """The type: mp4, mov, webm, mkv, webp, jpg, png, gif, bmp, avif, heic or ass; None: none of these.

    `head`: the first `HEAD_BYTES` of the file, or all of it if it is shorter.
    """
    for magic, file_type in _MAGIC:
        if head.startswith(magic):
            return file_type
    if head[4:8] == b"ftyp" and len(head) >= 12:
        return _BRANDS.get(head[8:12], "mp4")
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if head.startswith(_EBML):
        return "webm" if b"webm" in head[:HEAD_BYTES] else "mkv"
    if head[:2] == b"BM" and head[6:10] == bytes(4) and len(head) >= 14:  # "BM" alone could begin a text
        return "bmp"
    return None
