# SPDX-License-Identifier: Apache-2.0
"""Backend prio on a kernel that has ets and prio: where packets land, in which order they leave, what a rescue frees.

Queues are filled before the link can drain them, so that orders and counts are exact and no test measures time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.benches import FRAME, plan
from support.prio_benches import CONTROL, DEFAULT, LEVEL0, LEVEL1, LEVEL2, LEVEL3, SCAVENGER, PrioBench
from support.waiting import wait_for

from mfsd.datapath import tc

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.netns

SHAPES = pytest.mark.parametrize(
    ("rate", "lanes"),
    [
        pytest.param(None, 1, marks=pytest.mark.feature("prio, bare")),
        pytest.param(None, 4, marks=pytest.mark.feature("prio, bare, drr lanes")),
        pytest.param("1gbit", 1, marks=pytest.mark.feature("prio under a shaper")),
        pytest.param("1gbit", 4, marks=pytest.mark.feature("prio under a shaper, drr lanes")),
    ],
)
LANES = pytest.mark.parametrize(
    "lanes",
    [
        pytest.param(1, marks=pytest.mark.feature("prio under a shaper")),
        pytest.param(4, marks=pytest.mark.feature("prio under a shaper, drr lanes")),
    ],
)


BOTH = pytest.mark.parametrize("bench", ["prio", "ets"], indirect=True)
ETS = pytest.mark.parametrize("bench", ["ets"], indirect=True)


@pytest.fixture(autouse=True)
def _kernel(needs: Callable[..., None]) -> None:
    needs("prio", "ets", "tbf", "drr")


@BOTH
@SHAPES
def test_a_priority_leads_to_its_lane(bench: PrioBench, rate: str | None, lanes: int) -> None:
    before = bench.shown()
    e = bench.applied(rate, lanes)
    bench.receiver()
    count = 0
    for band, (classid, n) in enumerate(e.band_maps()):
        for lane in range(n):
            bench.send(classid + lane, band + 1)
            count += band + 1
    wait_for(lambda: e.link_bytes() == (count * FRAME, 0))
    got = e.counters()
    for band, (classid, n) in enumerate(e.band_maps()):
        packets = n * (band + 1)
        assert got[band].tolist() == (packets * FRAME, packets, 0, 0, 0), band
        if n > 1:
            drr = [c for c in e._sock.objects(tc.RTM_GETTCLASS, e._ifindex) if c.handle >> 16 == classid >> 16]
            sent = {c.handle: _packets(e._sock, e._ifindex, c.handle) for c in drr}
            assert sent == {classid + lane: band + 1 for lane in range(n)}
    assert e.restore() == []
    assert bench.shown() == before


def _packets(sock: tc.TcSocket, ifindex: int, handle: int) -> int:
    return tc.StatsReader().read(sock.ask(tc.query(tc.RTM_GETTCLASS, ifindex, handle), "class")).packets


@BOTH
@SHAPES
@pytest.mark.parametrize("priority", [0, 7, 0x10001, 0x6D66FFFE, 0x6D7F0001])
def test_what_names_no_band_is_default_traffic(bench: PrioBench, rate: str | None, lanes: int, priority: int) -> None:
    e = bench.applied(rate, lanes)
    bench.receiver()
    bench.send(priority, 7)
    wait_for(lambda: e.link_bytes()[0] == 7 * FRAME)
    got = e.counters()["packets"]
    assert (got[DEFAULT], got.sum()) == (7, 7)


@BOTH
@pytest.mark.feature("prio under a shaper, drr lanes")
@pytest.mark.parametrize("minor", [0, 9, 0xFFFF])
def test_a_lane_that_does_not_exist_is_the_first_of_its_band(bench: PrioBench, minor: int) -> None:
    """Else drr would drop the packet."""
    e = bench.applied("1gbit", 4)
    bench.receiver()
    bench.send(e.band_maps()[LEVEL2][0] & 0xFFFF0000 | minor, 5)
    wait_for(lambda: e.link_bytes()[0] == 5 * FRAME)
    assert e.counters()["packets"][LEVEL2] == 5


@LANES
def test_bands_are_strict(bench: PrioBench, lanes: int) -> None:
    e = bench.applied("4mbit", lanes)
    receiver = bench.receiver()
    first = [classid for classid, _ in e.band_maps()]
    other = 2 if lanes > 2 else 0
    bench.send(first[LEVEL0], 300, tag=99)  # keeps the link busy until all is queued
    for band, lane, tag in (
        (SCAVENGER, 0, 6), (LEVEL3, 0, 5), (LEVEL2, 0, 4), (DEFAULT, 0, 3), (LEVEL1, 0, 2), (LEVEL1, other, 2),
    ):  # fmt: skip
        bench.send(first[band] + lane, 40, tag=tag)
    bench.send(first[CONTROL], 10, tag=0)
    got = bench.tags(receiver, 300 + 240 + 10)
    assert [t for t in got if t not in (0, 99)] == [2] * 80 + [3] * 40 + [4] * 40 + [5] * 40 + [6] * 40
    assert len(got) - 1 - got[::-1].index(99) < got.index(2), "level 0 goes before level 1"
    assert got.index(0) < got.index(2)


@pytest.mark.feature("prio under a shaper, drr lanes")
def test_lanes_of_a_band_share_it(bench: PrioBench) -> None:
    e = bench.applied("8mbit", 4)
    receiver = bench.receiver()
    first = e.band_maps()[LEVEL1][0]
    bench.send(e.band_maps()[LEVEL0][0], 300, tag=99)
    bench.send(first, 700, tag=1)
    bench.send(first + 1, 300, tag=2)
    got = [t for t in bench.tags(receiver, 1300) if t != 99]
    half = got[: len(got) - got[::-1].index(2)]
    # Until the smaller one is done, each has half: turns of 66 packets.
    assert abs(half.count(1) - half.count(2)) <= 140


@LANES
@pytest.mark.feature("prio: rescue")
def test_a_rescue_frees_its_lane_and_no_other(bench: PrioBench, lanes: int) -> None:
    e = bench.applied("100kbit", lanes)
    bench.receiver()
    bench.freeze(e)
    maps = e.band_maps()
    last = lanes - 1
    sent = {(LEVEL2, last): 12, (LEVEL3, 0): 14, (SCAVENGER, last): 15, (DEFAULT, 0): 9}
    if lanes > 1:
        sent |= {(LEVEL2, 0): 11, (LEVEL3, 1): 13}
    for (band, lane), count in sent.items():
        bench.send(maps[band][0] + lane, count)
    held = {at: e.backlog(*at) for at in sent}
    assert held == {at: (count * FRAME, count) for at, count in sent.items()}
    passed = e.counters()

    done = e.purge([(LEVEL2, last), (LEVEL3, 0), (LEVEL2, last)])

    freed = {(LEVEL2, last), (LEVEL3, 0)}
    assert {(r.band, r.lane): (r.bytes, r.packets) for r in done} == {at: held[at] for at in freed}
    assert {at: e.backlog(*at) for at in sent} == {at: (0, 0) if at in freed else held[at] for at in sent}
    assert e.verify() == []
    now = e.counters()
    for name in ("bytes", "packets"):
        assert (now[name] >= passed[name]).all(), f"{name} went backwards"
        assert now[name][LEVEL2] == passed[name][LEVEL2]

    # The fresh leaves take packets, and can be freed again and again.
    for _ in range(3):
        bench.send(maps[LEVEL2][0] + last, 5)
        (again,) = e.purge([(LEVEL2, last)])
        assert (again.packets, e.backlog(LEVEL2, last)) == (5, (0, 0))
    with pytest.raises(ValueError, match="never purged"):
        e.purge([(DEFAULT, 0)])
    assert e.restore() == []


@LANES
@pytest.mark.feature("prio: rescue")
def test_a_rescue_frees_what_was_next_when_the_bands_above_were_idle(bench: PrioBench, lanes: int) -> None:
    """A shaper that looks at the next packet has it taken out of its lane, where nothing frees it."""
    e = bench.applied("1mbit", lanes)
    receiver = bench.receiver()
    bench.send(e.band_maps()[LEVEL2][0] + lanes - 1, 300, tag=2)  # more than passes at once: now it waits for the link
    bench.send(e.band_maps()[LEVEL0][0], 100, tag=1)
    (done,) = e.purge([(LEVEL2, lanes - 1)])
    got = bench.tags(receiver, 400 - done.packets)
    assert got[got.index(1) :] == [1] * 100
    assert 2 in got


@BOTH
@LANES
@pytest.mark.feature("prio: rescue")
def test_counters_survive_a_rescue(bench: PrioBench, lanes: int) -> None:
    e = bench.applied("100mbit", lanes)
    bench.receiver()
    for turn in range(1, 4):
        for band in (LEVEL1, LEVEL3, SCAVENGER):
            bench.send(e.band_maps()[band][0], 20)
        wait_for(lambda turn=turn: int(e.counters()["packets"].sum()) == 60 * turn)  # type: ignore[misc]
        e.purge([(LEVEL1, 0), (LEVEL3, 0)])
        assert e.counters()["packets"].tolist() == [0, 0, 20 * turn, 0, 0, 20 * turn, 0, 20 * turn]
        assert e.counters()["bytes"].sum() == 60 * turn * FRAME


@BOTH
@pytest.mark.feature("prio: rescue")
def test_many_lanes_in_one_call(bench: PrioBench) -> None:
    e = bench.applied("100mbit", 100)
    lanes = [(band, lane) for band in (LEVEL1, LEVEL2) for lane in range(100)]
    for turn in range(3):
        assert [(r.band, r.lane) for r in e.purge(lanes)] == lanes, turn
    assert e.verify() == []
    assert e.restore() == []


@LANES
def test_a_successor_adopts_the_tree(bench: PrioBench, lanes: int) -> None:
    before = bench.shown()
    first = bench.applied("100kbit", lanes)
    bench.receiver()
    bench.freeze(first)
    bench.send(first.band_maps()[LEVEL2][0], 5)
    first.purge([(LEVEL3, lanes - 1)])
    held = first.backlog(LEVEL2, 0)
    assert held[1] == 5
    first.close()
    second = bench.enforcer("100kbit", "prio", plan(lanes=lanes))
    assert second.plan().steps == ()
    second.apply()
    assert second.adopted
    assert second.backlog(LEVEL2, 0) == held
    assert second.verify() == []
    assert second.restore() == []
    assert bench.shown() == before


@BOTH
@pytest.mark.feature("prio under a shaper, drr lanes")
def test_a_missing_filter_is_noticed_and_repaired(bench: PrioBench) -> None:
    first = bench.applied("1gbit", 4)
    bench.tc("filter del dev DEV parent 6d66:")
    assert first.verify() == ["filter of 6d66: is missing"]
    second = bench.applied("1gbit", 4)
    assert second.adopted
    bench.receiver()
    bench.send(second.band_maps()[LEVEL3][0] + 2, 6)
    wait_for(lambda: second.link_bytes()[0] == 6 * FRAME)
    assert second.counters()["packets"][LEVEL3] == 6


@BOTH
@pytest.mark.feature("prio, bare")
def test_sixteen_bands(bench: PrioBench) -> None:
    e = bench.enforcer(None, "prio", plan(12))
    e.apply()
    assert len(e.band_maps()) == 16
    bench.receiver()
    for band, (classid, _) in enumerate(e.band_maps()):
        bench.send(classid, band + 1)
    wait_for(lambda: int(e.counters()["packets"].sum()) == 136)
    assert e.counters()["packets"].tolist() == list(range(1, 17))
    assert e.restore() == []


@pytest.mark.feature("plan: choice of the backend")
def test_auto_takes_prio_without_a_rate_and_explains_many_queues(bench: PrioBench) -> None:
    dry = bench.enforcer(None, "auto", plan()).plan()
    assert dry.ok
    assert dry.backend == "prio"
    text = " ".join(dry.reasons)
    assert "bands at line rate" in text
    assert "4 transmit queues" in text


@BOTH
@pytest.mark.feature("plan: commands make the same tree")
@pytest.mark.parametrize("rate", [None, "100mbit", "100gbit"])
def test_the_commands_of_a_plan_make_the_same_tree(bench: PrioBench, rate: str | None) -> None:
    e = bench.enforcer(rate, "prio", plan(lanes=1))
    bench.pair.run(bench.pair.a, "; ".join(step.command for step in e.plan().steps))
    by_hand = bench.shown()
    bench.tc("qdisc del dev DEV root")
    e.apply()
    # tc rounds tbf's bucket to ticks of its own.
    strip = [line.split(" burst ")[0] for line in bench.shown()]
    assert strip == [line.split(" burst ")[0] for line in by_hand]
    assert e.restore() == []


@ETS
@LANES
@pytest.mark.feature("prio: floors by weight (ets)")
def test_every_band_has_its_floor(bench: PrioBench, lanes: int) -> None:
    """While level 0 is backlogged all the time, and so are the others."""
    e = bench.applied("100kbit", lanes)
    assert e.floors
    receiver = bench.receiver()
    first = [classid for classid, _ in e.band_maps()]
    busy = (LEVEL0, LEVEL2, DEFAULT, SCAVENGER)
    for band in busy:
        bench.send(first[band], 900, tag=band)
    bench.tc(f"qdisc change dev DEV root handle 6d67: tbf rate 40mbit burst {2 * 65536} limit 64mb")
    got = bench.tags(receiver, 1000)[150:]  # the bucket let the first ones through
    floors = {b.index: b.floor for b in bench.bands.bands}
    for band in busy[1:]:
        assert got.count(band) >= 0.7 * floors[band] * len(got), band
    assert got.count(LEVEL0) > 0.6 * len(got), "nearly strict"


@ETS
@LANES
@pytest.mark.feature("prio: guarantees by weight (ets)")
def test_a_guarantee_takes_effect_while_packets_wait(bench: PrioBench, lanes: int) -> None:
    e = bench.applied("4mbit", lanes)
    receiver = bench.receiver()
    maps = e.band_maps()
    bench.send(maps[LEVEL0][0], 900, tag=1)
    bench.send(maps[LEVEL2][0], 900, tag=2)
    bench.tags(receiver, 160)
    e.guarantee({LEVEL2: 0.5})
    assert e.verify() == []
    got = bench.tags(receiver, 800)[280:]  # what had been decided already: one round
    assert 0.4 * len(got) <= got.count(2) <= 0.65 * len(got)
    e.guarantee({})
    assert e.verify() == []
    assert e.restore() == []
