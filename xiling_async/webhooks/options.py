"""Options of the webhook receiver: its server, who may call, and the limits of what it takes."""

from __future__ import annotations

import ssl
from os import PathLike
from pathlib import Path
from typing import Any

from attrs import Attribute, field, frozen

from xiling_async.errors import ConfigurationError
from xiling_async.models.settings import Network, as_number, networks_of, path_of, proxy_count, type_name


def _socket_path(path: str | PathLike[str] | None) -> Path | None:
    return None if path is None else path_of("path", path, "a Unix socket")


def _limit(options: ReceiverOptions, limit: Attribute[Any], value: object) -> None:
    number = as_number(value)
    is_allowed = number is not None and 0 < number < float("inf")
    if not is_allowed or not (limit.name.endswith("_s") or isinstance(value, int)):
        raise ConfigurationError(f"ReceiverOptions.{limit.name} must be a number above 0, not {value!r}.")


@frozen(kw_only=True)
class ReceiverOptions:
    """Seconds, bytes and counts. Raises `ConfigurationError`.

    Who may call, in every form: `allowed_networks`: where callbacks may come from, such as ("203.0.113.0/24",); all
    others are answered 404. `trusted_proxies`: how many proxies of yours a callback passes, each adding to
    X-Forwarded-For; the sender is the address that the outermost of them saw. Without any, it is the connection's own
    peer. Do not count those that your ASGI server has resolved already (uvicorn's `--proxy-headers`).

    Limits in every form: `body_bytes`, and `body_s` from the head to the end of the body. `bodies_per_job`: callbacks
    of one job whose body has not arrived yet; more are answered 503. `linger_s`: for the body that a refused sender
    still sends, at most four times `body_bytes`, so that it can read the answer; in the own server also for a peer
    that does not read its answers.

    The own server only: `path`: listen on a Unix socket, for a proxy on this machine, instead of a port. `tls`: its
    certificate. `connections`: open at once, handshakes included. When all are in use, a new one takes the place of an
    idle one: first of those that have not brought a callback, of these first from the network with the most of them,
    and there the longest idle. Only when none is idle is the new one refused. Lowered to half of the process's file
    descriptors where those are few. `header_s`: until the head of a request is complete, and between two requests
    (aiohttp has one timer for both), and for the TLS handshake. A proxy that keeps connections open needs more than its
    own idle time, so that no callback meets a closing connection: nginx and AWS's load balancers have 60 s, so 75.
    `line_bytes`, `field_bytes`, `fields`: of the head of a request. `shutdown_s`: for the callbacks under way when the
    client is closed.
    """

    path: Path | None = field(default=None, converter=_socket_path)
    tls: ssl.SSLContext | None = None
    allowed_networks: tuple[Network, ...] | None = field(default=None, converter=networks_of)
    trusted_proxies: int = field(default=0, converter=proxy_count)

    # Measured (Python 3.11.7, aiohttp 3.14.5, Linux, 2026-11-24): idle 6 KiB, with TLS or in its handshake 310 KiB (a
    # buffer of asyncio's has 256), with the largest head 490 KiB for at most `header_s`, with the largest body 270 KiB
    # more: a machine short of memory wants fewer, or smaller heads.
    connections: int = field(default=1_000, validator=_limit)
    header_s: float = field(default=10.0, validator=_limit)  # nginx: 60, Apache: 20, gunicorn: 30; aiohttp: an hour
    line_bytes: int = field(default=2_048, validator=_limit)  # aiohttp: 8,190; the path is ours: some 100 characters
    field_bytes: int = field(default=4_096, validator=_limit)  # aiohttp: 8,190
    fields: int = field(default=64, validator=_limit)  # aiohttp: 128
    body_s: float = field(default=10.0, validator=_limit)  # aiohttp has none
    body_bytes: int = field(default=256 * 1024, validator=_limit)  # a documented callback has about 700 bytes
    bodies_per_job: int = field(default=8, validator=_limit)  # a job has at most 4 tasks
    linger_s: float = field(default=0.5, validator=_limit)  # aiohttp: 10
    shutdown_s: float = field(default=15.0, validator=_limit)  # half of Kubernetes' 30 s; aiohttp: 60

    def __attrs_post_init__(self) -> None:
        if self.tls is not None and not isinstance(self.tls, ssl.SSLContext):
            raise ConfigurationError(f"tls must be an ssl.SSLContext, not {type_name(self.tls)}.")
        if self.tls is not None and self.path is not None:
            raise ConfigurationError("tls is for a port, not for the path of a Unix socket.")
        if self.path is not None and self.allowed_networks is not None and not self.trusted_proxies:
            raise ConfigurationError("Behind a Unix socket, allowed_networks needs trusted_proxies: 1 or more.")
