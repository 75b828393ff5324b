# SPDX-License-Identifier: Apache-2.0
"""What a policy guarantees, put onto bands: shares of the link that devices keep for them.

A policy counts payload in bytes/s of levels; a qdisc counts what is on the wire, in shares of the link, of bands. The
shares are rounded up, so that a device is not told about every tick's small difference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import numpy as np

from mfsd.engine.rescue import DRAIN
from mfsd.ground.bands import HINTED
from mfsd.policy.usage import PACKET, WIRE

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from mfsd.engine.device import Device
    from mfsd.ground.bands import Bands, Ladder
    from mfsd.policy.views import F8

STEP: Final = 0.02
"""Shares are rounded up to multiples of this."""
DEBT_S: Final = 0.02
"""Longest time for which one packet may leave a band in debt. htb keeps what a class owes as time, at the rate that it
had when it sent (htb_accnt_tokens, net/sched/sch_htb.c), so that after one packet of PACKET a class with a tiny rate
would wait for long for what is guaranteed to it. So bands that are guaranteed something have a standing rate, too."""
MOST_STANDING: Final = 0.08
"""Of the link, on slow ones."""
HALF: Final = 0.5
"""Of what a band is guaranteed so much stays there at least, as far as a packet's debt would last too long without."""
UNUSED: Final = 0.02
"""Share of a device that is as good as none, where more is guaranteed."""
EMPTY: Final[Mapping[tuple[int, int], float]] = MappingProxyType({})
REPEAT_S: Final = 1.0
"""After so long a device is told again: its qdiscs may have been repaired meanwhile."""


