# SPDX-License-Identifier: Apache-2.0
"""MFS: defer and promote on a reverse multi-level queue."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from mfsd.ground import units
from mfsd.ground.bands import LEVEL_SCAVENGER
from mfsd.policy.base import Policy, place
from mfsd.policy.mfs import inter_request
from mfsd.policy.mfs.layout import ARBITRATION, Layout
from mfsd.policy.parts import bound, mlu, pick, promote, rli
from mfsd.policy.parts.params import option
from mfsd.policy.views import COLLECTIVE, KV_REUSE, P2D

if TYPE_CHECKING:
    from mfsd.policy.views import B1, F8, I2, Arrangement, Explanation, Views


@dataclass(frozen=True, kw_only=True)
class Mfs(Policy):
    """Multi-stage flow scheduling: MLU for stage 3, RLI for stages 1 and 2, RED and pruning across requests.

    Source: Sun et al., "Multi-stage Flow Scheduling for LLM Serving", arXiv 2603.17456. The
    defaults are the paper's where it gives one; what it leaves open is an option, and its default is what meets most
    deadlines on random single-link cases (docs/policies.md). Levels: layout.py.

    Approximated with bands: levels are merged when a device has fewer bands; ties inside a level are shared fairly by
    the leaf queues; RED breaks ties between at most ``red_classes`` classes of batches.
    """

    takes_levels: ClassVar[tuple[str, ...]] = ("p1", "arbitration", "red_classes", "red", "late_levels")
    levels: int = 8
    p1: bool = option(default=True, doc="level 0 is reserved for the most urgent stage 3, above collectives")
    arbitration: str = option(
        "ladder", "early before late: over the whole ladder, inside each level, or not at all", choices=ARBITRATION
    )
    red_classes: int = option(
        0, "classes of batches that RED tells apart; 0: 2 if levels allow, else 1", low=0, high=64
    )
    late_levels: int = option(0, "levels of stage 3 below P1 (ladder); 0: half of them", low=0, high=64)
    upper: float = option(0.5, "U of the MLU thresholds U * E^-i", low=1e-6, high=1e6)
    ratio: float = option(4.0, "E of the MLU thresholds", low=1.01, high=1e6)
    origin: int = option(1, "first i of the thresholds: the top one is U (0) or U/E (1, as printed)", low=0, high=1)
    rho: str = option("none", "load that counts as immovable", choices=mlu.RHO)
    size: str = option("request", "whose bytes count in MLU", choices=mlu.SIZE)
    late_infeasible: str = option(
        "top", "an MLU above 1 stays on top, or gives up at once", choices=("top", "scavenger")
    )
    margin: float = option(0.05, "share of the time left by which the bound must exceed it to give up", low=0.0)
    rli: bool = option(default=True, doc="ablation: off, all of stage 1 stands one step below the collectives")
    mlu: bool = option(default=True, doc="ablation: off, all of stage 3 stands on the lowest level")
    red: bool = option(default=True, doc="ablation: off, batches are ranked by their earliest deadline")
    pruning: bool = option(default=True, doc="ablation: off, nothing is pruned")
    promotion: bool = option(default=True, doc="ablation: off, a transfer keeps the level of its creation")
    when: str = option("layer", "when levels are re-evaluated", choices=promote.WHEN)
    drop_budget: float = option(
        0.2, "largest share of the live requests that may be pruned: of all hosts' if a coordinator counts them; at "
        "least one, 0: none", low=0.0, high=1.0
    )  # fmt: skip
    prune_early: bool = option(default=False, doc="stage 1 of a pruned request goes to the scavenger as well")

    @property
    def _classes(self) -> int:
        """RED classes, 0 to fit."""
        return self.red_classes or (0 if self.red else 1)

    @cached_property
    def _layout(self) -> Layout:
        return Layout.build(
            self.levels, p1=self.p1, arbitration=self.arbitration, red_classes=self._classes, late=self.late_levels
        )

    @cached_property
    def _thresholds(self) -> tuple[float, ...]:
        return mlu.thresholds(self._layout.late + self.p1 - 1, self.upper, self.ratio, self.origin)

    @property
    def least_levels(self) -> int:
        """A step of each kind."""
        return Layout.least(p1=self.p1, arbitration=self.arbitration, red_classes=self._classes, late=self.late_levels)

    @property
    def default_after(self) -> int:
        """Unhinted traffic stands below P1 and the early levels (ladder), or below the most urgent early ones."""
        return self._layout.default_after

    # --- transfers ----------------------------------------------------------------------------------------------------

    def _level(self, view: Views) -> I2:
        t = view.transfers
        # Late levels never fall; an early one falls with its batch's RED rank, but not by RLI.
        wanted = np.minimum(self._late_level(view), promote.standing(t.level)).astype(np.int16)
        wanted = pick.levels(t.stage == P2D, wanted, self._early_level(view))
        if self.when != "tick" or not self.promotion:
            wanted = pick.levels(promote.may_change(t, t.level, self.when, enabled=self.promotion), wanted, t.level)
        return pick.levels(self._demoted(view), np.int16(LEVEL_SCAVENGER), wanted)

    def _class(self, view: Views) -> I2:
        """RED class of each transfer's batch, 0 the most urgent; the last without a batch. Shape (n,).

        The batches that still compute, the only ones with early transfers, are spread evenly over the classes.
        """
        classes, batches = self._layout.classes, view.batches
        if classes == 1 or not len(batches):
            return np.full(len(view.transfers), classes - 1, dtype=np.int16)
        rivals = np.flatnonzero(~batches.compute_done)
        of_batch = np.full(len(batches) + 1, classes - 1, dtype=np.int16)
        order = rivals[np.argsort(batches.rank[rivals], kind="stable")]
        of_batch[order] = np.arange(len(order)) * classes // max(len(order), 1)
        return of_batch.take(view.transfers.batch)

    def _early_level(self, view: Views) -> I2:
        """Level by RLI, at least as urgent a step as before, and by the batch's present rank."""
        t = view.transfers
        layers = rli.rli(t) if self.rli else (t.stage != COLLECTIVE).astype(np.int32)
        step = np.minimum(layers, self._layout.early_step(promote.standing(t.level)))
        return self._layout.early_level(step, self._class(view))

    def _late_level(self, view: Views) -> I2:
        if not self.mlu:
            lowest = self._layout.late + self.p1 - 1
            return self._layout.late_level(np.full(len(view.transfers), lowest, dtype=np.int16))
        return self._layout.late_level(mlu.steps(self._mlu(view), self._thresholds))

    def _mlu(self, view: Views) -> F8:
        # New rows are judged as if they stood on the lowest level.
        level = np.minimum(promote.standing(view.transfers.level), np.uint16(self.levels - 1))
        return mlu.mlu(view, self.size, mlu.residual(view, self.rho, level))

    def _demoted(self, view: Views) -> B1:
        t, pruned = view.transfers, view.requests.pruned
        late = t.stage == P2D
        out = np.zeros(len(t), dtype=np.bool_)
        if self.pruning and pruned.any():
            out = np.append(pruned, False).take(t.request)
            out &= late | (t.stage == KV_REUSE) if self.prune_early else late
        if self.late_infeasible == "scavenger":
            out |= late & bound.judge(view, self.margin, t.level == LEVEL_SCAVENGER).transfers
        return out

    # --- requests -----------------------------------------------------------------------------------------------------

    def arrange(self, view: Views) -> Arrangement | None:
        """Ranks by RED and, within the drop budget, which requests to prune."""
        live = max(view.cluster_requests, len(view.requests))
        budget = max(int(self.drop_budget * live), 1) if self.pruning and self.drop_budget else 0
        return inter_request.arrange(view, robust=self.red, budget=budget)

    # --- words --------------------------------------------------------------------------------------------------------

    def _reasons(self, out: Explanation, row: int, level: int, view: Views) -> None:
        request = int(view.transfers.request[row])
        if level == LEVEL_SCAVENGER and self.pruning and request >= 0 and view.requests.pruned[request]:
            out.reasons.append(
                "Its request is pruned, so that others make their deadlines: the scavenger band. It comes back if the "
                "estimate at the next batch arrival or departure is better."
            )
        elif level == LEVEL_SCAVENGER:
            out.reasons.append("Its request can't be in time: the scavenger band, until reality beats the estimate.")
        elif view.transfers.stage[row] == P2D:
            self._late_reasons(out, row, level, view)
        else:
            self._early_reasons(out, row, level, view)

    def _early_reasons(self, out: Explanation, row: int, level: int, view: Views) -> None:
        t, batch = view.transfers, int(view.transfers.batch[row])
        target, current, collective = int(t.target_layer[row]), int(t.current_layer[row]), t.stage[row] == COLLECTIVE
        what = "It is a collective" if collective else f"It feeds layer {target}"
        out.reasons.append(
            f"{what} and layer {current} computes: RLI {out.figures['rli']:.0f} is {place(level)} "
            f"(the last RLI step is {self._layout.early - 1})."
        )
        if self._layout.classes > 1 and batch >= 0:
            rank, of = int(view.batches.rank[batch]), len(view.batches)
            out.reasons.append(f"Its batch has RED rank {rank} of {of}; rank breaks ties of equal RLI.")
        step = int(self._layout.early_step(np.array([level], dtype=np.int16))[0])
        if self.rli and self.promotion and step > 0 and not collective:
            out.reasons.append(f"It is promoted when layer {max(target - step + 1, current + 1)} starts.")

    def _late_reasons(self, out: Explanation, row: int, level: int, view: Views) -> None:
        if not self.mlu:
            out.reasons.append(f"MLU is switched off: {place(level)} like all of stage 3.")
            return
        value = float(self._mlu(view)[row])
        out.figures["mlu"] = value
        step = int(self._layout.late_step(level))
        least = self._thresholds[step] if step < len(self._thresholds) else 0.0
        reached = f"is for {least:.3g} or more" if step < len(self._thresholds) else "is for any MLU"
        if value < least:
            reached = f"was reached at {least:.3g} or more, and MLU never demotes"
        out.reasons.append(f"Its MLU is {value:.3g} (bytes: {self.size}, rho: {self.rho}); {place(level)} {reached}.")
        if step == 0 or not self.promotion:
            return
        target = self._thresholds[step - 1]
        out.figures["threshold"] = target
        if 0 < value < np.inf:
            # With no byte served, MLU grows as 1 / time left.
            wait = max(out.figures["time_left_s"] * (1.0 - value / target), 0.0)
            out.figures["next_promotion_s"] = wait
            boundary = " (at a layer boundary while its batch computes)" if self.when == "layer" else ""
            out.reasons.append(
                f"It is promoted when its MLU reaches {target:.3g}: in {units.duration(wait)} if nothing of it is sent "
                f"until then{boundary}."
            )
