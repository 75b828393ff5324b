# SPDX-License-Identifier: Apache-2.0
"""The simulated link against a plain one, the paper's example, and what policies achieve on it."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from support import plain_link

from mfsd.ground.bands import LEVEL_NONE, LEVEL_SCAVENGER
from mfsd.lab.sim.cases import LOADS, SMALL, Shape, brute_force, draw
from mfsd.lab.sim.decide import FixedOrder, PolicyDecider, simulate
from mfsd.lab.sim.singlelink import BatchSpec, Case, Order, RequestSpec, Run
from mfsd.policy import registry

if TYPE_CHECKING:
    from mfsd.policy.views import I4, Views

TINY = Shape(batches=(2, 5), requests=(1, 3), layers=(1, 4), instances=2)


def _cases(count: int, shape: Shape = TINY, limit: int = 0) -> list[Case]:
    loads = list(LOADS.values())
    return [draw(np.random.default_rng([9, i]), loads[i % len(loads)], shape, limit) for i in range(count)]


# --- the model --------------------------------------------------------------------------------------------------------


def test_a_fixed_order_is_served_as_on_the_plain_link() -> None:
    for i, case in enumerate(_cases(150)):
        order = np.random.default_rng(i).permutation(len(Run(case).size)).tolist()
        got = Run(case).go(FixedOrder(order), math.inf).finish
        want = plain_link.simulate(case, lambda f, _: order.index(f.number))  # noqa: B023 (used at once)
        assert got.tolist() == pytest.approx([want[q] for q in range(case.requests)], rel=1e-9)


def test_levels_of_policies_are_served_as_on_the_plain_link() -> None:
    """Policies whose levels depend on nothing that the plain link doesn't know; the timer must not matter to them."""
    keys: dict[str, Any] = {
        "fair": lambda _f, _now: 0,
        "two-class": lambda f, _now: f.stage != 2,
        "edf": lambda f, _now: f.request.deadline if f.stage == 3 else math.inf,
        "sjf": lambda f, _now: f.size,
    }
    for name, key in keys.items():
        params = {"exact": True} if name in ("edf", "sjf") else {}
        policy = registry.make_policy(name, 4096, params)
        for i, case in enumerate(_cases(40)):
            got = simulate(case, policy, [0.01, 0.004, math.inf][i % 3]).finish
            want = plain_link.simulate(case, key)
            assert got.tolist() == pytest.approx([want[q] for q in range(case.requests)], rel=1e-9), name


class Meter(PolicyDecider):
    """Notes at every decision when it was, what was left of all transfers, and what of those that want the link."""

    def __init__(self, case: Case, name: str) -> None:
        super().__init__(case, registry.make_policy(name))
        self.seen: list[tuple[float, float, float]] = []

    def order(self, run: Run) -> Order:
        self.seen.append((run.now, float(run.left.sum()), float(run.left[run.active].sum())))
        return super().order(run)


@pytest.mark.parametrize("name", registry.names())
def test_the_link_is_never_idle_and_never_faster_than_it_is(name: str) -> None:
    """From one decision to the next it sends at its rate, or all that there is."""
    for case in _cases(10):
        run, meter = Run(case), Meter(case, name)
        outcome = run.go(meter, 0.005)
        assert not np.isnan(outcome.finish).any()
        assert (run.left == 0).all()
        for (then, left_then, wanted), (now, left_now, _) in itertools.pairwise(meter.seen):
            carried = case.rate * (now - then)
            assert left_then - left_now == pytest.approx(min(wanted, carried), rel=1e-6, abs=1.0)
        arrival = np.array([b.arrival for b in case.batches for _ in b.requests])
        compute = np.array([b.compute * len(b.collective) for b in case.batches for _ in b.requests])
        own = np.array([sum(r.p2d) for b in case.batches for r in b.requests]) / case.rate
        assert (outcome.finish >= (arrival + np.maximum(compute, own)) * (1 - 1e-9)).all()


