# SPDX-License-Identifier: Apache-2.0
"""Levels of bytes of which nothing but the stage is known."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mfsd.bands import LEVEL_NEW, LEVEL_NONE
from mfsd.model import INF, Stage
from mfsd.policy.views import I2, BatchView, LinkView, RequestView, TransferView

if TYPE_CHECKING:
    from mfsd.policy.views import Policy


def stage_levels(policy: Policy) -> I2:
    """Level per stage, shape (len(Stage),), when nothing else is known: no deadline, due in the layer that computes.

    What a static mark stands for, and what a connection's bytes get between its transfers.
    """
    n = len(Stage)
    zeros, none = np.zeros(n), np.full(n, -1, dtype=np.int32)
    transfers = TransferView(
        stage=np.arange(n, dtype=np.uint8),
        size=np.ones(n),
        left=np.ones(n),
        ahead=zeros,
        request=none,
        batch=none,
        conn=none,
        target_layer=np.zeros(n, dtype=np.int32),
        current_layer=np.zeros(n, dtype=np.int32),
        computing=np.zeros(n, dtype=np.bool_),
        layer_started=np.ones(n, dtype=np.bool_),
        deadline=np.full(n, INF),
        compute_left=zeros,
        created=zeros,
        level=np.full(n, LEVEL_NEW, dtype=np.int16),
        port=np.zeros(n, dtype=np.int32),
        peer=none,
    )
    empty_f, empty_i, empty_b = np.zeros(0), np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.bool_)
    levels = policy.evaluate(
        transfers,
        RequestView(empty_f, empty_f, empty_i, empty_f, empty_b),
        BatchView(empty_i, empty_i, empty_f, empty_b, empty_f, empty_i),
        LinkView(np.ones(1), np.zeros(1), np.zeros((1, policy.levels + 1))),
        0.0,
    )
    levels[Stage.NONE] = LEVEL_NONE
    return levels
