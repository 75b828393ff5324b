# SPDX-License-Identifier: Apache-2.0
"""Whether what was decided last still stands, so that a calm host need not decide at each tick.

A policy may say for how long its decision stands while nothing moves but time and bytes (``Decision.lasts``). That
nothing else does is seen from what it was shown: the books as they are, who carries what, and what the link gives to
whom, about. On a host with one transfer that is a twentieth of what deciding takes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mfsd.engine.books import Books
    from mfsd.engine.connections import Connections
    from mfsd.engine.device import Device
    from mfsd.engine.rescue import Rescuer
    from mfsd.ground.bands import Bands
    from mfsd.policy.views import B1, F8

SLOTS: Final = 1024
"""With more, comparing what is there takes as long as deciding about it."""
ABOUT: Final = 0.02
"""A rate, as a share of itself, or a load is the same if it differs by no more."""


@dataclass(slots=True)
class Calm:
    """Remembers what was decided about, and until when that stands."""

    books: Books
    connections: Connections
    devices: Sequence[Device]
    bands: Bands
    rescuer: Rescuer
    until: float = 0.0
    _seen: tuple[object, ...] = ()
    _link: F8 = field(default_factory=lambda: np.zeros(0))

    def stands(self, now: float, unannounced: B1, *, steers: bool) -> bool:
        """What was noted last still holds."""
        if now >= self.until:
            return False
        if self._busy() or self._things(now, unannounced, steers=steers) != self._seen or not self._same_link():
            self.until = 0.0
        return now < self.until

    def note(self, lasts: float, now: float, unannounced: B1, *, steers: bool) -> None:
        """It was decided now, and all of it has been written."""
        self.until = 0.0
        if lasts > 0.0 and not self._busy():
            self.until = now + lasts
            self._seen, self._link = self._things(now, unannounced, steers=steers), self._links()

    def _busy(self) -> bool:
        """Something is under way for which each tick counts."""
        books = self.books
        wanted = books.arrange_wanted or books.recorders or books.streams.unasked or self.rescuer.waiting
        return bool(wanted) or self.connections.table.high > SLOTS

    def _things(self, now: float, unannounced: B1, *, steers: bool) -> tuple[object, ...]:
        """All that a decision and what is made of it depends on, but for time, bytes and the link."""
        books, known, table = self.books, self.connections, self.connections.table
        high, stores = table.high, (books.transfers, books.requests, books.batches, books.streams.members)
        columns = (table.used, table.band, table.ifindex, known.tenancy, known.last_stage, known.mark_set, known.peer)
        return (
            steers,
            *(store.image() for store in stores),
            *(column[:high].tobytes() for column in columns),
            known.tenants.of[:high].tobytes(),
            known.positions.goes_on(now).tobytes(),
            known.peers.rate.tobytes(),
            unannounced.tobytes(),
        )

    def _same_link(self) -> bool:
        links = self._links()
        return links.shape == self._link.shape and not (np.abs(links - self._link) > ABOUT).any()

    def _links(self) -> F8:
        """Of each device the rate, on a scale on which ABOUT is a share of it, and loads."""
        out: list[float] = []
        for device in self.devices:
            estimator = device.estimator
            rate = estimator.rate
            out += [float(np.log(rate)) if rate > 0.0 else 0.0, estimator.pauses.collectives, float(device.floors)]
            out += estimator.band_load.take(self.bands.unlevelled).tolist()
        return np.array(out)
