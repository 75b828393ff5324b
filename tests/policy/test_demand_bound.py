# SPDX-License-Identifier: Apache-2.0
"""The demand-bound policy against a plain one, and in worked states; what it keeps over time: test_promise.py."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import given
from support import policy_views as pv
from support import reference as ref
from support.demand import (
    COLLECTIVE,
    DEFERRED,
    FIRST,
    OTHERS,
    RATE,
    URGENT,
    alone,
    decide,
    demand_bound,
    random_state,
    same_guarantee,
    seeds,
    shares,
)
from support.reference_demand import Plain

from mfsd.ground.bands import LEVEL_SCAVENGER

CASES = 4 * hypothesis.settings().max_examples
"""Few in `make check`, as of each property."""


# --- against the plain policy -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("levels", "params"),
    [(5, {}), (3, {}), (4, {"margin_ms": 0.0}), (12, {"defer_until": 0.3, "most": 1.0}), (5, {"margin_share": 0.3})],
)
def test_levels_and_guarantees_are_those_of_the_plain_policy(levels: int, params: dict[str, Any]) -> None:
    """Given who is lost."""
    policy = demand_bound(levels, **params)
    for case in range(CASES):
        view = random_state(case, levels)
        lost = policy.judge(view).asked.lost
        plain = Plain(ref.State(view), policy, (set(np.flatnonzero(lost.requests)), set(np.flatnonzero(lost.alone))))
        want = [plain.level(i) for i in plain.s.rows()]
        got = policy.evaluate(view)
        assert got.level.tolist() == want, f"case {case}"
        same_guarantee(got, np.array(plain.guarantee(want)) * view.link.rate[:, None], policy.layout.deferred)


@given(seed=seeds)
def test_guarantees_take_no_more_than_floors_leave_and_go_to_who_needs_them(seed: int) -> None:
    view, policy = random_state(seed, n=40), demand_bound()
    decision = policy.evaluate(view)
    guarantee = decision.guarantee
    assert guarantee is not None
    assert guarantee.shape == (len(view.link.rate), 5)
    assert (guarantee >= 0).all()
    assert (guarantee.sum(axis=1) <= view.link.rate * (1 - view.link.floor) * (1 + 1e-12)).all()
    assert (guarantee[:, COLLECTIVE] == 0).all()
    nobody = (view.link.unhinted == 0) & (view.link.collectives < 0.8)
    assert (guarantee[nobody, DEFERRED] == 0).all()
    on = {(int(d), int(level)) for d, level in zip(view.transfers.device, decision.level, strict=True)}
    on |= {(d, level) for d, level in np.argwhere(view.link.unannounced).tolist()}
    assert all((d, level) in on for d, level in np.argwhere(guarantee > 0).tolist())


@given(seed=seeds)
def test_the_same_state_is_not_decided_to_and_fro(seed: int) -> None:
    """As long as nothing changes, decisions settle: who is lost is the memory of that."""
    view, policy = random_state(seed, n=30), demand_bound()
    seen = []
    for _ in range(6):
        decision = policy.evaluate(view)
        assert decision.infeasible is not None
        seen.append((decision.level.tolist(), decision.infeasible.tolist()))
        view.transfers.level, view.transfers.infeasible = decision.level, decision.infeasible
    assert seen[4] == seen[5]


@given(seed=seeds)
def test_infeasible_is_what_the_decision_says(seed: int) -> None:
    view, policy = random_state(seed), demand_bound()
    decision = policy.evaluate(view)
    assert decision.infeasible is not None
    assert policy.infeasible(view).tolist() == decision.infeasible.tolist()
    assert not decision.infeasible[view.transfers.stage == 4].any()
    scavenged = decision.level == LEVEL_SCAVENGER
    assert (decision.infeasible[scavenged]).all()
    assert (view.transfers.stage[scavenged] == 3).all()


# --- levels, worked ---------------------------------------------------------------------------------------------------


def test_a_transfer_waits_until_it_needs_half_of_the_link_and_is_guaranteed_that_then() -> None:
    """0.84 s of work, with a margin of 25 ms and 3 %."""
    waits = decide(alone(0.84, 5.0))
    assert waits.level == [DEFERRED]
    assert shares(waits) == [0.0] * 5
    # From 1.758 s on: 0.84 / (1.758 * 0.97 - 0.025) = 0.5.
    assert decide(alone(0.84, 1.77)).level == [DEFERRED]
    now = decide(alone(0.84, 1.75))
    assert now.level == [FIRST]
    assert shares(now) == [0, 0, pytest.approx(1.1 * 0.84 / (1.75 * 0.97 - 0.025), abs=1e-4), 0, 0]
    assert shares(decide(alone(0.84, 1.2))) == [0, 0, 0.7, 0, 0]  # 1.1 times what it needs, but at most so much ...
    tight = decide(alone(0.84, 0.88))
    assert tight.level == [URGENT]  # ... until only the margin is left: 0.88 * 0.97 - 0.025 = 0.829
    assert shares(tight)[0] == pytest.approx(1.0)
    assert shares(decide(alone(0.84, 0.88), floor=0.2)) == pytest.approx([0.8, 0, 0, 0, 0])
    loose = decide(alone(0.4, 0.75), demand_bound(most=1.0))
    assert shares(loose) == pytest.approx([0, 0, 1.1 * 0.4 / (0.75 * 0.97 - 0.025), 0, 0], abs=1e-4)


@pytest.mark.parametrize("due", [1.75, 1.5, 1.2, 1.0])
@pytest.mark.parametrize("others", [0.0, 0.1])
@pytest.mark.parametrize("work", [0.05, 0.2, 0.4, 0.6, 0.75, 0.85, 1.0])
def test_beside_collectives_as_much_is_guaranteed_as_is_enough_with_their_pauses(
    work: float, others: float, due: float
) -> None:
    """0.84 s of work. Collectives of ``work`` seconds with pauses of 1 - work between them."""
    average, room = 1.05 * 0.84 / (due - 0.025) * (1 + 0.1 * work**2), 1.0 - others  # on the wire, with headroom
    asked = min(1.1 * 0.84 / (due * 0.97 - 0.025), 0.7 if work < 0.8 else 1.0)
    decision = decide(alone(0.84, due), collectives=work, taken=others)
    if decision.level == [URGENT]:
        return  # no time for that
    assert decision.level == [FIRST]  # above unhinted traffic all the same
    got = shares(decision)[FIRST]
    assert got <= asked * (1 + 1e-4)
    if room - average <= 0.02 or work > 0.8:  # or they hardly pause
        assert got == pytest.approx(asked, rel=1e-4)
    elif got < asked * (1 - 1e-4):
        slowed = work / (room - 1.05 * got)
        gets = room - work / (slowed + 1.0 - work)
        assert gets == pytest.approx(average, rel=1e-3) if got else gets >= average - 1e-9


def test_those_whose_turn_has_not_come_keep_moving_beside_collectives_that_never_pause() -> None:
    """0.2 s of work due first, and 0.7 s due in 1.6: as far as the first can do without, with twice the margin."""

    def granted(due: float, collectives: float = 0.0) -> tuple[float, float]:
        t = pv.transfers(2, left=np.array([0.2, 0.7]) * RATE, deadline=[due, 1.6], stage=3, level=[FIRST, OTHERS])
        decision = decide(t, collectives=collectives)
        assert decision.level.tolist() == [FIRST, OTHERS]
        return shares(decision)[FIRST], shares(decision)[OTHERS]

    together = 1.1 * 0.9 / (1.6 * 0.97 - 0.025)
    assert granted(1.0, collectives=1.0) == pytest.approx((together - 0.2, 0.2), abs=0.02)
    kept = 1.25 * 0.2 / (0.5 * 0.94 - 0.05)
    assert granted(0.5, collectives=1.0) == pytest.approx((kept, together - kept), abs=0.02)
    assert granted(0.36, collectives=1.0)[1] == 0.0
    assert granted(1.0)[1] == granted(1.0, collectives=0.79)[1] == 0.0  # these leave them something


def test_what_collectives_leave_is_not_guaranteed() -> None:
    """0.84 s of work in 1.75 s are 0.511 of the link on the wire, with nothing but the fixed margin in hand."""

    def granted(collectives: float, due: float = 1.75, **link: Any) -> float:
        return shares(decide(alone(0.84, due), collectives=collectives, **link))[FIRST]

    assert granted(0.0) == pytest.approx(1.1 * 0.84 / (1.75 * 0.97 - 0.025), abs=1e-4)  # there are none
    assert granted(0.27) == granted(0.46) == 0.0
    assert 0.0 < granted(0.50) < 0.1
    assert 0.1 < granted(0.45, taken=0.11) < 0.25
    assert granted(1.0) == granted(0.8) == granted(0.0)  # they never pause, or hardly
    assert granted(0.27, 1.2) == pytest.approx(0.27, abs=0.01)
    assert granted(0.27, 1.0) == 0.7  # as much is guaranteed before somebody is about to be too late
    policy, net = demand_bound(), pv.link(RATE, 5, collectives=0.27)
    texts = (" ".join(policy.explain(0, pv.view(alone(0.84, due), net=net)).reasons) for due in (1.75, 1.2))
    assert "which the collectives leave: nothing is guaranteed" in next(texts)
    assert "are guaranteed on its device, the collectives leave the rest." in next(texts)


def test_it_keeps_its_guarantee_until_it_needs_much_less() -> None:
    for due, level in ((1.9, FIRST), (2.4, FIRST), (2.6, DEFERRED)):  # 0.46, 0.36 and 0.33 of the link
        assert decide(alone(0.84, due, level=FIRST)).level == [level]
        assert decide(alone(0.84, due, level=DEFERRED)).level == [DEFERRED]


def test_twenty_transfers_that_have_time_alone_have_none_together() -> None:
    """Each needs 0.11 s and is due in 3 s or a little later."""
    t = pv.transfers(20, size=0.11 * RATE, left=0.11 * RATE, deadline=3.0)
    assert set(decide(t).level.tolist()) == {FIRST}  # all due together, so all due first
    t.deadline[:] = 3.0 + 0.07 * np.arange(20)
    levels = decide(t).level.tolist()
    assert levels == [FIRST] + [OTHERS] * 19
    assert shares(decide(t))[FIRST] == pytest.approx(0.59, abs=0.01)
    assert decide(t.take(np.arange(5))).level.tolist() == [DEFERRED] * 5


def test_where_a_third_is_lost_nobody_is_promised_more_than_an_equal_share() -> None:
    """Four that can't be in time, one that needs 0.7 of the link and one that needs 0.2: shares of six are 0.17."""
    t = pv.transfers(6, left=np.array([9.0, 9.0, 9.0, 9.0, 0.7, 0.2]) * RATE, deadline=[1.0] * 6, stage=3)
    view = pv.view(t, net=pv.link(RATE, 5))
    policy = demand_bound()
    crowded = policy.evaluate(view)
    assert crowded.level.tolist() == [LEVEL_SCAVENGER] * 4 + [FIRST] * 2
    assert shares(crowded) == [0, 0, 0, 0, 0]
    assert "promised nothing" in " ".join(policy.explain(4, view).reasons)
    # Three that are lost are no crowd, but what is taken from the collectives is less than with nobody lost,
    assert shares(decide(t.take(np.arange(1, 5))))[FIRST] == 0.4
    assert shares(decide(t.take(np.array([4]))))[FIRST] == 0.7
    # one that is lost takes nothing from anybody,
    assert shares(decide(t.take(np.array([0, 4]))))[FIRST] == 0.7
    # and nor are four of thirteen.
    many = pv.transfers(13, left=np.array([9.0] * 4 + [0.06] * 9) * RATE, deadline=[1.0] * 13, stage=3)
    assert shares(decide(many))[FIRST] == 0.4
    # Who asks for a fifth at most is promised all that it needs, and passes the collectives when its margin is gone.
    t = pv.transfers(5, left=np.array([9.0, 9.0, 9.0, 9.0, 0.0059]) * RATE, deadline=[1.0] * 4 + [0.03], stage=3)
    assert decide(t).level.tolist() == [LEVEL_SCAVENGER] * 4 + [URGENT]
    assert shares(decide(t))[URGENT] == pytest.approx(1.1 * 0.0059 / 0.03, abs=1e-3)


