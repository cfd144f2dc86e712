"""What the user says, by argument or by environment, checked before anything is sent."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping, Sequence
from typing import Final, cast

from attrs import AttrsInstance, fields, frozen
from yarl import URL

from xiling_async._internal.redact import scrub
from xiling_async.errors import ConfigurationError
from xiling_async.models.request import has_valid_host

DEFAULT_BASE_URL: Final = "https://api.keevx.com/v1"
KEY_VARIABLES: Final = (
    "XILING_API_KEY",
    "KEEVX_API_KEY",
)  # the second is the one the vendor tells its users to set
BASE_URL_VARIABLE: Final = "XILING_BASE_URL"
SHORTEST_SECRET_BYTES: Final = 16  # of a webhook secret
MOST_PROXIES: Final = 16  # one or two are usual
SECRET_VARIABLE: Final = "XILING_WEBHOOK_SECRET"  # noqa: S105 - the variable's name

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def _from_environment(*names: str) -> str | None:
    """The first of these variables that is set; a blank one is not."""
    return next((value for name in names if (value := os.environ.get(name, "").strip())), None)


def api_key(given: str | None) -> str:
    key = (given or "").strip() or _from_environment(*KEY_VARIABLES)
    if key is None:
        raise ConfigurationError(
            "No API key: pass api_key=..., or set XILING_API_KEY (or KEEVX_API_KEY). Nothing was sent."
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ConfigurationError("The API key holds characters that no HTTP header may hold. Was it copied whole?")
    return key


def base_url(given: str | URL | None) -> URL:
    text = str(given or "").strip() or _from_environment(BASE_URL_VARIABLE) or DEFAULT_BASE_URL
    url = _http_url("The base URL", text)
    if url.query_string or url.fragment or url.user or url.password:
        raise ConfigurationError("The base URL must be just scheme, host and path: the key goes into a header.")
    return url


def callback_base(given: str | URL | None, port: int | None) -> URL | None:
    """The public URL of a receiver; None when it is to be derived from its own free port."""
    text = str(given or "").strip()
    if port is not None and not (isinstance(port, int) and not isinstance(port, bool) and 0 <= port <= 65535):
        raise ConfigurationError(f"port must be 0 to 65535, not {port!r}.")
    if text:
        url = _http_url("The receiver's public URL", text)
        if url.query_string or url.fragment or url.user or url.password:
            raise ConfigurationError("The receiver's public URL must be just scheme, host and path.")
        return url
    if port == 0:
        return None
    raise ConfigurationError(
        "Nobody could reach this receiver: give it the public URL under which the service can call it, as in "
        'WebhookReceiver("https://media.example.com/xiling", port=8080). On this machine alone, port=0 is enough.'
    )


def webhook_secrets(given: str | bytes | Sequence[str | bytes] | None) -> tuple[bytes, ...]:
    """The user's secrets of callback URLs, newest first; none: the store keeps one."""
    if given is None:
        given = [part.strip() for part in (_from_environment(SECRET_VARIABLE) or "").split(",") if part.strip()]
    items = [given] if isinstance(given, (str, bytes)) else list(given)
    if not all(isinstance(item, (str, bytes)) for item in items):  # bytes(20) would be twenty zeros
        raise ConfigurationError("A webhook secret must be text or bytes.")
    found = tuple(item.encode() if isinstance(item, str) else item for item in items)
    if any(len(secret) < SHORTEST_SECRET_BYTES for secret in found):
        raise ConfigurationError(f"A webhook secret must have at least {SHORTEST_SECRET_BYTES} bytes.")
    return found


def networks_of(given: Sequence[str | Network] | None) -> tuple[Network, ...] | None:
    """The networks that callbacks may come from; None: everybody."""
    if given is None:
        return None
    if isinstance(given, str) or not given:
        raise ConfigurationError('allowed_networks must be a list such as ("203.0.113.0/24",), and not an empty one.')
    try:
        return tuple(ipaddress.ip_network(network) for network in given)
    except ValueError as why:
        raise ConfigurationError(f"allowed_networks: {why}.") from None


