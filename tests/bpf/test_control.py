# SPDX-License-Identifier: Apache-2.0
"""The control band: what carries no data but lets data flow goes ahead, everything else stays in order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.frames import (
    ACK,
    CWR,
    ECE,
    FIN,
    FRAGMENT,
    HOPOPTS,
    PSH,
    RST,
    SYN,
    TCP,
    TYPE_IP4,
    TYPE_IP6,
    TYPE_QINQ,
    TYPE_VLAN,
    UDP,
    URG,
    eth,
    fragment6,
    ip4,
    ip6,
    key4,
    key6,
    options6,
    tcp,
    udp,
)

from bench.parts.testrun import classid
from mfsd.datapath import _abi

if TYPE_CHECKING:
    from support.bpf_rig import Rig

pytestmark = pytest.mark.bpf


def seg4(payload: bytes = b"", *, flags: int = ACK, options: bytes = b"", vlans: tuple[int, ...] = ()) -> bytes:
    return eth(TYPE_IP4, ip4(TCP, tcp(payload, flags=flags, options=options)), vlans)


def hint(rig: Rig, how: str, **fields: int) -> None:
    """Make the next packet one of a hinted connection, in band 3, lane 2."""
    if how == "cookie":
        rig.expect_cookie(lane=2, **fields)
    else:
        for key in (key4(), key6(), key4(UDP), key6(UDP)):
            rig.add_tuple(key, lane=2, **fields)


ADVANCED = [ACK, ACK | PSH, ACK | ECE, ACK | CWR, ACK | ECE | CWR | PSH, SYN, SYN | ACK, SYN | ECE | CWR]
KEPT = [FIN | ACK, RST, RST | ACK, FIN, ACK | URG, 0, PSH, SYN | FIN, SYN | RST]


@pytest.mark.parametrize("how", ["cookie", "tuple"])
@pytest.mark.parametrize("flags", ADVANCED)
def test_pure_ack_and_syn_go_to_the_control_band(rig: Rig, how: str, flags: int) -> None:
    hint(rig, how)
    r = rig.run(seg4(flags=flags, options=bytes(12)))
    assert r.priority == classid(0)
    assert (r.stats[_abi.STAT_CONTROL], r.slot["sent"], r.slot["packets"]) == (1, 0, 1)
    assert (r.bands[0], r.bands[3]) == (1, 0)


@pytest.mark.parametrize("how", ["cookie", "tuple"])
@pytest.mark.parametrize("flags", KEPT)
def test_fin_rst_and_the_odd_stay_with_the_data(rig: Rig, how: str, flags: int) -> None:
    hint(rig, how)
    r = rig.run(seg4(flags=flags))
    assert (r.priority, r.stats[_abi.STAT_CONTROL]) == (classid(3, 2), 0)


@pytest.mark.parametrize("how", ["cookie", "tuple"])
@pytest.mark.parametrize("size", [1, 2, 40, 132, 133, 1400])
def test_an_ack_with_data_is_data(rig: Rig, how: str, size: int) -> None:
    hint(rig, how)
    assert rig.run(seg4(bytes(size))).priority == classid(3, 2)


@pytest.mark.parametrize("options", [0, 12, 40])
@pytest.mark.parametrize("vlans", [(), (TYPE_VLAN,), (TYPE_QINQ, TYPE_VLAN)])
def test_the_longest_ack_is_still_one(rig: Rig, options: int, vlans: tuple[int, ...]) -> None:
    hint(rig, "cookie")
    assert rig.run(seg4(options=bytes(options), vlans=vlans)).priority == classid(0)
    hint(rig, "cookie")
    ack6 = eth(TYPE_IP6, ip6(HOPOPTS, options6(TCP, 7) + tcp(options=bytes(options))), vlans)
    assert rig.run(ack6).priority == classid(0)


def test_ethernet_padding_is_not_data(rig: Rig) -> None:
    hint(rig, "cookie")
    assert rig.run(seg4() + bytes(6)).priority == classid(0)


def test_control_goes_to_lane_zero_of_a_device_whose_control_band_is_elsewhere(rig: Rig) -> None:
    rig.classifier.dev["control_band"] = 6
    hint(rig, "cookie")
    assert rig.run(seg4()).priority == classid(6)


@pytest.mark.parametrize("band", [8, 16, 255])
def test_device_without_a_control_band(rig: Rig, band: int) -> None:
    rig.classifier.dev["control_band"] = band
    rig.classifier.dev["flags"] = _abi.DEV_CONTROL_UNHINTED
    assert rig.run(seg4(), priority=5).priority == 5
    hint(rig, "tuple")
    r = rig.run(seg4())
    assert (r.priority, r.stats[_abi.STAT_CONTROL]) == (classid(3, 2), 0)


@pytest.mark.parametrize("how", ["cookie", "tuple"])
@pytest.mark.parametrize(
    ("tiny", "size", "control"), [(0, 10, False), (100, 58, True), (100, 59, False), (400, 300, True)]
)
def test_tiny_udp(rig: Rig, how: str, tiny: int, size: int, *, control: bool) -> None:
    """tiny_len counts the whole frame: 42 bytes of headers here."""
    rig.classifier.dev["tiny_len"] = tiny
    hint(rig, how)
    r = rig.run(eth(TYPE_IP4, ip4(UDP, udp(bytes(size)))))
    assert r.priority == (classid(0) if control else classid(3, 2))


@pytest.mark.parametrize("default", [0, 2, 3])
def test_tiny_udp_whose_connection_is_not_above_unhinted_traffic_stays_there(rig: Rig, default: int) -> None:
    rig.classifier.dev["tiny_len"], rig.classifier.dev["default_band"] = 400, default
    hint(rig, "cookie")
    assert rig.run(eth(TYPE_IP4, ip4(UDP, udp(b"x")))).priority == classid(3, 2)
    assert rig.run(seg4()).priority == classid(0)  # an ACK lets others' data flow, wherever its own data are


def test_tiny_does_not_apply_to_tcp_data_nor_to_fragments(rig: Rig) -> None:
    rig.classifier.dev["tiny_len"] = 400
    hint(rig, "cookie")
    assert rig.run(seg4(bytes(10))).priority == classid(3, 2)
    for frag, more in ((0, True), (9, False)):
        hint(rig, "cookie")
        assert rig.run(eth(TYPE_IP4, ip4(UDP, udp(b"x"), frag=frag, more=more))).priority == classid(3, 2)


@pytest.mark.parametrize("how", ["cookie", "tuple"])
def test_first_ipv6_fragment_is_no_control_packet(rig: Rig, how: str) -> None:
    rig.classifier.dev["tiny_len"] = 400
    for proto, inner in ((TCP, tcp()), (UDP, udp(b"x"))):
        hint(rig, how)
        first = eth(TYPE_IP6, ip6(FRAGMENT, fragment6(proto, 0, more=True) + inner))
        assert rig.run(first).priority == classid(3, 2)
        hint(rig, how)
        whole = eth(TYPE_IP6, ip6(FRAGMENT, fragment6(proto, 0) + inner))
        assert rig.run(whole).priority == classid(0)


def test_observe_keep_and_foreign_do_not_reach_the_control_band(rig: Rig) -> None:
    hint(rig, "tuple")
    assert rig.run(seg4(), priority=0x80060001).priority == 0x80060001
    hint(rig, "tuple", band=_abi.BAND_KEEP)
    assert rig.run(seg4(), priority=5).priority == 5
    hint(rig, "tuple")
    rig.classifier.host["flags"] = 0
    r = rig.run(seg4(), priority=5)
    assert (r.priority, r.stats[_abi.STAT_CONTROL], r.stat) == (5, 0, _abi.STAT_OBSERVED)


@pytest.mark.parametrize("flags", [0, _abi.DEV_CONTROL_UNHINTED])
@pytest.mark.parametrize("mode", [0, _abi.HOST_ENFORCE])
def test_unhinted_acks_only_where_asked_for(rig: Rig, flags: int, mode: int) -> None:
    rig.classifier.dev["flags"], rig.classifier.host["flags"] = flags, mode
    wanted = bool(flags) and bool(mode)
    r = rig.run(seg4(), priority=5)
    assert (r.stat, r.priority) == (_abi.STAT_MISS, classid(0) if wanted else 5)
    assert (r.stats[_abi.STAT_CONTROL], r.bands[0]) == (wanted, wanted)
    for other in (seg4(flags=SYN), seg4(b"x"), seg4(flags=FIN | ACK), eth(TYPE_IP4, ip4(UDP, udp()))):
        assert rig.run(other, priority=5).priority == 5
    assert rig.run(seg4(), priority=0x80060001).priority == 0x80060001