def test_what_is_left_of_some_that_are_lost_takes_nothing_from_the_others() -> None:
    """They are late, and at their floor; 0.5 s of work are due in 0.75 s. Neither two of three, nor four of five."""
    for gone in (2, 4):
        work = np.array([0.01] * gone + [0.5]) * RATE
        decision = decide(pv.transfers(gone + 1, left=work, deadline=[-1.0] * gone + [0.75], stage=3))
        assert decision.level.tolist() == [LEVEL_SCAVENGER] * gone + [FIRST]
        assert shares(decision)[FIRST] == 0.7


def test_those_who_need_less_than_half_on_top_of_the_others_wait() -> None:
    """The second needs the link after the first, the third does not."""
    t = pv.transfers(3, left=[0.5 * RATE, 0.4 * RATE, 0.1 * RATE], deadline=[0.8, 1.8, 20.0])
    assert decide(t).level.tolist() == [FIRST, OTHERS, DEFERRED]


def test_more_levels_order_those_who_wait_by_what_they_need() -> None:
    """Halves of ``defer_until``; with fewer levels there is no urgent one, and "first" and "others" are one."""
    t = pv.transfers(5, left=0.1 * RATE, deadline=[0.35, 0.75, 1.5, 3.0, 900.0])
    needs = [demand_bound(8).judge(pv.view(t.take(np.array([i])), net=pv.link(RATE, 8))).need[0] for i in range(5)]
    assert [round(float(x), 2) for x in needs] == [0.32, 0.14, 0.07, 0.03, 0.0]
    single = [decide(t.take(np.array([i])), demand_bound(8)).level[0] for i in range(5)]
    assert single == [4, 5, 6, 7, 7]
    tight, collective = alone(0.84, 0.88), alone(1.0, math.inf, stage=2)
    for levels, want in ((3, (1, 0)), (4, (1, 0)), (5, (0, 1))):
        assert (decide(tight, demand_bound(levels)).level[0], decide(collective, demand_bound(levels)).level[0]) == want


