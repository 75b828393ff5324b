# SPDX-License-Identifier: Apache-2.0
"""Where early and late steps of MFS stand on one ladder of levels.

The paper reserves P1 for the most urgent stage-3 flows and puts early stages (1, 2) before stage 3 in the remaining
levels, which can be read in several ways. With E early steps (RLI 0 first), L late steps
and c RED classes per early step::

    ladder   P1 | E0c0 E0c1 E1c0 E1c1 ... | L0 L1 ...         all early above all late
    level    P1 | E0c0 E0c1 L0 | E1c0 E1c1 L1 | ...           early before late inside each level
    shared   P1 | E0+L0 | E1+L1 | ...                         both on the same levels

P1 (level 0) holds stage 3 only; RLI 0 is the level after it. Without P1 everything moves up by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from mfsd.policy.views import I2, I4

    Integers = npt.NDArray[np.integer[Any]]

ARBITRATION: Final = ("ladder", "level", "shared")


@dataclass(frozen=True, slots=True)
class Layout:
    """Levels are linear in the steps: base + step * stride (+ class)."""

    p1: int
    """1 if level 0 is reserved, else 0."""
    classes: int
    early: int
    """RLI steps."""
    late: int
    """MLU steps below P1."""
    early_stride: int
    late_base: int
    late_stride: int
    default_after: int

    @classmethod
    def build(cls, levels: int, *, p1: bool, arbitration: str, red_classes: int, late: int) -> Layout:
        """Divide ``levels``, at least ``least``. ``red_classes`` 0: two if there is room, else one.

        ``late`` 0: half (ladder only).
        """
        top = int(p1)
        rest = levels - top
        if arbitration == "shared":
            return cls(top, 1, rest, rest, 1, top, 1, top + 1)
        if arbitration == "level":
            classes = red_classes or (2 if rest >= 9 else 1)
            steps = rest // (classes + 1)
            return cls(top, classes, steps, steps, classes + 1, top + classes, classes + 1, top + classes)
        early = rest - late if late else rest // 2
        classes = red_classes or (2 if early >= 4 else 1)
        if not late:
            early = max(early, classes)
        early //= classes
        base = top + early * classes
        return cls(top, classes, early, levels - base, classes, base, 1, base)

    @staticmethod
    def least(*, p1: bool, arbitration: str, red_classes: int, late: int) -> int:
        """How many levels these parameters of ``build`` need: one step of each kind, or ``late`` of stage 3."""
        if arbitration == "shared":
            return int(p1) + 1
        return int(p1) + max(red_classes, 1) + (max(late, 1) if arbitration == "ladder" else 1)

    def early_level(self, step: Integers, red_class: Integers) -> I2:
        """Level of an RLI step (0 .. early-1) and RED class, shape (n,)."""
        return (step * self.early_stride + red_class + self.p1).astype(np.int16)

    def early_step(self, level: Integers) -> I4:
        """RLI step of an early level, shape (n,); the last one for levels that lie below all early ones."""
        step = (level.astype(np.int32) - self.p1) // self.early_stride
        return np.minimum(np.maximum(step, 0), self.early - 1)

    def late_level(self, step: I2) -> I2:
        """Level of an MLU step, 0 the most urgent (P1 if there is one), shape (n,)."""
        below = self.late_base + (step - self.p1) * self.late_stride
        return (below * (step >= self.p1)).astype(np.int16)

    def late_step(self, level: int) -> int:
        """MLU step of a late level."""
        return 0 if level < self.late_base else self.p1 + (level - self.late_base) // self.late_stride
