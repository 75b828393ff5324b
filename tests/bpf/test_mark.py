# SPDX-License-Identifier: Apache-2.0
"""DSCP per band: the right bits, the right checksum, ECN and everything else untouched."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.frames import (
    ACK,
    HOPOPTS,
    TCP,
    TYPE_ARP,
    TYPE_IP4,
    TYPE_IP6,
    TYPE_QINQ,
    TYPE_VLAN,
    checksum,
    eth,
    frame4,
    frame6,
    ip4,
    ip6,
    key4,
    key6,
    options6,
    tcp,
)

from mfsd.datapath import _abi

if TYPE_CHECKING:
    from support.bpf_rig import Rig

pytestmark = pytest.mark.bpf

TAGS = [(), (TYPE_VLAN,), (TYPE_QINQ, TYPE_VLAN)]


def mark(rig: Rig, dscp: int, band: int = 3) -> None:
    rig.classifier.dev["flags"] = _abi.DEV_MARK_DSCP
    rig.classifier.dev["bands"]["dscp"][0, band] = dscp
    rig.add_tuple(key4())
    rig.add_tuple(key6())


@pytest.mark.parametrize("vlans", TAGS)
@pytest.mark.parametrize("dscp", [0, 1, 10, 46, 63])
@pytest.mark.parametrize("tos", [0x00, 0x01, 0x02, 0x03, 0xB9, 0xFF])
def test_ipv4(rig: Rig, vlans: tuple[int, ...], dscp: int, tos: int) -> None:
    mark(rig, dscp)
    wanted = dscp << 2 | tos & 3
    r = rig.run(frame4(tos=tos, vlans=vlans, options=b"\x01" * 8))
    assert r.ran.packet == frame4(tos=wanted, vlans=vlans, options=b"\x01" * 8), "only the TOS and its checksum change"
    at = 14 + 4 * len(vlans)
    assert checksum(r.ran.packet[at : at + 28]) == 0
    assert r.stats[_abi.STAT_MARKED] == (wanted != tos)


@pytest.mark.parametrize("vlans", TAGS)
@pytest.mark.parametrize("dscp", [0, 1, 10, 46, 63])
@pytest.mark.parametrize("tclass", [0x00, 0x01, 0x02, 0x03, 0xB9, 0xFF])
def test_ipv6(rig: Rig, vlans: tuple[int, ...], dscp: int, tclass: int) -> None:
    mark(rig, dscp)
    wanted = dscp << 2 | tclass & 3
    r = rig.run(frame6(tclass=tclass, vlans=vlans))
    assert r.ran.packet == frame6(tclass=wanted, vlans=vlans), "version and flow label stay"
    assert r.stats[_abi.STAT_MARKED] == (wanted != tclass)


def test_cookie_hits_are_marked_too(rig: Rig) -> None:
    mark(rig, 46)
    rig.expect_cookie()
    r = rig.run(frame6(bytes(1400), tclass=2))
    assert (r.stat, r.ran.packet) == (_abi.STAT_COOKIE, frame6(bytes(1400), tclass=0xBA))


def test_behind_extension_headers(rig: Rig) -> None:
    mark(rig, 46)
    payload = options6(TCP, 3) + tcp(bytes(100))
    assert rig.run(eth(TYPE_IP6, ip6(HOPOPTS, payload))).ran.packet == eth(TYPE_IP6, ip6(HOPOPTS, payload, tclass=0xB8))


def test_control_packets_get_the_mark_of_the_control_band(rig: Rig) -> None:
    mark(rig, 10)
    rig.classifier.dev["bands"]["dscp"][0, 0] = 48
    ack = ip4(TCP, tcp(flags=ACK))
    assert rig.run(eth(TYPE_IP4, ack)).ran.packet == eth(TYPE_IP4, ip4(TCP, tcp(flags=ACK), tos=48 << 2))


def test_band_without_classid_can_still_mark(rig: Rig) -> None:
    """A host whose switches arbitrate, without a qdisc of ours."""
    mark(rig, 46)
    rig.classifier.dev["bands"]["classid"] = 0
    r = rig.run(frame4(), priority=3)
    assert (r.priority, r.ran.packet) == (3, frame4(tos=46 << 2))


def test_what_must_not_be_marked(rig: Rig) -> None:
    def unchanged(frame: bytes, **kwargs: int) -> None:
        r = rig.run(frame, **kwargs)
        assert r.ran.packet == frame
        assert r.stats[_abi.STAT_MARKED] == 0

    mark(rig, 46)
    rig.classifier.dev["bands"]["dscp"] = 46
    unchanged(frame4(), priority=0x80060001)  # somebody else's
    unchanged(frame4(dst="192.0.2.1"))  # not hinted
    rig.add_tuple(key4(), band=_abi.BAND_KEEP)
    unchanged(frame4())
    rig.add_tuple(key4(), expires_ns=1)
    unchanged(frame4())
    rig.expect_cookie()
    unchanged(eth(TYPE_ARP, bytes(200)))
    rig.add_tuple(key4())
    rig.classifier.dev["bands"]["dscp"][0, 3] = _abi.DSCP_KEEP
    unchanged(frame4(tos=7))
    rig.classifier.dev["bands"]["dscp"][0, 3] = 46
    rig.classifier.dev["flags"] = 0
    unchanged(frame4())
    rig.classifier.dev["flags"] = _abi.DEV_MARK_DSCP
    rig.classifier.host["flags"] = 0
    unchanged(frame4())
