# SPDX-License-Identifier: Apache-2.0
"""What the engine knows: sessions, requests, batches, transfers and connections, as objects with a row each.

The numbers that policies need live in columns (columns.Dense); the objects (records.py) carry identity and links. The
books are passive. The ledger writes into them what hints say, delivery strikes out what is done, steering reads.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np

from mfsd.engine.columns import Deferred, Dense
from mfsd.engine.records import (
    BATCH_COLUMNS,
    ENTRY,
    REQUEST_COLUMNS,
    TRANSFER_COLUMNS,
    Batch,
    Request,
    Session,
    Transfer,
    User,
)
from mfsd.engine.streams import Streams
from mfsd.engine.tally import Tally
from mfsd.ground.model import INF

if TYPE_CHECKING:
    from collections.abc import Collection

    import numpy.typing as npt

    from mfsd.engine.recorder import Recorder

FEW: Final = 256
"""Transfers that are looked up one by one: a look at all takes as long."""


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
    demotions: int = 0
    ended_no_deadline: int = 0

    def finished(self, deadline: float, at: float) -> None:
        """A request is over, ``at`` inf: it is lost."""
        if deadline == INF:
            self.ended_no_deadline += 1
        elif at <= deadline:
            self.deadlines_met += 1
        else:
            self.deadlines_missed += 1


@dataclass(slots=True)
class Books:
    """All that the daemon knows, for all devices of the host."""

    transfers: Deferred[Transfer] = field(default_factory=lambda: Deferred(TRANSFER_COLUMNS))
    requests: Dense[Request] = field(default_factory=lambda: Dense(REQUEST_COLUMNS))
    batches: Dense[Batch] = field(default_factory=lambda: Dense(BATCH_COLUMNS))
    streams: Streams = field(default_factory=Streams)
    sessions: dict[str, Session] = field(default_factory=dict)
    users: dict[int, User] = field(default_factory=dict)
    everybody: User = field(default_factory=lambda: User(-1))
    """All users added up."""
    counters: Counters = field(default_factory=Counters)
    tally: Tally = field(default_factory=Tally)
    recorders: list[Recorder] = field(default_factory=list)
    """Who takes down what happens now."""
    arrange_wanted: bool = False
    """A batch arrived or departed: the inter-request decision is due."""

    def user(self, uid: int) -> User:
        """What a user takes."""
        found = self.users.get(uid)
        if found is None:
            self.users = {u: known for u, known in self.users.items() if not known.idle}
            found = self.users[uid] = User(uid)
        return found

    @property
    def shared(self) -> bool:
        """Several users have something here."""
        return sum(not user.idle for user in self.users.values()) > 1

    @property
    def without_deadline(self) -> int:
        """How many requests have none."""
        return int(np.isinf(self.requests.live("deadline")).sum())

    def charge(self, session: Session, count: int, length: int, *, transfer: bool = False) -> None:
        """Put so many entries, with names of that length together, on the account of a session's user.

        Below 0: take them off.
        """
        user, everybody, size = session.user, self.everybody, count * ENTRY + length
        user.bytes += size
        everybody.bytes += size
        if transfer:
            user.transfers += count
            everybody.transfers += count

    def join(self, request: Request, batch: Batch) -> None:
        """Make a request a member of a batch, and of no other."""
        self.leave(request)
        request.batch = batch
        batch.requests.add(request)
        self.requests.put(request, "batch", batch.row)
        self.arrange_wanted = True

    def rows_of(self, request: Request) -> npt.NDArray[np.int64]:
        """Of its transfers, in any order."""
        return self._few_or(request.transfers, "request", request.row)

    def _few_or(self, transfers: Collection[Transfer], column: str, value: int) -> npt.NDArray[np.int64]:
        """Rows of the transfers that have this value in a column: one by one, or, of very many, by one look at all."""
        if len(transfers) <= FEW:
            return self.transfers.rows(transfers)
        return np.flatnonzero(self.transfers.live(column) == value)

    def leave(self, request: Request) -> None:
        """Take a request out of its batch, if it has one."""
        if request.batch is None:
            return
        request.batch.requests.discard(request)
        self.requests.put(request, "batch", -1)
        request.batch = None
        self.arrange_wanted = True

    def strike_request(self, request: Request) -> None:
        """Remove a request that has no transfers left. No error when it is gone already."""
        if request.row < 0:
            return
        self.leave(request)
        if request.session.requests.get(request.id) is request:
            del request.session.requests[request.id]
        self.charge(request.session, -1, -len(request.id))
        moved = self.requests.remove(request)
        if moved is not None and moved.transfers:
            self.transfers.live("request")[self._few_or(moved.transfers, "request", self.requests.n)] = moved.row

    def strike_batch(self, batch: Batch) -> None:
        """Remove a batch; its members and transfers live on without one. No error when it is gone already."""
        if batch.session.batches.pop(batch.id, None) is None:
            return
        self.charge(batch.session, -1, -len(batch.id))
        for request in list(batch.requests):
            self.leave(request)
        if batch.transfers:
            self.transfers.live("batch")[self._few_or(batch.transfers, "batch", batch.row)] = -1
            for transfer in batch.transfers:
                transfer.batch = None
        moved = self.batches.remove(batch)
        if moved is not None:
            if moved.transfers:
                self.transfers.live("batch")[self._few_or(moved.transfers, "batch", self.batches.n)] = moved.row
            for request in moved.requests:
                self.requests.put(request, "batch", moved.row)
        self.arrange_wanted = True

    def strike_transfers(self, transfers: Collection[Transfer]) -> None:
        """Remove transfers from the columns and from all that names them, but for their streams."""
        owned: defaultdict[tuple[Session, Request | None, Batch | None], list[Transfer]] = defaultdict(list)
        for transfer in transfers:
            owned[transfer.session, transfer.request, transfer.batch].append(transfer)
        for (session, request, batch), some in owned.items():
            known, length = session.transfers, 0
            for transfer in some:
                name = transfer.id
                length += len(name)
                if known.get(name) is transfer:  # else its name is another one's by now
                    del known[name]
            self.charge(session, -len(some), -length, transfer=True)
            for owner in (request, batch):
                if owner is not None:
                    owner.transfers.difference_update(some)
        self.transfers.remove_all(transfers)
