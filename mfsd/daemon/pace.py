# SPDX-License-Identifier: Apache-2.0
"""When it is looked for whom selectors mean: once in a while, and soon after somebody unknown has connected."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

FAMILIES_S: Final = 1.0
"""How often it is looked for whom selectors mean: descendants of a process, processes of a name, cgroups."""
STRANGERS_S: Final = 2.5
"""How long it is looked for who holds a connection of which nobody knows who made it: it is accepted by then."""
SOONEST_S: Final = 0.02
"""Between two looks, however many strangers there are."""
SHARE: Final = 0.05
"""Of the time that looking may take on their behalf."""


@dataclass(slots=True)
class Pace:
    """For the event loop; as a context for the thread that looks."""

    clock: Callable[[], float] = time.monotonic
    _next: float = 0.0
    _soonest: float = 0.0
    """Not before, for strangers."""
    _began: float = 0.0
    _hurry: bool = False
    _makerless: float = 0.0

    def at_once(self) -> None:
        """A new selector wants to know."""
        self._next = 0.0

    def stranger(self) -> None:
        """Somebody has connected at whom nobody has looked."""
        self._hurry = True

    def makerless(self) -> None:
        """There is a connection of which the kernel does not know who made it."""
        self._makerless = self.clock() + STRANGERS_S

    def due(self) -> bool:
        """It is time; from then on it is being looked."""
        now = self.clock()
        if now < self._next and not (self._hurry and now >= self._soonest):
            return False
        self._next, self._hurry = now + FAMILIES_S, False
        return True

    def finds(self) -> bool:
        """Connections may turn out to be theirs of whom the kernel could not tell who made them."""
        return self.clock() < self._makerless

    def __enter__(self) -> None:
        """It is being looked; what it takes says how soon it may be again."""
        self._began = self.clock()

    def __exit__(self, *exc: object) -> None:
        self._soonest = self._began + max((self.clock() - self._began) / SHARE, SOONEST_S)
