"""Which addresses and URLs media may be fetched from."""

from __future__ import annotations

import ipaddress
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from xiling_async.media.ssrf import NotPublic, is_public, media_url, public_socket, reason_refused

PUBLIC = [
    "8.8.8.8", "1.1.1.1", "100.63.255.255", "100.128.0.1", "172.15.255.255", "172.32.0.1", "192.0.1.1",
    "223.255.255.255", "2606:4700::1111", "2a00:1450:4001:80b::200e", "2400:3200::1", "::ffff:8.8.8.8",
    "64:ff9b::8.8.8.8",
]  # fmt: skip
NOT_PUBLIC = [
    "127.0.0.1", "127.255.255.254", "0.0.0.0", "0.1.2.3", "10.0.0.1", "100.64.0.1", "100.100.100.200",
    "169.254.169.254", "172.16.0.1", "172.31.255.255", "192.0.0.192", "192.0.2.1", "192.88.99.1", "192.168.1.1",
    "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255",
    "168.63.129.16",
    "::", "::1", "::127.0.0.1", "::8.8.8.8", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:0:8.8.8.8",
    "64:ff9b::127.0.0.1", "64:ff9b::a00:1", "64:ff9b:1::8.8.8.8", "64:ff9b:1:2::1", "2002:7f00:1::", "2002:808:808::1",
    "2001::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2", "2001:10::1", "2001:20::1", "2001:db8::1", "3fff::1", "3ffe::1",
    "5f00::1", "100::1", "fc00::1", "fd00:ec2::254", "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1", "ff0e::1",
    "2606:4700::1111%1", "::ffff:8.8.8.8%lo", "2606:4700::5efe:10.0.0.1", "2606:4700::200:5efe:127.0.0.1", "4000::1",
]  # fmt: skip


@pytest.mark.parametrize("address", PUBLIC)
def test_addresses_of_the_open_internet_are_public(address: str) -> None:
    """Also those that are written inside of another one, where that is only a way to write them."""
    assert is_public(address)


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_everything_else_is_not(address: str) -> None:
    """Loopback, private and shared ranges, tunnels, documentation, multicast, what no one has assigned, zones."""
    assert not is_public(address)


