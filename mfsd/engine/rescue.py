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
* a lane that other tenants' packets may be in is not purged (lanes.py);
* each tenant has an even part of a device's rescues: whoever flips connections between levels uses up its own;
* all that a connection may have on its way may be stuck: the whole of a short message, or as much as the congestion
  window of a new connection allows. Nothing new is sent behind it then, and only the retransmission timer (200 ms)
  repairs a purge, and later each time that it has gone off while they waited. So the band is given a share of the link
  until the lane must be empty, where that doesn't take too long; what is left then is purged. Where the device has done
  so too much lately it waits a little for that. A crowd that is promoted together takes with it what it is guaranteed:
  that costs nobody anything, so it may take as long as the timers would. Who shares a lane is let out with it;
* what a connection sent before it was hinted is in the default band, which all share: that is let out, never purged.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from socket import IPPROTO_TCP
from statistics import fmean
from typing import TYPE_CHECKING, Final

import numpy as np

from mfsd.engine.beginnings import Beginnings
from mfsd.engine.device import Rescue
from mfsd.engine.slots import NS
from mfsd.engine.windows import TOLD_S, Windows
from mfsd.ground.bands import HINTED, Bands
from mfsd.ground.bucket import Bucket

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mfsd.engine.connections import Connections
    from mfsd.engine.device import Device
    from mfsd.engine.records import Connection
    from mfsd.engine.settings import RescueConfig
    from mfsd.engine.sockets import Progress


DRAIN: Final = 0.25
"""Share of a device that bands get to let out what a purge would cost a timeout."""
DRAIN_S: Final = 0.04
"""What there is to let out must take no longer from when the device does so."""
TIMER_S: Final = 0.25
"""The same where others would have to wait for nothing: what a purge costs, a timeout of 200 ms and a slow start."""
SLOW: Final = 2.0
"""A crowd is let out for so many times as long as it should take: those who deferred it are in debt (guarantees.py)."""
PATIENT_S: Final = 0.1
"""So long after its promotion may be waited until the device lets out again: past it a purge costs less."""
SILENT_S: Final = 0.05
"""Longer than any queue that TCP small queues allow takes to drain at the rates we shape."""


@dataclass(slots=True)
class _Stuck:
    """A promotion that may need a rescue."""

    band: int
    since: float
    until: float | None = None
    """When its lane must have been let out; None: nobody has looked whether it can be."""
    let_out: bool = False
    """It has been, or is."""
    crowd: bool = False
    """By what it and others who were promoted with it are guaranteed."""
    again: float = 0.0
    """When to look at it again, since it could not be let out yet."""
    retransmitted: int | None = None
    """Segments that TCP had sent again when somebody looked."""


_Late = tuple["Connection", _Stuck]


WANTING_S: Final = 1.0
"""A tenant that has needed no rescue for so long leaves its part to others."""


AFTER_S: Final = 1.0
"""So long after a rescue is looked what TCP has sent again."""