@dataclass(slots=True)
class Guarantees:
    """Tells each device what its bands are guaranteed, when that changes."""

    devices: Sequence[Device]
    bands: Bands
    collectives: int = -1
    """Index of the band of collectives, which is guaranteed nothing and needs no standing rate; -1: none."""
    _told: dict[int, tuple[float, dict[int, float]]] = field(default_factory=dict)
    """When, and the share by index of the band, by row of the device."""
    extra: list[float] = field(init=False)
    """Share of each device that the policy has guaranteed on top of floors to all bands together."""
    _standing: dict[int, frozenset[int]] = field(default_factory=dict)
    """Bands whose share is their standing rate, by row of the device."""

    def __post_init__(self) -> None:
        self.extra = [0.0] * len(self.devices)

    def give(
        self,
        guarantee: F8 | None,
        ladder: Ladder,
        now: float,
        draining: Mapping[tuple[int, int], float] = EMPTY,
        given_up: F8 | None = None,
        rising: Iterable[int] = (),
        leaving: Collection[tuple[int, int]] = (),
    ) -> None:
        """Put ``guarantee`` in force: bytes/s on top of the floors, shape (devices, levels); None: floors only.

        ``given_up``: the same of what is given up, shape (devices,). ``rising``: bands below unhinted traffic from
        which somebody is to be promoted: a debt of theirs would last when they are let out.

        ``leaving``: rows of devices and bands that connections have just left, or leave now: they keep what they have
        until nothing of these is known to be there any more. With less, a last packet would be a long debt.

        ``draining``: rows of devices and bands that are let out, with the share of all that is guaranteed which their
        connections take there with them; 0: they share DRAIN of the device, whatever the others are guaranteed
        (rescue.py).
        """
        for row, device in enumerate(self.devices):
            rate = device.estimator.rate
            asked: dict[int, float] = {}
            standing: dict[int, float] = {}
            last: dict[int, float] = {}
            if guarantee is not None and rate > 0.0:
                asked = self._asked(guarantee[row], rate, ladder)
                if given_up is not None and given_up[row] > 0.0:
                    band = self.bands.scavenger
                    last[band.index] = _step(band.floor + float(given_up[row]) * WIRE / rate)
                standing = self._stand(asked | last, rate, rising)
            drained = {band: part for (at, band), part in draining.items() if at == row}
            self.extra[row] = sum(share - self.bands.bands[band].floor for band, share in asked.items())
            out = last | self._let_out(row, drained, asked, standing)
            had = self.shares(row).items() if leaving else ()
            before = {band: share for band, share in had if (row, band) in leaving and band not in drained}
            if before:
                out = self._kept(out, before)
            self._tell(row, out, now, frozenset(out.keys() - asked.keys() - last.keys()))

    def drain(self, now: float) -> None:
        """Packets go to the default band from now on: let what is queued in the other bands leave before that."""
        for row in range(len(self.devices)):
            self._tell(row, draining(self.bands), now)

    def shares(self, row: int) -> Mapping[int, float]:
        """What bands of a device have at present in place of their floors, by index."""
        return self._told.get(row, (0.0, {}))[1]

    def standing(self, row: int) -> frozenset[int]:
        """Of these, the bands that the policy has guaranteed nothing."""
        return self._standing.get(row, frozenset())

    def given(self, row: int) -> dict[int, float]:
        """Bytes/s on the wire that the policy has guaranteed bands of a device, their floors included, by index."""
        device, standing = self.devices[row], self.standing(row)
        shares = self.shares(row) if device.floors else {}
        return {band: share * device.estimator.rate for band, share in shares.items() if band not in standing}

    def left(self, row: int) -> float:
        """Share of a device's rate that collectives get while they send.

        What the policy has guaranteed is gone, if it is used at all, and what others have of their floors and standing
        rates, as far as these are used.
        """
        device = self.devices[row]
        rate = device.estimator.rate
        if not device.floors or rate <= 0.0:
            return 1.0
        kept, given = self.bands.floors.copy(), self.given(row)
        for band, share in self.shares(row).items():
            kept[band] = share
        used = np.minimum(device.estimator.band_load, kept)
        used[list(given)] = [of / rate if used[band] >= UNUSED else used[band] for band, of in given.items()]
        if self.collectives >= 0:
            used[self.collectives] = 0.0
        return 1.0 - float(used.sum())

    def _asked(self, guarantee: F8, rate: float, ladder: Ladder) -> dict[int, float]:
        asked = np.bincount(ladder.band_of, weights=guarantee, minlength=len(self.bands)) * (WIRE / rate)
        return {int(band): _step(float(asked[band]) + self.bands.bands[band].floor) for band in np.flatnonzero(asked)}

    def _let_out(
        self, row: int, drained: Mapping[int, float], asked: dict[int, float], standing: dict[int, float]
    ) -> dict[int, float]:
        """Shares of bands, with those that are let out.

        Whoever has taken along all that it is guaranteed sends a packet to where it stands now as soon as one has left,
        and that must not leave its band in debt until long after.
        """
        if not drained:
            return asked | standing
        extra, debtless = self.extra[row], PACKET / (DEBT_S * max(self.devices[row].estimator.rate, 1.0))
        floors = self.bands.floors.tolist()
        moved = {band: max(part, min(DRAIN / extra, 1.0)) for band, part in drained.items() if part and extra > 0.0}
        whole = max(sum(moved.values()), 1.0)
        moved = {band: part / whole for band, part in moved.items()}
        kept = 1.0 - sum(moved.values())
        out: dict[int, float] = {}
        for band, share in asked.items():
            own = share - floors[band]
            out[band] = floors[band] + max(own * kept, min(own * HALF, debtless - floors[band]))
        taken = extra - sum(share - floors[band] for band, share in out.items())
        out |= standing
        for band, part in moved.items():
            out[band] = max(out.get(band, 0.0), floors[band] + taken * part / (1.0 - kept))
        others = [band for band in drained if band not in moved]
        if not others:
            return out
        out = {band: max(share * (1.0 - DRAIN), floors[band]) for band, share in out.items()}
        return out | {band: max(out.get(band, 0.0), floors[band], DRAIN / len(others)) for band in others}

    def _kept(self, shares: Mapping[int, float], before: Mapping[int, float]) -> dict[int, float]:
        """``shares`` of bands, where some keep what they had ``before``; all have less where that is too much."""
        floors = self.bands.floors.tolist()
        out = dict(shares) | {band: max(share, shares.get(band, 0.0)) for band, share in before.items()}
        above = sum(max(share - floors[band], 0.0) for band, share in out.items())
        part = min((1.0 - sum(floors)) / above, 1.0) if above > 0.0 else 1.0
        return {band: floors[band] + (share - floors[band]) * part for band, share in out.items()}

    def _stand(self, asked: Mapping[int, float], rate: float, rising: Iterable[int]) -> dict[int, float]:
        above = (b for b in self.bands.level_bands if b.index < self.bands.default.index or b.index in rising)
        waiting = [b for b in above if b.index not in asked and b.index != self.collectives]
        room = 1.0 - sum(asked.get(b.index, b.floor) for b in self.bands.bands)
        standing = min(PACKET / (DEBT_S * rate), MOST_STANDING, room / max(len(waiting), 1))
        return {b.index: standing for b in waiting if standing > b.floor}

    def _tell(self, row: int, shares: dict[int, float], now: float, standing: frozenset[int] = frozenset()) -> None:
        when, told = self._told.get(row, (-REPEAT_S, {}))
        if (told != shares or now >= when + REPEAT_S) and self.devices[row].enforced:
            self._told[row], self._standing[row] = (now, shares), standing
            self.devices[row].guarantee(shares)


def _step(share: float) -> float:
    return min(math.ceil(share / STEP) * STEP, 1.0)


def draining(bands: Bands) -> dict[int, float]:
    """Shares with which all hinted bands are served before unhinted traffic."""
    return {b.index: 1.0 for b in bands.bands if b.role in HINTED}
