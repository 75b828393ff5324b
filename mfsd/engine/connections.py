# SPDX-License-Identifier: Apache-2.0
"""From selectors to slots: which connections mfsd knows, and how far each of them has got.

A connection's byte stream has an *offset* that starts at 0 when mfsd first hears of it. Transfers are intervals of
that stream. Two sources tell how far it is: the classifier's counters (free, every tick, but they count
retransmissions and only what *entered* the qdisc), and TCP itself (inet_diag: exact, what the peer *acknowledged*, but
a system call per connection). The counters drive the levels; a transfer is retired only on TCP's word, because the
last 128 KB of a starved transfer have entered the qdisc long before they leave it (design note on the promotion stall),
and every such word also corrects the counters' drift.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np
import numpy.typing as npt

from mfsd.engine.books import Connection
from mfsd.engine.slots import NS, FlowTable, KeyMap, TableFullError
from mfsd.model import INF, CookieSelector, Endpoints, HintError, PortRange, Selector, Stage, TupleSelector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from mfsd.bands import Bands
    from mfsd.engine.books import Mark, Transfer
    from mfsd.model import Address

IPPROTO_TCP: Final = 6
LOCATE_S: Final = 1.0
"""A cookie that no socket has for so long is reported as gone."""
LOCATE_RETRY_S: Final = 0.1
OVERHEAD_V4: Final = 14 + 20 + 32
"""Wire bytes per segment that are not payload: Ethernet, IPv4, TCP with timestamps."""
OVERHEAD_V6: Final = 14 + 40 + 32
LONG_AGO: Final = -INF
"""Since when a connection is at rest that nobody is expected to use again."""


class SocketLike(Protocol):
    """What a resolver finds (mfsd.host.sockets.Socket)."""

    @property
    def cookie(self) -> int:
        """SO_COOKIE."""
        ...

    @property
    def endpoints(self) -> Endpoints:
        """As the network device sees them."""
        ...


class ProgressLike(Protocol):
    """TCP's own account of a socket (mfsd.host.sockets.TcpProgress)."""

    @property
    def bytes_acked(self) -> int:
        """Payload bytes the peer has acknowledged since the connection began."""
        ...

    @property
    def unsent_plus_unacked(self) -> int:
        """Payload bytes written by the process and not yet acknowledged."""
        ...

    @property
    def notsent(self) -> int:
        """Of these, bytes not yet handed to the qdisc."""
        ...

    @property
    def rto_us(self) -> int:
        """Retransmission timeout."""
        ...


class Resolver(Protocol):
    """Live sockets of this network namespace (mfsd.host.sockets.SocketResolver)."""

    def resolve(self, selector: Selector) -> Sequence[SocketLike]:
        """Sockets that match now."""
        ...

    def resolve_many(self, selectors: Sequence[Selector]) -> Sequence[Sequence[SocketLike]]:
        """The same for each of many selectors, with one dump per family."""
        ...

    def tcp_progress(self, sockets: Sequence[tuple[int, Endpoints]]) -> Mapping[int, ProgressLike]:
        """TCP state by cookie; sockets that are gone are absent."""
        ...


@dataclass(slots=True)
class Position:
    """Exact offsets of one connection, from TCP."""

    delivered: float
    sent: float
    written: float


class Peers:
    """Dense indices of the remote addresses of live connections, given back with the last connection to one."""

    def __init__(self, far_rate: Callable[[Address], float] | None) -> None:
        """``far_rate``: bytes/s of the link into a host, inf if unknown; None: nothing is known of any."""
        self._far_rate = far_rate
        self._index: dict[Address, int] = {}
        self._users: list[int] = []
        self._free: list[int] = []
        self.rate: npt.NDArray[np.float64] = np.zeros(0)
        """Bytes/s by peer, shape (indices in use at most,); stays empty while nothing is known of any."""

    def __len__(self) -> int:
        """Indices given out so far; more than live peers only where some have gone."""
        return len(self._users)

    def take(self, address: Address) -> int:
        """Index of an address, for one more connection."""
        index = self._index.get(address)
        if index is None:
            if self._free:
                index = self._free.pop()
            else:
                index = len(self._users)
                self._users.append(0)
                if self._far_rate is not None:
                    self.rate = np.append(self.rate, np.inf)
            self._index[address] = index
            if self._far_rate is not None:
                self.rate[index] = self._far_rate(address)
        self._users[index] += 1
        return index

    def give_back(self, address: Address) -> None:
        """One connection to it is gone."""
        index = self._index[address]
        self._users[index] -= 1
        if not self._users[index]:
            del self._index[address]
            self._free.append(index)


