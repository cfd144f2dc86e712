"""The receiver's limits by themselves: which connections are open, and who may call."""

from __future__ import annotations

from collections import Counter

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xiling_async import ConfigurationError, ReceiverOptions
from xiling_async.models.settings import networks_of
from xiling_async.webhooks.limits import ConnectionLimiter, IPAllowlist, network_of

LIMITS = [field.name for field in attrs.fields(ReceiverOptions) if isinstance(field.default, (int, float))]


@pytest.mark.parametrize("name", [name for name in LIMITS if name != "trusted_proxies"])
@pytest.mark.parametrize("value", [0, -1, True, "10", None, float("inf"), float("nan")])
def test_an_invalid_limit_is_refused(name: str, value: object) -> None:
    """Each is a number above 0; the error names it."""
    with pytest.raises(ConfigurationError, match=name):
        ReceiverOptions(**{name: value})  # type: ignore[arg-type]


def test_the_options_are_frozen() -> None:
    """What a receiver was made with stays."""
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        ReceiverOptions().body_bytes = 1  # type: ignore[misc]


def test_unknown_senders_do_not_evict_known_ones() -> None:
    """A connection that has brought a callback goes after all that have not, however long it is idle."""
    limiter: ConnectionLimiter[int] = ConnectionLimiter(3)
    for number in (1, 2, 3):
        limiter.add(number, None)
    limiter.mark_busy(1)
    limiter.mark_idle(1, is_known=True)
    assert [limiter.add(number, None) for number in (4, 5, 6)] == [(True, 2), (True, 3), (True, 4)]
    for number in (5, 6):
        limiter.mark_busy(number)
        limiter.mark_idle(number, is_known=True)
    assert limiter.add(7, None) == (True, 1)
    for number in (5, 6, 7):
        limiter.mark_busy(number)
    assert limiter.add(8, None) == (False, None)
    limiter.remove(7)
    assert limiter.add(8, None) == (True, None)


def test_the_network_with_the_most_idle_connections_makes_room() -> None:
    """A lone sender stays, though it has been idle longest, until the others are as few."""
    limiter: ConnectionLimiter[str] = ConnectionLimiter(4)
    limiter.add("lone", "10.0.9.1")
    for number in range(3):
        limiter.add(f"flood {number}", f"10.0.1.{number}")
    assert [limiter.add(f"new {number}", "10.0.1.9")[1] for number in range(3)] == ["flood 0", "flood 1", "flood 2"]
    assert [limiter.add(name, f"10.0.{name}.1")[1] for name in "234"] == ["new 0", "new 1", "lone"]


PEERS = ("8.8.8.8", "8.8.8.9", "8.8.4.4", "10.0.0.1", None)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["add", "busy", "idle", "known", "remove"]), st.integers(0, 9), st.sampled_from(PEERS)
        )
    )
)
def test_there_are_never_too_many_connections(steps: list[tuple[str, int, str | None]]) -> None:
    """In whatever order they come, work, rest and go; against a plain list, only the idle are evicted, and the right
    one: of unknown senders first, of the network that has most of these idle, the longest idle."""
    limiter: ConnectionLimiter[int] = ConnectionLimiter(4)
    open_: dict[int, str | None] = {}
    known: set[int] = set()
    idle: list[int] = []

    def evictable() -> set[int]:
        """Of the unknown, if any, else of the known: in the networks with the most of them, the longest idle."""
        pool = [one for one in idle if one not in known] or idle
        sizes = Counter(network_of(open_[one]) for one in pool)
        longest: dict[str, int] = {}
        for one in pool:
            longest.setdefault(network_of(open_[one]), one)
        return {one for network, one in longest.items() if sizes[network] == max(sizes.values())}

    for what, one, peer in steps:
        if what == "add" and one not in open_:
            is_admitted, evicted = limiter.add(one, peer)
            assert is_admitted == (len(open_) < 4 or bool(idle))
            if evicted is not None:
                assert len(open_) == 4
                assert evicted in evictable()
                idle.remove(evicted)
                del open_[evicted]
                known.discard(evicted)
            if is_admitted:
                open_[one] = peer
                idle.append(one)
        elif what == "remove":
            limiter.remove(one)
            open_.pop(one, None)
            known.discard(one)
            idle = [other for other in idle if other != one]
        elif what == "busy" and one in open_:
            limiter.mark_busy(one)
            idle = [other for other in idle if other != one]
        elif what in ("idle", "known"):
            limiter.mark_idle(one, is_known=what == "known")
            if one in open_:
                known |= {one} if what == "known" else set()
                idle = [*(other for other in idle if other != one), one]
        assert len(limiter) == len(open_) <= 4


@pytest.mark.parametrize(
    ("peer", "network"),
    [
        ("8.8.8.8", "8.8.8.0"), ("::ffff:8.8.8.8", "8.8.8.0"), ("10.1.2.3", "10.1.2.0"), ("", ""), (None, ""),
        ("2a00:1450:4001:80b::200e", "2a00:1450:4001::"), ("2a00:1450:4001:1:2:3:4:5", "2a00:1450:4001::"),
        ("fe80::1%eth0", "fe80::"), ("nowhere", ""),
    ],
)  # fmt: skip
def test_the_network_of_a_sender(peer: str | None, network: str) -> None:
    """A /24, in IPv6 a /48: the least that is announced by itself."""
    assert network_of(peer) == network


@pytest.mark.parametrize(
    ("proxies", "peer", "forwarded", "admitted"),
    [
        (0, "203.0.113.9", [], True), (0, "::ffff:203.0.113.9", [], True), (0, "2001:db8::7", [], True),
        (0, "198.51.100.1", ["203.0.113.9"], False), (0, None, ["203.0.113.9"], False), (0, "", [], False),
        (1, "10.0.0.1", ["203.0.113.9"], True), (1, "10.0.0.1", ["198.51.100.1, 203.0.113.9"], True),
        (1, "10.0.0.1", ["203.0.113.9, 198.51.100.1"], False), (1, "10.0.0.1", ["203.0.113.9", "198.51.100.1"], False),
        (1, "203.0.113.9", [], False), (1, None, ["203.0.113.9"], True), (1, "10.0.0.1", ["203.0.113.9:4711"], True),
        (1, "10.0.0.1", ['"[2001:db8::7]:4711"'], True), (1, "10.0.0.1", ["203.0.113.9, "], False),
        (2, "10.0.0.1", ["203.0.113.9, 10.0.0.2"], True), (2, "10.0.0.1", ["203.0.113.9"], False),
        (2, "10.0.0.1", ["203.0.113.9, 198.51.100.1, 10.0.0.2"], False), (1, "10.0.0.1", ["unknown"], False),
    ],
)  # fmt: skip
def test_the_sender_is_the_address_that_the_outermost_proxy_saw(
    proxies: int, peer: str | None, forwarded: list[str], admitted: bool
) -> None:
    """Counted from the right; what stands further left anybody may have written."""
    networks = networks_of(["203.0.113.0/24", "2001:db8::/32"])
    assert networks is not None
    assert IPAllowlist(networks, proxies).allows(peer, forwarded) == admitted
