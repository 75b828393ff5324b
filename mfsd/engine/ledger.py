# SPDX-License-Identifier: Apache-2.0
"""The ledger: what hints say, written into the books.

``apply`` takes one hint. It either takes effect as a whole or raises HintError and changes nothing. Nothing here looks
at a clock or decides a level; engine.py does the one, steering.py the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from mfsd.engine.admission import Admission
from mfsd.engine.locating import LOCATE_S, MARKED_S
from mfsd.engine.records import Batch, Connection, Mark, Request, Session, Transfer
from mfsd.engine.watches import exact_endpoints
from mfsd.ground.bands import LEVEL_NEW
from mfsd.ground.model import (
    INF,
    BatchHint,
    CookieSelector,
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
    from collections.abc import Callable, Iterable, Mapping

    from mfsd.engine.books import Books
    from mfsd.engine.carriage import Carriage
    from mfsd.engine.connections import Connections
    from mfsd.engine.delivery import Delivery
    from mfsd.engine.endings import Endings
    from mfsd.engine.records import Arrived, Stream
    from mfsd.engine.settings import LimitsConfig
    from mfsd.engine.watches import Watches
    from mfsd.ground.model import Selector

_TRANSFER: Final = What.TRANSFER


class Ledger:
    """Applies hints to the books, within limits."""

    def __init__(
        self,
        books: Books,
        connections: Connections,
        watches: Watches,
        delivery: Delivery,
        endings: Endings,
        carriage: Carriage,
        limits: LimitsConfig,
    ) -> None:
        self.books = books
        self.connections = connections
        self.watches = watches
        self.delivery = delivery
        self.endings = endings
        self.carriage = carriage
        self.admission = Admission(books, connections.positions, limits)
        self.gathering = False
        """Cancellations that follow each other take effect together, at ``settle`` at the latest."""
        self._cancelled: dict[Transfer, None] = {}
        self._told: dict[Stream, float] = {}
        """How far their streams had been written then, where the worker has said so."""
        self.hear: Callable[[Iterable[Connection], float], None] = lambda _, __: None
        """Takes in what the kernel has told meanwhile, and looks whether these connections are over."""

    def settle(self, now: float) -> None:
        """Have gathered cancellations take effect: each alone would cost a pass over its stream."""
        if self._cancelled:
            ended, told, self._cancelled, self._told = self._cancelled, self._told, {}, {}
            self._cancel(ended, now, told)

    def apply(self, session: Session, hint: Hint, now: float) -> None:
        """Apply one hint. Raises HintError and changes nothing if it can't be applied."""
        if isinstance(hint, TransferHint):
            if self._cancelled:
                self.settle(now)
            self._transfer(session, hint, now)
        elif isinstance(hint, EndHint):
            self._end(session, hint, now)
        else:
            self.settle(now)
            if isinstance(hint, ProgressHint):
                self._progress(session, hint, now)
            elif isinstance(hint, RequestHint):
                self._request(session, hint, now)
            elif isinstance(hint, BatchHint):
                self._batch(session, hint, now)
            elif isinstance(hint, MarkHint):
                self._mark(session, hint, now)

    # --- requests and batches -----------------------------------------------------------------------------------------

    def _request(self, session: Session, hint: RequestHint, now: float) -> None:
        request = session.requests.get(hint.id)
        expires = (hint.deadline if now < hint.deadline < INF else now) + hint.ttl
        requests, transfers = self.books.requests, self.books.transfers
        if request is None or request.completed:
            # What is said to be done ends when its bytes have arrived; its name is free for another one.
            self.admission.bound("request.id", "requests already", len(session.requests), "max_requests_per_session")
            self.admission.room_for("request.id", session, hint.id)
            request = Request(hint.id, session)
            session.requests[hint.id] = request
            self.books.charge(session, 1, len(hint.id))
            requests.add(request, arrival=now, batch=-1)
        requests.put(request, "deadline", hint.deadline)
        requests.put(request, "expires", expires)
        requests.put(request, "compute_until", now + hint.compute_left if hint.compute_left else 0.0)
        if request.transfers:
            rows, until = self.books.rows_of(request), transfers.live("expires")
            transfers.live("deadline")[rows] = np.minimum(hint.deadline, transfers.live("own_deadline")[rows])
            until[rows] = np.maximum(until[rows], expires)
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
        batches.put(batch, "expires", now + self.admission.limits.default_ttl_s)
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
        batches.put(batch, "expires", now + self.admission.limits.default_ttl_s)
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
        self.admission.bound("batch.id", "batches already", len(session.batches), "max_batches_per_session")
        self.admission.room_for("batch.id", session, batch_id)
        batch = Batch(batch_id, session)
        session.batches[batch_id] = batch
        self.books.charge(session, 1, len(batch_id))
        batches = self.books.batches
        expires = now + self.admission.limits.default_ttl_s
        batches.add(batch, arrival=now, layer_since=now, expires=expires, rank=batches.n)
        self.books.arrange_wanted = True
        return batch

    # --- transfers ----------------------------------------------------------------------------------------------------

    @staticmethod
    def no_owner(request_id: str, batch_id: str) -> HintError:
        """The error of a transfer whose owner is not known."""
        name = "transfer.request_id" if request_id or not batch_id else "transfer.batch_id"
        owner = request_id or batch_id
        return HintError(name, f"no request or batch {owner!r} in this session", "announce it before its transfers")

    def look_again(self, session: Session, names: Iterable[str], now: float) -> None:
        """Transfers of these names are announced, perhaps because those that there are have just been lost."""
        before = [t for t in map(session.transfers.get, names) if t is not None]
        if before:
            self.hear(dict.fromkeys(conn for t in before for conn in t.stream.members), now)
            for stream in {t.stream for t in before}:
                self.endings.conclude(stream, now)

    def move(self, session: Session, name: str, selector: Selector, now: float) -> None:
        """A transfer of this name is announced there: one on a socket that was never connected will not come."""
        old = session.transfers.get(name)
        if old is not None and not old.handed_over and self.admission.nowhere(old, selector):
            self.endings.end((old,), now)

    def _transfer(self, session: Session, hint: TransferHint, now: float) -> None:
        if not self.admission.has_room(session, hint.id):
            self.look_again(session, (hint.id,), now)
            self.admission.check_new(session, hint.id, (hint.selector, hint.position))
        request = session.requests.get(hint.request_id) if hint.request_id else None
        batch = session.batches.get(hint.batch_id) if hint.batch_id else None
        if request is None and batch is None and not hint.stage.ownerless:
            raise self.no_owner(hint.request_id, hint.batch_id)
        self.move(session, hint.id, hint.selector, now)
        deadline = hint.deadline
        if request is not None:
            deadline = min(deadline, self.books.requests.get(request, "deadline"))
        expires = (deadline if now < deadline < INF else now) + hint.ttl
        stream = self.carriage.stream_of(
            session, hint.selector, hint.stage, expires, now, ordered=hint.ordered, position=hint.position
        )
        offset = self.books.streams.offset(stream, self.connections.positions.sent_by)
        start, late = self.carriage.begin(stream, hint.size, hint.position, offset, now)
        transfer = Transfer(hint.id, session, hint.stage, request, batch, stream, maybe_late=late)
        stream.queue.append(transfer)
        stream.recast |= deadline < now  # heard late: it may have arrived in time long since
        self.carriage.note(stream, hint.stage)
        self.books.transfers.append(
            transfer,
            (  # in the order of records.TRANSFER_COLUMNS
                hint.stage,
                hint.size,
                start,
                start + hint.size,
                -1 if request is None else request.row,
                -1 if batch is None else batch.row,
                stream.index,
                hint.target_layer,
                deadline,
                hint.deadline,
                hint.hold_until,
                now,
                expires,
                LEVEL_NEW,
                -1,  # seen_layer
                False,  # infeasible
                False,  # given_up
                stream.ordered,
                0.0,  # begun
                LEVEL_NEW,
                0.0,  # told
            ),
        )
        session.transfers[hint.id] = transfer
        if session.lost:
            session.make_good(hint.id, request)
        self.books.charge(session, 1, len(hint.id), transfer=True)
        if request is not None:
            request.transfers.add(transfer)
        if batch is not None:
            batch.transfers.add(transfer)

    # --- ends ---------------------------------------------------------------------------------------------------------

    def _end(self, session: Session, hint: EndHint, now: float) -> None:
        # What is not there has been retired by its bytes, or has expired and its worker was told: nothing to say.
        if hint.what is _TRANSFER:
            self._end_transfer(session, hint, now)
            return
        self.settle(now)
        if hint.what is What.REQUEST:
            request = session.requests.get(hint.id)
            if request is None:
                return
            request.completed = not hint.cancelled
            if hint.cancelled:
                told = self._reopened(session, hint, lambda a: a.request is request)
                streams = {t.stream for t in request.transfers}
                self.endings.forget(request, now, told)
                self._doubt(streams | told.keys())
                return
            self.delivery.hand_over(list(request.transfers), now)
            if session.requests.get(hint.id) is request and not request.transfers:
                self.endings.finish(request, now)
        else:
            batch = session.batches.get(hint.id)
            if batch is not None:
                own = [t for t in batch.transfers if t.request is None]
                if hint.cancelled:
                    told = self._reopened(session, hint, lambda a: a.batch is batch and a.request is None)
                    self._cancel(own, now, told)
                else:
                    self.delivery.hand_over(own, now)
                self.books.strike_batch(batch)

    def _end_transfer(self, session: Session, hint: EndHint, now: float) -> None:
        transfer = session.transfers.get(hint.id)
        if not hint.cancelled:
            if self._cancelled:
                self.settle(now)
            if transfer is not None:
                self.delivery.hand_over((transfer,), now)
        elif transfer is None:
            self.settle(now)
            session.make_good(hint.id)
            self._doubt(self._reopened(session, hint, lambda a: a.id == hint.id))
        else:
            told = self.endings.gaps.told(session, hint)
            if any(self._told.get(stream, at) != at for stream, at in told.items()):
                self.settle(now)  # something was written between the two
            self._cancelled[transfer] = None
            self._told |= told
            if not self.gathering:
                self.settle(now)

    def _cancel(self, transfers: Iterable[Transfer], now: float, told: Mapping[Stream, float]) -> None:
        """The bytes of transfers will not come; ``told``: how far streams had been written, where a worker said so."""
        streams = {t.stream for t in transfers}
        self.endings.end(transfers, now, told=told)
        self._doubt(streams | told.keys())

    def _reopened(self, session: Session, hint: EndHint, which: Callable[[Arrived], bool]) -> dict[Stream, float]:
        """How far a worker says that streams had been written, and what had not been by then is none of these's."""
        told = self.endings.gaps.told(session, hint)
        for stream, at in told.items():
            self.endings.gaps.reopen(stream, which, at)
        return told

    def _doubt(self, streams: Iterable[Stream]) -> None:
        """Transfers were cancelled on these streams: what had been written may have been the next ones'."""
        for stream in streams:
            if stream.recast:
                self.delivery.confirm(stream)
            if stream.debt:
                self.delivery.doubt(stream)

    # --- marks --------------------------------------------------------------------------------------------------------

    def _mark(self, session: Session, hint: MarkHint, now: float) -> None:
        old = session.marks.get(hint.selector)
        if hint.stage is Stage.NONE:
            if old is not None:
                self.endings.unmark(old, now)
            return
        if old is None:
            if len(session.marks) >= self.admission.limits.max_marks_per_session:
                self._forget_a_mark(session, now)
            self.admission.bound(
                "connection.selector",
                "marks already",
                len(session.marks),
                "max_marks_per_session",
                "take back those that are not needed",
            )
        mark = Mark(session, hint.selector, hint.stage, hint.ordered, hint.due_in, hint.gives_way, now)
        self._put_mark(session, mark, now)
        if old is not None:
            # Not before: the kernel knows the selector all the time, so that no new connection is missed.
            self.endings.lift(old, now)

    def _forget_a_mark(self, session: Session, now: float) -> None:
        """Take back the oldest mark that names one connection which is over or never came."""
        idle: Mark | None = None
        for mark in session.marks.values():
            watch = session.watches.get(mark.selector)
            if watch is None:
                nothing = all(c.endpoints is None and not self.connections.table.last_ns[c.slot] for c in mark.conns)
                idle = idle or (mark if nothing and mark.since < now - LOCATE_S else None)
            elif not watch.conns and exact_endpoints(mark.selector) is not None:
                idle = idle or mark
                if watch.seen:
                    idle = mark
                    break
        if idle is not None:
            self.endings.unmark(idle, now)

    def _put_mark(self, session: Session, mark: Mark, now: float) -> None:
        expires = now + self.admission.limits.max_ttl_s
        selector: Selector = mark.selector
        conn: Connection | None = None
        if isinstance(selector, CookieSelector):
            wait_s = MARKED_S if self.connections.sockets.tells else LOCATE_S
            conn = self.connections.of_cookie(selector.cookie, expires, session, wait_s)
        else:
            watch = self.watches.get(session, selector, self.carriage.band_of(mark.stage, mark.due_in), expires, now)
            watch.mark = mark
            for known in list(watch.conns):
                self.carriage.joined(watch, known, None, now)
        session.marks[selector] = mark
        if conn is not None:
            self.carriage.put_on(mark, conn, self.carriage.band_of(mark.stage, mark.due_in), now)
