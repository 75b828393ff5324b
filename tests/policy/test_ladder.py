# SPDX-License-Identifier: Apache-2.0
"""Any number of policy levels onto the bands that a qdisc has, order preserved."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mfsd.bands import LEVEL_NEW, LEVEL_NONE, LEVEL_SCAVENGER, Bands, Ladder
from mfsd.policy import registry


def _plan(bands: int, after: int = 1) -> Bands:
    return Bands.build(bands, default_after=after, lanes=1)


@given(bands=st.integers(1, 13), levels=st.integers(1, 4096), data=st.data())
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
    ladder = Ladder(_plan(13, 4), 8)
    assert ladder.bands(np.arange(8, dtype=np.int16)).tolist() == [1, 2, 3, 4, 6, 7, 8, 9]


def test_what_is_no_level_has_its_own_band() -> None:
    plan = _plan(5, 2)
    levels = np.array([LEVEL_NONE, LEVEL_SCAVENGER, 0, 4, 700], dtype=np.int16)
    last = plan.level_bands[-1].index
    assert Ladder(plan, 5).bands(levels).tolist() == [plan.default.index, plan.scavenger.index, 1, last, last]


def test_the_most_urgent_of_a_set_is_a_minimum() -> None:
    """Of any level that a policy may have, what no policy has looked at yet, and the given up."""
    ranks = np.array([0, registry.MAX_LEVELS - 1, LEVEL_NEW, LEVEL_SCAVENGER], dtype=np.int16)
    assert np.unique(ranks).tolist() == ranks.tolist()
    assert LEVEL_NONE < 0


DEFAULT_AFTER = {
    "deadline-ladder": (3, 4, 7),
    "mfs": (3, 4, 7),
    "mfs-nop1": (2, 4, 6),
    "mfs-giveup": (3, 4, 7),
    "fair": (1, 1, 1),
    "two-class": (1, 1, 1),
    "sjf": (3, 4, 7),
    "srpt": (3, 4, 7),
    "pias": (3, 4, 7),
    "edf": (4, 7, 12),
    "edf-all": (3, 4, 7),
    "karuna": (4, 7, 12),
    "sincronia": (4, 7, 12),
    "llf": (5, 8, 13),
}
"""Levels above unhinted traffic, of 5 (htb's 8 bands), 8 and 13 (prio's 16)."""


@pytest.mark.parametrize("name", registry.names())
def test_unhinted_traffic_stands_where_each_policy_says(name: str) -> None:
    policies = [registry.make_policy(name, levels) for levels in (5, 8, 13)]
    assert tuple(p.default_after for p in policies) == DEFAULT_AFTER[name]
    for policy in policies:
        bands = _plan(policy.levels, policy.default_after)
        assert len(set(Ladder(bands, policy.levels).band_of.tolist())) == policy.levels
