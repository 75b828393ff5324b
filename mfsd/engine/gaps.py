# SPDX-License-Identifier: Apache-2.0
"""The bytes of a stream that belong to nobody once transfers have ended, and where the others are then."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Final

import numpy as np

from mfsd.engine.records import Arrived
from mfsd.engine.shortfall import SLACK
from mfsd.ground.model import INF, CookieSelector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import numpy.typing as npt

    from mfsd.engine.books import Books
    from mfsd.engine.positions import Positions
    from mfsd.engine.records import Connection, Session, Stream, Transfer
    from mfsd.ground.model import EndHint, Selector

    Rows = npt.NDArray[np.int64]

ASKED: Final = 256
"""Connections asked how far they have been written when their transfers are cancelled."""
KEPT: Final = 16
"""Of a stream's transfers that have arrived so many, the latest, are remembered."""


@dataclass(slots=True)
class Gaps:
    """Closes them."""

    books: Books
    positions: Positions
    closing: dict[tuple[Session, Selector], Stream] = field(default_factory=dict)
    """Whose connection is over; words of their workers may be on the way."""
    _twice: int = 0
    """Transfers counted as completed that had been cancelled: what came in their place is counted when it is found."""

    def told(self, session: Session, hint: EndHint) -> dict[Stream, float]:
        """How far streams had been written when their worker cancelled what was to go on them, on its word."""
        out: dict[Stream, float] = {}
        for cookie, position in hint.written:
            selector = CookieSelector(cookie)
            stream = session.streams.get(selector) or self.closing.get((session, selector))
            stream = stream or self.books.streams.ended(session, selector)
            if stream is not None and stream.ordered and len(stream.members) <= 1:
                at = self.books.streams.offset_at(stream, position)
                if at > -INF:
                    out[stream] = max(at, 0.0)
        return out

    def written(self, streams: Iterable[Stream], told: Mapping[Stream, float]) -> dict[Stream, float]:
        """How far streams have been written: so far bytes will go, whatever has become of their transfers.

        Of connections that can't be asked, or are too many to ask, what has left them counts. ``told``: what workers
        have said.
        """
        streams = list(streams)
        unknown = [s for s in streams if s not in told]
        asked = self.positions.tcp(list(islice((c for s in unknown for c in s.members), ASKED)))

        def written(conn: Connection) -> float:
            p = asked.get(conn)
            return self.positions.sent_by(conn) if p is None else float(p.bytes_acked + p.unsent_plus_unacked)

        return {s: told[s] if s in told else self.books.streams.offset(s, written) for s in streams}

    def unwritten(self, rows: Rows, written: float) -> npt.NDArray[np.float64]:
        """Bytes of these transfers, of one stream, that are beyond what has been written."""
        t = self.books.transfers
        out: npt.NDArray[np.float64] = t.live("end")[rows] - np.maximum(t.live("start")[rows], written)
        return np.maximum(out, 0.0)

    def close(self, stream: Stream, ended: list[Transfer], written: float, *, told: bool) -> None:
        """Bytes in order: those behind the ones that will not come move forward.

        ``told``: the worker has said how far it had written then, so those may have arrived long since.
        """
        t = self.books.transfers
        gone = t.rows(ended)
        unwritten = self.unwritten(gone, written)
        start, end = t.live("start"), t.live("end")
        order = np.argsort(start[gone], kind="stable")
        before = start[gone][order]
        gaps = np.concatenate([[0.0], np.cumsum(unwritten[order])])
        rows = np.flatnonzero(t.live("stream") == stream.index)
        rows = rows[start[rows] > before[0]]
        shift = gaps[np.searchsorted(before, start[rows])]
        start[rows] -= shift
        end[rows] -= shift
        stream.announced -= float(gaps[-1])
        if told:
            stream.recast = True
        else:
            # Or that was of the next one already, had the word come late.
            sent = self.books.streams.offset(stream, self.positions.sent_by)
            stream.debt = max(stream.debt, written - sent)

    # --- what had arrived already -------------------------------------------------------------------------------------

    def note(self, stream: Stream, arrived: list[Transfer]) -> None:
        """These have arrived, as far as their stream has moved."""
        if stream.watch is None and stream.ordered:
            t, some = self.books.transfers, [x for x in arrived[-KEPT:] if not x.handed_over]
            if some:
                new = [Arrived(x.id, x.request, x.batch, t.get(x, "start"), t.get(x, "end")) for x in some]
                stream.arrived = (*stream.arrived, *new)[-KEPT:]

    def reopen(self, stream: Stream, cancelled: Callable[[Arrived], bool], written: float) -> None:
        """What was ``cancelled`` when its stream had been ``written`` so far was taken for arrived before that came.

        The bytes beyond are of those behind it.
        """
        for one in [a for a in stream.arrived if cancelled(a)]:
            gap = one.end - max(one.start, written)
            if gap > SLACK:
                if stream.queue:
                    t = self.books.transfers
                    start, end = t.live("start"), t.live("end")
                    rows = np.flatnonzero((t.live("stream") == stream.index) & (start > one.start))
                    start[rows] -= gap
                    end[rows] -= gap
                stream.announced -= gap
                stream.recast = True
                self._twice += 1
            stream.arrived = tuple(a for a in stream.arrived if a is not one)

    def counted(self, completed: int) -> int:
        """How many of so many that have arrived are to be counted."""
        less = min(completed, self._twice)
        self._twice -= less
        return completed - less

    # --- interleaved --------------------------------------------------------------------------------------------------

    def uncount(self, stream: Stream, ended: list[Transfer], *, delivered: bool) -> None:
        """Interleaved bytes: what the others have moved is what moved meanwhile, less what was these transfers'.

        Of those that were not delivered that is an even share of what has moved since they were announced.
        """
        t = self.books.transfers
        offset = self.books.streams.offset(stream, self.positions.sent_by)
        gone, mine = t.rows(ended), t.live("stream") == stream.index
        mine[gone] = False
        start, size, left = t.live("start")[gone], t.live("size")[gone], np.flatnonzero(mine)
        if not delivered:
            size = np.minimum(size, np.maximum(offset - start, 0.0) / len(stream.queue))
        order = np.argsort(start, kind="stable")
        start, size = start[order], size[order]
        earlier = np.concatenate([[0.0], np.cumsum(size)])
        later = np.concatenate([[0.0], np.cumsum(np.clip(np.minimum(size, offset - start), 0.0, None)[::-1])])[::-1]
        began = t.live("start")[left]
        at = np.searchsorted(start, began, side="right")
        shift = np.minimum(earlier[at] + later[at], np.maximum(offset - began, 0.0))
        t.live("start")[left] += shift
        t.live("end")[left] += shift
