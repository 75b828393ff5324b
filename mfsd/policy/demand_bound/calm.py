# SPDX-License-Identifier: Apache-2.0
"""For how long a decision may stand while nothing moves but time and bytes.

Needs and guarantees grow by a hundredth or so in a fiftieth of what somebody has to spare, less than buckets round
them by (load.py). Where anybody is late, given up, or waits for a layer, what comes next is decided at each tick.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from mfsd.policy.demand_bound.verdict import Verdict
    from mfsd.policy.views import F8, Views

SHARE: Final = 0.02
"""Of what the transfer with the least to spare has, and its compute."""
MOST_S: Final = 0.1
LEAST_S: Final = 0.01
"""Less is no more than a tick, and a fiftieth of what the margin (load.py) leaves only where there is more to spare."""
FEW: Final = 64
"""Among more transfers something happens at nearly each tick."""


def lasts(view: Views, verdict: Verdict, longest: Callable[[Views], F8]) -> float:
    """Seconds, from LEAST_S to MOST_S; 0: decide at the next tick. ``longest``: of being held back, shape (n,)."""
    t, r = view.transfers, view.requests
    if len(t) > FEW or verdict.lost.any() or verdict.late.any():
        return 0.0
    if verdict.asked.far is not None or len(verdict.asked.given.early):
        return 0.0
    spare = float(verdict.laxity.min(initial=np.inf))
    if r.compute_left.any():
        left = r.deadline - view.now - r.compute_left
        spare = min(spare, float(left[left > 0.0].min(initial=np.inf)))
    held = t.created + longest(view) - view.now
    out = min(MOST_S, SHARE * spare, float(held[held > 0.0].min(initial=np.inf)))
    return out if out > LEAST_S else 0.0