def test_collectives_and_what_has_no_deadline() -> None:
    t = pv.transfers(5, stage=[2, 3, 1, 0, 4], deadline=[0.001, math.inf, math.inf, 0.1, 0.1])
    assert decide(t).level.tolist() == [COLLECTIVE, OTHERS, OTHERS, -1, 0x7FFD]


def test_with_little_to_spare_it_stands_above_unhinted_traffic_but_is_guaranteed_nothing() -> None:
    decision = decide(alone(0.01, 0.1))
    assert decision.level == [FIRST]
    assert shares(decision) == [0.0] * 5
    assert decide(alone(0.01, 0.12)).level == [DEFERRED]


def test_without_a_known_rate_nothing_waits_below_unhinted_traffic() -> None:
    t = pv.transfers(3, left=RATE, deadline=[0.01, 5.0, math.inf])
    decision = demand_bound().evaluate(pv.view(t, net=pv.link(0.0, 5)))
    assert decision.level.tolist() == [URGENT, FIRST, OTHERS]
    assert shares(decision) == [0.0] * 5
    assert decision.infeasible is not None
    assert not decision.infeasible.any()


def test_a_slow_peer_is_served_at_its_pace() -> None:
    """0.1 s of the device are nearly 1 s of the link into the peer; due in 1.9 s, most of that is needed."""
    t = pv.transfers(2, left=0.1 * RATE, deadline=[1.9, 1.5], peer=[0, 1])
    assert decide(t).level.tolist() == [DEFERRED] * 2
    decision = decide(t, peer_rate=[1.1e8, np.inf])
    assert decision.level.tolist() == [FIRST, DEFERRED]
    assert shares(decision)[FIRST] == pytest.approx(1.1 * 0.11 * (0.1 / 0.11) / (1.9 * 0.97 - 0.025), abs=0.001)
    lost = decide(t, peer_rate=[4e7, np.inf])
    assert lost.infeasible is not None
    assert lost.infeasible.tolist() == [True, False]
    late = decide(t, peer_rate=[0.1 * RATE / 1.88, np.inf])
    assert late.level.tolist() == [URGENT, DEFERRED]


