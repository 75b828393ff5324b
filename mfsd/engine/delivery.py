# SPDX-License-Identifier: Apache-2.0
"""What is done, and what ends with it: transfers whose bytes have arrived, requests, batches, sessions, connections.

A transfer is retired on TCP's word only. The classifier counts what enters the qdisc, long before the last bytes of a
starved transfer leave it; so the counters say whom to ask, and inet_diag says how far the peer has acknowledged.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Final

import numpy as np

from mfsd.model import Event, EventKind

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import numpy.typing as npt

    from mfsd.engine.books import Batch, Books, Connection, Mark, Request, Session, Transfer
    from mfsd.engine.connections import Connections, Position
    from mfsd.engine.rescue import Rescuer

CONFIRM_MAX: Final = 64
"""Connections asked per tick whether their last bytes have been acknowledged."""


@dataclass(slots=True)
class Delivery:
    """Finds out what is done and strikes it from the books."""

    books: Books
    connections: Connections
    rescuer: Rescuer
    _confirm: set[Connection] = field(default_factory=set)
    """Connections to ask although the counters give no reason."""
    _ask_from: int = 0

    def confirm(self, conn: Connection) -> None:
        """Ask at the next tick how far this connection has got."""
        self._confirm.add(conn)

    def run(self, now: float) -> None:
        """Retire what has arrived, and drop connections whose sockets turn out to be gone."""
        done, gone = self._look(now)
        self.end(done, now, delivered=True)
        for conn in gone:
            self.drop(conn, "its socket is gone", now)

    # --- what has arrived ---------------------------------------------------------------------------------------------

    def _look(self, now: float) -> tuple[list[Transfer], list[Connection]]:
        transfers = self.books.transfers
        if not transfers.n and not self._confirm:
            return [], []
        sent = self.connections.sent()
        conns = transfers.live("conn")
        rows = np.flatnonzero((transfers.live("end") <= sent.take(conns)) & (conns >= 0))
        if len(rows) > CONFIRM_MAX:
            # Take turns: many starved transfers may wait here for a long time.
            rows = np.roll(rows, -(self._ask_from % len(rows)))[:CONFIRM_MAX]
            self._ask_from += CONFIRM_MAX
        suspects = [transfers.objects[row] for row in rows]
        asked = {p.conn for t in suspects for p in t.parts if p.conn is not None} | self._confirm
        self._confirm.clear()
        if not asked:
            return [], []
        positions = self.connections.ask(list(asked))
        done: list[Transfer] = []
        gone: list[Connection] = []
        for conn in asked:
            position = positions.get(conn)
            if position is not None:
                done += self._arrived(conn, position)
            elif conn in positions:
                gone.append(conn)
            else:
                done += self._drained(conn, sent, now)
        done += self._whole(suspects, positions)
        return list(dict.fromkeys(done)), gone

    def _arrived(self, conn: Connection, position: Position) -> list[Transfer]:
        """Transfers of one connection whose last byte the peer has acknowledged."""
        transfers = self.books.transfers
        reach = position.delivered + 0.5
        # When nothing is on its way, whatever was handed over has arrived, however much less than announced it was.
        quiet = reach >= position.written
        handed_over = [t for t in conn.queue if t.handed_over]
        if handed_over and not quiet:
            self._confirm.add(conn)
        done = handed_over if quiet else []
        for transfer in conn.queue:
            if transfer.handed_over and quiet:
                continue
            if transfer.total > transfers.get(transfer, "size"):
                continue  # its bytes are spread over several connections, see _whole
            if reach < transfers.get(transfer, "end"):
                break  # the stream is FIFO: those behind it end later
            done.append(transfer)
        return done

    def _whole(self, suspects: list[Transfer], positions: Mapping[Connection, Position | None]) -> list[Transfer]:
        """Parts of transfers that have moved all their bytes together, however these were spread.

        With several transfers at once on several connections nobody can tell whose bytes went where; completion hints
        can.
        """
        transfers = self.books.transfers
        out: list[Transfer] = []
        for transfer in suspects:
            if transfer.total <= transfers.get(transfer, "size"):
                continue
            moved = 0.0
            for part in transfer.parts:
                position = positions.get(part.conn) if part.conn is not None else None
                if position is not None:
                    moved += max(position.delivered - transfers.get(part, "start"), 0.0)
            # Parts that are gone with their connections count as moved.
            shares_done = transfer.total - sum(float(transfers.get(p, "size")) for p in transfer.parts)
            if moved + shares_done + 0.5 >= transfer.total:
                out += transfer.parts
        return out

    def _drained(self, conn: Connection, sent: npt.NDArray[np.float64], now: float) -> list[Transfer]:
        """Without a socket to ask: what has entered the qdisc is done once the connection's lane is empty."""
        past = [t for t in conn.queue if self.books.transfers.get(t, "end") <= sent[conn.slot]]
        return past if past and self.rescuer.lane_empty(conn, now) else []

    # --- ends ---------------------------------------------------------------------------------------------------------

    def hand_over(self, transfers: Iterable[Transfer], now: float, *, cancelled: bool) -> None:
        """The process has written the last byte (or will not): what TCP still holds remains to be delivered."""
        ended: list[Transfer] = []
        for transfer in transfers:
            if cancelled or transfer.conn is None or not transfer.conn.local:
                ended.append(transfer)
            else:
                transfer.handed_over = True
                self._confirm.add(transfer.conn)
        self.end(ended, now, delivered=not cancelled)

    def end(self, transfers: Iterable[Transfer], now: float, *, delivered: bool) -> None:
        """Take transfers (single parts of them) out of everything, in one pass over each connection."""
        ended = [t for t in dict.fromkeys(transfers) if t in t.parts]
        for conn, own in groupby(sorted(ended, key=_slot), key=lambda t: t.conn):
            if conn is not None:
                self._unqueue(conn, set(own), now, delivered=delivered)
        for transfer in ended:
            if transfer.conn is None:
                self.books.waiting.drop(transfer)
            self.books.strike_transfer(transfer)
            self.books.counters.transfers_completed += delivered and not transfer.parts
            request = transfer.request
            if delivered and request is not None:
                request.delivered_at = max(request.delivered_at, now)
                if request.completed and not request.transfers:
                    self.finish(request, now)

    def _unqueue(self, conn: Connection, ended: set[Transfer], now: float, *, delivered: bool) -> None:
        """Take transfers off a connection's stream. What was not delivered will not come: those behind move forward."""
        if not delivered:
            transfers, rows = self.books.transfers, self.books.transfers.rows(conn.queue)
            start, end = transfers.live("start"), transfers.live("end")
            unsent = np.maximum(end[rows] - np.maximum(start[rows], self.connections.offset(conn)), 0.0)
            gaps = np.cumsum(np.where([t in ended for t in conn.queue], unsent, 0.0))
            start[rows[1:]] -= gaps[:-1]
            end[rows[1:]] -= gaps[:-1]
            conn.announced -= float(gaps[-1])
        left = len(ended)
        while conn.queue and conn.queue[0] in ended:
            conn.queue.popleft()
            left -= 1
        if left:
            conn.queue = deque(t for t in conn.queue if t not in ended)
        self.connections.note_rest(conn, now, linger=delivered)

    def finish(self, request: Request, now: float, *, cancelled: bool = False) -> None:
        """A request is over: count it, unless it was cancelled, and forget it."""
        if not cancelled:
            met = (request.delivered_at or now) <= self.books.requests.get(request, "deadline")
            self.books.counters.deadlines_met += met
            self.books.counters.deadlines_missed += not met
        self.forget(request, now)

    def forget(self, request: Request, now: float) -> None:
        """Strike out a request with all its transfers, and its batch if nothing else is in it."""
        batch = request.batch
        self.end(list(request.transfers), now, delivered=False)
        self.books.strike_request(request)
        if batch is not None and not batch.requests and not batch.transfers:
            self.books.strike_batch(batch)

    def end_batch(self, batch: Batch, now: float, *, cancelled: bool) -> None:
        """A batch is over; its requests live on."""
        self.hand_over([t for t in batch.transfers if t.request is None], now, cancelled=cancelled)
        self.books.strike_batch(batch)

    def end_session(self, session: Session, now: float) -> None:
        """Free everything that a session said."""
        self.end([t for parts in session.transfers.values() for t in parts], now, delivered=False)
        for request in list(session.requests.values()):
            self.forget(request, now)
        for batch in list(session.batches.values()):
            self.books.strike_batch(batch)
        for mark in list(session.marks.values()):
            self.unmark(mark, now)

    def unmark(self, mark: Mark, now: float) -> None:
        """Take a mark back."""
        mark.session.marks.pop(mark.selector, None)
        self.books.waiting.drop(mark)
        for conn in mark.conns:
            self.connections.set_mark(conn, None, now)
        mark.conns.clear()

    def drop(self, conn: Connection, reason: str, now: float) -> None:
        """Forget a connection; who has announced transfers on it is told the reason. No error when it is gone."""
        if conn.slot not in self.connections.by_slot or self.connections.by_slot[conn.slot] is not conn:
            return
        ended = list(conn.queue)
        for transfer in ended:
            owner = transfer.request.id if transfer.request else ""
            transfer.session.tell(Event(EventKind.CONNECTION_GONE, owner, transfer.id, reason))
        self.end(ended, now, delivered=False)
        if conn.mark is not None:
            conn.mark.conns.discard(conn)
        self._confirm.discard(conn)
        self.rescuer.forget(conn)
        self.connections.drop(conn)


def _slot(transfer: Transfer) -> int:
    return -1 if transfer.conn is None else transfer.conn.slot
