# SPDX-License-Identifier: Apache-2.0
"""What all policies share: identity, the infeasibility bound, and the figures of an explanation."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from mfsd import units
from mfsd.policy.parts import bound, mlu, rli
from mfsd.policy.views import (
    B1,
    I2,
    LEVEL_NEW,
    LEVEL_NONE,
    LEVEL_SCAVENGER,
    Arrangement,
    BatchView,
    Explanation,
    LinkView,
    RequestView,
    TransferView,
)

STAGES: Final = {0: "unstaged", 1: "KV reuse (stage 1)", 2: "collective (stage 2)", 3: "prefill-to-decode (stage 3)"}
P2D: Final = 3
"""model.Stage.P2D, as the plain integer that numpy compares fastest."""


@dataclass(frozen=True, kw_only=True)
class PolicyBase(abc.ABC):
    """Base of every policy: a frozen bag of parameters."""

    name: str
    levels: int

    @property
    @abc.abstractmethod
    def default_after(self) -> int:
        """How many of the levels stand above the default band (unhinted traffic)."""

    @abc.abstractmethod
    def evaluate(
        self, transfers: TransferView, requests: RequestView, batches: BatchView, link: LinkView, now: float
    ) -> I2:
        """Level of every transfer, shape (n,)."""

    def arrange(
        self, transfers: TransferView, requests: RequestView, batches: BatchView, link: LinkView, now: float
    ) -> Arrangement | None:
        """No inter-request decision unless a policy has one."""
        del transfers, requests, batches, link, now
        return None

    def infeasible(
        self, transfers: TransferView, requests: RequestView, batches: BatchView, link: LinkView, now: float
    ) -> B1:
        """Rows of requests that can't be in time even with the port to themselves (bound.py), shape (n,)."""
        del batches
        return bound.judge(transfers, requests, link, now).transfers

    def explain(
        self, row: int, transfers: TransferView, requests: RequestView, batches: BatchView, link: LinkView, now: float
    ) -> Explanation:
        """Why row ``row`` is where it is: the policy's own reasons first, then the facts all policies share."""
        level = int(self.evaluate(transfers, requests, batches, link, now)[row])
        out = Explanation(figures=_figures(row, level, transfers, batches, link, now))
        if transfers.stage[row]:
            self._reasons(out, row, level, transfers, requests, batches, link, now)
        else:
            out.reasons.append("It has no stage: it stays in the default band.")
        out.reasons.extend(_facts(row, transfers, out.figures))
        if self.infeasible(transfers, requests, batches, link, now)[row]:
            out.reasons.append(
                "Its request can't be in time even with the port to itself: it needs "
                f"{units.duration(out.figures['needed_s'])} or a sibling is late, and has "
                f"{units.duration(max(out.figures.get('time_left_s', 0.0), 0.0))}."
            )
        return out

    @abc.abstractmethod
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
        """Append why ``row``, which has a stage, is at ``level`` and what would promote it; add figures."""


def place(level: int) -> str:
    """A level in words."""
    if level == LEVEL_NONE:
        return "the default band"
    return "the scavenger band" if level == LEVEL_SCAVENGER else f"level {level}"


def _figures(
    row: int, level: int, transfers: TransferView, batches: BatchView, link: LinkView, now: float
) -> dict[str, float]:
    batch = int(transfers.batch[row])
    port = int(transfers.port[row])
    old = int(transfers.level[row])
    out = {
        "level": -2.0 if level == LEVEL_SCAVENGER else float(level),
        "bytes_left": float(transfers.left[row]),
        "bytes_ahead": float(transfers.ahead[row]),
        "port_rate": float(link.rate[port]),
        "rho": float(link.load[port]),
        "needed_s": float(bound.seconds_needed(transfers, link)[row]),
        "compute_left_s": float(transfers.compute_left[row]),
    }
    if len(link.peer_rate) and transfers.peer[row] >= 0 and math.isfinite(link.peer_rate[transfers.peer[row]]):
        out["peer_rate"] = float(link.peer_rate[transfers.peer[row]])
    if old not in (LEVEL_NEW, LEVEL_NONE, LEVEL_SCAVENGER):
        out["level_before"] = float(old)
    if math.isfinite(transfers.deadline[row]):
        out["time_left_s"] = float(transfers.deadline[row] - now)
        out["mlu"] = float(mlu.mlu(transfers, link, now, "transfer", np.zeros(1))[row])
    if transfers.stage[row] in (1, 2):
        out["rli"] = float(rli.rli(transfers)[row])
    if batch >= 0:
        out["red_rank"] = float(batches.rank[batch])
    return out


def _facts(row: int, transfers: TransferView, figures: dict[str, float]) -> list[str]:
    stage = STAGES.get(int(transfers.stage[row]), "unknown stage")
    ahead = f" behind {units.size(figures['bytes_ahead'])} on its connection" if figures["bytes_ahead"] else ""
    far = f", the link into its peer {units.rate(figures['peer_rate'])}" if "peer_rate" in figures else ""
    facts = [
        (
            f"It is a {stage} transfer with {units.size(figures['bytes_left'])} of "
            f"{units.size(float(transfers.size[row]))} left{ahead}; its port gives {units.rate(figures['port_rate'])}, "
            f"{figures['rho']:.0%} of it taken lately{far}."
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
