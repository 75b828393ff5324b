# SPDX-License-Identifier: Apache-2.0
"""Levels of bytes of which nothing but the stage is known."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mfsd.bands import LEVEL_NONE
from mfsd.model import Stage
from mfsd.policy.views import BACKGROUND, COLLECTIVE, KV_REUSE, P2D, UNSTAGED, LinkView, TransferView, Views

if TYPE_CHECKING:
    from mfsd.policy.base import Policy
    from mfsd.policy.views import I2


def stage_levels(policy: Policy) -> I2:
    """Level per stage, shape (len(Stage),), when nothing else is known: no size, no deadline, due in this layer.

    What a static mark stands for, and what a connection's bytes get between its transfers. A policy that orders by
    what isn't known says itself what that means (``Policy.unannounced``).
    """
    known = policy.unannounced()
    if known is not None:
        return known
    transfers = TransferView.of(len(Stage), stage=list(Stage))
    return policy.evaluate(Views.of(transfers, LinkView.of(1.0, policy.levels))).level


def by_stage(policy: Policy, *, kv_reuse: int, collective: int, p2d: int) -> I2:
    """Levels by stage, shape (len(Stage),), where a policy says them itself."""
    out = np.zeros(len(Stage), dtype=np.int16)
    out[[UNSTAGED, KV_REUSE, COLLECTIVE, P2D, BACKGROUND]] = (LEVEL_NONE, kv_reuse, collective, p2d, policy.background)
    return out
