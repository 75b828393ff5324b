# SPDX-License-Identifier: Apache-2.0
"""What connections sent before they were hinted, and how it gets out.

A hint and the first bytes race, and the first bytes win by some milliseconds: so the first window of a new connection
is in the default band. Where collectives leave that nothing but its floor, all hinted connections that are new wait for
one another there, whatever they are guaranteed, since TCP sends no more until something is acknowledged. The band is
everybody's and can't be purged, so it is given a share of the link until they send again, and all that they had sent
before is acknowledged: one packet that has stayed behind (a tail loss probe does) is a hole before all that has
overtaken it, and TCP does not repeat what it still sees in a queue of this host (skb_still_in_host_queue,
net/ipv4/tcp_output.c). So nothing new is sent until that is out, however much is guaranteed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mfsd.engine.connections import Connections
    from mfsd.engine.device import Device
    from mfsd.engine.records import Connection
    from mfsd.ground.bands import Bands

PATIENT_S: Final = 0.1
"""So long after its first hint a connection is looked at."""
SERVED_S: Final = 0.02
"""So long the band's load is believed, which says how it was served before the hint: who was hinted takes from that."""


@dataclass(slots=True)
class _Begun:
    """A connection that was hinted lately."""

    last_ns: int
    """When it had sent its last packet before the hint; 0: its slot has seen none."""
    sent: int
    """How far it had got then, on TCP's scale."""
    since: float = np.inf
    """Since when it is looked at; inf: not yet."""
    served: bool = False
    """The band seems to be served, so that it needs nothing."""


@dataclass(slots=True)
class Beginnings:
    """Connections that were hinted lately, and default bands that are let out for them."""

    devices: Sequence[Device]
    connections: Connections
    bands: Bands
    _begun: dict[Connection, _Begun] = field(default_factory=dict)
    _until: dict[int, float] = field(default_factory=dict)
    """By row of the device: until when its default band is let out; 0: it is only looked at."""

    def holds(self, conn: Connection) -> bool:
        """All that it has sent is still to be let out, so nothing of it is anywhere else."""
        begun = self._begun.get(conn)
        return begun is not None and not begun.served and not self._moved(conn, begun)

    @property
    def waiting(self) -> bool:
        """Some may be stuck: tick soon."""
        return bool(self._until)

    def draining(self, now: float) -> set[tuple[int, int]]:
        """Rows of the devices whose default bands must be let out now, with its index."""
        return {(row, self.bands.default.index) for row, until in self._until.items() if until > now}

    def add(self, conn: Connection) -> None:
        """It leaves the default band."""
        table, slot = self.connections.table, conn.slot
        self._begun.setdefault(conn, _Begun(int(table.last_ns[slot]), int(table.sent[slot])))

    def forget(self, conn: Connection) -> None:
        """It is gone."""
        self._begun.pop(conn, None)

    def run(self, now: float, stall_s: float, enough: float) -> list[int]:
        """Look who still waits; returns the rows of devices whose default bands needn't be let out any more.

        ``enough``: share of a device with which that is let out anyway.
        """
        silent = self._silent(now, stall_s, enough) if self._begun else {}
        over = [row for row in self._until if row not in silent]
        for row in over:
            del self._until[row]
        for row, conns in silent.items():
            if self.devices[row].empty(self.bands.default.index, 0):
                for conn in conns:
                    del self._begun[conn]
            else:
                self._until.setdefault(row, 0.0)
        return over

    def _silent(self, now: float, stall_s: float, enough: float) -> dict[int, list[Connection]]:
        """Those of which something from before may still be there, by row of the device."""
        default, conns = self.bands.default.index, list(self._begun)
        rows = self.connections.device_of(np.array([c.slot for c in conns], dtype=np.int32)).tolist()
        out: dict[int, list[Connection]] = {}
        for conn, row in zip(conns, rows, strict=True):
            begun, device = self._begun[conn], self.devices[row]
            begun.since = min(begun.since, now)
            over = now >= (self._until.get(row) or begun.since + PATIENT_S) or not (device.enforced and device.floors)
            if over or self._out(conn, begun):
                del self._begun[conn]
                continue
            begun.served = device.estimator.band_load[default] > enough and now < begun.since + SERVED_S
            if not begun.served and now >= begun.since + stall_s:
                out.setdefault(row, []).append(conn)
        return out

    def _moved(self, conn: Connection, begun: _Begun) -> bool:
        return bool(self.connections.table.last_ns[conn.slot] != begun.last_ns)

    def _out(self, conn: Connection, begun: _Begun) -> bool:
        """It has sent since, and what was before that is acknowledged, as of its last packet."""
        if not self._moved(conn, begun):
            return False
        positions = self.connections.positions
        before = begun.sent if begun.last_ns else positions.origin(conn)
        return before is None or not positions.on_tcps_scale(conn) or self.connections.table.acked[conn.slot] >= before

    def stuck(self) -> list[tuple[int, Connection]]:
        """Of each device whose default band is looked at but not let out yet, one that waits for that, and the row."""
        rows = [row for row, until in self._until.items() if not until]
        if not rows:
            return []
        conns = list(self._begun)
        told = self.connections.positions.tcp(conns)
        for conn in conns:
            if conn in told and told[conn].unsent_plus_unacked == told[conn].notsent:
                del self._begun[conn]  # it has sent nothing yet
        at = self.connections.device_of(np.array([c.slot for c in self._begun], dtype=np.int32)).tolist()
        first = {row: conn for conn, row in zip(self._begun, at, strict=True) if conn in told}
        return [(row, first[row]) for row in rows if row in first]

    def let_out(self, row: int, until: float) -> None:
        """Let out a device's default band until then, unless all get going before."""
        self._until[row] = until
