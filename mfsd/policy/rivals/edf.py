# SPDX-License-Identifier: Apache-2.0
"""Rivals that look at deadlines: EDF as in the MFS paper, EDF over all flows, and Karuna."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from mfsd import units
from mfsd.policy.base import P2D, PolicyBase, place
from mfsd.policy.parts import buckets
from mfsd.policy.parts.members import deadlines
from mfsd.policy.parts.params import option
from mfsd.policy.views import LEVEL_NONE

if TYPE_CHECKING:
    from mfsd.policy.views import B1, I2, BatchView, Explanation, LinkView, RequestView, TransferView


@dataclass(frozen=True, kw_only=True)
class Edf(PolicyBase):
    """Earliest deadline first.

    ``edf`` (baseline "EDF" of the MFS paper, section 6): transfers with an explicit deadline, stage 3, strictly by the
    deadline of their request; those with implicit ones, stages 1 and 2, share what is left fairly on the last level.
    ``edf-all`` (``everything``): every transfer by the deadline of its request, collectives by the earliest of their
    batch.

    Approximated with bands: the order is that of buckets of time to the deadline (``first_ms``, growing by
    ``factor``), fair inside one; a transfer climbs as its deadline comes nearer. ``exact`` gives one level per distinct
    deadline, for simulation.
    """

    levels: int = 8
    everything: bool = option(default=False, doc="stages 1 and 2 are ordered by deadline, too")
    first_ms: float = option(25.0, "time to the deadline of the first bucket", low=0.001)
    factor: float = option(2.0, "ratio of neighbouring buckets", low=1.01)
    exact: bool = option(default=False, doc="one level per distinct deadline: simulation only")
    _edges: tuple[float, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self._ordered < 1:
            raise ValueError(f"levels = {self.levels}: policy {self.name!r} needs at least 2")
        object.__setattr__(self, "_edges", buckets.edges(self._ordered, self.first_ms / 1e3, self.factor))

    @property
    def _ordered(self) -> int:
        """Levels for transfers ordered by deadline; the last one is for the others."""
        return self.levels if self.everything else self.levels - 1

    @property
    def default_after(self) -> int:
        """Unhinted traffic stands above the last level, or in the middle if all levels are ordered by deadline."""
        return (self.levels + 1) // 2 if self.everything else self._ordered

    def evaluate(
        self, transfers: TransferView, requests: RequestView, batches: BatchView, link: LinkView, now: float
    ) -> I2:
        """Bucket of every transfer's deadline, shape (n,); NONE without a stage."""
        del link
        deadline = deadlines(transfers, requests, batches) if self.everything else transfers.deadline
        if not self.everything:
            deadline = np.where(transfers.stage == P2D, deadline, np.inf)
        if self.exact:
            level = buckets.dense_rank(deadline, self._ordered)
        else:
            level = buckets.bucket(deadline - now, self._edges)
        if not self.everything:
            level = np.where(transfers.stage == P2D, level, np.int16(self.levels - 1))
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
        del link
        if transfers.stage[row] != P2D and not self.everything:
            out.reasons.append(f"Its deadline is implicit: {place(level)}, below all stage 3; nothing promotes it.")
            return
        time_left = float(deadlines(transfers, requests, batches)[row]) - now
        out.reasons.append(f"{units.duration(time_left)} remain to the deadline: {place(level)}.")
        if level and not self.exact:
            edge = self._edges[level - 1]
            out.figures |= {"threshold": edge, "next_promotion_s": time_left - edge}
            out.reasons.append(f"It is promoted when less than {units.duration(edge)} remain.")


@dataclass(frozen=True, kw_only=True)
class Karuna(PolicyBase):
    """Karuna: deadline flows get no more than they need, the rest goes by size.

    Source: Chen et al., "Scheduling mix-flows in commodity datacenters with Karuna", SIGCOMM 2016, as used in the MFS
    paper (section 6): stage 3 runs at remaining / (deadline - now) above everything else; stages 1 and 2 are served
    shortest first in what that leaves.

    Approximated with bands, which can't hold a rate: a stage-3 transfer is on top while it is behind the straight line
    from its size at its creation to zero at its deadline, and on the last level while it is ahead. Averaged over some
    evaluations that is the minimal rate, without Karuna's congestion control. In between stand the size classes of
    ``low_kb`` to ``high_kb``, as in ``sjf``. A transfer that has missed its deadline joins them (the published rule for
    late flows wasn't available; this is the choice that hurts the others least).
    """

    levels: int = 8
    low_kb: float = option(64.0, "upper edge of the first size class", low=1e-6)
    high_kb: float = option(262144.0, "lower edge of the last size class", low=1e-6)
    _edges: tuple[float, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.levels < 3:
            raise ValueError(f"levels = {self.levels}: policy {self.name!r} needs at least 3")
        if self.high_kb < self.low_kb:
            raise ValueError(f"high_kb = {self.high_kb:g}: must be at least low_kb ({self.low_kb:g})")
        object.__setattr__(self, "_edges", buckets.span(self.levels - 2, self.low_kb * 1024, self.high_kb * 1024))

    @property
    def default_after(self) -> int:
        """Unhinted traffic stands above the stage-3 transfers that are ahead of their schedule."""
        return self.levels - 1

    @staticmethod
    def _behind(transfers: TransferView, now: float) -> B1:
        """Rows that have more left than the straight line allows, shape (n,)."""
        lifetime = transfers.deadline - transfers.created
        with np.errstate(invalid="ignore"):  # inf * 0 where there is no deadline
            allowed = transfers.size * (transfers.deadline - now)
            return transfers.left * lifetime > allowed

    def evaluate(
        self, transfers: TransferView, requests: RequestView, batches: BatchView, link: LinkView, now: float
    ) -> I2:
        """Level of every transfer, shape (n,); NONE without a stage."""
        del requests, batches, link
        by_size = 1 + buckets.bucket(transfers.size, self._edges)
        held = (transfers.stage == P2D) & (transfers.deadline > now) & np.isfinite(transfers.deadline)
        paced = np.where(self._behind(transfers, now), 0, self.levels - 1)
        level = np.where(held, paced, by_size).astype(np.int16)
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
        del requests, batches, link
        time_left = float(transfers.deadline[row]) - now
        if level == LEVEL_NONE:
            out.reasons.append("It has no stage: it stays in the default band.")
        elif transfers.stage[row] != P2D or time_left <= 0 or np.isinf(time_left):
            late = " since its deadline has passed" if time_left <= 0 else ""
            out.reasons.append(f"It is ordered by its size{late}: {place(level)}; nothing promotes it.")
        else:
            need = float(transfers.left[row]) / time_left
            out.figures["needed_rate"] = need
            side = "behind: on top until it has caught up" if level == 0 else "ahead: last until it falls behind"
            out.reasons.append(f"To be just in time it needs {units.rate(need)} from now on. It is {side}.")
