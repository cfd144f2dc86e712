"""Sends result files: whole or cut, slowly or without an end; the ledger is written before the client can know."""

from collections.abc import Mapping
from typing import Literal

import attrs
from aiohttp import web

from xiling_async.simulator.answers import pause
from xiling_async.simulator.ledger import Ledger, MediaRecord
from xiling_async.simulator.media.files import PIECE_BYTES, Content


@attrs.frozen(kw_only=True)
class File:
    """The answer that carries a file, and how much of it is sent."""

    status: int
    headers: Mapping[str, str]
    content: Content
    start: int
    stop: int
    declared: int | None  # Content-Length; None: chunked
    ending: Literal["whole", "cut", "stall"] = "whole"
    after_bytes: int = 0  # of the body, where it is cut or stalls
    piece_bytes: int = PIECE_BYTES
    pause_seconds: float = 0.0  # between pieces

    @property
    def size(self) -> int:
        """Bytes of the body."""
        return self.stop - self.start

    @property
    def sent(self) -> int:
        """Bytes of the body that are sent if the client stays."""
        return self.size if self.ending == "whole" else min(self.size, self.after_bytes)


class MediaEntry:
    """The ledger entry of one request, written once: as soon as the number of bytes is known."""

    def __init__(self, ledger: Ledger, record: MediaRecord) -> None:
        self.ledger = ledger
        self._record: MediaRecord | None = record

    def write(self, sent: int) -> None:
        if self._record is not None:
            self.ledger.media_request(attrs.evolve(self._record, sent=sent))
            self._record = None


async def deliver(request: web.Request, file: File, entry: MediaEntry) -> web.StreamResponse:
    """Send this file; one that stalls ends with the client (the handler is cancelled) or with the service."""
    response = web.StreamResponse(status=file.status, headers=file.headers)
    response.content_length = file.declared
    if request.method == "HEAD":
        entry.write(0)
        return response
    visible = file.sent if file.declared is None else min(file.sent, file.declared)
    if not visible:
        entry.write(file.sent)
    sent = 0
    try:
        await response.prepare(request)
        for piece in file.content.pieces(file.start, file.start + file.sent, file.piece_bytes):
            if sent and file.pause_seconds and await pause(request, file.pause_seconds):
                request.protocol.force_close()
                return response
            sent += len(piece)
            if sent >= visible:  # after this piece the client may have all that it waits for
                entry.write(file.sent)
            await response.write(piece)
    finally:
        entry.write(sent)
    await _end(request, file, entry.ledger)
    return response


async def _end(request: web.Request, file: File, ledger: Ledger) -> None:
    """End the body: properly, with bytes beyond the declared length, by stalling, or by closing the connection."""
    declared = file.size if file.declared is None else file.declared
    if file.sent == file.size == declared:
        return
    if declared < file.sent and request.transport is not None:
        # aiohttp ends the body at its declared length: the rest bypasses the response.
        request.transport.write(b"".join(file.content.pieces(file.start + declared, file.start + file.sent)))
    if file.ending == "stall" and file.sent < file.size:
        ledger.stalled()
        await pause(request, None)
    request.protocol.force_close()
