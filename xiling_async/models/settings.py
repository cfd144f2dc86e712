"""The user's settings, from arguments or the environment, checked before anything is sent."""

from __future__ import annotations

import asyncio
import ipaddress
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from attrs import Attribute, field, frozen
from attrs.validators import optional
from yarl import URL

from xiling_async._internal.redact import scrub, shown
from xiling_async.errors import ConfigurationError
from xiling_async.models.request import has_valid_host

DEFAULT_BASE_URL: Final = "https://api.keevx.com/v1"
KEY_VARIABLES: Final = ("XILING_API_KEY", "KEEVX_API_KEY")  # the second: the vendor tells its users to set it
BASE_URL_VARIABLE: Final = "XILING_BASE_URL"
SHORTEST_SECRET_BYTES: Final = 16  # of a webhook secret
MOST_PROXIES: Final = 16  # one or two are usual
SECRET_VARIABLE: Final = "XILING_WEBHOOK_SECRET"  # noqa: S105 - the variable's name

# Those that the client sets itself, and those that speak of the connection and the body (RFC 9110).
_OWN_HEADERS: Final = frozenset({
    "authorization", "connection", "content-encoding", "content-length", "content-type", "expect", "host", "keep-alive",
    "proxy-authorization", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade",
})  # fmt: skip
_HEADER_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")

T = TypeVar("T")
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def _from_environment(*names: str) -> str | None:
    """The first of these variables that is set; a blank one is not."""
    return next((value for name in names if (value := os.environ.get(name, "").strip())), None)


