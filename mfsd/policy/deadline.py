# SPDX-License-Identifier: Apache-2.0
"""The deadline ladder: collectives on top, KV by time to the deadline below them, the doomed last."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Final

import numpy as np

from mfsd.ground import units
from mfsd.ground.bands import LEVEL_SCAVENGER
from mfsd.policy.base import Policy, place
from mfsd.policy.parts import bound, buckets, pick, promote, rli
from mfsd.policy.parts.members import earliest, of_batch
from mfsd.policy.parts.params import option
from mfsd.policy.views import COLLECTIVE, P2D

if TYPE_CHECKING:
    from mfsd.policy.views import B1, F8, I2, Explanation, Views

KV: Final = ("deadline", "rli")


@dataclass(frozen=True, kw_only=True)
class DeadlineLadder(Policy):
    """Beyond the MFS paper: deadline order with give-up. Source: docs/policies.md, chosen by measurement.

    Levels, most urgent first::

        kv = "deadline"                        kv = "rli"
        0    collectives, always               0                 collectives, always
        1 .. KV by time to the deadline        1 .. early_levels stage 1 by RLI (one level: static)
                                               ..                stage 3 by time to the deadline
        .. levels-1  doomed stage 3, least work first, if ``doomed_levels`` > 0
        SCAVENGER    doomed stage 3

    The deadline of a stage-1 transfer is the earliest of its batch's requests that can still be in time: they all wait
    for it. Nothing stands above the collectives: lifting one urgent P2D there stalls whole batches. The buckets are
    absolute, at equal ratios from ``first_ms`` to ``last_ms``, so a level means the same on every host.

    As time passes a level only rises. It falls if the deadline itself is moved: by a renewed hint, or for stage 1
    when the tightest request of its batch is given up.

    *Give-up*: a stage-3 transfer of a request that can't be in time even alone (bound.py) leaves the ladder at once,
    and comes back when reality beats the bound; ``margin`` keeps it from flapping. Stage 1 is never given up, since the
    requests of a batch run together.
    """

    takes_levels: ClassVar[tuple[str, ...]] = ("kv", "early_levels", "doomed_levels")
    levels: int = 8
    kv: str = option("deadline", "order of stage 1: with stage 3 by deadline, or above it by RLI", choices=KV)
    early_levels: int = option(1, "levels for stage 1 if kv = 'rli'; 1: static", low=1, high=64)
    first_ms: float = option(12.5, "time to the deadline below which KV is most urgent", low=0.001)
    last_ms: float = option(
        800.0, "time to the deadline above which KV is least urgent", low=0.001, at_least="first_ms"
    )
    give_up: bool = option(default=True, doc="doomed stage-3 transfers go to the scavenger")
    margin: float = option(0.05, "share of the time left by which the bound must exceed it to give up", low=0.0)
    doomed_levels: int = option(0, "lowest levels that order the doomed by work left", low=0, high=64)
    doomed_first_ms: float = option(
        2.0, "work (time at the device's rate) of the first doomed level; the next double", low=0.001
    )
    promotion: bool = option(default=True, doc="off: a transfer keeps the level of its creation")
    when: str = option("tick", "when levels are re-evaluated", choices=promote.WHEN)

    @cached_property
    def _edges(self) -> tuple[float, ...]:
        return buckets.span(self._doomed_base - self._base, self.first_ms / 1e3, self.last_ms / 1e3)

    @cached_property
    def _doomed_edges(self) -> tuple[float, ...]:
        return buckets.edges(self.doomed_levels + 1, self.doomed_first_ms / 1e3, 2.0)

    @property
    def least_levels(self) -> int:
        """At least one bucket of deadlines."""
        return self._base + 1 + self.doomed_levels

    @property
    def _base(self) -> int:
        """First level of the deadline buckets."""
        return 1 + self.early_levels if self.kv == "rli" else 1

    @property
    def _doomed_base(self) -> int:
        return self.levels - self.doomed_levels

    @property
    def default_after(self) -> int:
        """Unhinted traffic stands above the far half of the deadlines (kv = "deadline"), or above all stage 3."""
        return self._base if self.kv == "rli" else 1 + (self._doomed_base - 1) // 2

    def _level(self, view: Views) -> I2:
        t, p2d = view.transfers, view.transfers.stage == P2D
        doomed = self._judge(view) if self.give_up else None
        due_in = self._deadline(view, doomed) - view.now
        wanted = np.int16(self._base) + buckets.bucket(due_in, self._edges)
        if self.kv == "rli":
            # Stage 1 starts a level below the collectives even when it is overdue.
            early = 1 + np.clip(rli.rli(t) - 1, 0, self.early_levels - 1)
            wanted = pick.levels(p2d, wanted, early.astype(np.int16))
        wanted = pick.levels(t.stage == COLLECTIVE, np.int16(0), wanted)
        old = t.level
        if self.doomed_levels:
            # Rows on the doomed levels count as on the scavenger: if they come back they start afresh.
            old = pick.levels(self._given_up(old), np.int16(LEVEL_SCAVENGER), old)
        if self.when != "tick" or not self.promotion:
            wanted = pick.levels(promote.may_change(t, old, self.when, enabled=self.promotion), wanted, old)
        if doomed is not None:
            wanted = pick.levels(doomed.transfers & p2d, self._doomed_level(view), wanted)
        return wanted

    def _deadline(self, view: Views, doomed: bound.Verdict | None) -> F8:
        """What each transfer is ordered by, monotonic seconds, shape (n,)."""
        t, due = view.transfers, view.requests.deadline
        if self.kv == "rli" or not len(view.batches):
            return t.deadline
        live = due if doomed is None else np.where(doomed.requests, np.inf, due)
        return pick.floats((t.stage == P2D) | (t.batch < 0), t.deadline, of_batch(view, earliest(view, live)))

    def _given_up(self, level: I2) -> B1:
        on_ladder = (level >= self._doomed_base) & (level < self.levels)
        given_up: B1 = on_ladder | (level == LEVEL_SCAVENGER)
        return given_up

    def _judge(self, view: Views) -> bound.Verdict:
        return bound.judge(view, self.margin, self._given_up(view.transfers.level))

    def _doomed_level(self, view: Views) -> I2:
        if not self.doomed_levels:
            return np.full(1, LEVEL_SCAVENGER, dtype=np.int16)
        work = bound.request_bytes(view, view.transfers.left) / bound.path_rate(view)
        step = buckets.bucket(work, self._doomed_edges)
        return np.where(step < self.doomed_levels, self._doomed_base + step, np.int16(LEVEL_SCAVENGER)).astype(np.int16)

    def _reasons(self, out: Explanation, row: int, level: int, view: Views) -> None:
        doomed = self._judge(view) if self.give_up else None
        stage = view.transfers.stage[row]
        if stage == COLLECTIVE:
            out.reasons.append("It is a collective: level 0, nothing stands above it.")
        elif stage != P2D and self.kv == "rli":
            self._early_reasons(out, row, level, view)
        elif stage == P2D and doomed is not None and doomed.transfers[row]:
            out.reasons.append(
                f"Its request is doomed (it needs {units.duration(out.figures['needed_s'])} or a sibling is late): "
                f"{place(level)}, so that others make theirs. It comes back when reality beats the estimate."
            )
        else:
            deadline = float(self._deadline(view, doomed)[row])
            whose = "its deadline" if stage == P2D else "the first deadline of its batch that can still be met"
            self._deadline_reasons(out, level, deadline - view.now, whose)

    def _early_reasons(self, out: Explanation, row: int, level: int, view: Views) -> None:
        if self.early_levels == 1:
            out.reasons.append(f"Stage 1 is static: {place(level)}, below the collectives and above stage 3.")
            return
        target, current = int(view.transfers.target_layer[row]), int(view.transfers.current_layer[row])
        out.reasons.append(
            f"It feeds layer {target} and layer {current} computes: RLI {out.figures['rli']:.0f} is {place(level)}."
        )
        if level > 1 and self.promotion:
            out.reasons.append(f"It is promoted when layer {target - (level - 1)} starts.")

    def _deadline_reasons(self, out: Explanation, level: int, time_left: float, whose: str) -> None:
        step = level - self._base
        left = f"{units.duration(time_left)} remain to {whose}" if np.isfinite(time_left) else "It has no deadline"
        upper = self._edges[step] if step < len(self._edges) else np.inf
        lower = self._edges[step - 1] if step else -np.inf
        if not lower <= time_left < upper:
            out.reasons.append(f"{left}; it keeps {place(level)} until it may change.")
        else:
            above = f"{units.duration(lower)} or more" if step else ""
            below = f"less than {units.duration(upper)}" if np.isfinite(upper) else ""
            out.reasons.append(f"{left}: {place(level)} is for {' and '.join(filter(None, (above, below))) or 'all'}.")
        if step and self.promotion and np.isfinite(time_left):
            out.figures |= {"threshold": lower, "next_promotion_s": max(time_left - lower, 0.0)}
            out.reasons.append(
                f"It is promoted in {units.duration(out.figures['next_promotion_s'])}, when less than "
                f"{units.duration(lower)} remain."
            )
