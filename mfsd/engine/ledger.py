# SPDX-License-Identifier: Apache-2.0
"""The ledger: what hints say, written into the books.

``apply`` takes one hint. It either takes effect as a whole or raises HintError and changes nothing. Nothing here looks
at a clock or decides a level; engine.py does the one, steering.py the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mfsd.bands import LEVEL_NEW
from mfsd.engine.books import Batch, Books, Connection, Mark, Request, Session, Transfer
from mfsd.model import (
    INF,
    BatchHint,
    EndHint,
    Hint,
    HintError,
    MarkHint,
    ProgressHint,
    RequestHint,
    Stage,
    TransferHint,
    What,
)

if TYPE_CHECKING:
    from collections.abc import Sized

    from mfsd.engine.connections import Connections
    from mfsd.engine.delivery import Delivery
    from mfsd.engine.settings import LimitsConfig


class Ledger:
    """Applies hints to the books, within limits."""

    def __init__(self, books: Books, connections: Connections, delivery: Delivery, limits: LimitsConfig) -> None:
        self.books = books
        self.connections = connections
        self.delivery = delivery
        self.limits = limits

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

    # --- requests and batches -----------------------------------------------------------------------------------------

    def _request(self, session: Session, hint: RequestHint, now: float) -> None:
        request = session.requests.get(hint.id)
        expires = max(hint.deadline, now) + hint.ttl
        requests, transfers = self.books.requests, self.books.transfers
        if request is None:
            self._bound("request.id", "requests already", session.requests, "max_requests_per_session")
            request = Request(hint.id, session)
            session.requests[hint.id] = request
            requests.add(request, arrival=now, batch=-1)
        requests.put(request, "deadline", hint.deadline)
        requests.put(request, "expires", expires)
        requests.put(request, "compute_until", now + hint.compute_left if hint.compute_left else 0.0)
        for transfer in request.transfers:
            transfers.put(transfer, "deadline", min(hint.deadline, transfer.own_deadline))
            transfers.put(transfer, "expires", max(transfers.get(transfer, "expires"), expires))
        if hint.batch_id and (request.batch is None or request.batch.id != hint.batch_id):
            batch = session.batches.get(hint.batch_id) or self._new_batch(session, hint.batch_id, now)
            self.books.join(request, batch)
        elif request.batch is not None:
            self.books.arrange_wanted = True

    def _batch(self, session: Session, hint: BatchHint, now: float) -> None:
        batch = session.batches.get(hint.id) or self._new_batch(session, hint.id, now)
        batches = self.books.batches
        batches.put(batch, "layers", hint.layers)
        batches.put(batch, "layer_compute", hint.layer_compute)
        batches.put(batch, "expires", now + self.limits.default_ttl_s)
        self._reach(batch, hint.current_layer, now)
        members = {r for r in map(session.requests.get, hint.request_ids) if r is not None}
        for request in batch.requests - members:
            self.books.leave(request)
        for request in members - batch.requests:
            self.books.join(request, batch)
        self.books.arrange_wanted = True

    def _progress(self, session: Session, hint: ProgressHint, now: float) -> None:
        batch = session.batches.get(hint.batch_id)
        if batch is None:
            request = session.requests.get(hint.batch_id)
            if request is None:
                raise HintError("progress.batch_id", f"no batch or request {hint.batch_id!r}", "announce it first")
            batch = request.batch
            if batch is None:
                # A request that runs alone is its own batch.
                batch = self._new_batch(session, hint.batch_id, now)
                self.books.join(request, batch)
        batches = self.books.batches
        batches.put(batch, "expires", now + self.limits.default_ttl_s)
        self._reach(batch, hint.current_layer, now)
        if hint.compute_done and not batches.get(batch, "compute_done"):
            batches.put(batch, "compute_done", value=True)
            self.books.arrange_wanted = True

    def _reach(self, batch: Batch, layer: int, now: float) -> None:
        """A batch computes this layer now. Layers never go back."""
        if layer > self.books.batches.get(batch, "current_layer"):
            self.books.batches.put(batch, "current_layer", layer)
            self.books.batches.put(batch, "layer_since", now)

    def _new_batch(self, session: Session, batch_id: str, now: float) -> Batch:
        self._bound("batch.id", "batches already", session.batches, "max_batches_per_session")
        batch = Batch(batch_id, session)
        session.batches[batch_id] = batch
        batches = self.books.batches
        expires = now + self.limits.default_ttl_s
        batches.add(batch, arrival=now, layer_since=now, expires=expires, rank=batches.n)
        self.books.arrange_wanted = True
        return batch

    # --- transfers ----------------------------------------------------------------------------------------------------

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
            deadline = min(deadline, float(self.books.requests.get(request, "deadline")))
        expires = (deadline if now < deadline < INF else now) + hint.ttl
        conns = self.connections.match(hint.selector, expires)
        transfer = Transfer(hint.id, session, hint.selector, hint.stage, hint.deadline, request, batch, [], hint.size)
        transfer.target_layer, transfer.created, transfer.expires = hint.target_layer, now, expires
        session.transfers[hint.id] = transfer.parts
        if conns:
            self._spread(transfer, conns, deadline)
        else:
            self._add_part(transfer, float(hint.size), deadline, None)
            self.books.waiting.add(transfer, now)

    def found(self, rule: Transfer | Mark, conns: list[Connection], now: float) -> None:
        """The sockets of a waiting rule have appeared. A transfer's row is made anew, on them."""
        if isinstance(rule, Mark):
            for conn in conns:
                self.connections.set_mark(conn, rule, now)
            return
        transfers = self.books.transfers
        deadline, rule.expires = float(transfers.get(rule, "deadline")), float(transfers.get(rule, "expires"))
        transfers.remove(rule)
        rule.parts.clear()
        self._spread(rule, conns, deadline)

    def _spread(self, first: Transfer, conns: list[Connection], deadline: float) -> None:
        """Put a transfer on its connections, in equal shares."""
        share = first.total / len(conns)
        self._add_part(first, share, deadline, conns[0])
        for conn in conns[1:]:
            self._add_part(first.another(), share, deadline, conn)

    def _add_part(self, part: Transfer, size: float, deadline: float, conn: Connection | None) -> None:
        """Add a row, and queue it at the end of its connection's announced stream."""
        start, slot = 0.0, -1
        if conn is not None:
            start, slot = self.connections.announce(conn, part, size), conn.slot
            part.conn = conn
        request, batch = part.request, part.batch
        self.books.transfers.append(
            part,
            (  # in the order of books.TRANSFER_COLUMNS
                part.stage,
                size,
                start,
                start + size,
                -1 if request is None else self.books.requests.row(request),
                -1 if batch is None else self.books.batches.row(batch),
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
            self.delivery.hand_over(session.transfers.get(hint.id, ()), now, cancelled=hint.cancelled)
        elif hint.what is What.REQUEST:
            request = session.requests.get(hint.id)
            if request is None:
                raise HintError("completion.request_id", f"no request {hint.id!r}", "it may have expired")
            request.completed = not hint.cancelled
            self.delivery.hand_over(request.transfers, now, cancelled=hint.cancelled)
            if session.requests.get(hint.id) is request and not request.transfers:
                self.delivery.finish(request, now, cancelled=hint.cancelled)
        else:
            batch = session.batches.get(hint.id)
            if batch is None:
                raise HintError("completion.batch_id", f"no batch {hint.id!r}", "it may have expired")
            self.delivery.end_batch(batch, now, cancelled=hint.cancelled)

    # --- marks --------------------------------------------------------------------------------------------------------

    def _mark(self, session: Session, hint: MarkHint, now: float) -> None:
        old = session.marks.get(hint.selector)
        if old is not None:
            self.delivery.unmark(old, now)
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
            self.connections.set_mark(conn, mark, now)
        if not conns:
            self.books.waiting.add(mark, now)
