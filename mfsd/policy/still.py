# SPDX-License-Identifier: Apache-2.0
"""Levels of bytes of which nothing but the stage is known."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mfsd.model import Stage
from mfsd.policy.views import LinkView, TransferView, Views

if TYPE_CHECKING:
    from mfsd.policy.base import Policy
    from mfsd.policy.views import I2


def stage_levels(policy: Policy) -> I2:
    """Level per stage, shape (len(Stage),), when nothing else is known: no deadline, due in the layer that computes.

    What a static mark stands for, and what a connection's bytes get between its transfers.
    """
    transfers = TransferView.of(len(Stage), stage=list(Stage))
    return policy.evaluate(Views.of(transfers, LinkView.of(1.0, policy.levels))).level
