"""The response to a callback, in every server. No I/O.

The order is the defence: the token first (a wrong one costs one HMAC and is always the same 404), then the size, then
the body under a deadline, then its strict form, then the commit, and only then 200.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import ClassVar, Final, Protocol

from attrs import define, frozen

from xiling_async._internal.clock import Clock
from xiling_async._internal.tasks import Tasks
from xiling_async.api import wire
from xiling_async.errors import StoreError
from xiling_async.kinds import BY_NUMBER
from xiling_async.models.lifecycle import Verdict
from xiling_async.webhooks.limits import IPAllowlist
from xiling_async.webhooks.options import ReceiverOptions
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


PLAIN_TEXT: Final = {"Content-Type": "text/plain; charset=utf-8", "Cache-Control": "no-store"}
RETRY_LATER: Final = {**PLAIN_TEXT, "Retry-After": "10"}


def _reply(status: int, text: str, headers: Mapping[str, str] = PLAIN_TEXT) -> Reply:
    return Reply(status, headers, text.encode())


OK: Final = _reply(200, "ok")
NOT_FOUND: Final = _reply(404, "not found")  # the one answer to every wrong token, for every reason
TOO_LARGE: Final = _reply(413, "too large")
TOO_SLOW: Final = _reply(408, "too slow")
TOO_MANY: Final = _reply(503, "too many at once", RETRY_LATER)
ENCODED: Final = _reply(415, "send it without Content-Encoding")
BROKEN: Final = _reply(400, "the body broke off")
MALFORMED: Final = _reply(400, "not a callback")
UNKNOWN_TASK: Final = _reply(409, "not a task of this job")
UNAVAILABLE: Final = _reply(503, "try again later", RETRY_LATER)
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


@define(eq=False, repr=False)
class IncomingRequest:
    """A request as its server sees it. Its path holds a secret. The adapters have subclasses that read its body."""

    method: str
    path: str
    peer: str | None
    forwarded: Sequence[str] = ()  # every X-Forwarded-For header, in order
    body: bytes = b""
    content_length: int | None = None
    is_encoded: bool = False  # the body is compressed
    is_complete: bool = True  # the whole body has arrived: `read` does not wait

    may_be_cancelled: ClassVar[bool] = True  # the server may cancel its handlers: the commit needs a task of its own

    async def read(self, limit: int) -> bytes | None:
        """The body, None as soon as it is larger than `limit` bytes. Raises `SenderGone`."""
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

    def __init__(self, options: ReceiverOptions) -> None:
        self.options = options
        networks = options.allowed_networks
        self._allowlist = None if networks is None else IPAllowlist(networks, options.trusted_proxies)
        self.signer: TokenSigner | None = None
        self._callbacks: Callbacks | None = None
        self._clock: Clock | None = None
        self._bodies: Counter[str] = Counter()  # by job id: those that are being read
        self._commits = Tasks()

    @property
    def is_open(self) -> bool:
        return self._callbacks is not None

    def open(self, signer: TokenSigner, callbacks: Callbacks, clock: Clock) -> None:
        self.signer, self._callbacks, self._clock = signer, callbacks, clock

    async def close(self) -> None:
        """Wait for the commits under way, then answer 503."""
        try:
            await self._commits.drain()
        finally:
            self.signer = self._callbacks = None

    async def serve(self, request: IncomingRequest) -> Reply:
        """The answer to this request: `BROKEN` if its sender has hung up. Raises nothing."""
        token = self._authenticate(request)
        if isinstance(token, Reply):
            return token if token is OK else self._refuse(token)
        if request.is_encoded:
            return self._refuse(ENCODED, token)
        body = await self._read(request, token)
        if isinstance(body, Reply):
            return body if body is BROKEN else self._refuse(body, token)
        if request.may_be_cancelled:
            commit = self._take(token, body)
            return await self._commits.run_shielded(commit, name=f"xiling callback of job {token.job_id}")
        return await self._take(token, body)

    def _authenticate(self, request: IncomingRequest) -> CallbackToken | Reply:
        """The token of the request's URL, before a byte of its body is read or anything is looked up."""
        path = request.path
        if request.method != "POST":
            if request.method in ("GET", "HEAD") and path.endswith(HEALTH_PATH):
                return OK if self.is_open else UNAVAILABLE
            return NOT_FOUND
        if self._allowlist is not None and not self._allowlist.allows(request.peer, request.forwarded):
            return NOT_FOUND
        if self.signer is None or self._clock is None:
            return UNAVAILABLE
        token = self.signer.verify(path.rpartition("/")[2], self._clock.time())
        return NOT_FOUND if token is None or token.kind_number not in BY_NUMBER else token

    async def _read(self, request: IncomingRequest, token: CallbackToken) -> bytes | Reply:
        limit = self.options.body_bytes
        if (request.content_length or 0) > limit:
            return TOO_LARGE
        if request.is_complete:  # nearly always: no deadline is needed for what has arrived
            body = await request.read(limit)
            return TOO_LARGE if body is None else body
        if self._bodies[token.job_id] >= self.options.bodies_per_job:
            return TOO_MANY
        assert self._clock is not None, "a request was authenticated"
        self._bodies[token.job_id] += 1
        try:
            async with self._clock.timeout(self.options.body_s):
                body = await request.read(limit)
            return TOO_LARGE if body is None else body
        except TimeoutError:
            return TOO_SLOW
        except SenderGone:
            return BROKEN
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
            job = token.job_id, token.attempt
            log.warning("job %s attempt %d: callback of task %s: %s", *job, report.task_id, verdict.value)
        reply = _OF_VERDICT[verdict]
        return reply if reply is OK else self._refuse(reply, token)

    def _refuse(self, reply: Reply, token: CallbackToken | None = None) -> Reply:
        if self._callbacks is not None:
            self._callbacks.refused(reply.status, None if token is None else token.job_id)
        return reply
