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
from typing import TYPE_CHECKING, Final, Protocol

from mfsd.bands import Bands, Role
from mfsd.engine.connections import IPPROTO_TCP
from mfsd.engine.slots import NS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mfsd.daemon.config import RescueConfig
    from mfsd.engine.books import Connection
    from mfsd.engine.connections import Connections
    from mfsd.engine.estimator import LinkEstimator


SILENT_S: Final = 0.05
"""Longer than any queue that TCP small queues allow takes to drain at the rates we shape."""


class LaneDriver(Protocol):
    """What rescue needs of one device (mfsd.daemon.device.Port)."""

    estimator: LinkEstimator

    @property
    def enforced(self) -> bool:
        """False when the device is only observed: nothing is ever stuck there."""
        ...

    @property
    def floors(self) -> bool:
        """Bands get their floors on this device."""
        ...

    def backlog(self, band: int, lane: int) -> int:
        """Bytes queued in one lane now."""
        ...

    def purge(self, lanes: Sequence[tuple[int, int]]) -> None:
        """Free all packets of these (band, lane) pairs."""
        ...


@dataclass(slots=True)
class _Stuck:
    """A promotion that may need a rescue."""

    band: int
    since: float


@dataclass(slots=True)
class Rescuer:
    """Watches promoted connections until their old lane is empty or purged."""

    ports: Sequence[LaneDriver]
    connections: Connections
    bands: Bands
    config: RescueConfig
    _stuck: dict[Connection, _Stuck] = field(default_factory=dict)
    _tokens: float = 0.0
    _refilled: float = 0.0

    @property
    def waiting(self) -> bool:
        """A rescue may be due within ``stall``: tick soon."""
        return bool(self._stuck)

    def promoted(self, conn: Connection, was_band: int, now: float) -> None:
        """A connection left a band for a more urgent one."""
        spec = self.bands.bands[was_band]
        if not self.config.enabled or spec.role not in (Role.LEVEL, Role.SCAVENGER) or not self._purgeable(conn):
            return
        known = self._stuck.get(conn)
        if known is None:
            # Promoted twice in a row, its packets are still where they were first.
            self._stuck[conn] = _Stuck(was_band, now)

    def _purgeable(self, conn: Connection) -> bool:
        tcp = conn.endpoints is None or conn.endpoints.protocol == IPPROTO_TCP
        return tcp and (conn.lane > 0 or self.bands.level_bands[0].lanes == 1)

    def _port(self, conn: Connection) -> int:
        return int(self.connections.port[conn.slot])

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
            port = self._port(conn)
            driver = self.ports[port]
            if not driver.enforced:
                del self._stuck[conn]
                continue
            silent = now - self.connections.table.last_ns[conn.slot] / NS
            if silent < stall_s and now - stuck.since < stall_s:
                continue  # it was moving a moment ago: look again in a moment
            backlog = driver.backlog(stuck.band, conn.lane)
            del self._stuck[conn]
            if backlog and not self._drains(conn, stuck.band, backlog, driver):
                due.setdefault(port, []).append((conn, stuck))
        return sum(self._purge(port, stuck, now) for port, stuck in due.items())

    def _drains(self, conn: Connection, band: int, backlog: int, driver: LaneDriver) -> bool:
        """True when the band's floor empties the lane before a retransmission timer could repair a purge."""
        floor = self.bands.bands[band].floor * driver.estimator.rate if driver.floors else 0.0
        if not floor or not conn.local or conn.endpoints is None:
            return False
        tcp = self.connections.resolver.tcp_progress([(conn.cookie, conn.endpoints)]).get(conn.cookie)
        return tcp is not None and tcp.notsent == 0 and backlog / floor < tcp.rto_us / 1e6

    def _purge(self, port: int, stuck: list[tuple[Connection, _Stuck]], now: float) -> int:
        rate = float(self.config.max_per_s)
        self._tokens = min(self._tokens + (now - self._refilled) * rate, rate)
        self._refilled = now
        allowed = stuck[: int(self._tokens)]
        for conn, late in stuck[len(allowed) :]:
            self._stuck[conn] = late
        if not allowed:
            return 0
        self._tokens -= len(allowed)
        self.ports[port].purge([(s.band, conn.lane) for conn, s in allowed])
        for conn, _ in allowed:
            conn.rescues += 1
        return len(allowed)

    def lane_empty(self, conn: Connection, now: float) -> bool:
        """True when nothing of the connection can be queued any more. Without a qdisc to ask: when it is silent."""
        driver = self.ports[self._port(conn)] if self.ports else None
        if driver is not None and driver.enforced and self.bands.bands[conn.band].role in (Role.LEVEL, Role.SCAVENGER):
            return driver.backlog(conn.band, conn.lane) == 0
        return now - float(self.connections.table.last_ns[conn.slot]) / NS > SILENT_S
