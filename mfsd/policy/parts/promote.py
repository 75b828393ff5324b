# SPDX-License-Identifier: Apache-2.0
"""When a transfer's level may change, and in which direction."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from mfsd.policy.views import B1, LEVEL_NEW, TransferView

WHEN: Final = ("layer", "tick")
"""``layer``: at layer boundaries while the batch computes and at every evaluation afterwards, so that the bytes of one
message are not spread over two queues (MFS paper, RMLQ). ``tick``: at every evaluation."""


def standing(transfers: TransferView) -> npt.NDArray[np.uint16]:
    """Old levels, with the rows that have none last: new, restored from the scavenger, unstaged so far. Shape (n,).

    So "the more urgent of the old and a wanted level" is a plain minimum.
    """
    # LEVEL_NEW and SCAVENGER are the two largest int16, and NONE (-1) is the largest uint16.
    return transfers.level.view(np.uint16)


def due(transfers: TransferView, when: str, *, enabled: bool = True) -> B1:
    """Rows that may be promoted in this evaluation, shape (n,): at least those without a level."""
    if enabled and when == "tick":
        return np.ones(len(transfers), dtype=np.bool_)
    fresh = standing(transfers) >= LEVEL_NEW
    return fresh | transfers.layer_started | ~transfers.computing if enabled else fresh
