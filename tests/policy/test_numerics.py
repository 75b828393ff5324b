# SPDX-License-Identifier: Apache-2.0
"""The shared numerics, on worked examples and on their properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import policy_views as pv
from support import reference as ref

from mfsd.policy.mfs import inter_request, pruning, red
from mfsd.policy.mfs.layout import ARBITRATION, Layout
from mfsd.policy.parts import bound, buckets, mlu, pick, rli

finite = st.floats(min_value=-1e3, max_value=1e6, allow_nan=False)


# --- buckets ----------------------------------------------------------------------------------------------------------


def test_edges_double() -> None:
    assert buckets.edges(6, 0.025, 2.0) == pytest.approx((0.025, 0.05, 0.1, 0.2, 0.4))


def test_span_meets_both_ends() -> None:
    assert buckets.span(7, 12.5, 400.0) == pytest.approx((12.5, 25, 50, 100, 200, 400))
    assert buckets.span(2, 12.5, 400.0) == (12.5,)
    assert buckets.span(1, 12.5, 400.0) == ()


def test_far_edges_are_infinite_and_harmless() -> None:
    upper = buckets.edges(4096, 0.025, 2.0)
    assert buckets.bucket(np.array([-1.0, 0.025, math.inf]), upper).tolist() == [0, 1, 4095]


@given(st.lists(finite | st.just(math.inf), max_size=20), st.integers(1, 80), st.floats(1e-3, 10), st.floats(1.01, 9))
def test_buckets_count_the_edges_below(values: list[float], count: int, first: float, factor: float) -> None:
    upper = buckets.edges(count, first, factor)
    got = buckets.bucket(np.array(values, dtype=np.float64), upper)
    assert got.tolist() == [ref.bucket(v, upper) for v in values]


@given(st.lists(finite, min_size=1, max_size=20), st.integers(1, 30))
def test_dense_rank_keeps_the_order(keys: list[float], limit: int) -> None:
    got = buckets.dense_rank(np.array(keys), limit)
    assert got.tolist() == [min(r, limit - 1) for r in ref.dense(keys)]


# --- MLU and RLI ------------------------------------------------------------------------------------------------------


def test_mlu_is_the_needed_share_of_what_is_left_of_the_link() -> None:
    t = pv.transfers(1, left=50e6, deadline=1.0)
    assert mlu.mlu(t, pv.link(1e8), 0.0, "transfer", np.array([0.0])) == pytest.approx(0.5)
    assert mlu.mlu(t, pv.link(1e8), 0.0, "transfer", np.array([0.5])) == pytest.approx(1.0)
    assert mlu.mlu(t, pv.link(1e8), 0.75, "transfer", np.array([0.0])) == pytest.approx(2.0)


def test_mlu_at_its_ends() -> None:
    t = pv.transfers(3, deadline=[math.inf, 1.0, 0.5])
    assert mlu.mlu(t, pv.link(1e8), 1.0, "transfer", np.zeros(1)).tolist() == [0.0, math.inf, math.inf]
    assert mlu.mlu(t, pv.link(0.0), 0.0, "transfer", np.zeros(1)).tolist() == [0.0, 0.0, 0.0]  # rate unknown


def test_thresholds_of_the_paper() -> None:
    assert mlu.thresholds(3, 0.5, 4.0, 0) == (0.5, 0.125, 0.03125)
    assert mlu.thresholds(3, 0.5, 4.0, 1) == (0.125, 0.03125, 0.0078125)
    steps = mlu.steps(np.array([math.inf, 0.5, 0.49, 0.125, 0.04, 0.0]), (0.5, 0.125, 0.03125))
    assert steps.tolist() == [0, 0, 1, 1, 2, 3]


def test_a_saturated_port_does_not_blow_up_rho() -> None:
    t = pv.transfers(1, deadline=1.0)
    link = pv.link(1e8, load=1.0, load_above=1.0)
    for kind in ("all", "above"):
        assert mlu.residual(t, link, kind, t.level).tolist() == [mlu.MAX_RHO]


def test_rli() -> None:
    t = pv.transfers(4, stage=[1, 1, 2, 1], target_layer=[5, 3, 9, 1], current_layer=[3, 3, 3, 3])
    assert rli.rli(t).tolist() == [2, 0, 0, 0]


# --- the bound --------------------------------------------------------------------------------------------------------


def test_bound_takes_the_largest_of_compute_siblings_and_queue() -> None:
    t = pv.transfers(
        4, left=[1e6, 3e6, 1e6, 1e6], ahead=[0, 0, 9e6, 0], request=[0, 0, 1, 2], compute_left=[0, 0, 0, 0.5]
    )
    assert bound.seconds_needed(t, pv.link(1e8)).tolist() == pytest.approx([0.04, 0.04, 0.1, 0.5])


def test_siblings_on_another_port_do_not_add_up() -> None:
    t = pv.transfers(2, left=[1e6, 3e6], request=[0, 0], port=[0, 1])
    assert bound.seconds_needed(t, pv.link([1e8, 1e8])).tolist() == pytest.approx([0.01, 0.03])


def test_a_slow_peer_bounds_what_its_port_would_let_through() -> None:
    t = pv.transfers(4, left=[1e6, 1e6, 1e6, 1e6], ahead=[0, 0, 0, 3e6], request=[0, 0, 0, -1], peer=[0, 0, 1, -1])
    slow = pv.link(1e8, peer_rate=[2e7, np.inf])
    # 2 MB of the request go to the slow peer, all 3 MB through the port; nobody knows the last one's peer.
    assert bound.seconds_needed(t, slow).tolist() == pytest.approx([0.1, 0.1, 0.03, 0.04])
    assert bound.path_rate(t, slow).tolist() == [2e7, 2e7, 1e8, 1e8]
    assert bound.path_rate(t, pv.link(0.0, peer_rate=[2e7, np.inf])).tolist() == [2e7, 2e7, np.inf, np.inf]
    r = pv.requests(1, deadline=0.05)
    t.deadline[:] = 0.05
    assert not bound.judge(t, r, pv.link(1e8), 0.0).transfers.any()
    assert bound.judge(t, r, slow, 0.0).transfers.tolist() == [True, True, True, False], "siblings are late with it"


def test_inter_request_loads_count_a_slow_peer_at_its_own_rate() -> None:
    t = pv.transfers(2, left=1e6, request=[0, 1], peer=[0, 1])
    loads = inter_request.port_loads(t, 2, 0, pv.link(1e8, peer_rate=[2e7, np.inf])).request
    assert loads.tolist() == [[pytest.approx(0.01), pytest.approx(0.05), 0.0], [pytest.approx(0.01), 0.0, 0.01]]


def test_one_late_transfer_spoils_its_request() -> None:
    t = pv.transfers(3, left=[1e6, 9e7, 1e6], request=[0, 0, 1], port=[0, 1, 0], deadline=0.1)
    r = pv.requests(2, deadline=0.1)
    verdict = bound.judge(t, r, pv.link([1e8, 1e8]), 0.0)
    assert verdict.transfers.tolist() == [True, True, False]
    assert verdict.requests.tolist() == [True, False]


def test_margin_holds_between_giving_up_and_coming_back() -> None:
    t, r, link = pv.transfers(1, left=1.04e7, deadline=0.1, request=0), pv.requests(1, deadline=0.1), pv.link(1e8)
    given_up = np.ones(1, dtype=np.bool_)
    assert not bound.judge(t, r, link, 0.0, 0.05).transfers[0]  # 4 % too late: not given up
    assert bound.judge(t, r, link, 0.0, 0.05, given_up).transfers[0]  # but not taken back either
    t.left[:] = 0.99e7
    assert not bound.judge(t, r, link, 0.0, 0.05, given_up).transfers[0]


def test_without_rate_or_deadline_nothing_is_infeasible_but_past_the_deadline_everything_is() -> None:
    t, r = pv.transfers(1, deadline=1.0, request=0), pv.requests(1, deadline=1.0)
    assert not bound.judge(t, r, pv.link(0.0), 0.999).transfers[0]
    assert bound.judge(t, r, pv.link(0.0), 1.0).transfers[0]
    assert bound.judge(pv.transfers(1, deadline=1.0), pv.requests(0), pv.link(0.0), 1.0).transfers[0]
    assert not bound.judge(pv.transfers(1), pv.requests(0), pv.link(1.0), 1e9).transfers[0]


# --- RED --------------------------------------------------------------------------------------------------------------


def test_red_of_one_two_and_a_gap() -> None:
    deadline = np.array([5.0, 1.0, 3.0, 1.0, 2.0, 10.0, 12.0])
    batch = np.array([0, 1, 1, 2, 2, 2, 2])
    effective = red.effective(deadline, batch.astype(np.int32), 4)
    # One: itself. Two: half and half. Four, cut between 2 and 10: half of 1 and half of 10. None: inf.
    assert effective.red.tolist() == pytest.approx([5.0, 2.0, 5.5, math.inf])
    assert effective.loose.tolist() == [5.0, 3.0, 10.0, math.inf]
    assert effective.tight.tolist() == [5.0, 1.0, 1.0, math.inf]


@given(st.lists(st.tuples(st.integers(-1, 3), finite | st.just(math.inf)), max_size=25))
def test_red_lies_between_the_tight_and_the_loose_minimum(rows: list[tuple[int, float]]) -> None:
    batch = np.array([b for b, _ in rows], dtype=np.int32)
    deadline = np.array([d for _, d in rows], dtype=np.float64)
    effective = red.effective(deadline, batch, 4)
    assert (effective.tight <= effective.red).all()
    assert (effective.red <= effective.loose).all()
    for b in range(4):
        want, loose = ref.red([d for owner, d in rows if owner == b])
        assert effective.red[b] == pytest.approx(want)
        assert effective.loose[b] == loose


# --- pruning ----------------------------------------------------------------------------------------------------------


def _prune(load: list[list[float]], due_in: list[float], member: list[int], budget: int) -> list[bool]:
    batches = len(due_in)
    loads = pruning.Loads(np.array(load), np.zeros((batches, len(load[0]))))
    everyone = np.ones(len(load), dtype=np.bool_)
    order = np.arange(batches, dtype=np.int32)
    owners = np.array(member, dtype=np.int32)
    pruned, _ = pruning.prune(order, np.array(due_in), np.zeros(batches), loads, owners, everyone, budget)
    return [bool(x) for x in pruned]


def test_pruning_takes_the_largest_on_the_bottleneck_even_of_a_more_urgent_batch() -> None:
    # Batch 0 is in time; batch 1 isn't, because of what batch 0's second request has on port 1.
    load = [[1.0, 0.0], [0.0, 6.0], [0.0, 3.0]]
    assert _prune(load, [7.0, 8.0], [0, 0, 1], 3) == [False, True, False]


def test_pruning_stops_at_its_budget_and_when_nothing_is_left_to_take() -> None:
    load = [[5.0], [4.0], [3.0]]
    assert _prune(load, [1.0], [0, 0, 0], 1) == [True, False, False]
    assert _prune(load, [-1.0], [0, 0, 0], 9) == [True, True, True]


@given(
    st.lists(st.tuples(st.integers(0, 2), st.floats(0, 10), st.floats(0, 10)), min_size=1, max_size=12),
    st.lists(st.floats(-5, 60), min_size=3, max_size=3),
    st.integers(0, 12),
)
def test_pruning_keeps_its_budget_and_leaves_the_feasible_alone(
    rows: list[tuple[int, float, float]], due_in: list[float], budget: int
) -> None:
    load = [[a, b] for _, a, b in rows]
    member = [m for m, _, _ in rows]
    pruned = _prune(load, due_in, member, budget)
    assert sum(pruned) <= budget
    ends = [max(sum(row[p] for row, m in zip(load, member, strict=True) if m <= b) for p in (0, 1)) for b in range(3)]
    if all(end <= due * (1 - 1e-9) for end, due in zip(ends, due_in, strict=True)):
        assert not any(pruned)


# --- the ladder of MFS ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arbitration", ARBITRATION)
@pytest.mark.parametrize("p1", [True, False])
@pytest.mark.parametrize("classes", [0, 1, 2, 3])
def test_layout_uses_its_levels_in_order(arbitration: str, p1: bool, classes: int) -> None:  # noqa: FBT001 (parametrised)
    for levels in range(6, 41):
        lay = Layout.build("mfs", levels, p1=p1, arbitration=arbitration, red_classes=classes, late=0)
        early, late = ref.mfs_table(lay, arbitration)
        step = np.arange(lay.early, dtype=np.int16)
        for c in range(lay.classes):
            got = lay.early_level(step, np.full(lay.early, c, dtype=np.int16))
            assert got.tolist() == [row[c] for row in early]
            assert lay.early_step(got).tolist() == step.tolist()
        steps = np.arange(lay.late + lay.p1, dtype=np.int16)
        assert lay.late_level(steps).tolist() == late
        assert [lay.late_step(level) for level in late] == steps.tolist()
        used = {level for row in early for level in row} | set(late)
        assert used <= set(range(levels))
        assert len(used) >= levels - lay.classes  # at most an incomplete step is left unused
        if p1:
            assert not any(level == 0 for row in early for level in row)
        assert p1 < lay.default_after <= levels


def test_layout_needs_a_level_for_each_kind() -> None:
    with pytest.raises(ValueError, match="levels = 2: policy 'mfs' needs at least 3"):
        Layout.build("mfs", 2, p1=True, arbitration="ladder", red_classes=0, late=0)


# --- branch-free choice -----------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.booleans(), st.floats(), st.floats()), max_size=20))
def test_pick_floats_is_where_bit_by_bit(rows: list[tuple[bool, float, float]]) -> None:
    mask = np.array([m for m, _, _ in rows], dtype=np.bool_)
    yes, no = (np.array([r[k] for r in rows], dtype=np.float64) for k in (1, 2))
    assert pick.floats(mask, yes, no).tobytes() == np.where(mask, yes, no).tobytes()


@given(st.lists(st.tuples(st.booleans(), st.integers(-1, 0x7FFF), st.integers(-1, 0x7FFF)), max_size=20))
def test_pick_levels_is_where(rows: list[tuple[bool, int, int]]) -> None:
    mask = np.array([m for m, _, _ in rows], dtype=np.bool_)
    yes, no = (np.array([r[k] for r in rows], dtype=np.int16) for k in (1, 2))
    got = pick.levels(mask, yes, no)
    assert got.dtype == np.int16
    assert got.tolist() == np.where(mask, yes, no).tolist()
    assert pick.levels(mask, np.int16(-1), no).tolist() == np.where(mask, -1, no).tolist()
