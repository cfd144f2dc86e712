"""Uploads: pictures taken in by multipart, held against the rules, and served back."""

import asyncio
import hashlib
import random
from collections import deque

import aiohttp
import attrs
from aiohttp import web

from xiling_async.simulator import faults
from xiling_async.simulator.answers import (
    Answer,
    acceptance,
    cut,
    envelope,
    headers_of,
    not_found,
    parameter_error,
    refusal,
    unauthorised,
    upload_envelope,
    write,
)
from xiling_async.simulator.fault import Fault, checked, names
from xiling_async.simulator.ledger import Ledger, UploadRecord
from xiling_async.simulator.parameters import IMAGE_FORMAT, IMAGE_TOO_LARGE

# "At most 20 MB": no page says which megabyte; the larger one.
LIMIT_BYTES = 20 * 1024 * 1024
_PIECE_BYTES = 64 * 1024
_TYPES = {"jpg": "image/jpeg", "png": "image/png", "webp": "image/webp"}
_FAULTS = (
    faults.BusinessError,
    faults.DropAfterAccept,
    faults.DropBeforeRead,
    faults.DropMidAnswer,
    faults.Garbage,
    faults.Hang,
    faults.HangBeforeAccept,
    faults.RateLimited,
    faults.Redirect,
    faults.Status,
    faults.UploadAnswer,
)


@attrs.define
class Part:
    """The part `file`, as far as it was read."""

    complaint: Answer | None = None  # why the body is refused
    filename: str | None = None
    content_type: str | None = None
    content: bytearray = attrs.field(factory=bytearray, repr=False)
    size: int = 0
    sha256: str | None = None


class Uploads:
    """Everything that was uploaded, and the scripts of what comes."""

    def __init__(self, ledger: Ledger, seed: int) -> None:
        self._ledger = ledger
        self._ids = random.Random(f"uploads of {seed}")  # noqa: S311 - ids that can be repeated, no secrets
        self._files: dict[str, bytes] = {}
        self._default: tuple[Fault, ...] = ()
        self._scripts: deque[tuple[Fault, ...]] = deque()
        self._arrived = 0

    def script(self, given: tuple[Fault, ...]) -> None:
        self._scripts.append(checked(given, "uploads", _fits))

    def by_default(self, given: tuple[Fault, ...]) -> None:
        self._default = checked(given, "uploads", _fits)

    def has(self, name: str) -> bool:
        return name in self._files

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """The bytes of an upload, for every client that knows its name."""
        name = request.match_info["name"]
        if name not in self._files:
            return await not_found(request)
        return web.Response(body=self._files[name], content_type=_TYPES[name.rpartition(".")[2]])

    async def take(
        self, request: web.Request, origin: str, stopped: asyncio.Event, *, known: bool
    ) -> web.StreamResponse:
        """One upload, from its first byte to its answer; `known`: it had the key."""
        self._arrived += 1
        given = self._next_script() if known else ()
        record = UploadRecord(
            number=self._arrived,
            declared_length=request.content_length,
            headers=headers_of(request),
            faults=names(given),
        )
        if not known:
            self._ledger.upload(attrs.evolve(record, status=401))
            return await write(request, unauthorised(), stopped)
        if faults.find(given, faults.DropBeforeRead):
            self._ledger.upload(record)
            return cut(request)
        part = Part()
        try:
            await _read(request, part)
        except BaseException:  # the client went away in the middle of it
            self._ledger.upload(_told(record, part))
            raise
        answer, url = self._decide(part, given, origin)
        read = part.size <= LIMIT_BYTES
        self._ledger.upload(attrs.evolve(_told(record, part), read=read, status=answer.status, url=url))
        return await write(request, answer, stopped)

    def _next_script(self) -> tuple[Fault, ...]:
        return self._scripts.popleft() if self._scripts else self._default

    def _decide(self, part: Part, given: tuple[Fault, ...], origin: str) -> tuple[Answer, str | None]:
        """The answer, and where the file is stored if it is."""
        refused = refusal(given) or part.complaint
        if refused is not None:
            return refused, None
        suffix = image_type(part.content)
        if suffix is None:
            return envelope(IMAGE_FORMAT, "Image format must be JPG, PNG or WebP", status=400), None
        file_id = f"{self._ids.getrandbits(128):032x}"
        name = f"{file_id}.{suffix}"
        self._files[name] = bytes(part.content)
        url = f"{origin}/uploads/{name}"
        return acceptance(given, upload_envelope(url, file_id, part.filename or name)), url


def image_type(content: bytes | bytearray) -> str | None:
    """The type of a picture by its first bytes; None: none that is taken."""
    if content[:3] == b"\xff\xd8\xff":
        return "jpg"
    if content[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    return "webp" if content[:4] == b"RIFF" and content[8:12] == b"WEBP" else None


async def _read(request: web.Request, part: Part) -> None:
    """Read a body whose one part is `file`; what is wrong with it becomes the complaint."""
    if request.content_type != "multipart/form-data":
        part.complaint = parameter_error("the body must be multipart/form-data")
        return
    found = 0
    try:
        async for item in await request.multipart():
            if isinstance(item, aiohttp.BodyPartReader) and item.name == "file":
                found += 1
                if not await _read_part(item, part):
                    return
    except (ValueError, RuntimeError) as error:  # what aiohttp makes of malformed bodies
        part.complaint = parameter_error(f"the body is malformed: {error}")
        return
    if found != 1:
        part.complaint = parameter_error("the body must have one part `file`")
    elif not part.size:
        part.complaint = parameter_error("file is empty")


async def _read_part(item: aiohttp.BodyPartReader, part: Part) -> bool:
    """Take the part in, hashed on the way; whether it is small enough. What is beyond the limit is not read."""
    part.filename, part.content_type = item.filename, item.headers.get("Content-Type")
    part.content, part.size = bytearray(), 0
    digest = hashlib.sha256()
    while piece := await item.read_chunk(_PIECE_BYTES):
        digest.update(piece)
        part.content += piece
        part.size += len(piece)
        if part.size > LIMIT_BYTES:
            part.content.clear()
            part.complaint = envelope(IMAGE_TOO_LARGE, "The file is larger than 20 MB", status=413)
            return False
    part.sha256 = digest.hexdigest()
    return True


def _told(record: UploadRecord, part: Part) -> UploadRecord:
    return attrs.evolve(
        record, filename=part.filename, content_type=part.content_type, size=part.size, sha256=part.sha256
    )


def _fits(fault: Fault) -> bool:
    return isinstance(fault, _FAULTS)
