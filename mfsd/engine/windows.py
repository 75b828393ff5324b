# SPDX-License-Identifier: Apache-2.0
"""When a device may let out a band: it takes from what others are guaranteed, so not for too much of the time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

DUTY: Final = 1 / 3
"""Share of the time in which a device lets out, at most. Each tenant that needs rescues has an even part of it, so that
whoever flips connections between levels uses up its own."""
TOLD_S: Final = 0.05
"""So long it may take until the device does so."""


@dataclass(slots=True)
class _Window:
    """Of one tenant. Monotonic seconds."""

    begin: float
    until: float
    duty: float
    """Share of the time that it may take."""

    @property
    def again(self) -> float:
        """When the next one may begin."""
        return self.begin + (self.until - self.begin) / self.duty


@dataclass(slots=True)
class Windows:
    """In which devices let out, by row of the device and tenant, until the next ones may begin."""

    _of: dict[tuple[int, int], _Window] = field(default_factory=dict)

    def ask(self, row: int, tenant: int, tenants: int, now: float, takes_s: float) -> tuple[float, float]:
        """From when on a device may let out for a tenant (``now``, if it may), and until when it would.

        ``takes_s``: how long that takes; ``tenants``: how many have needed rescues lately. It may where it has not done
        so too much, or does anyway for long enough.
        """
        self._of = {key: window for key, window in self._of.items() if now < window.again}
        open_until = max((w.until for (at, _), w in self._of.items() if at == row), default=now)
        if now + takes_s < open_until:
            return now, open_until
        until, before = now + TOLD_S + takes_s, self._of.get((row, tenant))
        if before is not None:
            return before.again, until
        self._of[row, tenant] = _Window(now, until, DUTY / tenants)
        return now, until

    def end(self, row: int, now: float) -> None:
        """A device has nothing to let out any more: the next windows may begin the sooner."""
        for (at, _), window in self._of.items():
            if at == row:
                window.until = min(window.until, now)
