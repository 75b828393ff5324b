# SPDX-License-Identifier: Apache-2.0
"""Find, in what was measured, a prefill-to-decode transfer that was deferred and then promoted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import numpy.typing as npt

    from mfsd.lab.results.result import Result, Served
    from mfsd.lab.serving.driver import Played

AROUND_S: Final = 0.1
SCAVENGER: Final = 1_000
"""As a level, for comparing: below every other."""


@dataclass(frozen=True, slots=True)
class Step:
    """From ``at`` on the conduit has this level; ``rescued``: a rescue has happened since the step before."""

    at: float
    level: int
    rescued: bool


@dataclass(frozen=True, slots=True)
class Story:
    """One request's transfers. Times in seconds since the beginning of the replay."""

    request: Served
    conduit: int
    began: float
    """First KV handed to its conduit."""
    done: float
    """First token."""
    steps: list[Step]
    """Of its conduit, from ``began`` to the end; at least one."""
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
        return self.promoted is not None and self.request.met

    @property
    def score(self) -> float:
        """The longer it was held back, the less came through meanwhile, the sharper the turn: the better to see."""
        return min(self.deferred, 1.0) * (1.0 - self.early) * max(self.jump, 0.0)


def rank_of(level: int) -> int:
    """A level as urgency, 0 first: the default band (-1) stands between, and is not expected here."""
    return SCAVENGER if level == -2 else max(level, 0)


def steps(played: Played, conduit: int, start: float, end: float) -> list[Step]:
    """What was seen of a conduit's level between two times, beginning with the level that it had at ``start``."""
    out: list[Step] = []
    rescues = 0
    for change in played.levels:
        at = change.at - played.begin
        if change.conduit != conduit or at > end:
            continue
        if at <= start:
            out = [Step(start, change.level, rescued=False)]
        elif not out or out[-1].level != change.level or change.rescues > rescues:
            out.append(Step(at, change.level, rescued=change.rescues > rescues))
        rescues = change.rescues
    return out


def stories(result: Result, played: Played) -> list[Story]:
    """Of every request whose KV was sent and whose conduit was seen, the best to see first."""
    link = result.settings.scaled.link
    out = []
    for request in result.requests:
        done, conduit = request.done, played.log.conduit.get(request.id)
        if done is None or conduit is None:
            continue
        began = played.log.handed[request.id] - played.begin
        seen = steps(played, conduit, began, done)
        if not seen:
            continue
        lowest = max(rank_of(s.level) for s in seen)
        promoted, deferred = None, 0.0
        for step, after in zip(seen, [*(s.at for s in seen[1:]), done], strict=True):
            if rank_of(step.level) == lowest:
                deferred += after - step.at
                promoted = None
            elif promoted is None and deferred:
                promoted = step.at
        rows = played.arrivals
        own = rows[(rows["conduit"] == conduit) & (rows["key"] == request.id)]
        turn = played.begin + (done if promoted is None else promoted)
        early = _received(own, 0.0, turn) / max(_received(own, 0.0, turn + done), 1)
        change = _received(own, turn, turn + AROUND_S) - _received(own, turn - AROUND_S, turn)
        jump = change / (AROUND_S * link.bytes_per_s)
        out.append(Story(request, conduit, began, done, seen, deferred, promoted, early, jump))
    return sorted(out, key=lambda s: (s.tellable, s.score), reverse=True)


def _received(rows: npt.NDArray[Any], start: float, end: float) -> int:
    return int(rows["size"][(rows["at"] >= start) & (rows["at"] < end)].sum())


def describe(story: Story | None) -> str:
    """What the timeline shows, in words and figures."""
    if story is None:
        return "No prefill-to-decode transfer was seen in this run."
    r = story.request
    began, computed = ((r.at if t is None else t) - r.at for t in (r.began, r.computed))
    text = (
        f"Request {r.id} (rank {r.rank}, connection {story.conduit}) was due {r.slo:.2f} s after its arrival; its "
        f"forward pass took from {began:.2f} s to {computed:.2f} s. "
    )
    if story.promoted is None:
        return text + "Its connection was never promoted after having been deferred: no better example occurred."
    text += (
        f"Its connection spent {story.deferred:.2f} s at its lowest level, in which {story.early:.0%} of the bytes "
        f"came through, and was promoted {r.deadline - story.promoted:.3f} s before the deadline. "
    )
    if any(s.rescued for s in story.steps):
        text += "Its starved queue was purged on the way (rescue). "
    late = story.done - r.deadline
    return text + (f"It was done {-late:.3f} s early." if late <= 0 else f"It was {late:.3f} s late.")
