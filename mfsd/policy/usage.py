# SPDX-License-Identifier: Apache-2.0
"""How the use of a link that policies see is reckoned, on devices (mfsd/engine/estimator.py) and when simulated."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

WIRE: Final = 1.05
"""Bytes on the wire for a byte of payload: 1514 for 1448 at an MTU of 1500, less with larger ones."""
PACKET: Final = 68_000
"""Bytes: the largest that TCP hands down, with its headers."""
LOAD_TAU_S: Final = 0.1
"""Time constant of the load average (rho)."""
PAUSES_TAU_S: Final = 0.2
"""Time constant of how long collectives send and pause: that of several of them, though one that is slowed down by a
guarantee takes longer."""
PRESENT: Final = 0.02
"""Collectives that take less of the rate are none."""


@dataclass(slots=True)
class Pauses:
    """Of collectives, each of which waits for its end before the next one begins."""

    _work: float = 0.0
    """Share of the rate that they took lately."""
    _pause: float = 1.0
    """Share of the time in which they did not send."""

    def observe(self, share: float, left: float, seconds: float) -> None:
        """They took this ``share`` of the rate. Who gets ``left`` of it sends for share / left of the time."""
        weight = 1.0 - math.exp(-seconds / PAUSES_TAU_S)
        self._work += weight * (min(share, 1.0) - self._work)
        self._pause += weight * (1.0 - min(share / max(left, PRESENT), 1.0) - self._pause)

    @property
    def collectives(self) -> float:
        """Share of the time that they would take if they had all of the link, and pause for the rest, 0..1."""
        return self._work / (self._work + self._pause) if self._work >= PRESENT else 0.0
