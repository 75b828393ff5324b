# SPDX-License-Identifier: Apache-2.0
"""``[bands]`` of the configuration file, and what is wrong with it as a whole."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import BeforeValidator, Field

from mfsd.daemon.config_text import key, toml
from mfsd.engine.settings import Section, as_tuple, setting
from mfsd.ground.bands import (
    BACKGROUND_FLOOR,
    CONTROL_FLOOR,
    DEFAULT_FLOOR,
    LEVEL_FLOOR,
    MAX_FLOORS,
    MAX_HTB_LEVELS,
    MAX_LEVELS,
    SCAVENGER_FLOOR,
    Urgency,
    band_names,
    fill_floors,
)

MAX_LANES: Final = 256
"""Far below what classids and handles allow (datapath/qdisc/htb.py, handles.py); more only make dumps long."""
CLASSES: Final = tuple(map(str, Urgency))
"""What ``bands.dscp`` may name besides bands."""


Share = Annotated[float, Field(ge=0.0, le=MAX_FLOORS)]
Dscp = Annotated[int, Field(ge=0, le=63)]


class BandsConfig(Section):
    """``[bands]``: the strict-priority bands, the same on every device."""

    levels: int = setting(
        5,
        "Bands for hinted traffic, besides control, default, background and scavenger. htb takes at most "
        f"{MAX_HTB_LEVELS}.",
        ge=1,
        le=MAX_LEVELS,
    )
    lanes: int = setting(32, "Leaf queues per band: a rescue purges only the packets of one lane.", ge=1, le=MAX_LANES)
    control_floor: Share = setting(CONTROL_FLOOR, "Share of the link that control packets always get.")
    default_floor: Share = setting(DEFAULT_FLOOR, "Share of the link that unhinted traffic always gets.")
    floors: Annotated[tuple[Share, ...], BeforeValidator(as_tuple)] = setting(
        (), f"Share that each level always gets, most urgent first; {LEVEL_FLOOR:g} where it is short."
    )
    background_floor: Share = setting(
        BACKGROUND_FLOOR, "Share of the link that background traffic (stores, offload, prefetch, weights) always gets."
    )
    scavenger_floor: Share = setting(SCAVENGER_FLOOR, "Share of the link that pruned and doomed requests always get.")
    dscp: dict[str, Dscp] = setting(
        {},
        "DSCP to write by class, e.g. { urgent = 46, middle = 26, last = 8 }; the policy says which class a band is in "
        'and `mfsctl plan` shows it. Or by band, e.g. { "level 0" = 46 }. What is not named is left alone.',
    )

    def problems(self) -> list[str]:
        """What does not fit together, a line per problem."""
        out = self._dscp_problems()
        if len(self.floors) > self.levels:
            out.append(f"bands.floors = {toml(self.floors)}: at most one per level (bands.levels = {self.levels})")
        total = self.control_floor + self.default_floor + self.background_floor + self.scavenger_floor
        total += sum(fill_floors(self.floors, self.levels))
        if total > MAX_FLOORS:
            out.append(
                f"bands.floors = {toml(self.floors)}: all floors together are {total:.2f} of the link; at most "
                f"{MAX_FLOORS}"
            )
        return out

    def _dscp_problems(self) -> list[str]:
        names, classes, given = band_names(self.levels), ", ".join(CLASSES), self.dscp
        out = [
            f"bands.dscp.{key(name)} = {dscp}: no such class or band; allowed: {classes}, or by band {', '.join(names)}"
            for name, dscp in given.items()
            if name not in names and name not in CLASSES
        ]
        if not given.keys().isdisjoint(CLASSES) and not given.keys().isdisjoint(names):
            out.append(
                f"bands.dscp = {toml(given)}: classes and bands together; give either code points by class "
                f"({classes}), or one for each band that is to be marked"
            )
        return out
