# SPDX-License-Identifier: Apache-2.0
"""What a policy is, and what all of them share: the infeasibility bound and the figures of an explanation.

A policy is pure: no I/O, no clock of its own, no state. It imports numpy and the ground (model, units, bands) only.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

import numpy as np

from mfsd.ground import units
from mfsd.ground.bands import LEVEL_BACKGROUND, LEVEL_NONE, LEVEL_SCAVENGER, Classes, Urgency
from mfsd.ground.model import Stage
from mfsd.policy.parts import bound, mlu, pick, rli
from mfsd.policy.views import (
    BACKGROUND,
    COLLECTIVE,
    KV_REUSE,
    P2D,
    UNSTAGED,
    Decision,
    Explanation,
    LinkView,
    TransferView,
    Views,
)

if TYPE_CHECKING:
    from mfsd.policy.views import B1, I2, Arrangement

STAGES: Final = {
    UNSTAGED: "an unstaged",
    KV_REUSE: "a KV reuse (stage 1)",
    COLLECTIVE: "a collective (stage 2)",
    P2D: "a prefill-to-decode (stage 3)",
    BACKGROUND: "a background",
}
SHOWN: Final = {LEVEL_SCAVENGER: -2.0, LEVEL_BACKGROUND: -3.0}
"""Figure "level" of what is no level."""


@dataclass(frozen=True, kw_only=True)
class Policy(abc.ABC):
    """One scheduling policy: a frozen bag of parameters; all state is in the views.

    Made by ``registry.make_policy``, which checks the parameters: the classes rely on that.
    """

    name: str
    """As in the config."""
    levels: int
    """Number of levels it uses, 0 .. levels-1, besides NONE, BACKGROUND and SCAVENGER."""
    clairvoyant: ClassVar[bool] = False
    """True: only a simulator knows what it wants to be shown."""
    background: ClassVar[int] = LEVEL_BACKGROUND
    """Level of background transfers."""
    takes_levels: ClassVar[tuple[str, ...]] = ()
    """Parameters that ``least_levels`` depends on."""

    @property
    def least_levels(self) -> int:
        """How many levels it needs with these parameters."""
        return 1

    @property
    @abc.abstractmethod
    def default_after(self) -> int:
        """How many of its levels stand above the default band (unhinted traffic)."""

    @property
    def classes(self) -> Classes:
        """Class in the fabric of each level: urgent are the collectives' and what stands above it, middle the others.

        A policy that puts collectives last knows no order of stages: its first level is what it deems urgent.
        """
        collective = int(self.unannounced()[COLLECTIVE])
        urgent = collective + 1 if 0 <= collective < self.levels - 1 else 1
        return Classes((Urgency.URGENT,) * urgent + (Urgency.MIDDLE,) * (self.levels - urgent))

    def evaluate(self, view: Views) -> Decision:
        """Decide levels. Vectorised; called at layer boundaries and on the timer.

        What has no stage gets NONE, background transfers get BACKGROUND, whatever the policy.
        """
        decision, stage = self._decide(view), view.transfers.stage
        level = pick.levels(stage == UNSTAGED, np.int16(LEVEL_NONE), decision.level)
        decision.level = pick.levels(stage == BACKGROUND, np.int16(self.background), level)
        if decision.lasts > 0.0 and (decision.level != view.transfers.level).any():
            decision.lasts = 0.0  # what is decided next starts from other levels
        return decision

    def _decide(self, view: Views) -> Decision:
        """The decision, with any level for transfers without a stage and for background transfers."""
        return Decision(self._level(view))

    @abc.abstractmethod
    def _level(self, view: Views) -> I2:
        """Level of every transfer, shape (n,)."""

    def unannounced(self) -> I2:
        """Level per stage, shape (len(Stage),), of bytes of which nothing but the stage is known.

        What a static mark stands for, and what a connection's bytes get between its transfers: as a transfer without a
        deadline that is due in the layer that computes. A policy that orders by what isn't known says what that means.
        """
        transfers = TransferView.of(len(Stage), stage=list(Stage))
        return self.evaluate(Views.of(transfers, LinkView.of(1.0, self.levels))).level

    def by_stage(self, *, kv_reuse: int, collective: int, p2d: int) -> I2:
        """Levels by stage as ``unannounced`` returns them."""
        out = np.zeros(len(Stage), dtype=np.int16)
        stages = [UNSTAGED, KV_REUSE, COLLECTIVE, P2D, BACKGROUND]
        out[stages] = (LEVEL_NONE, kv_reuse, collective, p2d, self.background)
        return out

    def arrange(self, view: Views) -> Arrangement | None:
        """Inter-request decision; called when a batch arrives or departs. None: the policy has none."""
        del view
        return None

    def infeasible(self, view: Views) -> B1:
        """Rows of requests that can't be in time even with their devices to themselves (bound.py), shape (n,)."""
        return bound.judge(view).transfers

    def explain(self, row: int, view: Views) -> Explanation:
        """Why row ``row`` is where it is, and what would promote it and when.

        The policy's own reasons come first, then the facts that all policies share.
        """
        level = int(self.evaluate(view).level[row])
        out = Explanation(figures=_figures(row, level, view))
        stage = int(view.transfers.stage[row])
        if stage == UNSTAGED:
            out.reasons.append("It has no stage: it stays in the default band.")
        elif stage == BACKGROUND:
            out.reasons.append(f"Nobody waits for it: {place(level)}; nothing promotes it.")
        else:
            self._reasons(out, row, level, view)
        out.reasons.extend(_facts(row, view, out.figures))
        self._verdict(out, row, view)
        return out

    def _verdict(self, out: Explanation, row: int, view: Views) -> None:
        """Append that the request of ``row`` can't be in time, if that is so."""
        if self.infeasible(view)[row]:
            out.reasons.append(
                "Its request can't be in time even with its device to itself: it needs "
                f"{units.duration(out.figures['needed_s'])} or a sibling is late, and has "
                f"{units.duration(max(out.figures.get('time_left_s', 0.0), 0.0))}."
            )

    @abc.abstractmethod
    def _reasons(self, out: Explanation, row: int, level: int, view: Views) -> None:
        """Append why ``row``, of stage 1 to 3, is at ``level`` and what would promote it; add figures."""


