# SPDX-License-Identifier: Apache-2.0
"""From packet to slot to skb->priority: who is matched, what is obeyed, what is left alone, what is counted."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
from support.frames import TCP, TYPE_IP4, UDP, eth, frame4, frame6, ip4, ip6, key4, key6, shortest, tcp, udp

from bench.parts.testrun import BANDS, LANES, MAJOR, classid
from mfsd.datapath import _abi

if TYPE_CHECKING:
    from support.bpf_rig import Rig

pytestmark = pytest.mark.bpf


def test_cookie_hit_obeys_the_slot_and_reads_no_ports(rig: Rig) -> None:
    rig.expect_cookie(band=5)
    r = rig.run(frame4(bytes(1000)))
    assert (r.stat, r.priority) == (_abi.STAT_COOKIE, classid(5))
    assert r.bands.tolist()[:BANDS] == [0, 0, 0, 0, 0, 1, 0, 0]


def test_cookie_comes_before_tuple(rig: Rig) -> None:
    rig.add_tuple(key4(), row=9, band=6)
    rig.expect_cookie(band=5)
    assert rig.run(frame4()).priority == classid(5)


def test_cookie_hit_on_something_that_is_not_ip_is_still_obeyed(rig: Rig) -> None:
    rig.expect_cookie(band=5)
    r = rig.run(eth(0x88B5, bytes(30)))
    assert (r.stat, r.priority) == (_abi.STAT_COOKIE, classid(5))


@pytest.mark.parametrize(
    ("frame", "key"),
    [
        (frame4(), key4()),
        (frame6(), key6()),
        (eth(0x0800, ip4(UDP, udp(b"x"))), key4(UDP)),
        (eth(0x86DD, ip6(UDP, udp(b"x"))), key6(UDP)),
    ],
    ids=["tcp4", "tcp6", "udp4", "udp6"],
)
def test_tuple_hit(rig: Rig, frame: bytes, key: bytes) -> None:
    rig.add_tuple(key, band=2)
    r = rig.run(frame)
    assert (r.stat, r.priority) == (_abi.STAT_TUPLE, classid(2))


def test_tuple_must_match_in_every_field(rig: Rig) -> None:
    for key in (key4(UDP), key6(), key4()[16:32] + key4()[:16] + key4()[32:]):
        rig.add_tuple(key)
    r = rig.run(frame4())
    assert (r.stat, r.priority) == (_abi.STAT_MISS, 0)


def test_miss_leaves_packet_and_priority_alone(rig: Rig) -> None:
    frame = frame4()
    r = rig.run(frame, priority=0x8006_0001)
    assert (r.stat, r.priority, r.ran.packet) == (_abi.STAT_MISS, 0x8006_0001, frame)


@pytest.mark.parametrize("lane", [0, 1, 3, 4, 7, 65535])
def test_lane_is_taken_modulo_the_lanes_of_the_band(rig: Rig, lane: int) -> None:
    rig.add_tuple(key4(), lane=lane)
    assert rig.run(frame4()).priority == classid(3, lane % LANES)


def test_band_without_lanes_uses_the_first(rig: Rig) -> None:
    rig.classifier.dev["bands"]["lanes"] = 0
    rig.add_tuple(key4(), lane=9)
    assert rig.run(frame4()).priority == classid(3)


def test_band_without_classid_is_counted_but_not_written(rig: Rig) -> None:
    rig.classifier.dev["bands"]["classid"][0, 3] = 0
    rig.add_tuple(key4(), lane=2)
    r = rig.run(frame4(), priority=6)
    assert (r.stat, r.priority, r.bands[3]) == (_abi.STAT_TUPLE, 6, 1)


@pytest.mark.parametrize("band", [_abi.BAND_KEEP, BANDS, _abi.MAX_BANDS, 200])
def test_keep_and_unknown_bands_count_only(rig: Rig, band: int) -> None:
    rig.add_tuple(key4(), band=band)
    r = rig.run(frame4(), priority=5)
    assert (r.stat, r.priority, r.slot["packets"]) == (_abi.STAT_OBSERVED, 5, 1)


def test_observe_mode_counts_only(rig: Rig) -> None:
    rig.classifier.host["flags"] = 0
    rig.add_tuple(key4())
    r = rig.run(frame4(), priority=5)
    assert (r.stat, r.priority, r.slot["packets"]) == (_abi.STAT_OBSERVED, 5, 1)
    assert not r.bands.any()


@pytest.mark.parametrize(
    ("before", "flags", "written"),
    [
        (0, 0, True),
        (6, 0, True),  # TC_PRIO_INTERACTIVE of SO_PRIORITY or the TOS: no major, nobody's qdisc
        (MAJOR | 0x99, 0, True),
        (0x80060001, 0, False),
        (0x80060001, _abi.DEV_OVERWRITE_FOREIGN, True),
    ],
)
def test_priority_of_somebody_else_is_kept_unless_told_otherwise(
    rig: Rig, before: int, flags: int, *, written: bool
) -> None:
    rig.classifier.dev["flags"] = flags
    rig.add_tuple(key4())
    r = rig.run(frame4(), priority=before)
    assert r.stat == (_abi.STAT_TUPLE if written else _abi.STAT_FOREIGN)
    assert r.priority == (classid(3) if written else before)
    assert r.slot["packets"] == 1
    assert r.bands[3] == written


def test_expired_slot_is_no_slot(rig: Rig) -> None:
    for past in (0, 1, time.monotonic_ns() - 10**9):
        rig.add_tuple(key4(), expires_ns=past)
        r = rig.run(frame4(), priority=5)
        assert (r.stat, r.priority, r.slot["packets"]) == (_abi.STAT_EXPIRED, 5, 0)
    rig.add_tuple(key4(), expires_ns=time.monotonic_ns() + 3600 * 10**9)
    assert rig.run(frame4()).stat == _abi.STAT_TUPLE


def test_expired_cookie_does_not_fall_back_to_the_tuple(rig: Rig) -> None:
    rig.add_tuple(key4(), row=9)
    rig.expect_cookie(expires_ns=1)
    assert rig.run(frame4()).stat == _abi.STAT_EXPIRED


@pytest.mark.parametrize("row", [512, 513, 2**32 - 1])
def test_row_beyond_the_table_is_no_slot(rig: Rig, row: int) -> None:
    rig.classifier.tuples.add(key4(), row)
    r = rig.run(frame4(), priority=5)
    assert (r.stat, r.priority) == (_abi.STAT_EXPIRED, 5)


def test_without_heartbeat_nothing_happens(rig: Rig) -> None:
    rig.add_tuple(key4())
    rig.classifier.host["timeout_ns"] = 10**9
    rig.classifier.host["heartbeat_ns"] = time.monotonic_ns() - 10 * 10**9
    r = rig.run(frame4(), priority=5)
    assert (r.stat, r.priority, r.slot["packets"]) == (_abi.STAT_STALE, 5, 0)


def test_heartbeat_from_the_future_is_alive(rig: Rig) -> None:
    """The clock of the classifier lags by a tick; a heartbeat written just now is ahead of it."""
    rig.add_tuple(key4())
    rig.classifier.host["timeout_ns"] = 0
    rig.classifier.host["heartbeat_ns"] = time.monotonic_ns() + 3600 * 10**9
    assert rig.run(frame4()).stat == _abi.STAT_TUPLE


@pytest.mark.parametrize("version", [0, _abi.ABI_VERSION + 1])
def test_daemon_of_another_abi_is_no_daemon(rig: Rig, version: int) -> None:
    rig.classifier.host["abi_version"] = version
    rig.add_tuple(key4())
    assert rig.run(frame4()).stat == _abi.STAT_STALE


def test_empty_maps_do_nothing(rig: Rig) -> None:
    """As right after loading, before the daemon has written a byte."""
    rig.add_tuple(key4())
    rig.classifier.host[:] = 0
    rig.classifier.dev[:] = 0
    assert rig.run(frame4(), priority=5).priority == 5
    rig.classifier.host["abi_version"], rig.classifier.host["heartbeat_ns"] = _abi.ABI_VERSION, 2**63
    r = rig.run(frame4(), priority=5)
    assert (r.stat, r.priority) == (_abi.STAT_OBSERVED, 5)


def test_slot_counts_the_wire(rig: Rig) -> None:
    rig.add_tuple(key4())
    frame = frame4(bytes(1000))
    r = rig.run(frame)
    assert (r.slot["bytes"], r.slot["sent"], r.slot["packets"]) == (len(frame), 1000, 1)
    assert 0 <= time.monotonic_ns() - r.slot["last_ns"] < 10 * 10**9


def test_gso_packet_counts_all_its_segments_and_headers(rig: Rig) -> None:
    rig.add_tuple(key4())
    frame = frame4(bytes(3000))
    wire = len(frame) + 2 * 54
    r = rig.run(frame, wire_len=wire, gso_segs=3)
    assert (r.slot["bytes"], r.slot["sent"], r.slot["packets"]) == (wire, 3000, 1)
    assert rig.classifier.bands()["bytes"][3] >= wire


def test_observe_and_enforce_count_alike(rig: Rig) -> None:
    rig.add_tuple(key4())
    enforced = rig.run(eth(TYPE_IP4, ip4(TCP, tcp(bytes(100)))), wire_len=500, gso_segs=2)
    rig.classifier.host["flags"] = 0
    observed = rig.run(eth(TYPE_IP4, ip4(TCP, tcp(bytes(100), seq=101))), wire_len=500, gso_segs=2)
    enforced.slot.pop("last_ns")
    observed.slot.pop("last_ns")
    assert enforced.slot == observed.slot


def test_random_packets_are_each_counted_once(rig: Rig) -> None:
    """The sum over the exclusive counters is the number of packets, whatever they are."""
    rng = np.random.default_rng(1)
    rig.add_tuple(key4(), row=1)
    rig.add_tuple(key6(), row=2, expires_ns=1)
    rig.classifier.dev["flags"] = _abi.DEV_CONTROL_UNHINTED | _abi.DEV_MARK_DSCP
    before = rig.classifier.stats()
    frames = [frame4(), frame6(), frame4(src="192.0.2.1"), eth(0x0806, bytes(28)), frame4(b"", dst="192.0.2.9")]
    n = 300
    for _ in range(n):
        frame = frames[rng.integers(len(frames))]
        cut = int(rng.integers(shortest(frame), len(frame) + 1))
        rig.run(frame[:cut], priority=int(rng.choice([0, 6, 0x80010000])))
    grown = rig.classifier.stats() - before
    assert grown[: _abi.STAT_NOT_IP + 1].sum() == n
