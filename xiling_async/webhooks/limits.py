"""Limits of the webhook receiver: sizes, deadlines, who may call, and how many connections are open. No I/O."""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Final, Generic, TypeVar

from attrs import asdict, define, frozen

from xiling_async.errors import ConfigurationError
from xiling_async.models.settings import Network

C = TypeVar("C")

_IPV6_SITE_BITS: Final = 64  # one customer has at least a /64: its addresses are one sender
_NETWORK_BITS: Final = {4: 24, 6: 48}  # the least that is announced on the internet by itself


@frozen(kw_only=True)
class ReceiverLimits:
    """What one receiver takes at most. Seconds, bytes and counts; each above 0.

    Of its own server only:
    `connections`: open at once. When all are in use, a new one takes the place of an idle one: first of those that
    have not brought a callback, of these first from the network with the most of them, and there the longest idle.
    Only when none is idle is the new one refused. Lowered to half of the process's file descriptors where those are
    few. `per_address`: of one public address (of one /64 in IPv6). Private and loopback addresses may be a proxy's,
    which speaks for many: they are not counted, nor is any address behind `trusted_proxies`.
    `handshakes`: TLS handshakes under way at once, with the same rule when there are more.
    `header_s`: until the head of a request is complete, and between two requests (aiohttp has one timer for both),
    and for the TLS handshake. A proxy that keeps connections open needs more than its own idle time, so that no
    callback meets a closing connection: nginx and AWS's load balancers have 60 s, so 75.
    `line_bytes`, `field_bytes`, `fields`: of the head of a request. The path is ours: some 100 characters.
    `linger_s`: for the body that a refused sender still sends, at most four times `body_bytes`, so that it can read
    the answer; and for a peer that does not read its answers.
    `shutdown_s`: for the callbacks under way when the client is closed.

    In every form: `body_bytes`, and `body_s` from the head to the end of the body. `bodies_per_job`: callbacks of one
    job whose body has not arrived yet; more are answered 503.
    """

    # Measured (Python 3.11.7, aiohttp 3.14.5, Linux, 2026-11-24): idle 6 KiB, with TLS or in its handshake 310 KiB (a
    # buffer of asyncio's has 256), with the largest head 490 KiB for at most `header_s`, with the largest body 270 KiB
    # more: a machine short of memory wants fewer, or smaller heads.
    connections: int = 1_000
    per_address: int = 50  # 50 callbacks at once from one address are thousands a second
    handshakes: int = 250
    header_s: float = 10.0  # nginx: 60, Apache: 20 (mod_reqtimeout), gunicorn: 30; aiohttp's own is an hour
    line_bytes: int = 2_048  # aiohttp: 8,190
    field_bytes: int = 4_096  # aiohttp: 8,190
    fields: int = 64  # aiohttp: 128
    body_s: float = 10.0  # aiohttp has none
    body_bytes: int = 256 * 1024  # a documented callback has about 700 bytes
    bodies_per_job: int = 8  # a job has at most 4 tasks
    linger_s: float = 0.5  # aiohttp: 10
    shutdown_s: float = 15.0  # half of the 30 s that Kubernetes gives; aiohttp: 60

    def __attrs_post_init__(self) -> None:
        for name, value in asdict(self).items():
            wanted = (int, float) if name.endswith("_s") else int
            if isinstance(value, bool) or not isinstance(value, wanted) or not 0 < value < float("inf"):
                raise ConfigurationError(f"ReceiverLimits.{name} must be a number above 0, not {value!r}.")


# --- who may call --------------------------------------------------------------------------------------------------


def _parse_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """An address as a socket or a header names it: `1.2.3.4`, `1.2.3.4:80`, `[::1]:80`, `::ffff:1.2.3.4`."""
    text = text.strip().strip('"')
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return address.ipv4_mapped or address if isinstance(address, ipaddress.IPv6Address) else address


@frozen
class IPAllowlist:
    """Which senders may call: those of `networks`, as the outermost of `proxies` trusted proxies saw them.

    Each proxy appends to X-Forwarded-For the address that called it; what stands further left can be forged. A list
    that is too short did not come through those proxies.
    """

    networks: tuple[Network, ...]
    proxies: int

    def allows(self, peer: str | None, forwarded: Sequence[str]) -> bool:
        """`peer`: the other end of the connection; `forwarded`: every X-Forwarded-For header, in order."""
        hops = [entry for header in forwarded for entry in header.split(",")] if self.proxies else []
        hops.append(peer or "")
        sender = _parse_address(hops[-self.proxies - 1]) if len(hops) > self.proxies else None
        return sender is not None and any(sender in network for network in self.networks)


# --- how many connections ------------------------------------------------------------------------------------------


def counted_address(peer: str | None) -> str | None:
    """The address under which a peer's connections are counted; None for one that may speak for many."""
    address = None if peer is None else _parse_address(peer)
    if address is None or not address.is_global:
        return None
    return str(address) if address.version == 4 else _network(address, _IPV6_SITE_BITS)


