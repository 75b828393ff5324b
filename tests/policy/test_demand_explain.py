# SPDX-License-Identifier: Apache-2.0
"""What the demand-bound policy says about itself, word by word."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
from support import policy_views as pv
from support.demand import RATE, demand_bound

from mfsd.policy.views import Views

if TYPE_CHECKING:
    from mfsd.policy.views import TransferView


# --- words ------------------------------------------------------------------------------------------------------------


def _why(t: TransferView, row: int = 0, **link: Any) -> tuple[str, dict[str, float]]:
    view = pv.view(t, net=pv.link(25e6, 5, **link))
    if (t.request >= 0).any():
        view.requests = pv.requests(int(t.request.max()) + 1, deadline=2.0)
    why = demand_bound().explain(row, view)
    return " ".join(why.reasons), why.figures


def test_explain_what_is_needed_and_guaranteed() -> None:
    t = pv.transfers(2, left=[6e6, 9e6], deadline=[0.5, 1.0])
    text, figures = _why(t)
    assert text.startswith(
        "It needs 127 Mbit/s of 200 Mbit/s to be in time, and 140 Mbit/s are guaranteed on its device. "
        "It is due first: level 2, above unhinted traffic. It is a prefill-to-decode"
    )
    need = 15e6 / (0.97 - 0.025)
    assert figures["needed_bytes_per_s"] == pytest.approx(need, rel=1e-3)
    assert figures["needed_share"] == pytest.approx(need / 25e6, rel=1e-3)
    assert figures["guaranteed_bytes_per_s"] == pytest.approx(1.1 * need)
    assert figures["laxity_s"] == pytest.approx(0.5 - 6 / 25)
    assert _why(t, 1)[0].startswith(
        "With what is due before it, it needs 127 Mbit/s of 200 Mbit/s to be in time, and 140 Mbit/s are guaranteed on "
        "its device. Others are due before it: level 3, above unhinted traffic."
    )


def test_explain_who_can_wait_and_for_how_long() -> None:
    text, figures = _why(pv.transfers(1, left=2.5e6, deadline=5.0, created=-1.0))
    assert text.startswith(
        "It needs 4.15 Mbit/s of 200 Mbit/s to be in time. That is less than 50% of it, so it can wait: level 4, below "
        "unhinted traffic. It is promoted in 4.77 s if nothing of it is sent until then. It is let through in 14 s "
        "whatever it needs."
    )
    assert figures["next_promotion_s"] == pytest.approx((5 * 0.97 - 0.025 - 0.1 / 0.5) / 0.97)
    assert figures["held_back_until_s"] == pytest.approx(14.0)


def test_explain_what_who_can_wait_has_meanwhile() -> None:
    text, _ = _why(pv.transfers(1, left=5e6, deadline=1.0), collectives=1.0)
    assert "level 4, below unhinted traffic, with 49.4 Mbit/s meanwhile. It is promoted in" in text


def test_explain_who_is_lost_and_who_was_kept() -> None:
    t = pv.transfers(3, left=[30e6, 20e6, 25e6], deadline=2.0, request=[0, 1, 2])
    text, figures = _why(t)
    assert text.startswith(
        "Its request is given up: what is due before it and was kept instead has less work each, 1.8 s in all, and "
        "leaves too little of the 2 s for its 1.2 s, or a sibling is late. So it is in the scavenger band. It comes "
        "back when it fits beside the others. It is let through in 15 s whatever it needs."
    )
    assert (figures["work_s"], figures["kept_before_s"]) == pytest.approx((1.2, 1.8))
    assert "its 4 s of work at full rate don't fit the 2 s left" in _why(pv.transfers(1, left=100e6, deadline=2.0))[0]
    assert "its deadline has passed" in _why(pv.transfers(1, deadline=-1.0))[0]
    slow = pv.transfers(1, request=0, deadline=2.0, compute_left=3.0)
    view = pv.view(slow, pv.requests(1, deadline=2.0, compute_left=3.0), pv.link(25e6, 5))
    assert "Its request is given up: its compute alone takes 3 s." in demand_bound().explain(0, view).reasons


@pytest.mark.parametrize(
    ("columns", "link", "sentence"),
    [
        ({"stage": 2}, {}, "It is a collective: level 1, only KV that is about to be too late stands above it."),
        (
            {"deadline": math.inf},
            {},
            "Nobody knows when it is due: level 3, above unhinted traffic, with as much as by plain",
        ),
        ({"deadline": 0.3, "left": 6.8e6}, {}, "Only 28 ms are to spare for it or what is due after it, less than"),
        ({"deadline": 0.1, "left": 1e5}, {}, "It has only 96 ms to spare: level 2, above unhinted traffic."),
        (
            {"deadline": 1.9, "left": 2e6, "peer": 0},
            {"peer_rate": [2e6]},
            "It needs 55% of the link into its peer to be",
        ),
        (
            {"deadline": 99.0, "created": -20.0},
            {},
            "It has been held back for 15 s, as long as it may be: it is let through on level 3, above unhinted",
        ),
    ],
)
def test_explain_says(columns: dict[str, Any], link: dict[str, Any], sentence: str) -> None:
    assert sentence in _why(pv.transfers(1, **columns), **link)[0]


def test_explain_without_a_rate_and_before_a_layer() -> None:
    view = pv.view(pv.transfers(1, deadline=5.0), net=pv.link(0.0, 5))
    text = " ".join(demand_bound().explain(0, view).reasons)
    assert (
        "It needs nobody knows how much of its device to be in time. Nobody knows what its device gives: level 2"
        in text
    )
    t = pv.transfers(1, stage=1, batch=0, target_layer=3, current_layer=2, deadline=9.0)
    view = Views.of(t, pv.link(RATE, 5), batches=pv.batches(1, layers=9, current_layer=2, layer_compute=0.1))
    assert "The layer that it feeds is about to start: level 3" in " ".join(demand_bound().explain(0, view).reasons)
