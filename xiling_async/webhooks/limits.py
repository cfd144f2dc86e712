"""Which senders may call the webhook receiver, and which of their connections stay open. No I/O."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import Final, Generic, TypeVar

from attrs import define, frozen

from xiling_async.models.settings import Network

C = TypeVar("C")

_NETWORK_BITS: Final = {4: 24, 6: 48}  # the least that is announced on the internet by itself


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


def network_of(peer: str | None) -> str:
    """The network of a peer: a /24, in IPv6 a /48; empty where it has no address."""
    address = None if peer is None else _parse_address(peer)
    if address is None:
        return ""
    spare = address.max_prefixlen - _NETWORK_BITS[address.version]
    return str(type(address)(int(address) >> spare << spare))


@define
class _Entry:
    network: str
    is_known: bool = False
    is_busy: bool = False


class ConnectionLimiter(Generic[C]):
    """Which connections are open: at most `most`.

    When there are too many, an idle one makes room: of those that have not brought a callback as long as there are
    any, so that they cannot evict a sender between two callbacks; of these the longest idle of the network that has
    the most.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._entries: dict[C, _Entry] = {}
        self._idle: list[dict[str, dict[C, None]]] = [{}, {}]  # by is_known, by network; the longest idle first

    def __len__(self) -> int:
        return len(self._entries)

    def select(self, *, busy: bool) -> list[C]:
        """The connections that are busy, or those that are idle."""
        return [connection for connection, entry in self._entries.items() if entry.is_busy == busy]

    def add(self, connection: C, peer: str | None) -> tuple[bool, C | None]:
        """Whether it may stay, and which connection has to be closed for it. A new one is idle."""
        evicted: C | None = None
        if len(self._entries) >= self._most:
            networks = self._idle[0] or self._idle[1]
            if not networks:
                return False, None
            largest = max(networks.values(), key=len)
            evicted = next(iter(largest))
            self.remove(evicted)
        self._entries[connection] = entry = _Entry(network_of(peer))
        self._add_idle(connection, entry)
        return True, evicted

    def mark_busy(self, connection: C) -> None:
        """It is serving a callback with a valid token: it is not evicted."""
        entry = self._entries.get(connection)
        if entry is not None and not entry.is_busy:
            self._remove_idle(connection, entry)
            entry.is_busy = True

    def mark_idle(self, connection: C, *, is_known: bool = False) -> None:
        """`is_known`: it has brought a callback that was committed; that is remembered."""
        entry = self._entries.get(connection)
        if entry is None:
            return
        if not entry.is_busy:
            self._remove_idle(connection, entry)
        entry.is_busy = False
        entry.is_known |= is_known
        self._add_idle(connection, entry)

    def remove(self, connection: C) -> None:
        """Also twice."""
        entry = self._entries.pop(connection, None)
        if entry is not None and not entry.is_busy:
            self._remove_idle(connection, entry)

    def _add_idle(self, connection: C, entry: _Entry) -> None:
        self._idle[entry.is_known].setdefault(entry.network, {})[connection] = None

    def _remove_idle(self, connection: C, entry: _Entry) -> None:
        networks = self._idle[entry.is_known]
        del networks[entry.network][connection]
        if not networks[entry.network]:
            del networks[entry.network]
