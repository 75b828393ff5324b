# SPDX-License-Identifier: Apache-2.0
"""What ends, and what ends with it: transfers, requests, batches, sessions, watches, marks, connections."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import islice
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import numpy as np

from mfsd.engine.columns import GONE
from mfsd.engine.records import EVENTS_KEPT, by_stream
from mfsd.engine.shortfall import REST, SLACK, cut, lacks, shared_out, short
from mfsd.engine.sockets import ON_THE_WAY_S
from mfsd.engine.watches import exact_endpoints
from mfsd.ground.model import INF, CookieSelector, Event, EventKind

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from mfsd.engine.audit import Audit
    from mfsd.engine.books import Books
    from mfsd.engine.connections import Connections
    from mfsd.engine.gaps import Gaps
    from mfsd.engine.positions import Position
    from mfsd.engine.records import Connection, Mark, Request, Session, Stream, Transfer, Watch
    from mfsd.engine.rescue import Rescuer
    from mfsd.engine.watches import Watches
    from mfsd.ground.model import Selector

AT_ONCE: Final = 512
"""Transfers struck out in one go before their bytes have arrived; some 2 ms, since those behind them move."""
ROOM: Final = 2048
"""Of those that have arrived so many are struck out in one tick."""
ROOM_BESIDE: Final = 512
"""The same while several users have something in the books: ticks are what others wait for."""
CONCLUDED: Final = 32
"""Streams of closed connections that are given up in one tick."""
FOUND: Final = 16
"""Connections that end in one tick because TCP, when asked, knew of no more: half a millisecond each. Fewer, down to
FOUND_LEAST, where the kernel has told of others since the last tick."""
FOUND_LEAST: Final = 2
NOTHING: Final[Mapping[Stream, float]] = MappingProxyType({})


@dataclass(slots=True)
class Endings:
    """Strikes out of the books what is over."""

    books: Books
    connections: Connections
    gaps: Gaps
    watches: Watches
    rescuer: Rescuer
    audit: Audit
    _more: deque[tuple[deque[Transfer], float | None, bool, Mapping[Stream, float]]] = field(default_factory=deque)
    """What ``end`` was given beyond AT_ONCE."""
    _arrived: dict[Transfer, float] = field(default_factory=dict)
    """What has arrived and is still in the books, and when."""
    _closing: dict[Stream, tuple[float, str]] = field(default_factory=dict)
    """Whose connection was closed before all was written: until when a word of it may come, and what to say then."""
    _found: int = FOUND
    """So many more may be, until the next tick."""
    _closed: int = 0
    """Connections that have ended since the last one."""
    _room: int = ROOM
    """Of what has arrived: so many may be struck out until the next tick."""

    # --- transfers ----------------------------------------------------------------------------------------------------

    def end(
        self,
        transfers: Iterable[Transfer],
        now: float,
        *,
        delivered_at: float | None = None,
        lost: bool = False,
        told: Mapping[Stream, float] = NOTHING,
    ) -> None:
        """Take transfers out of everything, in one pass over each stream.

        ``delivered_at`` None: they were not; ``lost``: though they should have been; ``told``: how far streams had been
        written, on their workers' word. Beyond AT_ONCE the others follow at the next ticks.
        """
        waiting = iter(transfers)
        ended = list(dict.fromkeys(t for t in islice(waiting, AT_ONCE) if t.row != GONE))
        if more := deque(waiting):
            self._more.append((more, delivered_at, lost, told))
        if delivered_at is None and ended:
            self._end(ended, now, None, lost=lost, told=told)
        elif delivered_at is not None and ended:
            self._deliver(ended, [delivered_at] * len(ended), now)

    def deliver(self, groups: Iterable[tuple[Iterable[Transfer], float]], now: float) -> None:
        """These have arrived, and when. So many are struck out as a tick has room for, the others afterwards."""
        for transfers, at in groups:
            new, known = dict.fromkeys(transfers, at), self._arrived
            known |= new if known.keys().isdisjoint(new) else {t: at for t in new if t not in known}
        self._room -= self._strike(self._room, now)

    def go_on(self, now: float) -> None:
        """A tick begins: end some more of what was too much at a time."""
        self._found, self._closed = max(FOUND - self._closed, FOUND_LEAST), 0
        room = ROOM_BESIDE if self.books.shared else ROOM
        self._room = room - self._strike(room, now)
        due = (s for s, (until, _) in self._closing.items() if until <= now or not s.queue)
        for stream in list(islice(due, CONCLUDED)):
            self.conclude(stream, now)
        if self._more:
            transfers, delivered_at, lost, told = self._more[0]
            some = [transfers.popleft() for _ in range(min(AT_ONCE, len(transfers)))]
            if not transfers:
                self._more.popleft()
            self.end(some, now, delivered_at=delivered_at, lost=lost, told=told)

    def catch_up(self, count: int, now: float) -> None:
        """Hints have come: strike out some of what has arrived, which must not wait for ticks while there are few."""
        self._strike(count, now)

    def _strike(self, count: int, now: float) -> int:
        """Strike out at most so many of those that have arrived; returns how many were looked at."""
        if not self._arrived or count <= 0:
            return 0
        some = dict(islice(self._arrived.items(), count))
        for transfer in some:
            del self._arrived[transfer]
        ended = [t for t in some if t.row != GONE]
        self._deliver(ended, [some[t] for t in ended], now)
        return len(some)

    def _deliver(self, ended: list[Transfer], at: list[float], now: float) -> None:
        """What workers had written of these has arrived, and when: all of it, but for those who ended before that."""
        lost = dict.fromkeys(short(self.books, ended))
        if lost:
            self._end(list(lost), now, None, lost=True)
            at = [when for t, when in zip(ended, at, strict=True) if t not in lost]
            ended = [t for t in ended if t not in lost]
        self._end(ended, now, at, lost=False)

    def _end(
        self,
        ended: list[Transfer],
        now: float,
        delivered_at: list[float] | None,
        *,
        lost: bool,
        told: Mapping[Stream, float] = NOTHING,
    ) -> None:
        """Take them, which are in the books, out of everything. ``delivered_at``: of each; None: they were not."""
        books, delivered = self.books, delivered_at is not None
        streams = by_stream(ended)
        if delivered:
            self.connections.positions.beyond.note(books, streams)
        written = {} if delivered else self.gaps.written(streams, told)
        for stream, some in streams.items():
            self._unqueue(stream, some, now, written.get(stream), told=stream in told)
        at = np.array(delivered_at) if delivered_at is not None else now
        books.tally.ended(ended, books.transfers, at, delivered=delivered)
        for recorder in books.recorders:
            recorder.ended(ended, delivered_at or [now] * len(ended), delivered=delivered)
        self.audit.ended(ended, delivered_at)
        books.strike_transfers(ended)
        if delivered_at is not None:
            self._delivered(ended, delivered_at)
        for transfer in ended if lost else ():
            transfer.session.lose(transfer)
        for request in dict.fromkeys(t.request for t in ended if t.request is not None):
            if request.completed and not request.transfers:
                self.finish(request, now)

    def _delivered(self, ended: list[Transfer], at: list[float]) -> None:
        self.books.counters.transfers_completed += self.gaps.counted(len(ended))
        for transfer, when in zip(ended, at, strict=True):
            if transfer.request is not None and transfer.request.delivered_at < when:
                transfer.request.delivered_at = when

    def _unqueue(self, stream: Stream, ended: list[Transfer], now: float, written: float | None, *, told: bool) -> None:
        """Take transfers off a stream. Those that were not delivered will not come, but for what has been ``written``.

        Those behind them move forward. ``written`` None: they were delivered.
        """
        if written is None:
            self.gaps.note(stream, ended)
        if len(ended) < len(stream.queue):
            if not stream.ordered:
                self.gaps.uncount(stream, ended, delivered=written is None)
            elif written is not None:
                self.gaps.close(stream, ended, written, told=told)
        elif stream.ordered and written is not None:
            stream.announced -= float(self.gaps.unwritten(self.books.transfers.rows(ended), written).sum())
        stream.queue.remove(ended)
        for conn in list(stream.members):
            self.connections.note_rest(conn, now, linger=written is None)
        if not stream.queue and (stream.session.over or (stream.watch is None and not stream.members)):
            self.close(stream)

    def close(self, stream: Stream) -> None:
        """Nothing is to come on a stream any more."""
        conns = list(stream.members)
        if stream.session.streams.get(stream.selector) is stream:
            del stream.session.streams[stream.selector]
        self.books.streams.close(stream)
        for conn in conns:
            self.connections.note_rest(conn, 0.0, linger=False)

    # --- requests and batches -----------------------------------------------------------------------------------------

    def finish(self, request: Request, now: float) -> None:
        """A request is over: count it and forget it. Of one without bytes, the worker's word is all there is."""
        at = INF if request.lost else request.delivered_at or (INF if request.session.over else now)
        deadline = float(self.books.requests.get(request, "deadline"))
        self.books.tally.finished(request, float(self.books.requests.get(request, "arrival")), deadline, at)
        self.books.counters.finished(deadline, at)
        self.forget(request, now)

    def forget(self, request: Request, now: float, told: Mapping[Stream, float] = NOTHING) -> None:
        """Strike out a request with all its transfers, and its batch if nothing else is in it."""
        batch, request.completed = request.batch, False  # else the last of its transfers would finish it once more
        if len(request.transfers) > AT_ONCE:
            self._orphan(request, now, told)
        else:
            self.end(request.transfers.copy(), now, told=told)
        self.books.strike_request(request)
        if batch is not None and not batch.requests and not batch.transfers:
            self.books.strike_batch(batch)

    def _orphan(self, request: Request, now: float, told: Mapping[Stream, float]) -> None:
        """Too many to strike out at once: they are nobody's from now on, and end some at a time."""
        t, rows = self.books.transfers, self.books.rows_of(request)
        t.live("request")[rows], t.live("expires")[rows] = -1, INF
        request.completed, orphans, request.transfers = False, request.transfers, set()
        self.end(orphans, now, told=told)

    # --- watches, marks -----------------------------------------------------------------------------------------------

    def unmark(self, mark: Mark, now: float) -> None:
        """Take a mark back."""
        session = mark.session
        session.marks.pop(mark.selector, None)
        self.lift(mark, now)
        watch = session.watches.get(mark.selector)
        if watch is not None:
            watch.mark = None
            if not watch.stream_in_use:
                self.unwatch(watch, now)

    def lift(self, mark: Mark, now: float) -> None:
        """Take a mark off its connections."""
        for conn in list(mark.conns):
            self.connections.set_mark(conn, mark, now, on=False)
        mark.conns.clear()

    def unwatch(self, watch: Watch, now: float) -> None:
        """A selector is no longer true for new connections."""
        self.watches.end(watch)
        for conn in watch.conns:
            conn.watches.discard(watch)
            self.connections.note_rest(conn, now, linger=False)
        watch.conns.clear()
        stream = watch.stream
        if stream is not None:
            stream.watch = None
            if not stream.queue:
                self.close(stream)

    # --- connections --------------------------------------------------------------------------------------------------

    def closed(self, conn: Connection, acked: float, now: float, *, clean: bool, at: float = INF) -> None:
        """End a connection; the peer had acknowledged payload up to ``acked`` ``at`` its end, all if ``clean``."""
        self._closed += 1
        reason = "its connection was closed before all had arrived" if clean else "its connection was reset"
        moved_at = self.connections.positions.moved_at(conn) or now  # no shaped device has seen a packet of it
        for stream in list(conn.streams):
            self.books.streams.part(stream, conn, acked, moved_at)
            stream.over = isinstance(stream.selector, CookieSelector)
            self._after(stream, now, reason, clean=clean, at=at)
        for watch in list(conn.watches):
            # Its selector named this connection; the next one with these ports may be anybody's.
            if exact_endpoints(watch.selector) is not None and watch.mark is None and not watch.stream_in_use:
                self.unwatch(watch, now)
        self.drop(conn, now)

    def found_over(self, conn: Connection, position: Position | None, now: float) -> bool:
        """A connection was found to be over; ``position`` None: nobody knows how, but for what the kernel remembers.

        False: not yet, because how it ended may have been told meanwhile, but not heard, or because of FOUND.
        """
        end = None if position else self.connections.sockets.end_of(conn.cookie)  # it had no slot, or its event no room
        unheard = position is None and end is None and self.connections.sockets.tells and not conn.missing
        if unheard or not self._found:
            conn.missing |= unheard
            return False
        self._found -= 1
        if position is not None:
            acked, clean, at = position.acked, True, position.ended
        elif end is not None:
            acked, clean, at = float(end.acked - end.clean), end.clean, end.at
        else:
            acked, at = self.connections.positions.acked_by(conn), INF
            clean = acked > 0 and acked + 1 >= float(self.connections.table.sent[conn.slot])  # 1: a FIN
        self.closed(conn, acked, now, clean=clean, at=at)
        return True

    def _after(self, stream: Stream, now: float, reason: str, *, clean: bool, at: float = INF) -> None:
        """A member of a stream is gone, since ``at``: see what can still come of its transfers."""
        transfers, queue = self.books.transfers, list(stream.queue)
        offset = self.books.streams.offset(stream, self.connections.positions.acked_by)
        rows = transfers.rows(queue)
        start, end = transfers.live("start")[rows], transfers.live("end")[rows]
        cut(self.books, (x for x in queue if x.left), offset)
        size = end - start
        missing = end - offset if stream.ordered else size - shared_out(self.books, stream, offset)
        handed = np.fromiter((x.handed_over for x in queue), np.bool_, len(queue))
        late = np.fromiter((x.maybe_late for x in queue), np.bool_, len(queue))
        alive = bool(stream.members)
        one = stream.watch is None or exact_endpoints(stream.selector) is not None
        # The others of a selector may bring what is missing, unless that is so little that it was never written.
        final = handed | (missing <= REST * size) | one
        # All that was written has arrived: all of what was said to have been, however late it was announced.
        begun = ((start < offset) | late) & final & ~lacks(queue, missing, size)
        whole = (handed | begun) & (not alive and clean)
        arrived = (missing <= SLACK) | whole
        done = [x for x, is_done in zip(queue, arrived.tolist(), strict=True) if is_done]
        over = [x for x, is_over in zip(queue, (~arrived & final & (not alive)).tolist(), strict=True) if is_over]
        self.end(done, now, delivered_at=min(at, now))
        if clean and over and stream.watch is None and not stream.session.over:
            # Their worker's last words, that it has written no more of them, may be on the way.
            stream.closed_at = min(at, now)
            self.gaps.closing[stream.session, stream.selector] = stream
            self._closing[stream] = now + ON_THE_WAY_S, reason
        else:
            self.give_up(over, now, reason)
        if not alive and stream.watch is None and not stream.queue:
            self.close(stream)
        elif not alive and stream.watch is None and stream.session.streams.get(stream.selector) is stream:
            del stream.session.streams[stream.selector]  # it ends with the last of its transfers

    def waiting(self, session: Session, selector: Selector, now: float) -> Stream | None:
        """What a connection carried that was closed by its worker, whose words have not all come: here is another."""
        stream = self.gaps.closing.get((session, selector))
        if stream is None or not stream.queue:
            return None
        self._closing[stream] = now + ON_THE_WAY_S, self._closing[stream][1]
        return stream

    def give_up(self, over: list[Transfer], now: float, reason: str) -> None:
        """These will not be delivered, and their workers are told so."""
        for transfer in over[-EVENTS_KEPT:]:
            owner = transfer.request.id if transfer.request else ""
            transfer.session.tell(Event(EventKind.CONNECTION_GONE, owner, transfer.id, reason))
        self.end(over, now, lost=True)

    def conclude(self, stream: Stream, now: float) -> None:
        """No word of its worker is waited for any more, if one is, since its connection was closed."""
        _, reason = self._closing.pop(stream, (0.0, ""))
        if self.gaps.closing.get((stream.session, stream.selector)) is stream:
            del self.gaps.closing[stream.session, stream.selector]
            self.give_up([x for x in stream.queue if not x.handed_over], now, reason)

    def drop(self, conn: Connection, now: float, reason: str = "") -> None:
        """Forget a connection. Who has announced transfers on it is told the ``reason``. No error when it is gone."""
        if self.connections.by_slot.get(conn.slot) is not conn:
            return
        positions = self.connections.positions
        for stream in list(conn.streams):
            self.books.streams.part(stream, conn, positions.acked_by(conn), positions.moved_at(conn))
            self._after(stream, now, reason, clean=False)
        for watch in conn.watches:
            watch.conns.discard(conn)
        for mark in conn.marks:
            mark.conns.discard(conn)
            if isinstance(mark.selector, CookieSelector):
                mark.session.marks.pop(mark.selector, None)  # there will never be another socket of this cookie
        self.rescuer.forget(conn)
        self.connections.drop(conn)
