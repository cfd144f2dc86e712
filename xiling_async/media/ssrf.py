"""Which addresses and URLs media may be fetched from: none of this machine or of a private network, however spelled.

A URL that the service gives was not written by us. What counts is the address that is connected to, so that it is
checked where the socket is made: after every name was looked up, and for every spelling of an address (decimal,
octal, mapped) that a resolver understands.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from typing import Final

from aiohttp import AddrInfoType
from yarl import URL

from xiling_async.models.request import URL_CHARACTERS, has_valid_host

# IANA's special-purpose registries (iana-ipv4-special-registry, iana-ipv6-special-registry), as a table of our own:
# what `is_global` of the standard library says differs between Python's versions, and lets tunnels through.
_NOT_PUBLIC_V4: Final = tuple(
    map(
        ipaddress.IPv4Network,
        (
            "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12",
            "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24",
            "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4",
            "168.63.129.16/32",  # looks public, is the host's own agent inside of Azure
        ),
    )
)  # fmt: skip
_UNICAST_V6: Final = ipaddress.IPv6Network("2000::/3")  # all that is assigned; outside of it nothing is public
_NOT_PUBLIC_V6: Final = tuple(
    map(
        ipaddress.IPv6Network,
        # Protocol assignments with Teredo and ORCHID, documentation, 6to4, 6bone, documentation.
        ("2001::/23", "2001:db8::/32", "2002::/16", "3ffe::/16", "3fff::/20"),
    )
)
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")
_ISATAP: Final = (0x00005EFE, 0x02005EFE)  # the middle of an address that ends in the IPv4 address of a tunnel


def is_public(address: str) -> bool:
    """Whether this literal address is one of the open internet. False for anything that is not an address."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv4Address):
        return not any(parsed in network for network in _NOT_PUBLIC_V4)
    if parsed.scope_id is not None:  # a zone: this machine's own links
        return False
    number = int(parsed)
    embedded = str(ipaddress.IPv4Address(number & 0xFFFFFFFF))
    if parsed.ipv4_mapped is not None or parsed in _NAT64:
        return is_public(embedded)
    if (number >> 32) & 0xFFFFFFFF in _ISATAP and not is_public(embedded):
        return False
    return parsed in _UNICAST_V6 and not any(parsed in network for network in _NOT_PUBLIC_V6)


class NotPublic(OSError):
    """The address that a host's name led to is not public. All say the same, so that aiohttp keeps the class."""

    def __init__(self) -> None:
        super().__init__(errno.EACCES, "the address is not public")


def public_socket(info: AddrInfoType) -> socket.socket:
    """For `TCPConnector(socket_factory=...)`: no socket is made for an address that is not public."""
    family, kind, protocol, _, address = info
    if not is_public(str(address[0])):
        raise NotPublic
    return socket.socket(family, kind, protocol)


def media_url(text: str, base: URL | None = None) -> URL:
    """The URL (relative to `base`, where one is given), letter by letter where possible: a signature is over its
    letters. Raises `ValueError`."""
    if len(text) > URL_CHARACTERS or any(character.isspace() or not character.isprintable() for character in text):
        raise ValueError("the URL is too long, or holds white space or control characters")
    url = URL(text, encoded=text.isascii())
    if base is not None:
        url = URL(str(base.join(URL(text, encoded=True))), encoded=text.isascii())
    if url.scheme in ("http", "https") and not (url.host and url.port and has_valid_host(url)):  # `port` raises, too
        raise ValueError("not a host")
    return url


def reason_refused(url: URL, *, allow_private: bool) -> str | None:
    """What speaks against asking this URL, before anything is looked up; None: nothing so far.

    Where https leads is not looked at here: that is for `public_socket`, which sees it for every spelling.
    """
    if url.user is not None or url.password is not None:
        return "it holds a user or a password"
    if url.scheme == "https":
        return None
    if url.scheme != "http":
        return "it is not https"
    if not allow_private:
        return "it is plain http"
    host = url.host or ""
    if host != "localhost" and (is_public(host) or not _is_literal(host)):
        return "it is plain http, and not to this machine or a private address"
    return None


def _is_literal(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
