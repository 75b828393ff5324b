# SPDX-License-Identifier: Apache-2.0
"""Byte streams: what the transfers of one session are intervals of.

A stream is what a selector names: one connection, or all connections that match, taken together - the hint can't say
how bytes are spread over Mooncake's lanes or UCX's workers, so what counts is their sum, an idle one holds no share,
and one that is closed leaves what it has moved. Every session has streams of its own: what one announces on a
connection changes nothing for another, although the same bytes move both.

A stream's offset begins at 0 when it is opened. What a member adds is how far it has come since it joined, on TCP's own
scale, so nothing is counted twice and nothing depends on the size of headers.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from mfsd.engine.columns import Dense
from mfsd.engine.records import MEMBER_COLUMNS, Ended, Member, Stream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from mfsd.engine.records import Connection, Session, Watch
    from mfsd.ground.model import Selector
    from mfsd.policy.views import F8

Ints = npt.NDArray[np.int64]

ENDED_KEPT: Final = 4096
"""Streams whose connection is over so many, the latest, are remembered."""


@dataclass(frozen=True, slots=True)
class Moved:
    """How far every stream has come at one moment, by its index, bytes; the last element is 0, for "no stream"."""

    sent: F8
    acked: F8
    """What the peers are known to have acknowledged."""


@dataclass(slots=True)
class Theirs:
    """Bytes of a member that are those of what its session has announced on that connection alone."""

    other: Stream | None
    """Which has announced them; None: it is closed."""
    begin: float
    """On TCP's scale."""
    end: float


