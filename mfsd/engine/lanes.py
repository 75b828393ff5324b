# SPDX-License-Identifier: Apache-2.0
"""Which lane a connection gets, and whose lanes they are: a rescue purges a lane, which must hold no others' packets.

A connection has the same lane in every band. With two lanes or more, lane 0 is for what must never be purged: anything
but TCP. The others are a tenant's own as long as there are enough: a tenant takes another empty lane only while more
than a third as many as it has are left, so one that is alone has three quarters of them and whoever comes next still
finds some. Where none is left, tenants share lanes, and those are not purged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

LEFT_S: Final = 5.0
"""After so long nothing of a tenant that has left a lane is queued there: floors empty a lane sooner."""


class Lanes:
    """Connections by lane and tenant. Tenants are dense indices (tenants.py)."""

    def __init__(self, count: int) -> None:
        """``count``: of the band that has most."""
        self._all: npt.NDArray[np.int64] = np.zeros(count, dtype=np.int64)
        self._own: dict[int, npt.NDArray[np.int64]] = {}
        self._left: list[dict[int, float]] = [{} for _ in range(count)]
        """By lane: tenants that have left it, and when they sent something there last, CLOCK_MONOTONIC seconds."""

    @property
    def one(self) -> bool:
        """There is a single lane, for everything."""
        return len(self._all) == 1

    def take(self, tenant: int, *, tcp: bool, wish: int | None = None) -> int:
        """Count another connection of a tenant; returns its lane. ``wish``: one that will do if it may be had."""
        lane = self._best(tenant, wish) if tcp and not self.one else 0
        own = self._own.get(tenant)
        if own is None:
            own = self._own[tenant] = np.zeros(len(self._all), dtype=np.int64)
        own[lane] += 1
        self._all[lane] += 1
        return lane

    def _best(self, tenant: int, wish: int | None) -> int:
        users, own = self._all[1:], self._own.get(tenant)
        own = np.zeros(len(users), dtype=np.int64) if own is None else own[1:]
        alone, empty = own == users, users == 0
        mine = int(np.count_nonzero(alone & ~empty))
        may = alone if not mine or np.count_nonzero(empty) > mine // 3 else alone & ~empty
        if not may.any():
            return 1 + int(users.argmin())
        if wish and wish <= len(users) and may[wish - 1]:
            return wish
        return 1 + int(np.where(may, users, np.iinfo(np.int64).max).argmin())

    def give_back(self, lane: int, tenant: int, sent_at: float) -> None:
        """A connection is gone, or somewhere else; ``sent_at``: when its last packet went there."""
        own = self._own[tenant]
        own[lane] -= 1
        self._all[lane] -= 1
        if not own[lane]:
            left = {t: at for t, at in self._left[lane].items() if at > sent_at - LEFT_S}
            self._left[lane] = left | {tenant: max(sent_at, left.get(tenant, 0.0))}
        if not own.any():
            del self._own[tenant]

    def alone(self, lane: int, tenant: int, now: float) -> bool:
        """Nothing but this tenant's packets can be queued in a lane."""
        own = self._own.get(tenant)
        if own is None or own[lane] != self._all[lane]:
            return False
        return all(t == tenant or at < now - LEFT_S for t, at in self._left[lane].items())
