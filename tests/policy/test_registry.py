# SPDX-License-Identifier: Apache-2.0
"""Choosing policies by name, their parameters, and what they say about themselves."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from support import policy_views as pv

from mfsd.policy import registry
from mfsd.policy.views import LEVEL_SCAVENGER, Policy

if TYPE_CHECKING:
    from mfsd.policy.parts import params

DEFAULT_FIRST = "deadline-ladder"


def test_names() -> None:
    assert registry.names()[0] == registry.DEFAULT == DEFAULT_FIRST
    rivals = {"fair", "two-class", "sjf", "srpt", "edf", "edf-all", "karuna", "pias", "sincronia", "llf"}
    assert rivals | {"mfs", "mfs-nop1", "mfs-giveup", DEFAULT_FIRST} == set(registry.names())


@pytest.mark.parametrize("name", registry.names())
def test_policies_are_frozen_and_cite_their_source(name: str) -> None:
    policy: Policy = registry.make_policy(name)
    assert policy.name == name
    assert policy.levels >= 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.levels = 3  # type: ignore[misc]
    doc = type(policy).__doc__ or ""
    assert any(word in doc for word in ("Source", "source", "(baseline", "SIGCOMM"))
    for key, text in registry.describe(name).items():
        assert text.startswith("default ")
        assert key


@pytest.mark.parametrize(
    ("name", "levels", "given", "message"),
    [
        ("fifo", None, {}, "policy = 'fifo': must be one of deadline-ladder, mfs"),
        ("mfs", None, {"uper": 1}, "uper = 1: policy 'mfs' has no such parameter; it has: arbitration, "),
        ("fair", None, {"levels": 3}, "levels = 3: policy 'fair' has no such parameter; it has: none"),
        ("mfs", None, {"upper": 0}, "upper = 0.0: must be a number from 1e-06 to 1e+06"),
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
        ("sjf", None, {"low_kb": 10, "high_kb": 1}, "high_kb = 1: must be at least low_kb"),
        ("karuna", None, {"low_kb": 10, "high_kb": 1}, "high_kb = 1: must be at least low_kb"),
        ("deadline-ladder", None, {"last_ms": 1}, "last_ms = 1: must be at least first_ms"),
        ("deadline-ladder", 3, {"doomed_levels": 2}, "levels = 3: policy 'deadline-ladder' needs at least 4"),
        ("fair", 0, {}, "levels = 0: must be an integer from 1"),
        ("fair", True, {}, "levels = True: must be an integer from 1"),
    ],
)
def test_errors_name_key_value_and_what_is_allowed(
    name: str, levels: int | None, given: dict[str, params.Value], message: str
) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        registry.make_policy(name, levels, given)


def test_an_integer_is_a_number() -> None:
    assert registry.make_policy("mfs", None, {"upper": 1}) == registry.make_policy("mfs", None, {"upper": 1.0})


def test_variants_differ_as_their_names_say() -> None:
    plain = registry.make_policy("mfs")
    assert dataclasses.replace(registry.make_policy("mfs-nop1"), name="mfs", p1=True) == plain  # type: ignore[type-var]
    giveup: Any = registry.make_policy("mfs-giveup")
    assert dataclasses.replace(giveup, name="mfs", late_infeasible="top") == plain


# --- worked levels ----------------------------------------------------------------------------------------------------


def _levels(name: str, given: dict[str, params.Value], t: Any, r: Any, now: float = 0.0, levels: int = 8) -> list[int]:
    policy = registry.make_policy(name, levels, given)
    out = policy.evaluate(t, r, pv.batches(1), pv.link(1e9, levels=levels), now)
    return [int(x) for x in out]


def test_two_class() -> None:
    t = pv.transfers(4, stage=[0, 1, 2, 3])
    assert _levels("two-class", {}, t, pv.requests(0)) == [-1, 1, 0, 1]
    assert _levels("two-class", {"kv_default": True}, t, pv.requests(0)) == [-1, -1, 0, -1]


def test_the_ladder_of_deadlines() -> None:
    """Edges of 8 levels from 12.5 to 400 ms double: 12.5, 25, 50, 100, 200, 400."""
    due = [0.005, 0.0125, 0.03, 0.09, 0.15, 0.3, 0.5, math.inf]
    t = pv.transfers(8, left=1e3, deadline=due)
    assert _levels("deadline-ladder", {"last_ms": 400.0}, t, pv.requests(0)) == [1, 2, 3, 4, 5, 6, 7, 7]


def test_the_doomed_go_to_the_scavenger_and_come_back_when_reality_beats_the_bound() -> None:
    policy = registry.make_policy("deadline-ladder")
    t = pv.transfers(2, request=[0, 1], left=[2e8, 1e6], deadline=0.1)
    r, b, link = pv.requests(2, deadline=0.1), pv.batches(0), pv.link(1e9)
    t.level = policy.evaluate(t, r, b, link, 0.0)
    assert t.level[0] == LEVEL_SCAVENGER
    assert t.level[1] < LEVEL_SCAVENGER
    t.left[0] = 5e7
    assert policy.evaluate(t, r, b, link, 0.01)[0] < LEVEL_SCAVENGER


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
    r = pv.requests(0)
    near, far, urgent, patient = _levels("mfs", {}, t, r, levels=13)
    assert near < far
    assert urgent == 0 < patient
    near, far, *_ = _levels("mfs", {"rli": False}, t, r, levels=13)
    assert near == far
    *_, urgent, patient = _levels("mfs", {"mlu": False}, t, r, levels=13)
    assert urgent == patient == 12
    t.level[:] = patient
    assert _levels("mfs", {"promotion": False}, t, r, levels=13) == [patient] * 4


# --- words ------------------------------------------------------------------------------------------------------------


def _why(name: str, given: dict[str, params.Value], **columns: Any) -> tuple[str, dict[str, float]]:
    policy = registry.make_policy(name, 8, given)
    t = pv.transfers(1, **columns)
    r = pv.requests(1, batch=0, deadline=t.deadline[0], compute_left=t.compute_left[0])
    b = pv.batches(2, layers=32, current_layer=3, rank=[1, 0])
    why = policy.explain(0, t, r, b, pv.link(1e9, load=0.25), 0.0)
    return " ".join(why.reasons), why.figures


def test_explain_a_deferred_transfer() -> None:
    text, figures = _why("deadline-ladder", {"last_ms": 400.0}, request=0, batch=0, left=1e6, deadline=0.08)
    assert "80 ms remain to its deadline: level 4 is for 50 ms or more and less than 100 ms." in text
    assert "It is promoted in 30 ms" in text
    assert figures["next_promotion_s"] == pytest.approx(0.03)
    assert figures["rho"] == 0.25
    assert figures["red_rank"] == 1.0


def test_explain_mlu() -> None:
    text, figures = _why("mfs", {}, request=0, left=2e7, deadline=0.4)
    assert figures["mlu"] == pytest.approx(0.05)
    assert figures["threshold"] == pytest.approx(0.125)
    # 20 MB take 20 ms; MLU is 0.125 when 160 ms are left.
    assert figures["next_promotion_s"] == pytest.approx(0.24)
    assert "It is promoted when its MLU reaches 0.125: in 240 ms if nothing of it is sent until then" in text


def test_explain_rli() -> None:
    text, figures = _why("mfs", {}, stage=1, request=0, batch=0, target_layer=9, current_layer=3, computing=True)
    assert figures["rli"] == 6.0
    assert "It feeds layer 9 and layer 3 computes: RLI 6 is level 3" in text
    assert "It is promoted when layer 8 starts." in text


def test_explain_the_doomed() -> None:
    text, figures = _why("deadline-ladder", {}, request=0, left=1e9, deadline=0.5)
    assert figures["level"] == -2.0
    assert "the scavenger band" in text
    assert "it needs 1 s" in text


def test_explain_karuna_names_the_rate() -> None:
    text, figures = _why("karuna", {}, request=0, left=1e6, size=1e6, deadline=0.1)
    assert figures["needed_rate"] == pytest.approx(1e7)
    assert "80 Mbit/s" in text


def test_explain_leaves_its_views_alone() -> None:
    rng = np.random.default_rng(1)
    for name in registry.names():
        views = pv.random_views(rng, 6)
        before = pv.take(views[0], slice(None))
        before = dataclasses.replace(
            before, **{f.name: getattr(before, f.name).copy() for f in dataclasses.fields(before)}
        )
        policy = registry.make_policy(name)
        policy.explain(0, *views, 0.0)
        policy.arrange(*views, 0.0)
        policy.evaluate(*views, 0.0)
        for f in dataclasses.fields(before):
            assert (getattr(before, f.name) == getattr(views[0], f.name)).all(), (name, f.name)
