"""The upload endpoint: images received as multipart, checked and stored."""

import hashlib
import random

import aiohttp
import attrs
from aiohttp import web

from xiling_async.simulator import answers, faults
from xiling_async.simulator.answers import Answer
from xiling_async.simulator.kinds.base import IMAGE_FORMAT, IMAGE_TOO_LARGE
from xiling_async.simulator.ledger import Ledger, UploadRecord
from xiling_async.simulator.media.storage import Storage
from xiling_async.simulator.scripts import Script, Scripts, find, names

# The page says "at most 20 MB" without defining MB; this is the larger reading.
LIMIT_BYTES = 20 * 1024 * 1024
_PIECE_BYTES = 64 * 1024
_TYPES = {"jpg": "image/jpeg", "png": "image/png", "webp": "image/webp"}


@attrs.define
class Part:
    """The part `file`, as far as it was read."""

    error: Answer | None = None  # why the body is refused
    filename: str | None = None
    content_type: str | None = None
    content: bytearray = attrs.field(factory=bytearray, repr=False)
    size: int = 0
    sha256: str | None = None

    def recorded(self, record: UploadRecord) -> UploadRecord:
        return attrs.evolve(
            record, filename=self.filename, content_type=self.content_type, size=self.size, sha256=self.sha256
        )


class Uploads:
    """The handlers of uploads."""

    def __init__(self, ledger: Ledger, storage: Storage, seed: int) -> None:
        self.scripts = Scripts("uploads")
        self._ledger = ledger
        self._storage = storage
        self._ids = random.Random(f"uploads of {seed}")  # noqa: S311 - reproducible ids, not secrets
        self._arrived = 0

    async def download(self, request: web.Request) -> web.StreamResponse:
        """GET of an upload; needs no key."""
        name = request.match_info["name"]
        content = self._storage.uploads.get(name)
        if content is None:
            return await answers.not_found(request)
        return web.Response(body=content, content_type=_TYPES[name.rpartition(".")[2]])

    async def upload(self, request: web.Request, *, authorised: bool) -> web.StreamResponse:
        """POST of an upload."""
        self._arrived += 1
        script = self.scripts.next() if authorised else ()
        record = UploadRecord(
            number=self._arrived,
            declared_length=request.content_length,
            headers=answers.headers_of(request),
            faults=names(script),
        )
        if not authorised:
            self._ledger.upload(attrs.evolve(record, status=401))
            return await answers.send(request, answers.unauthorised())
        if find(script, faults.drop_before_read):
            self._ledger.upload(record)
            return answers.cut(request)
        part = Part()
        try:
            await _read(request, part)
        except BaseException:  # the client disconnected in the middle of the body
            self._ledger.upload(part.recorded(record))
            raise
        answer, url = self._decide(part, script)
        read = part.size <= LIMIT_BYTES
        self._ledger.upload(attrs.evolve(part.recorded(record), read=read, status=answer.status, url=url))
        return await answers.send(request, answer)

    def _decide(self, part: Part, script: Script) -> tuple[Answer, str | None]:
        """The answer, and the URL if the file is stored."""
        refused = answers.refusal(script) or part.error
        if refused is not None:
            return refused, None
        suffix = image_type(part.content)
        if suffix is None:
            return answers.envelope(IMAGE_FORMAT, "Image format must be JPG, PNG or WebP", status=400), None
        file_id = f"{self._ids.getrandbits(128):032x}"
        name = f"{file_id}.{suffix}"
        self._storage.uploads[name] = bytes(part.content)
        url = f"{self._storage.origin}/uploads/{name}"
        return answers.acceptance(script, answers.upload_envelope(url, file_id, part.filename or name)), url


def image_type(content: bytes | bytearray) -> str | None:
    """The image type by its first bytes; None: not accepted."""
    if content[:3] == b"\xff\xd8\xff":
        return "jpg"
    if content[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    return "webp" if content[:4] == b"RIFF" and content[8:12] == b"WEBP" else None


async def _read(request: web.Request, part: Part) -> None:
    """Read a body with the one part `file`; a problem is stored in `part.error`."""
    if request.content_type != "multipart/form-data":
        part.error = answers.invalid_parameters("the body must be multipart/form-data")
        return
    file_parts = 0
    try:
        async for item in await request.multipart():
            if isinstance(item, aiohttp.BodyPartReader) and item.name == "file":
                file_parts += 1
                if not await _read_part(item, part):
                    return
    except (ValueError, RuntimeError) as error:  # raised by aiohttp for malformed bodies
        part.error = answers.invalid_parameters(f"the body is malformed: {error}")
        return
    if file_parts != 1:
        part.error = answers.invalid_parameters("the body must have one part `file`")
    elif not part.size:
        part.error = answers.invalid_parameters("file is empty")


async def _read_part(item: aiohttp.BodyPartReader, part: Part) -> bool:
    """Read the part and hash it; False if it is too large. Nothing beyond the limit is read."""
    part.filename, part.content_type = item.filename, item.headers.get("Content-Type")
    part.content, part.size = bytearray(), 0
    digest = hashlib.sha256()
    while piece := await item.read_chunk(_PIECE_BYTES):
        digest.update(piece)
        part.content += piece
        part.size += len(piece)
        if part.size > LIMIT_BYTES:
            part.content.clear()
            part.error = answers.envelope(IMAGE_TOO_LARGE, "The file is larger than 20 MB", status=413)
            return False
    part.sha256 = digest.hexdigest()
    return True
