# SPDX-License-Identifier: Apache-2.0
"""Choosing policies by name, their parameters, and worked levels."""

from __future__ import annotations

import dataclasses
import math
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from support import policy_views as pv

from mfsd.ground.bands import LEVEL_BACKGROUND, LEVEL_NONE, LEVEL_SCAVENGER
from mfsd.policy import registry
from mfsd.policy.parts.params import Problem, options

if TYPE_CHECKING:
    from mfsd.policy.base import Policy
    from mfsd.policy.parts import params
    from mfsd.policy.views import RequestView, TransferView

DEFAULT_FIRST = "demand-bound"


def test_policies_and_the_simulator_need_numpy_and_the_ground_only() -> None:
    code = "import sys, mfsd.policy.registry, mfsd.lab.sim.cases; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    ours = {name for name in loaded if name.split(".")[0] == "mfsd"}
    ground = {"mfsd", "mfsd.lab", "mfsd.ground", "mfsd.ground.model", "mfsd.ground.units", "mfsd.ground.bands"}
    assert {n for n in ours - ground if not n.startswith(("mfsd.policy", "mfsd.lab.sim"))} == set()
    assert not {"grpc", "google.protobuf", "pydantic", "pyroute2", "psutil", "mfsd.datapath"} & set(loaded)


def test_names() -> None:
    assert registry.names()[0] == registry.DEFAULT == DEFAULT_FIRST
    rivals = {"fair", "two-class", "sjf", "srpt", "edf", "edf-all", "karuna", "pias", "sincronia", "llf"}
    ours = {DEFAULT_FIRST, "deadline-ladder", "mfs", "mfs-nop1", "mfs-giveup"}
    assert rivals | ours == set(registry.names())


@pytest.mark.parametrize("name", registry.names())
def test_policies_are_frozen_and_cite_their_source(name: str) -> None:
    policy = registry.make_policy(name)
    assert policy.name == name
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.levels = 3  # type: ignore[misc]
    doc = type(policy).__doc__ or ""
    assert any(word in doc for word in ("Source", "source", "(baseline", "SIGCOMM"))


def test_parameters_are_described() -> None:
    assert registry.describe("fair") == {}
    kv_default = "default False, true or false: KV traffic stays in the default band"
    assert registry.describe("two-class") == {"kv_default": kv_default}
    mfs, nop1 = registry.describe("mfs"), registry.describe("mfs-nop1")
    assert mfs["p1"].startswith("default True, true or false: ")
    assert nop1["p1"].startswith("default False, true or false: ")
    assert mfs["upper"].startswith("default 0.5, a number from 1e-06 to 1e+06: ")
    assert mfs["rho"].startswith("default 'none', one of 'none', 'above', 'all': ")
    assert registry.describe("edf")["factor"].startswith("default 2.0, a number of at least 1.01: ")


@pytest.mark.parametrize(
    ("name", "levels", "given", "message"),
    [
        ("fifo", None, {}, "policy = 'fifo': must be one of demand-bound, deadline-ladder, mfs"),
        ("mfs", None, {"uper": 1}, "uper = 1: policy 'mfs' has no such parameter; it has: arbitration, "),
        ("fair", None, {"levels": 3}, "levels = 3: policy 'fair' has no such parameter; it has: none"),
        ("mfs", None, {"upper": 0}, "upper = 0: must be a number from 1e-06 to 1e+06"),
        ("mfs", None, {"upper": math.nan}, "upper = nan: must be a number"),
        ("mfs", None, {"upper": True}, "upper = True: must be a number"),
        ("mfs", None, {"origin": 0.5}, "origin = 0.5: must be an integer from 0 to 1"),
        ("mfs", None, {"p1": 1}, "p1 = 1: must be true or false"),
        ("mfs", None, {"rho": "most"}, "rho = 'most': must be one of 'none', 'above', 'all'"),
        ("mfs", None, {"_layout": 1}, "_layout = 1: policy 'mfs' has no such parameter"),
        ("mfs", 2, {}, "levels = 2: policy 'mfs' needs at least 3"),
        ("two-class", 1, {}, "levels = 1: policy 'two-class' needs at least 2"),
        ("karuna", 2, {}, "levels = 2: policy 'karuna' needs at least 3"),
        ("edf", 1, {}, "levels = 1: policy 'edf' needs at least 2"),
        ("sjf", None, {"low_kb": 10}, "high_kb = 0: must be at least low_kb (10)"),
        ("sjf", None, {"low_kb": 10, "high_kb": 1}, "high_kb = 1: must be at least low_kb"),
        ("karuna", None, {"low_kb": 10, "high_kb": 1}, "high_kb = 1: must be at least low_kb"),
        ("deadline-ladder", None, {"last_ms": 1}, "last_ms = 1: must be at least first_ms"),
        ("deadline-ladder", 3, {"doomed_levels": 2}, "levels = 3: policy 'deadline-ladder' needs at least 4"),
        ("demand-bound", 2, {}, "levels = 2: policy 'demand-bound' needs at least 3"),
        ("demand-bound", None, {"most": 1.1}, "most = 1.1: must be a number from 0 to 1"),
        ("fair", 0, {}, "levels = 0: must be an integer from 1"),
        ("fair", True, {}, "levels = True: must be an integer from 1"),
    ],
)
def test_errors_name_key_value_and_what_is_allowed(
    name: str, levels: int | None, given: dict[str, params.Value], message: str
) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        registry.make_policy(name, levels, given)