def test_the_views_tell_the_compute_left_and_the_clairvoyant_what_is_to_come() -> None:
    """Two layers of 2 s; 1 s of collective before each, 1 s of stage 3 after each, on a link of unit rate."""
    spec = BatchSpec(0.0, 2.0, (1.0, 1.0), (RequestSpec(99.0, p2d=(1.0, 1.0)),))
    case = Case(1.0, (spec,))
    seen: dict[str, dict[float, float]] = {}
    for name in ("two-class", "llf"):
        policy = registry.make_policy(name)
        told = seen.setdefault(name, {})

        class Probe(PolicyDecider):
            def _view(self, run: Run, active: I4) -> Views:
                view = super()._view(run, active)
                told[run.now] = float(view.requests.compute_left[0])  # noqa: B023 (used at once)
                t = view.transfers
                assert t.compute_left.tolist() == np.where(t.request < 0, 0.0, view.requests.compute_left[0]).tolist()
                return view

        assert Run(case).go(Probe(case, policy), 0.5).finish.tolist() == [7.0]
    # The collective of layer 0 from 0, of layer 1 from 3 s; layer 1 computes from 4 to 6; its stage 3 ends at 7.
    # Nobody is asked while the link is idle, from 1 to 3 s and from 5 to 6 s. From 3 s on two transfers want the link.
    assert seen["two-class"][0.0] == 4.0
    assert seen["two-class"][0.5] == 4.0
    assert seen["two-class"][3.0] == 2.0
    assert seen["two-class"][4.5] == 1.5
    assert seen["two-class"][6.5] == 0.0
    assert seen["llf"][0.0] == 4.0 + 1.0 + 1.0  # with the second collective and the last stage 3
    assert seen["llf"][3.5] == 2.0 + 1.0
    assert seen["llf"][6.5] == 0.0


def test_the_views_tell_the_load_of_the_link_by_level() -> None:
    """A collective of 1 s, then KV of 4 s on the level below it; the load is averaged over 0.1 s."""
    case = Case(1.0, (BatchSpec(0.0, 0.0, (1.0,), (RequestSpec(99.0, kv=(4.0,)),)),))
    policy = registry.make_policy("two-class")
    seen: dict[float, Views] = {}

    class Probe(PolicyDecider):
        def _view(self, run: Run, active: I4) -> Views:
            view = seen[run.now] = super()._view(run, active)
            return view

    assert Run(case).go(Probe(case, policy), 0.1).finish.tolist() == [pytest.approx(5.0)]
    (first, early, late) = (seen[t] for t in (0.0, min(seen, key=lambda t: abs(t - 0.1)), max(seen)))
    assert first.link.rate.tolist() == [1.0]
    assert first.link.load_above.tolist() == [[0.0, 0.0, 0.0]]
    # The share of level 0 stands above level 1 and the scavenger.
    assert early.link.load_above[0].tolist() == pytest.approx([0.0, 1 - 1 / math.e, 1 - 1 / math.e])
    assert early.link.load.tolist() == pytest.approx([1 - 1 / math.e])
    assert late.link.load_above[0].tolist() == pytest.approx([0.0, 0.0, 1.0], abs=1e-9)
    assert early.transfers.stage.tolist() == [1, 2]
    assert early.transfers.request.tolist() == [0, -1]
    assert early.transfers.deadline.tolist() == [99.0, math.inf]


def test_the_default_band_stands_where_the_policy_says() -> None:
    decider = PolicyDecider(EXAMPLE, registry.make_policy("edf", 4))
    assert decider._bands(np.array([LEVEL_NONE, 0, 2, 3, LEVEL_SCAVENGER], dtype=np.int16)).tolist() == [3, 0, 2, 4, 6]


@pytest.mark.parametrize("load", LOADS)
def test_cases_are_drawn_as_their_shape_says(load: str) -> None:
    shape = Shape(batches=(3, 5), requests=(1, 2), layers=(2, 3), quiet=0.3, instances=2)
    drawn = [draw(np.random.default_rng([5, i]), LOADS[load], shape) for i in range(200)]
    assert {len(case.batches) for case in drawn} == {3, 4, 5}
    latest = []
    for case in drawn:
        every = [r for b in case.batches for r in b.requests]
        offered = sum(sum(r.kv) + sum(r.p2d) for r in every) + sum(sum(b.collective) for b in case.batches)
        span = offered / case.rate / {"low": 0.4, "medium": 0.7, "high": 1.0, "overload": 1.4, "collapse": 2.0}[load]
        latest.append(case.batches[-1].arrival / span)
        assert [b.arrival for b in case.batches] == sorted(b.arrival for b in case.batches)
        assert [b.instance for b in case.batches] == [i % 2 for i in range(len(case.batches))]
        for b in case.batches:
            alone = len(b.collective) * b.compute + sum(b.collective) / case.rate
            slack = [(r.deadline - b.arrival) / (alone + (r.kv[0] + sum(r.p2d)) / case.rate) for r in b.requests]
            assert all(1.5 <= x <= 4.0 for x in slack)
            assert len(b.requests) in (1, 2)
            assert len(b.collective) in (2, 3)
    assert 0.9 < max(latest) <= 1.0  # arrivals are spread over the time in which the link could carry load x its rate
    quiet = [not any(b.collective) for case in drawn for b in case.batches]
    assert 0.2 < sum(quiet) / len(quiet) < 0.4


