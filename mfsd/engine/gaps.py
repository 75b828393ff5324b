# SPDX-License-Identifier: Apache-2.0
"""The bytes of a stream that belong to nobody once transfers have ended, and where the others are then."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy.typing as npt

    from mfsd.engine.books import Books
    from mfsd.engine.positions import Positions
    from mfsd.engine.records import Connection, Stream, Transfer

    Rows = npt.NDArray[np.int64]

ASKED: Final = 256
"""Connections asked how far they have been written when their transfers are cancelled."""


@dataclass(slots=True)
class Gaps:
    """Closes them."""

    books: Books
    positions: Positions

    def written(self, streams: Iterable[Stream]) -> dict[Stream, float]:
        """How far streams have been written: so far bytes will go, whatever has become of their transfers.

        Of connections that can't be asked, or are too many to ask, what has left them counts.
        """
        told = self.positions.tcp(list(islice((c for s in streams for c in s.members), ASKED)))

        def written(conn: Connection) -> float:
            p = told.get(conn)
            return self.positions.sent_by(conn) if p is None else float(p.bytes_acked + p.unsent_plus_unacked)

        return {s: self.books.streams.offset(s, written) for s in streams}

    def unwritten(self, rows: Rows, written: float) -> npt.NDArray[np.float64]:
        """Bytes of these transfers, of one stream, that are beyond what has been written."""
        t = self.books.transfers
        out: npt.NDArray[np.float64] = t.live("end")[rows] - np.maximum(t.live("start")[rows], written)
        return np.maximum(out, 0.0)

    def close(self, stream: Stream, ended: list[Transfer], written: float) -> None:
        """Bytes in order: those behind the ones that will not come move forward."""
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
        # Or that was of the next one already, had the word come late.
        sent = self.books.streams.offset(stream, self.positions.sent_by)
        stream.debt = max(stream.debt, written - sent)

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
