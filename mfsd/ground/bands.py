# SPDX-License-Identifier: Apache-2.0
"""Bands and how policy levels are put onto them.

A *policy level* is what a policy decides: 0 is the most urgent, and a policy may have any number of them. A *band* is
what a qdisc has: few, in strict order. The ladder keeps the order and merges neighbours when bands are scarce.

Strict order of the bands of every device, most urgent first::

    0            control     pure ACKs and other tiny packets of hinted connections
    1 .. M       level 0 .. M-1, with the default band standing in between after ``default_after`` levels
    last but one background  stores, offload, prefetch, weights: nobody waits for them
    last         scavenger   doomed or pruned requests; served when the link is idle

The default band takes everything that no hint names. It stands below the early stages and above the deferred ones.
Every band has a floor above zero, so that nobody waits without end: not unhinted traffic behind collectives, nor a
deferred transfer behind unhinted traffic. The floors of the levels are small; what a transfer needs to be in time, a
policy guarantees on top of them (policy/views.py, Decision.guarantee). A floor of nothing would also be slow to raise:
htb measures a class's debt in time at its own rate and forgives it after a minute, so that a class that sends at a rate
of a few bytes per second is in debt for long.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt

LEVEL_NONE: Final = -1
"""A policy has no opinion: the connection stays in the default band."""
LEVEL_SCAVENGER: Final = 0x7FFF
"""Below everything. Chosen as the largest int16 so that "most urgent of a set" stays a minimum."""
LEVEL_NEW: Final = 0x7FFE
"""A transfer that no policy has looked at yet (sorts below every level, above SCAVENGER)."""
LEVEL_BACKGROUND: Final = 0x7FFD
"""Below all that has a level, and below the default band; sorts above NEW and SCAVENGER."""

HTB_PRIOS: Final = 8
"""TC_HTB_NUMPRIO, net/sched/sch_htb.c."""
PRIO_BANDS: Final = 16
"""TCQ_PRIO_BANDS, include/uapi/linux/pkt_sched.h; bpf/mfsd.h has room for as many."""
OTHER_BANDS: Final = 4
"""Control, default, background and scavenger: the bands that are no levels."""
MAX_LEVELS: Final = PRIO_BANDS - OTHER_BANDS
MAX_HTB_LEVELS: Final = HTB_PRIOS - OTHER_BANDS + 1
"""Control shares a priority (BandSpec.prio)."""
MAX_FLOORS: Final = 0.9
"""Share of the link that all floors together may take."""
CONTROL_FLOOR: Final = 0.02
DEFAULT_FLOOR: Final = 0.10
BACKGROUND_FLOOR: Final = 0.02
SCAVENGER_FLOOR: Final = 0.01
LEVEL_FLOOR: Final = 0.01


class Role(enum.StrEnum):
    """What a band is for."""

    CONTROL = "control"
    LEVEL = "level"
    DEFAULT = "default"
    BACKGROUND = "background"
    SCAVENGER = "scavenger"


HINTED: Final = frozenset({Role.LEVEL, Role.BACKGROUND, Role.SCAVENGER})
"""Bands that hold hinted traffic only."""


class Urgency(enum.StrEnum):
    """How the fabric should treat a band's packets: three classes, for switches with few queues."""

    URGENT = "urgent"
    """With the collectives: a GPU waits for it now, or it needs its guarantee to be in time."""
    MIDDLE = "middle"
    LAST = "last"
    """Doomed, or nobody waits for it."""


@dataclass(frozen=True, slots=True)
class Classes:
    """The class in the fabric of each level of a policy, and of the bands that are no levels."""

    levels: tuple[Urgency, ...]
    default: Urgency = Urgency.MIDDLE
    background: Urgency = Urgency.LAST
    scavenger: Urgency = Urgency.LAST


def level_names(levels: int) -> list[str]:
    """Names of the level bands, most urgent first."""
    return [f"level {i}" for i in range(levels)]


def band_names(levels: int) -> list[str]:
    """Names of all bands of a device with so many levels, wherever the default band stands."""
    return [Role.CONTROL, *level_names(levels), Role.DEFAULT, Role.BACKGROUND, Role.SCAVENGER]


@dataclass(frozen=True, slots=True)
class BandSpec:
    """One band, the same on every device.

    ``index`` is its place in the strict order, 0 first. ``lanes`` are leaf queues: connections of one band are spread
    over them, so that a rescue purges nobody else's packets. ``floor`` is the share of the link (0..1) that the band
    gets even when bands above it are busy, where the qdisc can give one.
    """

    index: int
    role: Role
    name: str
    lanes: int
    floor: float

    @property
    def prio(self) -> int:
        """Its priority where a qdisc has fewer of them than bands, 0 first.

        Control and the band after it share the first. Control's packets are tiny and inside its floor, and htb serves
        what is inside its floor before whatever borrows, at any priority (net/sched/sch_htb.c, htb_dequeue).
        """
        return max(self.index - 1, 0)


