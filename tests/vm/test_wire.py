# SPDX-License-Identifier: Apache-2.0
"""Bare prio on a network card whose driver pushes back: no pacing of ours, the device itself fills the bands."""

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

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from support.namespaces import NetnsPair

pytestmark = [pytest.mark.netns, pytest.mark.feature("prio, bare, on a card that pushes back")]

FULL: Final = 500
"""Packets in a band's queue that last until all others are queued."""


@pytest.fixture
def wired(needs: Callable[..., None]) -> Iterator[NetnsPair]:
    needs("prio", "drr")
    with wired_namespaces() as pair:
        fixed_neighbours(pair)
        yield pair


@pytest.mark.parametrize("lanes", [1, 4])
def test_bands_are_strict_without_a_shaper(wired: NetnsPair, tmp_path: Path, lanes: int) -> None:
    with contextlib.ExitStack() as stack:
        stack.enter_context(wired.inside(wired.a))
        bench = PrioBench(wired, tmp_path / "state", stack)
        before = bench.shown()
        e = bench.enforcer(None, "prio", plan(lanes=lanes))
        e.apply()
        receiver = bench.receiver()
        first = [classid for classid, _ in e.band_maps()]
        busy = 0
        while e.backlog(LEVEL0, 0)[1] < FULL:
            assert busy < 20_000, "the device takes whatever it is given: no back-pressure"
            bench.send(first[LEVEL0], 100, tag=99)
            busy += 100
        for band, tag in ((SCAVENGER, 6), (LEVEL3, 5), (LEVEL2, 4), (DEFAULT, 3), (LEVEL1, 2)):
            lane = 0 if band == DEFAULT else lanes - 1
            bench.send(first[band] + lane, 40, tag=tag)
        bench.send(first[CONTROL], 10, tag=0)
        got = bench.tags(receiver, busy + 200 + 10)
        assert [t for t in got if t not in (0, 99)] == [2] * 40 + [3] * 40 + [4] * 40 + [5] * 40 + [6] * 40
        assert len(got) - 1 - got[::-1].index(99) < got.index(2), "level 0 goes before level 1"
        assert got.index(0) < len(got) - 1 - got[::-1].index(99), "control goes before level 0"
        assert e.verify() == []
        assert e.restore() == []
        assert bench.shown() == before
