"""Files put on the socket: whole or cut, slowly or never to the end; the ledger hears of it before the client does."""

import asyncio
from collections.abc import Mapping
from typing import Literal

import attrs
from aiohttp import web

from xiling_async.simulator.answers import pause
from xiling_async.simulator.ledger import Ledger, MediaRecord
from xiling_async.simulator.media.files import PIECE_BYTES, Content


@attrs.frozen(kw_only=True)
class File:
    """The answer that carries a file, and how much of it is delivered."""

    status: int
    headers: Mapping[str, str]
    content: Content
    start: int
    stop: int
    declared: int | None  # Content-Length; None: chunked
    ending: Literal["whole", "cut", "stall"] = "whole"
    after_bytes: int = 0  # of the body, where it is cut or stalls
    most: int = PIECE_BYTES  # bytes at a time
    seconds: float = 0.0  # between them

    @property
    def size(self) -> int:
        """Bytes of the body."""
        return self.stop - self.start

    @property
    def sent(self) -> int:
        """Bytes of the body that are sent if the client stays."""
        return self.size if self.ending == "whole" else min(self.size, self.after_bytes)


class Note:
    """The record of one request for a file, written down once: as soon as it is known how much is sent."""

    def __init__(self, ledger: Ledger, record: MediaRecord) -> None:
        self._ledger = ledger
        self._record: MediaRecord | None = record

    def sent(self, size: int) -> None:
        if self._record is not None:
            self._ledger.media_request(attrs.evolve(self._record, sent=size))
            self._record = None

    def stalled(self) -> None:
        self._ledger.stalled()


async def deliver(request: web.Request, file: File, note: Note, stopped: asyncio.Event) -> web.StreamResponse:
    """Send this file; one that stalls ends with the client (the handler is cancelled), or with the service."""
    response = web.StreamResponse(status=file.status, headers=file.headers)
    response.content_length = file.declared
    if request.method == "HEAD":
        note.sent(0)
        return response
    visible = file.sent if file.declared is None else min(file.sent, file.declared)
    if not visible:
        note.sent(file.sent)
    sent = 0
    try:
        await response.prepare(request)
        for piece in file.content.pieces(file.start, file.start + file.sent, file.most):
            if sent and file.seconds and await pause(stopped, file.seconds):
                request.protocol.force_close()
                return response
            sent += len(piece)
            if sent >= visible:  # with this piece the client may have all that it waits for
                note.sent(file.sent)
            await response.write(piece)
    finally:
        note.sent(sent)
    await _end(request, response, file, note, stopped)
    return response


async def _end(
    request: web.Request, response: web.StreamResponse, file: File, note: Note, stopped: asyncio.Event
) -> None:
    """What follows the last byte: nothing, more than was declared, silence, the end of the connection."""
    declared = file.size if file.declared is None else file.declared
    if file.sent == file.size == declared:
        return
    if declared < file.sent and request.transport is not None:
        # The response ends where it said it would; what is beyond that goes around it.
        request.transport.write(b"".join(file.content.pieces(file.start + declared, file.start + file.sent)))
    if file.ending == "stall" and file.sent < file.size:
        note.stalled()
        await pause(stopped, None)
    request.protocol.force_close()
