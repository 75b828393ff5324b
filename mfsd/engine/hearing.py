# SPDX-License-Identifier: Apache-2.0
"""What the kernel tells of connections, taken into the books: those that were made, are over, or were found open."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mfsd.engine.sockets import Closed, Established, Socket
from mfsd.ground.model import HintError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mfsd.engine.books import Books
    from mfsd.engine.carriage import Carriage
    from mfsd.engine.connections import Connections
    from mfsd.engine.endings import Endings
    from mfsd.engine.records import Connection, Watch
    from mfsd.engine.sockets import End
    from mfsd.engine.watches import Watches


@dataclass(slots=True)
class Hearing:
    """Hears the kernel."""

    books: Books
    connections: Connections
    watches: Watches
    endings: Endings
    carriage: Carriage

    def run(self, now: float) -> None:
        """Take in what the kernel tells of connections."""
        for event in self.connections.sockets.events():
            if isinstance(event, Established):
                self._established(event, now)
            elif isinstance(event, Closed):
                conn = self.connections.by_cookie.get(event.cookie)
                if conn is not None and event.active and not event.acked and not event.clean:
                    # Nobody has answered: it was never established, and its process may connect it again.
                    self.connections.unlocate(conn)
                elif conn is not None:
                    self.endings.closed(conn, float(event.acked - event.clean), now, clean=event.clean, at=event.at)
            elif event.sockets is None:
                self.watches.failed(event.selector, now)
            else:
                for watch in self.watches.found(event.selector):
                    self._found(watch, event.sockets, now)
                    if not watch.looked_back:
                        over = [e for e in event.ended if self.watches.means(watch, e.socket)]
                        self.carriage.look_back(watch, over, now)
        for conn, position in self.connections.positions.placed():
            self._place(conn, position)
        self.connections.lend()

    def look_at(self, conns: Iterable[Connection], now: float) -> None:
        """Take in what the kernel has told meanwhile, and look whether these connections are over."""
        self.run(now)
        for conn in conns:
            end = self.connections.end_of(conn)
            if end is not None:
                self.over(conn, end, now)

    def over(self, conn: Connection, end: End, now: float) -> None:
        """A connection was over before anybody had named it."""
        if self.connections.positions.place(conn):
            self._place(conn, 0.0)
        self.endings.closed(conn, float(end.acked - end.clean), now, clean=end.clean, at=end.at)

    def _place(self, conn: Connection, position: float) -> None:
        for stream in conn.streams:
            self.books.streams.rejoin(stream.members[conn], position)

    def _established(self, event: Established, now: float) -> None:
        expires = now + self.carriage.limits.default_ttl_s
        watches = list(self.watches.matching(event.socket))
        if event.slot is None and not watches:
            return  # the kernel did not know whose it is, and it is nobody's who has named it
        session = watches[0].session if watches else None
        try:
            conn = self.connections.of_socket(event.socket, expires, event.slot, session=session)
        except HintError:
            return  # the table is full: it goes as default traffic
        if self.connections.too_many(conn):
            self.endings.drop(conn, now)
            return
        begin = float(event.active)  # nothing but its SYN, which TCP counts as a byte, has gone before
        if self.connections.positions.place(conn):
            self._place(conn, begin)
        for watch in watches:
            self.carriage.joined(watch, conn, begin, now)
        self.connections.note_rest(conn, now, linger=True)

    def _found(self, watch: Watch, sockets: Sequence[Socket], now: float) -> None:
        for socket in sockets:
            if not self.watches.may(watch, socket):
                continue
            try:
                expires = now + self.carriage.limits.default_ttl_s
                conn = self.connections.of_socket(socket, expires, session=watch.session)
            except HintError:
                return
            self.carriage.joined(watch, conn, None, now)
