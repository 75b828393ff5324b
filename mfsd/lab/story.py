# SPDX-License-Identifier: Apache-2.0
"""Find, in what was measured, a prefill-to-decode transfer that was deferred and then promoted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from mfsd.lab.results import timings

if TYPE_CHECKING:
    import numpy.typing as npt

    from mfsd.lab.arm import Outcome, Plan
    from mfsd.lab.results import Timing

AROUND_S: Final = 0.1
SCAVENGER: Final = 1_000
"""As a level, for comparing: below every other."""


@dataclass(frozen=True, slots=True)
class Step:
    """From ``at`` on the connection has this level; ``rescued``: a purge has happened since the step before."""

    at: float
    level: int
    rescued: bool


@dataclass(frozen=True, slots=True)
class Story:
    """One request's transfers. Times in seconds since the beginning of the replay."""

    timing: Timing
    lane: int
    began: float
    """First KV handed to its lane."""
    steps: list[Step]
    """Of its lane's connection, from ``began`` to the end; at least one."""
    deferred: float
    """Seconds at the lowest level that it had."""
    promoted: float | None
    """When it left that level for a more urgent one; None: never."""
    early: float
    """Share of its bytes that arrived before that."""
    jump: float
    """Goodput in the ``AROUND_S`` after the promotion less that before it, over the link's rate."""

    @property
    def tellable(self) -> bool:
        """Deferred, then promoted, then in time."""
        return self.promoted is not None and self.timing.met

    @property
    def score(self) -> float:
        """The longer it was held back, the less came through meanwhile, the sharper the turn: the better to see."""
        return min(self.deferred, 1.0) * (1.0 - self.early) * max(self.jump, 0.0)


def rank_of(level: int) -> int:
    """A level as urgency, 0 first: the default band (-1) stands between, and is not expected here."""
    return SCAVENGER if level == -2 else max(level, 0)


def steps(outcome: Outcome, rank: int, lane: int, start: float, end: float) -> list[Step]:
    """What was seen of a lane's level between two times, beginning with the level that it had at ``start``."""
    out: list[Step] = []
    rescues = 0
    for change in outcome.levels[rank] if rank < len(outcome.levels) else []:
        if change.lane != lane or change.at > end:
            continue
        if change.at <= start:
            out = [Step(start, change.level, rescued=False)]
        elif not out or out[-1].level != change.level or change.rescues > rescues:
            out.append(Step(change.at, change.level, rescued=change.rescues > rescues))
        rescues = change.rescues
    return out


def stories(plan: Plan, outcome: Outcome) -> list[Story]:
    """Of every request whose KV was sent and whose lane was seen, the best to see first."""
    decode = outcome.arrivals["decode0"]
    out = []
    for timing in timings(plan, outcome):
        log = outcome.ranks[timing.rank]
        if timing.id not in outcome.done or timing.id not in log["p2d_began"]:
            continue
        lane, began = log["lane_of"][timing.id], log["p2d_began"][timing.id]
        seen = steps(outcome, timing.rank, lane, began, timing.done)
        if not seen:
            continue
        lowest = max(rank_of(s.level) for s in seen)
        promoted, deferred = None, 0.0
        for step, after in zip(seen, [*(s.at for s in seen[1:]), timing.done], strict=True):
            if rank_of(step.level) == lowest:
                deferred += after - step.at
                promoted = None
            elif promoted is None and deferred:
                promoted = step.at
        own = decode[decode["key"] == timing.id]
        turn = timing.done if promoted is None else promoted
        early = _received(own, 0.0, turn) / max(_received(own, 0.0, timing.done + 1.0), 1)
        change = _received(own, turn, turn + AROUND_S) - _received(own, turn - AROUND_S, turn)
        jump = change / (AROUND_S * plan.scaled.link.bytes_per_s)
        out.append(Story(timing, lane, began, seen, deferred, promoted, early, jump))
    return sorted(out, key=lambda s: (s.tellable, s.score), reverse=True)


def _received(rows: npt.NDArray[Any], start: float, end: float) -> int:
    return int(rows["size"][(rows["at"] >= start) & (rows["at"] < end)].sum())
