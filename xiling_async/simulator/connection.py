"""Answers put on the socket: whole, by half, not at all, or never."""

import asyncio

from aiohttp import web

from xiling_async.simulator.answers import Answer, no_such_path


async def write(request: web.Request, answer: Answer, stopped: asyncio.Event) -> web.StreamResponse:
    """Write this answer; on return its last byte was handed to the socket.

    One that hangs ends with its time, with the client (the handler is cancelled), or with the service.
    """
    if answer.ending == "hang":
        await pause(stopped, answer.seconds)
    if answer.status is None:
        return cut(request)
    if answer.ending == "half":
        return await _write_half(request, answer, answer.status)
    response = web.Response(status=answer.status, body=answer.body, headers=answer.headers)
    await response.prepare(request)
    await response.write_eof()
    return response


def cut(request: web.Request) -> web.StreamResponse:
    """Cut the connection; what is returned finds nobody to be sent to."""
    request.protocol.force_close()
    return web.Response()


def headers_of(request: web.Request) -> dict[str, str]:
    """The request's headers, their names in lower case."""
    return {name.lower(): value for name, value in request.headers.items()}


async def not_found(request: web.Request) -> web.StreamResponse:
    answer = no_such_path(request.path)
    return web.Response(status=404, body=answer.body, headers=answer.headers)


async def pause(stopped: asyncio.Event, seconds: float | None) -> bool:
    """So many seconds (None: no end), or until the service stops; whether it did."""
    try:
        async with asyncio.timeout(seconds):
            return await stopped.wait()
    except TimeoutError:
        return False


async def _write_half(request: web.Request, answer: Answer, status: int) -> web.StreamResponse:
    """Announce the whole body, send half of it, and hang up."""
    response = web.StreamResponse(status=status, headers=answer.headers)
    response.content_length = len(answer.body)
    await response.prepare(request)
    await response.write(answer.body[: len(answer.body) // 2])
    request.protocol.force_close()
    return response
