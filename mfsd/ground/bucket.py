# SPDX-License-Identifier: Apache-2.0
"""What may be spent: it comes at a steady rate, up to so much (a token bucket)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Bucket:
    """As made, it has been empty since the beginning of the clock: full at the first ``fill``."""

    left: float = 0.0
    """As of ``at``; whoever spends takes from it, and may owe."""
    at: float = 0.0
    """Seconds on the clock of whoever fills it."""

    def fill(self, now: float, rate: float, most: float) -> float:
        """Add what has come since the last time, at ``rate`` per second up to ``most``; what is left then."""
        self.left = min(self.left + (now - self.at) * rate, most)
        self.at = now
        return self.left
