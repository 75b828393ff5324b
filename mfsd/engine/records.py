# SPDX-License-Identifier: Apache-2.0
"""What the engine's books consist of: sessions, requests, batches, transfers, streams, connections, and their links.

The numbers that policies need live in columns (columns.Dense); these objects carry identity. A *transfer* is the unit
of a hint, a *connection* the unit that the kernel can schedule, and a *stream* (streams.py) is what one session's
transfers are intervals of: the bytes of one connection, or of several together.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from mfsd.ground.model import INF, Stage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from mfsd.ground.model import Endpoints, Event, Selector

EVENTS_KEPT: Final = 1024
"""Undelivered events per session; older ones are dropped first, since a late warning is worth least."""

LOST_KEPT: Final = EVENTS_KEPT
"""Transfers per session that are lost, and may yet be announced again."""

TRANSFER_COLUMNS: Final = {
    "stage": "u1",
    "size": "f8",
    "start": "f8",  # offset of the first byte in its stream
    "end": "f8",
    "request": "i4",
    "batch": "i4",  # that its hint named; else it is in its request's
    "stream": "i8",  # what is looked up by in all rows at each tick; others would be widened each time
    "target_layer": "i4",
    "deadline": "f8",  # its own or its request's, whichever comes first
    "own_deadline": "f8",
    "hold_until": "f8",
    "created": "f8",
    "expires": "f8",
    "level": "i2",
    "seen_layer": "i4",  # layer of its batch at the last evaluation
    "infeasible": "?",
    "given_up": "?",  # infeasible at some time by a learnt rate: audit.py
    "ordered": "?",  # its bytes follow those before it in its stream
    "begun": "f8",  # when its first byte left, to within a tick; 0: not yet
    "first_level": "i2",  # what the policy decided first
    "told": "f8",  # when its worker was last told that it outlives its time to live; 0: it was not
}
REQUEST_COLUMNS: Final = {
    "deadline": "f8",  # inf: none
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

ENTRY: Final = 640
"""Bytes that a request, a batch or a transfer takes besides its name, about."""


@dataclass(slots=True, eq=False)
class User:
    """What the sessions of one user take together of what all share."""

    uid: int
    """-1: of whom nothing is known."""
    sessions: int = 0
    connections: int = 0
    selectors: int = 0
    transfers: int = 0
    bytes: int = 0

    @property
    def idle(self) -> bool:
        """It takes nothing."""
        return not (self.sessions or self.connections or self.selectors or self.bytes)


@dataclass(slots=True, eq=False)
class Session:
    """One client process."""

    name: str
    pid: int = 0
    """In the daemon's pid namespace, on the kernel's word; 0: unknown."""
    uid: int = -1
    """On the kernel's word; -1: unknown."""
    only: int = -1
    """User whose connections alone it may name; -1: anybody's."""
    user: User = field(default_factory=lambda: User(-1))
    maker: object = None
    """Who opened it, and alone may use it; None: nobody whom the kernel vouches for."""
    lasting: bool = False
    """An operator's, of single calls of one process after the other: it ends when nothing that it said is alive."""
    attached: int = 0
    """Streams of the API that are open for it."""
    kept: bool = False
    """It has had one, so that the end of the last one is that of its client."""
    requests: dict[str, Request] = field(default_factory=dict)
    batches: dict[str, Batch] = field(default_factory=dict)
    transfers: dict[str, Transfer] = field(default_factory=dict)
    lost: OrderedDict[str, Request] = field(default_factory=OrderedDict)
    """Names of transfers that its requests have lost, the latest LOST_KEPT, which may yet be announced again."""
    streams: dict[Selector, Stream] = field(default_factory=dict)
    """What its transfers are intervals of, by what names it."""
    watches: dict[Selector, Watch] = field(default_factory=dict)
    marks: dict[Selector, Mark] = field(default_factory=dict)
    events: deque[Event] = field(default_factory=lambda: deque(maxlen=EVENTS_KEPT))
    wake: Callable[[], None] | None = None
    """Called when an event was added; the stream that serves the session sets it."""
    seen: float = 0.0
    """Time of the last hint."""
    heard: int = 0
    """Number of the last message of a stream that took effect."""
    over: bool = False
    """Its process has ended; what TCP still delivers of it is waited for."""

    def lose(self, transfer: Transfer) -> None:
        """One of its transfers will never be delivered: its request misses its deadline, unless it is made good."""
        if transfer.request is not None:
            self.lost[transfer.id] = transfer.request
            transfer.request.lost += 1
            if len(self.lost) > LOST_KEPT:
                self.lost.popitem(last=False)

    def make_good(self, name: str, request: Request | None = None) -> None:
        """A transfer of this name is announced again, for ``request``; None: it isn't wanted any more.

        No error when none was lost.
        """
        lost_by = self.lost.pop(name, None)
        if lost_by is not None and request in (None, lost_by):
            lost_by.lost -= 1

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
    lost: int = 0
    """Transfers that will never be delivered, unless they are announced again."""
    row: int = -1


@dataclass(slots=True, eq=False)
class Batch:
    """Requests of one forward pass; numbers in BATCH_COLUMNS."""

    id: str
    session: Session
    requests: set[Request] = field(default_factory=set)
    transfers: set[Transfer] = field(default_factory=set)
    """Those that named it; those of its requests are in it without."""
    row: int = -1