def place(level: int) -> str:
    """A level in words."""
    words = {LEVEL_NONE: "default", LEVEL_BACKGROUND: "background", LEVEL_SCAVENGER: "scavenger"}
    return f"the {words[level]} band" if level in words else f"level {level}"


def _figures(row: int, level: int, view: Views) -> dict[str, float]:
    t, link = view.transfers, view.link
    batch, device, old = int(t.batch[row]), int(t.device[row]), int(t.level[row])
    out = {
        "level": SHOWN.get(level, float(level)),
        "bytes_left": float(t.left[row]),
        "bytes_ahead": float(t.ahead[row]),
        "device_rate": float(link.rate[device]),
        "rho": float(link.load[device]),
        "needed_s": float(bound.seconds_needed(view)[row]),
        "compute_left_s": float(t.compute_left[row]),
    }
    if len(link.peer_rate) and t.peer[row] >= 0 and math.isfinite(link.peer_rate[t.peer[row]]):
        out["peer_rate"] = float(link.peer_rate[t.peer[row]])
    if 0 <= old < LEVEL_BACKGROUND:
        out["level_before"] = float(old)
    if math.isfinite(t.deadline[row]):
        out["time_left_s"] = float(t.deadline[row] - view.now)
        out["mlu"] = float(mlu.mlu(view, "transfer", np.zeros(1))[row])
    if t.stage[row] in (KV_REUSE, COLLECTIVE):
        out["rli"] = float(rli.rli(t)[row])
    if batch >= 0:
        out["red_rank"] = float(view.batches.rank[batch])
    return out


def _facts(row: int, view: Views, figures: dict[str, float]) -> list[str]:
    stage, whole = STAGES[int(view.transfers.stage[row])], float(view.transfers.size[row])
    ahead = f" behind {units.size(figures['bytes_ahead'])} on its connection" if figures["bytes_ahead"] else ""
    far = f", the link into its peer {units.rate(figures['peer_rate'])}" if "peer_rate" in figures else ""
    facts = [
        (
            f"It is {stage} transfer with {units.size(figures['bytes_left'])} of {units.size(whole)} left{ahead}; "
            f"its device gives {units.rate(figures['device_rate'])}, {figures['rho']:.0%} of it taken lately{far}."
        )
    ]
    if "time_left_s" in figures:
        facts.append(
            f"Its deadline is {_when(figures['time_left_s'])}; alone at full rate it needs "
            f"{units.duration(figures['needed_s'])} (MLU {figures['mlu']:.3g})."
        )
    else:
        facts.append("It has no deadline.")
    return facts


def _when(time_left: float) -> str:
    return f"in {units.duration(time_left)}" if time_left > 0 else f"{units.duration(-time_left)} ago"
