# SPDX-License-Identifier: Apache-2.0
"""What the engine knows: sessions, requests, batches, transfers and connections, as objects with a row each.

The numbers that policies need live in columns (columns.Dense); the objects carry identity and the links between them.
The books are passive. The ledger writes into them what hints say, delivery strikes out what is done, steering reads.
A *transfer* is the unit of a hint, a *connection* the unit that the kernel can schedule, and a *stream* (streams.py) is
what one session's transfers are intervals of: the bytes of one connection, or of several together.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from mfsd.engine.columns import Deferred, Dense
from mfsd.engine.streams import Stream, Streams

if TYPE_CHECKING:
    from collections.abc import Callable

    from mfsd.model import Endpoints, Event, Selector, Stage

EVENTS_KEPT: Final = 1024
"""Undelivered events per session; older ones are dropped first, since a late warning is worth least."""

TRANSFER_COLUMNS: Final = {
    "stage": "u1",
    "size": "f8",
    "start": "f8",  # offset of the first byte in its stream
    "end": "f8",
    "request": "i4",
    "batch": "i4",
    "stream": "i4",
    "target_layer": "i4",
    "deadline": "f8",
    "created": "f8",
    "expires": "f8",
    "level": "i2",
    "seen_layer": "i4",  # layer of its batch at the last evaluation
    "infeasible": "?",
    "ordered": "?",  # its bytes follow those before it in its stream
}
REQUEST_COLUMNS: Final = {
    "deadline": "f8",
    "arrival": "f8",
    "batch": "i4",
    "compute_until": "f8",  # when its compute ends, as far as known
    "expires": "f8",
    "pruned": "?",
}
BATCH_COLUMNS: Final = {
    "layers": "i4",
    "current_layer": "i4",
    "layer_compute": "f8",
    "layer_since": "f8",  # when the current layer began
    "compute_done": "?",
    "arrival": "f8",
    "rank": "i4",
    "expires": "f8",
}


@dataclass(slots=True, eq=False)
class Session:
    """One client process."""

    name: str
    pid: int = 0
    """In the daemon's pid namespace, on the kernel's word; 0: unknown."""
    uid: int = -1
    """On the kernel's word; -1: unknown."""
    maker: object = None
    """Who opened it, and alone may use it."""
    requests: dict[str, Request] = field(default_factory=dict)
    batches: dict[str, Batch] = field(default_factory=dict)
    transfers: dict[str, Transfer] = field(default_factory=dict)
    streams: dict[Selector, Stream] = field(default_factory=dict)
    """What its transfers are intervals of, by what names it."""
    watches: dict[Selector, Watch] = field(default_factory=dict)
    marks: dict[Selector, Mark] = field(default_factory=dict)
    events: deque[Event] = field(default_factory=lambda: deque(maxlen=EVENTS_KEPT))
    wake: Callable[[], None] | None = None
    """Called when an event was added; the stream that serves the session sets it."""
    seen: float = 0.0
    """Time of the last hint."""
    over: bool = False
    """Its process has ended; what TCP still delivers of it is waited for."""

    def tell(self, event: Event) -> None:
        """Queue an event for the worker."""
        self.events.append(event)
        if self.wake is not None:
            self.wake()


@dataclass(slots=True, eq=False)
class Request:
    """A request; numbers in REQUEST_COLUMNS."""

    id: str
    session: Session
    batch: Batch | None = None
    transfers: set[Transfer] = field(default_factory=set)
    completed: bool = False
    """The worker said that all its bytes have been handed over."""
    delivered_at: float = 0.0
    """When its last byte so far was seen delivered; 0: none yet."""
    row: int = -1


@dataclass(slots=True, eq=False)
class Batch:
    """Requests of one forward pass; numbers in BATCH_COLUMNS."""

    id: str
    session: Session
    requests: set[Request] = field(default_factory=set)
    transfers: set[Transfer] = field(default_factory=set)
    row: int = -1


@dataclass(slots=True, eq=False)
class Transfer:
    """Bytes of one hint; numbers in TRANSFER_COLUMNS."""

    id: str
    session: Session
    stage: Stage
    own_deadline: float
    request: Request | None
    batch: Batch | None
    stream: Stream
    handed_over: bool = False
    """The worker said that all its bytes have been written."""
    maybe_late: bool = False
    """As many bytes as it has had just gone without a hint when it was announced: perhaps they were its."""
    row: int = -1


