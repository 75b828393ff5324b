# SPDX-License-Identifier: Apache-2.0
"""What the kernel tells of connections, taken into the books: those that were made, are over, or were found open."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from mfsd.engine.sockets import Closed, Established, Event, Found, Socket
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

STEPS: Final = 64
"""So much is taken in at a time: sockets that were made or found. Less than 10 ms."""
CLOSED: Final = 4
"""Steps that the end of a connection takes, for each stream on it."""
TRIED: Final = 64
"""Selectors that are tried in one step."""


@dataclass(slots=True)
class Hearing:
    """Hears the kernel, a little at a time: thousands of connections end at once when a process is killed."""

    books: Books
    connections: Connections
    watches: Watches
    endings: Endings
    carriage: Carriage
    _unheard: deque[Event] = field(default_factory=deque)
    """What there was more than STEPS of."""
    more: bool = False
    """The last call of ``run`` may have left something for the next one."""

    def run(self, now: float) -> None:
        """Take in what the kernel tells of connections; beyond STEPS it waits for the next call."""
        room = STEPS
        while room > 0:
            if not self._unheard:
                self._unheard.extend(self.connections.sockets.events())
            if not self._unheard:
                break
            room -= self._take_in(self._unheard.popleft(), room, now)
        self.more = room <= 0
        for conn, position in self.connections.positions.placed():
            self._place(conn, position)
        self.connections.lend()

    def _take_in(self, event: Event, room: int, now: float) -> int:
        """Returns how many steps it has taken. What ``room`` is too little for comes once more."""
        if isinstance(event, Established):
            self._established(event, now)
            return 1 + self.watches.to_try(event.socket) // TRIED
        if isinstance(event, Closed):
            return self._closed(event, now)
        if event.sockets is None:
            self.watches.failed(event.selector, now)
            return 1
        return self._found(event, event.sockets, room, now)

    def _closed(self, event: Closed, now: float) -> int:
        conn = self.connections.by_cookie.get(event.cookie)
        if conn is None:
            return 1
        steps = 1 + CLOSED * len(conn.streams)
        if event.active and not event.acked and not event.clean:
            # Nobody has answered: it was never established, and its process may connect it again.
            self.connections.unlocate(conn)
            for stream in conn.streams:
                stream.refused = True
        else:
            self.endings.closed(conn, float(event.acked - event.clean), now, clean=event.clean, at=event.at)
        return steps

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
        for stream in conn.streams:
            stream.refused = False
        if self.connections.positions.place(conn):
            self._place(conn, begin)
        for watch in watches:
            self.carriage.joined(watch, conn, begin, now)
        self.connections.note_rest(conn, now, linger=True)

    def _found(self, event: Found, sockets: Sequence[Socket], room: int, now: float) -> int:
        watches = self.watches.named(event.selector)
        some = sockets[: max(room // max(len(watches), 1), 1)] if watches else sockets
        last, steps = len(some) == len(sockets), 1 + len(some) * len(watches)
        if last:
            self.watches.answered(event.selector)
        else:
            self._unheard.appendleft(replace(event, sockets=sockets[len(some) :]))
        for watch in watches:
            self._join(watch, some, now)
            if last and not watch.looked_back:
                over = [e for e in event.ended if self.watches.means(watch, e.socket)]
                self.carriage.look_back(watch, over, now)
                steps += len(event.ended) // TRIED
        return steps

    def _join(self, watch: Watch, sockets: Sequence[Socket], now: float) -> None:
        for socket in sockets:
            if not self.watches.may(watch, socket):
                continue
            try:
                expires = now + self.carriage.limits.default_ttl_s
                conn = self.connections.of_socket(socket, expires, session=watch.session)
            except HintError:
                return
            self.carriage.joined(watch, conn, None, now)
