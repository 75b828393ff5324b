# SPDX-License-Identifier: Apache-2.0
"""When a transfer's level may change, and in which direction."""

from __future__ import annotations

from typing import Final

import numpy as np

from mfsd.policy.base import B1, I2, LEVEL_NEW, LEVEL_NONE, TransferView

WHEN: Final = ("layer", "tick")
"""``layer``: at layer boundaries while the batch computes and at every evaluation afterwards, so that the bytes of one
message are not spread over two queues (MFS paper, section 4.2). ``tick``: at every evaluation."""


def unplaced(transfers: TransferView) -> B1:
    """Rows without a level of the ladder: new, restored from the scavenger, or unstaged so far. Shape (n,)."""
    # LEVEL_NEW and SCAVENGER are the two largest int16, NONE the only negative one.
    fresh: B1 = (transfers.level >= LEVEL_NEW) | (transfers.level == LEVEL_NONE)
    return fresh


def due(transfers: TransferView, when: str, *, enabled: bool = True) -> B1:
    """Rows that may be promoted in this evaluation, shape (n,)."""
    fresh = unplaced(transfers)
    if not enabled:
        return fresh
    if when == "tick":
        return np.ones(len(transfers), dtype=np.bool_)
    return fresh | transfers.layer_started | ~transfers.computing


def monotone(transfers: TransferView, wanted: I2, may: B1) -> I2:
    """The wanted level where it is due and more urgent than the old one, else the old one. Shape (n,).

    Rows without a level of the ladder get the wanted one.
    """
    raised = np.where(may, np.minimum(transfers.level, wanted), transfers.level)
    return np.where(unplaced(transfers), wanted, raised)
