# SPDX-License-Identifier: Apache-2.0
"""Typed values that every room of the house shares: stages, selectors, hints. No I/O, no clock.

Times are seconds (float) on CLOCK_MONOTONIC unless a name ends in ``_ns``; sizes are bytes; rates are bytes/s.
"""

from __future__ import annotations

import enum
import ipaddress
import math
from dataclasses import dataclass, field
from typing import Final

INF: Final = math.inf


class Stage(enum.IntEnum):
    """Network stage of disaggregated serving (MFS paper, section 2; numbers as in proto ``mfsd.v1.Stage``)."""

    NONE = 0
    KV_REUSE = 1
    COLLECTIVE = 2
    P2D = 3
    BACKGROUND = 4
    """Stores, offload, prefetch, weights: nobody waits for them."""

    @property
    def early(self) -> bool:
        """Stages 1 and 2 feed the prefill computation: their deadlines are implicit."""
        return self in (Stage.KV_REUSE, Stage.COLLECTIVE)

    @property
    def ownerless(self) -> bool:
        """Its transfers need no request or batch."""
        return self in (Stage.COLLECTIVE, Stage.BACKGROUND)


class Mode(enum.StrEnum):
    """``observe`` classifies, counts and predicts; ``enforce`` also steers."""

    OBSERVE = "observe"
    ENFORCE = "enforce"


class HintError(ValueError):
    """A hint that can't be applied. ``field`` is the path inside the hint, ``fix`` says what is allowed."""

    def __init__(self, field_path: str, problem: str, fix: str, *, exhausted: bool = False) -> None:
        super().__init__(f"{field_path}: {problem}; {fix}")
        self.field = field_path
        self.problem = problem
        self.fix = fix
        self.exhausted = exhausted
        """True: a limit of the daemon was reached (RESOURCE_EXHAUSTED), the hint itself is well formed."""

    def below(self, path: str) -> HintError:
        """The same error, of a field that stands below ``path``."""
        return HintError(f"{path}.{self.field}", self.problem, self.fix, exhausted=self.exhausted)


# --- selectors --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PortRange:
    """``first``..``last`` inclusive. ``PortRange(0, 65535)`` is any port."""

    first: int = 0
    last: int = 65535

    @property
    def exact(self) -> bool:
        """True for one single port."""
        return self.first == self.last

    def __contains__(self, port: int) -> bool:
        return self.first <= port <= self.last

    def __str__(self) -> str:
        return str(self.first) if self.exact else f"{self.first}-{self.last}"


Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class CookieSelector:
    """One local socket, by SO_COOKIE."""

    cookie: int


@dataclass(frozen=True, slots=True)
class TupleSelector:
    """Endpoints of a connection; ranges and a missing source address may match several sockets."""

    src: Address | None
    dst: Address
    sport: PortRange
    dport: PortRange
    protocol: int = 6

    @property
    def exact(self) -> bool:
        """True when it names one connection, so that the classifier can match it without a local socket."""
        return self.src is not None and self.sport.exact and self.dport.exact

    def covers(self, e: Endpoints) -> bool:
        """Whether a connection with these endpoints is meant."""
        return (
            self.dst == e.dst
            and self.src in (None, e.src)
            and e.sport in self.sport
            and e.dport in self.dport
            and e.protocol == self.protocol
        )


@dataclass(frozen=True, slots=True)
class ProcessSelector:
    """TCP sockets of a process towards a remote network."""

    pid: int
    remote: Network | None
    dport: PortRange

    def covers(self, e: Endpoints) -> bool:
        """Whether a connection with these endpoints is meant, if the process has it."""
        return e.dport in self.dport and (self.remote is None or e.dst in self.remote)


@dataclass(frozen=True, slots=True)
class Maker:
    """Who has made a socket, or the one that listened for it: all that is given must hold. Patterns as fnmatch has."""

    pid: int = 0
    """That process or one that descends from it; 0: any."""
    executable: str = ""
    """Pattern of its file: of the path if it has a slash in it, else of the name."""
    thread: str = ""
    """Pattern of the name of the thread that called socket(2)."""
    cgroup: str = ""
    """Pattern of its cgroup's path from the root, or of one above that."""
    uid: int = -1

    @property
    def anybody(self) -> bool:
        """It asks for nothing."""
        return self == Maker()


