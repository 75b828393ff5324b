# SPDX-License-Identifier: Apache-2.0
"""How far each connection has got.

Two sources tell. The slot has TCP's counters as of the last packet that left: free, every tick, but the
acknowledgements of the last bytes come when nothing leaves any more. inet_diag has them as of now, at a system call per
connection. Both are on TCP's own scale, on which a connection begins at 0 and its SYN counts as a byte.
"""

from __future__ import annotations

from socket import IPPROTO_TCP
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from mfsd.engine.beyond import Beyond
from mfsd.engine.locating import SYN
from mfsd.engine.slots import NS, FlowTable
from mfsd.engine.streams import Moved, Streams
from mfsd.ground.model import INF

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mfsd.engine.records import Connection, Stream
    from mfsd.engine.sockets import Progress, Sockets
    from mfsd.policy.views import F8


class UnknownError(Exception):
    """The kernel can't be asked now: nothing follows from that."""


class Position(NamedTuple):
    """Where a connection stands, from TCP."""

    acked: float
    """What the peer has acknowledged."""
    written: float
    """What the process has written."""
    over: bool = False
    """Closed, and all acknowledged."""
    quiet_s: float = 0.0
    """Since the last acknowledgement came."""
    sent_ago_s: float = INF
    """Since data were sent last."""
    ended: float = INF
    """When it was closed, if that is known."""


UNCONNECTED: Final = Position(0.0, 0.0, quiet_s=INF)
"""Of one that has carried nothing."""