def test_brute_force_meets_nobody_where_nobody_can_be_met() -> None:
    lost = BatchSpec(0.0, 0.0, (0.0,), (RequestSpec(0.5, p2d=(1.0,)),))
    assert brute_force(Case(1.0, (lost,))) == 0


def test_same_case_same_outcome() -> None:
    for case in _cases(5):
        policy = registry.make_policy("mfs", 13)
        assert simulate(case, policy).finish.tolist() == simulate(case, policy).finish.tolist()


# --- the paper's example ----------------------------------------------------------------------------------------------

A = BatchSpec(0.0, 9.0, (0.0,), (RequestSpec(18.0, kv=(2.0,)),), instance=0)
B = BatchSpec(0.0, 6.0, (4.0,), (RequestSpec(12.0), RequestSpec(12.0)), instance=1)
C = BatchSpec(0.0, 0.0, (0.0,), (RequestSpec(7.0, p2d=(3.0,)),), instance=2)
EXAMPLE = Case(1.0, (A, B, C))
"""Sizes on a link of unit rate, work after it, deadlines: A 2/9/18, B 4/6/12 (two requests), C 3/0/7."""
BYTES = {"low_kb": 2.5 / 1024, "high_kb": 3.5 / 1024}
TOP = {"upper": 1.0, "origin": 0, "red_classes": 2, "drop_budget": 0.0}
"""MLU 1 on top, and nothing pruned: pruning charges B with C, which comes before it by deadline but will wait for it in
fact, finds B late for that and prunes C."""


@pytest.mark.parametrize(
    ("name", "params", "met"),
    [
        ("fair", {}, 1),
        ("sjf", {"exact": True}, 2),
        ("srpt", {"exact": True}, 2),
        ("edf", {"exact": True}, 2),
        ("karuna", BYTES, 2),
        ("mfs", TOP, 4),
        ("mfs", TOP | {"drop_budget": 0.2}, 3),
        ("llf", {}, 4),
    ],
)
def test_the_example_of_the_paper(name: str, params: dict[str, Any], met: int) -> None:
    assert simulate(EXAMPLE, registry.make_policy(name, 16, params), 0.01).count == met


def test_mfs_finishes_c_and_a_exactly_on_time() -> None:
    policy = registry.make_policy("mfs", 16, TOP)
    assert simulate(EXAMPLE, policy, 0.01).finish.tolist() == pytest.approx([18.0, 10.0, 10.0, 7.0])


def test_all_four_is_the_best_of_any_order_and_needs_the_promotion() -> None:
    """Fixed orders reach it too, but only the one that the promotion of C in the middle amounts to."""
    assert brute_force(EXAMPLE) == 4
    policy = registry.make_policy("mfs", 16, TOP | {"promotion": False})
    assert simulate(EXAMPLE, policy, 0.01).count == 3


def test_the_published_threshold_promotes_c_too_early() -> None:
    """With U or U / E on top C is lifted at half the link or less, and takes the time that B doesn't have."""
    for origin in (0, 1):
        policy = registry.make_policy("mfs", 16, TOP | {"upper": 0.5, "origin": origin})
        assert simulate(EXAMPLE, policy, 0.01).met.tolist() == [True, False, False, True]


# --- what policies achieve --------------------------------------------------------------------------------------------


def test_rli_order_minimises_the_makespan_of_a_prefill() -> None:
    """Theorem 1 of the paper, against all orders: smallest RLI first ends the compute of one batch soonest."""
    rng = np.random.default_rng(3)
    policy = registry.make_policy("mfs", 40, {"red_classes": 1, "p1": False, "late_levels": 1})
    for _ in range(12):
        layers = int(rng.integers(2, 4))
        request = RequestSpec(math.inf, kv=tuple(rng.uniform(1, 5, layers).tolist()))
        batch = BatchSpec(0.0, float(rng.uniform(0.5, 4)), tuple(rng.uniform(0, 3, layers).tolist()), (request,))
        case = Case(1.0, (batch,))
        ours = simulate(case, policy, 0.1).finish[0]
        best = min(_makespans(case))
        assert ours <= best * (1 + 1e-9)