def test_problems_are_found_at_once() -> None:
    """Each by itself, and those that hold only together, as far as what they hold between is right."""
    given: dict[str, Any] = {"nonsense": 3, "margin": "x", "first_ms": 50, "last_ms": 5.0, "doomed_levels": 2}
    assert registry.problems("deadline-ladder", 3, given) == [
        Problem(
            "nonsense", 3, f"policy 'deadline-ladder' has no such parameter; it has: {_options('deadline-ladder')}"
        ),
        Problem("margin", "x", "must be a number of at least 0"),
        Problem("last_ms", 5.0, "must be at least first_ms (50)"),
        Problem("levels", 3, "policy 'deadline-ladder' needs at least 4 with these parameters", parameter=False),
    ]
    with pytest.raises(ValueError, match=r"^nonsense = 3: .*\nmargin = 'x': .*\nlast_ms = 5: .*\nlevels = 3: .*$"):
        registry.make_policy("deadline-ladder", 3, given)


def _options(name: str) -> str:
    return ", ".join(sorted(registry.describe(name)))


@pytest.mark.parametrize(
    ("name", "levels", "given", "fields"),
    [
        ("deadline-ladder", 8, {"first_ms": 1000.0, "last_ms": 8000.0}, []),
        ("deadline-ladder", 8, {"first_ms": 1000.0}, ["last_ms"]),
        ("deadline-ladder", 8, {"first_ms": 1000.0, "last_ms": "x"}, ["last_ms"]),
        ("deadline-ladder", 8, {"first_ms": "x", "last_ms": 1.0}, ["first_ms"]),
        ("deadline-ladder", 2, {"kv": "rly", "early_levels": 4}, ["kv"]),
        ("deadline-ladder", 2, {"kv": "rli", "early_levels": 4}, ["levels"]),
        ("deadline-ladder", 8, {"doomed_levels": 64}, ["levels"]),
        ("mfs", 2, {"p1": 0}, ["p1"]),
        ("mfs", 2, {"p1": False}, []),
        ("mfs", 2, {"upper": 0}, ["upper", "levels"]),
        ("mfs", 6, {"late_levels": 4, "red": False}, []),
        ("mfs", 6, {"late_levels": 4, "red_classes": 2}, ["levels"]),
        ("mfs", 0, {"late_levels": 64, "upper": 0}, ["upper", "levels"]),
        ("mfs-nop1", 2, {}, []),
        ("edf", 1, {"everything": True}, []),
        ("two-class", 1, {"levels": 3}, ["levels", "levels"]),
        ("fifo", 0, {"x": 1}, ["policy"]),
    ],
)
def test_nothing_is_a_problem_because_of_another(
    name: str, levels: int, given: dict[str, Any], fields: list[str]
) -> None:
    assert [p.field for p in registry.problems(name, levels, given)] == fields


def _others(policy: Policy, key: str) -> list[Any]:
    """Other values of a parameter."""
    old, choices = getattr(policy, key), options(type(policy))[key].metadata["choices"]
    return [c for c in choices if c != old] or ([not old] if isinstance(old, bool) else [old * 3 + 1])