@dataclass(slots=True)
class _Search:
    """The search for the socket of a cookie."""

    next_try: float = 0.0
    give_up: float = INF


class Connections:
    """Registry of connections, and their keys, lanes and offsets."""

    def __init__(
        self,
        table: FlowTable,
        keys: KeyMap,
        resolver: Resolver,
        bands: Bands,
        device_of: Callable[[Endpoints | None], int] = lambda _: 0,
        far_rate: Callable[[Address], float] | None = None,
    ) -> None:
        """``far_rate``: see Peers."""
        self.table = table
        self.keys = keys
        self.resolver = resolver
        self.bands = bands
        self.device_of = device_of
        # By slot, like the offsets below: endpoints may become known long after transfers do.
        self.device: npt.NDArray[np.int32] = np.zeros(len(table) + 1, dtype=np.int32)
        """Egress device of each slot, 0 while unknown."""
        self.peer: npt.NDArray[np.int32] = np.full(len(table) + 1, -1, dtype=np.int32)
        """Dense index of each slot's remote address, -1 while unknown."""
        self.peers = Peers(far_rate)
        self.last_stage: npt.NDArray[np.uint8] = np.zeros(len(table), dtype=np.uint8)
        """By slot: stage of the last transfer announced there; bytes without a transfer of their own inherit it."""
        self.mark_stage: npt.NDArray[np.uint8] = np.zeros(len(table), dtype=np.uint8)
        """By slot: static mark; 0: none."""
        self.by_slot: dict[int, Connection] = {}
        self._by_cookie: dict[int, Connection] = {}
        self._by_tuple: dict[Endpoints, Connection] = {}
        self._cache: dict[Selector, list[Connection]] = {}
        self.unlocated: dict[Connection, _Search] = {}
        """Known by cookie only; their endpoints are looked up at the next tick, all in one dump."""
        self._lane_users = np.zeros(max(b.lanes for b in bands.level_bands), dtype=np.int64)
        """Connections per lane. A connection has the same lane in every band. With two lanes or more, lane 0 is for
        what must never be purged: anything but TCP."""
        # One element more than there are slots: index -1 ("no connection") reads offset 0.
        self._base: npt.NDArray[np.float64] = np.zeros(len(table) + 1)
        self._overhead: npt.NDArray[np.float64] = np.full(len(table) + 1, float(OVERHEAD_V4))
        self._sent: npt.NDArray[np.float64] = np.zeros(len(table) + 1)
        self.rest_since: npt.NDArray[np.float64] = np.full(len(table), INF)
        """By slot: since when a connection has neither transfers nor a mark; inf while it has, or is not taken."""

    def __len__(self) -> int:
        return len(self.by_slot)

    # --- selectors ----------------------------------------------------------------------------------------------------

    def match(self, selector: Selector, expires: float) -> list[Connection]:
        """Connections that the selector names now, made known if they were not; empty if no socket matches yet.

        Raises HintError when the slot table is full.
        """
        known = self._cache.get(selector)
        if known is None:
            known = self._discover(selector, expires)
            self._remember(selector, known)
        self.renew(known, expires)
        return known

    def _discover(self, selector: Selector, expires: float) -> list[Connection]:
        if isinstance(selector, CookieSelector):
            # No lookup on the hint path: the key works at once, and the endpoints follow at the next tick.
            return [self._by_cookie.get(selector.cookie) or self._take(selector.cookie, None, expires, local=True)]
        found = self._of_sockets(self.resolver.resolve(selector), expires)
        if not found and isinstance(selector, TupleSelector) and selector.exact and selector.src is not None:
            # A socket of another namespace (bridged pod), or one still to come: match its packets by tuple.
            endpoints = Endpoints(
                selector.src, selector.sport.first, selector.dst, selector.dport.first, selector.protocol
            )
            found = [self._by_tuple.get(endpoints) or self._take(0, endpoints, expires, local=False)]
        return found

    def match_waiting(self, selectors: Iterable[Selector], expires: float) -> dict[Selector, list[Connection]]:
        """Try selectors that matched nothing so far, with one dump per family; those that match now."""
        wanted = list(selectors)
        found: dict[Selector, list[Connection]] = {}
        for selector, sockets in zip(wanted, self.resolver.resolve_many(wanted), strict=True):
            if sockets:
                found[selector] = self._of_sockets(sockets, expires)
                self._remember(selector, found[selector])
        return found

    def _of_sockets(self, sockets: Sequence[SocketLike], expires: float) -> list[Connection]:
        """Their connections, made known if they were not."""
        return [
            self._by_cookie.get(s.cookie) or self._take(s.cookie, s.endpoints, expires, local=True) for s in sockets
        ]

    def _remember(self, selector: Selector, conns: list[Connection]) -> None:
        if conns:
            self._cache[selector] = conns
            for conn in conns:
                conn.selectors.add(selector)

    def locate(self, now: float) -> list[Connection]:
        """Find the endpoints of connections known by cookie only.

        Returns those whose socket does not show up for LOCATE_S: inet_diag lists a TCP socket from its connect on, so a
        hint may be earlier than its socket.
        """
        wanted = [c for c, search in self.unlocated.items() if now >= search.next_try]
        if not wanted:
            return []
        gone = []
        found = self.resolver.resolve_many([CookieSelector(c.cookie) for c in wanted])
        for conn, sockets in zip(wanted, found, strict=True):
            if sockets:
                del self.unlocated[conn]
                self._set_endpoints(conn, sockets[0].endpoints)
                continue
            search = self.unlocated[conn]
            search.give_up = min(search.give_up, now + LOCATE_S)
            search.next_try = now + LOCATE_RETRY_S
            if now >= search.give_up:
                gone.append(conn)
        return gone

    def adopt(self, limit: int) -> None:
        """Look for the sockets of connections that were matched by tuple before their socket existed here."""
        foreign = [c for c in self._by_tuple.values() if not c.local and c.endpoints is not None][:limit]
        selectors = [
            TupleSelector(e.src, e.dst, PortRange(e.sport, e.sport), PortRange(e.dport, e.dport), e.protocol)
            for e in (c.endpoints for c in foreign)
            if e is not None
        ]
        if not foreign:
            return
        for conn, sockets in zip(foreign, self.resolver.resolve_many(selectors), strict=True):
            if sockets and sockets[0].cookie not in self._by_cookie:
                conn.cookie, conn.local = sockets[0].cookie, True
                self._by_cookie[conn.cookie] = conn
                self.keys.add_cookie(conn.cookie, conn.slot)

    # --- slots --------------------------------------------------------------------------------------------------------

    def _take(self, cookie: int, endpoints: Endpoints | None, expires: float, *, local: bool) -> Connection:
        tcp = endpoints is None or endpoints.protocol == IPPROTO_TCP
        lane = self._free_lane(tcp=tcp)
        default = self.bands.default.index
        try:
            slot = self.table.take(cookie, default, lane, int(expires * NS))
        except TableFullError:
            raise HintError(
                "selector",
                f"the connection table is full ({len(self.table)} slots)",
                "raise daemon.slots, or complete transfers that are done",
                exhausted=True,
            ) from None
        conn = Connection(slot, cookie, None, lane, local, band=default, expires=expires)
        self._lane_users[lane] += 1
        self._base[slot] = self._sent[slot] = 0.0
        self.device[slot], self.peer[slot] = 0, -1
        self._overhead[slot] = OVERHEAD_V4
        self.by_slot[slot] = conn
        if endpoints is not None:
            self._set_endpoints(conn, endpoints)
        if cookie:
            self._by_cookie[cookie] = conn
            self.keys.add_cookie(cookie, slot)
            if endpoints is None:
                self.unlocated[conn] = _Search()
        elif endpoints is not None:
            self._by_tuple[endpoints] = conn
            self.keys.add_tuple(endpoints, slot)
        return conn

    def _free_lane(self, *, tcp: bool) -> int:
        """The lane with the fewest connections."""
        if len(self._lane_users) == 1 or not tcp:
            return 0
        return 1 + int(self._lane_users[1:].argmin())

    def _set_endpoints(self, conn: Connection, endpoints: Endpoints) -> None:
        conn.endpoints = endpoints
        if endpoints.protocol != IPPROTO_TCP and conn.lane and len(self._lane_users) > 1:
            self._lane_users[conn.lane] -= 1
            conn.lane = self._free_lane(tcp=False)
            self._lane_users[conn.lane] += 1
            self.table.lane[conn.slot] = conn.lane
        self.device[conn.slot] = self.device_of(endpoints)
        self.peer[conn.slot] = self.peers.take(endpoints.dst)
        self._overhead[conn.slot] = OVERHEAD_V6 if endpoints.dst.version == 6 else OVERHEAD_V4

    def note_rest(self, conn: Connection, now: float, *, linger: bool) -> None:
        """Tell whether the connection still has a reason to be known; call after every change of queue or mark.

        ``linger``: more is to be expected on it, so it keeps its slot for a while.
        """
        since = now if linger else LONG_AGO
        self.rest_since[conn.slot] = INF if conn.queue or conn.mark is not None else since

    def announce(self, conn: Connection, transfer: Transfer, size: float) -> float:
        """Queue a transfer of ``size`` bytes behind all that is announced; returns the offset of its first byte."""
        # Bytes that nobody announced may have moved the stream past the last announcement; and when everything
        # announced has been retired, what is counted now is the truth.
        sent = self.offset(conn)
        start = max(conn.announced, sent) if conn.queue else sent
        conn.announced = start + size
        conn.queue.append(transfer)
        self.rest_since[conn.slot] = INF
        self.last_stage[conn.slot] = transfer.stage
        return start

    def set_mark(self, conn: Connection, mark: Mark | None, now: float) -> None:
        """Put a mark on a connection in the place of the one it has, or take it away."""
        if mark is not None:
            if conn.mark is not None:
                conn.mark.conns.discard(conn)
            mark.conns.add(conn)
        conn.mark = mark
        self.mark_stage[conn.slot] = Stage.NONE if mark is None else mark.stage
        self.note_rest(conn, now, linger=False)

    def idle(self, now: float, linger: float) -> list[Connection]:
        """Connections at rest for ``linger`` seconds, or past their expiry."""
        high = self.table.high
        rest = self.rest_since[:high]
        over = (rest + linger < now) | ((rest < INF) & (self.table.expires_ns[:high] < int(now * NS)))
        return [self.by_slot[slot] for slot in np.flatnonzero(over & self.table.used[:high]).tolist()]

    def drop(self, conn: Connection) -> None:
        """Forget a connection and free its slot: keys first, so that the kernel never follows a stale one."""
        if conn.cookie:
            self.keys.delete_cookie(conn.cookie)
            self._by_cookie.pop(conn.cookie, None)
        if conn.endpoints is not None:
            if self._by_tuple.get(conn.endpoints) is conn:
                self.keys.delete_tuple(conn.endpoints)
                del self._by_tuple[conn.endpoints]
            self.peers.give_back(conn.endpoints.dst)
        self.last_stage[conn.slot] = self.mark_stage[conn.slot] = Stage.NONE
        self.unlocated.pop(conn, None)
        self.rest_since[conn.slot] = INF
        self.table.give_back(conn.slot)
        self._lane_users[conn.lane] -= 1
        del self.by_slot[conn.slot]
        for selector in conn.selectors:
            self._cache.pop(selector, None)

    # --- offsets ------------------------------------------------------------------------------------------------------

    def sent(self) -> npt.NDArray[np.float64]:
        """Estimated stream offset that has entered the qdisc, by slot; shape (slots + 1,), the last one is 0."""
        high = self.table.high
        sent = self._sent
        np.subtract(
            self.table.bytes[:high],
            self.table.segments[:high] * self._overhead[:high],
            out=sent[:high],
            casting="unsafe",
        )
        sent[:high] -= self._base[:high]
        return sent

    def ask(self, conns: Sequence[Connection]) -> dict[Connection, Position | None]:
        """Exact positions of connections with a local socket, from TCP; None: the socket is gone.

        Connections whose sockets are elsewhere (or not located yet) are absent. The counters' drift is corrected.
        """
        askable = [c for c in conns if c.local and c.endpoints is not None and c.endpoints.protocol == IPPROTO_TCP]
        answers = self.resolver.tcp_progress([(c.cookie, c.endpoints) for c in askable if c.endpoints is not None])
        out: dict[Connection, Position | None] = {}
        for conn in askable:
            p = answers.get(conn.cookie)
            if p is None:
                out[conn] = None
                continue
            written_abs = p.bytes_acked + p.unsent_plus_unacked
            sent_abs = written_abs - p.notsent
            estimate = self._estimate(conn.slot)
            if conn.acked0 is None:
                # The first word: from here on the two accounts are tied together.
                conn.acked0 = sent_abs - estimate
            sent = sent_abs - conn.acked0
            self._base[conn.slot] += estimate - sent
            out[conn] = Position(p.bytes_acked - conn.acked0, sent, written_abs - conn.acked0)
        return out

    def offset(self, conn: Connection) -> float:
        """Estimated stream offset that has entered the qdisc."""
        return self._estimate(conn.slot)

    def renew(self, conns: Iterable[Connection], expires: float) -> None:
        """Keep connections alive in the kernel until ``expires`` at least."""
        for conn in conns:
            if conn.expires < expires:
                conn.expires = expires
                self.table.expires_ns[conn.slot] = int(expires * NS)

    def _estimate(self, slot: int) -> float:
        table = self.table
        headers = float(table.segments[slot]) * float(self._overhead[slot])
        return float(table.bytes[slot]) - headers - float(self._base[slot])
