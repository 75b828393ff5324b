# SPDX-License-Identifier: Apache-2.0
"""Levels of bytes of which nothing but the stage is known."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mfsd.policy.base import Policy
    from mfsd.policy.views import I2


def stage_levels(policy: Policy) -> I2:
    """Level per stage, shape (len(Stage),): what a static mark stands for, and a connection's bytes in between."""
    return policy.unannounced()
