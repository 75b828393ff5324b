# SPDX-License-Identifier: Apache-2.0
"""Policies that look at nothing but the stage."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mfsd.policy.base import PolicyBase
from mfsd.policy.parts.params import option
from mfsd.policy.parts.rli import COLLECTIVE
from mfsd.policy.views import I2, LEVEL_NONE, BatchView, Explanation, LinkView, RequestView, TransferView


@dataclass(frozen=True, kw_only=True)
class Fair(PolicyBase):
    """Fair sharing: no priorities, every transfer in the default band.

    Source: the baseline "Fair Sharing" (max-min) of the MFS paper, section 6. The shares of real connections are what
    TCP and the default band's leaf queue make of it.
    """

    levels: int = 1

    @property
    def default_after(self) -> int:
        """The one level band stays empty."""
        return 1

    def evaluate(
        self, transfers: TransferView, requests: RequestView, batches: BatchView, link: LinkView, now: float
    ) -> I2:
        """NONE for all, shape (n,)."""
        del requests, batches, link, now
        return np.full(len(transfers), LEVEL_NONE, dtype=np.int16)

    def _reasons(
        self,
        out: Explanation,
        row: int,
        level: int,
        transfers: TransferView,
        requests: RequestView,
        batches: BatchView,
        link: LinkView,
        now: float,
    ) -> None:
        del row, level, transfers, requests, batches, link, now
        out.reasons.append("The policy is fair sharing: every transfer stays in the default band, nothing promotes it.")


@dataclass(frozen=True, kw_only=True)
class TwoClass(PolicyBase):
    """Static two-class: collectives strictly above all KV traffic, no order within the classes.

    Source: the traffic manager of DualPath (arXiv 2602.21548), which gives model communication about 99 % of a
    high-priority virtual lane and KV traffic the rest. Here the order is strict up to the bands' floors. KV is level 1,
    or with ``kv_default`` it shares the default band with unhinted traffic, as it would with one marked class only.
    """

    levels: int = 2
    kv_default: bool = option(default=False, doc="KV traffic stays in the default band")

    def __post_init__(self) -> None:
        if self.levels < 2:
            raise ValueError(f"levels = {self.levels}: policy {self.name!r} needs at least 2")

    @property
    def default_after(self) -> int:
        """Unhinted traffic stands below the collectives."""
        return 1

    def evaluate(
        self, transfers: TransferView, requests: RequestView, batches: BatchView, link: LinkView, now: float
    ) -> I2:
        """0 for collectives, 1 (or NONE) for KV, NONE for what has no stage, shape (n,)."""
        del requests, batches, link, now
        kv = np.int16(LEVEL_NONE if self.kv_default else 1)
        level = np.where(transfers.stage == COLLECTIVE, np.int16(0), kv)
        return np.where(transfers.stage == 0, np.int16(LEVEL_NONE), level)

    def _reasons(
        self,
        out: Explanation,
        row: int,
        level: int,
        transfers: TransferView,
        requests: RequestView,
        batches: BatchView,
        link: LinkView,
        now: float,
    ) -> None:
        del transfers, requests, batches, link, now, row
        out.reasons.append(
            "It is a collective: level 0, above all KV traffic."
            if level == 0
            else "It is not a collective: it stays below all collectives, and nothing promotes it."
        )
