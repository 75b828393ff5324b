# SPDX-License-Identifier: Apache-2.0
"""Trees as bytes: layouts, numbers at every speed, limits, comparison. No kernel."""

from __future__ import annotations

import dataclasses
import itertools
import struct
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.benches import plan

from mfsd.datapath import tc
from mfsd.datapath.formats import settings, ticks
from mfsd.datapath.handles import CHILD_MAJOR, LEAF_MAJORS, ROOT, SHAPER_MAJOR
from mfsd.datapath.qdisc import ets, htb, prio
from mfsd.datapath.qdisc.tree import PURGEABLE, Filter, How, differences
from mfsd.datapath.undo.snapshot import Saved, Snapshot, codel_request
from mfsd.ground.bands import Bands
from mfsd.ground.units import Rate
from mfsd.host import netlink as nl

if TYPE_CHECKING:
    from mfsd.datapath.qdisc.tree import Tree

SPEEDS = ("100mbit", "1gbit", "10gbit", "34.4gbit", "100gbit", "400gbit", "1.6tbit")


def only(raw: bytes) -> nl.Message:
    (message,) = nl.messages(raw)
    return message


def objects(tree: Tree) -> tuple[list[tc.TcObject], list[tc.TcObject]]:
    """The tree as a kernel would dump it."""
    out: dict[str, list[tc.TcObject]] = {"qdisc": [], "class": []}
    for node in tree.nodes:
        ifindex, thing = tc.parse_object(only(node.message(7)))
        assert ifindex == 7
        out[node.type].append(thing)
    return out["qdisc"], out["class"]


@pytest.mark.parametrize("speed", SPEEDS)
def test_htb_classes_say_what_was_asked(speed: str) -> None:
    rate = Rate.parse(speed)
    tree = htb.build(plan(default_floor=0.1), rate)
    nodes = {n.handle: settings(n.kind, n.type, n.options) for n in tree.nodes}
    link = nodes[ROOT | 1]
    assert link["rate"] == link["ceil"] == int(rate.bytes_per_s)
    assert link["buffer"] == link["cbuffer"]
    # Enough for a timer 100 us late, or one largest packet.
    size = int(link["buffer"]) * 64e-9 * rate.bytes_per_s
    assert size >= max(65536, rate.bytes_per_s * 100e-6) * 0.999
    assert size <= max(1 << 20, rate.bytes_per_s * 1e-4) * 1.01
    for band in tree.bands:
        floor = int(rate.bytes_per_s * band.spec.floor) or 1
        prio = max(band.spec.index - 1, 0)  # control and the first level share one
        for lane in range(band.lanes):
            leaf = nodes[band.classid + lane]
            assert leaf["prio"] == prio
            assert leaf["ceil"] == int(rate.bytes_per_s)
            assert int(leaf["quantum"]) >= 65536
            assert leaf["rate"] == (floor if band.lanes == 1 else 1)
        if band.lanes > 1:
            assert nodes[band.classid - 1]["rate"] == floor


def test_htb_layout_has_parents_first_and_the_default_class_third() -> None:
    tree = htb.build(plan(), Rate.parse("1gbit"))
    made = {tc.TC_H_ROOT}
    for node in tree.nodes:
        assert node.parent in made
        made.add(node.handle)
    default = tree.bands[3]
    assert default.spec.name == "default"
    assert tree.nodes[2].handle == default.classid
    assert settings("htb", "qdisc", tree.root.options)["default"] == default.classid & 0xFFFF
    assert set(tree.counter_classes.values()) == set(range(8))


def test_htb_has_eight_priorities_and_says_so() -> None:
    assert len(htb.build(plan(5), Rate.parse("1gbit")).bands) == 9
    with pytest.raises(ValueError, match=r"6 levels, but htb has 8 priorities: set bands.levels to at most 5"):
        htb.build(plan(6), Rate.parse("1gbit"))


def test_lanes_have_limits() -> None:
    with pytest.raises(ValueError, match="4094 at most"):
        htb.build(plan(lanes=4095), Rate.parse("1gbit"))
    with pytest.raises(ValueError, match="15000 lanes in all, at most 10240 allowed"):
        htb.build(plan(lanes=2500), Rate.parse("1gbit"))


