"""The receiver's limits by themselves: which connections are open, and who may call."""

from __future__ import annotations

from collections import Counter

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xiling_async import ConfigurationError, ReceiverLimits
from xiling_async.models.settings import networks_of
from xiling_async.webhooks.limits import ConnectionLimiter, IPAllowlist, counted_address, network_of


@pytest.mark.parametrize("name", [field.name for field in attrs.fields(ReceiverLimits)])
@pytest.mark.parametrize("value", [0, -1, True, "10", None, float("inf"), float("nan")])
def test_a_limit_that_is_none_is_refused(name: str, value: object) -> None:
    """Each is a number above 0; the error names it."""
    with pytest.raises(ConfigurationError, match=name):
        ReceiverLimits(**{name: value})  # type: ignore[arg-type]


def test_the_limits_are_frozen() -> None:
    """What a receiver was made with stays."""
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        ReceiverLimits().body_bytes = 1  # type: ignore[misc]


def test_one_address_makes_room_for_itself_only() -> None:
    """An address has its own cap; those that may be a proxy's are counted together only."""
    limiter: ConnectionLimiter[int] = ConnectionLimiter(5, 2)
    assert [limiter.add(number, "8.8.8.8") for number in (1, 2)] == [(True, None)] * 2
    assert limiter.add(3, "10.0.0.1") == (True, None)
    assert limiter.add(4, "8.8.8.8") == (True, 1)
    limiter.mark_busy(2)
    limiter.mark_busy(4)
    assert limiter.add(5, "8.8.8.8") == (False, None)
    limiter.mark_idle(2)
    assert limiter.add(5, "8.8.8.8") == (True, 2)
    limiter.remove(2)  # the end of its connection, later
    assert [limiter.add(number, "10.0.0.1") for number in (6, 7)] == [(True, None)] * 2
    assert limiter.add(8, "9.9.9.9") == (True, 3)  # the longest idle of the network with the most
    assert len(limiter) == 5


def test_strangers_do_not_drive_out_known_senders() -> None:
    """A connection that has brought a callback goes after all that have not, however long it is idle."""
    limiter: ConnectionLimiter[int] = ConnectionLimiter(3, 9)
    for number in (1, 2, 3):
        limiter.add(number, None)
    limiter.mark_busy(1)
    limiter.mark_idle(1, known=True)
    assert [limiter.add(number, None) for number in (4, 5, 6)] == [(True, 2), (True, 3), (True, 4)]
    for number in (5, 6):
        limiter.mark_busy(number)
        limiter.mark_idle(number, known=True)
    assert limiter.add(7, None) == (True, 1)
    assert sorted(limiter.idle()) == [5, 6, 7]
    limiter.mark_busy(5)
    assert limiter.busy == 1


def test_the_most_crowded_network_makes_room() -> None:
    """A lone sender stays, though it has been idle longest, until the others are as few."""
    limiter: ConnectionLimiter[str] = ConnectionLimiter(4, 9)
    limiter.add("lone", "10.0.9.1")
    for number in range(3):
        limiter.add(f"crowd {number}", f"10.0.1.{number}")
    assert [limiter.add(f"new {number}", "10.0.1.9")[1] for number in range(3)] == ["crowd 0", "crowd 1", "crowd 2"]
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
    """Whatever order they come, work, rest and go in; against a plain list, only the idle are evicted, and the right
    one: of strangers first, of the most crowded network that has an idle one, the longest idle."""
    limiter: ConnectionLimiter[int] = ConnectionLimiter(4, 2)
    open_: dict[int, str | None] = {}
    busy: set[int] = set()
    known: set[int] = set()
    idle: list[int] = []

    def evictable(candidates: list[int]) -> set[int]:
        """Of the strangers, if any, else of the known: in the networks with the most of them, the longest idle."""
        pool = [one for one in candidates if one not in known] or candidates
        crowd = Counter(network_of(open_[one]) for one in open_ if (one in known) == (pool[0] in known))
        largest = max(crowd[network_of(open_[one])] for one in pool)
        longest: dict[str, int] = {}
        for one in pool:
            longest.setdefault(network_of(open_[one]), one)
        return {one for network, one in longest.items() if crowd[network] == largest}

    for what, one, peer in steps:
        if what == "add" and one not in open_:
            same = [other for other in open_ if peer and open_[other] == peer and counted_address(peer)]
            fits, evicted = limiter.add(one, peer)
            if evicted is not None:
                assert evicted in evictable([other for other in idle if len(same) < 2 or other in same])
                idle.remove(evicted)
                del open_[evicted]
                known.discard(evicted)
            if fits:
                open_[one] = peer
                idle.append(one)
            else:
                assert busy >= (set(same) if len(same) == 2 else set(open_))
        elif what == "remove":
            limiter.remove(one)
            open_.pop(one, None)
            busy.discard(one)
            known.discard(one)
            idle = [other for other in idle if other != one]
        elif what == "busy" and one in open_:
            limiter.mark_busy(one)
            busy.add(one)
            idle = [other for other in idle if other != one]
        elif what in ("idle", "known"):
            limiter.mark_idle(one, known=what == "known")
            if one in open_:
                busy.discard(one)
                known |= {one} if what == "known" else set()
                idle = [*(other for other in idle if other != one), one]
        assert len(limiter) == len(open_) <= 4
        assert limiter.busy == len(busy)
        assert sorted(limiter.idle()) == sorted(idle)
        assert all(list(open_.values()).count(address) <= 2 for address in PEERS[:3])


@pytest.mark.parametrize(
    ("peer", "name"),
    [
        ("8.8.8.8", "8.8.8.8"), ("::ffff:8.8.8.8", "8.8.8.8"), ("2a00:1450:4001:80b::200e", "2a00:1450:4001:80b::/64"),
        ("2a00:1450:4001:80b:1:2:3:4", "2a00:1450:4001:80b::/64"), ("127.0.0.1", None), ("::1", None),
        ("10.1.2.3", None), ("192.168.1.1", None), ("172.17.0.1", None), ("100.64.0.1", None), ("fe80::1%eth0", None),
        ("", None), (None, None), ("nowhere", None),
    ],
)  # fmt: skip
def test_who_counts_as_one_sender(peer: str | None, name: str | None) -> None:
    """A public IPv4 address, a /64 in IPv6; what is private may be a proxy that speaks for many."""
    assert counted_address(peer) == name


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
def test_the_sender_is_whom_our_outermost_proxy_saw(
    proxies: int, peer: str | None, forwarded: list[str], admitted: bool
) -> None:
    """Counted from the right; what stands further left anybody may have written."""
    networks = networks_of(["203.0.113.0/24", "2001:db8::/32"])
    assert networks is not None
    assert IPAllowlist(networks, proxies).allows(peer, forwarded) == admitted