class Streams:
    """All open streams, their columns, and how far each of them has come."""

    def __init__(self) -> None:
        self.members: Dense[Member] = Dense(MEMBER_COLUMNS)
        self._open: list[Stream | None] = []
        self._free: list[int] = []
        self._gone: F8 = np.zeros(64)
        """Bytes that members moved which are gone, by stream."""
        self._parted: F8 = np.zeros(64)
        """When such a one moved something last, by stream."""
        self.slot: npt.NDArray[np.int32] = np.full(64, -1, dtype=np.int32)
        """Slot of the member that joined last, by stream; -1: it has none."""
        self.owner: npt.NDArray[np.intp] = np.zeros(64, dtype=np.intp)
        """Number of the user whose session has opened it, by stream."""
        self._owners: dict[int, int] = {}
        self._theirs: dict[Member, list[Theirs]] = {}
        self.unasked: set[Stream] = set()
        """Opened where their worker says that they stood then: nobody has asked yet how far they have come since."""
        self._ended: OrderedDict[tuple[Session, Selector], Ended] = OrderedDict()

    def __len__(self) -> int:
        """Streams that are open."""
        return len(self._open) - len(self._free)

    @property
    def high(self) -> int:
        """One past the highest index: length of what is given by stream."""
        return len(self._open)

    def open(self, session: Session, selector: Selector, watch: Watch | None) -> Stream:
        """A stream without members."""
        if self._free:
            index = self._free.pop()
        else:
            index = len(self._open)
            self._open.append(None)
            if index >= len(self._gone):
                self._gone = np.concatenate([self._gone, np.zeros(index)])
                self._parted = np.concatenate([self._parted, np.zeros(index)])
                self.slot = np.concatenate([self.slot, np.full(index, -1, dtype=np.int32)])
                self.owner = np.concatenate([self.owner, np.zeros(index, dtype=np.intp)])
        stream = self._open[index] = Stream(session, selector, watch, index)
        self._gone[index], self._parted[index], self.slot[index] = 0.0, 0.0, -1
        self.owner[index] = self._owners.setdefault(session.user.uid, len(self._owners))
        return stream

    def close(self, stream: Stream) -> None:
        """Give up a stream whose transfers have been ended. No error the second time."""
        if self._open[stream.index] is not stream:
            return
        self._settle(stream)
        for conn in list(stream.members):
            self._leave(stream, conn)
        self.unasked.discard(stream)
        self._remember(stream)
        self._open[stream.index] = None
        self._free.append(stream.index)

    def _remember(self, stream: Stream) -> None:
        offset = self._gone.item(stream.index)
        if not stream.over or not offset or stream.session.over:
            return
        self._ended[stream.session, stream.selector] = Ended(stream, offset, self.parted(stream))
        while len(self._ended) > ENDED_KEPT or next(iter(self._ended))[0].over:
            self._ended.popitem(last=False)

    def ended(self, session: Session, selector: Selector) -> Stream | None:
        """One whose connection is over; it has neither transfers nor an index any more."""
        ended = self._ended.get((session, selector))
        return None if ended is None else ended.stream

    def resume(self, stream: Stream, conn: Connection, *, over: bool) -> bool:
        """A connection that is ``over`` is named again: what it has moved has been counted. False: that is not known.

        Else its socket is connected once more, and what is known is of another connection.
        """
        ended = self._ended.pop((stream.session, stream.selector), None)
        if ended is None or not over:
            return False
        before, offset, parted = ended
        self._gone[stream.index], self._parted[stream.index] = offset, parted
        stream.announced, stream.arrived = before.announced, before.arrived
        self.join(stream, conn, offset - before.shift)
        return True

    def join(self, stream: Stream, conn: Connection, position: float) -> None:
        """A connection becomes part of a stream; what it moves beyond ``position`` counts. No error if it is one.

        ``position`` inf: nobody knows where it stands; nothing counts until ``rejoin`` says.
        """
        if conn in stream.members:
            return
        member = stream.members[conn] = Member(stream, conn, position)
        stream.refused = False
        self.members.add(member, slot=conn.slot, stream=stream.index, joined=position)
        conn.streams.add(stream)
        self.slot[stream.index] = conn.slot

    def part(self, stream: Stream, conn: Connection, position: float, moved_at: float) -> None:
        """A member is gone; it has come as far as ``position``, and has sent something last at ``moved_at``."""
        self.note_parted(stream, moved_at)
        self._settle(stream)
        self._gone[stream.index] += self._counts(stream.members[conn], position)
        stream.shift = float(self._gone[stream.index]) - position
        self._leave(stream, conn)

    def note_parted(self, stream: Stream, moved_at: float) -> None:
        """What is gone has sent something at ``moved_at``."""
        self._parted[stream.index] = max(self._parted[stream.index], moved_at)

    def _leave(self, stream: Stream, conn: Connection) -> None:
        member = stream.members.pop(conn)
        self.members.remove(member)
        self._theirs.pop(member, None)
        conn.streams.discard(stream)
        self.slot[stream.index] = next(reversed(stream.members)).slot if stream.members else -1

    def skip(self, member: Member, position: float, until: float) -> None:
        """What a member moves from ``position``, where it is, to ``until`` does not count."""
        if until > max(position, member.joined):
            self._gone[member.stream.index] += self._counts(member, position)
            self.rejoin(member, until)

    def leave_out(self, member: Member, other: Stream, begin: float, gap: float) -> None:
        """From ``begin`` on a member moves what is announced on another stream, of this connection alone.

        ``gap``: bytes between that and what the other one had announced before.
        """
        known = self._theirs.setdefault(member, [])
        for theirs in known:
            if theirs.other is other:
                theirs.begin += gap
                return
        known.append(theirs := Theirs(other, begin, begin))
        self._ends(theirs)

    def _settle(self, other: Stream) -> None:
        """Nothing more is announced on a stream, or not on the connection that it was."""
        for theirs in [t for known in self._theirs.values() for t in known if t.other is other]:
            self._ends(theirs)
            theirs.other = None

    def _ends(self, theirs: Theirs) -> None:
        """Bring its end up to date."""
        if theirs.other is not None and len(theirs.other.members) == 1:
            theirs.end = self.position_at(theirs.other, theirs.other.announced)

    def _left_out(self, member: Member, position: float) -> float:
        """What it has moved up to a position and doesn't count."""
        out = 0.0
        for theirs in self._theirs.get(member, ()):
            self._ends(theirs)
            out += max(min(position, theirs.end) - max(theirs.begin, member.joined), 0.0)
        return out

    def _counts(self, member: Member, position: float) -> float:
        """What it has moved, and counts."""
        moved = max(position - member.joined, 0.0)
        return moved - self._left_out(member, position) if self._theirs else moved

    def position_at(self, stream: Stream, offset: float) -> float:
        """Where the one member of a stream stands when the stream is at ``offset``."""
        (member,) = stream.members.values()
        position = offset - float(self._gone[stream.index]) + member.joined
        for theirs in self._theirs.get(member, ()):
            self._ends(theirs)
            if position > theirs.begin:
                position += max(theirs.end - max(theirs.begin, member.joined), 0.0)
        return position

    def rejoin(self, member: Member, position: float) -> None:
        """Correct where a member joined."""
        member.joined = position
        self.members.put(member, "joined", position)

    def parted(self, stream: Stream) -> float:
        """When a member that is gone has sent something last; 0: never."""
        return float(self._parted[stream.index])

    # --- offsets ------------------------------------------------------------------------------------------------------

    def offsets(self, positions: F8) -> F8:
        """How far each stream has come, given positions by slot; shape (high + 1,), the last one 0 for "no stream"."""
        out = np.zeros(self.high + 1)
        n = self.high
        if self.members.n:
            slots, streams = self.members.live("slot"), self.members.live("stream")
            moved = positions.take(slots) - self.members.live("joined")
            out[:n] = np.bincount(streams, weights=np.maximum(moved, 0.0), minlength=n)
            for member in self._theirs:
                out[member.stream.index] -= self._left_out(member, float(positions[member.conn.slot]))
        out[:n] += self._gone[:n]
        return out

    def offset(self, stream: Stream, position: Callable[[Connection], float]) -> float:
        """How far one stream has come, given the position of a connection."""
        out: float = self._gone.item(stream.index)
        for conn, member in stream.members.items():
            at = position(conn)
            moved = at - member.joined
            if moved > 0.0:
                out += moved
                if self._theirs:
                    out -= self._left_out(member, at)
        return out

    def offset_at(self, stream: Stream, position: float) -> float:
        """Offset of a stream of one member where that one stands, or stood if it is gone, at ``position``."""
        if not stream.members:
            return position + stream.shift
        (member,) = stream.members.values()
        at = float(self._gone[stream.index]) + position - member.joined
        return at - self._left_out(member, position) if self._theirs else at

    def totals(self, streams: Sequence[Stream], positions: Sequence[F8], of: Ints, rows: Ints) -> list[F8]:
        """How far streams have come, shape (len(streams),), for each of several kinds of ``positions`` of members.

        Members are given by the index of their stream (``of``) and their ``rows``, as positions are.
        """
        joined = self.members.live("joined")[rows]
        moved = [np.maximum(p - joined, 0.0) for p in positions]
        if self._theirs:
            for i in np.flatnonzero(np.isin(rows, self.members.rows(self._theirs))).tolist():
                member = self.members.objects[rows[i]]
                for some, p in zip(moved, positions, strict=True):
                    some[i] -= self._left_out(member, float(p[i]))
        gone = self._gone.take([s.index for s in streams])
        return [gone + np.bincount(of, some, minlength=len(streams)) for some in moved]

    def carried(self, streams: Ints, high: int) -> npt.NDArray[np.bool_]:
        """Slots of which a connection is a member of one of these streams (by index), shape (high,)."""
        wanted, out = np.zeros(self.high, dtype=np.bool_), np.zeros(high, dtype=np.bool_)
        wanted[streams] = True
        if self.members.n:
            out[self.members.live("slot")[wanted.take(self.members.live("stream"))]] = True
        return out

    def at(self, index: int) -> Stream | None:
        """The one with an index, if it is open."""
        return self._open[index]

    def all(self) -> Iterable[Stream]:
        """The open ones."""
        return (s for s in self._open if s is not None)
