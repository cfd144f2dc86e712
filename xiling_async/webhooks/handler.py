"""Who may come in, how much they may bring, and what they are told: the rules of the receiver's door, without I/O."""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from itertools import chain
from typing import Final, Generic, TypeVar

from attrs import asdict, frozen

from xiling_async.errors import ConfigurationError
from xiling_async.models.settings import Network
from xiling_async.webhooks.tokens import Claim

M = TypeVar("M")

HEALTH: Final = "/healthz"
_IPV6_SITE_BITS: Final = 64  # one customer has at least a /64: its addresses are one sender


# --- how much ------------------------------------------------------------------------------------------------------


@frozen(kw_only=True)
class ReceiverLimits:
    """What one receiver takes at most. Seconds, bytes and counts; each above 0.

    The own server's alone:
    `connections`: open at once. Whoever has been idle longest makes room for a new one, first of those that have
    never brought a callback, so idle ones block nobody; only when all are at work is a new one refused. Lowered to
    half the process's file descriptors where those are few. `per_address`: of one public address (of one /64 in
    IPv6). Private and loopback addresses are a proxy's, which speaks for many: they are not counted, nor is anybody
    behind `trusted_proxies`.
    `header_s`: until a request's head is whole, and between two requests (aiohttp has one timer for both), and for
    the TLS handshake. A proxy that keeps connections open needs more than its own idle time, lest a callback meets a
    closing one: nginx and AWS's load balancers have 60 s, so 75.
    `line_bytes`, `field_bytes`, `fields`: of a request's head. The path is ours: some 100 characters.
    `linger_s`: for what a refused sender still sends, at most four times `body_bytes`, so that it reads its refusal.
    `shutdown_s`: for the callbacks under way when the client is left.

    Everywhere: `body_bytes`, and `body_s` from the head to the end of the body.
    """

    # Measured (Python 3.11.7, aiohttp 3.14.5, Linux, 2026-11-23): idle 5 KiB, with the largest head 490 KiB for at
    # most `header_s`, with the largest body 270 KiB: a machine short of memory wants fewer, or smaller heads.
    connections: int = 1_000
    per_address: int = 50  # a guess: 50 callbacks at once from one address are thousands a second
    header_s: float = 10.0  # nginx: 60, Apache: 20 (mod_reqtimeout), gunicorn: 30; aiohttp's own is an hour
    line_bytes: int = 2_048  # aiohttp: 8,190
    field_bytes: int = 4_096  # aiohttp: 8,190
    fields: int = 64  # aiohttp: 128
    body_s: float = 10.0  # aiohttp has none
    body_bytes: int = 256 * 1024  # a documented callback has about 700 bytes
    linger_s: float = 0.5  # aiohttp: 10
    shutdown_s: float = 15.0  # half of the 30 s that Kubernetes gives; aiohttp: 60

    def __attrs_post_init__(self) -> None:
        for name, value in asdict(self).items():
            wanted = (int, float) if name.endswith("_s") else int
            if isinstance(value, bool) or not isinstance(value, wanted) or not 0 < value < float("inf"):
                raise ConfigurationError(f"ReceiverLimits.{name} must be a number above 0, not {value!r}.")


# --- who -----------------------------------------------------------------------------------------------------------


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """An address as a socket or a header names it: `1.2.3.4`, `1.2.3.4:80`, `[::1]:80`, `::ffff:1.2.3.4`."""
    text = text.strip().strip('"')
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        found = ipaddress.ip_address(text)
    except ValueError:
        return None
    return found.ipv4_mapped or found if isinstance(found, ipaddress.IPv6Address) else found


@frozen
class Guests:
    """Which senders may call: those of `networks`, as the outermost of `proxies` trusted proxies saw them.

    Each proxy adds at the right of X-Forwarded-For whom it was called by; what stands further left anybody may have
    written. A list that is too short did not come through those proxies.
    """

    networks: tuple[Network, ...]
    proxies: int

    def admit(self, peer: str | None, forwarded: Sequence[str]) -> bool:
        """`peer`: who holds the connection; `forwarded`: every X-Forwarded-For header, in order."""
        hops = [entry for header in forwarded for entry in header.split(",")] if self.proxies else []
        hops.append(peer or "")
        sender = _address(hops[-self.proxies - 1]) if len(hops) > self.proxies else None
        return sender is not None and any(sender in network for network in self.networks)


