# SPDX-License-Identifier: Apache-2.0
"""Hints that come after their bytes.

A transfer that is announced when as many bytes as it has have just gone unannounced is under suspicion. It was late if
nothing is written although there was time to, by when the next one is announced; if the next one came too soon to tell,
then the last one of the stream is missing in the end, which delivery.py sees. So are as many bytes as went while hints
were on their way, a part of a transfer or several, where the worker could not say where it stood (selectors).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from mfsd.engine.locating import SYN
from mfsd.engine.shortfall import SLACK
from mfsd.engine.slots import NS
from mfsd.engine.sockets import ON_THE_WAY_S
from mfsd.ground.model import INF

if TYPE_CHECKING:
    from mfsd.engine.books import Books
    from mfsd.engine.connections import Connections
    from mfsd.engine.delivery import Delivery
    from mfsd.engine.records import Connection, Stream, Transfer

SHARE: Final = 0.9
"""Of a transfer's bytes: so many must have gone unannounced just before its hint for it to be suspected."""
LATELY_S: Final = 5.0
"""How long ago that may have been."""
WAITED_S: Final = 0.05
"""A worker that has announced bytes and not begun to write them for so long had written them before. One that announces
several transfers one right after the other has not."""


@dataclass(slots=True)
class Lateness:
    """Suspects transfers, and puts those that were late where their bytes are."""

    books: Books
    connections: Connections
    delivery: Delivery

    def settle(self, stream: Stream, offset: float, now: float) -> float:
        """Another one is about to be announced on a stream that is at ``offset``: decide on the one before it.

        Returns where the stream is then.
        """
        if not stream.debt or not stream.queue:
            return offset
        before = stream.queue.last
        if not before.maybe_late or not self._was_late(before, offset, now):
            return offset
        rows = self.books.transfers
        size = float(rows.get(before, "size"))
        if offset < size and len(stream.members) == 1:
            self.earlier(stream, size)  # it was opened by this transfer, behind its bytes
            offset += size
        rows.put(before, "start", offset - size)
        rows.put(before, "end", offset)
        before.maybe_late, stream.announced, stream.debt = False, offset, max(stream.debt - size, 0.0)
        self.delivery.confirm(stream)
        return offset

    def earlier(self, stream: Stream, size: float) -> None:
        """The one member of a stream joined so many bytes too late."""
        (member,) = stream.members.values()
        self.books.streams.rejoin(member, member.joined - size)

    def suspect(self, stream: Stream, size: float, start: float, now: float, *, placed: bool) -> bool:
        """Whether a transfer, the first of those that are unfinished, may have been announced after its bytes.

        ``placed``: its worker has said where it begins.
        """
        gap, moved = max(start - stream.announced, 0.0), self._moved(stream)
        late = not stream.queue and gap >= SHARE * size and moved > now - LATELY_S
        before = stream.before if start <= SLACK and not stream.queue else 0.0
        if before:
            wrote_ago = self._wrote_ago(stream)
            late = late or (before >= SHARE * size and wrote_ago < LATELY_S)
            gap, moved = max(gap, before), max(moved, now - wrote_ago)
        if moved <= now - ON_THE_WAY_S and not stream.queue:
            stream.debt = 0.0  # no hint is on its way
        if moved > now - ON_THE_WAY_S and not placed:
            # What went belongs to this one or the next ones. Those before may have been given theirs: so it adds up.
            stream.debt += gap
        stream.before, stream.debt = 0.0, max(stream.debt, size if late else 0.0)
        if stream.debt:
            self.delivery.doubt(stream)
        return late

    def found(self, stream: Stream, conn: Connection, at: float) -> None:
        """A connection with ``at`` bytes written joins, which may be those of transfers announced before."""
        if at < INF and self.connections.positions.sent_ago(conn) < ON_THE_WAY_S:
            stream.debt += at if at > SYN else 0.0
            self.delivery.doubt(stream)

    def over(self, stream: Stream, payload: float, now: float) -> None:
        """A connection with so many bytes was over before its stream was opened: perhaps transfers announced by now."""
        self.books.streams.note_parted(stream, now)
        stream.debt += payload
        self.delivery.doubt(stream)

    def _was_late(self, transfer: Transfer, offset: float, now: float) -> bool:
        """Nothing has moved since it was announced, though it had the time to; its stream is at ``offset``."""
        rows = self.books.transfers
        still = offset <= transfer.stream.announced - float(rows.get(transfer, "size"))
        return still and float(rows.get(transfer, "created")) < now - WAITED_S

    def _moved(self, stream: Stream) -> float:
        """When something has moved last, on the connection that joined last or on one that is gone; 0: never."""
        slot = self.books.streams.slot[stream.index]
        gone = self.books.streams.parted(stream)
        return max(float(self.connections.table.last_ns[slot]) / NS, gone) if slot >= 0 else gone

    def _wrote_ago(self, stream: Stream) -> float:
        """Seconds since something was sent on any of its connections; inf: nobody knows."""
        return min((self.connections.positions.sent_ago(conn) for conn in stream.members), default=INF)
