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
from itertools import islice
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from mfsd.engine.columns import GONE
from mfsd.engine.endings import ROOM
from mfsd.engine.looked import STALLED_S, Looked
from mfsd.engine.positions import UNCONNECTED, UnknownError
from mfsd.engine.records import by_stream
from mfsd.engine.shortfall import REST, SLACK, cut
from mfsd.engine.slots import NS, QUIET, WAITS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from mfsd.engine.books import Books
    from mfsd.engine.connections import Connections
    from mfsd.engine.endings import Endings
    from mfsd.engine.positions import Position
    from mfsd.engine.records import Connection, Stream, Transfer
    from mfsd.engine.rescue import Rescuer
    from mfsd.engine.streams import Moved

JUDGE_S: Final = 20e-6
"""Looking through one transfer of a stream takes a twentieth of that."""
HELD_UP_S: Final = 0.02
"""After so long without a run what has arrived is dated by the packets that told of it; before, what was due then."""
LOOK_MAX: Final = 16_384
"""Transfers looked through per tick, or those of one stream if it has more."""
ASK_MAX: Final = 64
"""Streams asked per tick how far they have come."""
REST_S: Final = 0.25
"""How often streams are looked through for those that stand still with something unacknowledged, as far as slots say:
slots are as of the last packet, so what is left of transfers there counts bytes that may have arrived since."""
DEBT_S: Final = 1.0
"""So is one on which a transfer may have been announced after its bytes had gone; what is missing then was its."""
UNHEARD_S: Final = 10.0
"""What has left so long ago is taken for acknowledged where TCP can't be asked: of what it has sent again without
timestamps an acknowledgement says nothing."""
DOUBTS: Final = 128
"""Streams with a debt that are looked at in one tick."""


