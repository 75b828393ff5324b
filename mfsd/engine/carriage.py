# SPDX-License-Identifier: Apache-2.0
"""What carries transfers: streams, opened when a hint first names them, and the connections that join them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mfsd.engine.late import Lateness
from mfsd.engine.locating import LOCATE_S, SYN, UNCONNECTED_S
from mfsd.engine.shortfall import SLACK
from mfsd.engine.watches import exact_endpoints
from mfsd.ground.model import INF, CookieSelector, Stage, TupleSelector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from mfsd.engine.books import Books
    from mfsd.engine.connections import Connections
    from mfsd.engine.delivery import Delivery
    from mfsd.engine.records import Connection, Mark, Session, Stream, Watch
    from mfsd.engine.settings import LimitsConfig
    from mfsd.engine.sockets import End
    from mfsd.engine.watches import Watches
    from mfsd.ground.model import Selector


class Carriage:
    """Opens streams, and says where on them transfers begin."""

    def __init__(
        self,
        books: Books,
        connections: Connections,
        watches: Watches,
        delivery: Delivery,
        band_of: Callable[..., int],
        limits: LimitsConfig,
    ) -> None:
        """``band_of(stage, due_in)``: where bytes begin of which nothing but these is known."""
        self.books = books
        self.connections = connections
        self.watches = watches
        self.delivery = delivery
        self.late = Lateness(books, connections, delivery)
        self.band_of = band_of
        self.limits = limits

    # --- streams ------------------------------------------------------------------------------------------------------

    def stream_of(
        self,
        session: Session,
        selector: Selector,
        stage: Stage,
        expires: float,
        now: float,
        *,
        ordered: bool,
        position: int,
    ) -> Stream:
        """What carries a transfer; opened, and its connections made known, if it is the first one."""
        stream = session.streams.get(selector) or self._waiting(session, selector, position, now)
        if session.watches and isinstance(selector, CookieSelector):
            stream = self._by_addresses(session, selector) or stream
        if stream is not None:
            if stream.watch is not None:
                begins = self._begins(session, stream.selector, stage)
                self.watches.get(session, stream.selector, begins, expires, now)
        else:
            conn = self._connection(session, selector, expires, position)
            if conn is not None:
                self.connections.note_rest(conn, now, linger=False)  # should the rest fail, nothing holds it
            watch = None
            if not isinstance(selector, CookieSelector):
                # An exact tuple, too, may name one connection after another.
                watch = self.watches.get(session, selector, self._begins(session, selector, stage), expires, now)
            stream = session.streams[selector] = self.books.streams.open(session, selector, watch)
            mark = session.marks.get(selector)
            stream.ordered = ordered and (mark is None or mark.ordered)
            if watch is not None:
                watch.stream = stream
                for known in watch.conns:
                    self._join(stream, known, None)
            if conn is not None and not self._resumed(stream, conn, position):
                self._join(stream, conn, position or None)
        self.connections.renew(stream.members, expires)
        return stream

    def _begins(self, session: Session, selector: Selector, stage: Stage) -> int:
        """The band of a selector's new connections: that of the stage that is said now, or of the mark above it."""
        watch = session.watches.get(selector)
        band, mark = self.band_of(stage), None if watch is None else watch.mark
        return band if mark is None else min(band, self.band_of(mark.stage, mark.due_in))

    def _waiting(self, session: Session, selector: Selector, position: int, now: float) -> Stream | None:
        """What a connection carried that is over, and waits for its worker's last words, of which this is one."""
        endings = self.delivery.endings
        if (session, selector) not in endings.gaps.closing or not self._over(selector, position):
            return None
        return endings.waiting(session, selector, now)

    def _resumed(self, stream: Stream, conn: Connection, position: int) -> bool:
        """This is said of a connection that is over, and whose bytes have been counted."""
        streams = self.books.streams
        if streams.ended(stream.session, stream.selector) is None:
            return False
        return streams.resume(stream, conn, over=self._over(stream.selector, position))

    def _over(self, selector: Selector, position: int) -> bool:
        """A socket's connection is over, and is what a hint means; not one that is made by now, or that is to come.

        Before it is made nothing is known of a ``position``, and who has accepted one doesn't make another.
        """
        if not isinstance(selector, CookieSelector) or self.connections.sockets.by_cookie(selector.cookie) is not None:
            return False
        end = self.connections.sockets.end_of(selector.cookie)
        return position > 0 or (end is not None and not end.active)

    def _by_addresses(self, session: Session, selector: CookieSelector) -> Stream | None:
        """The stream of this connection alone that the session has named by addresses, and that carries transfers."""
        conn = self.connections.by_cookie.get(selector.cookie)
        for stream in () if conn is None else conn.streams:
            if stream.session is session and stream.watch is not None and stream.queue and len(stream.members) == 1:
                return stream
        return None

    def _skip_others(self, stream: Stream) -> None:
        """What the session has announced by socket on connections of a stream goes before what it announces now."""
        for conn, member in stream.members.items():
            for other in self._others(stream, conn):
                if other.watch is None and other.queue:
                    until = self.books.streams.position_at(other, other.announced)
                    self.books.streams.skip(member, self.connections.positions.sent_by(conn), until)

    @staticmethod
    def _others(stream: Stream, conn: Connection) -> list[Stream]:
        """What else its session has on a connection, where bytes have an order."""
        if len(conn.streams) < 2 or not stream.ordered:
            return []
        return [s for s in conn.streams if s is not stream and s.session is stream.session and s.ordered]

    def _same(self, stream: Stream) -> list[tuple[Stream, float]]:
        """Other selectors of the session that name the same connections, and how much is still to come on each."""
        if stream.watch is None or not stream.members:
            return []
        others = self._others(stream, next(iter(stream.members)))
        sent = self.connections.positions.sent_by
        return [
            (other, max(other.announced - self.books.streams.offset(other, sent), 0.0))
            for other in others
            if other.watch is not None and other.queue and other.members.keys() == stream.members.keys()
        ]

    def _arrange(self, stream: Stream) -> None:
        """A connection has joined a stream that has transfers: with others of the same ones, first announced, first."""
        if stream.arranged or not (others := self._same(stream)):
            return
        stream.arranged, sent, t = True, self.connections.positions.sent_by, self.books.transfers
        base = {s: self.books.streams.offset(s, sent) for s in (stream, *(other for other, _ in others))}
        behind = 0.0
        for transfer in stream.session.transfers.values():
            if (at := base.get(transfer.stream)) is None:
                continue
            start, end = t.get(transfer, "start"), t.get(transfer, "end")
            if start < at:  # under way
                behind = max(behind, end - at)
                continue
            t.put(transfer, "start", at + behind)
            behind += end - start
            t.put(transfer, "end", at + behind)
            transfer.stream.announced = at + behind

    def _alone(self, stream: Stream, start: float, gap: float) -> None:
        """What is announced on one connection is none of what the session has announced for that one and others."""
        ((conn, _),) = stream.members.items()
        for other in self._others(stream, conn):
            if other.queue and len(other.members) > 1:
                begin = self.books.streams.position_at(stream, start)
                self.books.streams.leave_out(other.members[conn], stream, begin, gap)

    def _connection(self, session: Session, selector: Selector, expires: float, position: int) -> Connection | None:
        """The one connection that a selector names; None: it may name several, or one still to come."""
        connections = self.connections
        if isinstance(selector, CookieSelector):
            # Of one that has been written to the kernel has told, and would have told of its end.
            new = not position and connections.sockets.tells
            return connections.of_cookie(selector.cookie, expires, session, UNCONNECTED_S if new else LOCATE_S)
        exact = exact_endpoints(selector)
        if exact is None:
            return None
        found = connections.sockets.exact(selector)  # type: ignore[arg-type]  # exact, so a tuple
        if found is not None:
            return connections.of_socket(found, expires, session=session)
        if session.only < 0 or connections.sockets.sends(exact, session.only):
            return connections.of_tuple(exact, expires, session)
        return None

    # --- where transfers begin ----------------------------------------------------------------------------------------

    def begin(self, stream: Stream, size: float, position: float, offset: float, now: float) -> tuple[float, bool]:
        """Offset of a transfer's first byte, behind all that is announced on its stream, which is at ``offset`` now.

        And whether as many bytes as it has went without a hint just before it.
        """
        if stream.watch is not None and not stream.queue:
            stream.arranged = False
            self._skip_others(stream)
        if stream.debt and stream.queue:
            offset = self.late.settle(stream, offset, now)
        placed = bool(position) and len(stream.members) == 1
        if not stream.ordered:
            return min(offset, max(self.books.streams.offset_at(stream, position), 0.0)) if placed else offset, False
        start = self.behind(stream, position, offset)
        late = False
        if not stream.queue or start > stream.announced:
            late = self.late.suspect(stream, size, start, now, placed=placed)
        if placed and self.stands_behind(stream, position):
            for transfer in reversed(stream.queue):
                if transfer.passed:
                    break
                transfer.passed = True
        for _, octets in self._same(stream):
            start = max(start, offset + octets)
        gap, stream.announced = max(start - stream.announced, 0.0), start + size
        if len(stream.members) == 1:
            self._alone(stream, start, gap)
        return start, late

    def behind(self, stream: Stream, position: float, offset: float = 0.0) -> float:
        """The first offset behind all that is announced, and not before where ``position`` is.

        Without that, not before ``offset``, where the stream is now: on the hint's way some of its bytes may have gone.
        """
        if position and len(stream.members) == 1:
            # What is announced beyond the stream's end, though nothing is unfinished, was announced too large.
            announced = stream.announced if stream.queue else min(stream.announced, offset)
            at = self.books.streams.offset_at(stream, position)
            if stream.queue and 0 < announced - at <= stream.debt + SLACK:
                # So much had gone before the first hint was heard.
                self.late.earlier(stream, announced - at)
                stream.debt -= announced - at
            return max(at, announced)
        return max(offset, stream.announced) if stream.queue else offset

    def stands_behind(self, stream: Stream, position: float) -> bool:
        """Who has written so far has written all that is announced on a stream."""
        placed = bool(position) and len(stream.members) == 1
        return placed and self.books.streams.offset_at(stream, position) >= stream.announced - SLACK

    def note(self, stream: Stream, stage: Stage) -> None:
        """Its connections carry this stage now, and are in its band at once; the next tick decides what is best."""
        stream.stage = stage
        for conn in stream.members:
            self.connections.positions.beyond.forget(conn.slot)
            if self.connections.carries(conn, stage):
                self._leave_default(conn, self.band_of(stage))

    # --- connections --------------------------------------------------------------------------------------------------

    def _join(self, stream: Stream, conn: Connection, position: int | None) -> None:
        """A connection becomes part of a stream, from where the process has written to now."""
        at = self.connections.positions.written(conn) if position is None else float(position)
        self.books.streams.join(stream, conn, at)
        if position is not None:
            self.books.streams.unasked.add(stream)
            self.delivery.confirm(stream)  # part of what is to come has gone already
        if len(stream.members) == 1 and at < INF:
            stream.before = at if at > SYN else 0.0  # of accepted connections no SYN counts

    def joined(self, watch: Watch, conn: Connection, position: float | None, now: float) -> None:
        """A watch has found a connection, which stood at ``position`` (None: ask)."""
        watch.seen = True
        if not conn.here and watch.session.only < 0 and isinstance(watch.selector, TupleSelector):
            # Not for those who may name their own sockets only: nobody knows whose such packets are.
            self.connections.pass_by(conn)
        if conn not in watch.conns:
            watch.conns.add(conn)
            conn.watches.add(watch)
            self.connections.renew((conn,), watch.expires if watch.mark is None else now + self.limits.max_ttl_s)
        if watch.mark is not None and conn not in watch.mark.conns:
            self.put_on(watch.mark, conn, watch.band, now)
        if watch.stream is not None and conn not in watch.stream.members:
            at = self.connections.positions.written(conn) if position is None or conn.passing else position
            self.books.streams.join(watch.stream, conn, at)
            if watch.stream.stage is not Stage.NONE:
                # The hint of what it is opened for may still be on its way. Until then it is what came before.
                self.note(watch.stream, watch.stream.stage)
            self._skip_others(watch.stream)
            if watch.stream.queue:
                self._arrange(watch.stream)
            if watch.stream.queue and position is None:
                self.late.found(watch.stream, conn, at)
        self.connections.note_rest(conn, now, linger=True)

    def look_back(self, watch: Watch, ended: Iterable[End], now: float) -> None:
        """These connections were over before the hint that opened a watch was heard."""
        watch.looked_back = True
        stream = watch.stream
        if stream is not None and stream.queue:
            for end in ended:
                watch.seen = True
                if end.socket.cookie in self.connections.by_cookie:
                    continue  # it was still there when it was looked for
                self.late.over(stream, float(end.acked - end.clean - end.active), now)

    def put_on(self, mark: Mark, conn: Connection, band: int, now: float) -> None:
        """The mark counts for a connection, whose packets leave the default band at once."""
        mark.conns.add(conn)
        self.connections.set_mark(conn, mark, now, on=True)
        self._leave_default(conn, band)

    def _leave_default(self, conn: Connection, band: int) -> None:
        if self.connections.leave_default(conn, band):
            self.delivery.rescuer.hinted(conn)