@pytest.mark.parametrize("name", registry.names())
def test_what_needs_levels_is_declared(name: str) -> None:
    """So that a fault in any other parameter doesn't hide that there are too few levels."""
    policy = registry.make_policy(name, 64)
    bases = [dataclasses.replace(policy, **{k: v}) for k in registry.describe(name) for v in _others(policy, k)]
    for base in [policy, *bases]:
        for key in set(registry.describe(name)) - set(policy.takes_levels):
            for value in _others(base, key):
                assert dataclasses.replace(base, **{key: value}).least_levels == base.least_levels, key


@pytest.mark.parametrize("name", registry.names())
def test_the_least_levels_are_enough_and_one_less_is_refused(name: str) -> None:
    least = registry.make_policy(name, 64).least_levels
    view = pv.random_view(np.random.default_rng(1), 40, levels=least)
    policy = registry.make_policy(name, least)
    level = policy.evaluate(view).level
    assert set(level[(level >= 0) & (level < LEVEL_BACKGROUND)].tolist()) <= set(range(least))
    assert 0 <= policy.default_after <= least
    assert [p.field for p in registry.problems(name, least - 1)] == ["levels"]


def test_an_integer_is_a_number() -> None:
    assert registry.make_policy("mfs", None, {"upper": 1}) == registry.make_policy("mfs", None, {"upper": 1.0})


def test_variants_differ_as_their_names_say() -> None:
    plain = registry.make_policy("mfs")
    nop1: Any = registry.make_policy("mfs-nop1")
    giveup: Any = registry.make_policy("mfs-giveup")
    assert dataclasses.replace(nop1, name="mfs", p1=True) == plain
    assert dataclasses.replace(giveup, name="mfs", late_infeasible="top") == plain


# --- worked levels ----------------------------------------------------------------------------------------------------


def _levels(
    name: str, given: dict[str, params.Value], t: TransferView, r: RequestView | None = None, levels: int = 8
) -> list[int]:
    policy = registry.make_policy(name, levels, given)
    return [int(x) for x in policy.evaluate(pv.view(t, r, pv.link(1e9, levels))).level]


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("demand-bound", [-1, 3, 1, 3]),
        ("deadline-ladder", [-1, 4, 0, 4]),
        ("mfs", [-1, 1, 1, 4]),
        ("mfs-nop1", [-1, 0, 0, 4]),
        ("fair", [-1, -1, -1, -1]),
        ("two-class", [-1, 1, 0, 1]),
        ("sjf", [-1, 2, 2, 2]),
        ("srpt", [-1, 2, 2, 2]),
        ("pias", [-1, 4, 4, 4]),
        ("edf", [-1, 4, 4, 3]),
        ("edf-all", [-1, 4, 0, 4]),
        ("karuna", [-1, 2, 2, 2]),
        ("sincronia", [-1, 2, 2, 2]),
    ],
)
def test_levels_of_stages_of_which_nothing_else_is_known(name: str, want: list[int]) -> None:
    """By size, in the middle and just above unhinted traffic, but for PIAS; by deadline, collectives are due now."""
    policy = registry.make_policy(name, 5)
    background = LEVEL_NONE if name == "fair" else LEVEL_BACKGROUND
    assert policy.unannounced().tolist() == [*want, background]
    if name in ("sjf", "srpt"):
        assert want[1] == policy.default_after - 1


def test_size_classes_follow_the_sizes_seen() -> None:
    """Whatever their unit: as many transfers in each."""
    t = pv.transfers(4, stage=[2, 3, 1, 3], size=[1e3, 2e3, 4e3, 8e3])
    assert _levels("sjf", {}, t, levels=4) == [0, 1, 2, 3]
    t.size *= 1e6
    assert _levels("sjf", {}, t, levels=4) == [0, 1, 2, 3]
    view = pv.view(t)
    view.sizes = np.array([1e11, 2e11])
    assert registry.make_policy("sjf", 4).evaluate(view).level.tolist() == [0, 0, 0, 0]
    t.size[:] = 5e3
    assert _levels("sjf", {}, t, levels=4) == [1, 1, 1, 1]  # all alike: the middle
    assert _levels("sjf", {"low_kb": 1.0, "high_kb": 4.0}, t, levels=4) == [3, 3, 3, 3]