def proxy_count(given: int) -> int:
    if not isinstance(given, int) or isinstance(given, bool) or not 0 <= given <= MOST_PROXIES:
        raise ConfigurationError(
            f"trusted_proxies is the number of your proxies before the receiver (0 to {MOST_PROXIES}), not {given!r}."
        )
    return given


def extra_headers(given: Mapping[str, str] | None) -> dict[str, str]:
    found = dict(given or {})
    for name, value in found.items():
        if name.lower() in ("authorization", "content-type", "content-length", "host"):
            raise ConfigurationError(f"headers may not hold {name}: the client sets it itself.")
        if not isinstance(value, str) or any(character in f"{name}{value}" for character in "\r\n\0"):
            raise ConfigurationError(f"The header {name!r} is not a line of text.")
    return found


def check_reachable(receiver_url: URL | None, service: URL) -> None:
    """A receiver on this machine alone is only of use with a service on this machine (the simulator)."""
    if (receiver_url is None or is_loopback(receiver_url.host)) and not is_loopback(service.host):
        raise ConfigurationError(
            f"Nobody could reach this receiver: it is on this machine alone, the service is {service.host}. Give it "
            "the public URL under which the service can call it."
        )


def is_loopback(host: str | None) -> bool:
    if host is None or host == "localhost":
        return host is not None
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _http_url(what: str, text: str) -> URL:
    try:
        url = URL(text)
        fine = url.scheme in ("http", "https") and bool(url.host) and has_valid_host(url)
    except ValueError:
        fine = False
    if not fine:
        raise ConfigurationError(f"{what} is no http(s) URL: {scrub(text)!r}.")
    if url.scheme == "http" and not is_loopback(url.host):
        raise ConfigurationError(
            f"{what} is plain http to {url.host}: keys and callback tokens would cross the network readable. Use https."
        )
    return url


def _positive(what: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ConfigurationError(f"{what} must be a number above 0, not {value!r}.")


class _Checked:
    """Settings whose every number is above 0 (or None where that is allowed)."""

    __slots__ = ()

    def __attrs_post_init__(self) -> None:
        for setting in fields(cast("type[AttrsInstance]", type(self))):
            value = getattr(self, setting.name)
            if value is not None or setting.default is not None:
                _positive(f"{type(self).__name__}.{setting.name}", value)


@frozen
class Limits(_Checked):
    """How much at once: `submits` and `downloads` in flight, `submits_per_second`, `gets_per_second` (status GETs).

    For the folder of `save_to`, in bytes: `saved_bytes`, how large all files in it may be together (None: no limit;
    with a limit, results are saved one at a time), and `free_bytes`, how much of its disk stays free.
    """

    submits: int = 64
    submits_per_second: float | None = None
    gets_per_second: float = 20
    downloads: int = 8
    saved_bytes: int | None = None
    free_bytes: int = 64 * 1024**2


@frozen
class Timeouts(_Checked):
    """Seconds. `connect`: until a connection stands (DNS and TLS with it). `answer`: until an answer is read.

    `wait`: how long awaiting a job waits. `uncertain`: how long a submit of unknown fate may be adopted by
    its callback before awaiting it raises `SubmitUncertain`. `stall`: a download without a byte.
    """

    connect: float = 10
    answer: float = 60
    wait: float = 1800
    uncertain: float = 3600
    stall: float = 60


@frozen
class Polling:
    """Seconds. `every`: between two status GETs of a task (None: the kind's own pace, 30 s for video).

    `grace`: how long the callback is trusted before the first GET (None: ten times `every`). Without a receiver
    nothing is trusted: the first GET comes after `every`.
    """

    every: float | None = None
    grace: float | None = None

    def __attrs_post_init__(self) -> None:
        if self.every is not None:
            _positive("Polling.every", self.every)
        if self.grace is not None and self.grace != 0:
            _positive("Polling.grace", self.grace)
