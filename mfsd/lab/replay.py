# SPDX-License-Identifier: Apache-2.0
"""What another policy would have made of a record of `mfsctl record`, on the fluid link of the simulator.

Each device is a link of the rate that the record has. Transfers are announced when they were, whatever became of those
before them: what a worker would have said later or sooner is not guessed. Stage 1 is followed by the compute that was
still ahead, as hinted. Background transfers and those without a stage are left out: nobody waits for them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from mfsd.ground import units
from mfsd.lab.sim.decide import simulate
from mfsd.lab.sim.singlelink import BatchSpec, Case, RequestSpec
from mfsd.policy import registry
from mfsd.policy.views import COLLECTIVE, KV_REUSE, P2D

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mfsd.ground.recording import Record, Recorded

STAGES: Final = {KV_REUSE: "kv-reuse", COLLECTIVE: "collective", P2D: "p2d"}
SHOWN: Final = 20
"""Requests of which it is told what differs."""
CLOCK: Final = 1e-6
"""Resolution of a record: what is late by less is in time."""
Owner = tuple[str, str]
"""Session and request; of a transfer with a deadline of its own, session and transfer."""


@dataclass(slots=True)
class Made:
    """What became of the transfers of a record under one policy; nan: not over in its time."""

    name: str
    took: Mapping[int, float]
    """Seconds from the announcement to the end, by position in the record."""
    late: Mapping[Owner, float]
    """Seconds after the deadline (negative: to spare) of each request's latest transfer; nan: it is not over."""
    stages: Mapping[int, Sequence[float]] = field(default_factory=dict)

    @property
    def in_time(self) -> int:
        """Requests in time."""
        return sum(late <= CLOCK for late in self.late.values())

    @property
    def too_late(self) -> int:
        """Requests that are not."""
        return sum(late > CLOCK for late in self.late.values())


def used(record: Record) -> list[int]:
    """Transfers that count, by position."""
    return [i for i, t in enumerate(record.transfers) if t.stage in STAGES]


def as_recorded(record: Record) -> Made:
    """What became of them in fact. What was cut off is late, if it had a deadline; so is what was not over by then."""
    ends = {}
    for i in used(record):
        t = record.transfers[i]
        ends[i] = t.ended if t.delivered else math.nan
    return _made("as recorded", record, ends)


def under(record: Record, policy: str, parameters: Mapping[str, Any], rate: float = 0.0) -> Made:
    """What a policy makes of them. ``rate``: bytes/s of all links; 0: as recorded. Raises ValueError."""
    ends: dict[int, float] = {}
    for device, name in enumerate(record.devices):
        mine = [i for i in used(record) if record.transfers[i].device == device]
        speed = rate or record.rates[device]
        if mine and speed <= 0:
            raise ValueError(f"the record does not know the rate of {name}; give one with --rate")
        if not mine:
            continue
        case = Case(speed, tuple(_batch(record.transfers[i], n) for n, i in enumerate(mine)))
        made = registry.make_policy(policy, record.levels, dict(parameters))
        finish = simulate(case, made, floors=True).finish
        for i, at in zip(mine, finish.tolist(), strict=True):
            ends[i] = at - _compute(record.transfers[i])
    return _made(policy, record, ends)


def _compute(t: Recorded) -> float:
    """Seconds of compute that follow a transfer: what stage 3 sends is computed, and a collective's is unknown."""
    return t.compute if t.stage == KV_REUSE else 0.0


def _batch(t: Recorded, instance: int) -> BatchSpec:
    """A transfer as a batch of its own, on an instance of its own: it waits for nobody's compute."""
    request = RequestSpec(
        t.deadline, kv=(t.left,) if t.stage == KV_REUSE else (), p2d=(t.left,) if t.stage == P2D else ()
    )
    collective = t.left if t.stage == COLLECTIVE else 0.0
    return BatchSpec(t.at, _compute(t), (collective,), (request,), instance)


def _made(name: str, record: Record, ends: Mapping[int, float]) -> Made:
    took, late = {}, dict[Owner, float]()
    stages: dict[int, list[float]] = {stage: [] for stage in STAGES}
    for i, end in ends.items():
        t = record.transfers[i]
        took[i] = end - t.at
        if not math.isnan(end):
            stages[t.stage].append(end - t.at)
        if t.deadline < math.inf:
            owner = t.session, t.request or t.id
            by = end + _compute(t) - t.deadline
            if math.isnan(end) and (not math.isnan(t.ended) or t.deadline < record.seconds):
                by = math.inf
            late[owner] = max(late.get(owner, -math.inf), by, key=_badness)
    return Made(name, took, late, stages)


def _badness(late: float) -> tuple[bool, bool, float]:
    """In time, not known, late."""
    return late > CLOCK, math.isnan(late), late


def doubts(record: Record) -> list[str]:
    """What of the record is not whole, in sentences."""
    out = [f"{record.lost} events are missing: the record was not taken in time"] if record.lost else []
    return out + (["the end of the file is missing; what is there was read"] if record.cut else [])


# --- words ------------------------------------------------------------------------------------------------------------


def rows(made: Sequence[Made]) -> list[list[str]]:
    """A table, the heads first: requests in time, and how long transfers of each stage took that there is."""
    there = [stage for stage in STAGES if any(one.stages[stage] for one in made)]
    heads = [f"{STAGES[stage]} {q}" for stage in there for q in ("p50", "p99")]
    out = [["policy", "in time", "late", "not over", *heads]]
    for one in made:
        figures = []
        for stage in there:
            values = one.stages[stage]
            figures += [units.duration(float(np.quantile(values, q))) if values else "-" for q in (0.5, 0.99)]
        known = one.in_time, one.too_late
        out.append([one.name, *map(str, known), str(len(one.late) - sum(known)), *figures])
    return out


def differing(a: Made, b: Made) -> list[Owner]:
    """Requests that are in time under one and late under the other, those that differ most first."""
    owners = [o for o in a.late if (a.late[o] <= CLOCK) != (b.late[o] <= CLOCK)]
    return sorted(owners, key=lambda o: (-abs(_finite(a.late[o]) - _finite(b.late[o])), o))


def difference(a: Made, b: Made) -> list[str]:
    """In sentences."""
    found = differing(a, b)
    better = sum(b.late[o] <= CLOCK for o in found)
    out = [
        (
            f"Of {len(a.late)} requests with a deadline {len(found)} differ: {better} are in time under {b.name} only, "
            f"{len(found) - better} under {a.name} only."
        )
    ]
    out += [
        f"{session} {request}: {_words(a.late[session, request])} under {a.name}, "
        f"{_words(b.late[session, request])} under {b.name}"
        for session, request in found[:SHOWN]
    ]
    if len(found) > SHOWN:
        out.append(f"and {len(found) - SHOWN} more")
    moved = [i for i in a.took if not math.isnan(a.took[i]) and not math.isnan(b.took[i])]
    if moved:
        sooner = sum(b.took[i] < a.took[i] - CLOCK for i in moved)
        later = sum(b.took[i] > a.took[i] + CLOCK for i in moved)
        out.append(f"Of {len(moved)} transfers {sooner} end sooner under {b.name}, {later} later.")
    return out


def _finite(seconds: float) -> float:
    return seconds if math.isfinite(seconds) else 1e9


def _words(late: float) -> str:
    if not math.isfinite(late):
        return "not over"
    return f"{units.duration(abs(late))} {'late' if late > CLOCK else 'to spare'}"
