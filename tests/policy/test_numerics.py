# SPDX-License-Identifier: Apache-2.0
"""The shared numerics, on worked examples and on their properties."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import policy_views as pv
from support import reference as ref

from mfsd.policy.mfs import inter_request, pruning, red
from mfsd.policy.mfs.layout import ARBITRATION, Layout
from mfsd.policy.parts import bound, buckets, mlu, pick, rli
from mfsd.policy.views import Views

if TYPE_CHECKING:
    from mfsd.policy.views import RequestView, TransferView

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
    view = pv.view(pv.transfers(1, left=50e6, deadline=1.0), net=pv.link(1e8))
    assert mlu.mlu(view, "transfer", np.array([0.0])) == pytest.approx(0.5)
    assert mlu.mlu(view, "transfer", np.array([0.5])) == pytest.approx(1.0)
    view.now = 0.75
    assert mlu.mlu(view, "transfer", np.array([0.0])) == pytest.approx(2.0)


def test_mlu_counts_what_leaves_before_it_or_all_of_its_request() -> None:
    t = pv.transfers(4, stage=[3, 3, 1, 3], request=[0, 0, 0, -1], left=2e7, ahead=[3e7, 0, 0, 0], deadline=1.0)
    view = pv.view(t, net=pv.link(1e8))
    assert mlu.mlu(view, "transfer", np.zeros(1)).tolist() == pytest.approx([0.5, 0.2, 0.2, 0.2])
    assert mlu.mlu(view, "request", np.zeros(1)).tolist() == pytest.approx([0.5, 0.4, 0.4, 0.2])


def test_mlu_at_its_ends() -> None:
    t = pv.transfers(3, deadline=[math.inf, 1.0, 0.5])
    for rate in (1e8, 0.0):
        assert mlu.mlu(pv.view(t, net=pv.link(rate), now=1.0), "transfer", np.zeros(1)).tolist() == [
            0,
            math.inf,
            math.inf,
        ]
    assert mlu.mlu(pv.view(t, net=pv.link(0.0)), "transfer", np.zeros(1)).tolist() == [0.0, 0.0, 0.0]  # rate unknown


def test_thresholds_of_the_paper() -> None:
    assert mlu.thresholds(3, 0.5, 4.0, 0) == (0.5, 0.125, 0.03125)
    assert mlu.thresholds(3, 0.5, 4.0, 1) == (0.125, 0.03125, 0.0078125)
    steps = mlu.steps(np.array([math.inf, 0.5, 0.49, 0.125, 0.04, 0.0]), (0.5, 0.125, 0.03125))
    assert steps.tolist() == [0, 0, 1, 1, 2, 3]


def test_a_saturated_device_does_not_blow_up_rho() -> None:
    view = pv.view(pv.transfers(1, deadline=1.0), net=pv.link(1e8, load=1.0, load_above=1.0))
    for kind in ("all", "above"):
        assert mlu.residual(view, kind, view.transfers.level).tolist() == [0.99]


def test_rho_is_that_of_the_device_and_of_the_levels_above() -> None:
    above = [[0.0, 0.1, 0.2], [0.5, 0.6, 0.7]]
    net = pv.link([1e8, 1e8], 2, load=[0.3, 0.8], load_above=above)
    view = pv.view(pv.transfers(4, device=[0, 0, 1, 1]), net=net)
    level = np.array([0, 1, 1, 9], dtype=np.int16)  # beyond the last one counts as the last
    assert mlu.residual(view, "none", level).tolist() == [0.0]
    assert mlu.residual(view, "all", level).tolist() == [0.3, 0.3, 0.8, 0.8]
    assert mlu.residual(view, "above", level).tolist() == [0.0, 0.1, 0.6, 0.7]


def test_rli() -> None:
    t = pv.transfers(4, stage=[1, 1, 2, 1], target_layer=[5, 3, 9, 1], current_layer=[3, 3, 3, 3])
    assert rli.rli(t).tolist() == [2, 0, 0, 0]


# --- the bound --------------------------------------------------------------------------------------------------------


def test_bound_takes_the_largest_of_compute_siblings_and_queue() -> None:
    t = pv.transfers(
        4, left=[1e6, 3e6, 1e6, 1e6], ahead=[0, 0, 9e6, 0], request=[0, 0, 1, 2], compute_left=[0, 0, 0, 0.5]
    )
    assert bound.seconds_needed(pv.view(t, net=pv.link(1e8))).tolist() == pytest.approx([0.04, 0.04, 0.1, 0.5])


def test_siblings_on_another_device_do_not_add_up() -> None:
    t = pv.transfers(2, left=[1e6, 3e6], request=[0, 0], device=[0, 1])
    assert bound.seconds_needed(pv.view(t, net=pv.link([1e8, 1e8]))).tolist() == pytest.approx([0.01, 0.03])


def test_a_slow_peer_bounds_what_the_device_would_let_through() -> None:
    t = pv.transfers(4, left=[1e6, 1e6, 1e6, 1e6], ahead=[0, 0, 0, 3e6], request=[0, 0, 0, -1], peer=[0, 0, 1, -1])
    r = pv.requests(1, deadline=0.05)
    slow = pv.view(t, r, pv.link(1e8, peer_rate=[2e7, np.inf]))
    # 2 MB of the request go to the slow peer, all 3 MB through the device; nobody knows the last one's peer.
    assert bound.seconds_needed(slow).tolist() == pytest.approx([0.1, 0.1, 0.03, 0.04])
    assert bound.path_rate(slow).tolist() == [2e7, 2e7, 1e8, 1e8]
    unknown = pv.view(t, net=pv.link(0.0, peer_rate=[2e7, np.inf]))
    assert bound.path_rate(unknown).tolist() == [2e7, 2e7, np.inf, np.inf]
    t.deadline[:] = 0.05
    assert not bound.judge(pv.view(t, r, pv.link(1e8))).transfers.any()
    assert bound.judge(slow).transfers.tolist() == [True, True, True, False], "siblings are late with it"


def test_inter_request_loads_count_a_slow_peer_at_its_own_rate() -> None:
    t = pv.transfers(2, left=1e6, request=[0, 1], peer=[0, 1])
    view = pv.view(t, pv.requests(2), pv.link(1e8, peer_rate=[2e7, np.inf]))
    loads = inter_request.link_loads(view).request
    assert loads.tolist() == [[pytest.approx(0.01), pytest.approx(0.05), 0.0], [pytest.approx(0.01), 0.0, 0.01]]


def test_with_very_many_peers_those_that_most_goes_to_are_reckoned_with() -> None:
    """As many requests and peers as hosts have connections, at most: a matrix of them all would take 3 GB."""
    requests, peers = 40_000, 10_000
    left = np.full(requests, 1e3)
    left[7::peers] = 1e7  # to peer 7
    t = pv.transfers(requests, left=left, request=np.arange(requests), peer=np.arange(requests) % peers)
    view = pv.view(t, pv.requests(requests, deadline=9.0), pv.link(1e8, peer_rate=np.full(peers, 2e7)))
    loads = inter_request.link_loads(view).request
    assert loads.size <= inter_request.MOST
    assert loads[:, 0] == pytest.approx(left / 1e8)
    assert loads[7::peers, 1:].max(axis=1) == pytest.approx(0.5)
    owned = Views.of(t, view.link, requests=pv.requests(requests, deadline=0.1, batch=0), batches=pv.batches(1))
    assert inter_request.arrange(owned, robust=True, budget=requests).pruned.any()


def test_one_late_transfer_spoils_its_request() -> None:
    t = pv.transfers(3, left=[1e6, 9e7, 1e6], request=[0, 0, 1], device=[0, 1, 0], deadline=0.1)
    r = pv.requests(2, deadline=0.1)
    verdict = bound.judge(pv.view(t, r, pv.link([1e8, 1e8])))
    assert verdict.transfers.tolist() == [True, True, False]
    assert verdict.requests.tolist() == [True, False]


def test_margin_holds_between_giving_up_and_coming_back() -> None:
    t = pv.transfers(1, left=1.04e7, deadline=0.1, request=0)
    view, given_up = pv.view(t, pv.requests(1, deadline=0.1), pv.link(1e8)), np.ones(1, dtype=np.bool_)
    assert not bound.judge(view, 0.05).transfers[0]  # 4 % too late: not given up
    assert bound.judge(view, 0.05, given_up).transfers[0]  # but not taken back either
    t.left[:] = 0.99e7
    assert not bound.judge(view, 0.05, given_up).transfers[0]


def test_without_rate_or_deadline_nothing_is_infeasible_but_past_the_deadline_everything_is() -> None:
    def late(t: TransferView, r: RequestView, rate: float, now: float) -> bool:
        return bool(bound.judge(pv.view(t, r, pv.link(rate), now)).transfers[0])

    t, r = pv.transfers(1, deadline=1.0, request=0), pv.requests(1, deadline=1.0)
    assert not late(t, r, 0.0, 0.999)
    assert late(t, r, 0.0, 1.0)
    assert late(pv.transfers(1, deadline=1.0), pv.requests(0), 0.0, 1.0)
    assert not late(pv.transfers(1), pv.requests(0), 1.0, 1e9)


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
    loads = pruning.Loads(np.array(load), np.zeros((batches, len(load[0]))), np.zeros(len(load[0])))
    everyone = np.ones(len(load), dtype=np.bool_)
    order = np.arange(batches, dtype=np.int32)
    owners = np.array(member, dtype=np.int32)
    pruned, _ = pruning.prune(order, np.array(due_in), np.zeros(batches), loads, owners, everyone, budget)
    return [bool(x) for x in pruned]


def test_pruning_takes_the_largest_on_the_bottleneck_even_of_a_more_urgent_batch() -> None:
    # Batch 0 is in time; batch 1 isn't, because of what batch 0's second request has on link 1.
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


@pytest.mark.parametrize(("shape", "want"), ref.LAYOUTS.items(), ids=str)
def test_layout_is_as_drawn(shape: tuple[int, str, bool, int], want: tuple[list[list[int]], list[int]]) -> None:
    levels, arbitration, p1, classes = shape
    lay = Layout.build(levels, p1=p1, arbitration=arbitration, red_classes=classes, late=0)
    assert (_early(lay), _late(lay)) == want


def test_layout_gives_stage_3_as_many_levels_as_are_asked_for() -> None:
    lay = Layout.build(8, p1=True, arbitration="ladder", red_classes=1, late=2)
    assert (_early(lay), _late(lay)) == ([[1], [2], [3], [4], [5]], [0, 6, 7])
    assert lay.default_after == 6


def _early(lay: Layout) -> list[list[int]]:
    step = np.arange(lay.early, dtype=np.int16)
    columns = [lay.early_level(step, np.full(lay.early, c, dtype=np.int16)).tolist() for c in range(lay.classes)]
    return [list(row) for row in zip(*columns, strict=True)]


def _late(lay: Layout) -> list[int]:
    return [int(x) for x in lay.late_level(np.arange(lay.late + lay.p1, dtype=np.int16))]


@pytest.mark.parametrize("arbitration", ARBITRATION)
@pytest.mark.parametrize("p1", [True, False])
@pytest.mark.parametrize("classes", [0, 1, 2, 3])
@pytest.mark.parametrize("late", [0, 1, 3])
def test_layout_uses_its_levels_in_order(arbitration: str, p1: bool, classes: int, late: int) -> None:  # noqa: FBT001 (parametrised)
    least = Layout.least(p1=p1, arbitration=arbitration, red_classes=classes, late=late)
    for levels in range(least, 41):
        lay = Layout.build(levels, p1=p1, arbitration=arbitration, red_classes=classes, late=late)
        early, steps = _early(lay), _late(lay)
        below = steps[p1:]  # P1 is not one of the ladder
        flat = [level for row in early for level in row]
        assert early
        assert below
        assert flat == sorted(set(flat))
        assert steps == sorted(set(steps))
        used = set(flat) | set(steps)
        assert used <= set(range(levels))
        assert len(used) >= levels - lay.classes  # at most an incomplete step is left unused
        assert (0 in flat) == (not p1)
        if arbitration == "ladder":
            assert max(flat) < min(below) == lay.default_after
        elif arbitration == "level":
            assert all(max(row) < level for row, level in zip(early, below, strict=True))
            assert all(level < min(row) for row, level in zip(early[1:], below, strict=False))
            assert lay.default_after == max(early[0]) + 1
        else:
            assert below == flat
            assert lay.default_after == flat[0] + 1
        for c in range(lay.classes):
            levels_of = np.array([row[c] for row in early], dtype=np.int16)
            assert lay.early_step(levels_of).tolist() == list(range(lay.early))
        assert [lay.late_step(level) for level in steps] == list(range(len(steps)))


@pytest.mark.parametrize("arbitration", ARBITRATION)
@pytest.mark.parametrize("p1", [True, False])
@pytest.mark.parametrize(("classes", "late", "least"), [(0, 0, (2, 2, 1)), (1, 0, (2, 2, 1)), (3, 2, (5, 4, 1))])
def test_layout_needs_a_level_for_each_kind(
    arbitration: str,
    p1: bool,  # noqa: FBT001 (parametrised)
    classes: int,
    late: int,
    least: tuple[int, int, int],
) -> None:
    got = Layout.least(p1=p1, arbitration=arbitration, red_classes=classes, late=late)
    assert got == least[ARBITRATION.index(arbitration)] + p1


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
