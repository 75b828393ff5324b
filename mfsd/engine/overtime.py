# SPDX-License-Identifier: Apache-2.0
"""Transfers whose bytes are still on their way when their time to live is over: they go on for as long as that is so.

Hints expire so that nothing stays of workers that have forgotten them. Weights of terabytes are no such thing, nor are
those that are announced behind them. Workers are told, so that the next daemon hears of them, too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np

from mfsd.engine.beyond import LEAST
from mfsd.engine.records import EVENTS_KEPT
from mfsd.engine.shortfall import SLACK
from mfsd.engine.slots import NS
from mfsd.ground.model import INF, Event, EventKind
from mfsd.ground.wire import OVERTIME_S

if TYPE_CHECKING:
    import numpy.typing as npt

    from mfsd.engine.books import Books
    from mfsd.engine.connections import Connections
    from mfsd.engine.records import Stream
    from mfsd.engine.watches import Watches
    from mfsd.policy.views import B1, F8

LATELY_S: Final = 1.0
"""Something has left since then; and so much longer a transfer lives."""
KEPT_S: Final = 5.0
"""So long its connections are kept in the kernel."""
AHEAD_S: Final = 0.3
"""And from so long before it is over, since the kernel obeys no longer than that, and who looks comes every 0.1 s."""
TELL_AHEAD_S: Final = 1.0
"""So long before, workers are told: they began to count before the daemon did."""
AGAIN_S: Final = OVERTIME_S / 4
"""And so often."""
TELL_MAX: Final = EVENTS_KEPT // 4
"""So many at a time; of a worker that does not read twice as many wait at most: other events need their place."""


@dataclass(slots=True)
class Overtime:
    """See the module."""

    books: Books
    connections: Connections
    watches: Watches
    _extended: dict[Stream, tuple[float, float]] = field(default_factory=dict)
    """Until when, and how far each had come when that was decided."""

    def run(self, now: float) -> None:
        """Have those live on that are about to expire, their requests too, while their streams move."""
        t, r = self.books.transfers, self.books.requests
        request, expires = t.live("request"), t.live("expires")
        first = expires  # to be over: itself, or its request
        if r.n:
            first = np.minimum(first, np.where(request >= 0, r.live("expires").take(request, mode="clip"), INF))
        looked = first < now + TELL_AHEAD_S
        if not looked.any():
            return
        sent = self.connections.positions.moved(self.books.streams).sent
        stream, end = t.live("stream"), self._ends(len(sent))
        moves = looked & self._moving(sent, end, now).take(stream) & (end > sent.take(stream) + SLACK)
        self._tell(np.flatnonzero(moves & (t.live("told") < now - AGAIN_S)), now)
        rows, kept = np.flatnonzero(moves & (first < now)), np.unique(stream[moves & (first < now + AHEAD_S)]).tolist()
        until = now + LATELY_S
        expires[rows] = np.maximum(expires[rows], until)
        owners = request[rows]
        owners = owners[owners >= 0]
        r.live("expires")[owners] = np.maximum(r.live("expires")[owners], until)
        extended = set(stream[rows].tolist())
        for index in kept:
            one = self.books.streams.at(index)
            assert one is not None  # noqa: S101 - it has transfers
            if index in extended:
                self._extended.setdefault(one, (until, float(sent[index])))
            self.connections.renew(one.members, now + KEPT_S)
            if one.watch is not None:
                self.watches.get(one.session, one.selector, one.watch.band, now + KEPT_S, now)

    def _tell(self, rows: npt.NDArray[np.intp], now: float) -> None:
        """Those who have announced these."""
        told, objects = self.books.transfers.live("told"), self.books.transfers.objects
        for row in rows[:TELL_MAX].tolist():
            one, told[row] = objects[row], now
            if len(one.session.events) < 2 * TELL_MAX:
                owner = "" if one.request is None else one.request.id
                one.session.tell(Event(EventKind.OVERTIME, owner, one.id, "its bytes still move"))

    def _ends(self, streams: int) -> F8:
        """Offset by which each transfer is through, shape (n,): where several are written in turns, all of them."""
        t = self.books.transfers
        ordered: B1 = t.live("ordered")
        end: F8 = t.live("end")
        if ordered.all():
            return end
        every = np.bincount(t.live("stream"), weights=t.live("size"), minlength=streams)
        return np.where(ordered, end, t.live("start") + every.take(t.live("stream")))

    def _moving(self, sent: F8, end: F8, now: float) -> B1:
        """Streams, by index, in a transfer, that have moved lately, and enough since the last time."""
        t, members = self.books.transfers, self.books.streams.members
        stream = t.live("stream")
        begun = (t.live("start") <= sent.take(stream) + SLACK) & (sent.take(stream) < end)
        out: npt.NDArray[np.bool_] = np.zeros(len(sent), dtype=np.bool_)
        out[stream[begun]] = True
        last = np.zeros(len(sent), dtype=np.uint64)
        np.maximum.at(last, members.live("stream"), self.connections.table.last_ns.take(members.live("slot")))
        out &= last >= int((now - LATELY_S) * NS)
        for one, (until, at) in list(self._extended.items()):
            if until < now:
                del self._extended[one]
                if one.queue and sent[one.index] < at + LEAST:
                    out[one.index] = False  # a word now and then is no transfer
        return out
