# SPDX-License-Identifier: Apache-2.0
"""What must hold for policies whatever the state is."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import policy_views as pv

from mfsd.policy import registry
from mfsd.policy.views import LEVEL_NEW, LEVEL_NONE, LEVEL_SCAVENGER

seeds = st.integers(0, 2**32 - 1)
NAMES = registry.names()
EXTRA: list[tuple[str, dict[str, Any]]] = [
    ("deadline-ladder", {"kv": "rli", "early_levels": 3, "doomed_levels": 2}),
    ("mfs", {"rho": "above"}),
]
POLICIES: list[tuple[str, dict[str, Any]]] = [*((name, {}) for name in NAMES), *EXTRA]


def _views(seed: int, levels: int, *, n: int = 12, ports: int = 2) -> tuple[np.random.Generator, pv.Views]:
    rng = np.random.default_rng(seed)
    views = pv.random_views(rng, int(rng.integers(1, n + 1)), ports=ports, levels=min(levels, 14))
    views[3].load_above = np.sort(rng.uniform(0, 1, (ports, levels + 1)), axis=1)
    return rng, views


@pytest.mark.parametrize(("name", "params"), POLICIES)
@given(seed=seeds)
def test_levels_are_legal(name: str, params: dict[str, Any], seed: int) -> None:
    policy = registry.make_policy(name, 13, params)
    _, views = _views(seed, policy.levels)
    level = policy.evaluate(*views, 0.0)
    legal = (level == LEVEL_NONE) | (level == LEVEL_SCAVENGER) | ((level >= 0) & (level < policy.levels))
    assert legal.all()
    assert (level[views[0].stage == 0] == LEVEL_NONE).all()
    assert 0 <= policy.default_after <= policy.levels


@pytest.mark.parametrize(("name", "params"), POLICIES)
@given(seed=seeds)
def test_permuting_rows_permutes_levels(name: str, params: dict[str, Any], seed: int) -> None:
    policy = registry.make_policy(name, 13, params)
    rng, (t, r, b, link) = _views(seed, policy.levels)
    to, ro, bo = (rng.permutation(len(x)) for x in (t, r, b))
    # What was in row ro[i] is now in row i, so pointers go through the inverse; -1 stays.
    r_at, b_at = np.append(np.argsort(ro), -1), np.append(np.argsort(bo), -1)
    t2, r2, b2 = pv.take(t, to), pv.take(r, ro), pv.take(b, bo)
    t2.request, t2.batch = r_at[t2.request].astype(np.int32), b_at[t2.batch].astype(np.int32)
    r2.batch = b_at[r2.batch].astype(np.int32)
    got = policy.evaluate(t2, r2, b2, link, 0.0)
    assert got.tolist() == policy.evaluate(t, r, b, link, 0.0)[to].tolist()
    old, new = policy.arrange(t, r, b, link, 0.0), policy.arrange(t2, r2, b2, link, 0.0)
    if old is not None and new is not None:
        assert new.rank.tolist() == old.rank[bo].tolist()
        assert new.pruned.tolist() == old.pruned[ro].tolist()


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("sjf", "srpt", "pias", "karuna")])
@given(seed=seeds, power=st.integers(-8, 8))
def test_scaling_bytes_and_bandwidth_together_changes_nothing(name: str, seed: int, power: int) -> None:
    """Policies that look at bytes only are excepted by their nature. Powers of two, so that no rounding differs."""
    policy = registry.make_policy(name, 13)
    _, (t, r, b, link) = _views(seed, policy.levels)
    k = 2.0**power
    t2 = dataclasses.replace(t, size=t.size * k, left=t.left * k, ahead=t.ahead * k)
    link2 = dataclasses.replace(link, rate=link.rate * k)
    assert policy.evaluate(t2, r, b, link2, 0.0).tolist() == policy.evaluate(t, r, b, link, 0.0).tolist()
    one, two = policy.arrange(t, r, b, link, 0.0), policy.arrange(t2, r, b, link2, 0.0)
    if one is not None and two is not None:
        assert (one.rank.tolist(), one.pruned.tolist()) == (two.rank.tolist(), two.pruned.tolist())


def _real(level: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (level >= 0) & (level < LEVEL_NEW)


@pytest.mark.parametrize("params", [{}, {"when": "tick"}, {"arbitration": "level"}, {"rho": "above", "p1": False}])
@given(seed=seeds)
def test_mfs_never_demotes_by_mlu_or_rli(params: dict[str, Any], seed: int) -> None:
    """With one RED class and without pruning, nothing else can move a level."""
    policy = registry.make_policy("mfs", 13, {"red_classes": 1, "pruning": False, **params})
    rng, views = _views(seed, 13)
    t = views[0]
    t.level[:] = LEVEL_NEW
    now, before = 0.0, policy.evaluate(*views, 0.0)
    for _ in range(6):
        now += float(rng.exponential(0.05))
        t.left = t.left * rng.uniform(0.2, 1.0, len(t))  # being served lowers MLU
        t.current_layer = t.current_layer + rng.integers(0, 3, len(t)).astype(np.int32)
        t.layer_started = rng.random(len(t)) < 0.5
        t.level = before
        after = policy.evaluate(*views, now)
        both = _real(before) & _real(after)
        assert (after[both] <= before[both]).all()
        assert (_real(before) == _real(after)).all()
        before = after


@given(seed=seeds)
def test_ladder_only_rises_with_time(seed: int) -> None:
    """As long as nobody is given up, which may take away the deadline that lifted a stage-1 transfer."""
    policy = registry.make_policy("deadline-ladder", 13, {"give_up": False})
    rng, views = _views(seed, 13)
    views[0].level[:] = LEVEL_NEW
    now, before = 0.0, policy.evaluate(*views, 0.0)
    for _ in range(6):
        now += float(rng.exponential(0.1))
        views[0].level = before
        after = policy.evaluate(*views, now)
        assert (after <= before).all()
        before = after


@given(seed=seeds, share=st.floats(0, 1))
def test_pruning_keeps_its_budget(seed: int, share: float) -> None:
    policy = registry.make_policy("mfs", 13, {"drop_budget": share})
    _, views = _views(seed, 13)
    arrangement = policy.arrange(*views, 0.0)
    assert arrangement is not None
    assert arrangement.pruned.sum() <= share * len(views[1])
    assert sorted(arrangement.rank.tolist()) == list(range(len(views[2])))


@given(seed=seeds)
def test_nothing_is_pruned_when_all_is_feasible(seed: int) -> None:
    policy = registry.make_policy("mfs", 13, {"drop_budget": 1.0})
    _, views = _views(seed, 13)
    total = float((views[0].left / views[3].rate.min()).sum()) * 2  # egress and ingress
    compute = float(views[1].compute_left.max() + (views[2].layers * views[2].layer_compute).max())
    views[1].deadline[:] = total + compute + 1.0
    arrangement = policy.arrange(*views, 0.0)
    assert arrangement is not None
    assert not arrangement.pruned.any()


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(seed=seeds)
def test_explanations_exist_and_agree_with_the_level(seed: int) -> None:
    for name, params in POLICIES:
        policy = registry.make_policy(name, 13, params)
        _, views = _views(seed, 13, n=3)
        level = policy.evaluate(*views, 0.0)
        for row in range(len(level)):
            why = policy.explain(row, *views, 0.0)
            shown = -2 if level[row] == LEVEL_SCAVENGER else int(level[row])
            assert why.figures["level"] == shown
            assert len(why.reasons) >= 2
            assert all(s.endswith(".") and "nan" not in s for s in why.reasons), why.reasons
            assert not any(math.isnan(x) for x in why.figures.values()), why.figures