def network_of(peer: str | None) -> str:
    """The network of a peer, for the choice of who makes room: a /24, in IPv6 a /48."""
    address = None if peer is None else _parse_address(peer)
    return "" if address is None else _network(address, _NETWORK_BITS[address.version])


def _network(address: ipaddress.IPv4Address | ipaddress.IPv6Address, bits: int) -> str:
    spare = address.max_prefixlen - bits
    return f"{type(address)(int(address) >> spare << spare)}/{bits}"


class _Pool(Generic[C]):
    """Connections by network, the longest idle first; the most crowded network is found in constant time."""

    def __init__(self) -> None:
        self._members: dict[str, dict[C, None]] = {}
        self._by_size: dict[int, dict[str, None]] = {}
        self._largest = 0

    def add(self, connection: C, network: str) -> None:
        members = self._members.setdefault(network, {})
        members[connection] = None
        self._resized(network, len(members) - 1, len(members))

    def remove(self, connection: C, network: str) -> None:
        members = self._members[network]
        del members[connection]
        self._resized(network, len(members) + 1, len(members))

    def move_to_end(self, connection: C, network: str) -> None:
        members = self._members[network]
        del members[connection]
        members[connection] = None

    def most_crowded_first(self) -> Iterator[C]:
        for size in range(self._largest, 0, -1):
            for network in self._by_size.get(size, ()):
                yield from self._members[network]

    def of_network(self, network: str) -> Iterator[C]:
        return iter(self._members.get(network, ()))

    def _resized(self, network: str, before: int, after: int) -> None:
        if before:
            del self._by_size[before][network]
            if not self._by_size[before]:
                del self._by_size[before]
        if after:
            self._by_size.setdefault(after, {})[network] = None
        else:
            del self._members[network]
        largest = self._largest if self._largest in self._by_size else self._largest - 1
        self._largest = max(after, largest)


@define
class _Entry:
    address: str | None
    network: str
    is_known: bool = False
    is_busy: bool = False


class ConnectionLimiter(Generic[C]):
    """Which connections are open: at most `most`, and at most `per_address` of one public address.

    When there are too many, an idle one makes room: of those that have not brought a callback as long as there are
    any, so that strangers cannot drive out a sender between two callbacks; of these from the most crowded network.
    """

    def __init__(self, most: int, per_address: int) -> None:
        self._most = most
        self._per_address = per_address
        self._entries: dict[C, _Entry] = {}
        self._pools: tuple[_Pool[C], _Pool[C]] = _Pool(), _Pool()  # strangers, known senders
        self._per: Counter[str] = Counter()
        self.busy = 0

    def __len__(self) -> int:
        return len(self._entries)

    def idle(self) -> Iterator[C]:
        return (connection for connection, entry in self._entries.items() if not entry.is_busy)

    def add(self, connection: C, peer: str | None) -> tuple[bool, C | None]:
        """Whether there is room for it, and which connection has to be closed for it. A new one is idle."""
        entry = _Entry(counted_address(peer), network_of(peer))
        address_is_full = entry.address is not None and self._per[entry.address] >= self._per_address
        evicted: C | None = None
        if address_is_full or len(self._entries) >= self._most:
            candidates = self._of_address(entry) if address_is_full else self._in_order_of_eviction()
            evicted = next((one for one in candidates if not self._entries[one].is_busy), None)
            if evicted is None:
                return False, None
            self.remove(evicted)
        self._entries[connection] = entry
        self._pools[0].add(connection, entry.network)
        if entry.address is not None:
            self._per[entry.address] += 1
        return True, evicted

    def mark_busy(self, connection: C) -> None:
        """It is serving a callback with a valid token: it is not evicted."""
        entry = self._entries.get(connection)
        if entry is not None and not entry.is_busy:
            entry.is_busy = True
            self.busy += 1

    def mark_idle(self, connection: C, *, known: bool = False) -> None:
        """`known`: it has brought a callback that was committed; that is remembered."""
        entry = self._entries.get(connection)
        if entry is None:
            return
        if entry.is_busy:
            entry.is_busy = False
            self.busy -= 1
        if known and not entry.is_known:
            self._pools[0].remove(connection, entry.network)
            entry.is_known = True
            self._pools[1].add(connection, entry.network)
        else:
            self._pools[entry.is_known].move_to_end(connection, entry.network)

    def remove(self, connection: C) -> None:
        """Also twice."""
        entry = self._entries.pop(connection, None)
        if entry is None:
            return
        self._pools[entry.is_known].remove(connection, entry.network)
        if entry.is_busy:
            self.busy -= 1
        if entry.address is not None:
            self._per[entry.address] -= 1
            if not self._per[entry.address]:
                del self._per[entry.address]

    def _in_order_of_eviction(self) -> Iterator[C]:
        return chain.from_iterable(pool.most_crowded_first() for pool in self._pools)

    def _of_address(self, entry: _Entry) -> Iterator[C]:
        members = chain.from_iterable(pool.of_network(entry.network) for pool in self._pools)
        return (one for one in members if self._entries[one].address == entry.address)
