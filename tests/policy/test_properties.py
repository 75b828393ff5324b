# SPDX-License-Identifier: Apache-2.0
"""What must hold for policies whatever the state is."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support import policy_views as pv

from mfsd.ground.bands import LEVEL_BACKGROUND, LEVEL_NEW, LEVEL_NONE, LEVEL_SCAVENGER
from mfsd.policy import registry
from mfsd.policy.base import place

if TYPE_CHECKING:
    from mfsd.policy.views import I2, Views

seeds = st.integers(0, 2**32 - 1)
NAMES = registry.names()
EXTRA: list[tuple[str, dict[str, Any]]] = [
    ("deadline-ladder", {"kv": "rli", "early_levels": 3, "doomed_levels": 2}),
    ("mfs", {"rho": "above"}),
]
POLICIES: list[tuple[str, dict[str, Any]]] = [*((name, {}) for name in NAMES), *EXTRA]


def _random(seed: int, levels: int = 13, *, n: int = 12) -> tuple[np.random.Generator, Views]:
    rng = np.random.default_rng(seed)
    return rng, pv.random_view(rng, int(rng.integers(1, n + 1)), devices=2, levels=levels)


@pytest.mark.parametrize(("name", "params"), POLICIES)
@given(seed=seeds)
def test_levels_are_legal(name: str, params: dict[str, Any], seed: int) -> None:
    policy = registry.make_policy(name, 13, params)
    _, view = _random(seed, policy.levels)
    level = policy.evaluate(view).level
    legal = (level == LEVEL_NONE) | (level == LEVEL_SCAVENGER) | ((level >= 0) & (level < policy.levels))
    background = view.transfers.stage == 4
    assert legal[~background].all()
    assert (level[background] == (LEVEL_NONE if name == "fair" else LEVEL_BACKGROUND)).all()
    assert (level[view.transfers.stage == 0] == LEVEL_NONE).all()


@pytest.mark.parametrize(("name", "params"), POLICIES)
@given(seed=seeds)
@example(seed=187312)  # two devices lead to a peer
@example(seed=18331)  # two who may come back, on devices whose rate is not known
def test_permuting_rows_permutes_levels(name: str, params: dict[str, Any], seed: int) -> None:
    policy = registry.make_policy(name, 13, params)
    rng, view = _random(seed, policy.levels)
    to, ro, bo = (rng.permutation(len(x)) for x in (view.transfers, view.requests, view.batches))
    # What was in row ro[i] is now in row i, so pointers go through the inverse; -1 stays.
    r_at, b_at = np.append(np.argsort(ro), -1), np.append(np.argsort(bo), -1)
    t, r, b = pv.take(view.transfers, to), pv.take(view.requests, ro), pv.take(view.batches, bo)
    t.request, t.batch = r_at[t.request].astype(np.int32), b_at[t.batch].astype(np.int32)
    r.batch = b_at[r.batch].astype(np.int32)
    permuted = dataclasses.replace(view, transfers=t, requests=r, batches=b)
    assert policy.evaluate(permuted).level.tolist() == policy.evaluate(view).level[to].tolist()
    old, new = policy.arrange(view), policy.arrange(permuted)
    if old is not None and new is not None:
        assert new.rank.tolist() == old.rank[bo].tolist()
        assert new.pruned.tolist() == old.pruned[ro].tolist()


@pytest.mark.parametrize("name", NAMES)
@given(seed=seeds, power=st.integers(-8, 8))
def test_scaling_bytes_and_bandwidth_together_changes_nothing(name: str, seed: int, power: int) -> None:
    """Powers of two, so that no rounding differs."""
    policy = registry.make_policy(name, 13)
    _, view = _random(seed, policy.levels)
    t, link, k = view.transfers, view.link, 2.0**power
    # Where a rate isn't known, Sincronia compares bytes with seconds.
    link.rate[link.rate == 0] = 1e9
    scaled = dataclasses.replace(
        view,
        transfers=dataclasses.replace(t, size=t.size * k, left=t.left * k, ahead=t.ahead * k),
        link=dataclasses.replace(link, rate=link.rate * k, peer_rate=link.peer_rate * k),
        sizes=view.sizes * k,
    )
    was, now = policy.evaluate(view), policy.evaluate(scaled)
    assert now.level.tolist() == was.level.tolist()
    if was.guarantee is not None and now.guarantee is not None:
        assert now.guarantee == pytest.approx(was.guarantee * k)
    one, two = policy.arrange(view), policy.arrange(scaled)
    if one is not None and two is not None:
        assert (one.rank.tolist(), one.pruned.tolist()) == (two.rank.tolist(), two.pruned.tolist())


def _real(level: I2) -> np.ndarray[Any, Any]:
    return (level >= 0) & (level < LEVEL_NEW)


@pytest.mark.parametrize("params", [{}, {"when": "tick"}, {"arbitration": "level"}, {"rho": "above", "p1": False}])
@given(seed=seeds)
def test_mfs_never_demotes_by_mlu_or_rli(params: dict[str, Any], seed: int) -> None:
    """With one RED class and without pruning, nothing else can move a level."""
    policy = registry.make_policy("mfs", 13, {"red_classes": 1, "pruning": False, **params})
    rng, view = _random(seed)
    t = view.transfers
    t.level[:] = LEVEL_NEW
    before = policy.evaluate(view).level
    for _ in range(6):
        view.now += float(rng.exponential(0.05))
        t.left *= rng.uniform(0.2, 1.0, len(t))  # being served lowers MLU
        t.current_layer += rng.integers(0, 3, len(t)).astype(np.int32)
        t.layer_started = rng.random(len(t)) < 0.5
        t.level = before
        after = policy.evaluate(view).level
        both = _real(before) & _real(after)
        assert (after[both] <= before[both]).all()
        assert (_real(before) == _real(after)).all()
        before = after


@given(seed=seeds)
def test_ladder_only_rises_with_time(seed: int) -> None:
    """As long as nobody is given up, which may take away the deadline that lifted a stage-1 transfer."""
    policy = registry.make_policy("deadline-ladder", 13, {"give_up": False})
    rng, view = _random(seed)
    view.transfers.level[:] = LEVEL_NEW
    before = policy.evaluate(view).level
    for _ in range(6):
        view.now += float(rng.exponential(0.1))
        view.transfers.level = before
        after = policy.evaluate(view).level
        assert (after <= before).all()
        before = after


@given(seed=seeds, share=st.floats(0, 1))
def test_pruning_keeps_its_budget(seed: int, share: float) -> None:
    policy = registry.make_policy("mfs", 13, {"drop_budget": share})
    _, view = _random(seed)
    arrangement = policy.arrange(view)
    assert arrangement is not None
    live = max(len(view.requests), view.cluster_requests)
    kept = view.requests.pruned & (view.requests.batch < 0)
    assert arrangement.pruned.sum() <= max(share * live, 1.0, kept.sum())
    assert sorted(arrangement.rank.tolist()) == list(range(len(view.batches)))


@given(seed=seeds)
def test_nothing_is_pruned_when_all_is_feasible(seed: int) -> None:
    policy = registry.make_policy("mfs", 13, {"drop_budget": 1.0})
    _, view = _random(seed)
    slowest = min([1e9, *view.link.rate[view.link.rate > 0], *view.link.peer_rate])
    compute = float(view.requests.compute_left.max() + (view.batches.layers * view.batches.layer_compute).max())
    layers = float(view.batches.layers.max())  # each of those to come like the last one announced
    octets = float((view.transfers.left + view.transfers.size * layers).sum())
    view.requests.deadline[:] = octets / slowest + compute + 1e-6
    view.requests.pruned[:] = False
    arrangement = policy.arrange(view)
    assert arrangement is not None
    assert not arrangement.pruned.any()


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(seed=seeds)
@example(seed=1045)  # given up, and let through
def test_explanations_exist_and_agree_with_the_level(seed: int) -> None:
    for name, params in POLICIES:
        policy = registry.make_policy(name, 13, params)
        _, view = _random(seed, n=3)
        level = policy.evaluate(view).level.tolist()
        for row in range(len(level)):
            why = policy.explain(row, view)
            shown = {LEVEL_SCAVENGER: -2, LEVEL_BACKGROUND: -3}
            assert why.figures["level"] == shown.get(level[row], level[row])
            assert len(why.reasons) >= 2
            assert any(place(level[row]) in s for s in why.reasons), why.reasons
            assert all(s.endswith(".") and "nan" not in s for s in why.reasons), why.reasons
            assert not any(math.isnan(x) for x in why.figures.values()), why.figures


@pytest.mark.parametrize(("name", "params"), POLICIES)
def test_policies_leave_what_they_are_shown_alone(name: str, params: dict[str, Any]) -> None:
    policy = registry.make_policy(name, 13, params)
    for seed in range(20):
        _, view = _random(seed)
        before = pv.columns(view)
        policy.evaluate(view)
        policy.arrange(view)
        policy.infeasible(view)
        policy.explain(0, view)
        assert pv.columns(view) == before
