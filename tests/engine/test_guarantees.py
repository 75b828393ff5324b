# SPDX-License-Identifier: Apache-2.0
"""What a policy guarantees reaches the devices as shares of their bands."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.harness import FakeDevice

from mfsd.engine.estimator import LinkEstimator
from mfsd.engine.guarantees import MOST_STANDING, REPEAT_S, STEP, UNUSED, Guarantees, draining
from mfsd.engine.rescue import DRAIN
from mfsd.ground.bands import HINTED, Bands, Ladder
from mfsd.policy.usage import WIRE

RATE = 1e12
"""So fast that no standing rate is needed."""
SLOW = 25e6


def _bands(levels: int = 5) -> Bands:
    return Bands.build(levels, default_after=min(levels, 4), lanes=4)


def _one(bands: Bands, rate: float = RATE) -> tuple[Guarantees, FakeDevice]:
    device = FakeDevice(LinkEstimator(rate, len(bands)))
    return Guarantees([device], bands), device


@given(st.lists(st.floats(0, RATE), min_size=5, max_size=5), st.sampled_from([1, 2, 3, 5]))
def test_each_band_gets_at_least_what_its_levels_are_guaranteed(asked: list[float], levels: int) -> None:
    """On the wire, on top of its floor, but never more than the link; other bands are not named."""
    bands = _bands(levels)
    guarantees, device = _one(bands)
    ladder = Ladder(bands, 5)
    guarantees.give(np.array([asked]), ladder, 1.0)
    for band in bands.bands:
        of = sum(a for level, a in enumerate(asked) if ladder.band_of[level] == band.index) * WIRE / RATE
        share = device.guaranteed.get(band.index, 0.0)
        if of:
            assert min(of + band.floor, 1.0) <= share + 1e-9 <= min(of + band.floor + STEP, 1.0) + 2e-9
        else:
            assert share == 0.0


def test_what_is_given_up_is_served_in_the_last_band() -> None:
    bands = _bands()
    guarantees, device = _one(bands)
    guarantees.give(
        np.array([[0.0, 0.0, 0.3 * RATE, 0.0, 0.0]]), Ladder(bands, 5), 1.0, given_up=np.array([0.2 * RATE])
    )
    assert 0.21 + bands.scavenger.floor <= device.guaranteed[bands.scavenger.index] <= 0.23 + bands.scavenger.floor
    assert guarantees.extra[0] == pytest.approx(0.3 * WIRE, abs=STEP)  # nobody takes that along
    assert bands.scavenger.index not in guarantees.standing(0)
    guarantees.give(np.zeros((1, 5)), Ladder(bands, 5), 1.1, given_up=np.zeros(1))
    assert device.guaranteed == {}


def test_a_device_is_told_when_it_changes_and_once_in_a_while() -> None:
    bands = _bands()
    guarantees, device = _one(bands)
    ladder, asked = Ladder(bands, 5), np.array([[0.0, 0.0, 0.31 * RATE, 0.0, 0.0]])
    told = []
    for now, factor in (
        (0.0, 1.0),
        (0.1, 1.0),
        (0.2, 1.001),
        (0.3, 1.5),
        (0.4, 0.0),
        (0.5, 0.0),
        (0.6 + REPEAT_S, 0.0),
    ):
        device.guaranteed = {-1: 1.0}
        guarantees.give(asked * factor, ladder, now)
        told.append(device.guaranteed != {-1: 1.0})
    assert told == [True, False, False, True, True, False, True]
    assert device.guaranteed == {}


def test_what_is_only_observed_is_told_when_it_is_enforced() -> None:
    bands = _bands()
    guarantees, device = _one(bands)
    device.enforced = False
    asked = np.array([[0.0, 0.0, 0.5 * RATE, 0.0, 0.0]])
    guarantees.give(asked, Ladder(bands, 5), 0.0)
    assert (device.guaranteed, guarantees.shares(0)) == ({}, {})
    device.enforced = True
    guarantees.give(asked, Ladder(bands, 5), 0.01)
    assert device.guaranteed == guarantees.shares(0) == {3: pytest.approx(0.54)}


def test_on_slow_links_bands_above_the_default_one_have_a_standing_rate() -> None:
    """A packet of 68 kB takes 20 ms at 3.4 MB/s: 13.6 % of 200 Mbit/s, which is too much, and 0.34 % of 8 Gbit/s."""
    bands = _bands()
    none = np.zeros((1, 5))
    guarantees, device = _one(bands, SLOW)
    guarantees.collectives = 2
    guarantees.give(none, Ladder(bands, 5), 0.0)
    assert device.guaranteed == dict.fromkeys((1, 3, 4), MOST_STANDING)
    assert guarantees.standing(0) == {1, 3, 4}
    guarantees.give(np.array([[0, 0, SLOW / 2, 0, 0]]), Ladder(bands, 5), 0.0)
    assert device.guaranteed[3] == pytest.approx(0.54)
    assert guarantees.standing(0) == {1, 4}
    guarantees.drain(0.0)
    assert guarantees.standing(0) == set()
    fast, device = _one(bands, 125e6)
    fast.give(none, Ladder(bands, 5), 0.0)
    assert device.guaranteed[1] == pytest.approx(0.0272)
    without, device = _one(bands, SLOW)
    without.give(None, Ladder(bands, 5), 0.0)
    assert device.guaranteed == {}


def test_draining_puts_all_hinted_bands_before_unhinted_traffic() -> None:
    bands = _bands()
    guarantees, device = _one(bands)
    guarantees.drain(0.0)
    assert device.guaranteed == draining(bands)
    assert {bands.bands[i].role for i in device.guaranteed} == HINTED
    guarantees.give(None, Ladder(bands, 5), 0.01)
    assert device.guaranteed == {}


@given(st.lists(st.floats(0, 0.2 * RATE), min_size=4, max_size=4), st.floats(0.01, 0.99), st.floats(0.01, 1.0))
def test_who_takes_along_what_it_is_guaranteed_takes_it_from_nobody(
    asked: list[float], part: float, other: float
) -> None:
    bands = _bands()
    (plain, before), (moving, after) = _one(bands), _one(bands)
    ladder, guarantee = Ladder(bands, 5), np.array([[*asked, 0.0]])
    plain.give(guarantee, ladder, 1.0)
    low = [bands.level_bands[-1].index, bands.background.index]
    moving.give(guarantee, ladder, 1.0, {(0, low[0]): part, (0, low[1]): other * (1.0 - part)})
    extra = sum(share - bands.floors[band] for band, share in before.guaranteed.items())
    assert moving.extra[0] == pytest.approx(extra)
    if not extra:
        return
    there = sum(after.guaranteed[band] - bands.floors[band] for band in low if band in after.guaranteed)
    above = {band: share for band, share in after.guaranteed.items() if band not in low}
    assert all(bands.floors[band] - 1e-9 <= share <= before.guaranteed[band] + 1e-9 for band, share in above.items())
    assert all(after.guaranteed[band] - bands.floors[band] >= min(DRAIN, extra) / 2 - 1e-9 for band in low)
    assert there + sum(share - bands.floors[band] for band, share in above.items()) == pytest.approx(extra)


def test_without_a_known_rate_there_is_nothing_to_share_out() -> None:
    bands = _bands()
    guarantees, device = _one(bands, 0.0)
    guarantees.give(np.full((1, 5), RATE), Ladder(bands, 5), 0.0)
    assert device.guaranteed == {}


def test_what_is_given_is_in_bytes_and_leaves_out_what_nobody_asked_for() -> None:
    bands = _bands()
    guarantees, device = _one(bands, SLOW)
    assert guarantees.given(0) == {}
    ladder = Ladder(bands, 5)
    guarantees.give(np.array([[0.0, 0.0, 0.3 * SLOW, 0.0, 0.0]]), ladder, 0.0)
    ((band, rate),) = guarantees.given(0).items()
    assert band == ladder.band_of[2]
    assert guarantees.standing(0)
    assert guarantees.left(0) == 1.0  # nobody sends anything
    device.estimator.band_load[band] = UNUSED
    assert guarantees.left(0) == pytest.approx(1.0 - rate / SLOW)  # others send nothing
    load, others = device.estimator.band_load, ladder.band_of[3]
    load[bands.default.index], load[bands.background.index], load[band], load[others] = 0.5, 0.001, 0.5, 0.6
    standing = guarantees.shares(0)[others]
    assert standing > bands.bands[others].floor
    used = rate / SLOW + bands.default.floor + 0.001 + standing
    assert guarantees.left(0) == pytest.approx(1.0 - used)
    guarantees.collectives = int(ladder.band_of[1])
    load[guarantees.collectives] = 0.9
    assert guarantees.left(0) == pytest.approx(1.0 - used)  # their own floor is no obstacle
    assert 0.3 * WIRE <= rate / SLOW - bands.bands[band].floor <= 0.3 * WIRE + STEP + 1e-9
    device.floors = False
    assert guarantees.given(0) == {}
    assert guarantees.left(0) == 1.0


@pytest.mark.parametrize(("rate", "share"), [(2.5e6, 0.485), (25e6, 0.136), (1e9, 0.01)])
def test_who_has_taken_along_all_that_it_is_guaranteed_is_not_in_debt_for_long(rate: float, share: float) -> None:
    """After one packet of 68 kB: as short as half of the guarantee lets it be, and no longer than 20 ms as a rule."""
    bands = _bands()
    guarantees, device = _one(bands, rate)
    low = bands.level_bands[-1].index
    guarantees.give(np.array([[0.0, 0.0, 0.9 * rate, 0.0, 0.0]]), Ladder(bands, 5), 1.0, {(0, low): 1.0})
    first = bands.level_bands[2].index
    assert device.guaranteed[first] == pytest.approx(share, abs=0.01)
    both = device.guaranteed[first] + device.guaranteed[low] - bands.floors[[first, low]].sum()
    assert both == pytest.approx(guarantees.extra[0])


def test_a_band_from_which_somebody_is_to_be_promoted_is_not_in_debt_for_long_either() -> None:
    """Lanes of htb send their first packet whatever their band is allowed, and that band owes it."""
    bands = _bands()
    guarantees, device = _one(bands, SLOW)
    low = bands.level_bands[-1].index
    guarantees.give(np.zeros((1, 5)), Ladder(bands, 5), 0.0, rising={low})
    assert device.guaranteed[low] == MOST_STANDING
    assert low in guarantees.standing(0)
    guarantees.give(np.zeros((1, 5)), Ladder(bands, 5), 0.1)
    assert low not in device.guaranteed
