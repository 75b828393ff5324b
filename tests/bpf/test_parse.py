# SPDX-License-Identifier: Apache-2.0
"""Reading headers: tags, options, fragments, extension headers, cut-off packets; and against a second reader."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.frames import (
    DSTOPTS,
    FRAGMENT,
    HOPOPTS,
    ICMP6,
    ROUTING,
    TCP,
    TYPE_ARP,
    TYPE_IP4,
    TYPE_IP6,
    TYPE_QINQ,
    TYPE_VLAN,
    UDP,
    CutShort,
    eth,
    fragment6,
    frame4,
    frame6,
    ip4,
    ip6,
    key4,
    key6,
    options6,
    read,
    shortest,
    tcp,
    udp,
)

from mfsd.datapath import _abi
from mfsd.datapath.bpf.keys import tuple_key

if TYPE_CHECKING:
    from support.bpf_rig import Rig

pytestmark = pytest.mark.bpf

DATA = bytes(100)
TAGS = [(), (TYPE_VLAN,), (TYPE_QINQ, TYPE_VLAN), (TYPE_VLAN, TYPE_VLAN), (TYPE_QINQ,)]


@pytest.mark.parametrize("vlans", TAGS)
def test_tags_are_stepped_over(rig: Rig, vlans: tuple[int, ...]) -> None:
    rig.add_tuple(key4(), band=2)
    rig.add_tuple(key6(), band=2)
    assert rig.run(frame4(vlans=vlans)).stat == _abi.STAT_TUPLE
    assert rig.run(frame6(vlans=vlans)).stat == _abi.STAT_TUPLE


def test_a_third_tag_is_too_much(rig: Rig) -> None:
    rig.add_tuple(key4())
    assert rig.run(frame4(vlans=(TYPE_QINQ, TYPE_VLAN, TYPE_VLAN))).stat == _abi.STAT_NOT_IP


@pytest.mark.parametrize("size", range(0, 44, 4))
def test_ipv4_options_of_every_length(rig: Rig, size: int) -> None:
    rig.add_tuple(key4())
    assert rig.run(frame4(options=b"\x01" * size)).stat == _abi.STAT_TUPLE


@pytest.mark.parametrize("kind", [TYPE_ARP, 0x88CC, 0x8847, 0x0000, 0xFFFF])
def test_not_ip(rig: Rig, kind: int) -> None:
    frame = eth(kind, bytes(46))
    r = rig.run(frame, priority=5)
    assert (r.stat, r.priority, r.ran.packet) == (_abi.STAT_NOT_IP, 5, frame)


@pytest.mark.parametrize("kind", [TYPE_IP4, TYPE_IP6])
@pytest.mark.parametrize("version", [0, 5, 15])
def test_wrong_version(rig: Rig, kind: int, version: int) -> None:
    assert rig.run(eth(kind, bytes([version << 4 | 5]) + bytes(80), (TYPE_VLAN,))).stat == _abi.STAT_NOT_IP


@pytest.mark.parametrize("ihl", range(5))
def test_ipv4_header_shorter_than_a_header(rig: Rig, ihl: int) -> None:
    rig.add_tuple(key4())
    frame = bytearray(frame4())
    frame[14] = 0x40 | ihl
    assert rig.run(bytes(frame)).stat == _abi.STAT_NOT_IP


@pytest.mark.parametrize("proto", [1, 2, 47, 50, 132, 255])
def test_other_protocols_miss(rig: Rig, proto: int) -> None:
    rig.add_tuple(key4())
    assert rig.run(eth(TYPE_IP4, ip4(proto, tcp(DATA)))).stat == _abi.STAT_MISS
    assert rig.run(eth(TYPE_IP6, ip6(proto, tcp(DATA)))).stat == _abi.STAT_MISS


def test_ipv4_fragments(rig: Rig) -> None:
    rig.add_tuple(key4(UDP))
    first = rig.run(eth(TYPE_IP4, ip4(UDP, udp(DATA), more=True)))
    assert first.stat == _abi.STAT_TUPLE
    for more in (True, False):
        later = rig.run(eth(TYPE_IP4, ip4(UDP, udp(DATA), frag=13, more=more)), priority=5)
        assert (later.stat, later.stats[_abi.STAT_FRAGMENT], later.priority) == (_abi.STAT_MISS, 1, 5)


def test_ipv6_fragments(rig: Rig) -> None:
    rig.add_tuple(key6(UDP))
    for more in (True, False):  # without more to come: an atomic fragment, a whole packet
        first = rig.run(eth(TYPE_IP6, ip6(FRAGMENT, fragment6(UDP, 0, more=more) + udp(DATA))))
        assert first.stat == _abi.STAT_TUPLE
    later = rig.run(eth(TYPE_IP6, ip6(FRAGMENT, fragment6(UDP, 13) + udp(DATA))), priority=5)
    assert (later.stat, later.stats[_abi.STAT_FRAGMENT], later.priority) == (_abi.STAT_MISS, 1, 5)


def test_data_of_a_later_ipv6_fragment_is_not_read_as_headers(rig: Rig) -> None:
    """Its "next header" names what the first fragment starts with; here too little follows to be one."""
    r = rig.run(eth(TYPE_IP6, ip6(FRAGMENT, fragment6(DSTOPTS, 13) + b"abc")))
    assert (r.stat, r.stats[_abi.STAT_FRAGMENT]) == (_abi.STAT_MISS, 1)


def test_fragments_with_a_cookie_are_of_their_socket(rig: Rig) -> None:
    rig.expect_cookie(band=5)
    assert rig.run(eth(TYPE_IP4, ip4(UDP, udp(DATA), frag=13))).stat == _abi.STAT_COOKIE


@pytest.mark.parametrize("units", [0, 1, 7, 31])
def test_extension_headers(rig: Rig, units: int) -> None:
    rig.add_tuple(key6())
    stack = options6(DSTOPTS, units) + options6(FRAGMENT, units) + fragment6(DSTOPTS) + options6(TCP, units)
    assert rig.run(eth(TYPE_IP6, ip6(HOPOPTS, stack + tcp(DATA)))).stat == _abi.STAT_TUPLE


def test_the_walk_is_bounded(rig: Rig) -> None:
    rig.add_tuple(key6())
    stack = options6(DSTOPTS) * 4 + options6(TCP)
    assert rig.run(eth(TYPE_IP6, ip6(DSTOPTS, stack + tcp(DATA)))).stat == _abi.STAT_MISS


def test_routing_header_ends_the_walk(rig: Rig) -> None:
    """Behind it, the destination in the IPv6 header isn't the connection's."""
    rig.add_tuple(key6())
    assert rig.run(eth(TYPE_IP6, ip6(ROUTING, options6(TCP) + tcp(DATA)))).stat == _abi.STAT_MISS


@pytest.mark.parametrize(
    "frame",
    [
        frame4(b"", vlans=(TYPE_VLAN,)),
        frame4(b"", vlans=(TYPE_QINQ, TYPE_VLAN), options=b"\x01" * 40),
        frame6(b"", vlans=(TYPE_VLAN,)),
        eth(TYPE_IP6, ip6(HOPOPTS, options6(FRAGMENT, 2) + fragment6(UDP) + udp(b"abc")), (TYPE_VLAN,)),
        frame4(b""),
        frame6(b""),
    ],
    ids=["vlan4", "qinq4options", "vlan6", "vlan6ext", "plain4", "plain6"],
)
@pytest.mark.parametrize("hit", ["cookie", "tuple", "none"])
def test_cut_off_at_every_length(rig: Rig, frame: bytes, hit: str) -> None:
    """Whatever is missing, nothing is misread: a tuple matches iff the ports are there, and no byte changes."""
    if hit == "tuple":
        for key in (key4(), key6(), key6(UDP)):
            rig.add_tuple(key)
    rig.classifier.dev["flags"] = _abi.DEV_CONTROL_UNHINTED
    for length in range(shortest(frame), len(frame) + 1):
        cut = frame[:length]
        if hit == "cookie":
            rig.expect_cookie()
        r = rig.run(cut)
        assert r.ran.packet == cut
        if hit == "cookie":
            assert r.stat == _abi.STAT_COOKIE
            continue
        try:
            seen = read(cut)
        except CutShort:
            assert (r.stat, r.priority) == (_abi.STAT_NOT_IP, 0)
        else:
            assert r.stat == (_abi.STAT_TUPLE if hit == "tuple" and seen.endpoints else _abi.STAT_MISS)


# --- any stack of headers ---------------------------------------------------------------------------------------------


@st.composite
def transports(draw: st.DrawFn) -> tuple[int, bytes]:
    """(Protocol, bytes) of something over IP."""
    proto = draw(st.sampled_from([TCP, TCP, TCP, UDP, ICMP6, 50]))
    data = draw(st.binary(max_size=80) | st.just(b""))
    if proto == TCP:
        options = b"\x01" * (4 * draw(st.integers(0, 10)))
        return proto, tcp(data, flags=draw(st.integers(0, 255) | st.just(16)), options=options)
    return proto, udp(data)


@st.composite
def frames(draw: st.DrawFn) -> bytes:
    """A frame, possibly cut off, possibly with a few bytes overwritten."""
    proto, payload = draw(transports())
    vlans = draw(st.sampled_from(TAGS))
    if draw(st.booleans()):
        options = b"\x01" * (4 * draw(st.integers(0, 10)))
        frag = draw(st.sampled_from([0, 0, 0, 1, 8191]))
        packet = ip4(proto, payload, options=options, frag=frag, more=draw(st.booleans()))
        frame = eth(TYPE_IP4, packet, vlans)
    else:
        for _ in range(draw(st.integers(0, 5))):
            kind = draw(st.sampled_from([HOPOPTS, DSTOPTS, FRAGMENT, ROUTING]))
            if kind == FRAGMENT:
                header = fragment6(proto, draw(st.sampled_from([0, 0, 0, 5])), more=draw(st.booleans()))
            else:
                header = options6(proto, draw(st.integers(0, 4)))
            proto, payload = kind, header + payload
        frame = eth(TYPE_IP6, ip6(proto, payload), vlans)
    if draw(st.integers(0, 3)) == 0:
        frame = frame[: draw(st.integers(0, len(frame)))]
    edited = bytearray(frame)
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 3])) if frame else 0):
        edited[draw(st.integers(0, len(frame) - 1))] = draw(st.integers(0, 255))
    out = bytes(edited).ljust(15, b"\0")
    return out.ljust(shortest(out), b"\0")


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(frame=frames())
def test_agrees_with_a_second_reader(rig: Rig, frame: bytes) -> None:
    """Unhinted first, then with the tuple that the reader found: same verdict, same control packets."""
    rig.reset()
    rig.classifier.dev["flags"] = _abi.DEV_CONTROL_UNHINTED
    plain = rig.run(frame)
    try:
        seen = read(frame)
    except CutShort:
        assert plain.stat == _abi.STAT_NOT_IP
        return
    assert plain.stat == _abi.STAT_MISS
    assert plain.stats[_abi.STAT_FRAGMENT] == seen.later_fragment
    assert plain.stats[_abi.STAT_CONTROL] == seen.pure_ack
    if seen.endpoints is not None:
        rig.add_tuple(tuple_key(seen.endpoints), row=7)
        assert rig.run(frame).stat == _abi.STAT_TUPLE
