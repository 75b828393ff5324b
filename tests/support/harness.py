# SPDX-License-Identifier: Apache-2.0
"""An engine on plain memory and a clock that the test moves; sockets are a dictionary."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING, Any

from mfsd.daemon.wiring import far_rate_of
from mfsd.engine.connections import Connections
from mfsd.engine.device import Rescued
from mfsd.engine.engine import Engine
from mfsd.engine.estimator import LinkEstimator
from mfsd.engine.settings import LimitsConfig, RescueConfig, TenantsConfig
from mfsd.engine.slots import NS, QUIET, FlowTable, MemoryKeys, memory_rows
from mfsd.engine.sockets import Closed, End, Established, Event, Found, Socket
from mfsd.ground.bands import Bands
from mfsd.ground.model import (
    CookieSelector,
    EndHint,
    Endpoints,
    Maker,
    PortRange,
    RequestHint,
    RuleSelector,
    Selector,
    Stage,
    TransferHint,
    TupleSelector,
    What,
)
from mfsd.policy.registry import make_policy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from mfsd.daemon.config import PeerConfig
    from mfsd.engine.device import Rescue
    from mfsd.engine.estimator import Reading

MSS = 1448


@dataclass(eq=False)
class FakeSocket:
    """A TCP socket whose state the test sets."""

    cookie: int
    endpoints: Endpoints
    bytes_acked: int = 1  # as in the kernel: the SYN counts
    unsent_plus_unacked: int = 0
    notsent: int = 0
    total_retrans: int = 0
    rto_us: int = 200_000
    last_ack_ms: int = 0
    last_sent_ms: int = 0
    busy_us: int = 0
    rwnd_limited_us: int = 0
    sndbuf_limited_us: int = 0
    app_limited: bool = False
    slow_start: bool = False
    queued: int = 0
    holes: bool = False
    window_full: bool = False
    uid: int = 0
    pid: int = 0
    here: bool = True
    active: bool = True
    accepted_by: int = 0
    """User who has accepted it."""

    @property
    def told(self) -> Socket:
        return Socket(self.cookie, self.endpoints, self.uid, self.pid, self.here)


class FakeKernel:
    """engine.sockets.Sockets over a list of FakeSockets. It does what the kernel does with rules and lent slots."""

    tells = True

    def __init__(self, table: FlowTable, keys: MemoryKeys, clock: Callable[[], float]) -> None:
        self.sockets: list[FakeSocket] = []
        self.rules: dict[tuple[Selector, int], tuple[int, int, int]] = {}
        self.lent: list[int] = []
        self.ends: dict[int, End] = {}
        self.lately: list[End] = []
        """Of those without a slot, the ones that the next search may tell of."""
        self.datagrams: set[int] = set()
        """Cookies of UDP sockets."""
        self.lists_datagrams = False
        """It is being found out which there are."""
        self.senders: list[FakeSocket] = []
        """Unconnected ones."""
        self.descendants: dict[int, set[int]] = {}
        self.calls: dict[tuple[int, int], int] = {}
        """Processes by who calls them and by which number, where that is another one."""
        self.makers: dict[Maker, set[int]] = {}
        """Cookies of the sockets that somebody of a description has made."""
        self.time_wait: set[int] = set()
        """Cookies of what has ended and can be asked about."""
        self.acked_at: dict[int, float] = {}
        """When the last acknowledgement came, by cookie, where the test has said so."""
        self.asked = 0
        """Sockets asked for TCP's word."""
        self._table, self._keys, self._clock = table, keys, clock
        self._events: list[Event] = []

    # what the engine calls

    def events(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def by_cookie(self, cookie: int) -> Socket | None:
        return next((s.told for s in self.sockets if s.cookie == cookie), None)

    def end_of(self, cookie: int) -> End | None:
        return self.ends.get(cookie)

    def datagram(self, cookie: int) -> bool | None:
        return None if self.lists_datagrams else cookie in self.datagrams

    def user(self, socket: Socket) -> int:
        return next((s.accepted_by for s in self.sockets if s.cookie == socket.cookie), -1)

    def exact(self, selector: TupleSelector) -> Socket | None:
        return next((s.told for s in self.sockets if s.here and self._matches(selector, s)), None)

    def sends(self, endpoints: Endpoints, uid: int) -> bool:
        return any(s.endpoints == endpoints and s.uid == uid for s in self.senders)

    def process(self, number: int, teller: int) -> int:
        return self.calls.get((teller, number), number)

    def descends(self, pid: int, ancestor: int) -> bool:
        return pid == ancestor or pid in self.descendants.get(ancestor, ())

    def made_by(self, socket: Socket, maker: Maker) -> bool:
        names = self.makers.get(maker, set())
        return maker.anybody or socket.cookie in names

    def look(self, selectors: Sequence[Selector]) -> None:
        for selector in selectors:
            found = [s.told for s in self.sockets if self._matches(selector, s)]
            self._events.append(Found(selector, found, list(self.lately)))

    def progress(self, sockets: Iterable[tuple[int, Endpoints]]) -> dict[int, FakeSocket | None]:
        known = {s.cookie: s for s in self.sockets}
        wanted = [cookie for cookie, _ in sockets]
        self.asked += len(wanted)
        out: dict[int, FakeSocket | None] = {c: copy.copy(known[c]) for c in wanted if c in known}
        for cookie, answer in out.items():
            if answer is not None and cookie in self.acked_at:
                answer.last_ack_ms = int((self._clock() - self.acked_at[cookie]) * 1000)
        return out | dict.fromkeys(self.time_wait.intersection(wanted))

    def watch(self, selector: Selector, uid: int, band: int, lanes: int, expires_ns: int) -> None:
        self.rules[selector, uid] = (band, lanes, expires_ns)

    def unwatch(self, selector: Selector, uid: int) -> None:
        self.rules.pop((selector, uid), None)

    def lend(self, slots: Sequence[int]) -> None:
        self.lent += slots

    # what the test lets happen

    def connect(self, sock: FakeSocket) -> None:
        """A connection is made; see established() in bpf/sockets.bpf.c."""
        self.sockets.append(sock)
        slot = self._keys.cookies.get(sock.cookie)
        if slot is None:
            slot = self._keys.tuples.get(sock.endpoints)
            if slot is not None:
                self._keys.cookies[sock.cookie] = slot
        if slot is None:
            bands = [
                b
                for (selector, uid), b in self.rules.items()
                if self._matches(selector, sock) and uid in (-1, sock.uid)
            ]
            if not bands:
                return
            band, lanes, expires = min(bands)
            if self.lent:
                slot = self.lent.pop()
                row = self._table.rows[slot]
                row["band"], row["lane"], row["expires_ns"] = band, 1 + sock.cookie % (lanes - 1), expires
                for counter in ("bytes", "packets", "last_ns", "acked", "sent", "origin", "ifindex"):
                    row[counter] = 0
                self._keys.cookies[sock.cookie] = slot
        self._events.append(Established(sock.told, slot, active=sock.bytes_acked == 1))

    def close(self, sock: FakeSocket, *, clean: bool = True) -> None:
        """A connection ends: by FINs, with all acknowledged, or by a reset."""
        self.sockets.remove(sock)
        if clean:
            sock.bytes_acked += sock.unsent_plus_unacked
            sock.unsent_plus_unacked = 0
        if clean or sock.bytes_acked or not sock.active:
            self.ends[sock.cookie] = End(sock.told, sock.bytes_acked + clean, clean, sock.active, self._clock())
        if sock.cookie in self._keys.cookies:
            self._events.append(Closed(sock.cookie, sock.bytes_acked + clean, clean, sock.active, self._clock()))
        elif sock.cookie in self.ends:
            self.lately.append(self.ends[sock.cookie])

    def vanish(self, sock: FakeSocket) -> None:
        """A connection is gone, and the event is lost."""
        self.sockets.remove(sock)

    def fail(self, selectors: Sequence[Selector]) -> None:
        """A search can't be made."""
        self._events += [Found(selector, None) for selector in selectors]

    def _matches(self, selector: Selector, s: FakeSocket) -> bool:
        if isinstance(selector, CookieSelector):
            return s.cookie == selector.cookie
        if not selector.covers(s.endpoints):
            return False
        if isinstance(selector, RuleSelector):
            return self.made_by(s.told, selector.maker)
        return isinstance(selector, TupleSelector) or self.descends(s.pid, selector.pid)


@dataclass
class FakeDevice:
    """A device whose lanes hold what the test puts there."""

    estimator: LinkEstimator
    name: str = "eth-test"
    enforced: bool = True
    floors: bool = True
    queued: dict[tuple[int, int], int] = field(default_factory=dict)
    purged: list[tuple[int, int]] = field(default_factory=list)

    guaranteed: dict[int, float] = field(default_factory=dict)
    _done: list[Rescued] = field(default_factory=list)

    def read(self) -> Reading | None:
        return None

    def rescue(self, orders: Sequence[Rescue]) -> None:
        for order in orders:
            place = order.band, order.lane
            backlog = self.queued.get(place, 0)
            if backlog:
                self.purged.append(place)
                self.queued[place] = 0
            self._done.append(Rescued(order, backlog))

    def rescued(self) -> list[Rescued]:
        done, self._done = self._done, []
        return done

    def empty(self, band: int, lane: int) -> bool:
        return not self.queued.get((band, lane))

    def guarantee(self, shares: Mapping[int, float]) -> None:
        self.guaranteed = dict(shares)


class Host:
    """Everything around one engine."""

    def __init__(
        self,
        policy: str = "deadline-ladder",
        *,
        slots: int = 64,
        lanes: int = 8,
        rate: float = 125e6,
        limits: LimitsConfig | None = None,
        rescue: RescueConfig | None = None,
        tenants: TenantsConfig | None = None,
        floors: tuple[float, ...] = (0.0,) * 5,
        peers: Sequence[PeerConfig] = (),
        devices: int = 1,
    ) -> None:
        """Peers 10.0.k.x are reached through device k, whose interface index is k + 1."""
        self.now = 1000.0
        chosen = make_policy(policy, 5, {"kv": "rli"} if policy == "deadline-ladder" else {})
        self.bands = Bands.build(5, default_after=chosen.default_after, lanes=lanes, level_floors=floors)
        self.table = FlowTable(memory_rows(slots))
        self.keys = MemoryKeys()
        self.kernel = FakeKernel(self.table, self.keys, lambda: self.now)
        self.devices = [FakeDevice(LinkEstimator(rate, len(self.bands))) for _ in range(devices)]
        self.device = self.devices[0] if self.devices else FakeDevice(LinkEstimator(rate, len(self.bands)))
        self.connections = Connections(
            self.table,
            self.keys,
            self.kernel,
            self.bands,
            lambda: range(1, devices + 1),
            far_rate_of(peers),
        )
        self.engine = Engine(
            self.connections,
            chosen,
            self.bands,
            self.devices,
            limits or LimitsConfig(),
            rescue or RescueConfig(),
            tenants or TenantsConfig(),
        )
        self.session = self.engine.session("worker", self.now)

    def socket(self, cookie: int, port: int | None = None, dst: str = "10.0.0.2", **more: Any) -> FakeSocket:
        """Open a connection on this host."""
        endpoints = Endpoints(ip_address("10.0.0.1"), port or 40000 + cookie, ip_address(dst), 6000, 6)
        sock = FakeSocket(cookie, endpoints, **more)
        self.kernel.connect(sock)
        return sock

    def send(self, sock: FakeSocket, payload: int, *, acked: bool = True) -> None:
        """Let payload pass the classifier (and, unless it sticks in the qdisc, reach the peer)."""
        slot = self.keys.cookies.get(sock.cookie)
        if slot is not None:
            row = self.table.rows[slot]
            before = sock.bytes_acked + sock.unsent_plus_unacked - sock.notsent
            if not row["last_ns"]:
                row["origin"] = before & 0xFFFFFFFF
            row["bytes"] += payload
            row["packets"] += 1
            row["last_ns"] = int(self.now * NS)
            row["ifindex"] = min(sock.endpoints.dst.packed[2], len(self.devices) - 1) + 1
            row["flags"] = QUIET if acked else 0
            if sock.endpoints.protocol == 6:
                row["acked"], row["sent"] = sock.bytes_acked, before + payload
            else:
                row["sent"] += payload
        if acked:
            sock.bytes_acked += payload
        else:
            sock.unsent_plus_unacked += payload

    def ack(self, sock: FakeSocket, payload: int) -> None:
        """The peer acknowledges what was stuck."""
        sock.unsent_plus_unacked -= payload
        sock.bytes_acked += payload
        if (slot := self.keys.cookies.get(sock.cookie)) is not None and not sock.unsent_plus_unacked:
            self.table.flags[slot] = QUIET

    def request(self, name: str, left: float, **more: Any) -> None:
        """Announce a request with this much TTFT budget (seconds)."""
        self.engine.apply(self.session, RequestHint(name, self.now + left, **more), self.now)

    def transfer(
        self,
        name: str,
        sock: FakeSocket | Selector,
        size: int,
        stage: Stage = Stage.P2D,
        request: str = "r",
        layer: int = 0,
        **more: Any,
    ) -> None:
        """Announce a transfer."""
        selector = CookieSelector(sock.cookie) if isinstance(sock, FakeSocket) else sock
        hint = TransferHint(name, request, "", stage, layer, size, selector, **more)
        self.engine.apply(self.session, hint, self.now)

    def done(self, name: str, what: What = What.TRANSFER, *, cancelled: bool = False) -> None:
        """Its worker says so."""
        self.engine.apply(self.session, EndHint(what, name, cancelled), self.now)

    def cancel(self, name: str, sock: FakeSocket, position: int, what: What = What.TRANSFER) -> None:
        """Its worker says so, and how far it had written."""
        self.engine.apply(self.session, EndHint(what, name, True, ((sock.cookie, position),)), self.now)

    @property
    def counted(self) -> tuple[int, int, int]:
        """Transfers completed, deadlines met and missed."""
        c = self.engine.books.counters
        return c.transfers_completed, c.deadlines_met, c.deadlines_missed

    def tick(self, after: float = 0.0) -> None:
        """Move the clock and tick."""
        self.now += after
        self.engine.tick(self.now)

    def band(self, sock: FakeSocket) -> str:
        """Name of the band that the classifier puts the socket's packets in."""
        return self.bands.bands[int(self.table.band[self.keys.cookies[sock.cookie]])].name


def peer(sock: FakeSocket) -> TupleSelector:
    """All connections to where this one goes."""
    return TupleSelector(None, sock.endpoints.dst, PortRange(), PortRange(6000, 6000), 6)


def exact_tuple(e: Endpoints) -> TupleSelector:
    """The selector that names exactly these endpoints."""
    return TupleSelector(e.src, e.dst, PortRange(e.sport, e.sport), PortRange(e.dport, e.dport), e.protocol)


def network(text: str) -> object:
    """Shorthand of ipaddress.ip_network."""
    return ip_network(text)
