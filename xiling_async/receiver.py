"""The door for callbacks: check, read, settle, answer.

The order is the defence: the token first (a wrong one costs one HMAC and is always the same 404), then the size, then
the body under a deadline, then its strict form, then the commit, and only then 200.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, Literal

from aiohttp import StreamReader, web
from attrs import frozen
from yarl import URL

from xiling_async import wire
from xiling_async.capability import Capability, Claim
from xiling_async.clock import Clock
from xiling_async.errors import ConfigurationError, StoreError
from xiling_async.kinds import BY_NUMBER
from xiling_async.lifecycle import Verdict
from xiling_async.settings import callback_base, check_reachable, is_loopback, webhook_secrets
from xiling_async.tasks import Tasks

log = logging.getLogger("xiling_async.receiver")

BODY_BYTES: Final = 256 * 1024  # reliability.md; a documented callback has about 700 bytes
BODY_DEADLINE_S: Final = 10.0
# aiohttp's defaults are not for the internet (reliability.md): a header deadline of an hour, long lingering reads.
_SERVER: Final[dict[str, Any]] = {
    "keepalive_timeout": 10.0,
    "lingering_time": 0.5,
    "max_line_size": 2048,
    "max_field_size": 4096,
    "max_headers": 64,
    "auto_decompress": False,
    "access_log": None,
    "logger": logging.getLogger("xiling_async.receiver.http"),
}
SHUTDOWN_S: Final = 15.0


def _discreet(record: logging.LogRecord) -> bool:
    """aiohttp quotes the request line, with the token in it, and has a traceback for whoever scans ports."""
    error = record.exc_info[1] if record.exc_info else None
    record.msg, record.args = f"{record.getMessage()} ({type(error).__name__})", ()
    record.exc_info = record.exc_text = None
    return True


_SERVER["logger"].addFilter(_discreet)

Settle = Callable[[Claim, wire.Report], Awaitable[Verdict]]
Take = Callable[[Claim, bytes], Awaitable["Reply"]]


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
NOT_FOUND: Final = _reply(404, "not found")  # the one answer to every wrong token, for every reason
TOO_LARGE: Final = _reply(413, "too large", Connection="close")
TOO_SLOW: Final = _reply(408, "too slow", Connection="close")
ENCODED: Final = _reply(415, "send it without Content-Encoding")
MALFORMED: Final = _reply(400, "not a callback")
STRANGE: Final = _reply(409, "not a task of this job")
UNAVAILABLE: Final = _reply(503, "try again later", **{"Retry-After": "10"})

_VERDICTS: Final = {
    Verdict.APPLIED: OK,
    Verdict.REPEAT: OK,
    Verdict.CONFLICT: OK,
    Verdict.STRANGE: STRANGE,
    Verdict.REFUSED: STRANGE,
    Verdict.NO_JOB: UNAVAILABLE,
}


class WebhookReceiver:
    """Takes the service's callbacks for one client.

    `public_url`: the address under which the service reaches this receiver; each job gets one path segment below it.
    `port`: given, the receiver runs its own server on `host`; 0 takes a free port, and without a `public_url` the
    receiver is then reachable on this machine only. Without `port`, mount it: `add_to(app, path)` or `handle(...)`.
    `secret`: of callback URLs, at least 16 bytes; several (newest first) for rotation; else XILING_WEBHOOK_SECRET
    (comma separated); else a random one that the store keeps. `trust="status"`: a callback only wakes the job,
    and a status GET decides.

    Raises `ConfigurationError` when nobody could reach it.
    """

    def __init__(
        self,
        public_url: str | URL | None = None,
        *,
        secret: str | bytes | list[str | bytes] | tuple[str | bytes, ...] | None = None,
        host: str = "127.0.0.1",
        port: int | None = None,
        trust: Literal["callback", "status"] = "callback",
    ) -> None:
        if trust not in ("callback", "status"):
            raise ConfigurationError(f'trust must be "callback" or "status", not {trust!r}.')
        self._given_base = self._base = callback_base(public_url, port)
        self._own_secrets = webhook_secrets(secret)
        self._host = host
        self._port = port
        self.trust = trust
        self._runner: web.ServerRunner | None = None
        self._capability: Capability | None = None
        self._settle: Settle | None = None
        self._clock: Clock | None = None
        self._takes = Tasks()

    def __repr__(self) -> str:
        return f"<WebhookReceiver {self._base or 'not started'}>"

    @property
    def public_url(self) -> str | None:
        """Where the service reaches the receiver; None for `port=0` until it has started."""
        return None if self._base is None else str(self._base)

    def check_reachable_from(self, service: URL) -> None:
        """Raises `ConfigurationError` when the service at this URL could not call the receiver."""
        check_reachable(self._base, service)

    @property
    def port(self) -> int | None:
        """The port of the own server: the real one once it has started."""
        return self._port if self._runner is None else int(self._runner.addresses[0][1])

    async def start(self, settle: Settle, clock: Clock, kept_secret: bytes) -> None:
        """Listen, and hand what is heard to `settle`. The client calls it when it is entered."""
        if self._settle is not None:
            raise ConfigurationError("This receiver serves another client already; give each client its own.")
        if self._port is not None:
            await self._listen(self._port)
        base = str(self._base)
        self._capability = Capability(self._own_secrets or (kept_secret,), base)
        self._settle, self._clock = settle, clock

    async def _listen(self, port: int) -> None:
        self._runner = web.ServerRunner(web.Server(self._serve, **_SERVER), shutdown_timeout=SHUTDOWN_S)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, self._host, port).start()
        except BaseException as error:
            await self._stop_listening()
            if not isinstance(error, OSError):
                raise
            raise ConfigurationError(
                f"The receiver cannot listen on {self._host}:{port}: {error.strerror}. Nothing was sent. "
                "Is another process there? Choose another port."
            ) from error
        if self._base is None:
            host = self._host if is_loopback(self._host) else "127.0.0.1"
            self._base = URL.build(scheme="http", host=host, port=self._runner.addresses[0][1])

    async def stop(self) -> None:
        """Answer what is being answered, then listen no more."""
        await self._stop_listening()
        await self._takes.drain()
        self._settle = self._capability = None
        self._base = self._given_base

    async def _stop_listening(self) -> None:
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    def callback_url(self, *, kind_number: int, tasks: int, job_id: str, attempt: int, expires_at: float) -> str:
        """The address that the callbacks of one POST are to be sent to; it is a secret until the job ends."""
        assert self._capability is not None, "the client starts the receiver before it submits"
        return self._capability.url(
            kind_number=kind_number, tasks=tasks, job_id=job_id, attempt=attempt, expires_at=expires_at
        )

    def add_to(self, app: web.Application, path: str = "/xiling") -> None:
        """Take callbacks in an aiohttp application of your own: POST `path`/<token>. `public_url` must lead there."""
        app.router.add_route("*", f"{path.rstrip('/')}/{{xiling_token}}", self._serve_mounted)

    async def handle(self, path: str, body: bytes) -> Reply:
        """The receiver without a server: for any framework. The last segment of `path` is the token.

        Never raises: what cannot be taken is in the reply's status. Once the body was looked at, what it says is
        written down also when this call is cancelled.
        """
        admitted = self._admit(path)
        if isinstance(admitted, Reply):
            return admitted
        return TOO_LARGE if len(body) > BODY_BYTES else await self._shelter(admitted, body)

    # --- the core: no sockets below this line, but for `_serve` and `_read` --------------------------------------

    def _admit(self, path: str) -> Claim | Reply:
        """The claim of the URL's token, before a byte of the body is read or anything is looked up."""
        if self._capability is None or self._clock is None:
            return UNAVAILABLE
        claim = self._capability.check(path.rpartition("/")[2], self._clock.time())
        return NOT_FOUND if claim is None or claim.kind_number not in BY_NUMBER else claim

    async def _shelter(self, claim: Claim, body: bytes) -> Reply:
        """`_take` for servers that are not ours: they may cancel a handler when the sender hangs up."""
        return await self._takes.outlive(self._take(claim, body), name=f"xiling callback of job {claim.job_id}")

    async def _take(self, claim: Claim, body: bytes) -> Reply:
        try:
            report = wire.callback(BY_NUMBER[claim.kind_number], body)
        except wire.Malformed as malformed:
            log.warning("job %s: a callback is malformed: %s", claim.job_id, malformed)
            return MALFORMED
        if self._settle is None:
            return UNAVAILABLE
        try:
            verdict = await self._settle(claim, report)
        except StoreError:
            log.error("job %s: the store could not write a callback; answered 503", claim.job_id)
            return UNAVAILABLE
        except Exception:
            log.exception("job %s: a callback could not be taken; answered 503", claim.job_id)
            return UNAVAILABLE
        if verdict in (Verdict.STRANGE, Verdict.CONFLICT, Verdict.REFUSED, Verdict.NO_JOB):
            log.warning(
                "job %s attempt %d: callback of task %s: %s",
                claim.job_id,
                claim.attempt,
                report.task_id,
                verdict.value,
            )
        return _VERDICTS[verdict]

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        return _response(await self._answer(request, self._take))

    async def _serve_mounted(self, request: web.BaseRequest) -> web.StreamResponse:
        return _response(await self._answer(request, self._shelter))

    async def _answer(self, request: web.BaseRequest, take: Take) -> Reply:
        admitted = NOT_FOUND if request.method != "POST" else self._admit(request.path)
        if isinstance(admitted, Reply):
            return admitted
        if "Content-Encoding" in request.headers:
            return ENCODED
        if (request.content_length or 0) > BODY_BYTES:
            return TOO_LARGE
        if request.content.is_eof():  # most callbacks arrive in one piece: no deadline is needed for what is here
            body = request.content.read_nowait()
            return TOO_LARGE if len(body) > BODY_BYTES else await take(admitted, body)
        try:
            assert self._clock is not None, "it admitted the token"
            async with self._clock.timeout(BODY_DEADLINE_S):
                whole = await _read(request.content)
        except TimeoutError:
            return TOO_SLOW
        return TOO_LARGE if whole is None else await take(admitted, whole)


def _response(reply: Reply) -> web.Response:
    return web.Response(status=reply.status, headers=reply.headers, body=reply.body)


async def _read(content: StreamReader) -> bytes | None:
    """The body, or None as soon as it is too large (a chunked one does not say so before)."""
    chunks: list[bytes] = []
    size = 0
    async for chunk in content.iter_any():
        size += len(chunk)
        if size > BODY_BYTES:
            return None
        chunks.append(chunk)
    return b"".join(chunks)
