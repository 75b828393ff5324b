# SPDX-License-Identifier: Apache-2.0
"""Backend prio on a network card whose driver pushes back: no pacing of ours, the device itself fills the bands."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

import pytest
from support.benches import plan
from support.prio_benches import (
    CONTROL,
    DEFAULT,
    LEVEL0,
    LEVEL1,
    LEVEL2,
    LEVEL3,
    SCAVENGER,
    PrioBench,
    fixed_neighbours,
)
from support.wires import wired_namespaces

from mfsd.datapath.facts import kernel_has
from mfsd.datapath.qdisc import plan as planning

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from support.namespaces import NetnsPair

    from mfsd.datapath.qdisc.enforcer import DeviceEnforcer

pytestmark = pytest.mark.netns

FULL: Final = 500
"""Packets in a band's queue that last until all others are queued."""
DEEP: Final = 900
"""The same where the others take their share meanwhile; leaves hold 1000."""


@pytest.fixture
def wired(needs: Callable[..., None]) -> Iterator[NetnsPair]:
    needs("prio", "ets", "drr")
    with wired_namespaces() as pair:
        fixed_neighbours(pair)
        yield pair


@contextlib.contextmanager
def bench_on(wired: NetnsPair, state: Path, lanes: int, *, weights: bool) -> Iterator[tuple[PrioBench, DeviceEnforcer]]:
    """The tree in force, which can be taken down without a trace afterwards."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(wired.inside(wired.a))
        bench = PrioBench(wired, state, stack, weights=weights)
        before = bench.shown()
        e = bench.enforcer(None, "prio", plan(lanes=lanes))
        e.apply()
        assert e.floors == weights
        yield bench, e
        assert e.verify() == []
        assert e.restore() == []
        assert bench.shown() == before


def fill(bench: PrioBench, e: DeviceEnforcer, packets: int) -> int:
    """Send to level 0 until so many wait in its queue; how many it took."""
    classid, sent = e.band_maps()[LEVEL0][0], 0
    while e.backlog(LEVEL0, 0)[1] < packets:
        assert sent < 20_000, "the device takes whatever it is given: no back-pressure"
        bench.send(classid, 100, tag=99)
        sent += 100
    return sent


@pytest.mark.feature("prio without ets, bare, on a card that pushes back: strict")
@pytest.mark.parametrize("lanes", [1, 4])
def test_bands_are_strict_without_ets(
    wired: NetnsPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lanes: int
) -> None:
    monkeypatch.setattr(planning, "kernel_has", lambda sock, kind: kind != "ets" and kernel_has(sock, kind))
    with bench_on(wired, tmp_path / "state", lanes, weights=False) as (bench, e):
        receiver = bench.receiver()
        first = [classid for classid, _ in e.band_maps()]
        busy = fill(bench, e, FULL)
        for band, tag in ((SCAVENGER, 6), (LEVEL3, 5), (LEVEL2, 4), (DEFAULT, 3), (LEVEL1, 2)):
            lane = 0 if band == DEFAULT else lanes - 1
            bench.send(first[band] + lane, 40, tag=tag)
        bench.send(first[CONTROL], 10, tag=0)
        got = bench.tags(receiver, busy + 200 + 10)
        assert [t for t in got if t not in (0, 99)] == [2] * 40 + [3] * 40 + [4] * 40 + [5] * 40 + [6] * 40
        assert len(got) - 1 - got[::-1].index(99) < got.index(2), "level 0 goes before level 1"
        assert got.index(0) < len(got) - 1 - got[::-1].index(99), "control goes before level 0"


@pytest.mark.feature("prio (ets), bare, on a card that pushes back: floors, nearly strict above them")
@pytest.mark.parametrize("lanes", [1, 4])
def test_bands_have_their_floors_without_a_shaper(wired: NetnsPair, tmp_path: Path, lanes: int) -> None:
    with bench_on(wired, tmp_path / "state", lanes, weights=True) as (bench, e):
        receiver = bench.receiver()
        first = [classid for classid, _ in e.band_maps()]
        busy = fill(bench, e, DEEP)
        for band in (SCAVENGER, LEVEL2, DEFAULT):
            bench.send(first[band] + (0 if band == DEFAULT else lanes - 1), DEEP // 2, tag=band)
        bench.send(first[CONTROL], 10, tag=CONTROL)
        got = bench.tags(receiver, busy + 3 * (DEEP // 2) + 10)
        last = len(got) - 1 - got[::-1].index(99)
        # From when all was queued until level 0 has nothing left. Before control goes what is in the card's ring.
        both = [t for t in got[got.index(CONTROL) : last] if t != CONTROL]
        assert len(both) > DEEP // 4, "control goes before level 0"
        floor = bench.bands.bands[DEFAULT].floor
        assert both.count(DEFAULT) >= 0.7 * floor * len(both), "default has its floor below a busy level"
        assert both.count(99) > 0.6 * len(both), "nearly strict"