@dataclass(slots=True, eq=False)
class Transfer:
    """Bytes of one hint; numbers in TRANSFER_COLUMNS."""

    id: str
    session: Session
    stage: Stage
    request: Request | None
    batch: Batch | None
    """That its hint named."""
    stream: Stream
    handed_over: bool = False
    """The worker said that all its bytes have been written."""
    passed: bool = False
    """Its worker has said that it stands behind its end."""
    left: bool = False
    """Its worker has ended and not said so: what had been written by then is all there will be."""
    maybe_late: bool = False
    """As many bytes as it has had just gone without a hint when it was announced: perhaps they were its."""
    path: tuple[tuple[float, int], ...] = ()
    """(when, level) of each later decision; the latest ones."""
    rescues: int = 0
    """Of its connections, while it was the first of its stream."""
    row: int = -1

    @property
    def computed_in(self) -> Batch | None:
        """The batch that its hint named, or else its request's."""
        return self.request.batch if self.batch is None and self.request is not None else self.batch


class Arrived(NamedTuple):
    """A transfer that has arrived by what its stream has moved; its worker has not said that all was written."""

    id: str
    request: Request | None
    batch: Batch | None
    start: float
    end: float


class Ended(NamedTuple):
    """A stream whose one connection is over, should more be said of that; it has no index any more."""

    stream: Stream
    offset: float
    """How far it came."""
    parted: float


@dataclass(slots=True, eq=False)
class Mark:
    """A static stage for the connections of a selector."""

    session: Session
    selector: Selector
    stage: Stage
    ordered: bool = True
    due_in: float = INF
    gives_way: bool = False
    since: float = 0.0
    conns: set[Connection] = field(default_factory=set)
    renew_at: float = 0.0
    """When its connections, and its watch, are renewed next."""


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
    looked_back: bool = False
    """And those that had just ended."""
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
    user: User = field(default_factory=lambda: User(-1))
    """Whose hints made it known: it counts for that one."""
    only: int = -1
    """It may be this user's alone, though nobody knows yet whose it is."""
    here: bool = False
    """Its socket is in the daemon's network namespace, so that TCP can be asked."""
    passing: bool = False
    """It is matched by its addresses, too: routed through this host, its packets have lost their socket."""
    uid: int = -1
    pid: int = 0
    streams: set[Stream] = field(default_factory=set)
    watches: set[Watch] = field(default_factory=set)
    marks: set[Mark] = field(default_factory=set)
    tenant: int = 0
    """Index of whose it is (tenants.py)."""
    band: int = 0
    expires: float = 0.0
    promotions: int = 0
    rescues: int = 0
    missing: bool = False
    """TCP knew nothing of its socket when it was asked last."""
    datagrams: bool = False
    """It is none of TCP's, as far as anybody has looked."""


MEMBER_COLUMNS: Final = {
    "slot": "i4",
    "stream": "i4",
    "joined": "f8",  # position of the connection when it became a member
}


@dataclass(slots=True, eq=False)
class Member:
    """A connection as part of a stream; numbers in MEMBER_COLUMNS."""

    stream: Stream
    conn: Connection
    joined: float
    """As in its column."""
    row: int = -1


class Queue(dict["Transfer", None]):
    """Transfers in an order, any of which is taken out without a look at the others."""

    __slots__ = ()

    @property
    def first(self) -> Transfer:
        """Raises StopIteration when it is empty."""
        return next(iter(self))

    @property
    def last(self) -> Transfer:
        """Raises StopIteration when it is empty."""
        return next(reversed(self))

    def append(self, transfer: Transfer) -> None:
        """Behind all others."""
        self[transfer] = None

    def extend(self, transfers: Iterable[Transfer]) -> None:
        """Behind all others, in this order."""
        self.update(dict.fromkeys(transfers))

    def remove(self, transfers: Iterable[Transfer]) -> None:
        """Take these out."""
        for transfer in transfers:
            self.pop(transfer, None)


@dataclass(slots=True, eq=False)
class Stream:
    """See the module. ``index`` is its place in the columns of Streams, for as long as it is open."""

    session: Session
    selector: Selector
    """What names it."""
    watch: Watch | None
    """What brings it new members; None: it is one connection, for good."""
    index: int
    queue: Queue = field(default_factory=Queue)
    """Unfinished transfers in byte order."""
    announced: float = 0.0
    """End offset of the last announced byte."""
    members: dict[Connection, Member] = field(default_factory=dict)
    ordered: bool = True
    """False: the bytes of its transfers are interleaved."""
    before: float = 0.0
    """Bytes that had been written on its first connection when it was opened, none of which it knows."""
    debt: float = 0.0
    """Size of a transfer on it that was perhaps announced after its bytes had gone (Transfer.maybe_late)."""
    stage: Stage = Stage.NONE
    """Of the transfer that was announced last."""
    arrived: tuple[Arrived, ...] = ()
    """The latest ones, should they turn out to have been cancelled before all of them was written."""
    over: bool = False
    """Its one connection is over."""
    shift: float = 0.0
    """From the position of the member that has gone last to an offset."""
    closed_at: float = 0.0
    """When its connection was closed by its worker; 0: it was not."""
    recast: bool = False
    """What is known by now to have arrived may have done so before the last run."""
    arranged: bool = False
    """Its transfers stand between those of other selectors of the same connections."""
    refused: bool = False
    """The last one that was to be a member could not be connected."""


def by_stream(transfers: Iterable[Transfer]) -> dict[Stream, list[Transfer]]:
    """Each stream's own."""
    out: defaultdict[Stream, list[Transfer]] = defaultdict(list)
    for transfer in transfers:
        out[transfer.stream].append(transfer)
    return out
