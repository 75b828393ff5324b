# SPDX-License-Identifier: Apache-2.0
"""States and decisions of the demand-bound policy, for its tests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import strategies as st

from mfsd.policy import registry
from mfsd.policy.demand_bound.policy import DemandBound
from support import policy_views as pv

if TYPE_CHECKING:
    import numpy.typing as npt

    from mfsd.policy.views import Decision, TransferView, Views

seeds = st.integers(0, 2**32 - 1)
RATE = 1e9
URGENT, COLLECTIVE, FIRST, OTHERS, DEFERRED = range(5)


def demand_bound(levels: int = 5, **params: Any) -> DemandBound:
    policy = registry.make_policy("demand-bound", levels, params)
    assert isinstance(policy, DemandBound)
    return policy


def random_state(seed: int, levels: int = 5, n: int = 14) -> Views:
    rng = np.random.default_rng(seed)
    return pv.random_view(rng, int(rng.integers(0, n)), devices=int(rng.integers(1, 4)), levels=levels)


def alone(size: float, due: float, **columns: Any) -> TransferView:
    """A transfer that takes ``size`` seconds of the link."""
    return pv.transfers(1, **({"size": size * RATE, "left": size * RATE, "deadline": due} | columns))


def decide(t: TransferView, policy: DemandBound | None = None, **link: Any) -> Decision:
    return (policy or demand_bound()).evaluate(pv.view(t, net=pv.link(RATE, 5, **link)))


def same_guarantee(decision: Decision, want: npt.NDArray[np.float64], deferred: int) -> None:
    """By device and level. What the deferred have meanwhile follows from what they need, which is exact to 1 in 32."""
    assert decision.guarantee is not None
    assert decision.guarantee[:, :deferred] == pytest.approx(want[:, :deferred])
    assert decision.guarantee[:, deferred:] == pytest.approx(want[:, deferred:], rel=1 / 31)


def shares(decision: Decision) -> list[float]:
    """What each level of the first device is guaranteed, as shares of the link."""
    assert decision.guarantee is not None
    return [round(float(x) / RATE, 4) for x in decision.guarantee[0]]