@pytest.mark.parametrize(
    "text", ["", "localhost", "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "1.2.3", "8.8.8.8/32", "[::1]", "a.b"]
)
def test_what_is_no_literal_address_is_not_public(text: str) -> None:
    """Spellings that only a resolver understands are nothing here; it is asked about what the resolver has made of
    them."""
    assert not is_public(text)


@given(st.ip_addresses(v=4))
def test_an_address_in_another_is_judged_as_itself(address: ipaddress.IPv4Address) -> None:
    """Mapped and NAT64 forms are as public as the address in them; all other forms with one inside never are."""
    public = is_public(str(address))
    assert is_public(f"::ffff:{address}") == is_public(f"64:ff9b::{address}") == public
    assert not is_public(f"::{address}")
    assert not is_public(str(ipaddress.IPv6Address((0x2002 << 112) | int(address) << 80 | 1)))


@given(st.ip_addresses(v=4))
def test_nothing_is_public_here_that_the_standard_library_knows_to_be_private(address: ipaddress.IPv4Address) -> None:
    """The table is at least as strict as `is_global`."""
    if is_public(str(address)):
        assert address.is_global


@given(st.ip_addresses(v=6))
def test_nor_any_of_version_6(address: ipaddress.IPv6Address) -> None:
    """The same for the long addresses."""
    if is_public(str(address)) and address not in ipaddress.IPv6Network("64:ff9b::/96") and not address.ipv4_mapped:
        assert address.is_global


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_no_socket_is_made_for_an_address_that_is_not_public(family: int) -> None:
    """The guard stands where the socket is made: after every look-up, for every spelling."""
    refused = {socket.AF_INET: ("127.0.0.1", 443), socket.AF_INET6: ("::1", 443, 0, 0)}
    allowed = {socket.AF_INET: ("8.8.8.8", 443), socket.AF_INET6: ("2606:4700::1111", 443, 0, 0)}
    with pytest.raises(NotPublic):
        public_socket((family, socket.SOCK_STREAM, 0, "", refused[socket.AddressFamily(family)]))
    with public_socket((family, socket.SOCK_STREAM, 0, "", allowed[socket.AddressFamily(family)])) as made:
        assert (made.family, made.type) == (family, socket.SOCK_STREAM)


def test_all_refusals_say_the_same() -> None:
    """So that aiohttp, which joins differing errors of several addresses into one, keeps their class."""
    assert str(NotPublic()) == str(NotPublic())


@pytest.mark.parametrize(
    "text",
    [
        "https://host/a%2Fb?X-Goog-Signature=0%2b%2F", "https://host:8443/a", "https://[2606:4700::1111]/a",
        "http://127.0.0.1:1/x?y=%zz", "https://host/a?b=c;d='e'",
    ],
)  # fmt: skip
def test_a_url_is_kept_letter_by_letter(text: str) -> None:
    """A signature is over its letters."""
    assert str(media_url(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "https://host/a b", "https://host/a\r\nX: y", "https://host/\0", " https://host/", "https://ho\nst/", "https://",
        "https:///a", "https://host:0/", "https://host:99999/", "https://host:x/", "https://[::1/", "https://host/\u2028",
        "https:host", "http:///127.0.0.1/",
    ],
)  # fmt: skip
def test_what_is_no_url_is_refused(text: str) -> None:
    """White space, control characters, no host, a port that is none."""
    with pytest.raises(ValueError):
        media_url(text)


def test_a_url_in_another_script_is_quoted() -> None:
    """The one thing that is changed: what has no form in HTTP."""
    assert str(media_url("https://host/海.mp4")) == "https://host/%E6%B5%B7.mp4"


@pytest.mark.parametrize(
    ("text", "strict", "private"),
    [
        ("https://storage.example.com/a", None, None),
        ("https://8.8.8.8/a", None, None),
        ("https://127.0.0.1/a", None, None),  # where it leads is seen at the socket
        ("https://[::1]/a", None, None),
        ("https://localhost/a", None, None),
        ("https://2130706433/a", None, None),
        ("http://storage.example.com/a", "plain http", "not to this machine"),
        ("http://8.8.8.8/a", "plain http", "not to this machine"),
        ("http://127.0.0.1:8080/a", "plain http", None),
        ("http://[fd00::1]/a", "plain http", None),
        ("http://localhost/a", "plain http", None),
        ("http://127.1/a", "plain http", "not to this machine"),
        ("http://localhost.example.com/a", "plain http", "not to this machine"),
        ("https://user@host/a", "user or a password", "user or a password"),
        ("https://:secret@host/a", "user or a password", "user or a password"),
        ("ftp://host/a", "not https", "not https"),
        ("file:///etc/passwd", "not https", "not https"),
        ("data:video/mp4,x", "not https", "not https"),
        ("javascript:alert(1)", "not https", "not https"),
        ("//host/a", "not https", "not https"),
        ("/a", "not https", "not https"),
        ("", "not https", "not https"),
        ("HTTPS://HOST/a", None, None),
    ],
)
def test_what_speaks_against_a_url(text: str, strict: str | None, private: str | None) -> None:
    """Https alone; plain http only where the user allows it, and then only to a literal address that is not public."""
    url = media_url(text)
    for expected, allow in ((strict, False), (private, True)):
        found = reason_refused(url, allow_private=allow)
        assert (found is None) == (expected is None), found
        assert (expected or "") in (found or "")


def test_an_objection_shows_no_more_than_its_kind() -> None:
    """No part of the URL: it may be the signed one."""
    said = reason_refused(URL("http://host/a?X-Goog-Signature=0123456789abcdef"), allow_private=False)
    assert said == "it is plain http"
