# SPDX-License-Identifier: Apache-2.0
"""Looks for windows in which nothing but the network held us back, and tells the peers' books what came through.

Every tick knows what each connection's peer has acknowledged (the slots say so), hence which peers something goes to.
One after the other they are probed: a few of their busiest connections are asked what limits them (TCP_INFO by
inet_diag), and asked again after 10 ms or more. If one of them had been limited by the network all the time, the link
into the peer, or something on the way there, was full: what all connections to it had acknowledged meanwhile is what
it gives us.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from mfsd.engine.peers import limited_by_network

if TYPE_CHECKING:
    from mfsd.engine.connections import Connections
    from mfsd.engine.records import Connection
    from mfsd.engine.sockets import Progress
    from mfsd.policy.views import F8

LEAST_S: Final = 0.010
MOST_S: Final = 0.25
PACKETS: Final = 32
"""A window lasts until so many packets have left, but from LEAST_S to MOST_S: what is acknowledged comes in bursts of a
GSO packet or two, and a window with few of them would show bursts, not the link."""
LEAST_PACKETS: Final = 8
"""With fewer a window means nothing."""
PROBES: Final = 4
"""Peers probed at a time."""
BEGIN_S: Final = 0.039
"""Time between two that begin: every fourth tick, so that most ticks neither begin nor end one."""
ASKED: Final = 4
"""Connections of a peer that are asked: at 10 us each."""


@dataclass(slots=True)
class _Probe:
    """A peer that is looked at."""

    peer: int
    began: float
    slots: npt.NDArray[np.intp]
    """Of all connections to it, shape (c,)."""
    tenancy: npt.NDArray[np.int64]
    """Of the slots, shape (c,): those that somebody else has by the end don't count."""
    acked: F8
    """Shape (c,)."""
    packets: int
    asked: dict[Connection, Progress]


@dataclass(slots=True)
class Probes:
    """See the module. ``run`` at every tick."""

    connections: Connections
    _probes: list[_Probe] = field(default_factory=list)
    _acked: F8 = field(default_factory=lambda: np.zeros(0))
    """By slot, when a window could have begun last."""
    _next: int = 0
    """Peer to look at first."""
    _looked: float = -np.inf

    def run(self, now: float) -> None:
        """End windows that are over, and begin one."""
        over = [p for p in self._probes if self._over(p, now)]
        for probe in over:
            self._probes.remove(probe)
            self._end(probe, now)
        if len(self._probes) < PROBES and now - self._looked >= BEGIN_S:
            self._looked = now
            acked = self.connections.positions.acked()
            self._begin(acked, now)
            self._acked = acked

    def _begin(self, acked: F8, now: float) -> None:
        """Look at the next peer that something goes to."""
        known, before = self.connections, self._acked
        n = min(len(acked), len(before))
        moved = acked[:n] - before[:n]
        peer = known.peer[:n]
        active = np.bincount(peer + 1, weights=moved > 0, minlength=1)[1:] > 0  # peer -1 is nobody
        active[[p.peer for p in self._probes if p.peer < len(active)]] = False
        active &= ~known.peers.configured[: len(active)]
        due = np.flatnonzero(active)
        if not len(due):
            return
        chosen = int(due[np.searchsorted(due, self._next) % len(due)])
        self._next = chosen + 1
        own = np.flatnonzero((peer == chosen) & (moved > 0))
        busiest = own[np.argpartition(moved[own], -ASKED)[-ASKED:]] if len(own) > ASKED else own
        asked = known.positions.tcp([known.by_slot[slot] for slot in busiest.tolist() if slot in known.by_slot])
        if asked:
            every = np.flatnonzero(known.peer[: known.table.high] == chosen)
            self._probes.append(
                _Probe(
                    chosen,
                    now,
                    every,
                    known.tenancy.take(every),
                    known.positions.acked_of(every),
                    self._packets(every),
                    asked,
                )
            )

    def _packets(self, slots: npt.NDArray[np.intp]) -> int:
        return int(self.connections.table.packets[slots].sum())

    def _over(self, probe: _Probe, now: float) -> bool:
        lasted = now - probe.began
        if lasted < LEAST_S:
            return False
        return lasted >= MOST_S or self._packets(probe.slots) - probe.packets >= PACKETS

    def _end(self, probe: _Probe, now: float) -> None:
        known = self.connections
        seconds = now - probe.began
        if self._packets(probe.slots) - probe.packets < LEAST_PACKETS or seconds > 2 * MOST_S:
            return  # too little, or nobody knows what happened in so long a tick
        same = known.tenancy.take(probe.slots) == probe.tenancy
        still = [c for c in probe.asked if known.by_slot.get(c.slot) is c]
        after = known.positions.tcp(still)
        if any(p.holes for p in (*probe.asked.values(), *after.values())):
            return  # what is acknowledged at one end of the window is not what has arrived
        if any(limited_by_network(probe.asked[c], after[c], seconds) for c in still if c in after):
            moved = np.maximum(known.positions.acked_of(probe.slots) - probe.acked, 0.0)
            known.peers.saw(probe.peer, float(moved[same].sum()) / seconds, now)
