"""What a callback is answered, in every server. No I/O.

The order is the defence: the token first (a wrong one costs one HMAC and is always the same 404), then the size, then
the body under a deadline, then its strict form, then the commit, and only then 200.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final, Protocol

from attrs import frozen

from xiling_async._internal.clock import Clock
from xiling_async._internal.tasks import Tasks
from xiling_async.api import wire
from xiling_async.errors import StoreError
from xiling_async.kinds import BY_NUMBER
from xiling_async.models.lifecycle import Verdict
from xiling_async.webhooks.limits import IPAllowlist, ReceiverLimits
from xiling_async.webhooks.tokens import CallbackToken, TokenSigner

log = logging.getLogger("xiling_async.webhooks.receiver")

HEALTH_PATH: Final = "/healthz"


# --- what is answered ----------------------------------------------------------------------------------------------


@frozen
class Reply:
    """What to answer a callback with, for any framework."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def _reply(status: int, text: str, **headers: str) -> Reply:
    fixed = {"Content-Type": "text/plain; charset=utf-8", "Cache-Control": "no-store"}
    return Reply(status, {**fixed, **headers}, text.encode())


OK: Final = _reply(200, "ok")
HEALTHY: Final = _reply(200, "ok")  # not the same object: it does not make a stranger known
NOT_FOUND: Final = _reply(404, "not found")  # the one answer to every wrong token, for every reason
TOO_LARGE: Final = _reply(413, "too large", Connection="close")
TOO_SLOW: Final = _reply(408, "too slow", Connection="close")
TOO_MANY: Final = _reply(503, "too many at once", Connection="close", **{"Retry-After": "10"})
ENCODED: Final = _reply(415, "send it without Content-Encoding")
BROKEN: Final = _reply(400, "the body broke off", Connection="close")
MALFORMED: Final = _reply(400, "not a callback")
UNKNOWN_TASK: Final = _reply(409, "not a task of this job")
UNAVAILABLE: Final = _reply(503, "try again later", **{"Retry-After": "10"})

REPLIES: Final = (
    OK, HEALTHY, NOT_FOUND, TOO_LARGE, TOO_SLOW, TOO_MANY, ENCODED, BROKEN, MALFORMED, UNKNOWN_TASK, UNAVAILABLE,
)  # fmt: skip
_OF_VERDICT: Final = {
    Verdict.APPLIED: OK,
    Verdict.REPEAT: OK,
    Verdict.CONFLICT: OK,
    Verdict.UNKNOWN_TASK: UNKNOWN_TASK,
    Verdict.REFUSED: UNKNOWN_TASK,
    Verdict.NO_JOB: UNAVAILABLE,
}


# --- what is asked -------------------------------------------------------------------------------------------------


class SenderGone(Exception):
    """The sender hung up before its request was complete."""


class IncomingRequest(Protocol):
    """One request, as the server sees it that took it. Each adapter has a class of this form."""

    @property
    def method(self) -> str: ...

    @property
    def path(self) -> str: ...

    @property
    def content_length(self) -> int | None: ...

    @property
    def is_encoded(self) -> bool:
        """The body is compressed."""
        ...

    @property
    def is_complete(self) -> bool:
        """The whole body has arrived: `read` does not wait."""
        ...

    @property
    def may_be_cancelled(self) -> bool:
        """The server cancels its handlers when a sender hangs up; the commit then needs a task of its own."""
        ...

    def sender(self) -> tuple[str | None, Sequence[str]]:
        """The peer's address, and every X-Forwarded-For header, in order."""
        ...

    async def read(self, limit: int) -> bytes | None:
        """The body, None as soon as it is larger than `limit` bytes. Raises `SenderGone`."""
        ...


@frozen
class PlainRequest:
    """A POST whose body has been read."""

    path: str
    body: bytes
    peer: str | None
    forwarded: Sequence[str]

    method = "POST"
    content_length = None
    is_encoded = False
    is_complete = True
    may_be_cancelled = True

    def sender(self) -> tuple[str | None, Sequence[str]]:
        return self.peer, self.forwarded

    async def read(self, limit: int) -> bytes | None:
        return self.body if len(self.body) <= limit else None


# --- the handler ---------------------------------------------------------------------------------------------------


class Callbacks(Protocol):
    """Where callbacks with a valid token go (`jobs.callbacks`)."""

    async def apply(self, token: CallbackToken, report: wire.Report) -> Verdict:
        """Commit what the callback says. Raises `StoreError`."""
        ...

    def refused(self, status: int, job_id: str | None) -> None:
        """A request was answered with this status; `job_id`: if its token was valid."""
        ...