@dataclass(slots=True)
class Delivery:
    """Finds out what is done."""

    books: Books
    connections: Connections
    rescuer: Rescuer
    endings: Endings
    _confirm: dict[Stream, float] = field(default_factory=dict)
    """Streams to ask although their slots give no reason, and when."""
    _doubtful: dict[Stream, None] = field(default_factory=dict)
    """Streams with a debt."""
    _ask_from: int = 0
    _last_run: float = 0.0
    _next_rest: float = 0.0
    _sent: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    """How far streams had come when they were last looked through, by index."""

    def confirm(self, stream: Stream, at: float = 0.0) -> None:
        """Ask at the first tick after ``at`` how far this stream has got."""
        self._confirm[stream] = at

    def doubt(self, stream: Stream) -> None:
        """A transfer on it may have been announced after its bytes had gone: see whether the last ones never come."""
        self._doubtful[stream] = None

    def run(self, moved: Moved, now: float) -> Moved:
        """Retire what has arrived; returns how far streams have come, as known by then."""
        unasked = len(self.books.streams.unasked)
        if self.books.transfers.n or self._confirm:
            self._run(moved, now)
        self._last_run = now
        learnt = len(self.books.streams.unasked) < unasked
        return self.connections.positions.moved(self.books.streams) if learnt else moved

    def _run(self, moved: Moved, now: float) -> None:
        t = self.books.transfers
        # Only those of which something has left: of very many on one connection most stand behind that.
        front = np.maximum(moved.sent, moved.acked) + SLACK
        under_way = np.flatnonzero(front.take(t.live("stream")) >= t.live("start"))
        stream, start, end = (t.live(name).take(under_way) for name in ("stream", "start", "end"))
        arrived = (end <= moved.acked.take(stream) + SLACK) & t.live("ordered").take(under_way)
        done = [t.objects[row] for row in under_way[arrived][:ROOM].tolist()]
        recast = {x.stream for x in done if x.stream.recast}
        if recast:
            self._confirm |= dict.fromkeys(recast, 0.0)  # TCP may say since when
            done = [x for x in done if x.stream not in recast]
        reach = moved.sent.take(stream)
        self._begin(under_way[reach > start])
        rows = under_way[~arrived & ((end <= reach) | self._stalled(reach, start, end, stream, now))]
        if len(rows) > ASK_MAX:
            # Take turns: many starved transfers may wait here for a long time.
            rows = np.roll(rows, -(self._ask_from % len(rows)))[:ASK_MAX]
            self._ask_from += ASK_MAX
        asked = dict.fromkeys(t.objects[row].stream for row in rows)
        if now >= self._next_rest:
            self._next_rest = now + REST_S
            unfinished = np.ones(t.n, dtype=np.bool_)
            unfinished[under_way[arrived]] = False
            self._confirm |= dict.fromkeys(self._resting(moved, t.live("stream")[unfinished]), 0.0)
        due = [stream for stream, at in self._confirm.items() if at <= now][:ASK_MAX]
        for stream in due:
            del self._confirm[stream]
        asked |= dict.fromkeys(due) | self._overdue(now)
        if done:
            self.endings.deliver(self._dated(done, now), now)
        if asked:
            self._ask(asked, now)

    def _dated(self, done: list[Transfer], now: float) -> list[tuple[list[Transfer], float]]:
        """What has arrived, by stream, and when: by the last packet, if what it knew of acknowledgements was enough."""
        matters = done if now - self._last_run >= HELD_UP_S else self._just_due(done, now)
        acked, t = self.connections.table.acked, self.books.transfers
        out: list[tuple[list[Transfer], float]] = []
        for stream, some in by_stream(matters).items():
            told = self.books.streams.offset(stream, lambda conn: float(acked[conn.slot])) + SLACK
            last = max((self.connections.positions.moved_at(c) for c in stream.members), default=now)
            out.append(([x for x in some if t.get(x, "end") <= told], min(max(last, self._last_run), now)))
            out.append(([x for x in some if t.get(x, "end") > told], now))
        out.append((done, now))  # of which nothing has been said yet
        return out

    def _just_due(self, done: list[Transfer], now: float) -> list[Transfer]:
        """Those whose deadline, or their request's, was since the last run."""
        t, r = self.books.transfers, self.books.requests
        rows = t.rows(done)
        due, request = t.live("deadline")[rows], t.live("request")[rows]
        theirs = np.append(r.live("deadline"), np.inf).take(np.where(request < 0, r.n, request))
        just = [(self._last_run <= d) & (d < now) for d in (due, theirs)]
        return [x for x, matters in zip(done, (just[0] | just[1]).tolist(), strict=True) if matters]

    def _begin(self, moving: npt.NDArray[np.intp]) -> None:
        """Note of which transfers (rows) the first byte has left. It left since the last run."""
        t = self.books.transfers
        begun = t.live("begun")
        new = moving[begun.take(moving) == 0]
        begun[new] = np.maximum(t.live("created")[new], self._last_run)

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

    def _resting(self, moved: Moved, unfinished: npt.NDArray[np.int32]) -> Iterable[Stream]:
        """Streams of unfinished transfers on which nothing has left since the last look, and not all is acknowledged.

        A few at a time: there may be many that starve.
        """
        before, self._sent = self._sent, moved.sent
        index = np.unique(unfinished[unfinished < len(before) - 1])
        still = (moved.sent.take(index) == before.take(index)) & (moved.sent.take(index) > moved.acked.take(index))
        index = np.roll(index[still], -self._ask_from)[:ASK_MAX]
        self._ask_from += len(index)
        return [stream for i in index.tolist() if (stream := self.books.streams.at(i)) is not None]

    def _overdue(self, now: float) -> dict[Stream, None]:
        """Streams with a debt on which nothing has moved, and nothing was announced, for DEBT_S."""
        if not self._doubtful:
            return {}
        some = list(islice(self._doubtful, DOUBTS))
        for stream in some:
            del self._doubtful[stream]
        some = [s for s in some if s.debt and s.queue]
        self._doubtful |= dict.fromkeys(some)  # behind the others, who have their turn in the next tick
        slot = self.books.streams.slot.take([s.index for s in some])
        moves = (self.connections.table.last_ns.take(slot, mode="clip") >= int((now - DEBT_S) * NS)) & (slot >= 0)
        return {s: None for s, moving in zip(some, moves.tolist(), strict=True) if not moving and self._rested(s, now)}

    def _rested(self, stream: Stream, now: float) -> bool:
        moved = max((self.connections.positions.moved_at(c) for c in stream.members), default=0.0)
        return max(moved, float(self.books.transfers.get(stream.queue.last, "created"))) < now - DEBT_S

    def _ask(self, wanted: Iterable[Stream], now: float) -> None:
        asked = self._some(wanted)
        self.books.streams.unasked.difference_update(asked)
        conns = list({c: None for s in asked for c in s.members})
        try:
            positions = self.connections.positions.ask(conns)
        except UnknownError:
            self._confirm |= dict.fromkeys(asked, 0.0)  # what is not known is asked again
            return
        again: dict[Stream, float] = {}
        for conn, position in positions.items():
            if (position is None or position.over) and not self.endings.found_over(conn, position, now):
                again |= dict.fromkeys(conn.streams, 0.0)
        self._confirm |= again
        asked = [s for s in asked if s not in again]
        self.endings.deliver(self._judge(asked, positions, now), now)
        for stream in asked:
            if any(x.handed_over for x in stream.queue):
                # The more there is to look through, the less often, should the peer not read.
                self.confirm(stream, now + JUDGE_S * len(stream.queue))

    def _some(self, wanted: Iterable[Stream]) -> list[Stream]:
        """As many streams as can be looked through in one tick; the others have their turn in the next one."""
        out: list[Stream] = []
        room = LOOK_MAX
        for stream in wanted:
            if room > 0:
                out.append(stream)
                room -= len(stream.queue)
            else:
                self.confirm(stream)
        return out

    def _judge(
        self, asked: Iterable[Stream], positions: Mapping[Connection, Position | None], now: float
    ) -> list[tuple[list[Transfer], float]]:
        """What the peers have acknowledged, and when, by stream; corrects the intervals of the others."""
        out: list[tuple[list[Transfer], float]] = []
        told = {conn: position for conn, position in positions.items() if position is not None}
        known: list[Stream] = []
        for stream in asked:
            silent = stream.members.keys() - told.keys() if stream.queue else set()
            if 0 < len(silent) < len(stream.members) and silent <= {*self.connections.positions.unconnected(stream)}:
                told |= dict.fromkeys(silent, UNCONNECTED)  # the others know
            if stream.queue and stream.members.keys() <= told.keys():
                known.append(stream)
                continue
            stream.recast = False
            if stream.queue:
                out.append((self._drained(stream, now), now))
        if known:
            out += self._judged(Looked.at(self.books, self.connections, known, told, now), now)
        return out

    def _judged(self, looked: Looked, now: float) -> list[tuple[list[Transfer], float]]:
        """The same of streams that are all known."""
        looked.correct(self.books)
        arrived = looked.arrived(self.books.transfers.live("created")[looked.rows], now)
        out: list[tuple[list[Transfer], float]] = []
        quiet, moved_at = looked.quiet.tolist(), (now - looked.moved_ago).tolist()
        empty = looked.empty(arrived)
        for i, (stream, some) in enumerate(zip(looked.streams, looked.chosen(arrived), strict=True)):
            done = some
            if stream.debt and quiet[i] and looked.missing(i) <= stream.debt + SLACK and self._rested(stream, now):
                # What is missing is no more than had gone before the first of them was announced.
                done, stream.debt = list(stream.queue), 0.0
                for transfer in done:
                    transfer.left = False
            elif empty and not stream.recast:
                # Nothing has arrived: their worker's word is all there is.
                out.append(([x for x in some if x in empty], max(moved_at[i], self._last_run)))
            since = 0.0 if stream.members else self._last_run
            stream.recast = False
            out.append((done, max(moved_at[i], since) if quiet[i] else now))
        return out

    def _drained(self, stream: Stream, now: float) -> list[Transfer]:
        """Without a socket to ask: what has left is done once the connections' lanes are empty."""
        t = self.books.transfers
        sent = self.books.streams.offset(stream, self.connections.positions.sent_by)
        past = [x for x in stream.queue if x.handed_over or t.get(x, "end") <= sent + SLACK]
        nowhere = past and self._nowhere(stream)
        if nowhere is None:
            self.confirm(stream)
            return []
        if nowhere:
            past = [x for x in past if x.left]  # no word of a worker's makes up for a connection
        if past and all(self.rescuer.lane_empty(c, now) for c in stream.members):
            arrived = self._heard(stream, past, sent, now)
            if arrived:
                cut(self.books, arrived, sent)
                return arrived
        if past:
            self.confirm(stream)
        return []

    def _heard(self, stream: Stream, past: list[Transfer], sent: float, now: float) -> list[Transfer]:
        """Of what has left, what has been acknowledged, where the kernel notes when all is."""
        heard = [c for c in stream.members if self.connections.positions.hears(c)]
        ago = now - max((self.connections.positions.moved_at(c) for c in heard), default=0.0)
        if not heard or ago > UNHEARD_S:
            return past
        flags, t = self.connections.table.flags[[c.slot for c in heard]], self.books.transfers
        if not (flags & QUIET).all():
            return []
        if ago > STALLED_S and not (flags & WAITS).any():
            return past
        # Where much is missing, the peer may have no room for it now.
        return [x for x in past if t.get(x, "end") - sent <= REST * t.get(x, "size")]

    def _nowhere(self, stream: Stream) -> bool | None:
        """Its bytes can't have gone, since no socket that carries it is connected; where the kernel would have told.

        None: that is being found out.
        """
        connections = self.connections
        if not connections.sockets.tells or not stream.members:
            return False
        unconnected = connections.positions.unconnected(stream)
        if len(unconnected) < len(stream.members):
            return False
        for conn in unconnected:
            if not conn.missing and (known := connections.sockets.datagram(conn.cookie)) is not None:
                conn.missing, conn.datagrams = True, known
        if not all(conn.missing for conn in unconnected):
            return None
        return not any(conn.datagrams for conn in unconnected)

    # --- what hints say about writing ---------------------------------------------------------------------------------

    def hand_over(self, transfers: Iterable[Transfer], now: float, *, left: bool = False) -> None:
        """The process has written the last byte: what TCP still holds remains to be delivered.

        ``left``: it has ended, and not said so.
        """
        nowhere: list[Transfer] = []
        for transfer in transfers:
            transfer.left = left and not transfer.handed_over
            transfer.handed_over = True
            if transfer.stream.members:
                self._confirm[transfer.stream] = 0.0
            else:
                nowhere.append(transfer)  # nobody has seen its bytes, but for the worker, who says that they went
        if not nowhere:
            return
        refused = [x for x in nowhere if x.stream.refused and not x.left and not self._moved(x)]
        self.endings.give_up(refused, now, "its connection could not be made")
        nowhere = [x for x in nowhere if x.row != GONE]
        for stream, some in by_stream(x for x in nowhere if x.left).items():
            cut(self.books, some, self.books.streams.offset(stream, self.connections.positions.sent_by))
        self.endings.deliver([((x,), x.stream.closed_at or now) for x in nowhere], now)

    def _moved(self, transfer: Transfer) -> bool:
        """Some of what its stream has moved may be its."""
        stream = transfer.stream
        start = float(self.books.transfers.get(transfer, "start"))
        offset = self.books.streams.offset(stream, self.connections.positions.sent_by)
        return transfer.maybe_late or stream.debt > 0.0 or offset > start + SLACK
