# SPDX-License-Identifier: Apache-2.0
"""Packets on the tree: where they land, in which order they leave, and what a rescue frees.

Queues are filled before the link can drain them, so that orders and counts are exact and no test measures time.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import os
import struct
import threading
from typing import TYPE_CHECKING, Any, Final

import pytest
from support.benches import FRAME, Bench, plan
from support.waiting import wait_for

from bench.parts.testrun import run_packet
from mfsd.datapath import tc
from mfsd.datapath.errors import EnforceError
from mfsd.datapath.qdisc import prio
from mfsd.datapath.qdisc.tree import Filter
from mfsd.host.netlink import NetlinkError

if TYPE_CHECKING:
    from mfsd.datapath.qdisc.enforcer import DeviceEnforcer

pytestmark = pytest.mark.netns

CONTROL, LEVEL0, LEVEL1, DEFAULT, LEVEL2, LEVEL3, BACKGROUND, SCAVENGER = range(8)
BUCKET: Final = 64 << 10
"""Bytes that pass at once on an idle link of up to 64 Mbit/s; see htb.burst."""


def applied(bench: Bench, rate: str = "1gbit", **changes: object) -> DeviceEnforcer:
    e = bench.enforcer(rate, bands=plan(**changes) if changes else None)  # type: ignore[arg-type]
    e.apply()
    return e


def freeze(bench: Bench, e: DeviceEnforcer) -> None:
    """Empty the link's bucket and keep level 0 busy for many seconds: queues below it, without a floor, stand still.

    Each fresh leaf may send one packet first: a rate of 1 byte/s is a floor of one packet per minute.
    """
    bench.send(e.band_maps()[LEVEL0][0], 300)
    wait_for(lambda: e.link_bytes()[0] >= BUCKET)


def test_a_priority_leads_to_its_class_and_nothing_else_counts(bench: Bench) -> None:
    e = applied(bench)
    bench.receiver()
    count = 0
    for band, (classid, lanes) in enumerate(e.band_maps()):
        for lane in range(lanes):
            bench.send(classid + lane, band + 1)
            count += band + 1
    wait_for(lambda: e.link_bytes() == (count * FRAME, 0))
    got = e.counters()
    for band, (_, lanes) in enumerate(e.band_maps()):
        packets = lanes * (band + 1)
        assert got[band].tolist() == (packets * FRAME, packets, 0, 0, 0)
    assert e.restore() == []


@pytest.mark.parametrize("priority", [0, 6, 7, 0x6D660000 - 0x10000, 0x10001, 0x6D66FFFE, 0x6D662000])
def test_what_names_no_lane_is_default_traffic(bench: Bench, priority: int) -> None:
    e = applied(bench)
    bench.receiver()
    bench.send(priority, 7)
    wait_for(lambda: e.link_bytes()[0] == 7 * FRAME)
    got = e.counters()["packets"]
    assert got[DEFAULT] == 7
    assert got.sum() == 7
    assert "direct_packets_stat 0 " in bench.pair.run(bench.pair.a, f"tc -s qdisc show dev {bench.dev}")


def test_unhinted_packets_are_lost_by_grafts_only_and_never_reordered(bench: Bench) -> None:
    """A stream runs through apply, adoption and restore; each of the two root grafts may tear one gap."""
    receiver = bench.receiver()
    sender = bench.sender()
    stop = threading.Event()
    sent = 0

    def stream() -> None:
        nonlocal sent
        while not stop.is_set() and sent < 80_000:
            sender.send(struct.pack("=I", sent))
            sent += 1

    thread = threading.Thread(target=stream)
    thread.start()
    try:
        wait_for(lambda: sent > 100)
        e = bench.enforcer("100gbit")
        e.apply()
        behind = sent
        wait_for(lambda: sent > behind + 100)
        bench.enforcer("100gbit").apply()
        bench.enforcer("90gbit").apply()
        behind = sent
        wait_for(lambda: sent > behind + 100)
        assert e.restore() == []
        behind = sent
        wait_for(lambda: sent > behind + 100)
        assert sent < 80_000
    finally:
        stop.set()
        thread.join()
    receiver.settimeout(0.5)
    got = []
    with contextlib.suppress(TimeoutError):
        while True:
            got += bench.tags(receiver, 1)
    assert got == sorted(set(got))
    gaps = sum(b != a + 1 for a, b in itertools.pairwise(got))
    assert gaps <= 2
    assert got[0] == 0
    assert got[-1] == sent - 1


def test_a_rescue_frees_its_lane_and_no_other(bench: Bench) -> None:
    e = applied(bench, "100kbit")
    bench.receiver()
    freeze(bench, e)
    maps = e.band_maps()
    sent = {(LEVEL2, 0): 11, (LEVEL2, 1): 12, (LEVEL2, 3): 13, (LEVEL3, 0): 14, (SCAVENGER, 2): 15}
    for (band, lane), count in sent.items():
        bench.send(maps[band][0] + lane, count)
    before = {at: e.backlog(*at) for at in sent}
    for at, (size, packets) in before.items():
        assert packets >= sent[at] - 1
        assert size == packets * FRAME
    freed = {(LEVEL2, 1), (SCAVENGER, 2), (LEVEL3, 0)}
    drops = e.counters()["drops"].tolist()

    done = e.purge([(LEVEL2, 1), (SCAVENGER, 2), (LEVEL2, 1), (LEVEL3, 0)])

    assert {(r.band, r.lane): (r.bytes, r.packets) for r in done} == {at: before[at] for at in freed}
    assert {at: e.backlog(*at) for at in sent} == {at: (0, 0) if at in freed else before[at] for at in sent}
    assert e.counters()["drops"].tolist() == drops, "a purge is no tail drop"
    assert e.verify() == []

    # The fresh leaves take packets, and can be freed again and again.
    for _ in range(3):
        bench.send(maps[LEVEL2][0] + 1, 5)
        (again,) = e.purge([(LEVEL2, 1)])
        assert (again.packets, e.backlog(LEVEL2, 1)) == (5, (0, 0))
    assert e.restore() == []


def test_a_rescue_survives_somebody_elses_leaf(bench: Bench) -> None:
    e = applied(bench, "100kbit")
    bench.receiver()
    freeze(bench, e)
    classid = e.band_maps()[LEVEL2][0] + 2
    e.purge([(LEVEL2, 2)])
    (handle,) = [q.handle for q in e._sock.objects(tc.RTM_GETQDISC, e._ifindex) if q.parent == classid]
    twin = (handle >> 16) ^ 1
    bench.tc(f"qdisc replace dev DEV parent {tc.classid(classid)} handle {twin:x}: pfifo")
    bench.send(classid, 5)
    held = e.backlog(LEVEL2, 2)
    assert held[1] >= 4
    done = e.purge([(LEVEL2, 2), (LEVEL2, 0)])
    assert {(r.lane, r.bytes, r.packets) for r in done} == {(2, *held), (0, 0, 0)}
    assert e.backlog(LEVEL2, 2) == (0, 0)
    assert e.verify() == []


def test_a_lane_that_is_gone_stops_no_other(bench: Bench) -> None:
    e = applied(bench, "100kbit")
    bench.receiver()
    freeze(bench, e)
    first = e.band_maps()[LEVEL2][0]
    bench.tc(f"class del dev DEV classid {tc.classid(first + 1)}")
    for lane in (0, 2):
        bench.send(first + lane, 5)
    for _ in range(2):
        with pytest.raises(NetlinkError, match=f"look at lane {tc.classid(first + 1)}: No such file") as caught:
            e.purge([(LEVEL2, 0), (LEVEL2, 1), (LEVEL2, 2)])
        assert caught.value.errno == errno.ENOENT
        assert e.backlog(LEVEL2, 0) == e.backlog(LEVEL2, 2) == (0, 0)
        bench.send(first, 5)
    assert [(p.lane, p.packets) for p in e.purge([(LEVEL2, 2), (LEVEL2, 0)])] == [(2, 0), (0, 5)]


def test_a_full_lane_counts_its_drops(bench: Bench) -> None:
    e = applied(bench, "100kbit")
    bench.receiver()
    freeze(bench, e)
    for packets in (1200, 100):  # as long as the device's queue, before a rescue and after
        bench.send(e.band_maps()[LEVEL2][0], packets)
        assert e.backlog(LEVEL2, 0)[1] == min(packets, 1000)
        e.purge([(LEVEL2, 0)])
    assert 199 <= e.counters()[LEVEL2]["drops"] <= 200


def test_only_lanes_of_hinted_traffic_can_be_freed(bench: Bench) -> None:
    e = applied(bench, "100kbit")
    bench.receiver()
    freeze(bench, e)
    bench.send(e.band_maps()[LEVEL2][0], 5)
    bench.send(0, 20)
    held = e.backlog(LEVEL2, 0)
    for band, lane, message in (
        (CONTROL, 0, "never purged"),
        (DEFAULT, 0, "never purged"),
        (LEVEL2, 4, "lanes 0 to 3"),
        (8, 0, "bands 0 to 7"),
        (-1, 0, "bands 0 to 7"),
    ):
        with pytest.raises(ValueError, match=message):
            e.purge([(LEVEL2, 0), (band, lane)])
    with pytest.raises(ValueError, match="lanes 0 to 3"):
        e.backlog(LEVEL2, 4)
    with pytest.raises(ValueError, match="bands 0 to 7"):
        e.backlog(8, 0)
    assert e.backlog(LEVEL2, 0) == held
    assert e.purge([]) == []


def test_many_lanes_in_one_call(bench: Bench) -> None:
    e = applied(bench, "100kbit", lanes=150)
    bench.receiver()
    lanes = [(band, lane) for band in (LEVEL1, LEVEL2) for lane in range(150)]
    for turn in range(3):
        assert [(r.band, r.lane) for r in e.purge(lanes)] == lanes, turn
    assert e.verify() == []
    assert e.counters()["backlog_packets"].tolist() == [0] * 8
    assert e.restore() == []


def test_bands_are_strict(bench: Bench) -> None:
    e = applied(bench, "4mbit")
    receiver = bench.receiver()
    maps = e.band_maps()
    bench.send(maps[LEVEL0][0] + 3, 200, tag=99)  # keeps the link busy until all is queued
    bench.send(maps[SCAVENGER][0], 60, tag=6)
    bench.send(maps[LEVEL3][0] + 1, 60, tag=5)
    bench.send(maps[LEVEL1][0], 60, tag=2)
    bench.send(maps[LEVEL1][0] + 2, 60, tag=3)
    got = [t for t in bench.tags(receiver, 440) if t != 99]
    # Each fresh leaf has one packet free (htb.py); from then on the order is strict.
    free = 4
    upper = got[: 120 + free]
    assert sum(t in (2, 3) for t in upper) >= 120 - free
    assert sum(t == 5 for t in got[120 : 180 + free]) >= 60 - free
    assert set(got[180 + free :]) == {6}


def test_lanes_of_a_band_share_it(bench: Bench) -> None:
    e = applied(bench, "8mbit")
    receiver = bench.receiver()
    first = e.band_maps()[LEVEL1][0]
    bench.send(e.band_maps()[LEVEL0][0], 200, tag=99)
    bench.send(first, 700, tag=1)
    bench.send(first + 1, 300, tag=2)
    got = [t for t in bench.tags(receiver, 1200) if t != 99]
    # Until the smaller one is done, each has about half: turns of 66 packets.
    half = got[: got.index(2, len(got) - 1 - got[::-1].index(2)) + 1]
    assert abs(half.count(1) - half.count(2)) <= 140


def test_floors_are_given_under_saturation(bench: Bench) -> None:
    e = applied(bench, "4mbit", default_floor=0.10, level_floors=(0.0, 0.0, 0.05))
    receiver = bench.receiver()
    maps = e.band_maps()
    bench.send(maps[LEVEL0][0], 700, tag=1)
    bench.send(0, 300, tag=2)
    for lane in range(4):
        bench.send(maps[LEVEL2][0] + lane, 80, tag=3)
    bench.send(maps[SCAVENGER][0], 80, tag=4)
    got = bench.tags(receiver, 700)[100:]
    share = {tag: got.count(tag) / len(got) for tag in (1, 2, 3, 4)}
    assert 0.08 <= share[2] <= 0.13
    assert 0.035 <= share[3] <= 0.07
    assert share[4] <= 0.01


def test_before_apply_and_after_restore_there_is_nothing_to_ask(bench: Bench) -> None:
    e = bench.enforcer()
    for call in (e.band_maps, e.counters, lambda: e.purge([(1, 0)]), lambda: e.backlog(1, 0)):
        with pytest.raises(EnforceError, match="call apply first"):
            call()
    assert e.verify() == [f"{bench.dev}: nothing has been applied"]
    assert e.link_bytes()[1] == 0


@pytest.mark.bpf
def test_the_lane_filter_of_prio_names_the_class_by_the_major_number(bench: Bench) -> None:
    """Natively there is no prio; htb asks the same kind of filter about what it can't find."""
    e = applied(bench)
    bench.receiver()
    maps = e.band_maps()
    want = Filter(0x6D660000, ((0x6D81, maps[LEVEL1][0]), (0x6D84, maps[SCAVENGER][0] + 1)), 0)
    fd = prio.load_program(want)
    with tc.TcSocket() as sock:
        sock.run([prio.filter_message(want, e._ifindex, fd)], "filter")
    os.close(fd)
    for priority, count in ((0x6D810003, 3), (0x6D84FFFF, 4), (0x6D820001, 5), (0, 6), (maps[LEVEL3][0], 7)):
        bench.send(priority, count)
    wait_for(lambda: e.link_bytes()[0] == 25 * FRAME)
    assert e.counters()["packets"].tolist() == [0, 0, 3, 11, 0, 7, 0, 4]


@pytest.mark.bpf
def test_the_lane_filter_loads_where_there_is_no_libbpf(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hosts that the BCC loader is for. What the program computes is the kernel's word."""
    real = ctypes.CDLL

    def without(name: str | None, **more: Any) -> ctypes.CDLL:
        if name is not None and "bpf" in name:
            raise OSError(f"{name}: cannot open shared object file: No such file or directory")
        return real(name, **more)

    monkeypatch.setattr(ctypes, "CDLL", without)
    root = 0x6D660000
    fd = prio.load_program(Filter(root, ((0x6D81, root | 2), (0x6D82, root | 3)), root | 7))
    for priority, result in ((0x6D810009, root | 2), (0x6D82FFFF, root | 3), (0x6D830001, root | 7), (0, root | 7)):
        assert run_packet(fd, bytes(60), priority=priority).verdict == result
    os.close(fd)