def _makespans(case: Case) -> list[float]:
    orders = itertools.permutations(range(len(Run(case).size)))
    return [float(Run(case).go(FixedOrder(order), math.inf).finish[0]) for order in orders]


def test_no_policy_beats_brute_force_where_one_order_is_enough() -> None:
    """All transfers of one stage and sent at once: then some fixed order is best, and none may beat it."""
    rng = np.random.default_rng(8)
    exact = registry.make_policy("deadline-ladder", 200, {"first_ms": 10.0, "last_ms": 20000.0, "margin": 0.0})
    met = possible = 0
    for _ in range(10):
        size = rng.uniform(1, 5, 5)
        due = rng.uniform(1, 16, 5)
        pairs = enumerate(zip(size.tolist(), due.tolist(), strict=True))
        specs = [BatchSpec(0.0, 0.0, (0.0,), (RequestSpec(d, p2d=(s,)),), i) for i, (s, d) in pairs]
        case = Case(1.0, tuple(specs))
        best = brute_force(case)
        for name in registry.names():
            assert simulate(case, registry.make_policy(name), 0.5).count <= best
        met += simulate(case, exact, 0.1).count
        possible += best
    assert met >= 0.9 * possible


def test_the_default_policy_is_near_the_best_on_small_cases() -> None:
    policy, llf = registry.make_policy(registry.DEFAULT), registry.make_policy("llf")
    met = best = 0
    for case in _cases(60, SMALL, 5):
        met += simulate(case, policy).count
        best += max(brute_force(case), simulate(case, llf).count)
    assert met >= 0.93 * best


def test_give_up_saves_others() -> None:
    """Two doomed requests and one that makes it only if they step aside."""
    doomed = [BatchSpec(0.0, 0.0, (0.0,), (RequestSpec(0.020, p2d=(50e6,)),), i) for i in (0, 1)]
    fit = BatchSpec(0.0, 0.0, (0.0,), (RequestSpec(0.030, p2d=(25e6,)),), 2)
    case = Case(1e9, (*doomed, fit))
    assert simulate(case, registry.make_policy("deadline-ladder")).met.tolist() == [False, False, True]
    assert not simulate(case, registry.make_policy("deadline-ladder", None, {"give_up": False})).met.any()
    assert simulate(case, registry.make_policy("mfs-giveup")).met.tolist() == [False, False, True]


# --- nobody starves for ever ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in registry.names() if n != "fair"])
def test_everybody_is_served_in_the_end(name: str) -> None:
    """Overload, then silence: the scavenger gets the idle link, so every request has its first token."""
    shape = dataclasses.replace(TINY, slack=(0.5, 1.5))
    for i in range(5):
        case = draw(np.random.default_rng([11, i]), 3.0, shape)
        outcome = simulate(case, registry.make_policy(name))
        total = sum(sum(r.kv) + sum(r.p2d) for b in case.batches for r in b.requests)
        total += sum(sum(b.collective) for b in case.batches)
        compute = sum(b.compute * len(b.collective) for b in case.batches)
        assert outcome.finish.max() <= case.batches[-1].arrival + total / case.rate + compute + 1e-9


@pytest.mark.parametrize("name", ["mfs", "mfs-nop1", "mfs-giveup", "deadline-ladder"])
def test_a_deferred_request_is_not_starved_by_a_stream_of_later_ones(name: str) -> None:
    """Deferred on purpose, it must still be in time though tighter requests never stop coming."""
    stream = [BatchSpec(0.01 * i, 0.0, (0.0,), (RequestSpec(0.01 * i + 0.009, p2d=(4e6,)),), i + 1) for i in range(100)]
    patient = BatchSpec(0.0, 0.0, (0.0,), (RequestSpec(0.8, p2d=(100e6,)),), 0)
    case = Case(1e9, tuple(sorted([patient, *stream], key=lambda b: b.arrival)))
    assert simulate(case, registry.make_policy(name)).met[0]
