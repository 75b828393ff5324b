# SPDX-License-Identifier: Apache-2.0
"""What is done: transfers whose bytes have arrived, on TCP's word alone.

A transfer is an interval of its stream, and done when the peer has acknowledged its end. Slots say how far that is as
of the last packet; inet_diag is asked where the last bytes may have arrived since. Hints may be wrong, so the intervals
are corrected by what is seen: a worker that says "done" has written no more than TCP holds now; on a stream on which
nothing is on its way, no more will come of a transfer that is nearly through; bytes that went before their hint belong
to it once the next one is announced (ledger.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from mfsd.engine.endings import REST, SLACK
from mfsd.engine.slots import NS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from mfsd.engine.books import Books, Connection, Transfer
    from mfsd.engine.connections import Connections, Position
    from mfsd.engine.endings import Endings
    from mfsd.engine.rescue import Rescuer
    from mfsd.engine.streams import Moved, Stream

ASK_MAX: Final = 64
"""Streams asked per tick how far they have come."""
STALLED_S: Final = 0.25
"""A stream that has sent nothing for so long, shortly before the end of a transfer, is asked whether that was all."""


@dataclass(slots=True)
class Delivery:
    """Finds out what is done."""

    books: Books
    connections: Connections
    rescuer: Rescuer
    endings: Endings
    _confirm: dict[Stream, None] = field(default_factory=dict)
    """Streams to ask although their slots give no reason."""
    _ask_from: int = 0
    _last_run: float = 0.0

    def confirm(self, stream: Stream) -> None:
        """Ask at the next tick how far this stream has got."""
        self._confirm[stream] = None

    def run(self, moved: Moved, now: float) -> None:
        """Retire what has arrived."""
        if self.books.transfers.n or self._confirm:
            self._run(moved, now)
        self._last_run = now

    def _run(self, moved: Moved, now: float) -> None:
        t = self.books.transfers
        stream, start, end = t.live("stream"), t.live("start"), t.live("end")
        arrived = (end <= moved.acked.take(stream) + SLACK) & t.live("ordered")
        done = [t.objects[row] for row in np.flatnonzero(arrived)]
        reach = moved.sent.take(stream)
        rows = np.flatnonzero(~arrived & ((end <= reach) | self._stalled(reach, start, end, stream, now)))
        if len(rows) > ASK_MAX:
            # Take turns: many starved transfers may wait here for a long time.
            rows = np.roll(rows, -(self._ask_from % len(rows)))[:ASK_MAX]
            self._ask_from += ASK_MAX
        asked = dict.fromkeys(t.objects[row].stream for row in rows) | self._confirm
        self._confirm.clear()
        if done:
            self.endings.end(done, now, delivered_at=now)
        if asked:
            self._ask(asked, now)

    def _stalled(
        self,
        reach: npt.NDArray[np.float64],
        start: npt.NDArray[np.float64],
        end: npt.NDArray[np.float64],
        stream: npt.NDArray[np.int32],
        now: float,
    ) -> npt.NDArray[np.bool_]:
        """Transfers that are nearly through, on streams that have sent nothing lately; shape (n,)."""
        near = (reach > start) & (end - reach <= REST * (end - start))
        if not near.any():
            return near
        slot = self.books.streams.slot.take(stream)
        still = self.connections.table.last_ns.take(slot, mode="clip") < int((now - STALLED_S) * NS)
        return near & still & (slot >= 0)

    def _ask(self, asked: Iterable[Stream], now: float) -> None:
        conns = list({c: None for s in asked for c in s.members})
        positions = self.connections.ask(conns)
        for conn, position in positions.items():
            if position is None:
                self.endings.lost(conn, now)
            elif position.over:
                self.endings.closed(conn, position.acked, now, clean=True)
        for stream in asked:
            if stream.queue:
                self._judge(stream, positions, now)

    def _judge(self, stream: Stream, positions: Mapping[Connection, Position | None], now: float) -> None:
        """Retire what the peer has acknowledged of one stream, and correct the intervals of the others."""
        streams, t = self.books.streams, self.books.transfers
        known = {c: positions.get(c) for c in stream.members}
        told = {c: p for c, p in known.items() if p is not None}
        if len(told) < len(known):
            self._drained(stream, now)
            return
        acked, written = streams.total(stream, told, "acked"), streams.total(stream, told, "written")
        if any(x.handed_over for x in stream.queue):
            self.correct(stream, written)
        quiet = acked + SLACK >= written
        last = max((int(self.connections.table.last_ns[c.slot]) for c in stream.members), default=0)
        stalled = quiet and last < int((now - STALLED_S) * NS)
        done = [x for x in stream.queue if self._arrived(x, acked, quiet=quiet, stalled=stalled)]
        if not stream.ordered and acked - float(t.get(stream.queue[0], "start")) + SLACK >= sum(
            float(t.get(x, "size")) for x in stream.queue
        ):
            done = list(stream.queue)  # all that was announced has moved, in whatever order
        if done:
            moved_ago = min((p.quiet_s for p in told.values()), default=0.0)
            self.endings.end(done, now, delivered_at=max(now - moved_ago, self._last_run) if quiet else now)
        if any(x.handed_over for x in stream.queue):
            self.confirm(stream)

    def _arrived(self, transfer: Transfer, acked: float, *, quiet: bool, stalled: bool) -> bool:
        t = self.books.transfers
        start, end, size = (float(t.get(transfer, name)) for name in ("start", "end", "size"))
        if transfer.handed_over:
            return quiet or end <= acked + SLACK
        if not transfer.stream.ordered:
            return False
        return end <= acked + SLACK or (stalled and start < acked and end - acked <= REST * size)

    def _drained(self, stream: Stream, now: float) -> None:
        """Without a socket to ask: what has left is done once the connections' lanes are empty."""
        t = self.books.transfers
        sent = self.books.streams.offset(stream, self.connections.sent_by)
        past = [x for x in stream.queue if x.handed_over or t.get(x, "end") <= sent + SLACK]
        if past and all(self.rescuer.lane_empty(c, now) for c in stream.members):
            self.endings.end(past, now, delivered_at=now)
        elif past:
            self.confirm(stream)

    # --- what hints say about writing ---------------------------------------------------------------------------------

    def hand_over(self, transfers: Iterable[Transfer], now: float) -> None:
        """The process has written the last byte: what TCP still holds remains to be delivered."""
        nowhere: list[Transfer] = []
        for transfer in transfers:
            transfer.handed_over = True
            if transfer.stream.members:
                self._confirm[transfer.stream] = None
            else:
                nowhere.append(transfer)  # nobody has seen its bytes, but for the worker, who says that they went
        self.endings.end(nowhere, now, delivered_at=now)

    def correct(self, stream: Stream, written: float) -> None:
        """What is handed over was written before anything else, and no further than ``written``."""
        t = self.books.transfers
        if not stream.ordered:
            for transfer in stream.queue:
                if transfer.handed_over:
                    t.put(transfer, "end", min(float(t.get(transfer, "end")), written))
            return
        position = float(t.get(stream.queue[0], "start"))
        ordered = sorted(stream.queue, key=lambda x: not x.handed_over)  # stable
        for transfer in ordered:
            size, end = float(t.get(transfer, "size")), float(t.get(transfer, "end"))
            t.put(transfer, "start", position)
            position += min(size, end - position) if transfer.handed_over and end > position else size
            if transfer.handed_over:
                position = min(position, max(written, float(t.get(transfer, "start"))))
            t.put(transfer, "end", position)
        stream.queue.clear()
        stream.queue.extend(ordered)
        stream.announced = position
