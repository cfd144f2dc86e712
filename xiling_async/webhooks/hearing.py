"""One callback over aiohttp, in our own server or in somebody else's application: read within the limits, answered."""

from __future__ import annotations

from aiohttp import StreamReader, web

from xiling_async.webhooks.handler import BROKEN, ENCODED, TOO_LARGE, TOO_SLOW, Desk, Reply

Application = web.Application


def respond(reply: Reply) -> web.Response:
    return web.Response(status=reply.status, headers=reply.headers, body=reply.body)


def add_route(app: web.Application, path: str, desk: Desk) -> None:
    """Callbacks at `path`/<token> of somebody else's application."""

    async def serve(request: web.Request) -> web.StreamResponse:
        return respond(await answer(request, desk))

    app.router.add_route("*", f"{path.rstrip('/')}/{{xiling_token}}", serve)


async def answer(request: web.BaseRequest, desk: Desk) -> Reply:
    """Token first, then the size, then the body under its deadline; what it says is the desk's to judge."""
    headers, content, limits = request.headers, request.content, desk.limits
    admitted = desk.welcome(
        request.method, request.path, lambda: (request.remote, headers.getall("X-Forwarded-For", ()))
    )
    if isinstance(admitted, Reply):
        return admitted
    if "Content-Encoding" in headers:
        return desk.refused(ENCODED, admitted)
    if "Transfer-Encoding" in headers and headers["Transfer-Encoding"].lower() != "chunked":
        return desk.refused(ENCODED, admitted)  # aiohttp hands out "gzip, chunked" as it came
    if (request.content_length or 0) > limits.body_bytes:
        return desk.refused(TOO_LARGE, admitted)
    if content.is_eof():  # most callbacks arrive in one piece: no deadline is needed for what is here
        body: bytes | None = content.read_nowait()
        if body is not None and len(body) > limits.body_bytes:
            body = None
    else:
        try:
            async with desk.deadline(limits.body_s):
                _tell_to_go_on(request)
                body = await read_body(content, limits.body_bytes)
        except TimeoutError:
            return desk.refused(TOO_SLOW, admitted)
        except (ConnectionError, web.RequestPayloadError):
            return BROKEN  # nobody is there to read it
    return desk.refused(TOO_LARGE, admitted) if body is None else await desk.take(admitted, body)


def _tell_to_go_on(request: web.BaseRequest) -> None:
    """RFC 9110, 10.1.1; an `Application` has done it before it asks its handler."""
    if isinstance(request, web.Request) or request.transport is None:
        return
    if request.headers.get("Expect", "").lower() == "100-continue":
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")


async def read_body(content: StreamReader, most: int) -> bytes | None:
    """The body, or None as soon as it is too large (a chunked one does not say so before)."""
    chunks: list[bytes] = []
    size = 0
    async for chunk in content.iter_any():
        size += len(chunk)
        if size > most:
            return None
        chunks.append(chunk)
    return b"".join(chunks)
