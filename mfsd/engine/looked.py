# SPDX-License-Identifier: Apache-2.0
"""The transfers of streams that have been asked how far they are: which have arrived, and where the others stand.

As columns, and all streams together, because there may be thousands of transfers, and nothing is struck out meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import compress, pairwise
from typing import TYPE_CHECKING, Final, Self

import numpy as np
import numpy.typing as npt

from mfsd.engine.records import Queue
from mfsd.engine.shortfall import REST, SLACK, shared_out
from mfsd.engine.slots import NS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from mfsd.engine.books import Books
    from mfsd.engine.connections import Connections
    from mfsd.engine.positions import Position
    from mfsd.engine.records import Connection, Stream, Transfer
    from mfsd.policy.views import B1, F8

STALLED_S: Final = 1.0
"""A stream that has sent nothing for so long, shortly before the end of a transfer, is asked whether that was all: then
its size was announced too large. Workers that pause within a transfer, to compute a layer, are quicker."""

Rows = npt.NDArray[np.int64]


@dataclass(slots=True)
class Looked:
    """Streams, shape (k,), none of them empty, and their transfers, shape (n,), in the order of their queues."""

    streams: list[Stream]
    acked: F8
    written: F8
    """How far the processes have written."""
    unanswered: B1
    """Something was sent, and nothing at all acknowledged; the SYN, as a rule."""
    quiet: B1
    """All that was written has been acknowledged."""
    stalled: B1
    """And nothing has left for STALLED_S."""
    moved_ago: F8
    """Seconds since the last acknowledgement came."""
    transfers: list[Transfer]
    rows: Rows
    first: Rows
    """Index of each stream's first transfer."""
    of: Rows
    """Index of each transfer's stream."""
    ordered: B1
    """By transfer, as are those below."""
    handed: B1
    """The worker said that all its bytes have been written."""
    unsaid: B1
    """It is interleaved, and its worker ended without a word: what of it went is known when all has arrived."""
    start: F8
    end: F8
    size: F8

    @classmethod
    def at(
        cls,
        books: Books,
        connections: Connections,
        streams: list[Stream],
        positions: Mapping[Connection, Position],
        now: float,
    ) -> Self:
        """What is known of streams, given where each of their members stands."""
        t, k = books.transfers, len(streams)
        members = [m for s in streams for m in s.members.values()]
        whose = np.repeat(np.arange(k), [len(s.members) for s in streams])
        stands = [positions[m.conn] for m in members]
        there = np.array([(p.acked, p.written, p.quiet_s) for p in stands], dtype=np.float64).reshape(-1, 3)
        acked, written = books.streams.totals(
            streams, (there[:, 0], there[:, 1]), whose, books.streams.members.rows(members)
        )
        last = np.zeros(k, dtype=np.uint64)
        np.maximum.at(last, whose, connections.table.last_ns[[m.conn.slot for m in members]])
        ago = np.full(k, np.inf)
        np.minimum.at(ago, whose, there[:, 2])
        for i in np.flatnonzero(np.isinf(ago)).tolist():
            ago[i] = now - books.streams.parted(streams[i])  # none of its connections is left
        unanswered = (np.bincount(whose, there[:, 0], minlength=k) == 0) & (
            np.bincount(whose, there[:, 1], minlength=k) > 0
        )
        quiet = (acked + SLACK >= written) & ~unanswered
        of = np.repeat(np.arange(k), [len(s.queue) for s in streams])
        transfers = [x for s in streams for x in s.queue]
        handed = _flags([x.handed_over for x in transfers])
        ordered = np.array([s.ordered for s in streams]).take(of)
        # What is handed over stands first, but for what is known to have been written before.
        passed = handed | _flags([x.passed for x in transfers])
        mixed = np.unique(of[1:][handed[1:] & ~passed[:-1] & (of[1:] == of[:-1]) & ordered[1:]])
        if len(mixed):
            for i in mixed.tolist():
                streams[i].queue = Queue.fromkeys(sorted(streams[i].queue, key=_to_come))  # stable
            transfers = [x for s in streams for x in s.queue]
            handed = _flags([x.handed_over for x in transfers])
        rows = t.rows(transfers)
        return cls(
            streams=streams,
            acked=acked,
            written=written,
            unanswered=unanswered,
            quiet=quiet,
            stalled=quiet & (last < int((now - STALLED_S) * NS)),
            moved_ago=ago,
            transfers=transfers,
            rows=rows,
            first=np.searchsorted(of, np.arange(k)),
            of=of,
            ordered=ordered,
            handed=handed,
            unsaid=~ordered & _flags([x.left for x in transfers]),
            start=t.live("start")[rows],
            end=t.live("end")[rows],
            size=t.live("size")[rows],
        )

    def _part(self, i: int) -> slice:
        """Of a stream's transfers."""
        return slice(int(self.first[i]), int(self.first[i]) + len(self.streams[i].queue))

    def missing(self, i: int) -> float:
        """What has been announced on a stream and not been acknowledged."""
        return float(self.end[self._part(i).stop - 1] - self.acked[i])

    # --- where they are -----------------------------------------------------------------------------------------------

    def correct(self, books: Books) -> None:
        """What is handed over, and stands first, was written before anything else, and no further than ``written``."""
        told = np.logical_or.reduceat(self.handed, self.first) & ~self.unanswered
        if not told.any():
            return
        if not self.ordered.all():
            said = self.handed & ~self.ordered & ~self.unsaid & ~self.unanswered.take(self.of)
            self.end[said] = np.minimum(self.end[said], self.written.take(self.of[said]))
            for i in np.flatnonzero(self.quiet & np.logical_or.reduceat(self.unsaid, self.first)).tolist():
                part = self._part(i)
                self.end[part] = self.start[part] + shared_out(books, self.streams[i], float(self.written[i]))
        wanted = told & self.ordered.take(self.first)
        plain = wanted & np.logical_and.reduceat(self._in_place(), self.first)
        self._clip(plain)
        for i in np.flatnonzero(wanted & ~plain).tolist():
            self._lay(i)
        last = np.append(self.first[1:], len(self.end)) - 1
        for i in np.flatnonzero(wanted).tolist():
            self.streams[i].announced = float(self.end[last[i]])
        t = books.transfers
        t.live("start")[self.rows], t.live("end")[self.rows] = self.start, self.end

    def _in_place(self) -> B1:
        """Which transfers begin where the one before them ends, and are as long as they can be. The rule, by far."""
        begin = np.roll(self.end, 1)
        begin[self.first] = np.minimum.reduceat(self.start, self.first)
        length = self.end - self.start
        fits = np.where(self.handed, (length > 0) & (length <= self.size), length == self.size)
        return np.asarray(fits & (self.start == begin))

    def _clip(self, plain: B1) -> None:
        """What ``_lay`` does, for streams of such transfers."""
        some = plain.take(self.of)
        begin = self.start.take(self.first)
        limit = np.maximum(self.written, begin)
        reach = np.maximum.reduceat(np.where(self.handed, self.end, -np.inf), self.first)
        back = np.maximum(reach - limit, 0.0).take(self.of)  # by as much the others move forward
        limits = limit.take(self.of)
        for column in (self.start, self.end):
            column[some] = np.where(self.handed, np.minimum(column, limits), column - back)[some]

    def _lay(self, i: int) -> None:
        """Lay the transfers of a stream one behind the other."""
        part, written = self._part(i), float(self.written[i])
        start, end, size = (column[part].tolist() for column in (self.start, self.end, self.size))
        position = min(start)
        for k, handed in enumerate(self.handed[part].tolist()):
            start[k] = position
            if handed:
                reach = position + (min(size[k], end[k] - position) if end[k] > position else size[k])
                position = min(reach, max(written, position))
            else:
                position += size[k]
            end[k] = position
        self.start[part], self.end[part] = start, end

    # --- what has arrived ---------------------------------------------------------------------------------------------

    def arrived(self, created: F8, now: float) -> B1:
        """Which transfers have arrived; ``created``: when each was announced."""
        acked = self.acked.take(self.of)
        through = (self.end <= acked + SLACK) & ~self.unsaid & ~self.unanswered.take(self.of)
        nearly = self.stalled.take(self.of) & (self.start < acked) & (self.end - acked <= REST * self.size)
        # Not if the daemon has been started meanwhile, and knows for a moment only.
        nearly &= created < now - STALLED_S
        whole = self.acked - self.start.take(self.first) + SLACK >= np.add.reduceat(self.size, self.first)
        out: B1 = np.where(self.handed, self.quiet.take(self.of) | through, self.ordered & (through | nearly))
        return out | (~self.ordered & whole.take(self.of))  # all that was announced has moved, in whatever order

    def empty(self, which: B1) -> set[Transfer]:
        """Of ``which``, shape (n,), those of which nothing was written, neither before they were announced nor then."""
        nothing = np.flatnonzero(which & (self.end - self.start <= SLACK))
        return {x for i in nothing.tolist() if not (x := self.transfers[i]).maybe_late}

    def chosen(self, which: B1) -> Iterator[list[Transfer]]:
        """Of each stream's transfers those that ``which``, shape (n,), names."""
        flags = which.tolist()
        for begin, end in pairwise([*self.first.tolist(), len(flags)]):
            yield list(compress(self.transfers[begin:end], flags[begin:end]))


def _flags(values: list[bool]) -> B1:
    return np.array(values, dtype=np.bool_)


def _to_come(transfer: Transfer) -> bool:
    return not (transfer.handed_over or transfer.passed)
