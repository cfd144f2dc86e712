"""The door for callbacks: check, read, settle, answer.

The order is the defence: the token first (a wrong one costs one HMAC and is always the same 404), then the size, then
the body under a deadline, then its strict form, then the commit, and only then 200.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from os import PathLike
from pathlib import Path
from typing import Final, Literal

from attrs import evolve
from yarl import URL

from xiling_async._internal.clock import Clock
from xiling_async._internal.tasks import Tasks
from xiling_async.api import wire
from xiling_async.errors import ConfigurationError, StoreError
from xiling_async.kinds import BY_NUMBER
from xiling_async.models.lifecycle import Verdict
from xiling_async.models.settings import (
    Network,
    callback_base,
    check_reachable,
    is_loopback,
    networks_of,
    proxy_count,
    webhook_secrets,
)
from xiling_async.webhooks import hearing
from xiling_async.webhooks.asgi import ASGIApp, application
from xiling_async.webhooks.handler import (
    MALFORMED,
    NOT_FOUND,
    OK,
    STRANGE,
    TOO_LARGE,
    UNAVAILABLE,
    Desk,
    Guests,
    ReceiverLimits,
    Reply,
)
from xiling_async.webhooks.server import CallbackServer
from xiling_async.webhooks.tokens import Capability, Claim

log = logging.getLogger("xiling_async.webhooks.receiver")

Settle = Callable[[Claim, wire.Report], Awaitable[Verdict]]
Refused = Callable[[int, str | None], None]  # the HTTP status, and the id of the job whose token it was

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
    receiver is then reachable on this machine only. `path`: the same on a Unix socket, for a proxy on this machine.
    Without either, mount it: `asgi()`, `add_to(app, path)` or `handle(...)`. A proxy may strip or add a prefix.
    `secret`: of callback URLs, at least 16 bytes; several (newest first) for rotation; else XILING_WEBHOOK_SECRET
    (comma separated); else a random one that the store keeps. `trust="status"`: a callback only wakes the job,
    and a status GET decides. `limits`: what one takes at most. `tls`: of the own server.

    `allowed_networks`: where callbacks may come from, such as ("203.0.113.0/24",); everybody else's are 404.
    `trusted_proxies`: how many proxies of yours a callback passes, each adding to X-Forwarded-For; the sender is who
    the outermost of them saw. Without any, the connection's own peer is. Do not count those that your ASGI server has
    resolved already (uvicorn's `--proxy-headers`). GET /healthz, from anywhere: 200 while the client is open, else 503.

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
        path: str | PathLike[str] | None = None,
        limits: ReceiverLimits | None = None,
        tls: ssl.SSLContext | None = None,
        allowed_networks: Sequence[str | Network] | None = None,
        trusted_proxies: int = 0,
    ) -> None:
        if trust not in ("callback", "status"):
            raise ConfigurationError(f'trust must be "callback" or "status", not {trust!r}.')
        self._given_base = self._base = callback_base(public_url, port)
        self._own_secrets = webhook_secrets(secret)
        self._host = host
        self._port = port
        self._path = None if path is None else Path(path)
        self._tls = tls
        self.trust = trust
        self._check_ways_in()
        networks, self._proxies = networks_of(allowed_networks), proxy_count(trusted_proxies)
        if networks is not None and path is not None and not self._proxies:
            raise ConfigurationError("Behind a Unix socket, allowed_networks needs trusted_proxies: 1 or more.")
        self._desk = Desk(
            limits=limits or ReceiverLimits(),
            guests=None if networks is None else Guests(networks, self._proxies),
            is_open=lambda: self._settle is not None,
            admit=self._admit,
            take=self._take,
            deadline=self._deadline,
            note=self._note,
        )
        self._refused: Refused | None = None
        self._server: CallbackServer | None = None
        self._capability: Capability | None = None
        self._settle: Settle | None = None
        self._clock: Clock | None = None
        self._takes = Tasks()

    def _check_ways_in(self) -> None:
        if self._port is not None and self._path is not None:
            raise ConfigurationError("Give the receiver a port or the path of a Unix socket, not both.")
        if self._tls is not None and not isinstance(self._tls, ssl.SSLContext):
            raise ConfigurationError(f"tls must be an ssl.SSLContext, not {type(self._tls).__name__}.")
        if self._tls is not None and self._port is None:
            raise ConfigurationError("tls is for the receiver's own server: give it a port.")

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
        return self._port if self._server is None or self._port is None else self._server.port

    async def start(self, settle: Settle, clock: Clock, kept_secret: bytes, *, refused: Refused | None = None) -> None:
        """Listen, and hand what is heard to `settle`; `refused` is told of what is not. The client calls it when it is
        entered."""
        if self._settle is not None:
            raise ConfigurationError("This receiver serves another client already; give each client its own.")
        self._clock = clock
        if self._port is not None or self._path is not None:
            await self._listen(clock)
        base = str(self._base)
        self._capability = Capability(self._own_secrets or (kept_secret,), base)
        self._settle, self._refused = settle, refused

    async def _listen(self, clock: Clock) -> None:
        self._server = CallbackServer(
            self._desk, clock, tls=self._tls, counts_addresses=self._path is None and not self._proxies
        )
        try:
            if self._path is not None:
                await self._server.listen_at(self._path)
            else:
                await self._server.listen(self._host, self._port or 0)
        except BaseException as error:
            await self._stop_listening()
            if not isinstance(error, OSError):
                raise
            place = self._path or f"{self._host}:{self._port}"
            raise ConfigurationError(
                f"The receiver cannot listen on {place}: {error.strerror or error}. Nothing was sent. "
                f"Is another process there? Choose another {'path' if self._path else 'port'}."
            ) from error
        if self._base is None:
            host = self._host if is_loopback(self._host) else "127.0.0.1"
            self._base = URL.build(scheme="https" if self._tls else "http", host=host, port=self._server.port)

    async def stop(self) -> None:
        """Answer what is being answered, then listen no more."""
        await self._stop_listening()
        await self._takes.drain()
        self._settle = self._capability = None
        self._base = self._given_base

    async def _stop_listening(self) -> None:
        running, self._server = self._server, None
        if running is not None:
            await running.stop()

    def callback_url(self, *, kind_number: int, tasks: int, job_id: str, attempt: int, expires_at: float) -> str:
        """The address that the callbacks of one POST are to be sent to; it is a secret until the job ends."""
        assert self._capability is not None, "the client starts the receiver before it submits"
        return self._capability.url(
            kind_number=kind_number, tasks=tasks, job_id=job_id, attempt=attempt, expires_at=expires_at
        )

    def job_ids(self, key: str) -> tuple[str, ...]:
        """The id of the job that has this key; then those by secrets that are still accepted and sign no more."""
        assert self._capability is not None, "the client starts the receiver before it submits"
        return self._capability.job_ids(key)

    def add_to(self, app: hearing.Application, path: str = "/xiling") -> None:
        """Take callbacks in an aiohttp application of your own: POST `path`/<token>. `public_url` must lead there."""
        hearing.add_route(app, path, evolve(self._desk, take=self._shelter))

    def asgi(self) -> ASGIApp:
        """An ASGI 3 application, as in FastAPI's `app.mount("/xiling", receiver.asgi())`. `public_url` must lead there.

        Your own lifespan opens the client; until then, and after it, a callback is answered 503.
        """
        return application(evolve(self._desk, take=self._shelter))

    async def handle(
        self, path: str, body: bytes, *, sender: str | None = None, forwarded: Sequence[str] = ()
    ) -> Reply:
        """The receiver without a server: for any framework. The last segment of `path` is the token of a POST.

        `sender`, `forwarded`: the peer's address and the X-Forwarded-For headers, where `allowed_networks` are set.
        Never raises: what cannot be taken is in the reply's status. Once the body was looked at, what it says is
        written down also when this call is cancelled.
        """
        admitted = self._desk.welcome("POST", path, lambda: (sender, forwarded))
        if isinstance(admitted, Reply):
            return admitted
        if len(body) > self._desk.limits.body_bytes:
            return self._desk.refused(TOO_LARGE, admitted)
        return await self._shelter(admitted, body)

    # --- the core: no sockets below this line --------------------------------------------------------------------

    def _deadline(self, seconds: float) -> AbstractAsyncContextManager[object]:
        assert self._clock is not None, "it has admitted somebody"
        return self._clock.timeout(seconds)

    def _admit(self, path: str) -> Claim | Reply:
        """The claim of the URL's token, before a byte of the body is read or anything is looked up."""
        if self._capability is None or self._clock is None:
            return UNAVAILABLE
        claim = self._capability.check(path.rpartition("/")[2], self._clock.time())
        return NOT_FOUND if claim is None or claim.kind_number not in BY_NUMBER else claim

    def _note(self, reply: Reply, claim: Claim | None) -> None:
        if self._refused is not None:
            self._refused(reply.status, None if claim is None else claim.job_id)

    async def _shelter(self, claim: Claim, body: bytes) -> Reply:
        """`_take` for servers that are not ours: they may cancel a handler when the sender hangs up."""
        return await self._takes.outlive(self._take(claim, body), name=f"xiling callback of job {claim.job_id}")

    async def _take(self, claim: Claim, body: bytes) -> Reply:
        try:
            report = wire.callback(BY_NUMBER[claim.kind_number], body)
        except wire.Malformed as malformed:
            log.warning("job %s: a callback is malformed: %s", claim.job_id, malformed)
            return self._desk.refused(MALFORMED, claim)
        if self._settle is None:
            return self._desk.refused(UNAVAILABLE, claim)
        try:
            verdict = await self._settle(claim, report)
        except StoreError:
            log.error("job %s: the store could not write a callback; answered 503", claim.job_id)
            return self._desk.refused(UNAVAILABLE, claim)
        except Exception:
            log.exception("job %s: a callback could not be taken; answered 503", claim.job_id)
            return self._desk.refused(UNAVAILABLE, claim)
        if verdict in (Verdict.STRANGE, Verdict.CONFLICT, Verdict.REFUSED, Verdict.NO_JOB):
            log.warning(
                "job %s attempt %d: callback of task %s: %s",
                claim.job_id,
                claim.attempt,
                report.task_id,
                verdict.value,
            )
        reply = _VERDICTS[verdict]
        return reply if reply is OK else self._desk.refused(reply, claim)