@given(levels=st.integers(1, 5), lanes=st.integers(1, 300), after=st.integers(0, 5))
def test_classids_and_leaf_handles_never_collide(levels: int, lanes: int, after: int) -> None:
    bands = Bands.build(levels, default_after=min(after, levels), lanes=lanes)
    tree = htb.build(bands, Rate.parse("10gbit"))
    handles = [n.handle for n in tree.nodes]
    assert len(set(handles)) == len(handles)
    leaves = [
        LEAF_MAJORS.start + 2 * (b.first_leaf + lane) + turn
        for b in tree.bands
        if b.spec.role in PURGEABLE
        for lane in range(b.lanes)
        for turn in (0, 1)
    ]
    assert len(set(leaves)) == len(leaves)
    assert all(leaf in LEAF_MAJORS for leaf in leaves)
    assert all(lane >> 16 == ROOT >> 16 for lane in tree.counter_classes)


def test_prio_at_line_rate() -> None:
    tree = prio.build(plan(), None, lanes=False, weights=False)
    (root,) = tree.nodes
    assert (root.kind, root.handle, root.parent) == ("prio", ROOT, tc.TC_H_ROOT)
    assert root.options == struct.pack("=i16B", 8, *[3] * 16)
    assert [(b.classid, b.lanes) for b in tree.bands] == [(ROOT | i + 1, 1) for i in range(8)]
    assert tree.filters == []
    assert tree.counters_reset


def test_prio_with_lanes_leads_drrs_major_numbers_to_the_bands() -> None:
    tree = prio.build(plan(), None, lanes=True, weights=False)
    drr = [n for n in tree.nodes if n.kind == "drr" and n.type == "qdisc"]
    assert [(n.handle, n.parent) for n in drr] == [((CHILD_MAJOR + i) << 16, ROOT | i + 1) for i in (1, 2, 4, 5, 6, 7)]
    assert tree.filters[-1] == Filter(ROOT, tuple((CHILD_MAJOR + i, ROOT | i + 1) for i in (1, 2, 4, 5, 6, 7)), 0)
    assert tree.filters[0] == Filter((CHILD_MAJOR + 1) << 16, (), (CHILD_MAJOR + 1) << 16 | 1)
    assert [b.classid for b in tree.bands][:2] == [ROOT | 1, (CHILD_MAJOR + 1) << 16 | 1]
    lane = next(n for n in tree.nodes if n.handle == (CHILD_MAJOR + 6) << 16 | 4)
    assert settings("drr", "class", lane.options) == {"quantum": 69632}


@pytest.mark.parametrize("speed", SPEEDS)
def test_tbf_above_prio_lets_large_packets_through_whole(speed: str) -> None:
    rate = Rate.parse(speed)
    tree = prio.build(plan(), rate, lanes=False, weights=False)
    root, child = tree.nodes
    assert (root.kind, root.handle, root.parent) == ("tbf", SHAPER_MAJOR << 16, tc.TC_H_ROOT)
    assert (child.kind, child.parent) == ("prio", SHAPER_MAJOR << 16 | 1)
    shown = settings("tbf", "qdisc", root.options)
    assert shown["rate"] == int(rate.bytes_per_s)
    assert int(shown["buffer"]) * 64e-9 * rate.bytes_per_s >= 2 * 65536


@pytest.mark.parametrize("speed", SPEEDS)
def test_htb_above_prio_with_lanes(speed: str) -> None:
    """It takes packets without looking first, which drr would take out of their lane for that."""
    rate = Rate.parse(speed)
    tree = prio.build(plan(), rate, lanes=True, weights=False)
    root, link, child = tree.nodes[:3]
    assert (root.kind, root.handle, root.parent) == ("htb", SHAPER_MAJOR << 16, tc.TC_H_ROOT)
    assert (link.kind, link.type, link.handle) == ("htb", "class", SHAPER_MAJOR << 16 | 1)
    assert (child.kind, child.parent) == ("prio", SHAPER_MAJOR << 16 | 1)
    shown = settings("htb", "class", link.options)
    assert shown["rate"] == shown["ceil"] == int(rate.bytes_per_s)
    with_floors = prio.build(plan(), rate, lanes=True, weights=True)
    assert with_floors.nodes[0].kind == "tbf"


def test_prio_has_sixteen_bands() -> None:
    assert len(prio.build(plan(12), None, lanes=True, weights=True).bands) == 16


