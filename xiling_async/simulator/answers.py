"""Answers of the service, and how they are put on the socket: whole, by half, not at all, or never."""

import asyncio
import json
from collections.abc import Iterable, Mapping
from typing import Literal

import attrs
from aiohttp import web

from xiling_async.simulator import faults
from xiling_async.simulator.faults import Fault
from xiling_async.simulator.parameters import PARAMETER_ERROR

INVALID_TOKEN = 100002
TASK_NOT_FOUND = 100003


@attrs.frozen
class Answer:
    """What goes back over the connection, and how much of it."""

    status: int | None  # None: nothing
    body: bytes = b""
    headers: Mapping[str, str] = attrs.field(factory=dict)
    ending: Literal["whole", "half", "cut", "hang"] = "whole"
    seconds: float | None = None  # how long it hangs before it is cut


def envelope(
    code: int, msg: str, *, status: int = 200, data: object = None, retry_after: float | str | None = None
) -> Answer:
    """The service's JSON envelope; `data` is left out of errors."""
    content: dict[str, object] = {"code": code, "msg": msg}
    if code == 0:
        content["data"] = data
    headers = {"Content-Type": "application/json"}
    return Answer(status, json.dumps(content).encode(), headers | _retry_after(retry_after))


def upload_envelope(url: str, file_id: str, file_name: str) -> Answer:
    """The other envelope, that of uploads."""
    result = {"url": url, "fileId": file_id, "fileName": file_name}
    return _json({"code": 0, "success": True, "message": {"global": "success"}, "result": result})


def parameter_error(complaint: str, *, status: int = 400) -> Answer:
    return envelope(PARAMETER_ERROR, f"Parameter error: {complaint}", status=status)


def unauthorised() -> Answer:
    return envelope(INVALID_TOKEN, "Invalid token", status=401)


def task_not_found() -> Answer:
    return envelope(TASK_NOT_FOUND, "Task not found", status=404)


def no_such_path(path: str) -> Answer:
    return envelope(404, f"No such path: {path}", status=404)


def storage_error(status: int, retry_after: float | str | None = None) -> Answer:
    """What a storage answers instead of a file: XML, as Google's does."""
    body = f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>Simulated{status}</Code></Error>".encode()
    return Answer(status, body, {"Content-Type": "application/xml; charset=UTF-8"} | _retry_after(retry_after))


def refusal(given: Iterable[Fault]) -> Answer | None:
    """The answer that these faults want for a create that is not accepted; None: they do not refuse it."""
    for fault in given:
        match fault:
            case faults.DropBeforeRead():
                return Answer(None, ending="cut")
            case faults.HangBeforeAccept():
                return Answer(None, ending="hang")
            case faults.RateLimited(retry_after):
                return envelope(429, "Too many requests", status=429, retry_after=retry_after)
            case faults.Redirect(location, code):
                return Answer(code, headers={"Location": location})
            case faults.BusinessError(code, msg, http):
                return envelope(code, msg, status=http)
            case faults.Status(accept=False):
                return _status(fault)
            case faults.Garbage(body, accept=False, content_type=content_type):
                return Answer(200, body, {"Content-Type": content_type})
    return None


def acceptance(given: Iterable[Fault], plain: Answer) -> Answer:
    """The answer to a create that was accepted and charged, or to an upload that was stored; `plain` without faults."""
    for fault in given:
        match fault:
            case faults.DropAfterAccept():
                return Answer(None, ending="cut")
            case faults.DropMidAnswer():
                return attrs.evolve(plain, ending="half")
            case faults.Hang(seconds):
                return Answer(None, ending="hang", seconds=seconds)
            case faults.Status(accept=True):
                return _status(fault)
            case faults.Garbage(body, accept=True, content_type=content_type):
                return Answer(200, body, {"Content-Type": content_type})
            case faults.AnswerData(value):
                return envelope(0, "ok", data=value)
            case faults.UploadAnswer(value):
                return _json(value)
    return plain


def _json(value: object) -> Answer:
    return Answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})


def _status(fault: faults.Status) -> Answer:
    """The error envelope, or the body the fault brings: what gateways write is a page."""
    if fault.body is None:
        code = fault.code if fault.business_code is None else fault.business_code
        return envelope(code, "Simulated status", status=fault.code, retry_after=fault.retry_after)
    looks_json = fault.body.lstrip()[:1] in (b"{", b"[")
    headers = {"Content-Type": "application/json" if looks_json else "text/html"}
    return Answer(fault.code, fault.body, headers | _retry_after(fault.retry_after))


def _retry_after(value: float | str | None) -> dict[str, str]:
    if value is None:
        return {}
    return {"Retry-After": value if isinstance(value, str) else f"{value:.12g}"}


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
    """Cut the connection; what is returned is not sent."""
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
