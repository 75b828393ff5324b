# SPDX-License-Identifier: Apache-2.0
"""Transfers beside competitors on the simulated link, under a policy that decides as a daemon does: at ticks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from mfsd.ground.bands import BACKGROUND_FLOOR, DEFAULT_FLOOR, LEVEL_FLOOR, MAX_HTB_LEVELS, SCAVENGER_FLOOR
from mfsd.ground.model import Stage
from mfsd.lab.sim.decide import PolicyDecider, simulate
from mfsd.lab.sim.singlelink import BatchSpec, Case, Crowd, Order, Outcome, RequestSpec, Run
from mfsd.policy import registry

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mfsd.policy.base import Policy

RATE = 25e6
TICK_S = 0.01
FLOORS = DEFAULT_FLOOR + BACKGROUND_FLOOR + SCAVENGER_FLOOR + MAX_HTB_LEVELS * LEVEL_FLOOR
MARGIN_S, MARGIN_SHARE = 0.025, 0.03
"""As by default."""
CROWDS: dict[str, tuple[Crowd, ...]] = {
    "nobody": (),
    "a saturating collective": (Crowd(Stage.COLLECTIVE),),
    "a bulk transfer": (Crowd(Stage.NONE),),
    "four bulk transfers": (Crowd(Stage.NONE, 4),),
    "sixteen bulk transfers": (Crowd(Stage.NONE, 16),),
    "all of stage 1": (Crowd(Stage.KV_REUSE),),
    "all stages": (Crowd(Stage.KV_REUSE, 2), Crowd(Stage.COLLECTIVE), Crowd(Stage.P2D, 2), Crowd(Stage.BACKGROUND)),
    "background": (Crowd(Stage.BACKGROUND, 4),),
    "everybody": (Crowd(Stage.COLLECTIVE), Crowd(Stage.NONE), Crowd(Stage.BACKGROUND)),
}


@dataclass(frozen=True)
class Job:
    """A stage-3 transfer: seconds of the link, and until it is due, from when it is announced."""

    work: float
    due: float
    at: float = 0.0


def case(jobs: Iterable[Job], crowd: str = "nobody") -> Case:
    """A request each, in the order of their announcement."""
    ordered = sorted(jobs, key=lambda j: j.at)
    specs = [
        BatchSpec(j.at, 0.0, (0.0,), (RequestSpec(j.at + j.due, p2d=(j.work * RATE,)),), i)
        for i, j in enumerate(ordered)
    ]
    return Case(RATE, tuple(specs), CROWDS[crowd])


@dataclass
class Seen:
    """What was decided about one transfer, over time."""

    levels: list[int] = field(default_factory=list)
    infeasible: list[bool] = field(default_factory=list)


class Ticks(PolicyDecider):
    """Is asked at ticks and when something is announced, not when a transfer ends; notes what it decides."""

    def __init__(self, of: Case, policy: Policy) -> None:
        super().__init__(of, policy, floors=True)
        self.seen = [Seen() for _ in range(of.requests)]
        self._key: dict[int, float] = {}
        self._next = 0.0

    def order(self, run: Run) -> Order:
        if run.now >= self._next - 1e-9 or any(f not in self._key for f in run.active):
            self._last = super().order(run)
            self._key = dict(zip(run.active, self._last.key.tolist(), strict=True))
            self._next = (math.floor(run.now / TICK_S + 1e-6) + 1) * TICK_S
            for f in run.active:
                self.seen[run.request[f]].levels.append(int(run.level[f]))
                self.seen[run.request[f]].infeasible.append(bool(run.infeasible[f]))
            return self._last
        self._account(run)
        return Order(np.array([self._key[f] for f in run.active]), self._last.crowds, self._last.assured)


def promised(of: Case, until: float = math.inf, **params: float) -> tuple[Outcome, Ticks, Run]:
    """Under the default policy, with the default floors."""
    run, decider = Run(of), Ticks(of, registry.make_policy(registry.DEFAULT, None, params))
    return run.go(decider, TICK_S, until), decider, run


def shared(of: Case, until: float = math.inf) -> Outcome:
    """Under plain sharing: a fair share for every transfer and connection."""
    return simulate(of, registry.make_policy("fair"), TICK_S, until=until)


def edf_could(jobs: Sequence[Job], room: float) -> float:
    """Largest factor for the work of jobs that are all there with which EDF meets them, at a share ``room``.

    With the margins that the policy keeps.
    """
    total, factor = 0.0, math.inf
    for job in sorted(jobs, key=lambda j: j.due):
        total += job.work
        factor = min(factor, room * (job.due * (1 - MARGIN_SHARE) - MARGIN_S) / total)
    return factor