def test_collectives_with_bytes_or_a_deadline_are_transfers_like_all_others() -> None:
    t = pv.transfers(3, stage=[2, 3, 2], size=[1e6, 2e6, 3e6], deadline=[0.03, 0.3, math.inf])
    for name in ("sjf", "srpt"):
        t.left[:] = t.size
        assert _levels(name, {}, t, levels=3) == [0, 1, 2]
    assert _levels("edf", {}, t) == [1, 4, 7]
    assert _levels("edf-all", {}, t) == [1, 4, 7]


def test_two_class() -> None:
    t = pv.transfers(4, stage=[0, 1, 2, 3])
    assert _levels("two-class", {}, t) == [-1, 1, 0, 1]
    assert _levels("two-class", {"kv_default": True}, t) == [-1, -1, 0, -1]


def test_the_ladder_of_deadlines() -> None:
    """Edges of 8 levels from 12.5 to 400 ms double: 12.5, 25, 50, 100, 200, 400."""
    due = [0.005, 0.0125, 0.03, 0.09, 0.15, 0.3, 0.5, math.inf]
    t = pv.transfers(8, left=1e3, deadline=due)
    assert _levels("deadline-ladder", {"last_ms": 400.0}, t) == [1, 2, 3, 4, 5, 6, 7, 7]


def test_the_doomed_go_to_the_scavenger_and_come_back_when_reality_beats_the_bound() -> None:
    policy = registry.make_policy("deadline-ladder")
    t = pv.transfers(2, request=[0, 1], left=[2e8, 1e6], deadline=0.1)
    view = pv.view(t, pv.requests(2, deadline=0.1))
    t.level = policy.evaluate(view).level
    assert t.level.tolist() == [LEVEL_SCAVENGER, 4]  # 100 ms of 12.5, 28.7, 66, 151 ...: less than 151
    t.left[0] = 5e7
    view.now = 0.01
    assert policy.evaluate(view).level.tolist() == [4, 4]


def test_doomed_levels_put_the_least_work_first() -> None:
    t = pv.transfers(3, request=[0, 1, 2], left=[1e6, 3e6, 9e6], deadline=0.0005)
    got = _levels("deadline-ladder", {"doomed_levels": 2}, t, pv.requests(3, deadline=0.0005))
    assert got == [6, 7, LEVEL_SCAVENGER]


def test_a_batch_is_not_hurried_for_a_request_that_is_lost() -> None:
    t = pv.transfers(2, stage=1, request=[0, 1], batch=0, left=1e6, deadline=[0.001, 0.3])
    r = pv.requests(2, batch=0, deadline=[0.001, 0.3], compute_left=[0.05, 0.05])
    lost = _levels("deadline-ladder", {"last_ms": 400.0}, t, r)
    assert lost == [6, 6]  # as urgent as the 300 ms of the other one
    assert _levels("deadline-ladder", {"last_ms": 400.0, "give_up": False}, t, r) == [1, 1]


def test_pruned_requests_are_demoted_and_restored() -> None:
    t = pv.transfers(3, stage=[1, 2, 3], request=[0, -1, 0], batch=0, deadline=1.0)
    r = pv.requests(1, batch=0, deadline=1.0, pruned=True)
    assert [x == LEVEL_SCAVENGER for x in _levels("mfs", {}, t, r)] == [False, False, True]
    assert [x == LEVEL_SCAVENGER for x in _levels("mfs", {"prune_early": True}, t, r)] == [True, False, True]
    t.level[:] = LEVEL_SCAVENGER
    r.pruned[:] = False
    assert LEVEL_SCAVENGER not in _levels("mfs", {}, t, r)


def test_switches_of_mfs_do_what_they_say() -> None:
    t = pv.transfers(4, stage=[1, 1, 3, 3], target_layer=[1, 9, 0, 0], left=[1e6, 1e6, 9e8, 1e3], deadline=1.0, batch=0)
    near, far, urgent, patient = _levels("mfs", {}, t, levels=13)
    assert near < far
    assert urgent == 0 < patient
    near, far, *_ = _levels("mfs", {"rli": False}, t, levels=13)
    assert near == far
    *_, urgent, patient = _levels("mfs", {"mlu": False}, t, levels=13)
    assert urgent == patient == 12
    t.level[:] = patient
    assert _levels("mfs", {"promotion": False}, t, levels=13) == [patient] * 4


def test_the_benchmark_of_policies_names_parameters_that_they_have() -> None:
    from bench.optimality import contestants  # noqa: PLC0415 (not a part of the package)

    assert {registry.DEFAULT, "deadline-ladder", "llf"} <= set(contestants())