@dataclass(slots=True, eq=False)
class Mark:
    """A static stage for the connections of a selector."""

    session: Session
    selector: Selector
    stage: Stage
    ordered: bool = True
    conns: set[Connection] = field(default_factory=set)


@dataclass(slots=True, eq=False)
class Watch:
    """A selector that stays true for connections still to come (watches.py)."""

    session: Session
    selector: Selector
    since: float
    band: int
    """Where its connections begin."""
    expires: float = 0.0
    mark: Mark | None = None
    stream: Stream | None = None
    seen: bool = False
    """It has matched something."""
    looked: bool = False
    """The connections that were open when it was opened have been looked for."""
    conns: set[Connection] = field(default_factory=set)

    @property
    def stream_in_use(self) -> bool:
        """Transfers are announced on it."""
        return self.stream is not None and bool(self.stream.queue)


@dataclass(slots=True, eq=False)
class Connection:
    """One slot of the flow table."""

    slot: int
    cookie: int
    endpoints: Endpoints | None
    lane: int
    here: bool = False
    """Its socket is in the daemon's network namespace, so that TCP can be asked."""
    uid: int = -1
    pid: int = 0
    streams: set[Stream] = field(default_factory=set)
    watches: set[Watch] = field(default_factory=set)
    marks: set[Mark] = field(default_factory=set)
    band: int = 0
    expires: float = 0.0
    promotions: int = 0
    rescues: int = 0


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


@dataclass(slots=True)
class Books:
    """All that the daemon knows, for all devices of the host."""

    transfers: Deferred[Transfer] = field(default_factory=lambda: Deferred(TRANSFER_COLUMNS))
    requests: Dense[Request] = field(default_factory=lambda: Dense(REQUEST_COLUMNS))
    batches: Dense[Batch] = field(default_factory=lambda: Dense(BATCH_COLUMNS))
    streams: Streams = field(default_factory=Streams)
    sessions: dict[str, Session] = field(default_factory=dict)
    counters: Counters = field(default_factory=Counters)
    arrange_wanted: bool = False
    """A batch arrived or departed: the inter-request decision is due."""

    def join(self, request: Request, batch: Batch) -> None:
        """Make a request a member of a batch, and of no other."""
        self.leave(request)
        request.batch = batch
        batch.requests.add(request)
        self.requests.put(request, "batch", batch.row)
        for transfer in request.transfers:
            transfer.batch = batch
            batch.transfers.add(transfer)
            self.transfers.put(transfer, "batch", batch.row)
        self.arrange_wanted = True

    def leave(self, request: Request) -> None:
        """Take a request out of its batch, if it has one."""
        if request.batch is None:
            return
        request.batch.requests.discard(request)
        request.batch.transfers -= request.transfers
        self.requests.put(request, "batch", -1)
        for transfer in request.transfers:
            transfer.batch = None
            self.transfers.put(transfer, "batch", -1)
        request.batch = None
        self.arrange_wanted = True

    def strike_request(self, request: Request) -> None:
        """Remove a request that has no transfers left."""
        self.leave(request)
        request.session.requests.pop(request.id, None)
        moved = self.requests.remove(request)
        if moved is not None:
            for transfer in moved.transfers:
                self.transfers.put(transfer, "request", moved.row)

    def strike_batch(self, batch: Batch) -> None:
        """Remove a batch; its members and transfers live on without one. No error when it is gone already."""
        if batch.session.batches.pop(batch.id, None) is None:
            return
        for request in list(batch.requests):
            self.leave(request)
        for transfer in batch.transfers:
            transfer.batch = None
            self.transfers.put(transfer, "batch", -1)
        moved = self.batches.remove(batch)
        if moved is not None:
            for transfer in moved.transfers:
                self.transfers.put(transfer, "batch", moved.row)
            for request in moved.requests:
                self.requests.put(request, "batch", moved.row)
        self.arrange_wanted = True

    def strike_transfer(self, transfer: Transfer) -> None:
        """Remove a transfer from the columns and from all that names it, but for its stream."""
        transfer.session.transfers.pop(transfer.id, None)
        if transfer.batch is not None:
            transfer.batch.transfers.discard(transfer)
        if transfer.request is not None:
            transfer.request.transfers.discard(transfer)
        self.transfers.remove(transfer)
