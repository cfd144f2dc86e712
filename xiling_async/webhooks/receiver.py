"""The receiver of callbacks: where it is reached, and the forms in which it serves."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal, NoReturn

from aiohttp import web
from yarl import URL

from xiling_async._internal.clock import Clock
from xiling_async._internal.redact import shown
from xiling_async.errors import ConfigurationError
from xiling_async.models.settings import callback_base, check_reachable, instance, is_loopback, webhook_secrets
from xiling_async.webhooks.aiohttp_adapter import add_route
from xiling_async.webhooks.asgi import ASGIApp, application
from xiling_async.webhooks.handler import Callbacks, IncomingRequest, Reply, WebhookHandler
from xiling_async.webhooks.options import ReceiverOptions
from xiling_async.webhooks.server import CallbackServer
from xiling_async.webhooks.tokens import CallbackToken, TokenSigner

log = logging.getLogger("xiling_async.webhooks.receiver")


class WebhookReceiver:
    """Takes the service's callbacks for one client.

    `public_url`: the address under which the service reaches this receiver; each job gets one path segment below it.
    `port`: given, the receiver runs its own server on `host`; 0 takes a free one. With a port and no `public_url`, it
    is reachable on this machine only. Without a port, mount it: `asgi()`, `add_to(app, path)` or `handle(...)`. A proxy
    may strip or add a prefix. `secret`: of callback URLs, at least 16 bytes; several (newest first) for rotation; else
    XILING_WEBHOOK_SECRET (comma separated); else a random one that the store keeps. `trust="status"`: a callback only
    wakes the job, and a status GET decides. `options`: who may call, limits, TLS, a Unix socket in place of the port.

    GET /healthz, from anywhere: 200 while the client is open, else 503.

    Raises `ConfigurationError` when the service could not reach it.
    """

    def __init__(
        self,
        public_url: str | URL | None = None,
        *,
        secret: str | bytes | list[str | bytes] | tuple[str | bytes, ...] | None = None,
        host: str = "127.0.0.1",
        port: int | None = None,
        trust: Literal["callback", "status"] = "callback",
        options: ReceiverOptions = ReceiverOptions(),  # noqa: B008 - frozen
    ) -> None:
        if trust not in ("callback", "status"):
            raise ConfigurationError(f'trust must be "callback" or "status", not {trust!r}.')
        self._configured_base = self._base = callback_base(public_url, port)
        self._own_secrets = webhook_secrets(secret)
        if not isinstance(host, str) or not host.strip() or not host.isprintable():
            raise ConfigurationError(f"host must be a name or an address, such as 0.0.0.0, not {shown(host)}.")
        self._host = host
        self._port = port
        self.trust = trust
        self._options = instance("options", options, ReceiverOptions, "a ReceiverOptions(...)")
        if port is not None and self._options.path is not None:
            raise ConfigurationError("Give the receiver a port or the path of a Unix socket, not both.")
        if port is None and self._options.tls is not None:
            raise ConfigurationError("tls is for the receiver's own server: give it a port.")
        self._handler = WebhookHandler(self._options)
        self._server: CallbackServer | None = None
        self._has_server = port is not None or self._options.path is not None
        self._can_be_called = self._has_server

    def __reduce__(self) -> NoReturn:
        raise TypeError("A WebhookReceiver cannot be pickled: it holds the secret of its callback URLs.")

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

    async def start(
        self, callbacks: Callbacks, clock: Clock, kept_secret: bytes, *, others_may_listen: bool = False
    ) -> None:
        """Listen, and pass callbacks with a valid token on to `callbacks`. The client calls it when it is opened.

        `others_may_listen`: the store is shared, so another process can take the callbacks of this one.
        """
        if self._handler.is_open:
            raise ConfigurationError("This receiver serves another client already; give each client its own.")
        if self._has_server:
            await self._listen()
        self._can_be_called = self._can_be_called or others_may_listen
        self._handler.open(TokenSigner(self._own_secrets or (kept_secret,), str(self._base)), callbacks, clock)

    async def _listen(self) -> None:
        path = self._options.path
        self._server = CallbackServer(self._handler)
        try:
            if path is not None:
                await self._server.listen_at(path)
            else:
                await self._server.listen(self._host, self._port or 0)
        except BaseException as error:
            await self._stop_listening()
            if not isinstance(error, OSError):
                raise
            place = path or f"{self._host}:{self._port}"
            raise ConfigurationError(
                f"The receiver cannot listen on {place}: {error.strerror or error}. Nothing was sent. "
                f"Is another process there? Choose another {'path' if path else 'port'}."
            ) from error
        if self._base is None:
            this_machine = "::1" if ":" in self._host else "127.0.0.1"
            host = self._host if is_loopback(self._host) else this_machine
            self._base = URL.build(scheme="https" if self._options.tls else "http", host=host, port=self._server.port)

    async def stop(self) -> None:
        """Answer what is being answered, then listen no more."""
        try:
            await self._stop_listening()
        finally:
            self._base = self._configured_base
            await self._handler.close()

    async def _stop_listening(self) -> None:
        running, self._server = self._server, None
        if running is not None:
            await running.stop()

    def callback_url(self, *, kind_number: int, tasks: int, job_id: str, attempt: int, expires_at: float) -> str:
        """The address that the callbacks of one POST are to be sent to; it is a secret until the job ends."""
        assert self._handler.signer is not None, "the client starts the receiver before it submits"
        if not self._can_be_called:
            self._can_be_called = True  # one warning is enough
            log.warning(
                "the receiver gets no callbacks for %s: it has no port and is not mounted. Give it a port, "
                "mount it with asgi() or add_to(), or call handle() for each request. Until then every job is polled.",
                self._base,
            )
        token = CallbackToken(
            kind_number=kind_number, tasks=tasks, job_id=job_id, attempt=attempt, expires_at=expires_at
        )
        return self._handler.signer.sign(token)

    def job_ids(self, key: str) -> tuple[str, ...]:
        """The id of the job that has this key; then those by secrets that are still accepted and sign no more."""
        assert self._handler.signer is not None, "the client starts the receiver before it submits"
        return self._handler.signer.job_ids(key)

    def add_to(self, app: web.Application, path: str = "/xiling") -> None:
        """Take callbacks in an aiohttp application of your own: POST `path`/<token>. `public_url` must lead there."""
        self._can_be_called = True
        add_route(app, path, self._handler)

    def asgi(self) -> ASGIApp:
        """An ASGI 3 application, as in FastAPI's `app.mount("/xiling", receiver.asgi())`. `public_url` must lead there.

        Your own lifespan opens the client; until then, and after it, a callback is answered 503. The server's access
        log shows the whole URL, with the token: see `RedactCallbackTokens`.
        """
        self._can_be_called = True
        return application(self._handler)

    async def handle(
        self, path: str, body: bytes, *, sender: str | None = None, forwarded: Sequence[str] = ()
    ) -> Reply:
        """The receiver without a server: for any framework. The last segment of `path` is the token of a POST.

        `sender`, `forwarded`: the peer's address and the X-Forwarded-For headers, where `allowed_networks` are set.
        Never raises: what cannot be taken is in the reply's status. Once the body was looked at, what it says is
        committed also when this call is cancelled.
        """
        self._can_be_called = True
        return await self._handler.serve(IncomingRequest("POST", path, sender, forwarded, body))
