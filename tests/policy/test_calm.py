# SPDX-License-Identifier: Apache-2.0
"""For how long a decision of the default policy may stand."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mfsd.policy.demand_bound import calm
from mfsd.policy.demand_bound.policy import DemandBound
from mfsd.policy.registry import DEFAULT, make_policy
from mfsd.policy.views import BACKGROUND, KV_REUSE, P2D, BatchView, LinkView, RequestView, TransferView, Views

if TYPE_CHECKING:
    from typing import Any

RATE = 1e9


def _policy() -> DemandBound:
    policy = make_policy(DEFAULT, 5)
    assert isinstance(policy, DemandBound)
    return policy


def _view(n: int = 1, **columns: Any) -> Views:
    """Transfers that stand where they are put."""
    columns.setdefault("stage", P2D)
    view = Views.of(TransferView.of(n, conn=range(n), **columns), LinkView.of(RATE, 5))
    view.transfers.level[:] = _policy().evaluate(view).level
    return view


def _lasts(view: Views) -> float:
    return _policy().evaluate(view).lasts


@given(st.lists(st.tuples(st.floats(0.01, 60.0), st.floats(1.0, 5e9)), min_size=1, max_size=8))
def test_needs_grow_by_next_to_nothing_meanwhile(some: list[tuple[float, float]]) -> None:
    """Though nothing has moved at all."""
    deadline, left = np.array(some).T
    view = _view(len(some), deadline=deadline, left=left, size=left)
    lasts = _lasts(view)
    assume(lasts > 0.0)
    before, after = (_policy().judge(v) for v in (view, replace(view, now=lasts)))
    assert (after.need <= before.need * (1.0 + 1.3 * calm.SHARE) * (1.0 + 2.0**-5)).all()  # buckets round
    assert not after.lost.any()


def test_it_is_short_where_there_is_little_to_spare() -> None:
    spare = np.array([60.0, 2.0, 1.0, 0.3])
    out = [_lasts(_view(deadline=s, left=1e3, size=1e3)) for s in spare]
    assert out == pytest.approx([calm.MOST_S, 2.0 * calm.SHARE, 1.0 * calm.SHARE, 0.0], abs=1e-3)


def test_what_is_new_is_decided_again() -> None:
    view = _view(deadline=60.0)
    assert _lasts(view) > 0.0
    view.transfers.level[:] = TransferView.of(1).level
    assert _lasts(view) == 0.0


def test_nothing_lasts_while_somebody_is_late_or_given_up() -> None:
    assert _lasts(_view(2, deadline=[60.0, 2.0], left=[1e3, 1.95e9], size=[1e3, 2e9])) == 0.0
    assert _lasts(_view(2, deadline=[60.0, 2.0], left=[1e3, 4e9], size=[1e3, 4e9])) == 0.0


def test_it_ends_when_somebody_has_been_held_back_for_long_enough() -> None:
    policy = _policy()
    view = _view(deadline=60.0, created=-policy.max_defer_p2d_s + 0.05)
    assert _lasts(view) == pytest.approx(0.05)
    assert _lasts(_view(stage=BACKGROUND)) == calm.MOST_S


def test_it_is_short_where_compute_leaves_little() -> None:
    view = _view(deadline=60.0, request=0)
    view.requests = RequestView.of(1, deadline=60.0, compute_left=59.0)
    assert _lasts(view) == pytest.approx(calm.SHARE, rel=0.1)


def test_layers_may_end_at_any_time() -> None:
    view = _view(stage=KV_REUSE, deadline=60.0, batch=0)
    assert _lasts(view) > 0.0
    view.batches = BatchView.of(1, layers=8, layer_compute=0.01)
    assert _lasts(view) == 0.0


def test_links_into_peers_are_looked_at_each_time() -> None:
    view = _view(deadline=60.0, left=1e9, size=1e9, peer=0)
    assert _lasts(view) > 0.0
    view.link.peer_rate = np.array([2e7])
    assert _lasts(view) == 0.0
