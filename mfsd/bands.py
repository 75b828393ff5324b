# SPDX-License-Identifier: Apache-2.0
"""Bands and how policy levels are put onto them.

A *policy level* is what a policy decides: 0 is the most urgent, and a policy may have any number of them. A *band* is
what a qdisc has: few, in strict order. The ladder keeps the order and merges neighbours when bands are scarce.

Strict order of the bands of every device, most urgent first::

    0            control     pure ACKs and other tiny packets of hinted connections
    1 .. M       level 0 .. M-1, with the default band standing in between after ``default_after`` levels
    last         scavenger   doomed or pruned requests; served when the link is idle

The default band takes everything that no hint names. It stands below the early stages and above the deferred ones
and has a floor of its own, so that unhinted traffic is neither starved nor able to starve a collective.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

LEVEL_NONE: Final = -1
"""A policy has no opinion: the connection stays in the default band."""
LEVEL_SCAVENGER: Final = 0x7FFF
"""Below everything. Chosen as the largest int16 so that "most urgent of a set" stays a minimum."""
LEVEL_NEW: Final = 0x7FFE
"""A transfer that no policy has looked at yet (sorts below every level, above SCAVENGER)."""

HTB_PRIOS: Final = 8
"""TC_HTB_NUMPRIO, net/sched/sch_htb.c."""
PRIO_BANDS: Final = 16
"""TCQ_PRIO_BANDS, include/uapi/linux/pkt_sched.h; bpf/mfsd.h has room for as many."""
OTHER_BANDS: Final = 3
"""Control, default and scavenger: the bands that are no levels."""
MAX_LEVELS: Final = PRIO_BANDS - OTHER_BANDS
MAX_HTB_LEVELS: Final = HTB_PRIOS - OTHER_BANDS
MAX_FLOORS: Final = 0.9
"""Share of the link that all floors together may take."""
CONTROL_FLOOR: Final = 0.02
DEFAULT_FLOOR: Final = 0.10


class Role(enum.StrEnum):
    """What a band is for."""

    CONTROL = "control"
    LEVEL = "level"
    DEFAULT = "default"
    SCAVENGER = "scavenger"


def level_names(levels: int) -> list[str]:
    """Names of the level bands, most urgent first."""
    return [f"level {i}" for i in range(levels)]


def band_names(levels: int) -> list[str]:
    """Names of all bands of a device with so many levels, wherever the default band stands."""
    return [Role.CONTROL, *level_names(levels), Role.DEFAULT, Role.SCAVENGER]


@dataclass(frozen=True, slots=True)
class BandSpec:
    """One band, the same on every device.

    ``index`` is also its strict priority, 0 first. ``lanes`` are leaf queues: connections of one band are spread over
    them, so that a rescue purges nobody else's packets. ``floor`` is the share of the link (0..1) that the band gets
    even when bands above it are busy, where the qdisc can give one.
    """

    index: int
    role: Role
    name: str
    lanes: int
    floor: float


@dataclass(frozen=True, slots=True)
class Bands:
    """All bands in strict order; see the module's picture."""

    bands: tuple[BandSpec, ...]

    @classmethod
    def build(
        cls,
        levels: int,
        *,
        default_after: int,
        lanes: int,
        control_floor: float = CONTROL_FLOOR,
        default_floor: float = DEFAULT_FLOOR,
        level_floors: tuple[float, ...] = (),
        scavenger_floor: float = 0.0,
    ) -> Bands:
        """Lay out ``levels`` level bands with the default band after the first ``default_after`` of them.

        ``level_floors`` gives a floor per level band, 0 where it is short. Raises ValueError when the floors exceed
        the link or the bands exceed what any qdisc has.
        """
        if not 1 <= levels <= MAX_LEVELS:
            raise ValueError(f"levels = {levels}: must be 1 to {MAX_LEVELS}")
        if not 0 <= default_after <= levels:
            raise ValueError(f"default_after = {default_after}: must be 0 to levels ({levels})")
        floors = [*level_floors, *(0.0 for _ in range(levels - len(level_floors)))]
        total = control_floor + default_floor + scavenger_floor + sum(floors)
        if total > MAX_FLOORS:
            raise ValueError(
                f"the floors add up to {total:.0%} of the link; at most {MAX_FLOORS:.0%} can be guaranteed"
            )
        rows = [(Role.LEVEL, name, lanes, floor) for name, floor in zip(level_names(levels), floors, strict=True)]
        rows.insert(default_after, (Role.DEFAULT, Role.DEFAULT, 1, default_floor))
        rows.insert(0, (Role.CONTROL, Role.CONTROL, 1, control_floor))
        rows.append((Role.SCAVENGER, Role.SCAVENGER, lanes, scavenger_floor))
        return cls(tuple(BandSpec(i, *row) for i, row in enumerate(rows)))

    def __len__(self) -> int:
        return len(self.bands)

    def role(self, role: Role) -> BandSpec:
        """The only band of a role other than LEVEL."""
        return next(b for b in self.bands if b.role is role)

    @property
    def control(self) -> BandSpec:
        """Band of pure ACKs."""
        return self.role(Role.CONTROL)

    @property
    def default(self) -> BandSpec:
        """Band of unhinted traffic."""
        return self.role(Role.DEFAULT)

    @property
    def scavenger(self) -> BandSpec:
        """Lowest band."""
        return self.role(Role.SCAVENGER)

    @property
    def level_bands(self) -> tuple[BandSpec, ...]:
        """Bands of role LEVEL, most urgent first."""
        return tuple(b for b in self.bands if b.role is Role.LEVEL)


class Ladder:
    """Puts ``policy_levels`` levels onto the level bands of a plan, order preserved.

    With at least as many bands as levels, level i is level band i. With fewer, the first level keeps a band of its own
    (it is where lateness costs most) and the others are split as evenly as they go, the remainder falling on the
    lowest bands, so that merging coarsens the far end first.
    """

    def __init__(self, plan: Bands, policy_levels: int) -> None:
        bands = [b.index for b in plan.level_bands]
        if policy_levels < 1:
            raise ValueError(f"policy_levels = {policy_levels}: must be at least 1")
        self.plan = plan
        self.policy_levels = policy_levels
        self.band_of: npt.NDArray[np.uint8] = np.array(
            [bands[step] for step in _steps(policy_levels, len(bands))], dtype=np.uint8
        )
        """Band index per policy level."""

    def bands(self, levels: npt.NDArray[np.int16]) -> npt.NDArray[np.uint8]:
        """Band index per element: levels beyond the last use the last; NONE is default, SCAVENGER is scavenger."""
        out = self.band_of.take(levels, mode="clip")
        out[levels == LEVEL_NONE] = self.plan.default.index
        out[levels == LEVEL_SCAVENGER] = self.plan.scavenger.index
        return out


def _steps(levels: int, bands: int) -> list[int]:
    """Which of ``bands`` steps each of ``levels`` levels stands on; non-decreasing, all of them used if possible."""
    if levels <= bands:
        return list(range(levels))
    if bands == 1:
        return [0] * levels
    rest_levels, rest_bands = levels - 1, bands - 1
    return [0] + [1 + i * rest_bands // rest_levels for i in range(rest_levels)]