def test_what_others_take_of_their_floors_leaves_less_room() -> None:
    assert decide(alone(0.9, 1.0), taken=0.05).infeasible == [False]
    assert decide(alone(0.9, 1.0), taken=0.2).infeasible == [True]


@pytest.mark.parametrize(
    ("stage", "columns", "held", "through"),
    [
        (3, {"deadline": 900.0}, DEFERRED, OTHERS),
        (1, {"deadline": 900.0}, DEFERRED, OTHERS),
        (3, {"deadline": -1.0}, LEVEL_SCAVENGER, OTHERS),
        (3, {"deadline": 900.0, "max_defer": 2.0}, DEFERRED, OTHERS),
        (3, {"deadline": 900.0, "max_defer": 100.0}, DEFERRED, OTHERS),
    ],
)
def test_nobody_is_held_back_for_longer_than_allowed(
    stage: int, columns: dict[str, float], held: int, through: int
) -> None:
    longest = columns.get("max_defer", 15.0)
    before = alone(0.1, created=-longest + 0.01, stage=stage, **{"due": 0.0} | {"deadline": 0.0} | columns)
    assert decide(before).level == [held]
    assert shares(decide(before)) == [0.0] * 5
    after = dataclasses.replace(before, created=np.array([-longest]))
    assert decide(after).level == [through]
    assert shares(decide(after)) == [0, 0, 0, 0.05, 0]
    assert decide(after).infeasible == [columns["deadline"] < 0]
