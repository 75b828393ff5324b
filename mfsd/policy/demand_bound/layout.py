# SPDX-License-Identifier: Apache-2.0
"""Which of the levels are for what; see the picture in policy.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from mfsd.policy.parts import pick

if TYPE_CHECKING:
    from mfsd.policy.views import B1, I2


@dataclass(frozen=True, slots=True)
class Layout:
    """Levels by what they are for; from ``deferred`` to the last for what can wait."""

    urgent: int
    collective: int
    first: int
    others: int
    deferred: int
    LEAST: ClassVar[int] = 3

    @classmethod
    def of(cls, levels: int) -> Self:
        """For so many levels, at least LEAST."""
        collective = int(levels > 4)
        first = collective + 1
        others = first + int(levels > 3)
        return cls(0 if collective else first, collective, first, others, others + 1)

    def guaranteed(self, level: I2) -> B1:
        """Those on a level that may be guaranteed something, shape (n,)."""
        held: B1 = (level >= 0) & (level < self.deferred) & (level != self.collective)
        return held

    def place(self, first: B1) -> I2:
        """The level for those who are due first and for the others."""
        return pick.levels(first, np.int16(self.first), np.int16(self.others))
