# SPDX-License-Identifier: Apache-2.0
"""The ledger: what hints say, as sessions, requests, batches, transfers and connections (books.py).

``apply`` takes one hint. It either takes effect as a whole or raises HintError and changes nothing. Nothing here looks
at a clock or decides a level; engine.py does the one, steering.py the other.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mfsd.bands import LEVEL_NEW
from mfsd.engine import books
from mfsd.engine.books import Batch, Connection, Mark, Request, Session, Transfer
from mfsd.engine.columns import Deferred, Dense
from mfsd.model import (
    INF,
    BatchHint,
    EndHint,
    Event,
    EventKind,
    Hint,
    HintError,
    MarkHint,
    Mode,
    ProgressHint,
    RequestHint,
    Selector,
    Stage,
    TransferHint,
    What,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sized

    from mfsd.daemon.config import LimitsConfig
    from mfsd.engine.connections import Connections
    from mfsd.engine.steering import Steering


@dataclass(slots=True)
class Counters:
    """Since the engine was made; names as in proto ``mfsd.v1.Counters``."""

    hints_accepted: int = 0
    hints_rejected: int = 0
    transfers_completed: int = 0
    transfers_expired: int = 0
    promotions: int = 0
    rescues: int = 0
    deadlines_met: int = 0
    deadlines_missed: int = 0


class Ledger:
    """All that the daemon knows, for all devices of the host."""

    def __init__(
        self,
        connections: Connections,
        steering: Steering,
        limits: LimitsConfig,
        *,
        mode: Mode = Mode.ENFORCE,
        watch: Callable[[int, Callable[[], None]], bool] = lambda _pid, _on_exit: True,
        unwatch: Callable[[int], None] = lambda _pid: None,
    ) -> None:
        """``watch(pid, on_exit)`` starts watching a process and is False when there is none."""
        self.connections = connections
        self.steering = steering
        self.limits = limits
        self.mode = mode
        self.paused = False
        self.epoch = secrets.randbits(63) | 1
        self.counters = Counters()
        self.transfers: Deferred[Transfer] = Deferred(books.TRANSFER_COLUMNS)
        self.requests: Dense[Request] = Dense(books.REQUEST_COLUMNS)
        self.batches: Dense[Batch] = Dense(books.BATCH_COLUMNS)
        self.sessions: dict[str, Session] = {}
        self._watch, self._unwatch = watch, unwatch
        self._dead: list[Session] = []
        self._pending: dict[Selector, list[Transfer | Mark]] = {}
        self._pending_since = self._next_pending = 0.0
        """When the youngest of them came, and when to look again."""
        self.arrange_wanted = False
        """A batch arrived or departed: the inter-request decision is due."""

    # --- sessions -----------------------------------------------------------------------------------------------------

    def session(self, name: str, pid: int, now: float) -> Session:
        """Find or open a client session. Raises HintError for an empty name, a dead pid, or too many sessions."""
        found = self.sessions.get(name)
        if found is not None:
            found.seen = now
            return found
        if not name:
            raise HintError("session", "is empty", "name the session, unique per process")
        if len(self.sessions) >= self.limits.max_sessions:
            raise HintError(
                "session",
                f"{len(self.sessions)} sessions are open already",
                "raise limits.max_sessions, or let workers share a session",
                exhausted=True,
            )
        new = Session(name, pid, seen=now)
        if pid and not self._watch(pid, lambda: self._dead.append(new)):
            raise HintError("pid", f"no process {pid}", "give the worker's own pid as this host sees it, or 0")
        self.sessions[name] = new
        return new

    def end_session(self, session: Session) -> None:
        """Free everything that a session said."""
        if self.sessions.pop(session.name, None) is None:
            return
        if session.pid and not any(s.pid == session.pid for s in self.sessions.values()):
            self._unwatch(session.pid)
        for transfer in [t for parts in session.transfers.values() for t in parts]:
            self._end_transfer(transfer, now=0.0, delivered=False)
        for request in list(session.requests.values()):
            self._forget_request(request)
        for batch in list(session.batches.values()):
            self._forget_batch(batch)
        for mark in list(session.marks.values()):
            self._unmark(mark)

    # --- hints --------------------------------------------------------------------------------------------------------

    def apply(self, session: Session, hint: Hint, now: float) -> None:
        """Apply one hint. Raises HintError and changes nothing if it can't be applied."""
        if isinstance(hint, TransferHint):
            self._transfer(session, hint, now)
        elif isinstance(hint, ProgressHint):
            self._progress(session, hint, now)
        elif isinstance(hint, EndHint):
            self._end(session, hint, now)
        elif isinstance(hint, RequestHint):
            self._request(session, hint, now)
        elif isinstance(hint, BatchHint):
            self._batch(session, hint, now)
        elif isinstance(hint, MarkHint):
            self._mark(session, hint, now)

    def _bound(
        self, field: str, what: str, have: Sized, limit: str, instead: str = "complete those that are done"
    ) -> None:
        """Raise HintError when the session has as many as ``limits.<limit>`` allows."""
        if len(have) >= getattr(self.limits, limit):
            raise HintError(
                field, f"the session has {len(have)} {what}", f"{instead}, or raise limits.{limit}", exhausted=True
            )

    def _request(self, session: Session, hint: RequestHint, now: float) -> None:
        request = session.requests.get(hint.id)
        expires = max(hint.deadline, now) + hint.ttl
        if request is None:
            self._bound("request.id", "requests already", session.requests, "max_requests_per_session")
            request = Request(hint.id, session)
            session.requests[hint.id] = request
            self.requests.add(request, arrival=now, batch=-1)
        row = request.row
        self.requests.deadline[row] = hint.deadline
        self.requests.expires[row] = expires
        self.requests.compute_until[row] = now + hint.compute_left if hint.compute_left else 0.0
        for transfer in request.transfers:
            self.transfers.deadline[transfer.row] = min(hint.deadline, transfer.own_deadline)
            self.transfers.expires[transfer.row] = max(self.transfers.expires[transfer.row], expires)
        if hint.batch_id and (request.batch is None or request.batch.id != hint.batch_id):
            batch = session.batches.get(hint.batch_id) or self._new_batch(session, hint.batch_id, now)
            self._join(request, batch)
        elif request.batch is not None:
            self.arrange_wanted = True

    def _batch(self, session: Session, hint: BatchHint, now: float) -> None:
        batch = session.batches.get(hint.id) or self._new_batch(session, hint.id, now)
        row, columns = batch.row, self.batches
        columns.layers[row] = hint.layers
        columns.layer_compute[row] = hint.layer_compute
        columns.expires[row] = now + self.limits.default_ttl_s
        if hint.current_layer > columns.current_layer[row] or not columns.layer_since[row]:
            columns.current_layer[row] = max(hint.current_layer, columns.current_layer[row])
            columns.layer_since[row] = now
        members = set()
        for request_id in hint.request_ids:
            request = session.requests.get(request_id)
            if request is not None:
                members.add(request)
        for request in batch.requests - members:
            self._leave(request)
        for request in members - batch.requests:
            self._join(request, batch)
        self.arrange_wanted = True

    def _progress(self, session: Session, hint: ProgressHint, now: float) -> None:
        batch = session.batches.get(hint.batch_id)
        if batch is None:
            request = session.requests.get(hint.batch_id)
            if request is None:
                raise HintError("progress.batch_id", f"no batch or request {hint.batch_id!r}", "announce it first")
            if request.batch is None:
                # A request that runs alone is its own batch.
                self._join(request, self._new_batch(session, hint.batch_id, now))
            batch = request.batch
            assert batch is not None  # noqa: S101 - _join just set it; for the type checker
        row, columns = batch.row, self.batches
        columns.expires[row] = now + self.limits.default_ttl_s
        if hint.current_layer > columns.current_layer[row]:
            columns.current_layer[row] = hint.current_layer
            columns.layer_since[row] = now
        if hint.compute_done and not columns.compute_done[row]:
            columns.compute_done[row] = True
            self.arrange_wanted = True

    def _transfer(self, session: Session, hint: TransferHint, now: float) -> None:
        if hint.id in session.transfers:
            raise HintError("transfer.id", f"{hint.id!r} is announced already", "ids are unique within a session")
        self._bound("transfer.id", "unfinished transfers", session.transfers, "max_transfers_per_session")
        request = session.requests.get(hint.request_id) if hint.request_id else None
        batch = session.batches.get(hint.batch_id) if hint.batch_id else None
        if request is None and batch is None and hint.stage is not Stage.COLLECTIVE:
            name = "transfer.request_id" if hint.request_id or not hint.batch_id else "transfer.batch_id"
            owner = hint.request_id or hint.batch_id
            raise HintError(name, f"no request or batch {owner!r} in this session", "announce it before its transfers")
        if batch is None and request is not None:
            batch = request.batch
        deadline = hint.deadline
        if request is not None:
            deadline = min(deadline, float(self.requests.deadline[request.row]))
        expires = (deadline if now < deadline < INF else now) + hint.ttl
        conns = self.connections.match(hint.selector, expires)
        transfer = Transfer(hint.id, session, hint.selector, hint.stage, hint.deadline, request, batch, [], hint.size)
        transfer.target_layer, transfer.created, transfer.expires = hint.target_layer, now, expires
        session.transfers[hint.id] = transfer.parts
        if conns:
            self._spread(transfer, conns, deadline)
        else:
            self._add_part(transfer, float(hint.size), deadline, None)
            self._wait(transfer, now)

    def _wait(self, waiting: Transfer | Mark, now: float) -> None:
        """Keep as a rule for sockets still to come."""
        self._pending.setdefault(waiting.selector, []).append(waiting)
        self._pending_since = now
        self._next_pending = 0.0

    def _spread(self, first: Transfer, conns: list[Connection], deadline: float) -> None:
        """Put a transfer on its connections, in equal shares."""
        share = first.total / len(conns)
        self._add_part(first, share, deadline, conns[0])
        for conn in conns[1:]:
            part = Transfer(
                first.id,
                first.session,
                first.selector,
                first.stage,
                first.own_deadline,
                first.request,
                first.batch,
                first.parts,
                first.total,
            )
            part.target_layer, part.created, part.expires = first.target_layer, first.created, first.expires
            self._add_part(part, share, deadline, conn)

    def _found(self, waiting: Transfer, conns: list[Connection]) -> None:
        """The sockets of a waiting transfer have appeared: its row is made anew, on them."""
        deadline, waiting.expires = (
            float(self.transfers.deadline[waiting.row]),
            float(self.transfers.expires[waiting.row]),
        )
        self.transfers.remove(waiting)
        waiting.parts.clear()
        self._spread(waiting, conns, deadline)

    def _add_part(self, part: Transfer, size: float, deadline: float, conn: Connection | None) -> None:
        """Add a row, and queue it at the end of its connection's announced stream."""
        start, slot = 0.0, -1
        if conn is not None:
            slot = conn.slot
            # Bytes that nobody announced may have moved the stream past the last announcement; and when everything
            # announced has been retired, what is counted now is the truth.
            sent = self.connections.offset(conn)
            start = max(conn.announced, sent) if conn.queue else sent
            conn.announced = start + size
            part.conn = conn
            conn.queue.append(part)
            self.connections.note_rest(conn, now=0.0)
            if conn.last_stage is not part.stage:
                conn.last_stage = part.stage
                self.steering.stages.last[slot] = part.stage
        request, batch = part.request, part.batch
        self.transfers.append(
            part,
            (  # in the order of books.TRANSFER_COLUMNS
                part.stage,
                size,
                start,
                start + size,
                -1 if request is None else request.row,
                -1 if batch is None else batch.row,
                slot,
                part.target_layer,
                deadline,
                part.created,
                part.expires,
                LEVEL_NEW,
                -1,  # seen_layer
                False,  # infeasible
            ),
        )
        part.parts.append(part)
        if request is not None:
            request.transfers.add(part)
        if batch is not None:
            batch.transfers.add(part)

    def _end(self, session: Session, hint: EndHint, now: float) -> None:
        if hint.what is What.TRANSFER:
            # A transfer that is not there has been retired by its bytes already: not an error.
            self._hand_over(list(session.transfers.get(hint.id, ())), now, cancelled=hint.cancelled)
        elif hint.what is What.REQUEST:
            request = session.requests.get(hint.id)
            if request is None:
                raise HintError("completion.request_id", f"no request {hint.id!r}", "it may have expired")
            request.completed = True
            self._hand_over(list(request.transfers), now, cancelled=hint.cancelled)
            if not request.transfers:
                self._finish_request(request, now, cancelled=hint.cancelled)
        else:
            batch = session.batches.get(hint.id)
            if batch is None:
                raise HintError("completion.batch_id", f"no batch {hint.id!r}", "it may have expired")
            self._hand_over([t for t in batch.transfers if t.request is None], now, cancelled=hint.cancelled)
            self._forget_batch(batch)

    def _hand_over(self, transfers: Iterable[Transfer], now: float, *, cancelled: bool) -> None:
        """The process has written the last byte (or will not): what TCP still holds remains to be delivered."""
        for transfer in transfers:
            if cancelled or transfer.conn is None or not transfer.conn.local:
                self._end_transfer(transfer, now, delivered=not cancelled)
            else:
                transfer.handed_over = True
                self.steering.confirm.add(transfer.conn)

    def _mark(self, session: Session, hint: MarkHint, now: float) -> None:
        old = session.marks.get(hint.selector)
        if old is not None:
            self._unmark(old)
        if hint.stage is Stage.NONE:
            return
        self._bound(
            "connection.selector",
            "marks already",
            session.marks,
            "max_marks_per_session",
            "take back those that are not needed",
        )
        mark = Mark(session, hint.selector, hint.stage)
        session.marks[hint.selector] = mark
        conns = self.connections.match(hint.selector, now + self.limits.max_ttl_s)
        for conn in conns:
            self._put_mark(mark, conn)
        if not conns:
            self._wait(mark, now)

    def _put_mark(self, mark: Mark, conn: Connection) -> None:
        if conn.mark is not None:
            conn.mark.conns.discard(conn)
        conn.mark = mark
        mark.conns.add(conn)
        self.connections.note_rest(conn, now=0.0)
        self.steering.stages.mark[conn.slot] = mark.stage

    def _unmark(self, mark: Mark) -> None:
        mark.session.marks.pop(mark.selector, None)
        for conn in mark.conns:
            conn.mark = None
            self.connections.note_rest(conn, now=0.0)
            self.steering.stages.mark[conn.slot] = Stage.NONE
        mark.conns.clear()

    # --- requests and batches -----------------------------------------------------------------------------------------

    def _new_batch(self, session: Session, batch_id: str, now: float) -> Batch:
        self._bound("batch.id", "batches already", session.batches, "max_batches_per_session")
        batch = Batch(batch_id, session)
        session.batches[batch_id] = batch
        expires = now + self.limits.default_ttl_s
        self.batches.add(batch, arrival=now, layer_since=now, expires=expires, rank=self.batches.n)
        self.arrange_wanted = True
        return batch

    def _join(self, request: Request, batch: Batch) -> None:
        self._leave(request)
        request.batch = batch
        batch.requests.add(request)
        self.requests.batch[request.row] = batch.row
        for transfer in request.transfers:
            transfer.batch = batch
            batch.transfers.add(transfer)
            self.transfers.batch[transfer.row] = batch.row
        self.arrange_wanted = True

    def _leave(self, request: Request) -> None:
        if request.batch is None:
            return
        request.batch.requests.discard(request)
        request.batch.transfers -= request.transfers
        self.requests.batch[request.row] = -1
        for transfer in request.transfers:
            transfer.batch = None
            self.transfers.batch[transfer.row] = -1
        request.batch = None
        self.arrange_wanted = True

    def _finish_request(self, request: Request, now: float, *, cancelled: bool) -> None:
        if not cancelled:
            done = request.delivered_at or now
            if done <= self.requests.deadline[request.row]:
                self.counters.deadlines_met += 1
            else:
                self.counters.deadlines_missed += 1
        self._forget_request(request)

    def _forget_request(self, request: Request) -> None:
        for transfer in list(request.transfers):
            self._end_transfer(transfer, now=0.0, delivered=False)
        if request.row < 0:
            return  # its last transfer's end has done it
        batch = request.batch
        self._leave(request)
        request.session.requests.pop(request.id, None)
        moved = self.requests.remove(request)
        if moved is not None:
            for transfer in moved.transfers:
                self.transfers.request[transfer.row] = moved.row
        if batch is not None and not batch.requests and not batch.transfers:
            self._forget_batch(batch)

    def _forget_batch(self, batch: Batch) -> None:
        if batch.session.batches.pop(batch.id, None) is None:
            return
        for request in list(batch.requests):
            self._leave(request)
        for transfer in list(batch.transfers):
            transfer.batch = None
            self.transfers.batch[transfer.row] = -1
        moved = self.batches.remove(batch)
        if moved is not None:
            for transfer in moved.transfers:
                self.transfers.batch[transfer.row] = moved.row
            for request in moved.requests:
                self.requests.batch[request.row] = moved.row
        self.arrange_wanted = True

    # --- ends of transfers --------------------------------------------------------------------------------------------

    def _end_transfer(self, transfer: Transfer, now: float, *, delivered: bool) -> None:
        """Take a transfer (one part of it) out of everything."""
        if transfer not in transfer.parts:
            return
        transfer.parts.remove(transfer)
        if not transfer.parts:
            transfer.session.transfers.pop(transfer.id, None)
            self.counters.transfers_completed += delivered
        if transfer.conn is not None:
            self._unqueue(transfer, transfer.conn, now, delivered=delivered)
        else:
            self._stop_waiting(transfer)
        if transfer.batch is not None:
            transfer.batch.transfers.discard(transfer)
        self.transfers.remove(transfer)
        request = transfer.request
        if request is None:
            return
        request.transfers.discard(transfer)
        if delivered:
            request.delivered_at = max(request.delivered_at, now)
            if request.completed and not request.transfers:
                self._finish_request(request, now, cancelled=False)

    def _unqueue(self, transfer: Transfer, conn: Connection, now: float, *, delivered: bool) -> None:
        if not delivered:
            # Its unsent bytes will not come: what was announced behind it moves forward.
            self._close_gap(transfer, conn)
        conn.queue.remove(transfer)
        self.connections.note_rest(conn, now)

    def _stop_waiting(self, transfer: Transfer) -> None:
        waiting = self._pending.get(transfer.selector)
        if waiting is not None and transfer in waiting:
            waiting.remove(transfer)
            if not waiting:
                del self._pending[transfer.selector]

    def _close_gap(self, transfer: Transfer, conn: Connection) -> None:
        start, end = float(self.transfers.start[transfer.row]), float(self.transfers.end[transfer.row])
        gap = end - max(start, self.connections.offset(conn))
        if gap <= 0:
            return
        behind = False
        for other in conn.queue:
            if behind:
                self.transfers.start[other.row] -= gap
                self.transfers.end[other.row] -= gap
            behind = behind or other is transfer
        conn.announced -= gap

    def _drop_connection(self, conn: Connection, reason: str) -> None:
        for transfer in list(conn.queue):
            event = Event(
                EventKind.CONNECTION_GONE, transfer.request.id if transfer.request else "", transfer.id, reason
            )
            transfer.session.tell(event)
            self._end_transfer(transfer, now=0.0, delivered=False)
        if conn.mark is not None:
            conn.mark.conns.discard(conn)
        self.steering.forget(conn)
        self.connections.drop(conn)
