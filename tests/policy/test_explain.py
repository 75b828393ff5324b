# SPDX-License-Identifier: Apache-2.0
"""What policies say about themselves, word by word."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
from support import policy_views as pv

from mfsd.policy import registry
from mfsd.policy.views import Views

if TYPE_CHECKING:
    from mfsd.policy.parts import params


def _why(name: str, given: dict[str, params.Value], **columns: Any) -> tuple[str, dict[str, float]]:
    policy = registry.make_policy(name, 8, given)
    t = pv.transfers(1, **columns)
    r = pv.requests(1, batch=0, deadline=t.deadline[0], compute_left=t.compute_left[0])
    b = pv.batches(2, layers=32, current_layer=3, rank=[1, 0])
    link = pv.link(1e9, load=0.25, peer_rate=[math.inf, 5e8])
    why = policy.explain(0, Views.of(t, link, requests=r, batches=b))
    return " ".join(why.reasons), why.figures


def test_explain_a_deferred_transfer() -> None:
    text, figures = _why("deadline-ladder", {"last_ms": 400.0}, request=0, batch=0, left=1e6, ahead=2e6, deadline=0.08)
    assert text == (
        "80 ms remain to its deadline: level 4 is for 50 ms or more and less than 100 ms. "
        "It is promoted in 30 ms, when less than 50 ms remain. "
        "It is a prefill-to-decode (stage 3) transfer with 1 MB of 1 MB left behind 2 MB on its connection; "
        "its device gives 8 Gbit/s, 25% of it taken lately. "
        "Its deadline is in 80 ms; alone at full rate it needs 3 ms (MLU 0.0375)."
    )
    assert figures == pytest.approx(
        {
            "level": 4,
            "bytes_left": 1e6,
            "bytes_ahead": 2e6,
            "device_rate": 1e9,
            "rho": 0.25,
            "needed_s": 0.003,
            "compute_left_s": 0,
            "time_left_s": 0.08,
            "mlu": 0.0375,
            "red_rank": 1,
            "threshold": 0.05,
            "next_promotion_s": 0.03,
        }
    )


def test_explain_names_the_slow_link_of_a_peer() -> None:
    text, figures = _why("deadline-ladder", {}, left=1e6, peer=1, level=3)
    assert "its device gives 8 Gbit/s, 25% of it taken lately, the link into its peer 4 Gbit/s." in text
    assert "It has no deadline." in text
    assert figures["peer_rate"] == 5e8
    assert figures["needed_s"] == pytest.approx(0.002)
    assert figures["level_before"] == 3
    assert "peer_rate" not in _why("deadline-ladder", {}, peer=0)[1]


def test_explain_what_has_no_stage() -> None:
    text, figures = _why("mfs", {}, stage=0, left=5e5)
    assert text.startswith(
        "It has no stage: it stays in the default band. It is an unstaged transfer with 500 kB of 1 MB"
    )
    assert figures["level"] == -1


def test_explain_mlu() -> None:
    text, figures = _why("mfs", {}, request=0, left=2e7, deadline=0.4)
    assert figures["mlu"] == pytest.approx(0.05)
    assert figures["threshold"] == pytest.approx(0.125)
    # 20 MB take 20 ms; MLU is 0.125 when 160 ms are left.
    assert figures["next_promotion_s"] == pytest.approx(0.24)
    assert "Its MLU is 0.05 (bytes: request, rho: none); level 4 is for 0.0312 or more." in text
    assert (
        "It is promoted when its MLU reaches 0.125: in 240 ms if nothing of it is sent until then (at a layer boundary "
        "while its batch computes)." in text
    )


def test_explain_an_mlu_that_has_fallen() -> None:
    text, _ = _why("mfs", {"when": "tick"}, request=0, left=2e6, deadline=0.4, level=4)
    assert "level 4 was reached at 0.0312 or more, and MLU never demotes." in text
    assert "reaches 0.125: in 384 ms if nothing of it is sent until then." in text


def test_explain_rli() -> None:
    text, figures = _why("mfs", {}, stage=1, request=0, batch=0, target_layer=9, current_layer=3, computing=True)
    assert figures["rli"] == 6.0
    assert "It feeds layer 9 and layer 3 computes: RLI 6 is level 3 (the last RLI step is 2)." in text
    assert "It is promoted when layer 8 starts." in text
    early: dict[str, params.Value] = {"kv": "rli", "early_levels": 4}
    text, _ = _why("deadline-ladder", early, stage=1, target_layer=6, current_layer=3)
    assert "It feeds layer 6 and layer 3 computes: RLI 3 is level 3. It is promoted when layer 4 starts." in text


def test_explain_the_doomed() -> None:
    text, figures = _why("deadline-ladder", {}, request=0, left=1e9, deadline=0.5)
    assert figures["level"] == -2.0
    assert text.startswith("Its request is doomed (it needs 1 s or a sibling is late): the scavenger band")
    assert "Its request can't be in time even with its device to itself: it needs 1 s or a sibling is late, and" in text


def test_explain_the_late() -> None:
    text, _ = _why("deadline-ladder", {}, left=1e6, deadline=-0.02)
    assert "Its deadline is 20 ms ago; alone at full rate it needs 1 ms (MLU inf)." in text
    assert text.endswith("or a sibling is late, and has 0 ms.")


def test_explain_the_pruned() -> None:
    policy = registry.make_policy("mfs")
    view = pv.view(pv.transfers(1, request=0, deadline=1.0), pv.requests(1, deadline=1.0, pruned=True))
    assert policy.explain(0, view).reasons[0].startswith("Its request is pruned, so that others make their deadlines")
    view.requests.pruned[:] = False
    assert "pruned" not in policy.explain(0, view).reasons[0]


@pytest.mark.parametrize(
    ("name", "given", "columns", "sentence", "figures"),
    [
        ("deadline-ladder", {}, {"stage": 2}, "It is a collective: level 0, nothing stands above it.", {}),
        (
            "deadline-ladder",
            {"kv": "rli"},
            {"stage": 1},
            "Stage 1 is static: level 1, below the collectives and above stage 3.",
            {},
        ),
        (
            "deadline-ladder",
            {"promotion": False},
            {"deadline": 0.08, "left": 1e3, "level": 6},
            "80 ms remain to its deadline; it keeps level 6 until it may change.",
            {"level_before": 6},
        ),
        ("fair", {}, {}, "every transfer stays in the default band, nothing promotes it.", {"level": -1}),
        ("two-class", {}, {"stage": 2}, "It is a collective: level 0, above all KV traffic.", {"level": 0}),
        ("two-class", {}, {}, "It is not a collective: level 1, below all collectives; nothing promotes it.", {}),
        (
            "sjf",
            {"low_kb": 64, "high_kb": 262144},
            {"size": 1e6},
            "It has 1 MB (bytes in all): level 2 is for 262 kB and below 1.05 MB. Nothing promotes it.",
            {},
        ),
        (
            "srpt",
            {"low_kb": 64, "high_kb": 262144},
            {"left": 1e5},
            "It is promoted when less than 65.5 kB is left.",
            {"threshold": 65536},
        ),
        (
            "pias",
            {"low_kb": 64, "high_kb": 262144},
            {"left": 9e5},
            "It is demoted when 262 kB have been sent.",
            {"level": 1, "threshold": 262144},
        ),
        (
            "edf",
            {},
            {"deadline": 0.08},
            "80 ms remain to the deadline: level 2. It is promoted when less than 50 ms remain.",
            {"threshold": 0.05, "next_promotion_s": 0.03},
        ),
        ("edf", {}, {"stage": 1}, "Its deadline is implicit: level 7, below all stage 3; nothing promotes it.", {}),
        (
            "karuna",
            {},
            {"request": 0, "deadline": 0.1, "created": -0.1},
            "To be just in time it needs 80 Mbit/s from now on. It is behind: level 0 until it has caught up.",
            {"needed_rate": 1e7},
        ),
        (
            "karuna",
            {},
            {"left": 1e5, "deadline": 0.1, "created": -0.1},
            "needs 8 Mbit/s from now on. It is ahead: level 7 until it falls behind.",
            {"needed_rate": 1e6},
        ),
        (
            "karuna",
            {},
            {"deadline": -0.1},
            "It is ordered by its size since its deadline has passed: level 3; nothing promotes it.",
            {},
        ),
        ("llf", {}, {"left": 1e6, "deadline": 0.05}, "It has 49 ms to spare: level 0 by rank.", {"laxity_s": 0.049}),
        (
            "sincronia",
            {},
            {},
            "Its coflow is number 1 of 1: level 0. It moves up as coflows before it finish.",
            {"coflow_position": 0},
        ),
        ("mfs", {"mlu": False}, {"deadline": 0.1}, "MLU is switched off: level 7 like all of stage 3.", {"level": 7}),
        ("mfs-giveup", {}, {"left": 1e9, "deadline": 0.1}, "Its request can't be in time: the scavenger band", {}),
    ],
)
def test_explain_says(
    name: str, given: dict[str, Any], columns: dict[str, Any], sentence: str, figures: dict[str, float]
) -> None:
    text, got = _why(name, given, **columns)
    assert sentence in text
    assert {k: got[k] for k in figures} == pytest.approx(figures)
