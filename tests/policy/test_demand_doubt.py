# SPDX-License-Identifier: Apache-2.0
"""Wrong sizes cost nobody more than plain sharing beside unhinted traffic would; links on which packets take long."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import policy_views as pv
from support.demand import COLLECTIVE, DEFERRED, FIRST, OTHERS, RATE, URGENT, alone, decide, demand_bound, shares

from mfsd.ground.bands import LEVEL_SCAVENGER

if TYPE_CHECKING:
    from mfsd.policy.views import Decision

BULK = 0.9
"""What unhinted traffic offers."""


def last(decision: Decision) -> float:
    """Share of the first device that what is given up gets."""
    return 0.0 if decision.given_up is None else float(decision.given_up[0]) / RATE


@pytest.mark.parametrize(("work", "share"), [(0.01, 0.1 / 0.945), (0.001, 0.01 / 0.945), (0.2, 0.5)])
def test_whoever_is_deferred_beside_unhinted_traffic_has_enough_for_ten_times_its_size(
    work: float, share: float
) -> None:
    decision = decide(alone(work, 1.0), unhinted=BULK)
    assert decision.level == [DEFERRED]
    assert shares(decision)[DEFERRED] == pytest.approx(share, abs=1e-4)


@given(work=st.floats(0.05, 0.5), slack=st.floats(3.0, 10.0), beside=st.sampled_from(["bulk", "collectives"]))
def test_whoever_is_ten_times_larger_than_announced_goes_at_a_pace_that_is_enough(
    work: float, slack: float, beside: str
) -> None:
    """Until all that was announced has left, with nothing but what it is guaranteed, at ticks of 10 ms."""
    size, due, tick = work / 10, work * slack, 0.01
    net: dict[str, Any] = {"unhinted": BULK} if beside == "bulk" else {"collectives": 1.0}
    sent = now = 0.0
    while sent < size:
        assert sent >= work * now / due - 1e-9
        decision = decide(alone(size, due - now, left=(size - sent) * RATE), **net)
        sent, now = sent + tick * sum(shares(decision)), now + tick


def test_what_is_sent_counts_once() -> None:
    """0.02 s of work announced, half of it sent, ten times that meant: 0.19 s are left."""
    for decision in (
        decide(alone(0.02, 1.0, left=0.01 * RATE), unhinted=BULK),
        decide(alone(0.02, 1.0, left=0.01 * RATE), collectives=1.0),
    ):
        assert shares(decision)[DEFERRED] == pytest.approx(0.19 / 0.945, abs=1e-4)


def test_so_has_who_is_small_beside_collectives_that_never_pause() -> None:
    assert shares(decide(alone(0.01, 1.0), collectives=1.0))[DEFERRED] == pytest.approx(0.1 / 0.945, abs=1e-4)
    assert shares(decide(alone(0.09, 1.0), collectives=1.0))[DEFERRED] == 0.5


def test_who_is_larger_has_what_it_needs_with_twice_the_margin_beside_collectives_that_never_pause() -> None:
    """Ten times that would not fit."""
    for work, need in ((0.1, 0.1 / 0.89), (0.3, 0.3 / 0.89), (0.46, 0.5)):
        decision = decide(alone(work, 1.0), collectives=1.0)
        assert decision.level == [DEFERRED]
        assert shares(decision) == [0.0] * 4 + [pytest.approx(1.1 * need, abs=1e-4)]
    assert shares(decide(alone(0.3, 1.0), collectives=0.79)) == [0.0] * 5  # they leave some


def test_what_others_are_guaranteed_is_part_of_that() -> None:
    """Of 0.4 s due in 1.2 s half, first: 0.6 s are due in 2 s, which takes less."""
    t = pv.transfers(2, left=np.array([0.4, 0.2]) * RATE, deadline=[0.7, 2.0], stage=3, level=[FIRST, DEFERRED])
    decision = decide(t, collectives=1.0)
    assert decision.level.tolist() == [FIRST, DEFERRED]
    assert shares(decision) == [0.0, 0.0, pytest.approx(1.1 * 0.4 / (0.7 * 0.97 - 0.025), abs=1e-3), 0.0, 0.0]


@given(due=st.floats(0.2, 5.0), pace=st.floats(0.11, 0.45), beside=st.floats(0.8, 1.0))
def test_whose_receiver_reads_slowly_is_in_time_beside_collectives_that_never_pause(
    due: float, pace: float, beside: float
) -> None:
    """It is just in time at the pace of its receiver, with the margin and nothing but what it is guaranteed."""
    left, now, tick = pace * (due * 0.97 - 0.025), 0.0, due / 200
    level = DEFERRED
    while left > 1e-9:
        assert now < due
        decision = decide(alone(pace * due, due - now, left=left * RATE, level=level), collectives=beside)
        (level,) = decision.level.tolist()
        left, now = left - tick * min(pace, sum(shares(decision))), now + tick


def test_who_has_had_what_it_needs_is_not_promoted_for_having_little_to_spare() -> None:
    for level, collectives, want in ((DEFERRED, 1.0, DEFERRED), (-1, 1.0, FIRST), (DEFERRED, 0.5, FIRST)):
        assert decide(alone(0.02, 0.11, level=level), collectives=collectives).level == [want]
    assert decide(alone(0.05, 0.11, level=DEFERRED), collectives=1.0).level == [FIRST]  # it needs it all the same


def test_what_goes_beyond_what_was_announced_has_half_beside_collectives_that_never_pause() -> None:
    nothing = alone(0.1, 1.0).take(np.zeros(0, dtype=np.intp))
    assert shares(decide(nothing, collectives=1.0, beyond=2, floor=0.2))[OTHERS] == 0.5
    assert shares(decide(nothing, collectives=1.0, beyond=0, floor=0.2)) == [0.0] * 5
    assert shares(decide(nothing, collectives=0.5, beyond=1, floor=0.2)) == [0.0] * 5  # they leave some
    beside = shares(decide(alone(0.5, 0.8), collectives=1.0, beyond=1, floor=0.2))
    assert beside[FIRST] == pytest.approx(1.1 * 0.5 / (0.8 * 0.97 - 0.025), abs=1e-3)
    assert beside[FIRST] + beside[OTHERS] == pytest.approx(0.8)  # those who said what they need come first


@given(collectives=st.just(0.0) | st.floats(0.01, 1.0))
def test_kv_of_which_only_the_stage_is_known_has_nearly_as_much_as_by_plain_sharing(collectives: float) -> None:
    nothing, where = alone(0.1, 1.0).take(np.zeros(0, dtype=np.intp)), np.zeros((1, 5), dtype=np.bool_)
    where[:, OTHERS] = True
    share = shares(decide(nothing, collectives=collectives, unannounced=where, floor=0.2))[OTHERS]
    assert 0.0 <= share <= 0.5
    on_average, plain = 1.0 - collectives / (collectives / (1.0 - share) + 1.0 - collectives), 1.0 / (1.0 + collectives)
    assert on_average >= 0.97 * plain - 1e-4
    if 0.0 < collectives < 0.8 and share > 0.0:
        assert on_average <= 0.97 * plain + 1e-4  # and collectives lose no more than that


def test_others_come_before_it() -> None:
    nothing, where = alone(0.1, 1.0).take(np.zeros(0, dtype=np.intp)), np.zeros((1, 5), dtype=np.bool_)
    assert shares(decide(nothing, collectives=1.0, unannounced=where, floor=0.2)) == [0.0] * 5
    where[:, [COLLECTIVE, DEFERRED]] = True
    assert shares(decide(nothing, collectives=1.0, unannounced=where, floor=0.2)) == [0.0] * 5
    where[:, OTHERS] = True
    beside = shares(decide(alone(0.5, 0.8), collectives=1.0, unannounced=where, floor=0.2))
    assert beside[FIRST] == pytest.approx(1.1 * 0.5 / (0.8 * 0.97 - 0.025), abs=1e-3)  # those who said what they need
    assert beside[OTHERS] == 0.0  # and collectives keep something
    beside = shares(decide(alone(0.4, 0.8), collectives=1.0, unannounced=where, floor=0.2))
    assert beside[FIRST] + beside[OTHERS] == pytest.approx(0.7)


def test_kv_without_a_deadline_is_no_worse_off() -> None:
    for stage, want in ((1, 0.5), (3, 0.5), (4, 0.0)):
        decision = decide(alone(0.1, math.inf, stage=stage), collectives=1.0)
        assert shares(decision)[OTHERS] == want


def test_who_waits_for_nobody_or_for_collectives_that_pause_is_guaranteed_nothing_meanwhile() -> None:
    assert shares(decide(alone(0.01, 1.0), unhinted=0.0)) == [0.0] * 5
    assert shares(decide(alone(0.01, 1.0), unhinted=BULK, collectives=0.2)) == [0.0] * 5


def test_the_guarantees_of_those_who_need_them_come_before() -> None:
    t = pv.transfers(2, left=np.array([0.5, 0.2]) * RATE, deadline=[0.9, 9.0], stage=3, level=[FIRST, DEFERRED])
    decision = decide(t, unhinted=BULK, floor=0.2)
    assert decision.level.tolist() == [FIRST, DEFERRED]
    assert shares(decision)[FIRST] == pytest.approx(1.1 * 0.5 / (0.9 * 0.97 - 0.025), abs=1e-3)
    assert sum(shares(decision)) == pytest.approx(0.8, abs=1e-3)


def test_one_that_can_not_be_in_time_has_half_of_what_nobody_is_guaranteed_until_it_is_due() -> None:
    """Ten times too large a size makes it so."""
    lost = decide(alone(2.0, 0.6), unhinted=BULK, floor=0.2)
    assert lost.level == [LEVEL_SCAVENGER]
    assert last(lost) == pytest.approx(0.5)
    assert last(decide(alone(2.0, -0.1), unhinted=BULK)) == 0.0
    both = decide(pv.transfers(2, left=np.array([9.0, 0.5]) * RATE, deadline=1.0, stage=3), unhinted=BULK, floor=0.2)
    assert shares(both)[FIRST] == pytest.approx(1.1 * 0.5 / (1.0 * 0.97 - 0.025), abs=1e-3)
    assert last(both) == pytest.approx(0.8 - shares(both)[FIRST], abs=1e-3)


def test_where_many_are_lost_they_have_nothing_but_their_floor() -> None:
    t = pv.transfers(4, left=np.array([9.0, 9.0, 0.1, 0.1]) * RATE, deadline=1.0, stage=3)
    decision = decide(t, unhinted=BULK)
    assert decision.level.tolist()[:2] == [LEVEL_SCAVENGER] * 2
    assert last(decision) == 0.0


def test_beside_collectives_one_that_is_lost_has_its_part_where_they_never_pause_and_nobody_else_waits() -> None:
    assert last(decide(alone(2.0, 0.6), collectives=1.0)) == pytest.approx(0.5)
    assert last(decide(alone(2.0, 0.6), collectives=0.5)) == 0.0
    two = pv.transfers(2, left=np.array([9.0, 0.1]) * RATE, deadline=1.0, stage=3)
    assert last(decide(two, collectives=1.0)) == 0.0


def test_on_slow_links_some_packets_are_kept_in_hand() -> None:
    """0.2 s of work; four packets of 27 ms are 0.108 s."""
    for due, level in ((0.53, DEFERRED), (0.51, FIRST)):  # 0.2 / (0.523 * 0.97 - 0.108) = 0.5
        assert decide(alone(0.2, due), packet=0.027).level == [level]
    assert decide(alone(0.2, 0.51), packet=0.006).level == [DEFERRED]  # 24 ms are less than what is kept anyway
    assert decide(alone(0.2, 0.33), packet=0.0).level == [FIRST]
    assert decide(alone(0.2, 0.31), packet=0.027).level == [URGENT]
    view = pv.view(alone(0.2, 0.6), net=pv.link(RATE, 5, packet=0.027))
    wait = demand_bound().explain(0, view).figures["next_promotion_s"]
    assert wait == pytest.approx((0.6 * 0.97 - 0.108 - 0.4) / 0.97)
