# SPDX-License-Identifier: Apache-2.0
"""The budget of urgency: how much a tenant may move above unhinted traffic, and what happens beyond that.

Whoever hints may say that everything is urgent. So what a tenant's connections (tenants.py) move on bands above the
default band is counted, on the kernel's word, against its budget on each device: a token bucket, filled at

* ``tenants.urgent_share`` of the device's rate, always;
* with ``tenants.even``, an even part of the rate, while the device is saturated and several tenants have hinted traffic
  there. An even part and not what others leave: whoever is starved by urgent traffic seems to want nothing.

A tenant whose bucket is empty is demoted: its connections stand on the lowest level, below unhinted traffic, until
there is half a bucket again. That takes nothing from it while the link has room. A single tenant is never limited by
the default configuration.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from mfsd.ground.model import Event, EventKind

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mfsd.engine.books import Books
    from mfsd.engine.connections import Connections
    from mfsd.engine.device import Device
    from mfsd.engine.records import Connection, Mark, Session, Stream
    from mfsd.engine.settings import TenantsConfig
    from mfsd.ground.bands import Bands
    from mfsd.policy.views import F8

METER_S: Final = 0.02
"""How often is counted."""
SATURATED: Final = 0.9
"""Load of a device from which on tenants stand in each other's way."""
PRESENT: Final = 0.0005
"""Share of the rate that a tenant must move to count as one: a tenth of what a starved band's floor leaves twenty."""
TAU_S: Final = 0.5
"""Time constant of the rates that tenants move."""
TELL_S: Final = 1.0
"""A tenant that was demoted again within this time has been told."""
NOBODY_YET: Final = -2
"""No user: whose a column is before it is anybody's."""
DT_MAX: Final = 1.0
"""Nothing is earned for longer pauses between two counts."""


class Use(NamedTuple):
    """What one tenant does on one device, for operators; rates in bytes/s."""

    uid: int
    device: str
    connections: int
    """On all devices."""
    moved: float
    urgent: float
    """Of it on bands above unhinted traffic."""
    allowed: float
    """Of that, at present; 0: as much as it likes."""
    demoted: bool
    demotions: int