@pytest.mark.parametrize("lanes", [False, True])
@pytest.mark.parametrize("weights", [False, True])
def test_a_tree_equals_itself(lanes: bool, weights: bool) -> None:  # noqa: FBT001 - the shapes
    for tree in (
        htb.build(plan(), Rate.parse("400gbit")),
        prio.build(plan(), Rate.parse("1gbit"), lanes=lanes, weights=weights),
        prio.build(plan(), None, lanes=lanes, weights=weights),
    ):
        assert differences(tree, *objects(tree)) == []


def test_differences_say_what_it_takes() -> None:
    tree = htb.build(plan(), Rate.parse("1gbit"))
    qdiscs, classes = objects(tree)

    (missing,) = differences(tree, qdiscs, classes[:-1])
    assert (missing.how, missing.text) == (How.ADD, "class htb 6d66:8004 is missing")

    faster = objects(htb.build(plan(), Rate.parse("2gbit")))
    assert {d.how for d in differences(tree, *faster)} == {How.CHANGE}
    assert "rate 250000000 instead of 125000000" in differences(tree, *faster)[0].text

    fewer = htb.build(plan(3), Rate.parse("1gbit"))
    assert {d.how for d in differences(fewer, qdiscs, classes)} == {How.REBUILD}
    assert {d.how for d in differences(tree, *objects(fewer))} == {How.ADD}
    moved = htb.build(plan(4, default_after=1), Rate.parse("1gbit"))
    assert How.REBUILD in {d.how for d in differences(moved, qdiscs, classes)}

    extra = dataclasses.replace(classes[0], handle=ROOT | 0x99)
    (alien,) = differences(tree, qdiscs, [*classes, extra])
    assert alien.how is How.REBUILD

    leaf = tc.TcObject("pfifo", 0x10000000, ROOT | 0x2001, 2, None, {})
    assert differences(tree, [*qdiscs, leaf], classes) == []
    (wrong,) = differences(tree, [*qdiscs, dataclasses.replace(leaf, parent=ROOT | 0x4001)], classes)
    assert wrong.how is How.REMOVE, "a queue under the default band is not a rescue's"
    assert wrong.command == "tc qdisc del dev DEV parent 6d66:4001 handle 1000:"
    # What hangs below somebody's queue goes with it.
    below = [
        tc.TcObject("htb", 0x770000, ROOT | 0x2001, 2, None, {}),
        tc.TcObject("pfifo", 0x780000, 0x770001, 2, None, {}),
    ]
    inside = tc.TcObject("htb", 0x770001, 0x770000, 0, None, {})
    (top,) = differences(tree, [*qdiscs, *below], [*classes, inside])
    assert (top.how, top.text) == (How.REMOVE, "qdisc htb 77: is not ours")


def test_ticks_round_up_like_tc() -> None:
    assert ticks(125_000, 125_000_000) == 15625
    assert ticks(1, 1) == 15_625_000
    assert ticks(1, 50_000_000_000) == 1


def stats_message(*, wide: bool, extra: bytes = b"") -> bytes:
    """A class as dumped: rate64 options or a 64-bit packet counter give messages of the same length."""
    basic = nl.attr(1, struct.pack("=QII", 1000, 10, 0))
    queue = nl.attr(3, struct.pack("=IIIII", 3, 300, 2, 0, 0))
    inner = basic + (nl.attr(8, struct.pack("=Q", 1 << 33)) if wide else b"") + queue
    body = tc.kind_attr("htb") + extra + nl.attr(tc.TCA_STATS2, inner)
    return tc.message(tc.RTM_NEWTCLASS, 0, 1, ROOT | 1, 0, body=body)


def test_counters_are_found_wherever_they_are() -> None:
    narrow = stats_message(wide=False, extra=nl.attr(tc.TCA_OPTIONS, b"12345678"))
    wide = stats_message(wide=True)
    assert len(narrow) == len(wide)
    reader = tc.StatsReader()
    for _ in range(2):
        first, second = nl.messages(narrow + wide)
        assert reader.read(first) == tc.Stats(1000, 10, 2, 300, 3)
        assert reader.read(second) == tc.Stats(1000, 1 << 33, 2, 300, 3)
    empty = tc.message(tc.RTM_NEWTCLASS, 0, 1, ROOT | 1, 0, body=tc.kind_attr("htb"))
    assert reader.read(only(empty)) == tc.Stats(0, 0, 0, 0, 0)