class Positions:
    """What is known of the positions of connections."""

    def __init__(self, table: FlowTable, sockets: Sockets) -> None:
        self.table = table
        self.sockets = sockets
        self._unplaced: dict[Connection, None] = {}
        """Joined to streams at a position that nobody knows."""
        n = len(table)
        self.beyond = Beyond(n)
        self._sent: F8 = np.zeros(n)
        self._acked: F8 = np.zeros(n)
        """By slot: what TCP has said when asked; the slot itself may know more by now."""

    def begin(self, slot: int) -> None:
        """Another connection has this slot from now on."""
        self._sent[slot] = self._acked[slot] = 0.0
        self.beyond.forget(slot)

    def forget(self, conn: Connection) -> None:
        """It is gone."""
        self._unplaced.pop(conn, None)
        self.beyond.forget(conn.slot)

    # --- what is known ------------------------------------------------------------------------------------------------

    def sent(self) -> F8:
        """What has left each connection, by slot; shape (high,)."""
        high = self.table.high
        return np.maximum(self.table.sent[:high], self._sent[:high])

    def goes_on(self, now: float) -> npt.NDArray[np.int32]:
        """Slots of connections that have sent more than was announced, which is not due yet."""
        return self.beyond.slots(self.table.high, self.sent, now)

    def acked(self) -> F8:
        """What the peer of each connection is known to have acknowledged, by slot; shape (high,)."""
        high = self.table.high
        return np.maximum(self.table.acked[:high], self._acked[:high])

    def acked_of(self, slots: npt.NDArray[np.intp]) -> F8:
        """The same for some slots, shape (len(slots),)."""
        return np.maximum(self.table.acked.take(slots), self._acked.take(slots))

    def sent_by(self, conn: Connection) -> float:
        """What has left one connection."""
        slot = conn.slot
        return max(float(self.table.sent.item(slot)), self._sent.item(slot))

    def acked_by(self, conn: Connection) -> float:
        """What the peer of one connection is known to have acknowledged."""
        slot = conn.slot
        return max(float(self.table.acked.item(slot)), self._acked.item(slot))

    def moved_at(self, conn: Connection) -> float:
        """When its last packet left; 0: it has sent none."""
        return float(self.table.last_ns[conn.slot]) / NS

    def moved(self, streams: Streams) -> Moved:
        """How far streams have come now."""
        return Moved(streams.offsets(self.sent()), streams.offsets(self.acked()))

    def written(self, conn: Connection) -> float:
        """How far the process has written, on TCP's word if that can be had; inf: nobody knows yet, see ``placed``."""
        position = self._ask_one(conn)
        if position is not None:
            return position.written
        if self.table.last_ns[conn.slot]:
            return float(self.table.sent[conn.slot])
        self._unplaced[conn] = None
        return INF

    def unconnected(self, stream: Stream) -> list[Connection]:
        """Members whose sockets are not connected, as far as anybody can tell: none has carried anything.

        Not those of which a worker has said where they stand: they are where nobody can look, or over.
        """
        refused = stream.refused or stream.watch is not None
        return [
            conn
            for conn, member in stream.members.items()
            if conn.endpoints is None and self.sent_by(conn) <= SYN and (refused or member.joined == INF)
        ]

    def unplaced(self, conn: Connection) -> bool:
        """Streams wait for where it stands."""
        return conn in self._unplaced

    def place(self, conn: Connection) -> bool:
        """A connection has just been made: whether streams have waited for that, on TCP's scale."""
        waited = conn in self._unplaced and not conn.passing
        if waited:
            del self._unplaced[conn]
        return waited

    def placed(self) -> list[tuple[Connection, float]]:
        """Connections of which nobody knew where they stood, whose slots know by now: that position."""
        out = []
        for conn in list(self._unplaced):
            position = self.origin(conn)
            if position is None and conn.here:
                told = self._ask_one(conn)
                position = None if told is None else told.written
            if position is not None:
                del self._unplaced[conn]
                out.append((conn, position))
        return out

    def origin(self, conn: Connection) -> float | None:
        """Where a connection stood before the first packet that its slot has seen; None: it has seen none."""
        if not self.table.last_ns[conn.slot]:
            return None
        if not self.table.acked[conn.slot] and not self.on_tcps_scale(conn):
            return 0.0
        sent = int(self.table.sent[conn.slot])
        return float(sent - ((sent - int(self.table.origin[conn.slot])) & 0xFFFFFFFF))

    @staticmethod
    def on_tcps_scale(conn: Connection) -> bool:
        """Its packets have their socket when they leave, so that TCP's counters are in its slot."""
        own = conn.cookie != 0 and not conn.passing
        return own and (conn.endpoints is None or conn.endpoints.protocol == IPPROTO_TCP)

    def hears(self, conn: Connection) -> bool:
        """TCP can't be asked about a connection, but the kernel notes when all that has left is acknowledged.

        It does of those whose beginning it has told.
        """
        e = conn.endpoints
        told = self.sockets.tells and conn.cookie != 0 and not conn.here
        return told and e is not None and e.protocol == IPPROTO_TCP

    # --- TCP's word ---------------------------------------------------------------------------------------------------

    def ask(self, conns: Sequence[Connection]) -> dict[Connection, Position | None]:
        """Where connections stand now, on TCP's word; None: the socket is gone, nobody knows how.

        Connections whose sockets are elsewhere (or not located yet) are absent. Raises UnknownError.
        """
        askable, answers = self._progress(conns)
        if answers is None:
            raise UnknownError
        out: dict[Connection, Position | None] = {}
        for conn in askable:
            if conn.cookie not in answers:
                out[conn] = None
                continue
            p, conn.missing = answers[conn.cookie], False
            if p is None:
                end = self.sockets.end_of(conn.cookie)  # it may have had no slot yet
                at = self.sent_by(conn) if end is None else float(end.acked - end.clean)
                out[conn] = Position(at, at, over=True, ended=INF if end is None else end.at)
                continue
            out[conn] = Position(
                float(p.bytes_acked),
                self._note(conn, p),
                quiet_s=p.last_ack_ms / 1000,
                sent_ago_s=p.last_sent_ms / 1000,
            )
        return out

    def tcp(self, conns: Sequence[Connection]) -> dict[Connection, Progress]:
        """TCP's own account of connections; absent where it can't be had, or where they are over."""
        askable, answers = self._progress(conns)
        out = {c: p for c in askable if (p := answers.get(c.cookie)) is not None} if answers else {}
        for conn, progress in out.items():
            self._note(conn, progress)
        return out

    def _progress(self, conns: Sequence[Connection]) -> tuple[list[Connection], Mapping[int, Progress | None] | None]:
        """Those that TCP can be asked about, and what it says by cookie; None: it can't be asked now."""
        askable = [c for c in conns if c.here and c.endpoints is not None and c.endpoints.protocol == IPPROTO_TCP]
        return askable, self.sockets.progress([(c.cookie, c.endpoints) for c in askable if c.endpoints is not None])

    def _note(self, conn: Connection, p: Progress) -> float:
        """Take down how far a connection is; returns how far its process has written."""
        written = float(p.bytes_acked + p.unsent_plus_unacked)
        self._sent[conn.slot], self._acked[conn.slot] = written - p.notsent, p.bytes_acked
        return written

    def sent_ago(self, conn: Connection) -> float:
        """Seconds since a connection has sent data, as far as anybody can tell; inf: nobody can. 0 of one just over."""
        position = self._ask_one(conn)
        if position is None:
            return INF
        return 0.0 if position.over else position.sent_ago_s

    def _ask_one(self, conn: Connection) -> Position | None:
        """Where one stands; None: nobody knows."""
        try:
            return self.ask([conn]).get(conn)
        except UnknownError:
            return None