@dataclass(slots=True)
class Urgency:
    """Counts what tenants move, and demotes those beyond their budget."""

    connections: Connections
    devices: Sequence[Device]
    bands: Bands
    books: Books
    config: TenantsConfig
    _last: float = 0.0
    _seen: npt.NDArray[np.int64] = field(init=False)
    """By slot: bytes at the last count."""
    _tenancy: npt.NDArray[np.int64] = field(init=False)
    """By slot: which connection that was."""
    _uids: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """By tenant: whose the columns below are."""
    _credit: F8 = field(init=False)
    """Bytes, shape (devices, tenants); so have the others."""
    _moved: F8 = field(init=False)
    _above: F8 = field(init=False)
    _allowed: F8 = field(init=False)
    _over: npt.NDArray[np.bool_] = field(init=False)
    _demotions: npt.NDArray[np.int64] = field(init=False)
    _told: dict[tuple[int, int], float] = field(default_factory=dict)
    """By (device, tenant) that knows of its demotion: when it was demoted last."""

    def __post_init__(self) -> None:
        slots = len(self.connections.table)
        self._seen, self._tenancy = np.zeros(slots, dtype=np.int64), np.zeros(slots, dtype=np.int64)
        shape = len(self.devices), 0
        self._credit, self._moved, self._above, self._allowed = (np.zeros(shape) for _ in range(4))
        self._over, self._demotions = np.zeros(shape, dtype=np.bool_), np.zeros(shape, dtype=np.int64)

    @property
    def below(self) -> int:
        """Band of those who are beyond their budget: the lowest level if it is below unhinted traffic."""
        lowest = self.bands.level_bands[-1].index
        return lowest if lowest > self.bands.default.index else self.bands.background.index

    @property
    def any(self) -> bool:
        """Somebody is beyond its budget."""
        return bool(self._over.any())

    def demote(self, band: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """``band`` by slot, shape (high,), with the connections of those beyond their budget where they belong."""
        if not self._over.any():
            return band
        hit = self._beyond(len(band)) & (band < self.bands.default.index)
        return np.where(hit, np.uint8(self.below), band)

    def demoted(self, conn: Connection) -> bool:
        """It stands lower than its level says."""
        return bool(self._over.any() and self._beyond(conn.slot + 1)[conn.slot])

    def _beyond(self, high: int) -> npt.NDArray[np.bool_]:
        tenant = self.connections.tenants.of[:high]
        known = tenant < self._over.shape[1]  # those who came since the last count are not
        over: npt.NDArray[np.bool_] = self._over[self._devices_of(high), np.where(known, tenant, 0)] & known
        return over

    def _devices_of(self, high: int) -> npt.NDArray[np.int32]:
        return self.connections.device_of(np.arange(high, dtype=np.int32))

    # --- counting -----------------------------------------------------------------------------------------------------

    def count(self, now: float, *, steers: bool) -> None:
        """Count what has moved, and find who is beyond its budget. Where nothing is steered, nobody is."""
        dt = now - self._last
        if dt < METER_S - 1e-6 or not self.devices:
            if not self.devices:
                self.connections.tenants.parted.clear()
            return
        self._last = now
        self._fit()
        moved, urgent = self._since()
        dt = min(dt, DT_MAX)
        weight = 1.0 - np.exp(-dt / TAU_S)
        self._moved += weight * (moved / dt - self._moved)
        self._above += weight * (urgent / dt - self._above)
        rate = np.array([d.estimator.rate for d in self.devices])
        load = np.array([d.estimator.load for d in self.devices])
        share = self._shares(rate, load)
        full = (share * rate * (self.config.burst_ms / 1000))[:, None]
        free = (share >= 1.0) | (rate <= 0.0) | (not steers)
        if free.all():
            self._credit[:], self._allowed[:], self._over[:] = full, 0.0, False
        else:
            credit = np.clip(self._credit + (share * rate * dt)[:, None] - urgent, -full, full)
            self._credit = np.where(free[:, None], full, credit)
            self._allowed[:] = np.where(free, 0.0, share * rate)[:, None]
            before = self._over
            self._over = ~free[:, None] & ((self._credit < 0) | (before & (self._credit < full / 2)))
            fresh = self._over & ~before
            self._demotions += fresh
            self.books.counters.demotions += int(fresh.sum())
        self._tell(now)

    def _shares(self, rate: F8, load: F8) -> F8:
        """Of each device's rate that one tenant may move urgently."""
        share = np.full(len(rate), self.config.urgent_share)
        present = (self._moved > PRESENT * rate[:, None]).sum(axis=1)
        contended = (load >= SATURATED) & (present > 1) & self.config.even
        return np.where(contended, np.minimum(share, 1.0 / np.maximum(present, 1)), share)

    def _fit(self) -> None:
        """Make room for new tenants; one that has got the place of another begins anew."""
        tenants = self.connections.tenants
        uids = np.array([tenants.uid(i) for i in range(len(tenants))], dtype=np.int64)
        more = len(uids) - len(self._uids)
        if more:
            self._uids = np.concatenate([self._uids, np.full(more, NOBODY_YET)])
            for name in ("_credit", "_moved", "_above", "_allowed", "_over", "_demotions"):
                setattr(self, name, np.pad(getattr(self, name), ((0, 0), (0, more))))
        new = np.flatnonzero(uids != self._uids)
        if len(new):
            self._credit[:, new] = np.inf  # a full bucket
            for column in (self._moved, self._above, self._allowed, self._over, self._demotions):
                column[:, new] = 0
            self._uids = uids

    def _since(self) -> tuple[F8, F8]:
        """Wire bytes since the last count, and those of them in bands above the default one; (devices, tenants)."""
        known, table = self.connections, self.connections.table
        shape, high = self._credit.shape, table.high
        used, total = table.used[:high], table.bytes[:high].astype(np.int64)
        fresh = known.tenancy[:high] != self._tenancy[:high]
        moved = np.maximum(total - np.where(fresh, 0, self._seen[:high]), 0)[used]
        # Where a connection is now it has been since the last count, or nearly so: bands are written after counting.
        above = table.band[:high][used] < self.bands.default.index
        cell, size = (self._devices_of(high) * shape[1] + known.tenants.of[:high])[used], shape[0] * shape[1]
        every: F8 = np.bincount(cell, weights=moved, minlength=size).astype(np.float64)
        urgent: F8 = np.bincount(cell, weights=moved * above, minlength=size).astype(np.float64)
        for slot, tenancy, tenant, count in known.tenants.parted:
            seen = int(self._seen[slot]) if self._tenancy[slot] == tenancy else 0
            rest = max(count - seen, 0)
            where = int(known.device_of(np.array([slot], dtype=np.int32))[0]) * shape[1] + tenant
            every[where] += rest
            urgent[where] += rest  # which band it was in is not known any more
        known.tenants.parted.clear()
        self._seen[:high], self._tenancy[:high] = total, known.tenancy[:high]
        return every.reshape(shape), urgent.reshape(shape)

    # --- saying so ----------------------------------------------------------------------------------------------------

    def _tell(self, now: float) -> None:
        for row, index in zip(*np.nonzero(self._over), strict=True):
            key = int(row), int(index)
            if key not in self._told:
                self._event(*key, EventKind.DEMOTED, f"more is urgent than {self._allowed[key] * 8 / 1e6:.3g} Mbit/s")
            self._told[key] = now
        for key in [k for k, at in self._told.items() if at < now - TELL_S]:
            del self._told[key]
            self._event(*key, EventKind.RESTORED, "within its budget again")

    def _event(self, row: int, index: int, kind: EventKind, reason: str) -> None:
        """To all sessions that have said something of the tenant's connections."""
        known, uid = self.connections, self.connections.tenants.uid(index)
        sessions: dict[str, Session] = {}
        for slot in np.flatnonzero(known.tenants.of[: known.table.high] == index).tolist():
            conn = known.by_slot.get(slot)
            if conn is not None:
                said: list[Stream | Mark] = [*conn.streams, *conn.marks]
                sessions |= {x.session.name: x.session for x in said}
        for session in sessions.values():
            session.tell(Event(kind, "", "", f"user {uid} on {self.devices[row].name}: {reason}"))

    def uses(self) -> Iterator[Use]:
        """What tenants do, those that move most first."""
        tenants = self.connections.tenants
        order = np.argsort(-self._moved, axis=None)
        for cell in order.tolist():
            row, index = divmod(cell, self._moved.shape[1])
            if tenants.connections(index):
                yield Use(
                    int(self._uids[index]),
                    self.devices[row].name,
                    tenants.connections(index),
                    float(self._moved[row, index]),
                    float(self._above[row, index]),
                    float(self._allowed[row, index]),
                    bool(self._over[row, index]),
                    int(self._demotions[row, index]),
                )
