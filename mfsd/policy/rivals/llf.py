# SPDX-License-Identifier: Apache-2.0
"""Least laxity first with full knowledge: what defer-and-promote approximates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from mfsd import units
from mfsd.policy.base import P2D, PolicyBase, place
from mfsd.policy.parts import bound, buckets
from mfsd.policy.parts.members import earliest, of_batch
from mfsd.policy.parts.params import option
from mfsd.policy.views import LEVEL_NONE, LEVEL_SCAVENGER

if TYPE_CHECKING:
    from mfsd.policy.views import F8, I2, BatchView, Explanation, LinkView, RequestView, TransferView


@dataclass(frozen=True, kw_only=True)
class Llf(PolicyBase):
    """Clairvoyant least-laxity-first. For simulation only.

        laxity = deadline - now - time still needed downstream - bytes left / B

    Source: the ideal that the MFS paper approximates; near-universal as a packet scheduler (Mittal et al.,
    "Universal packet scheduling", NSDI 2016). Stage 3 has nothing downstream. Stages 1 and 2 hold up their whole batch,
    so they carry the least laxity of its requests, with all that comes after them.

    Clairvoyant: ``compute_left`` of the requests must hold *everything* that is still to come for the first token, the
    transfers that nobody has announced yet included. A daemon can't know that; a simulator fills it in.

    Levels are a dense ranking of the laxities, in steps of ``quantum_ms`` (against thrashing between equals), at most
    ``levels``; real bands would merge nearly all of them. ``give_up`` sends the doomed to the scavenger: pure LLF
    serves them first, and under overload loses everything that way.
    """

    clairvoyant: ClassVar[bool] = True
    levels: int = 4096
    quantum_ms: float = option(1.0, "laxities closer than this rank alike", low=1e-6)
    give_up: bool = option(default=False, doc="doomed stage-3 transfers go to the scavenger")

    @property
    def default_after(self) -> int:
        """Unhinted traffic comes last."""
        return self.levels

    def laxity(
        self, transfers: TransferView, requests: RequestView, batches: BatchView, link: LinkView, now: float
    ) -> F8:
        """Seconds to spare, shape (n,); inf without any deadline."""
        rate = bound.path_rate(transfers, link)
        together = bound.request_bytes(transfers, len(link.rate), np.where(transfers.stage == P2D, transfers.left, 0.0))
        late = transfers.deadline - np.maximum(together, transfers.left + transfers.ahead) / rate
        downstream = of_batch(transfers, earliest(requests.deadline - requests.compute_left, requests, batches))
        own = transfers.deadline - transfers.compute_left
        early = np.where(transfers.batch >= 0, downstream, own) - (transfers.left + transfers.ahead) / rate
        return np.where(transfers.stage == P2D, late, early) - now

    def evaluate(
        self, transfers: TransferView, requests: RequestView, batches: BatchView, link: LinkView, now: float
    ) -> I2:
        """Rank of every transfer's laxity, shape (n,); NONE without a stage."""
        steps = np.floor(self.laxity(transfers, requests, batches, link, now) / (self.quantum_ms / 1e3))
        level = buckets.dense_rank(steps, self.levels)
        if self.give_up:
            doomed = (transfers.stage == P2D) & bound.judge(transfers, requests, link, now).transfers
            level = np.where(doomed, np.int16(LEVEL_SCAVENGER), level)
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
        laxity = float(self.laxity(transfers, requests, batches, link, now)[row])
        out.figures["laxity_s"] = laxity
        out.reasons.append(f"It has {units.duration(laxity)} to spare: {place(level)} by rank.")
