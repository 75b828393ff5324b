# SPDX-License-Identifier: Apache-2.0
"""Rivals that look at deadlines: EDF as in the MFS paper, EDF over all flows, and Karuna."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from mfsd.ground import units
from mfsd.policy.base import Policy, place
from mfsd.policy.parts import buckets
from mfsd.policy.parts.members import deadlines
from mfsd.policy.parts.params import option
from mfsd.policy.rivals.size import size_edges
from mfsd.policy.views import COLLECTIVE, P2D

if TYPE_CHECKING:
    from mfsd.policy.views import B1, I2, Explanation, Views


@dataclass(frozen=True, kw_only=True)
class Edf(Policy):
    """Earliest deadline first.

    ``edf`` (baseline "EDF" of the MFS paper, section 6): transfers with an explicit deadline, stage 3 by that of their
    request and collectives whose hint gives one, strictly by it; those with implicit ones, stages 1 and 2, share what
    is left fairly on the last level. ``edf-all`` (``everything``): every transfer by the deadline of its request,
    collectives by their own or the earliest of their batch. Bytes of which only the stage is known (a static mark) have
    no deadline; by ``edf-all`` the collectives among them are due now, since the layer that computes waits for them.

    Approximated with bands: the order is that of buckets of time to the deadline (``first_ms``, growing by
    ``factor``), fair inside one; a transfer climbs as its deadline comes nearer. ``exact`` gives one level per distinct
    deadline, for simulation.
    """

    takes_levels: ClassVar[tuple[str, ...]] = ("everything",)
    levels: int = 8
    everything: bool = option(default=False, doc="stages 1 and 2 are ordered by deadline, too")
    first_ms: float = option(25.0, "time to the deadline of the first bucket", low=0.001)
    factor: float = option(2.0, "ratio of neighbouring buckets", low=1.01)
    exact: bool = option(default=False, doc="one level per distinct deadline: simulation only")

    @property
    def _ordered(self) -> int:
        """Levels for transfers ordered by deadline; the last one is for the others."""
        return self.levels if self.everything else self.levels - 1

    @cached_property
    def _edges(self) -> tuple[float, ...]:
        return buckets.edges(self._ordered, self.first_ms / 1e3, self.factor)

    @property
    def least_levels(self) -> int:
        """One for those with a deadline; one more for the others, if they are apart."""
        return 1 if self.everything else 2

    @property
    def default_after(self) -> int:
        """Unhinted traffic stands above the last level, or in the middle if all levels are ordered by deadline."""
        return (self.levels + 1) // 2 if self.everything else self._ordered

    def _level(self, view: Views) -> I2:
        explicit = self._explicit(view)
        deadline = deadlines(view) if self.everything else np.where(explicit, view.transfers.deadline, np.inf)
        if self.exact:
            level = buckets.dense_rank(deadline, self._ordered)
        else:
            level = buckets.bucket(deadline - view.now, self._edges)
        return level if self.everything else np.where(explicit, level, np.int16(self.levels - 1))

    @staticmethod
    def _explicit(view: Views) -> B1:
        """Transfers with a deadline of their own kind, shape (n,)."""
        t = view.transfers
        explicit: B1 = (t.stage == P2D) | ((t.stage == COLLECTIVE) & np.isfinite(t.deadline))
        return explicit

    def unannounced(self) -> I2:
        """Collectives first, if everything is ordered by deadline."""
        last = self.levels - 1
        if self.everything:
            return self.by_stage(kv_reuse=last, collective=0, p2d=last)
        return super().unannounced()

    def _reasons(self, out: Explanation, row: int, level: int, view: Views) -> None:
        if not self.everything and not self._explicit(view)[row]:
            out.reasons.append(f"Its deadline is implicit: {place(level)}, below all stage 3; nothing promotes it.")
            return
        time_left = float(deadlines(view)[row]) - view.now
        out.reasons.append(f"{units.duration(time_left)} remain to the deadline: {place(level)}.")
        if level and not self.exact:
            edge = self._edges[level - 1]
            out.figures |= {"threshold": edge, "next_promotion_s": time_left - edge}
            out.reasons.append(f"It is promoted when less than {units.duration(edge)} remain.")


@dataclass(frozen=True, kw_only=True)
class Karuna(Policy):
    """Karuna: deadline flows get no more than they need, the rest goes by size.

    Source: Chen et al., "Scheduling mix-flows in commodity datacenters with Karuna", SIGCOMM 2016, as used in the MFS
    paper (section 6): stage 3 runs at remaining / (deadline - now) above everything else; stages 1 and 2 are served
    shortest first in what that leaves.

    Approximated with bands, which can't hold a rate: a stage-3 transfer is on top while it is behind the straight line
    from its size at its creation to zero at its deadline, and on the last level while it is ahead. Averaged over some
    evaluations that is the minimal rate, without Karuna's congestion control. In between stand the size classes, as in
    ``sjf``, and in their middle bytes of which only the stage is known. A transfer that has missed its deadline joins
    them (the published rule for late flows wasn't available; this is the choice that hurts the others least).
    """

    levels: int = 8
    low_kb: float = option(0.0, "upper edge of the first size class; 0: classes by the sizes seen", low=0.0)
    high_kb: float = option(0.0, "lower edge of the last size class, if low_kb is given", low=0.0, at_least="low_kb")

    @property
    def least_levels(self) -> int:
        """Behind, a size class, ahead."""
        return 3

    @property
    def default_after(self) -> int:
        """Unhinted traffic stands above the stage-3 transfers that are ahead of their schedule."""
        return self.levels - 1

    def _level(self, view: Views) -> I2:
        t, now = view.transfers, view.now
        by_size = 1 + buckets.among(t.size, size_edges(view, self.levels - 2, self.low_kb, self.high_kb))
        held = (t.stage == P2D) & (t.deadline > now) & np.isfinite(t.deadline)
        paced = np.where(self._behind(view), 0, self.levels - 1)
        return np.where(held, paced, by_size).astype(np.int16)

    def unannounced(self) -> I2:
        """In the middle of the size classes."""
        middle = 1 + (self.levels - 3) // 2
        return self.by_stage(kv_reuse=middle, collective=middle, p2d=middle)

    @staticmethod
    def _behind(view: Views) -> B1:
        """Rows that have more left than the straight line allows, shape (n,)."""
        t = view.transfers
        with np.errstate(invalid="ignore"):  # inf * 0 where there is no deadline
            return t.left * (t.deadline - t.created) > t.size * (t.deadline - view.now)

    def _reasons(self, out: Explanation, row: int, level: int, view: Views) -> None:
        time_left = float(view.transfers.deadline[row]) - view.now
        if view.transfers.stage[row] != P2D or time_left <= 0 or np.isinf(time_left):
            late = " since its deadline has passed" if time_left <= 0 else ""
            out.reasons.append(f"It is ordered by its size{late}: {place(level)}; nothing promotes it.")
        else:
            need = float(view.transfers.left[row]) / time_left
            out.figures["needed_rate"] = need
            side, until = ("behind", "has caught up") if level == 0 else ("ahead", "falls behind")
            out.reasons.append(
                f"To be just in time it needs {units.rate(need)} from now on. It is {side}: {place(level)} until it "
                f"{until}."
            )
