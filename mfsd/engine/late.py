# SPDX-License-Identifier: Apache-2.0
"""Hints that come after their bytes.

A transfer that is announced when as many bytes as it has have just gone unannounced is under suspicion. It was late if
nothing is written although there was time to, by when the next one is announced; if the next one came too soon to tell,
then the last one of the stream is missing in the end, which delivery.py sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from mfsd.engine.endings import SLACK
from mfsd.engine.slots import NS

if TYPE_CHECKING:
    from mfsd.engine.books import Books
    from mfsd.engine.connections import Connections
    from mfsd.engine.delivery import Delivery
    from mfsd.engine.records import Stream, Transfer

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
            (member,) = stream.members.values()  # it was opened by this transfer, behind its bytes
            self.books.streams.rejoin(member, float(self.books.streams.members.get(member, "joined")) - size)
            offset += size
        rows.put(before, "start", offset - size)
        rows.put(before, "end", offset)
        before.maybe_late, stream.announced, stream.debt = False, offset, 0.0
        self.delivery.confirm(stream)
        return offset

    def suspect(self, stream: Stream, size: float, start: float, now: float) -> bool:
        """Whether a transfer, the first one on a stream without any, may have been announced after its bytes."""
        late = start - stream.announced >= SHARE * size and self._moved(stream) > now - LATELY_S
        late = late or (stream.before >= SHARE * size and start <= SLACK and self._wrote_lately(stream))
        stream.before, stream.debt = 0.0, size if late else 0.0
        if late:
            self.delivery.doubt(stream)
        return late

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

    def _wrote_lately(self, stream: Stream) -> bool:
        return any(self.connections.positions.sent_ago(conn) < LATELY_S for conn in stream.members)