@dataclass(frozen=True, slots=True)
class RuleSelector:
    """TCP sockets by who made them and where they lead, for rules of the configuration."""

    maker: Maker
    remote: Network | None = None
    sport: PortRange = PortRange()
    dport: PortRange = PortRange()

    def covers(self, e: Endpoints) -> bool:
        """Whether a connection with these endpoints is meant, if it is the maker's."""
        return e.sport in self.sport and e.dport in self.dport and (self.remote is None or e.dst in self.remote)


HintSelector = CookieSelector | TupleSelector | ProcessSelector
"""What hints can name."""
Selector = HintSelector | RuleSelector

NO_COOKIE: Final = (1 << 64) - 1
"""INET_DIAG_NOCOOKIE twice, include/uapi/linux/inet_diag.h: "any socket" to the kernel."""
PID_MAX: Final = 1 << 22
"""Largest pid_max of 64-bit kernels (proc_sys_kernel(5))."""
PORT_MAX: Final = 65535


def cookie_selector(cookie: int) -> CookieSelector:
    """One socket. Raises HintError for what is no cookie; so do the others, for what could never match.

    Nothing else makes selectors of what people and programs say. Field names are those of proto ``mfsd.v1.Selector``.
    """
    if not 0 < cookie < NO_COOKIE:
        raise HintError("cookie", f"{cookie} is no socket cookie", "give what getsockopt(SO_COOKIE) says")
    return CookieSelector(cookie)


def tuple_selector(
    dst: str, dport: tuple[int, int] = (0, 0), src: str = "", sport: tuple[int, int] = (0, 0), protocol: int = 6
) -> TupleSelector:
    """Endpoints as the device sees them. Ports as for ``port_range``; no source: any local address."""
    there = _peer("dst_addr", dst)
    here = _address("src_addr", src) if src else None
    if here is not None and here.is_unspecified:
        here = None  # a socket bound to it has an address of its own once it is connected
    if here is not None and here.version != there.version:
        raise HintError("src_addr", f"{here} and {there} are of different families", "use one family for both")
    if protocol not in (6, 17):
        raise HintError("protocol", f"unknown protocol {protocol}", "use 6 (TCP) or 17 (UDP)")
    ports = port_range("src_port", *sport), port_range("dst_port", *dport)
    if protocol == 17 and (here is None or not (ports[0].exact and ports[1].exact)):
        raise HintError(
            "src_addr" if here is None else "dst_port" if ports[0].exact else "src_port",
            "is not exact",
            "UDP needs both addresses and exact ports: its sockets may have many peers",
        )
    return TupleSelector(here, there, *ports, protocol)


def process_selector(pid: int, remote: str = "", port: tuple[int, int] = (0, 0)) -> ProcessSelector:
    """TCP sockets of a process, towards an address or a prefix (empty: any)."""
    if not 0 < pid <= PID_MAX:
        raise HintError("pid", f"{pid} is no process id", f"1 to {PID_MAX}")
    return ProcessSelector(pid, _network("remote", remote) if remote else None, port_range("remote_port", *port))


def port_range(field_name: str, first: int, last: int = 0) -> PortRange:
    """``last`` 0: exactly ``first``. Both 0: any port."""
    if not first and not last:
        return PortRange()
    last = last or first
    if not 0 <= first <= last <= PORT_MAX:
        shown = f"{first} is no port" if first == last else f"{first}..{last} is no port range"
        raise HintError(field_name, shown, f"first <= last <= {PORT_MAX}; last 0: exactly first")
    return PortRange(first, last)


def _address(field_name: str, text: str) -> Address:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise HintError(field_name, f"{text!r} is no IP address", "give an IPv4 or IPv6 address, no name") from None
    if isinstance(address, ipaddress.IPv6Address) and address.scope_id is not None:
        raise HintError(field_name, f"{text!r} has a zone", "leave out the part from % on")
    return on_the_wire(address)


def on_the_wire(address: Address) -> Address:
    """IPv4 of an IPv4-mapped address: a dual-stack socket talks it on the wire, and the classifier sees the wire."""
    return (address.ipv4_mapped or address) if isinstance(address, ipaddress.IPv6Address) else address


