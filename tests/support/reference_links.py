# SPDX-License-Identifier: Apache-2.0
"""What links need under the demand-bound policy, one row at a time in plain Python; see reference_demand.py."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

PACKETS = 4
SHORTEST, LONGEST = 2.0**-10, 2.0**12


def bucket(seconds: float) -> int:
    """32 to each power of two."""
    mantissa, exponent = math.frexp(float(np.float32(min(max(seconds, SHORTEST), LONGEST))))
    return (exponent - 1) * 32 + math.floor((2 * mantissa - 1) * 32)


@dataclass
class Group:
    """What is due on one link in one bucket, or before."""

    due: float = math.inf
    own: float = 0.0
    total: float = 0.0


@dataclass
class Link:
    """A link and all that is due on it, rows in no order."""

    rate: float
    room: float
    packet: float = 0.0
    """Seconds that the largest packet takes."""
    rows: dict[int, tuple[float, float]] = field(default_factory=dict)
    """Row -> seconds left, bytes left."""

    def groups(self) -> dict[int, Group]:
        out: dict[int, Group] = {}
        for seconds, octets in self.rows.values():
            g = out.setdefault(bucket(seconds), Group())
            g.due, g.own = min(g.due, seconds), g.own + octets / self.rate
        total = 0.0
        for b in sorted(out):
            total += out[b].own
            out[b].total = total
        return out


class Demand:
    """What a link's rows need; ``p`` gives the margins."""

    def __init__(self, link: Link, p: Any) -> None:
        self.p, self.link, self.groups = p, link, link.groups()
        self.fixed = max(float(p.margin_ms) / 1e3, PACKETS * link.packet)

    def left(self, g: Group, times: float = 1.0) -> float:
        return g.due * (1 - times * float(self.p.margin_share)) - times * self.fixed

    def late(self, g: Group, times: float = 1.0) -> bool:
        return g.total / self.link.room > self.left(g, times)

    def share(self, g: Group, times: float = 1.0) -> float:
        """Of the rate."""
        if self.late(g, times):
            return max(g.total / max(g.due, SHORTEST), 1.0)
        return g.total / self.left(g, times) if g.total else 0.0

    def behind(self, row: int) -> list[Group]:
        """The row's group and all that are due later."""
        mine = bucket(self.link.rows[row][0])
        return [g for b, g in self.groups.items() if b >= mine]

    def need(self, row: int, times: float = 1.0) -> float:
        return max(self.share(g, times) for g in self.behind(row))

    def is_late(self, row: int, times: float = 1.0) -> bool:
        return any(self.late(g, times) for g in self.behind(row))

    def laxity(self, row: int) -> float:
        return min(g.due - g.total / self.link.room for g in self.behind(row))

    def before(self, row: int, *, well: bool = False) -> float:
        """``well``: without what is due in the bucket before its own."""
        b = bucket(self.link.rows[row][0])
        last = self.groups.get(b - 1)
        return self.groups[b].total - self.groups[b].own - (last.own if well and last else 0.0)

    def steady(self) -> float:
        return max((self.share(g) for g in self.groups.values() if not self.late(g)), default=0.0)

    def average(self) -> float:
        late = self.fixed
        return max((g.total / (g.due - late) for g in self.groups.values() if g.due > late), default=0.0)

    def rush(self) -> float:
        return max((g.total / max(g.due, SHORTEST) for g in self.groups.values() if self.late(g)), default=0.0)
