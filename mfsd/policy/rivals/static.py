# SPDX-License-Identifier: Apache-2.0
"""Policies that look at nothing but the stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from mfsd.ground.bands import LEVEL_NONE
from mfsd.policy.base import Policy, place
from mfsd.policy.parts.params import option
from mfsd.policy.views import COLLECTIVE

if TYPE_CHECKING:
    from mfsd.policy.views import I2, Explanation, Views


@dataclass(frozen=True, kw_only=True)
class Fair(Policy):
    """Fair sharing: no priorities, every transfer in the default band, background ones too.

    Source: the baseline "Fair Sharing" (max-min) of the MFS paper, section 6. The shares of real connections are what
    TCP and the default band's leaf queue make of it.
    """

    background: ClassVar[int] = LEVEL_NONE
    levels: int = 1

    @property
    def default_after(self) -> int:
        """The one level band stays empty."""
        return 1

    def _level(self, view: Views) -> I2:
        return np.full(len(view.transfers), LEVEL_NONE, dtype=np.int16)

    def _reasons(self, out: Explanation, row: int, level: int, view: Views) -> None:
        del row, level, view
        out.reasons.append("The policy is fair sharing: every transfer stays in the default band, nothing promotes it.")


@dataclass(frozen=True, kw_only=True)
class TwoClass(Policy):
    """Static two-class: collectives strictly above all KV traffic, no order within the classes.

    Source: the traffic manager of DualPath (arXiv 2602.21548), which gives model communication about 99 % of a
    high-priority virtual lane and KV traffic the rest. Here the order is strict up to the bands' floors. KV is level 1,
    or with ``kv_default`` it shares the default band with unhinted traffic, as it would with one marked class only.
    """

    levels: int = 2
    kv_default: bool = option(default=False, doc="KV traffic stays in the default band")

    @property
    def least_levels(self) -> int:
        """One per class."""
        return 2

    @property
    def default_after(self) -> int:
        """Unhinted traffic stands below the collectives."""
        return 1

    def _level(self, view: Views) -> I2:
        kv = np.int16(LEVEL_NONE if self.kv_default else 1)
        return np.where(view.transfers.stage == COLLECTIVE, np.int16(0), kv)

    def _reasons(self, out: Explanation, row: int, level: int, view: Views) -> None:
        del row, view
        out.reasons.append(
            "It is a collective: level 0, above all KV traffic."
            if level == 0
            else f"It is not a collective: {place(level)}, below all collectives; nothing promotes it."
        )