class WebhookHandler:
    """Takes the requests of every server form. Until `open` and after `close` each is answered 503."""

    def __init__(self, limits: ReceiverLimits, allowlist: IPAllowlist | None = None) -> None:
        self.limits = limits
        self._allowlist = allowlist
        self._signer: TokenSigner | None = None
        self._callbacks: Callbacks | None = None
        self._clock: Clock | None = None
        self._bodies: Counter[str] = Counter()  # by job id: those that are being read
        self._commits = Tasks()

    @property
    def is_open(self) -> bool:
        return self._callbacks is not None

    def open(self, signer: TokenSigner, callbacks: Callbacks, clock: Clock) -> None:
        self._signer, self._callbacks, self._clock = signer, callbacks, clock

    async def close(self) -> None:
        """Wait for the commits under way, then answer 503."""
        try:
            await self._commits.drain()
        finally:
            self._signer = self._callbacks = None

    async def serve(self, request: IncomingRequest) -> Reply:
        """The answer to this request. Raises `SenderGone` if the sender has hung up, and nothing else."""
        token = self._authenticate(request)
        if isinstance(token, Reply):
            return token if token is HEALTHY else self._refuse(token)
        if request.is_encoded:
            return self._refuse(ENCODED, token)
        if request.is_complete:  # nearly always: no deadline is needed for what has arrived
            body: bytes | Reply | None = await request.read(self.limits.body_bytes)
        else:
            body = await self._read(request, token)
        if body is None:
            return self._refuse(TOO_LARGE, token)
        if isinstance(body, Reply):
            return self._refuse(body, token)
        if request.may_be_cancelled:
            commit = self._take(token, body)
            return await self._commits.run_shielded(commit, name=f"xiling callback of job {token.job_id}")
        return await self._take(token, body)

    def _authenticate(self, request: IncomingRequest) -> CallbackToken | Reply:
        """The token of the request's URL, before a byte of its body is read or anything is looked up."""
        path = request.path
        if request.method != "POST":
            if request.method in ("GET", "HEAD") and path.endswith(HEALTH_PATH):
                return HEALTHY if self.is_open else UNAVAILABLE
            return NOT_FOUND
        if self._allowlist is not None and not self._allowlist.allows(*request.sender()):
            return NOT_FOUND
        if self._signer is None or self._clock is None:
            return UNAVAILABLE
        token = self._signer.verify(path.rpartition("/")[2], self._clock.time())
        return NOT_FOUND if token is None or token.kind_number not in BY_NUMBER else token

    async def _read(self, request: IncomingRequest, token: CallbackToken) -> bytes | Reply | None:
        """The body as it arrives, None if it is too large."""
        limits = self.limits
        if (request.content_length or 0) > limits.body_bytes:
            return TOO_LARGE
        if self._bodies[token.job_id] >= limits.bodies_per_job:
            return TOO_MANY
        assert self._clock is not None, "a request was authenticated"
        self._bodies[token.job_id] += 1
        try:
            async with self._clock.timeout(limits.body_s):
                return await request.read(limits.body_bytes)
        except TimeoutError:
            return TOO_SLOW
        finally:
            self._bodies[token.job_id] -= 1
            if not self._bodies[token.job_id]:
                del self._bodies[token.job_id]

    async def _take(self, token: CallbackToken, body: bytes) -> Reply:
        try:
            report = wire.callback(BY_NUMBER[token.kind_number], body)
        except wire.Malformed as malformed:
            log.warning("job %s: a callback is malformed: %s", token.job_id, malformed)
            return self._refuse(MALFORMED, token)
        if self._callbacks is None:
            return UNAVAILABLE
        try:
            verdict = await self._callbacks.apply(token, report)
        except StoreError:
            log.error("job %s: the store could not write a callback; answered 503", token.job_id)
            return self._refuse(UNAVAILABLE, token)
        except Exception:
            log.exception("job %s: a callback could not be taken; answered 503", token.job_id)
            return self._refuse(UNAVAILABLE, token)
        if verdict not in (Verdict.APPLIED, Verdict.REPEAT):
            log.warning(
                "job %s attempt %d: callback of task %s: %s",
                token.job_id,
                token.attempt,
                report.task_id,
                verdict.value,
            )
        reply = _OF_VERDICT[verdict]
        return reply if reply is OK else self._refuse(reply, token)

    def _refuse(self, reply: Reply, token: CallbackToken | None = None) -> Reply:
        if self._callbacks is not None:
            self._callbacks.refused(reply.status, None if token is None else token.job_id)
        return reply
