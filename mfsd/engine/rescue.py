# SPDX-License-Identifier: Apache-2.0
"""Rescue: make a promotion take effect although the connection's packets sit in a starved queue.

Re-classification alone moves future packets, but a starved TCP socket has none: TCP small queues let nothing more out
until one of its own queued segments leaves (docs/architecture.md, "The promotion stall"). The cure that measured best
is to purge the connection's old lane in the same breath: freeing the packets restarts the socket at once, new data go
to the new band, and the receiver's SACKs bring back what was purged.

What a purge costs is at most what was stuck, about two GSO segments, never sent on the wire before. It must not be paid
for nothing, and never by others:

* a lane that still moves drains by itself; only one whose connection sent nothing for ``stall`` seconds is purged;
* only TCP is ever purged; with two lanes or more, everything else lives in lane 0, which is never purged;
* the whole of a short message may be stuck, with nothing new to send behind it: then only the retransmission timer
  repairs a purge, and if the band's floor drains the lane sooner than that, it is left to do so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from mfsd.bands import HINTED, Bands
from mfsd.engine.connections import IPPROTO_TCP
from mfsd.engine.slots import NS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mfsd.engine.books import Connection
    from mfsd.engine.connections import Connections
    from mfsd.engine.device import Device
    from mfsd.engine.settings import RescueConfig


SILENT_S: Final = 0.05
"""Longer than any queue that TCP small queues allow takes to drain at the rates we shape."""


@dataclass(slots=True)
class _Stuck:
    """A promotion that may need a rescue."""

    band: int
    since: float


@dataclass(slots=True)
class _Budget:
    """Rescues that one device may have now; refilled at ``max_per_s``, up to a second's worth."""

    tokens: float = 0.0
    refilled: float = 0.0

    def refill(self, now: float, rate: float) -> int:
        """How many are allowed now."""
        self.tokens = min(self.tokens + (now - self.refilled) * rate, rate)
        self.refilled = now
        return int(self.tokens)


@dataclass(slots=True)
class Rescuer:
    """Watches promoted connections until their old lane is empty or purged."""

    devices: Sequence[Device]
    connections: Connections
    bands: Bands
    config: RescueConfig
    _stuck: dict[Connection, _Stuck] = field(default_factory=dict)
    _budgets: dict[int, _Budget] = field(default_factory=dict)

    @property
    def waiting(self) -> bool:
        """A rescue may be due within ``stall``: tick soon."""
        return bool(self._stuck)

    def promoted(self, conn: Connection, was_band: int, now: float) -> None:
        """A connection left a band for a more urgent one."""
        spec = self.bands.bands[was_band]
        if not self.devices or not self.config.enabled or spec.role not in HINTED or not self._purgeable(conn):
            return
        known = self._stuck.get(conn)
        if known is None:
            # Promoted twice in a row, its packets are still where they were first.
            self._stuck[conn] = _Stuck(was_band, now)

    def _purgeable(self, conn: Connection) -> bool:
        tcp = conn.endpoints is None or conn.endpoints.protocol == IPPROTO_TCP
        return tcp and (conn.lane > 0 or self.bands.level_bands[0].lanes == 1)

    def _device(self, conn: Connection) -> int:
        return int(self.connections.device[conn.slot])

    def forget(self, conn: Connection) -> None:
        """The connection is gone."""
        self._stuck.pop(conn, None)

    def run(self, now: float) -> int:
        """Rescue what is due. Returns how many lanes were purged."""
        if not self._stuck:
            return 0
        stall_s = self.config.stall_ms / 1000
        due: dict[int, list[tuple[Connection, _Stuck]]] = {}
        for conn, stuck in list(self._stuck.items()):
            index = self._device(conn)
            device = self.devices[index]
            if not device.enforced:
                del self._stuck[conn]
                continue
            silent = now - self.connections.table.last_ns[conn.slot] / NS
            if silent < stall_s and now - stuck.since < stall_s:
                continue  # it was moving a moment ago: look again in a moment
            backlog = device.backlog(stuck.band, conn.lane)
            del self._stuck[conn]
            if backlog and not self._drains(conn, stuck.band, backlog, device):
                due.setdefault(index, []).append((conn, stuck))
        return sum(self._purge(index, stuck, now) for index, stuck in due.items())

    def _drains(self, conn: Connection, band: int, backlog: int, device: Device) -> bool:
        """True when the band's floor empties the lane before a retransmission timer could repair a purge."""
        floor = self.bands.bands[band].floor * device.estimator.rate if device.floors else 0.0
        if not floor or not conn.local or conn.endpoints is None:
            return False
        tcp = self.connections.resolver.tcp_progress([(conn.cookie, conn.endpoints)]).get(conn.cookie)
        return tcp is not None and tcp.notsent == 0 and backlog / floor < tcp.rto_us / 1e6

    def _purge(self, index: int, stuck: list[tuple[Connection, _Stuck]], now: float) -> int:
        budget = self._budgets.setdefault(index, _Budget())
        allowed = stuck[: budget.refill(now, float(self.config.max_per_s))]
        for conn, late in stuck[len(allowed) :]:
            self._stuck[conn] = late
        if not allowed:
            return 0
        budget.tokens -= len(allowed)
        self.devices[index].purge([(s.band, conn.lane) for conn, s in allowed])
        for conn, _ in allowed:
            conn.rescues += 1
        return len(allowed)

    def lane_empty(self, conn: Connection, now: float) -> bool:
        """True when nothing of the connection can be queued any more. Without a qdisc to ask: when it is silent."""
        device = self.devices[self._device(conn)] if self.devices else None
        if device is not None and device.enforced and self.bands.bands[conn.band].role in HINTED:
            return device.backlog(conn.band, conn.lane) == 0
        return now - float(self.connections.table.last_ns[conn.slot]) / NS > SILENT_S