@dataclass(slots=True)
class Rescuer:
    """Watches promoted connections until their old lane is empty or purged."""

    devices: Sequence[Device]
    connections: Connections
    bands: Bands
    config: RescueConfig
    _stuck: dict[tuple[Connection, int], _Stuck] = field(default_factory=dict)
    """By connection and the band that it has left."""
    _budgets: dict[int, Bucket] = field(default_factory=dict)
    """Rescues that a device may have now, up to a second's worth."""
    _parts: dict[tuple[int, int], Bucket] = field(default_factory=dict)
    """The same by device and tenant, of those that needed rescues lately."""
    _wanted: dict[tuple[int, int], float] = field(default_factory=dict)
    """When they did."""

    _let_out: list[tuple[Connection, float]] = field(default_factory=list)
    """Who has left its old band that way, and when it was promoted."""
    _windows: Windows = field(default_factory=Windows)
    retransmitted: int = 0
    """Segments that TCP has sent again within AFTER_S of rescues."""
    _after: dict[Connection, tuple[float, int]] = field(default_factory=dict)
    """When to look how many a connection has sent again, and how many it had before."""

    beginnings: Beginnings = field(init=False)

    def __post_init__(self) -> None:
        self.beginnings = Beginnings(self.devices, self.connections, self.bands)

    @property
    def waiting(self) -> bool:
        """A rescue may be due within ``stall``: tick soon."""
        return bool(self._stuck) or self.beginnings.waiting

    def draining(self, now: float) -> dict[tuple[int, int], float]:
        """Bands that must be let out now, and their devices' rows: (row, band).

        Of each, the part of those that stand with them now, as far as they take with them what they are guaranteed
        (0..1); 0: it is let out at others' cost.
        """
        out = dict.fromkeys(self.beginnings.draining(now), 0.0)
        crowds: dict[tuple[int, int], list[int]] = {}
        for (conn, band), late in self._stuck.items():
            if late.until is not None and late.until > now:
                where = self._device(conn), band
                out.setdefault(where, 0.0)
                if late.crowd:
                    crowds.setdefault(where, []).append(conn.band)
        for where, bands in crowds.items():
            out[where] = min(len(bands) / max(self._standing_on(where[0], set(bands)), 1), 1.0)
        return out

    def leaving(self, now: float) -> set[tuple[int, int]]:
        """Rows of devices and bands that were left lately, of which nobody knows yet what is still there."""
        since = now - PATIENT_S
        late = [key for key, late in self._stuck.items() if late.until is None and late.since > since]
        rows = self.connections.device_of(np.array([conn.slot for conn, _ in late], dtype=np.int32)).tolist()
        return set(zip(rows, (band for _, band in late), strict=True))

    def _standing_on(self, row: int, bands: set[int]) -> int:
        """Connections of a device on these bands."""
        table = self.connections.table
        slots = np.flatnonzero(np.isin(table.band[: table.high], list(bands)) & table.used[: table.high])
        return int(np.count_nonzero(self.connections.device_of(slots.astype(np.int32)) == row))

    def hinted(self, conn: Connection) -> None:
        """A connection leaves the default band, in which what it has sent so far may be stuck."""
        if self.devices and self.config.enabled and self._purgeable(conn):
            self.beginnings.add(conn)

    def promoted(self, conn: Connection, was_band: int, now: float) -> None:
        """A connection left a band for a more urgent one."""
        spec = self.bands.bands[was_band]
        if not self.devices or not self.config.enabled or spec.role not in HINTED or not self._purgeable(conn):
            return
        self._stuck.setdefault((conn, was_band), _Stuck(was_band, now))

    def _purgeable(self, conn: Connection) -> bool:
        tcp = conn.endpoints is None or conn.endpoints.protocol == IPPROTO_TCP
        return tcp and (conn.lane > 0 or self.bands.level_bands[0].lanes == 1)

    def _device(self, conn: Connection) -> int:
        return int(self.connections.device_of(np.array([conn.slot], dtype=np.int32))[0])

    def forget(self, conn: Connection) -> None:
        """The connection is gone."""
        for spec in self.bands.bands:
            self._stuck.pop((conn, spec.index), None)
        self._after.pop(conn, None)
        self.beginnings.forget(conn)

    def run(self, now: float, given: Sequence[float]) -> None:
        """Order the rescues that are due. ``given``: share of each device that is guaranteed to all bands together."""
        if self._after:
            self._look_after(now)
        stall_s = self.config.stall_ms / 1000
        self._let_beginnings_out(now, stall_s)
        due: dict[int, list[_Late]] = {}
        for (conn, band), stuck in list(self._stuck.items()):
            if now < stuck.again or self.beginnings.holds(conn):
                continue
            index = self._device(conn)
            if not self.devices[index].enforced or conn.band == band:  # it is back: what it sends now belongs there
                del self._stuck[conn, band]
                continue
            if stuck.until is not None and now < stuck.until:
                if self.devices[index].empty(band, conn.lane):
                    del self._stuck[conn, band]
                    self._let_out.append((conn, stuck.since))
                    self._ended(index, now)
                continue
            silent = now - self.connections.table.last_ns[conn.slot] / NS
            if silent < stall_s and now - stuck.since < stall_s:
                continue  # it was moving a moment ago: look again in a moment
            if stuck.until is None and self.devices[index].empty(band, conn.lane):
                del self._stuck[conn, band]  # there was nothing
                continue
            due.setdefault(index, []).append((conn, stuck))
        for index, late in due.items():
            self._order(index, late, now, given[index])

    def _let_beginnings_out(self, now: float, stall_s: float) -> None:
        # Those that wait were looked at a tick ago, so whose default band is empty is known by now.
        before = self.beginnings.waiting
        for row in self.beginnings.run(now, stall_s, DRAIN):
            self._ended(row, now)
        if before:
            for row, conn in self.beginnings.stuck():
                begins, until = self._windows.ask(row, conn.tenant, self._tenants(row), now, DRAIN_S)
                if begins <= now:
                    self.beginnings.let_out(row, until)

    def _ended(self, index: int, now: float) -> None:
        if not any(row == index for row, _ in self.draining(now)):
            self._windows.end(index, now)

    def _look_after(self, now: float) -> None:
        due = [conn for conn, (at, _) in self._after.items() if now >= at]
        told = self.connections.positions.tcp(due) if due else {}
        for conn in due:
            _, before = self._after.pop(conn)
            if conn in told:
                self.retransmitted += max(told[conn].total_retrans - before, 0)

    def _order(self, index: int, stuck: list[_Late], now: float, given: float) -> None:
        """Order as many as the device may have now; the others wait."""
        own = [one for one in stuck if self._own(*one, now)]
        new = self._allowed(index, [(conn, late) for conn, late in own if late.until is None], now)
        told = self.connections.positions.tcp([conn for conn, _ in new]) if new and self.devices[index].floors else {}
        whole = self._whole(new, told)
        left = Counter(band for _, band in self._stuck)
        for conn, late in new:
            late.until = now
            late.retransmitted = told[conn].total_retrans if conn in told else None
            lane = whole.get((late.band, conn.lane))
            if lane is not None:
                self._try_to_let_out(index, conn, late, lane, left[late.band], given, now)
        orders = []
        for conn, late in own:
            if late.until is None or late.until > now:
                continue
            del self._stuck[conn, late.band]
            if late.retransmitted is not None:
                self._after[conn] = now + AFTER_S, late.retransmitted
            orders.append(Rescue(conn, late.band, conn.lane, late.since, late.let_out))
        if orders:
            self.devices[index].rescue(orders)

    @staticmethod
    def _whole(stuck: list[_Late], told: Mapping[Connection, Progress]) -> dict[tuple[int, int], tuple[float, float]]:
        """Lanes in which all that somebody may have on its way is stuck.

        By band and lane: bytes that one of its band has there on average, and seconds that the timers would take.
        """
        there: dict[int, list[int]] = {}
        timers: dict[tuple[int, int], float] = {}
        for conn, late in stuck:
            tcp = told.get(conn)
            under_way = 0 if tcp is None else tcp.unsent_plus_unacked - tcp.notsent
            if tcp is None or not under_way:
                continue
            there.setdefault(late.band, []).append(under_way)
            if tcp.notsent == 0 or tcp.window_full:
                lane = late.band, conn.lane
                timers[lane] = max(timers.get(lane, TIMER_S), tcp.rto_us / 1e6)
        return {lane: (fmean(there[lane[0]]), timer) for lane, timer in timers.items()}

    def _try_to_let_out(
        self, index: int, conn: Connection, late: _Stuck, lane: tuple[float, float], left: int, given: float, now: float
    ) -> None:
        """Let a lane out, and as much of all others of its band, if a purge isn't better.

        ``lane``: as of ``_whole``. ``left``: how many have left the band and may be stuck there. Where those are most
        of it, what is let out is theirs.
        """
        rate, table = self.devices[index].estimator.rate, self.connections.table
        if rate <= 0.0:
            return
        there, timer_s = lane
        others = int(np.count_nonzero((table.band[: table.high] == late.band) & table.used[: table.high]))
        octets, crowd = there * (left + others), left > others
        if crowd and given >= DRAIN:
            takes_s = octets / (given * rate)
            if takes_s <= timer_s:
                late.until, late.let_out, late.crowd = now + TOLD_S + SLOW * max(takes_s, TIMER_S), True, True
            return
        takes_s = octets / (DRAIN * rate)
        if takes_s > (TIMER_S if crowd else DRAIN_S):
            return
        begins, until = self._windows.ask(index, conn.tenant, self._tenants(index), now, takes_s)
        if begins <= now:
            late.until, late.let_out = until, True
        elif begins < late.since + PATIENT_S:
            late.until, late.again = None, begins

    def _tenants(self, index: int) -> int:
        """How many have needed rescues of a device lately."""
        return max(sum(row == index for row, _ in self._wanted), 1)

    def _own(self, conn: Connection, late: _Stuck, now: float) -> bool:
        """Its lane is its tenant's own. Else its queue is left to its band's floor."""
        if self.connections.alone(conn, now):
            return True
        del self._stuck[conn, late.band]
        return False

    def _allowed(self, index: int, stuck: list[_Late], now: float) -> list[_Late]:
        """Those that the budgets of the device and of their tenants have room for."""
        self._wanted |= {(index, conn.tenant): now for conn, _ in stuck}
        for key in [k for k, at in self._wanted.items() if at < now - WANTING_S]:
            del self._wanted[key]
            self._parts.pop(key, None)
        most = float(self.config.max_per_s)
        whole = self._budgets.setdefault(index, Bucket())
        room = int(whole.fill(now, most, most))
        each = max(most / self._tenants(index), 1.0)
        out: list[_Late] = []
        for conn, late in stuck:
            part = self._parts.setdefault((index, conn.tenant), Bucket())
            if len(out) < room and part.fill(now, each, each) >= 1:
                part.left -= 1
                out.append((conn, late))
        whole.left -= len(out)
        return out

    def rescued(self) -> list[float]:
        """When those were promoted whose lanes have been purged or let out since the last call.

        What was not needed is given back to the budget.
        """
        helped, self._let_out = self._let_out, []
        for index, device in enumerate(self.devices):
            for done in device.rescued():
                if done.freed or done.order.let_out:  # with nothing there any more it was let out just in time
                    helped.append((done.order.conn, done.order.promoted))
                else:
                    self._budgets[index].left += 1
                    part = self._parts.get((index, done.order.conn.tenant))
                    if part is not None:
                        part.left += 1
        for conn, _ in helped:
            conn.rescues += 1
            for stream in conn.streams:
                if stream.queue:
                    stream.queue.first.rescues += 1
        return [promoted for _, promoted in helped]

    def lane_empty(self, conn: Connection, now: float) -> bool:
        """True when nothing of the connection can be queued any more. Without a qdisc to ask: when it is silent."""
        device = self.devices[self._device(conn)] if self.devices else None
        if device is not None and device.enforced and self.bands.bands[conn.band].role in HINTED:
            return device.empty(conn.band, conn.lane)
        return now - float(self.connections.table.last_ns[conn.slot]) / NS > SILENT_S
