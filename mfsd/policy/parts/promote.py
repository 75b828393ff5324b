# SPDX-License-Identifier: Apache-2.0
"""When a transfer's level may change, and in which direction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from mfsd.ground.bands import LEVEL_BACKGROUND

if TYPE_CHECKING:
    from mfsd.policy.views import B1, I2, TransferView

WHEN: Final = ("layer", "tick")
"""``layer``: at layer boundaries while the batch computes and at every evaluation afterwards, so that the bytes of one
message are not spread over two queues (MFS paper, RMLQ). ``tick``: at every evaluation."""


def standing(level: I2) -> npt.NDArray[np.uint16]:
    """Old levels, with the rows that have none last: new, given up, background or unstaged so far. Shape (n,).

    So "the more urgent of the old and a wanted level" is a plain minimum.
    """
    # LEVEL_BACKGROUND, NEW and SCAVENGER are the largest int16, and NONE (-1) is the largest uint16.
    return level.view(np.uint16)


def may_change(transfers: TransferView, level: I2, when: str, *, enabled: bool) -> B1:
    """Rows that may leave their old ``level`` in this evaluation, shape (n,): at least those without one."""
    fresh = standing(level) >= LEVEL_BACKGROUND
    if not enabled:
        return fresh
    return np.ones_like(fresh) if when == "tick" else fresh | transfers.layer_started | ~transfers.computing