def api_key(value: str | None) -> str:
    if value is not None and not isinstance(value, str):
        raise ConfigurationError(f"api_key must be text, not {type_name(value)}.")
    key = (value or "").strip() or _from_environment(*KEY_VARIABLES)
    if key is None:
        raise ConfigurationError(
            "No API key: pass api_key=..., or set XILING_API_KEY (or KEEVX_API_KEY). Nothing was sent."
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ConfigurationError("The API key (api_key) has characters that HTTP headers do not allow. Is it complete?")
    return key


def base_url(value: str | URL | None) -> URL:
    if value is not None and not isinstance(value, (str, URL)):
        raise ConfigurationError(f"base_url must be text or a yarl.URL, not {type_name(value)}.")
    text = str(value or "").strip() or _from_environment(BASE_URL_VARIABLE) or DEFAULT_BASE_URL
    return _http_url("The base URL", text)


def callback_base(value: str | URL | None, port: int | None) -> URL | None:
    """The public URL of a receiver; None when it is to be derived from its own port: this machine only."""
    if value is not None and not isinstance(value, (str, URL)):
        raise ConfigurationError(f"The receiver's public_url must be text or a yarl.URL, not {type_name(value)}.")
    text = str(value or "").strip()
    if port is not None and not (isinstance(port, int) and not isinstance(port, bool) and 0 <= port <= 65535):
        raise ConfigurationError(f"port must be 0 to 65535, not {port!r}.")
    if text:
        return _http_url("The receiver's public URL", text)
    if port is not None:
        return None
    raise ConfigurationError(
        "The service cannot reach this receiver: give it the public URL under which the service can call it, as in "
        'WebhookReceiver("https://media.example.com/xiling", port=8080). On this machine alone, port=8080 is enough.'
    )


def webhook_secrets(secrets: str | bytes | Sequence[str | bytes] | None) -> tuple[bytes, ...]:
    """The user's secrets of callback URLs, newest first; none: the store keeps one."""
    if secrets is None:
        secrets = [part.strip() for part in (_from_environment(SECRET_VARIABLE) or "").split(",") if part.strip()]
    items: list[Any] = list(secrets) if isinstance(secrets, (list, tuple)) else [secrets]
    if not all(isinstance(item, (str, bytes)) for item in items):  # bytes(20) would be twenty zeros
        raise ConfigurationError("A webhook secret must be text or bytes; for several, pass a list.")
    encoded = tuple(item.encode("utf-8", "surrogatepass") if isinstance(item, str) else item for item in items)
    if any(len(secret) < SHORTEST_SECRET_BYTES for secret in encoded):
        raise ConfigurationError(f"A webhook secret must have at least {SHORTEST_SECRET_BYTES} bytes.")
    return encoded


def networks_of(networks: Sequence[str | Network] | None) -> tuple[Network, ...] | None:
    """The networks that callbacks may come from; None: everybody."""
    if networks is None:
        return None
    if not isinstance(networks, (list, tuple)) or not networks:
        raise ConfigurationError('allowed_networks must be a list such as ("203.0.113.0/24",), and not an empty one.')
    try:
        return tuple(ipaddress.ip_network(network) for network in networks)
    except ValueError as why:
        raise ConfigurationError(f"allowed_networks: {why}.") from None


def proxy_count(count: int) -> int:
    if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= MOST_PROXIES:
        raise ConfigurationError(
            f"trusted_proxies is the number of your proxies before the receiver (0 to {MOST_PROXIES}), not {count!r}."
        )
    return count


def extra_headers(headers: Mapping[str, str] | None) -> dict[str, str]:
    """Headers of the user's own, as a copy. The client's own ones, and those of the connection, are refused."""
    if headers is None:
        return {}
    if not isinstance(headers, Mapping):
        raise ConfigurationError(f'headers must be a mapping such as {{"source": "skill"}}, not {type_name(headers)}.')
    for name, value in headers.items():
        if type(name) is not str or type(value) is not str:
            what = f"{type_name(name)}: {type_name(value)}"
            raise ConfigurationError(f"headers must map text to text, not {what}; each value is not a line of text.")
        if not _HEADER_NAME.fullmatch(name) or not _is_line(value):
            raise ConfigurationError(f"headers: the header {shown(name)} is not a line of text.")
        if name.lower() in _OWN_HEADERS:
            raise ConfigurationError(f"headers may not hold {name}: the client sets it itself.")
    return dict(headers)


def _is_line(value: str) -> bool:
    return all(character == "\t" or (character.isprintable() and character < "\ud800") for character in value)


def folder(value: str | os.PathLike[str] | None) -> Path | None:
    """Where results are kept; it may be missing yet.

    In an event loop the disk is not asked here: it could block. There `Client.open` finds out, in a thread.
    """
    if value is None:
        return None
    path = path_of("save_to", value, "a folder")
    if not _in_event_loop() and path.is_file():
        raise ConfigurationError(f"save_to must be a folder, but {path} is a file.")
    return path


def path_of(name: str, value: object, what: str = "a file") -> Path:
    """A path as the user gave it. Raises `ConfigurationError` for what cannot be one."""
    path = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(path, str):
        raise ConfigurationError(f"{name} must be the path of {what}, not {type_name(value)}.")
    try:
        is_path = bool(path.strip()) and "\0" not in path and bool(os.fsencode(path))
    except UnicodeEncodeError:
        is_path = False
    if not is_path:
        raise ConfigurationError(f"{name} must be the path of {what}, not {path!r}.")
    return Path(path)


def _in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def instance(name: str, value: T, kind: type[object], example: str) -> T:
    """The value, if it is an instance of this class. Raises `ConfigurationError`, which says what to pass."""
    if not isinstance(value, kind) or isinstance(value, type):
        raise ConfigurationError(f"{name} must be {example}, not {type_name(value)}.")
    return value


def type_name(value: object) -> str:
    """What a value of a wrong type is called in an error: never the value, which may be a secret."""
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def check_reachable(receiver_url: URL | None, service: URL) -> None:
    """A receiver on this machine alone is only of use with a service on this machine (the simulator)."""
    if (receiver_url is None or is_loopback(receiver_url.host)) and not is_loopback(service.host):
        raise ConfigurationError(
            f"The service ({service.host}) cannot reach this receiver, which is on this machine only. Give it "
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
    except ValueError:
        url = URL()
    if url.scheme not in ("http", "https") or not url.host or not has_valid_host(url):
        raise ConfigurationError(f"{what} is not an http(s) URL: {scrub(text)!r}.")
    if url.scheme == "http" and not is_loopback(url.host):
        raise ConfigurationError(
            f"{what} is plain http to {url.host}: keys and callback tokens could be read on the network. Use https."
        )
    if url.query_string or url.fragment or url.user or url.password:
        raise ConfigurationError(f"{what} must be just scheme, host and path.")
    return url


def as_number(value: object) -> float | None:
    """The value as a float; None for what is not a number: text, a truth value, NaN, and what no float can hold."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return None if math.isnan(number) else number


def _positive(settings: object, setting: Attribute[Any], value: object, *, most: float = math.inf) -> None:
    number = as_number(value)
    if number is None or not 0 < number <= most:
        raise ConfigurationError(f"{_name(settings, setting)} must be a number above 0, not {_shown(value)}.")


def _finite(settings: object, setting: Attribute[Any], value: object) -> None:
    _positive(settings, setting, value, most=sys.float_info.max)


def _whole(settings: object, setting: Attribute[Any], value: object) -> None:
    if type(value) is not int or not 0 < value <= sys.maxsize:
        raise ConfigurationError(f"{_name(settings, setting)} must be a whole number above 0, not {_shown(value)}.")


def _not_negative(settings: object, setting: Attribute[Any], value: object) -> None:
    if as_number(value) != 0:
        _positive(settings, setting, value)


def _name(settings: object, setting: Attribute[Any]) -> str:
    return f"{type(settings).__name__}.{setting.name}"


def _shown(value: object) -> str:
    return type_name(value) if isinstance(value, type) else shown(value)


@frozen
class Limits:
    """How much at once: `submits` and `downloads` in flight, `submits_per_second`, `gets_per_second` (status GETs).

    For the folder of `save_to`, in bytes: `saved_bytes`, how large all files in it may be together (None: no limit;
    with a limit, results are saved one at a time), and `free_bytes`, how much of its disk stays free.
    """

    submits: int = field(default=64, validator=_whole)
    submits_per_second: float | None = field(default=None, validator=optional(_finite))
    gets_per_second: float = field(default=20, validator=_finite)
    downloads: int = field(default=8, validator=_whole)
    saved_bytes: int | None = field(default=None, validator=optional(_whole))
    free_bytes: int = field(default=64 * 1024**2, validator=_whole)


@frozen
class Timeouts:
    """Seconds. `connect`: until a connection stands (DNS and TLS with it). `answer`: until an answer is read.

    `wait`: how long awaiting a job waits. `uncertain`: how long a submit of unknown fate may be adopted by
    its callback before awaiting it raises `SubmitUncertain`. `stall`: a download that brings fewer than
    1,024 bytes a second for so long is tried again; leaving the client waits so long for files of `save_to`.
    """

    connect: float = field(default=10, validator=_positive)
    answer: float = field(default=60, validator=_positive)
    wait: float = field(default=1800, validator=_positive)
    uncertain: float = field(default=3600, validator=_positive)
    stall: float = field(default=60, validator=_positive)


@frozen
class Polling:
    """Seconds. `every`: between two status GETs of a task (None: the kind's own pace, 30 s for video).

    `grace`: how long the callback is trusted before the first GET (None: ten times `every`). Without a receiver
    nothing is trusted: the first GET comes after `every`.
    """

    every: float | None = field(default=None, validator=optional(_finite))
    grace: float | None = field(default=None, validator=optional(_not_negative))
