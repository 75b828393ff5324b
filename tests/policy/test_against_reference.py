# SPDX-License-Identifier: Apache-2.0
"""Every vectorised policy decides like the plain one, on thousands of random states."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import hypothesis
import numpy as np
import pytest
from support import policy_views as pv
from support import reference as ref
from support import reference_rivals as rivals

from mfsd.policy import registry
from mfsd.policy.rivals import sincronia

if TYPE_CHECKING:
    from collections.abc import Callable

CASES = 4 * hypothesis.settings().max_examples
"""Few in `make check`, as of each property."""

LADDER = [
    (8, {}),
    (5, {"margin": 0.0}),
    (8, {"kv": "rli"}),
    (13, {"kv": "rli", "early_levels": 5, "when": "layer"}),
    (10, {"doomed_levels": 3}),
    (8, {"kv": "rli", "doomed_levels": 2, "margin": 0.5}),
    (8, {"give_up": False}),
    (8, {"promotion": False}),
    (60, {"first_ms": 1.0}),
]
MFS = [
    (8, {}),
    (13, {}),
    (13, {"arbitration": "level"}),
    (13, {"arbitration": "shared"}),
    (13, {"p1": False, "red_classes": 3}),
    (13, {"size": "transfer", "rho": "all"}),
    (13, {"rho": "above", "origin": 1, "upper": 2.0, "ratio": 2.0}),
    (13, {"late_infeasible": "scavenger", "when": "tick"}),
    (13, {"late_infeasible": "scavenger", "margin": 0.0, "p1": False}),
    (13, {"prune_early": True}),
    *[(13, {switch: False}) for switch in ("rli", "mlu", "red", "pruning", "promotion")],
]
OTHERS: list[tuple[str, int, dict[str, Any], Callable[[ref.State, Any], list[int]]]] = [
    ("sjf", 8, {}, rivals.by_size),
    ("sjf", 8, {"low_kb": 64.0, "high_kb": 262144.0}, rivals.by_size),
    ("sjf", 8, {"exact": True}, rivals.by_size),
    ("srpt", 5, {}, rivals.by_size),
    ("srpt", 4096, {"exact": True}, rivals.by_size),
    ("pias", 8, {}, rivals.by_size),
    ("pias", 2, {}, rivals.by_size),
    ("edf", 8, {}, rivals.edf),
    ("edf-all", 8, {}, rivals.edf),
    ("edf-all", 3, {"first_ms": 10.0, "factor": 4.0}, rivals.edf),
    ("karuna", 8, {}, rivals.karuna),
    ("karuna", 5, {"low_kb": 64.0, "high_kb": 262144.0}, rivals.karuna),
    ("sincronia", 8, {}, rivals.sincronia),
    ("sincronia", 3, {}, rivals.sincronia),
    ("llf", 4096, {}, rivals.llf),
    ("llf", 6, {"give_up": True, "quantum_ms": 20.0}, rivals.llf),
]
PARAMETERS = [
    *[pytest.param("deadline-ladder", n, p, ref.ladder, id=f"ladder-{n}-{p}") for n, p in LADDER],
    *[pytest.param("mfs", n, p, ref.mfs, id=f"mfs-{n}-{p}") for n, p in MFS],
    *[pytest.param(name, n, p, f, id=f"{name}-{n}-{p}") for name, n, p, f in OTHERS],
]


@pytest.mark.parametrize(("name", "levels", "params", "plain"), PARAMETERS)
def test_evaluate(name: str, levels: int, params: dict[str, Any], plain: Callable[[ref.State, Any], list[int]]) -> None:
    policy = registry.make_policy(name, levels, params)
    rng = np.random.default_rng(4)
    for case in range(CASES):
        n, r, devices = int(rng.integers(0, 14)), int(rng.integers(1, 6)), int(rng.integers(1, 4))
        view = pv.random_view(rng, n, requests_n=r, devices=devices, levels=levels)
        got = policy.evaluate(view).level
        assert got.dtype == np.int16
        assert got.tolist() == plain(ref.State(view), policy), f"case {case}"


@pytest.mark.parametrize("robust", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.6, 1.0])
def test_arrange(robust: bool, share: float) -> None:  # noqa: FBT001 (parametrised)
    policy = registry.make_policy("mfs", 13, {"red": robust, "drop_budget": share})
    rng = np.random.default_rng(5)
    pruned_ever = 0
    for case in range(CASES):
        view = pv.random_view(rng, int(rng.integers(0, 20)), devices=int(rng.integers(1, 4)))
        arrangement = policy.arrange(view)
        assert arrangement is not None
        rank, pruned = ref.arrange(ref.State(view), robust=robust, share=share)
        assert arrangement.rank.tolist() == rank, f"case {case}"
        assert arrangement.pruned.tolist() == pruned, f"case {case}"
        pruned_ever += sum(pruned)
    assert (pruned_ever > 0) == (share > 0)


@pytest.mark.parametrize("name", [n for n in registry.names() if n != "demand-bound"])
def test_infeasible(name: str) -> None:
    policy = registry.make_policy(name)
    rng = np.random.default_rng(6)
    for _ in range(CASES):
        view = pv.random_view(rng, int(rng.integers(0, 14)), devices=int(rng.integers(1, 4)))
        assert policy.infeasible(view).tolist() == ref.doomed(ref.State(view))


def test_sincronia_order() -> None:
    rng = np.random.default_rng(7)
    for _ in range(CASES):
        demand = rng.uniform(0, 1, (int(rng.integers(1, 8)), int(rng.integers(1, 4))))
        demand[rng.random(demand.shape) < 0.3] = 0.0
        assert sincronia.bssf(demand).tolist() == rivals.sincronia_order(demand.tolist())


def test_coflows_are_collectives_stage_1_sets_and_stage_3_sets() -> None:
    t = pv.transfers(
        8,
        stage=[2, 2, 2, 1, 1, 1, 3, 3],
        batch=[0, 0, 0, 0, 0, 0, 0, 0],
        request=[-1, -1, -1, 0, 0, 1, 0, 0],
        target_layer=[3, 3, 4, 5, 5, 5, 1, 2],
    )
    groups = sincronia.coflows(t).tolist()
    assert groups[0] == groups[1] != groups[2]  # one collective of one layer
    assert groups[3] == groups[4] != groups[5]  # one request's stage-1 set per layer
    assert groups[6] == groups[7]  # one request's stage-3 set, over all layers
    assert len(set(groups)) == 5