@dataclass(frozen=True)
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
        background_floor: float = BACKGROUND_FLOOR,
        scavenger_floor: float = SCAVENGER_FLOOR,
    ) -> Bands:
        """Lay out ``levels`` level bands with the default band after the first ``default_after`` of them.

        ``level_floors`` gives a floor per level band, LEVEL_FLOOR where it is short. Raises ValueError when the floors
        exceed the link or the bands exceed what any qdisc has.
        """
        if not 1 <= levels <= MAX_LEVELS:
            raise ValueError(f"levels = {levels}: must be 1 to {MAX_LEVELS}")
        if not 0 <= default_after <= levels:
            raise ValueError(f"default_after = {default_after}: must be 0 to levels ({levels})")
        floors = fill_floors(level_floors, levels)
        total = control_floor + default_floor + background_floor + scavenger_floor + sum(floors)
        if total > MAX_FLOORS:
            raise ValueError(
                f"the floors add up to {total:.0%} of the link; at most {MAX_FLOORS:.0%} can be guaranteed"
            )
        rows = [(Role.LEVEL, name, lanes, floor) for name, floor in zip(level_names(levels), floors, strict=True)]
        rows.insert(default_after, (Role.DEFAULT, Role.DEFAULT, 1, default_floor))
        rows.insert(0, (Role.CONTROL, Role.CONTROL, 1, control_floor))
        rows.append((Role.BACKGROUND, Role.BACKGROUND, lanes, background_floor))
        rows.append((Role.SCAVENGER, Role.SCAVENGER, lanes, scavenger_floor))
        return cls(tuple(BandSpec(i, *row) for i, row in enumerate(rows)))

    def __len__(self) -> int:
        return len(self.bands)

    def role(self, role: Role) -> BandSpec:
        """The only band of a role other than LEVEL."""
        return next(b for b in self.bands if b.role is role)

    @cached_property
    def control(self) -> BandSpec:
        """Band of pure ACKs."""
        return self.role(Role.CONTROL)

    @cached_property
    def default(self) -> BandSpec:
        """Band of unhinted traffic."""
        return self.role(Role.DEFAULT)

    @cached_property
    def background(self) -> BandSpec:
        """Band of what nobody waits for."""
        return self.role(Role.BACKGROUND)

    @cached_property
    def scavenger(self) -> BandSpec:
        """Lowest band."""
        return self.role(Role.SCAVENGER)

    @cached_property
    def level_bands(self) -> tuple[BandSpec, ...]:
        """Bands of role LEVEL, most urgent first."""
        return tuple(b for b in self.bands if b.role is Role.LEVEL)

    @cached_property
    def floors(self) -> npt.NDArray[np.float64]:
        """Share of the link that each band keeps, shape (len(self),)."""
        return np.array([b.floor for b in self.bands])

    @cached_property
    def unlevelled(self) -> npt.NDArray[np.intp]:
        """Indices of the bands that no level is put onto."""
        return np.array([b.index for b in self.bands if b.role is not Role.LEVEL])


class Ladder:
    """Puts ``policy_levels`` levels onto the level bands, order preserved.

    With at least as many bands as levels, level i is level band i. With fewer, the first level keeps a band of its own
    (it is where lateness costs most) and the others are split as evenly as they go, the remainder falling on the
    lowest bands, so that merging coarsens the far end first.
    """

    def __init__(self, bands: Bands, policy_levels: int) -> None:
        steps = [b.index for b in bands.level_bands]
        if policy_levels < 1:
            raise ValueError(f"policy_levels = {policy_levels}: must be at least 1")
        self._bands = bands
        self.policy_levels = policy_levels
        self.band_of: npt.NDArray[np.uint8] = np.array(
            [steps[step] for step in _steps(policy_levels, len(steps))], dtype=np.uint8
        )
        """Band index per policy level."""
        self.above: npt.NDArray[np.intp] = np.array([*self.band_of, bands.scavenger.index])
        """The same, and the scavenger's at the end, as indices."""
        # Of every int16, the negative ones at the end as an index has it.
        self._of_any = np.full(1 << 16, self.band_of[0])
        self._of_any[: 1 << 15] = self.band_of[-1]
        self._of_any[:policy_levels] = self.band_of
        self._of_any[LEVEL_NONE] = bands.default.index
        self._of_any[LEVEL_BACKGROUND] = bands.background.index
        self._of_any[LEVEL_SCAVENGER] = bands.scavenger.index

    def bands(self, levels: npt.NDArray[np.int16]) -> npt.NDArray[np.uint8]:
        """Band index per element; a level beyond the last uses the last, and what is no level has its own band."""
        out: npt.NDArray[np.uint8] = self._of_any.take(levels)
        return out

    def classes(self, classes: Classes) -> tuple[Urgency, ...]:
        """Class in the fabric of every band, by index; merged levels have that of the most urgent. Control is urgent.

        Raises ValueError when ``classes`` are not those of a policy with as many levels.
        """
        if len(classes.levels) != self.policy_levels:
            raise ValueError(f"{len(classes.levels)} classes for {self.policy_levels} levels")
        bands = self._bands
        out = [Urgency.URGENT] * len(bands)
        for level in reversed(range(self.policy_levels)):
            out[self.band_of[level]] = classes.levels[level]
        out[bands.default.index] = classes.default
        out[bands.background.index] = classes.background
        out[bands.scavenger.index] = classes.scavenger
        return tuple(out)


def fill_floors(floors: tuple[float, ...], levels: int) -> tuple[float, ...]:
    """A floor per level: LEVEL_FLOOR where ``floors`` are short."""
    return (*floors, *(LEVEL_FLOOR for _ in range(levels - len(floors))))


def _steps(levels: int, bands: int) -> list[int]:
    """Which of ``bands`` steps each of ``levels`` levels stands on; non-decreasing, all of them used if possible."""
    if levels <= bands:
        return list(range(levels))
    if bands == 1:
        return [0] * levels
    rest_levels, rest_bands = levels - 1, bands - 1
    return [0] + [1 + i * rest_bands // rest_levels for i in range(rest_levels)]