@given(st.binary(max_size=200))
def test_cut_or_garbled_attributes_never_raise(data: bytes) -> None:
    nl.attrs(data)
    m = only(nl.request(40, 0, tc.TCMSG.pack(0, 0, 0, 1, 2, 3, 4) + data))
    tc.parse_object(m)
    tc.StatsReader().read(m)


def test_a_snapshot_survives_its_file_and_refuses_anything_else() -> None:
    snapshot = Snapshot(
        (Saved("qdisc", "htb", 0x10000, tc.TC_H_ROOT, b"\1\2"), Saved("qdisc", "pfifo", 0, 0x10001, None)),
        (Saved("class", "htb", 0x10001, tc.TC_H_ROOT, b"\3"),),
        1000,
    )
    assert Snapshot.from_json(snapshot.to_json()) == snapshot
    for broken in ({}, {"qdiscs": [], "classes": [], "txqlen": 1}, {"qdiscs": [{"kind": "htb"}]}):
        with pytest.raises((KeyError, ValueError)):
            Snapshot.from_json(broken)


@given(st.integers(0, 100_000_000))
def test_codels_times_survive_being_dumped_and_set(asked: int) -> None:
    def stored(us: int) -> int:
        return us * 1000 >> 10

    dumped = (stored(asked) << 10) // 1000
    assert stored(codel_request(dumped)) == stored(asked)


def test_a_replay_makes_parents_first_and_queues_with_their_class() -> None:
    def q(handle: int, parent: int) -> Saved:
        return Saved("qdisc", "pfifo" if handle != 0x10000 else "htb", handle, parent, None)

    def c(handle: int, parent: int) -> Saved:
        return Saved("class", "htb", handle, parent, None)

    root = q(0x10000, tc.TC_H_ROOT)
    classes = (c(0x10011, 0x10010), c(0x10010, 0x10001), c(0x10020, 0x10001), c(0x10001, tc.TC_H_ROOT))
    order = Snapshot((root, q(0x300000, 0x10020), q(0x400000, 0x10011)), classes, 1).ordered()
    handles = [item.handle for item in order]
    assert handles[0] == 0x10000
    for item in order[1:]:
        assert item.parent == tc.TC_H_ROOT or handles.index(item.parent) < handles.index(item.handle)
    assert handles.index(0x400000) == handles.index(0x10011) + 1
    assert handles.index(0x300000) == handles.index(0x10020) + 1
    with pytest.raises(ValueError, match="no parent"):
        Snapshot((root, q(0x300000, 0x990001)), (), 1).ordered()


@given(
    levels=st.integers(1, 8),
    floors=st.lists(st.floats(0, 0.08), max_size=8),
    guaranteed=st.dictionaries(st.integers(0, 11), st.floats(0, 1.5)),
)
def test_weights_give_floors_and_guarantees_and_all_there_is(
    levels: int, floors: list[float], guaranteed: dict[int, float]
) -> None:
    bands = Bands.build(levels, default_after=1, lanes=1, level_floors=tuple(floors[:levels]))
    shares = ets.shares(bands, guaranteed)
    own = [max(b.floor, guaranteed.get(b.index, 0.0)) for b in bands.bands[ets.STRICT :]]
    assert sum(shares) == pytest.approx(1.0)
    assert all(share >= wanted / max(sum(own), 1.0) - 1e-9 for share, wanted in zip(shares, own, strict=True))
    if sum(own) < 1 - 1e-6:
        extra = [share - wanted for share, wanted in zip(shares, own, strict=True)]
        assert all(a >= 2.9 * b for a, b in itertools.pairwise(extra[:-1])), "the earlier, the more"


def test_ets_gives_what_is_guaranteed() -> None:
    bands = plan(default_floor=0.1)
    tree = prio.build(bands, None, lanes=True, weights=True)
    assert tree.floors
    assert tree.guarantee is not None
    changed = tree.with_nodes(tree.guarantee({4: 0.4}))
    (off, *others) = [d for d in differences(changed, *objects(tree)) if "6d66:5" in d.text]
    assert (off.how, others) == (How.CHANGE, [])
    assert {d.how for d in differences(changed, *objects(tree))} == {How.CHANGE}
    quanta = [
        int(settings("ets", "class", n.options)["quantum"]) for n in changed.nodes if n.type == "class" and n.made
    ]
    assert quanta[3] / sum(quanta) >= 0.4 - 1e-5
    assert all(only(n.message(7)).flags & nl.NLM_CREATE == 0 for n in changed.nodes if n.made)