def counted_as(peer: str | None) -> str | None:
    """The name under which a peer's connections are counted; None for one that may speak for many."""
    address = None if peer is None else _address(peer)
    if address is None or not address.is_global:
        return None
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    return str(ipaddress.ip_network((int(address), 128)).supernet(new_prefix=_IPV6_SITE_BITS))


class Crowd(Generic[M]):
    """Who is inside: at most `most`, and `per_name` of one name. Who has been idle longest makes room for a newcomer:
    of those who are not known, as long as there are any, so that strangers cannot drive out a sender between two
    callbacks."""

    def __init__(self, most: int, per_name: int) -> None:
        self._most = most
        self._per_name = per_name
        self._names: dict[M, str | None] = {}
        self._idle: tuple[dict[M, None], dict[M, None]] = {}, {}  # strangers, the known; the longest idle first
        self._known: set[M] = set()
        self._counts: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._names)

    @property
    def at_work(self) -> int:
        return len(self._names) - sum(map(len, self._idle))

    def idle(self) -> Iterator[M]:
        return chain(*self._idle)

    def enter(self, member: M, name: str | None) -> tuple[bool, M | None]:
        """Whether there is room, and who has to go for it. A newcomer is idle."""
        gone: M | None = None
        full_of_them = name is not None and self._counts[name] >= self._per_name
        if full_of_them or len(self._names) >= self._most:
            gone = next((one for one in self.idle() if not full_of_them or self._names[one] == name), None)
            if gone is None:
                return False, None
            self.leave(gone)
        self._names[member] = name
        self._idle[0][member] = None
        if name is not None:
            self._counts[name] += 1
        return True, gone

    def busy(self, member: M) -> None:
        self._idle[member in self._known].pop(member, None)

    def rest(self, member: M, *, known: bool = False) -> None:
        """`known`: it has brought something of worth; that is remembered."""
        if member in self._names:
            if known:
                self._known.add(member)
            self._idle[member in self._known][member] = None

    def leave(self, member: M) -> None:
        """Also twice."""
        name = self._names.pop(member, None)
        self.busy(member)
        self._known.discard(member)
        if name is not None:
            self._counts[name] -= 1
            if not self._counts[name]:
                del self._counts[name]


# --- what they are told --------------------------------------------------------------------------------------------


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
BROKEN: Final = _reply(400, "not HTTP", Connection="close")
MALFORMED: Final = _reply(400, "not a callback")
STRANGE: Final = _reply(409, "not a task of this job")
UNAVAILABLE: Final = _reply(503, "try again later", **{"Retry-After": "10"})


@frozen(kw_only=True)
class Desk:
    """What a server asks about each request; `deadline(seconds)` is an `async with` that ends in `TimeoutError`."""

    limits: ReceiverLimits
    guests: Guests | None
    is_open: Callable[[], bool]
    admit: Callable[[str], Claim | Reply]
    take: Callable[[Claim, bytes], Awaitable[Reply]]
    deadline: Callable[[float], AbstractAsyncContextManager[object]]
    note: Callable[[Reply, Claim | None], None] = lambda reply, claim: None  # each callback that is not taken

    def refused(self, reply: Reply, claim: Claim | None = None) -> Reply:
        """This reply, noted."""
        self.note(reply, claim)
        return reply

    def welcome(self, method: str, path: str, sender: Callable[[], tuple[str | None, Sequence[str]]]) -> Claim | Reply:
        """The claim of a request's token, or the answer without one; `sender` gives the arguments of `Guests.admit`."""
        if method != "POST":
            if method in ("GET", "HEAD") and path.endswith(HEALTH):
                return OK if self.is_open() else UNAVAILABLE
            return self.refused(NOT_FOUND)
        if self.guests is not None and not self.guests.admit(*sender()):
            return self.refused(NOT_FOUND)
        admitted = self.admit(path)
        return self.refused(admitted) if isinstance(admitted, Reply) else admitted
