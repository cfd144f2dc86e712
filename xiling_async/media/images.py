"""What a local picture must be before it is sent, and how it is read: checked by its bytes, never by its name."""

from __future__ import annotations

import hashlib
import io
import os
import stat
from pathlib import Path
from typing import Any, Final

from attrs import field, frozen

from xiling_async.media.file_types import HEAD_BYTES, kind_of

# "At most 20 MB" (docs.keevx.com): no page says which megabyte. The larger one: what lies between the two readings is
# for the service to decide, and its no costs nothing; ours would lock out a picture that it may well take.
LIMIT_BYTES: Final = 20 * 1024 * 1024
PIECE_BYTES: Final = 128 * 1024  # one of them is in memory for each upload that runs
MEDIA_TYPES: Final = {"jpg": "image/jpeg", "png": "image/png", "webp": "image/webp"}
ACCEPTED: Final = "a JPG, PNG or WebP file of at most 20 MB"

# O_NONBLOCK: should it have become a FIFO since it was looked at, opening it must not wait for a writer.
_FLAGS: Final = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_KINDS: Final = (
    (stat.S_ISDIR, "is a folder"),
    (stat.S_ISFIFO, "is a FIFO, not a file"),
    (stat.S_ISSOCK, "is a socket, not a file"),
    (stat.S_ISCHR, "is a device, not a file"),
    (stat.S_ISBLK, "is a device, not a file"),
)


class Unfit(Exception):
    """This cannot be sent as a picture; the text is the rule that it breaks."""


@frozen(kw_only=True)
class Picture:
    """A picture as it was when it was checked: its content's size and SHA-256, its type ("jpg", "png", "webp")."""

    source: Path | bytes = field(repr=lambda source: repr(source) if isinstance(source, Path) else "<bytes>")
    size_bytes: int
    sha256: bytes = field(repr=lambda digest: digest.hex()[:12])
    type: str

    def __str__(self) -> str:
        return str(self.source) if isinstance(self.source, Path) else f"a picture of {self.size_bytes} bytes"

    @property
    def file_name(self) -> str:
        """What it is called on the wire: the user's own name for it stays private."""
        return f"image.{self.type}"

    @property
    def media_type(self) -> str:
        return MEDIA_TYPES[self.type]

    def reader(self) -> Reader:
        return Reader(self)


class Reader:
    """Reads a picture once more, piece by piece; each call of `next_piece` blocks.

    Each piece has an `open` of its own: no file is held while the network is slow, and a cancelled caller leaves
    none behind. That all pieces are of the picture that was checked, the digest says, before the last one is given.
    """

    def __init__(self, picture: Picture) -> None:
        self._picture = picture
        self._digest = hashlib.sha256()
        self._offset = 0

    def next_piece(self) -> bytes:
        """The next bytes, b"" at the end. Raises `Unfit` when the file is not what it was."""
        size_bytes, source = self._picture.size_bytes, self._picture.source
        if self._offset == size_bytes:
            return b""
        if isinstance(source, bytes):
            piece = source[self._offset : self._offset + PIECE_BYTES]
        else:
            with _opened(source) as file:
                if os.fstat(file.fileno()).st_size != size_bytes:
                    raise Unfit("it has another size now")
                file.seek(self._offset)
                piece = _read(file, min(PIECE_BYTES, size_bytes - self._offset))
        self._digest.update(piece)
        self._offset += len(piece)
        if not piece or (self._offset == size_bytes and self._digest.digest() != self._picture.sha256):
            raise Unfit("its content is another one now")
        return piece


def inspected(source: Path | bytes) -> Picture:
    """Look at all of it. It blocks. Raises `Unfit` for what the service would not take."""
    if isinstance(source, bytes):
        return _looked_at(source, io.BytesIO(source), len(source))
    with _opened(source) as file:
        return _looked_at(source, file, os.fstat(file.fileno()).st_size)


def _looked_at(source: Path | bytes, file: io.RawIOBase | io.BytesIO, size_bytes: int) -> Picture:
    digest = hashlib.sha256()
    head, seen_bytes = b"", 0
    while size_bytes <= LIMIT_BYTES and (piece := _read(file, PIECE_BYTES)):
        head += piece[: HEAD_BYTES - len(head)]
        digest.update(piece)
        seen_bytes += len(piece)
        size_bytes = max(size_bytes, seen_bytes)  # it may be growing
    if size_bytes > LIMIT_BYTES:
        raise Unfit(f"has {size_bytes} bytes")
    if not seen_bytes:
        raise Unfit("is empty")
    kind = kind_of(head)
    if kind not in MEDIA_TYPES:
        raise Unfit(f"is {'not a picture' if kind is None else kind} by its content")
    return Picture(source=source, size_bytes=seen_bytes, sha256=digest.digest(), type=kind)


def _opened(path: Path) -> io.FileIO:
    try:
        _check_regular(path.stat().st_mode)  # before it is opened: opening can wait, or wake a device
        number = os.open(path, _FLAGS)
    except (OSError, ValueError) as why:  # ValueError: a NUL in it, half a surrogate pair
        raise Unfit(_reason(why)) from None
    try:
        _check_regular(os.fstat(number).st_mode)
    except Unfit:
        os.close(number)
        raise
    return io.FileIO(number, "r")


def _check_regular(mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise Unfit(next((reason for is_kind, reason in _KINDS if is_kind(mode)), "is not a file"))


def _read(file: Any, size_bytes: int) -> bytes:
    try:
        return file.read(size_bytes) or b""
    except OSError as why:
        raise Unfit(_reason(why)) from None


def _reason(why: OSError | ValueError) -> str:
    if isinstance(why, FileNotFoundError):
        return "does not exist"
    return f"cannot be read ({why.strerror})" if isinstance(why, OSError) else "is not a path"