def _peer(field_name: str, text: str) -> Address:
    if not text:
        raise HintError(field_name, "is empty", "give the peer's address")
    address = _address(field_name, text)
    if address.is_unspecified or address.is_multicast:
        raise HintError(field_name, f"{address} is no peer's address", "give a unicast address")
    return address


def _network(field_name: str, text: str) -> Network:
    if "/" not in text:
        return ipaddress.ip_network(_peer(field_name, text))
    try:
        network = ipaddress.ip_network(text)
    except ValueError as e:
        raise HintError(
            field_name, str(e), "give an address or a prefix without host bits, such as 10.0.0.0/24"
        ) from None
    mapped = network.network_address.ipv4_mapped if network.version == 6 else None
    if mapped is not None and network.prefixlen >= 96:
        return ipaddress.ip_network((mapped, network.prefixlen - 96))
    return network


@dataclass(frozen=True, slots=True)
class Endpoints:
    """One connection as the shaped device sees it."""

    src: Address
    sport: int
    dst: Address
    dport: int
    protocol: int = 6

    def __str__(self) -> str:
        def host(a: Address) -> str:
            return f"[{a}]" if a.version == 6 else str(a)

        return f"{host(self.src)}:{self.sport} -> {host(self.dst)}:{self.dport}"


# --- hints ------------------------------------------------------------------------------------------------------------
# What proto/mfsd/v1/hints.proto says, decoded and clamped, durations already turned into monotonic times.


@dataclass(slots=True)
class RequestHint:
    """A request and its TTFT deadline."""

    id: str
    deadline: float
    """INF: none."""
    batch_id: str = ""
    compute_left: float = 0.0
    """Seconds of compute still to be done for the first token, at the time of the hint; 0: unknown."""
    ttl: float = 30.0


@dataclass(slots=True)
class BatchHint:
    """Requests that execute together."""

    id: str
    request_ids: list[str] = field(default_factory=list)
    layers: int = 0
    current_layer: int = 0
    layer_compute: float = 0.0


@dataclass(slots=True)
class ProgressHint:
    """A batch started a layer, or has ended its forward pass."""

    batch_id: str
    current_layer: int
    compute_done: bool = False


@dataclass(slots=True)
class TransferHint:
    """Bytes about to be written to a connection."""

    id: str
    request_id: str
    batch_id: str
    stage: Stage
    target_layer: int
    size: int
    selector: Selector
    deadline: float = INF
    """Own deadline; INF: its request's."""
    ttl: float = 30.0
    ordered: bool = True
    """False: its bytes and those of others on the same connections are interleaved."""
    position: int = 0
    """Bytes that had been written to the socket when the transfer was first announced, on TCP's scale; 0: unknown."""
    hold_until: float = INF
    """It may be held back until then at most; INF: for as long as the policy has it."""


class What(enum.IntEnum):
    """What a completion or cancellation names."""

    TRANSFER = 0
    REQUEST = 1
    BATCH = 2


@dataclass(slots=True)
class EndHint:
    """Completion (``cancelled`` False) or cancellation."""

    what: What
    id: str
    cancelled: bool = False
    written: tuple[tuple[int, int], ...] = ()
    """(cookie, position) of the sockets that were to carry what is cancelled, when that was said."""


@dataclass(slots=True)
class MarkHint:
    """Static stage of a connection; ``Stage.NONE`` takes the mark back."""

    selector: Selector
    stage: Stage
    ordered: bool = True
    due_in: float = INF
    """Seconds to the deadline that its bytes count as having, always; INF: none."""
    gives_way: bool = False
    """It says nothing while transfers are announced on the connection."""


Hint = RequestHint | BatchHint | ProgressHint | TransferHint | EndHint | MarkHint


class EventKind(enum.IntEnum):
    """What the daemon tells a worker (numbers as in proto ``mfsd.v1.Event.Kind``)."""

    INFEASIBLE = 1
    PRUNED = 2
    RESTORED = 3
    EXPIRED = 4
    CONNECTION_GONE = 5
    DEMOTED = 6
    OVERTIME = 7


@dataclass(frozen=True, slots=True)
class Event:
    """One message on the way back."""

    kind: EventKind
    request_id: str
    transfer_id: str
    reason: str
