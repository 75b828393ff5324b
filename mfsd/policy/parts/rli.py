# SPDX-License-Identifier: Apache-2.0
"""RLI, relative layer index: how many layers away the computation is from the layer that consumes a transfer.

MFS paper: RLI = L_target - L_current, level = min(RLI, K - 1). Serving the smallest RLI first minimises
the prefill makespan on one link (theorem 1). A collective blocks the layer that computes now: its RLI is 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mfsd.policy.views import COLLECTIVE

if TYPE_CHECKING:
    from mfsd.policy.views import I4, TransferView


def rli(transfers: TransferView) -> I4:
    """Relative layer index, >= 0, shape (n,): 0 for collectives and for what is overdue."""
    ahead = np.maximum(transfers.target_layer - transfers.current_layer, 0)
    out: I4 = ahead * (transfers.stage != COLLECTIVE)
    return out
