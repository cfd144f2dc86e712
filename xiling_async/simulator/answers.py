"""Answers of the service, and how they are sent: whole, by half, not at all, or never."""

import asyncio
import json
from collections.abc import Mapping
from typing import Final, Literal

import attrs
from aiohttp import web

from xiling_async.simulator import faults
from xiling_async.simulator.kinds.base import parameter_error
from xiling_async.simulator.scripts import Script

INVALID_TOKEN = 100002
TASK_NOT_FOUND = 100003
# Set when the service stops: whatever hangs or waits ends then.
STOPPED: Final = web.AppKey("stopped", asyncio.Event)


@attrs.frozen
class Answer:
    """What is sent over the connection, and how much of it."""

    status: int | None  # None: nothing
    body: bytes = b""
    headers: Mapping[str, str] = attrs.field(factory=dict)
    ending: Literal["whole", "half", "cut", "hang"] = "whole"
    hang_seconds: float | None = None  # then it is cut; None: no end


CUT = Answer(None, ending="cut")


def envelope(
    code: int, msg: str, *, status: int = 200, data: object = None, retry_after: float | str | None = None
) -> Answer:
    """The service's JSON envelope; errors have no `data`."""
    content: dict[str, object] = {"code": code, "msg": msg}
    if code == 0:
        content["data"] = data
    return _json(content, status, retry_after)


def upload_envelope(url: str, file_id: str, file_name: str) -> Answer:
    """The envelope of uploads, which differs."""
    result = {"url": url, "fileId": file_id, "fileName": file_name}
    return _json({"code": 0, "success": True, "message": {"global": "success"}, "result": result})


def invalid_parameters(message: str, *, status: int = 400) -> Answer:
    problem = parameter_error(message)
    return envelope(problem.code, problem.msg, status=status)


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


def refusal(script: Script) -> Answer | None:
    """The answer to a create or upload that these faults refuse; None: they do not."""
    for fault in script:
        match fault:
            case faults.drop_before_read():
                return CUT
            case faults.hang_before_accept():
                return Answer(None, ending="hang")
            case faults.rate_limited(retry_after):
                return envelope(429, "Too many requests", status=429, retry_after=retry_after)
            case faults.redirect(location, code):
                return Answer(code, headers={"Location": location})
            case faults.business_error(code, msg, http):
                return envelope(code, msg, status=http)
            case faults.status(accept=False):
                return _status(fault)
            case faults.garbage(body, accept=False, content_type=content_type):
                return Answer(200, body, {"Content-Type": content_type})
    return None


def acceptance(script: Script, answer: Answer) -> Answer:
    """The answer to a create that was charged or an upload that was stored; `answer` without faults."""
    for fault in script:
        match fault:
            case faults.drop_after_accept():
                return CUT
            case faults.drop_mid_answer():
                return attrs.evolve(answer, ending="half")
            case faults.hang(seconds):
                return Answer(None, ending="hang", hang_seconds=seconds)
            case faults.status(accept=True):
                return _status(fault)
            case faults.garbage(body, accept=True, content_type=content_type):
                return Answer(200, body, {"Content-Type": content_type})
            case faults.answer_data(value):
                return envelope(0, "ok", data=value)
            case faults.upload_answer(value):
                return _json(value)
    return answer


def _json(content: object, status: int = 200, retry_after: float | str | None = None) -> Answer:
    return Answer(
        status, json.dumps(content).encode(), {"Content-Type": "application/json"} | _retry_after(retry_after)
    )


def _status(fault: faults.status) -> Answer:
    """The error envelope, or the fault's own body: gateways send HTML pages."""
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


async def send(request: web.Request, answer: Answer) -> web.StreamResponse:
    """Send this answer; on return its last byte is in the socket's buffer.

    An answer that hangs ends with its time, with the client (the handler is cancelled), or with the service.
    """
    if answer.ending == "hang":
        await pause(request, answer.hang_seconds)
    if answer.status is None:
        return cut(request)
    response = web.StreamResponse(status=answer.status, headers=answer.headers)
    response.content_length = len(answer.body)
    await response.prepare(request)
    if answer.ending == "half":
        await response.write(answer.body[: len(answer.body) // 2])
        request.protocol.force_close()
        return response
    await response.write_eof(answer.body)
    return response


def cut(request: web.Request) -> web.StreamResponse:
    """Close the connection; the response that is returned is not sent."""
    request.protocol.force_close()
    return web.Response()


async def pause(request: web.Request, seconds: float | None) -> bool:
    """Wait for `seconds` (None: no end) or until the service stops; True if it stopped."""
    try:
        async with asyncio.timeout(seconds):
            return await request.app[STOPPED].wait()
    except TimeoutError:
        return False


def headers_of(request: web.Request) -> dict[str, str]:
    """The request's headers, their names in lower case."""
    return {name.lower(): value for name, value in request.headers.items()}


async def not_found(request: web.Request) -> web.StreamResponse:
    return await send(request, no_such_path(request.path))
