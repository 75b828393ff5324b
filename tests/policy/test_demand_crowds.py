# SPDX-License-Identifier: Apache-2.0
"""Crowds under the demand-bound policy: very many connections are not deferred, nor moved to and fro."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from support import policy_views as pv
from support import reference as ref
from support.demand import (
    COLLECTIVE,
    DEFERRED,
    FIRST,
    OTHERS,
    RATE,
    URGENT,
    decide,
    demand_bound,
    same_guarantee,
    shares,
)
from support.reference_demand import Plain

from mfsd.policy.demand_bound.crowd import CROWD, REST

if TYPE_CHECKING:
    from mfsd.policy.views import TransferView


def many(count: int, work: float, due: float, **columns: Any) -> TransferView:
    """Transfers, each on its connection, that together take the link for ``work`` seconds."""
    size = work * RATE / count
    base = {"size": size, "left": size, "deadline": due, "conn": np.arange(count)}
    return pv.transfers(count, **(base | columns))


@pytest.mark.parametrize("seed", range(40))
def test_levels_and_guarantees_are_those_of_the_plain_policy(seed: int) -> None:
    """Some 100 rows on 1 or 2 devices, of stages 1 and 3 for the most part; given who is lost."""
    rng, policy = np.random.default_rng(seed), demand_bound()
    n, devices = int(rng.integers(20, 160)), 1 + seed % 2
    view = pv.random_view(rng, n, devices=devices, levels=5)
    t = view.transfers
    t.conn = rng.permutation(2 * n)[:n].astype(np.int32)
    t.stage = rng.choice([1, 2, 3, 3, 3, 3, 4], n).astype(t.stage.dtype)
    t.request[:], t.batch[:] = -1, -1
    view.link.collectives[: seed % 4] = 0.0
    t.deadline = rng.choice([0.2, 0.5, 2.0, 9.0], n) * rng.choice([1.0, 1.1], n)
    t.left = t.size = rng.uniform(0.01, 2.0) * RATE * rng.dirichlet(np.ones(n))
    lost = policy.judge(view).asked.lost
    plain = Plain(ref.State(view), policy, (set(np.flatnonzero(lost.requests)), set(np.flatnonzero(lost.alone))))
    want = [plain.level(i) for i in plain.s.rows()]
    got = policy.evaluate(view)
    assert got.level.tolist() == want
    same_guarantee(got, np.array(plain.guarantee(want)) * view.link.rate[:, None], policy.layout.deferred)


def test_a_crowd_is_not_deferred_though_it_has_much_time() -> None:
    for count, want in ((CROWD - 1, DEFERRED), (CROWD, OTHERS)):
        decision = decide(many(count, 0.4, 9.0))
        assert set(decision.level.tolist()) == {want}
        assert shares(decision) == [0.0] * 5


def test_beside_collectives_there_is_no_crowd() -> None:
    assert set(decide(many(CROWD, 0.4, 9.0), collectives=0.3).level.tolist()) == {DEFERRED}


def test_beside_collectives_that_never_pause_it_has_half_where_it_waits() -> None:
    for count, share in ((CROWD - 1, 1.1 * 0.2 / 0.89), (CROWD, 0.5)):
        decision = decide(many(count, 0.2, 1.0), collectives=1.0)
        assert set(decision.level.tolist()) == {DEFERRED}
        assert shares(decision)[DEFERRED] == pytest.approx(share, abs=1e-3)
    assert shares(decide(many(CROWD, 0.2, 1.0), collectives=0.5)) == [0.0] * 5


def test_connections_count_not_transfers() -> None:
    shared = decide(many(4 * CROWD, 0.4, 9.0, conn=np.arange(4 * CROWD) % (CROWD - 1)))
    assert set(shared.level.tolist()) == {DEFERRED}


def test_a_crowd_that_is_due_together_stays_where_it_is_and_is_guaranteed_what_it_needs() -> None:
    """Nobody of it is first or urgent: each of these moves would cost a hundred connections what is stuck."""
    for due, share in ((1.0, 0.4 * 1.1 / (1.0 * 0.97 - 0.025)), (0.5, 0.7), (0.42, 1.0)):
        decision = decide(many(100, 0.4, due))
        assert set(decision.level.tolist()) == {OTHERS}
        assert shares(decision)[OTHERS] == pytest.approx(share, abs=0.06) if due < 1.0 else True
        assert shares(decision)[URGENT] == shares(decision)[FIRST] == 0.0


def test_a_few_who_are_due_before_a_crowd_go_before_it() -> None:
    deadline = np.array([0.12] * 3 + [9.0] * 100)
    decision = decide(many(103, 1.0, 9.0, deadline=deadline))
    assert set(decision.level[:3].tolist()) == {FIRST}
    assert set(decision.level[3:].tolist()) == {OTHERS}


def test_what_is_left_of_a_crowd_is_not_deferred_until_little_is() -> None:
    for count, was, want in ((REST, OTHERS, OTHERS), (REST, DEFERRED, DEFERRED), (REST - 1, OTHERS, DEFERRED)):
        decision = decide(many(count, 0.05, 9.0, level=was))
        assert set(decision.level.tolist()) == {want}


def test_a_crowd_elsewhere_is_none_here() -> None:
    t = many(CROWD + 1, 0.4, 9.0, device=np.array([0] + [1] * CROWD))
    link = pv.link(np.array([RATE, RATE]), 5)
    assert demand_bound().evaluate(pv.view(t, net=link)).level.tolist() == [DEFERRED] + [OTHERS] * CROWD


def test_collectives_and_background_make_no_crowd() -> None:
    stage = np.array([3, 2] + [4] * CROWD)
    level = decide(many(CROWD + 2, 0.4, 9.0, stage=stage)).level.tolist()
    assert level[:2] == [DEFERRED, COLLECTIVE]


def test_explain_says_so() -> None:
    view = pv.view(many(CROWD, 0.4, 9.0), net=pv.link(RATE, 5))
    text = " ".join(demand_bound().explain(0, view).reasons)
    assert "It is one of very many, which are not deferred: level 3, above unhinted traffic." in text
