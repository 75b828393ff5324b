# SPDX-License-Identifier: Apache-2.0
"""Any number of policy levels onto the bands that a qdisc has, order preserved."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mfsd.ground.bands import (
    BACKGROUND_FLOOR,
    CONTROL_FLOOR,
    DEFAULT_FLOOR,
    HTB_PRIOS,
    LEVEL_BACKGROUND,
    LEVEL_FLOOR,
    LEVEL_NEW,
    LEVEL_NONE,
    LEVEL_SCAVENGER,
    MAX_HTB_LEVELS,
    MAX_LEVELS,
    PRIO_BANDS,
    SCAVENGER_FLOOR,
    Bands,
    Classes,
    Ladder,
    Urgency,
    band_names,
)
from mfsd.policy import registry


def _plan(bands: int, after: int = 1) -> Bands:
    return Bands.build(bands, default_after=after, lanes=1)


@given(bands=st.integers(1, MAX_LEVELS), levels=st.integers(1, 4096), data=st.data())
def test_order_is_preserved_and_no_band_is_wasted(bands: int, levels: int, data: st.DataObject) -> None:
    after = data.draw(st.integers(0, bands))
    plan = _plan(bands, after)
    ladder = Ladder(plan, levels)
    steps = ladder.band_of.astype(int)
    assert (np.diff(steps) >= 0).all()
    legal = [b.index for b in plan.level_bands]
    assert set(steps.tolist()) <= set(legal)
    assert len(set(steps.tolist())) == min(bands, levels)
    if levels >= 2 and bands >= 2:
        assert steps[0] < steps[1]  # the first level is never merged
    sizes = np.unique(steps[1:], return_counts=True)[1]
    if len(sizes):
        assert sizes.max() - sizes.min() <= 1


def test_enough_bands_means_one_each() -> None:
    ladder = Ladder(_plan(12, 4), 8)
    assert ladder.bands(np.arange(8, dtype=np.int16)).tolist() == [1, 2, 3, 4, 6, 7, 8, 9]


@given(bands=st.integers(1, MAX_LEVELS), levels=st.integers(1, 4096))
def test_every_int16_has_a_band(bands: int, levels: int) -> None:
    plan = _plan(bands)
    ladder = Ladder(plan, levels)
    every = np.arange(-(1 << 15), 1 << 15).astype(np.int16)
    expected = ladder.band_of.take(every, mode="clip")
    for level, spec in (
        (LEVEL_NONE, plan.default),
        (LEVEL_BACKGROUND, plan.background),
        (LEVEL_SCAVENGER, plan.scavenger),
    ):
        expected[every == level] = spec.index
    assert ladder.bands(every).tolist() == expected.tolist()


def test_what_is_no_level_has_its_own_band() -> None:
    plan = _plan(5, 2)
    levels = np.array([LEVEL_NONE, LEVEL_SCAVENGER, LEVEL_BACKGROUND, 0, 4, 700], dtype=np.int16)
    last, others = plan.level_bands[-1].index, (plan.default, plan.scavenger, plan.background)
    assert Ladder(plan, 5).bands(levels).tolist() == [*(b.index for b in others), 1, last, last]


def test_bands_stand_in_strict_order_with_floors_for_all() -> None:
    plan = Bands.build(5, default_after=4, lanes=7)
    names = [f"level {i}" for i in range(5)]
    assert [b.name for b in plan.bands] == ["control", *names[:4], "default", names[4], "background", "scavenger"]
    assert set(band_names(5)) == {b.name for b in plan.bands}
    assert [b.index for b in plan.bands] == list(range(9))
    assert [b.lanes for b in plan.bands] == [1, 7, 7, 7, 7, 1, 7, 7, 7]
    floors = {b.name: b.floor for b in plan.bands}
    others = {
        "control": CONTROL_FLOOR,
        "default": DEFAULT_FLOOR,
        "background": BACKGROUND_FLOOR,
        "scavenger": SCAVENGER_FLOOR,
    }
    assert floors == others | dict.fromkeys(names, LEVEL_FLOOR)
    assert min(floors.values()) > 0
    given = Bands.build(3, default_after=0, lanes=1, level_floors=(0.0, 0.2))
    assert [b.floor for b in given.level_bands] == [0.0, 0.2, LEVEL_FLOOR]
    with pytest.raises(ValueError, match="the floors add up to 95% of the link; at most 90% can be guaranteed"):
        Bands.build(1, default_after=0, lanes=1, level_floors=(0.8,))


@pytest.mark.parametrize("after", range(MAX_HTB_LEVELS + 1))
def test_as_many_levels_fit_htb_and_prio_as_they_say(after: int) -> None:
    """Htb has a priority for each band, since control shares one; a prio qdisc has a band for each."""
    assert (MAX_HTB_LEVELS, MAX_LEVELS) == (5, 12)
    plan = _plan(MAX_HTB_LEVELS, after)
    assert [b.prio for b in plan.bands] == [0, *range(HTB_PRIOS)]
    assert len(_plan(MAX_LEVELS, after)) == PRIO_BANDS
    with pytest.raises(ValueError, match="must be 1 to 12"):
        _plan(MAX_LEVELS + 1)


def test_classes_of_bands_are_those_of_their_levels() -> None:
    urgent, middle, last = Urgency
    plan, four = _plan(3, 1), Classes((urgent, middle, middle, last))
    # Control, level band 0, default, level bands 1 and 2 (levels 1, and 2 and 3), background, scavenger.
    assert Ladder(plan, 4).band_of.tolist() == [1, 3, 3, 4]
    assert Ladder(plan, 4).classes(four) == (urgent, urgent, middle, middle, last, last, last)
    merged = Classes((urgent, last, urgent, last), default=urgent, background=middle, scavenger=middle)
    assert Ladder(plan, 4).classes(merged) == (urgent, urgent, urgent, last, last, middle, middle)
    with pytest.raises(ValueError, match="4 classes for 3 levels"):
        Ladder(plan, 3).classes(four)


CLASSES = {
    "demand-bound": "uuumm",
    "deadline-ladder": "ummmm",
    "mfs": "uummm",
    "mfs-nop1": "ummmm",
    "mfs-giveup": "uummm",
    "fair": "u",
    "two-class": "um",
    "sjf": "uuumm",
    "srpt": "uuumm",
    "pias": "ummmm",
    "edf": "ummmm",
    "edf-all": "ummmm",
    "karuna": "uuumm",
    "sincronia": "uuumm",
    "llf": "ummmm",
}
"""Of the levels (5, or as many as there are): u urgent, m middle, l last."""


@pytest.mark.parametrize("name", registry.names())
def test_policies_say_what_the_fabric_should_hurry(name: str) -> None:
    policy = registry.make_policy(name, len(CLASSES[name]))
    classes = policy.classes
    assert "".join(c[0] for c in classes.levels) == CLASSES[name]
    assert (classes.default, classes.background, classes.scavenger) == (Urgency.MIDDLE, Urgency.LAST, Urgency.LAST)


def test_those_who_can_wait_for_long_are_last_in_the_fabric() -> None:
    levels = registry.make_policy("demand-bound", 12).classes.levels
    assert "".join(c[0] for c in levels) == "uuummmmmllll"
    assert "".join(c[0] for c in registry.make_policy("demand-bound", 3).classes.levels) == "uum"


def test_the_most_urgent_of_a_set_is_a_minimum() -> None:
    """Of any level that a policy may have, what no policy has looked at yet, and the given up."""
    ranks = np.array([0, registry.MAX_LEVELS - 1, LEVEL_BACKGROUND, LEVEL_NEW, LEVEL_SCAVENGER], dtype=np.int16)
    assert np.unique(ranks).tolist() == ranks.tolist()
    assert LEVEL_NONE < 0


DEFAULT_AFTER = {
    "demand-bound": (4, 4, 4),
    "deadline-ladder": (3, 4, 6),
    "mfs": (3, 4, 5),
    "mfs-nop1": (2, 4, 6),
    "mfs-giveup": (3, 4, 5),
    "fair": (1, 1, 1),
    "two-class": (1, 1, 1),
    "sjf": (3, 4, 6),
    "srpt": (3, 4, 6),
    "pias": (3, 4, 6),
    "edf": (4, 7, 11),
    "edf-all": (3, 4, 6),
    "karuna": (4, 7, 11),
    "sincronia": (4, 7, 11),
    "llf": (5, 8, 12),
}
"""Levels above unhinted traffic, of 5 (htb's 8 priorities), 8 and 12 (prio's 16 bands)."""


@pytest.mark.parametrize("name", registry.names())
def test_unhinted_traffic_stands_where_each_policy_says(name: str) -> None:
    policies = [registry.make_policy(name, levels) for levels in (5, 8, 12)]
    assert tuple(p.default_after for p in policies) == DEFAULT_AFTER[name]
    for policy in policies:
        bands = _plan(policy.levels, policy.default_after)
        assert len(set(Ladder(bands, policy.levels).band_of.tolist())) == policy.levels
