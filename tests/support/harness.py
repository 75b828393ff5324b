# SPDX-License-Identifier: Apache-2.0
"""An engine on plain memory and a clock that the test moves; sockets are a dictionary."""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING

from mfsd.bands import Bands
from mfsd.daemon.wiring import far_rate_of
from mfsd.engine.connections import OVERHEAD_V4, Connections
from mfsd.engine.engine import Engine
from mfsd.engine.estimator import LinkEstimator
from mfsd.engine.settings import LimitsConfig, RescueConfig
from mfsd.engine.slots import NS, FlowTable, MemoryKeys, memory_rows
from mfsd.model import (
    CookieSelector,
    Endpoints,
    PortRange,
    RequestHint,
    Selector,
    Stage,
    TransferHint,
    TupleSelector,
)
from mfsd.policy.registry import make_policy

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mfsd.daemon.config import PeerConfig
    from mfsd.engine.estimator import Reading

MSS = 1448


@dataclass
class FakeSocket:
    """A TCP socket whose state the test sets."""

    cookie: int
    endpoints: Endpoints
    bytes_acked: int = 1  # as in the kernel: the SYN counts
    unsent_plus_unacked: int = 0
    notsent: int = 0
    rto_us: int = 200_000


class FakeResolver:
    """connections.Resolver over a list of FakeSockets."""

    def __init__(self) -> None:
        self.sockets: list[FakeSocket] = []

    def resolve(self, selector: Selector) -> list[FakeSocket]:
        return [s for s in self.sockets if _matches(selector, s)]

    def resolve_many(self, selectors: Sequence[Selector]) -> list[list[FakeSocket]]:
        return [self.resolve(s) for s in selectors]

    def tcp_progress(self, sockets: Iterable[tuple[int, Endpoints]]) -> dict[int, FakeSocket]:
        known = {s.cookie: s for s in self.sockets}
        return {cookie: known[cookie] for cookie, _ in sockets if cookie in known}


def _matches(selector: Selector, s: FakeSocket) -> bool:
    if isinstance(selector, CookieSelector):
        return s.cookie == selector.cookie
    if isinstance(selector, TupleSelector):
        e = s.endpoints
        return (
            selector.dst == e.dst
            and selector.src in (None, e.src)
            and e.sport in selector.sport
            and e.dport in selector.dport
            and e.protocol == selector.protocol
        )
    return selector.remote is None or s.endpoints.dst in selector.remote


@dataclass
class FakeDevice:
    """A device whose lanes hold what the test puts there."""

    estimator: LinkEstimator
    name: str = "eth-test"
    enforced: bool = True
    floors: bool = True
    queued: dict[tuple[int, int], int] = field(default_factory=dict)
    purged: list[tuple[int, int]] = field(default_factory=list)

    def read(self) -> Reading | None:
        return None

    def backlog(self, band: int, lane: int) -> int:
        return self.queued.get((band, lane), 0)

    def purge(self, lanes: Sequence[tuple[int, int]]) -> None:
        for lane in lanes:
            self.purged.append(lane)
            self.queued[lane] = 0


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
        floors: tuple[float, ...] = (0.0,) * 5,
        peers: Sequence[PeerConfig] = (),
        devices: int = 1,
    ) -> None:
        """Peers 10.0.k.x are reached through device k."""
        self.now = 1000.0
        chosen = make_policy(policy, 5, {"kv": "rli"} if policy == "deadline-ladder" else {})
        self.bands = Bands.build(5, default_after=chosen.default_after, lanes=lanes, level_floors=floors)
        self.table = FlowTable(memory_rows(slots))
        self.keys = MemoryKeys()
        self.resolver = FakeResolver()
        self.devices = [FakeDevice(LinkEstimator(rate, len(self.bands))) for _ in range(devices)]
        self.device = self.devices[0] if self.devices else FakeDevice(LinkEstimator(rate, len(self.bands)))
        self.connections = Connections(
            self.table,
            self.keys,
            self.resolver,
            self.bands,
            lambda e: 0 if e is None else max(min(e.dst.packed[2], devices - 1), 0),
            far_rate_of(peers),
        )
        self.dead_pids: set[int] = set()
        self.exits: dict[int, list[object]] = {}
        self.engine = Engine(
            self.connections,
            chosen,
            self.bands,
            self.devices,
            limits or LimitsConfig(),
            rescue or RescueConfig(),
            watch=self._watch,
        )
        self.session = self.engine.session("worker", 0, self.now)

    def _watch(self, pid: int, on_exit: object) -> bool:
        if pid in self.dead_pids:
            return False
        self.exits.setdefault(pid, []).append(on_exit)
        return True

    def socket(self, cookie: int, port: int | None = None, dst: str = "10.0.0.2") -> FakeSocket:
        """Open a connection on this host."""
        sock = FakeSocket(cookie, Endpoints(ip_address("10.0.0.1"), port or 40000 + cookie, ip_address(dst), 6000, 6))
        self.resolver.sockets.append(sock)
        return sock

    def send(self, sock: FakeSocket, payload: int, *, acked: bool = True) -> None:
        """Let payload pass the classifier (and, unless it sticks in the qdisc, reach the peer)."""
        slot = self.keys.cookies.get(sock.cookie)
        segments = -(-payload // MSS)
        if slot is not None:
            row = self.table.rows[slot]
            row["bytes"] += payload + segments * OVERHEAD_V4
            row["segments"] += segments
            row["packets"] += 1
            row["last_ns"] = int(self.now * NS)
        if acked:
            sock.bytes_acked += payload
        else:
            sock.unsent_plus_unacked += payload

    def ack(self, sock: FakeSocket, payload: int) -> None:
        """The peer acknowledges what was stuck."""
        sock.unsent_plus_unacked -= payload
        sock.bytes_acked += payload

    def request(self, name: str, left: float, **more: object) -> None:
        """Announce a request with this much TTFT budget (seconds)."""
        self.engine.apply(self.session, RequestHint(name, self.now + left, **more), self.now)  # type: ignore[arg-type]

    def transfer(
        self,
        name: str,
        sock: FakeSocket | Selector,
        size: int,
        stage: Stage = Stage.P2D,
        request: str = "r",
        layer: int = 0,
    ) -> None:
        """Announce a transfer."""
        selector = CookieSelector(sock.cookie) if isinstance(sock, FakeSocket) else sock
        hint = TransferHint(name, request, "", stage, layer, size, selector)
        self.engine.apply(self.session, hint, self.now)

    def tick(self, after: float = 0.0) -> None:
        """Move the clock and tick."""
        self.now += after
        self.engine.tick(self.now)

    def band(self, sock: FakeSocket) -> str:
        """Name of the band that the classifier puts the socket's packets in."""
        return self.bands.bands[int(self.table.band[self.keys.cookies[sock.cookie]])].name


def exact_tuple(e: Endpoints) -> TupleSelector:
    """The selector that names exactly these endpoints."""
    return TupleSelector(e.src, e.dst, PortRange(e.sport, e.sport), PortRange(e.dport, e.dport), e.protocol)


def network(text: str) -> object:
    """Shorthand of ipaddress.ip_network."""
    return ip_network(text)
