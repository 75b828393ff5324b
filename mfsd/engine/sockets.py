# SPDX-License-Identifier: Apache-2.0
"""What the engine needs to know of this host's sockets (mfsd.daemon.sockets.HostSockets), and what it is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mfsd.ground.model import Endpoints, Maker, Selector, TupleSelector

ON_THE_WAY_S: Final = 0.25
"""How long a hint is on its way at most: whatever has moved since may be its."""


@dataclass(frozen=True, slots=True)
class Socket:
    """A connection of this host."""

    cookie: int
    """SO_COOKIE."""
    endpoints: Endpoints
    """As the network device sees them."""
    uid: int
    """Of the process that made it; -1: unknown."""
    pid: int
    """That process, in the daemon's pid namespace; 0: unknown."""
    here: bool
    """It is in the daemon's network namespace, so that TCP's word on it can be had."""
    tid: int = 0
    """The thread that made it; 0: unknown."""
    cgroup: int = 0
    """Id of that one's cgroup (v2); 0: unknown."""


class Progress(Protocol):
    """TCP's own account of a socket (mfsd.host.sockets.TcpProgress)."""

    @property
    def bytes_acked(self) -> int:
        """Payload that the peer has acknowledged, plus 1 for a SYN of ours and 1 for an acknowledged FIN."""
        ...

    @property
    def unsent_plus_unacked(self) -> int:
        """Payload written by the process and not yet acknowledged, plus 1 for an unacknowledged FIN."""
        ...

    @property
    def notsent(self) -> int:
        """Of these, bytes not yet handed to the qdisc."""
        ...

    @property
    def total_retrans(self) -> int:
        """Segments sent again so far."""
        ...

    @property
    def rto_us(self) -> int:
        """Retransmission timeout."""
        ...

    @property
    def last_ack_ms(self) -> int:
        """Since the last acknowledgement came."""
        ...

    @property
    def last_sent_ms(self) -> int:
        """Since data were sent last."""
        ...

    @property
    def busy_us(self) -> int:
        """For how long there has been something to send or to be acknowledged; cumulative, as are the next two."""
        ...

    @property
    def rwnd_limited_us(self) -> int:
        """Of it with the receiver's window closed."""
        ...

    @property
    def sndbuf_limited_us(self) -> int:
        """Of it with too small a send buffer."""
        ...

    @property
    def app_limited(self) -> bool:
        """The process gave too little when the rate was measured last."""
        ...

    @property
    def slow_start(self) -> bool:
        """No loss or delay has ended it yet."""
        ...

    @property
    def queued(self) -> int:
        """Memory of packets that are below TCP and have not left the host's queues."""
        ...

    @property
    def holes(self) -> bool:
        """Something was lost or overtaken, so that bytes_acked stands still until it has arrived, and then jumps."""
        ...

    @property
    def window_full(self) -> bool:
        """Nothing new is sent until something is acknowledged: too little of the congestion window is free."""
        ...


@dataclass(frozen=True, slots=True)
class Established:
    """A connection was made that a rule names, or that was hinted before."""

    socket: Socket
    slot: int | None
    """The kernel has taken this slot for it, or found it there; None: neither."""
    active: bool
    """It was opened from here."""


@dataclass(frozen=True, slots=True)
class Closed:
    """A connection with a slot is over."""

    cookie: int
    acked: int
    """As Progress.bytes_acked, at the end."""
    clean: bool
    """All that was written has been acknowledged, the FIN included."""
    active: bool
    """As in Established."""
    at: float
    """When, s; what it had acknowledged was so by then."""


@dataclass(frozen=True, slots=True)
class End:
    """How a connection ended that had no slot, so that nobody was told."""

    socket: Socket
    acked: int
    clean: bool
    active: bool
    at: float
    """The four as in Closed."""


@dataclass(frozen=True, slots=True)
class Found:
    """Answer to ``look``: the connections that a selector names, open already."""

    selector: Selector
    sockets: Sequence[Socket] | None
    """None: the search has failed, and is to be tried again."""
    ended: Sequence[End] = ()
    """All those that ended since ON_THE_WAY_S before ``look`` and had no slot, whatever the selector."""


Event = Established | Closed | Found


class Sockets(Protocol):
    """The kernel's knowledge. Nothing here takes longer the more sockets the host has, and nothing raises OSError."""

    @property
    def tells(self) -> bool:
        """The kernel reports connections by itself. False: it has to be asked, by ``look``, again and again."""
        ...

    def events(self) -> Sequence[Event]:
        """What has happened since the last call, in order."""
        ...

    def by_cookie(self, cookie: int) -> Socket | None:
        """A connection by its cookie; None if there is none (yet), or nobody can tell without a search."""
        ...

    def end_of(self, cookie: int) -> End | None:
        """How a connection has ended lately; None: it has not, or nobody knows."""
        ...

    def datagram(self, cookie: int) -> bool | None:
        """A socket that is none of TCP's has this cookie. None: that is being found out, ask again."""
        ...

    def exact(self, selector: TupleSelector) -> Socket | None:
        """The connection that an exact selector names; None if it isn't in the daemon's network namespace."""
        ...

    def sends(self, endpoints: Endpoints, uid: int) -> bool:
        """A socket that is no connection (UDP) and that ``uid`` made sends from there, in our network namespace."""
        ...

    def user(self, socket: Socket) -> int:
        """Whose a TCP socket in our network namespace is now; -1: nobody knows."""
        ...

    def process(self, number: int, teller: int) -> int:
        """The process that another one calls by this number: a pid namespace of its own counts otherwise."""
        ...

    def descends(self, pid: int, ancestor: int) -> bool:
        """A process is another one, or was started by it or by one that descends from it, as far as is known."""
        ...

    def made_by(self, socket: Socket, maker: Maker) -> bool:
        """Somebody of that description has made it, as far as is known."""
        ...

    def look(self, selectors: Sequence[Selector]) -> None:
        """Search for connections that are open already; the answer comes among the events.

        Those that name processes are answered again, unasked, when there are more of these.
        """
        ...

    def progress(self, sockets: Sequence[tuple[int, Endpoints]]) -> Mapping[int, Progress | None] | None:
        """TCP's word by cookie; None: it is over, and all was acknowledged (TIME_WAIT). Absent: it is gone.

        Instead of all that None: the kernel can't be asked now, and nothing is known.
        """
        ...

    def watch(self, selector: Selector, uid: int, band: int, lanes: int, expires_ns: int) -> None:
        """From now on put connections that the selector names and ``uid`` (-1: anybody) made into a band at once.

        Call again to change band or expiry.
        """
        ...

    def unwatch(self, selector: Selector, uid: int) -> None:
        """Undo ``watch``. No error when absent."""
        ...

    def lend(self, slots: Sequence[int]) -> None:
        """Free slots that the kernel may take by itself."""
        ...
