# SPDX-License-Identifier: Apache-2.0
"""The deadline ladder: collectives, then KV reuse by layer, then prefill-to-decode by deadline, the doomed last."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np

from mfsd.policy import bound, buckets, promote, rli, words
from mfsd.policy.base import (
    B1,
    I2,
    LEVEL_NONE,
    LEVEL_SCAVENGER,
    BatchView,
    Explanation,
    LinkView,
    RequestView,
    TransferView,
)
from mfsd.policy.common import P2D, PolicyBase, place
from mfsd.policy.params import option


@dataclass(frozen=True, kw_only=True)
class DeadlineLadder(PolicyBase):
    """Beyond the paper; source: design/policy-study.md.

    Levels, most urgent first::

        0                       collectives, always
        1 .. early_levels       stage 1 by RLI (one level: static)
        .. levels-1-doomed      stage 3 by absolute time to the deadline: first_ms, doubling by ``factor``
        .. levels-1             doomed stage 3, least work first, if ``doomed_levels`` > 0
        SCAVENGER               doomed stage 3

    Nothing stands above the collectives: lifting one urgent P2D there stalls whole batches. The buckets are absolute,
    so a level means the same on every host. *Give-up*: a stage-3 transfer of a request that can't be in time even
    alone (bound.py) leaves the ladder at once, and comes back when reality beats the bound; ``margin`` keeps it from
    flapping.
    """

    levels: int = 8
    early_levels: int = option(1, "levels for stage 1; 1: static, more: by RLI", low=1, high=64)
    first_ms: float = option(25.0, "time to the deadline below which stage 3 is most urgent", low=0.001)
    factor: float = option(2.0, "ratio of neighbouring deadline buckets", low=1.01)
    give_up: bool = option(default=True, doc="doomed stage-3 transfers go to the scavenger")
    margin: float = option(0.05, "share of the time left by which the bound must exceed it to give up", low=0.0)
    doomed_levels: int = option(0, "lowest levels that order the doomed by work left", low=0, high=64)
    doomed_first_ms: float = option(2.0, "work (time at port rate) of the first doomed level", low=0.001)
    promotion: bool = option(default=True, doc="off: a transfer keeps the level of its creation")
    when: str = option("tick", "when levels are re-evaluated", choices=promote.WHEN)
    _edges: tuple[float, ...] = field(init=False, repr=False)
    _doomed_edges: tuple[float, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        late = self.levels - self._late_base - self.doomed_levels
        if late < 1:
            raise ValueError(
                f"levels = {self.levels}: policy {self.name!r} needs at least {self.levels - late + 1} "
                f"with early_levels = {self.early_levels} and doomed_levels = {self.doomed_levels}"
            )
        object.__setattr__(self, "_edges", buckets.edges(late, self.first_ms / 1e3, self.factor))
        doomed = buckets.edges(self.doomed_levels + 1, self.doomed_first_ms / 1e3, self.factor)
        object.__setattr__(self, "_doomed_edges", doomed)

    @property
    def _late_base(self) -> int:
        return 1 + self.early_levels

    @property
    def default_after(self) -> int:
        """Unhinted traffic stands between the early stages and stage 3."""
        return self._late_base

    def evaluate(
        self, transfers: TransferView, requests: RequestView, batches: BatchView, link: LinkView, now: float
    ) -> I2:
        """Level of every transfer, shape (n,)."""
        del requests, batches
        stage = transfers.stage
        late = stage == P2D
        layers = rli.rli(transfers)
        # Collectives have RLI 0 by definition; stage 1 starts a level below them even when it is overdue.
        early = np.minimum(np.where(stage == rli.COLLECTIVE, 0, np.maximum(layers, 1)), self.early_levels)
        wanted = np.where(
            late, self._late_base + buckets.bucket(transfers.deadline - now, self._edges), early.astype(np.int16)
        )
        old = transfers
        if self.give_up and self.doomed_levels:
            # Rows on the doomed levels count as on the scavenger: if they come back they start afresh.
            given_up = (transfers.level >= self.levels - self.doomed_levels) & (transfers.level < self.levels)
            level = np.where(given_up, np.int16(LEVEL_SCAVENGER), transfers.level)
            old = dataclasses.replace(transfers, level=level)
        may = promote.due(old, self.when, enabled=self.promotion)
        level = promote.monotone(old, wanted, may)
        if self.give_up:
            level = np.where(self._doomed(transfers, link, now), self._doomed_level(transfers, link), level)
        return np.where(stage == 0, np.int16(LEVEL_NONE), level)

    def _doomed(self, transfers: TransferView, link: LinkView, now: float) -> B1:
        """Stage-3 rows to give up. Those given up already must fit again without the margin to come back."""
        was = transfers.level >= self.levels - self.doomed_levels
        was &= (transfers.level < self.levels) | (transfers.level == LEVEL_SCAVENGER)
        margin = np.where(was, 0.0, self.margin)
        doomed: B1 = (transfers.stage == P2D) & bound.infeasible(transfers, link, now, margin)
        return doomed

    def _doomed_level(self, transfers: TransferView, link: LinkView) -> I2:
        if not self.doomed_levels:
            return np.full(1, LEVEL_SCAVENGER, dtype=np.int16)
        work = bound.request_bytes(transfers, len(link.rate), transfers.left) / bound.port_rate(transfers, link)
        step = buckets.bucket(work, self._doomed_edges)
        base = np.int16(self.levels - self.doomed_levels)
        return np.where(step < self.doomed_levels, base + step, np.int16(LEVEL_SCAVENGER))

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
        del requests, batches
        stage = int(transfers.stage[row])
        if stage == 0:
            out.reasons.append("It has no stage: it stays in the default band.")
        elif stage == rli.COLLECTIVE:
            out.reasons.append("It is a collective: level 0, nothing stands above it.")
        elif stage != P2D:
            self._early_reasons(out, row, level, transfers)
        elif self.give_up and self._doomed(transfers, link, now)[row]:
            out.reasons.append(
                f"Its request is doomed (needs {words.seconds(out.figures['needed_s'])}, has "
                f"{words.seconds(max(float(transfers.deadline[row]) - now, 0.0))}): {place(level)}, so that others "
                "make theirs. It comes back when reality beats the estimate."
            )
        else:
            self._late_reasons(out, row, level, transfers, now)

    def _early_reasons(self, out: Explanation, row: int, level: int, transfers: TransferView) -> None:
        if self.early_levels == 1:
            out.reasons.append(f"Stage 1 is static: {place(level)}, below the collectives and above stage 3.")
            return
        out.reasons.append(
            f"It feeds layer {int(transfers.target_layer[row])} and layer {int(transfers.current_layer[row])} "
            f"computes: RLI {out.figures['rli']:.0f} is {place(level)}."
        )
        if level > 1 and self.promotion:
            target = int(transfers.target_layer[row]) - (level - 1)
            out.reasons.append(f"It is promoted when layer {target} starts.")

    def _late_reasons(self, out: Explanation, row: int, level: int, transfers: TransferView, now: float) -> None:
        time_left = float(transfers.deadline[row]) - now
        step = level - self._late_base
        lower = f"at least {words.seconds(self._edges[step - 1])}" if step else "no time to spare"
        upper = f"less than {words.seconds(self._edges[step])}" if step < len(self._edges) else "any more"
        out.reasons.append(
            f"{words.seconds(time_left)} remain to its deadline: {place(level)} is for {lower} up to {upper}."
        )
        if step and self.promotion:
            out.figures["threshold"] = self._edges[step - 1]
            out.figures["next_promotion_s"] = max(time_left - self._edges[step - 1], 0.0)
            out.reasons.append(
                f"It is promoted in {words.seconds(out.figures['next_promotion_s'])}, when less than "
                f"{words.seconds(self._edges[step - 1])} remain."
            )
