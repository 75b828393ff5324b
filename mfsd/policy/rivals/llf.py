# SPDX-License-Identifier: Apache-2.0
"""Least laxity first with full knowledge: what defer-and-promote approximates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from mfsd.ground import units
from mfsd.ground.bands import LEVEL_SCAVENGER
from mfsd.policy.base import Policy, place
from mfsd.policy.parts import bound, buckets
from mfsd.policy.parts.members import earliest, of_batch
from mfsd.policy.parts.params import option
from mfsd.policy.views import P2D

if TYPE_CHECKING:
    from mfsd.policy.views import F8, I2, Explanation, Views


@dataclass(frozen=True, kw_only=True)
class Llf(Policy):
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

    def _laxity(self, view: Views) -> F8:
        """Seconds to spare, shape (n,); inf without any deadline."""
        t, requests, rate = view.transfers, view.requests, bound.path_rate(view)
        own = t.left + t.ahead
        together = bound.request_bytes(view, np.where(t.stage == P2D, t.left, 0.0))
        late = t.deadline - np.maximum(together, own) / rate
        downstream = of_batch(view, earliest(view, requests.deadline - requests.compute_left))
        early = np.where(t.batch >= 0, downstream, t.deadline - t.compute_left) - own / rate
        return np.where(t.stage == P2D, late, early) - view.now

    def _level(self, view: Views) -> I2:
        level = buckets.dense_rank(np.floor(self._laxity(view) / (self.quantum_ms / 1e3)), self.levels)
        if not self.give_up:
            return level
        doomed = (view.transfers.stage == P2D) & bound.judge(view).transfers
        return np.where(doomed, np.int16(LEVEL_SCAVENGER), level)

    def _reasons(self, out: Explanation, row: int, level: int, view: Views) -> None:
        laxity = float(self._laxity(view)[row])
        out.figures["laxity_s"] = laxity
        out.reasons.append(f"It has {units.duration(laxity)} to spare: {place(level)} by rank.")
