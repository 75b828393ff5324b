# SPDX-License-Identifier: Apache-2.0
"""From selectors to live sockets, and how far their bytes have come.

Everything is asked of inet_diag (inet_diag.py) in the network namespace of the thread that makes the resolver.
No capability is needed, except that the sockets of another user's process (ProcessSelector) are only visible with
CAP_SYS_PTRACE.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from mfsd.ground.model import (
    NO_COOKIE,
    Address,
    CookieSelector,
    Endpoints,
    HintError,
    HintSelector,
    ProcessSelector,
    TupleSelector,
    on_the_wire,
)
from mfsd.host import inet_diag
from mfsd.host.inet_diag import Answer, Diag, DiagError, Filter, Row

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

__all__ = ["DiagError", "Socket", "SocketResolver", "TcpProgress"]

_SENDING: Final = (
    1 << inet_diag.ESTABLISHED
    | 1 << inet_diag.SYN_SENT
    | 1 << inet_diag.FIN_WAIT1
    | 1 << inet_diag.CLOSE_WAIT
    | 1 << inet_diag.LAST_ACK
    | 1 << inet_diag.CLOSING
)
"""States in which a socket has, or may yet get, bytes to send. FIN_WAIT2 and TIME_WAIT only acknowledge."""
_PROGRESS: Final = _SENDING | 1 << inet_diag.FIN_WAIT2

_FILTERS_PER_DUMP: Final = 256
"""The kernel checks a filter program in time quadratic in its length, and runs it for every socket; with more rules
than this it is cheaper to get all sockets, unless most rules name the same peer."""
_BOUND_MAX: Final = 65536


@dataclass(frozen=True, slots=True)
class Socket:
    """A live local socket. ``cookie`` is its SO_COOKIE, ``inode`` 0 when no process holds it any more."""

    cookie: int
    endpoints: Endpoints
    uid: int
    inode: int
    cgroup: int = 0
    """Id of the cgroup (v2) of who made it, of `SocketResolver.all` alone; 0: the kernel does not tell."""


@dataclass(slots=True)  # frozen ones take four times as long to make, and a tick may make hundreds
class TcpProgress:
    """Where the byte stream of a TCP socket stands.

    ``bytes_acked`` is the kernel's tcpi_bytes_acked: payload that the peer has acknowledged, plus 1 for the SYN if this
    side has opened the connection, plus 1 for an acknowledged FIN. So compare differences of one socket; that
    ``bytes_acked + unsent_plus_unacked`` grows exactly by what the process writes (and by 1 for the FIN) always holds.
    ``notsent`` is the part of ``unsent_plus_unacked`` that was never handed to the device. ``total_retrans`` counts
    segments. ``last_sent_ms`` is the time since data were sent last, ``last_ack_ms`` since the last acknowledgement.
    ``busy_us`` is for how long there has been something to send or to be acknowledged, of it ``rwnd_limited_us`` with
    the receiver's window closed and ``sndbuf_limited_us`` with too small a send buffer; ``app_limited``: the process
    gave too little when the rate was measured last; ``slow_start``: no loss or delay has ended it yet; ``queued`` is
    the memory of packets that are below TCP and have not left the host's queues; ``holes``: something was lost or
    overtaken, so that ``bytes_acked`` stands still until it has arrived and then jumps; ``window_full``: nothing new
    is sent until something is acknowledged, since too little of the window is free.
    """

    bytes_acked: int
    unsent_plus_unacked: int
    notsent: int
    total_retrans: int
    rto_us: int
    last_ack_ms: int
    last_sent_ms: int
    busy_us: int
    rwnd_limited_us: int
    sndbuf_limited_us: int
    app_limited: bool
    slow_start: bool
    queued: int
    holes: bool
    window_full: bool


class SocketResolver:
    """Finds sockets. Holds one netlink descriptor until `close`; may be shared by threads."""

    def __init__(self, like: SocketResolver | None = None) -> None:
        """``like``: whose knowledge of interfaces to share; each has a descriptor, and a turn to take, of its own."""
        self._diag = Diag()
        self._bound: dict[int, int] = {} if like is None else like._bound  # noqa: SLF001 - of our own class
        """Interface by cookie, of sockets bound to one (SO_BINDTODEVICE, VRF, link-local): part of the lookup key."""

    def close(self) -> None:
        """Idempotent."""
        self._diag.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def resolve(self, selector: HintSelector) -> list[Socket]:
        """Sockets that the selector means now, in no particular order; empty if there are none yet.

        An exact TCP tuple costs one lookup; everything else lists sockets, filtered in the kernel where it can.
        Sockets bound to an interface are not found by exact tuple, whose key lacks the interface; nor are
        unconnected UDP sockets, because their cookie would stand for all their peers: the classifier matches both
        by the tuple itself.

        Raises HintError when a process can't be looked at, and DiagError.
        """
        inodes = {0: process_sockets(selector.pid)} if isinstance(selector, ProcessSelector) else {}
        return self._resolve([selector], inodes)[0]

    def owner(self, e: Endpoints, cookie: int = NO_COOKIE) -> int:
        """User of the socket that packets of these endpoints leave from, connected or not; -1: there is none.

        ``cookie``: it must be this one. Raises DiagError.
        """
        ends, bound = (_packed(e.src), e.sport, _packed(e.dst), e.dport), self._bound.get(cookie, 0)
        request = inet_diag.lookup_request(e.protocol, *ends, ifindex=bound, cookie=cookie)
        (answer,) = self._diag.lookup([request])
        return -1 if answer is None else answer.row.uid

    def datagrams(self) -> set[int]:
        """Cookies of all UDP sockets, connected or not. Raises DiagError."""
        states, families = 1 << inet_diag.ESTABLISHED | 1 << inet_diag.CLOSE, (socket.AF_INET, socket.AF_INET6)
        return {row.cookie for f in families for row in self._diag.dump(f, socket.IPPROTO_UDP, states)}

    def resolve_many(self, selectors: Sequence[HintSelector]) -> list[list[Socket]]:
        """As `resolve` for each, aligned with ``selectors``, sharing one listing per address family.

        Meant for rules that wait for their sockets: what can't be resolved (process gone, not permitted) is empty.
        """
        inodes: dict[int, set[int]] = {}
        for n, selector in enumerate(selectors):
            if isinstance(selector, ProcessSelector):
                try:
                    inodes[n] = process_sockets(selector.pid)
                except HintError:
                    inodes[n] = set()
        return self._resolve(selectors, inodes)

    def bound_to(self, cookie: int, ifindex: int) -> None:
        """A socket is bound to an interface, which is part of what it is looked up by."""
        if len(self._bound) < _BOUND_MAX:
            self._bound[cookie] = ifindex

    def all(self) -> Iterator[Socket]:
        """Every TCP socket that has, or may yet get, bytes to send."""
        for family in (socket.AF_INET, socket.AF_INET6):
            for row, cgroup in self._diag.with_cgroups(family, socket.IPPROTO_TCP, _SENDING):
                yield self._socket(row, socket.IPPROTO_TCP, cgroup)

    def tcp_progress(self, sockets: Iterable[tuple[int, Endpoints]]) -> dict[int, TcpProgress | None]:
        """Progress by cookie of TCP sockets given as (cookie, endpoints); those that are gone are absent.

        None: in TIME_WAIT, or waiting for no more than the FIN of the peer, so all has been acknowledged. One exact
        lookup each, several per system call. A reused tuple has another cookie and counts as gone.
        """
        wanted = [(c, e) for c, e in sockets if e.protocol == socket.IPPROTO_TCP]
        bound = self._bound
        answers = self._diag.lookup(
            [
                inet_diag.lookup_request(
                    socket.IPPROTO_TCP,
                    e.src.packed,
                    e.sport,
                    e.dst.packed,
                    e.dport,
                    ifindex=bound.get(cookie, 0) if bound else 0,
                    cookie=cookie,
                    ext=inet_diag.EXT_INFO | inet_diag.EXT_MEMORY,
                )
                for cookie, e in wanted
            ]
        )
        out: dict[int, TcpProgress | None] = {}
        for (cookie, _), answer in zip(wanted, answers, strict=True):
            if answer is not None and _over(answer):
                out[cookie] = None
                continue
            if answer is None or answer.tcp is None or not _PROGRESS >> answer.row.state & 1:
                bound.pop(cookie, None)
                continue
            row, tcp = answer.row, answer.tcp
            out[cookie] = TcpProgress(
                tcp.bytes_acked,
                row.wqueue,
                tcp.notsent,
                tcp.total_retrans,
                tcp.rto_us,
                tcp.last_ack_ms,
                tcp.last_sent_ms,
                tcp.busy_us,
                tcp.rwnd_limited_us,
                tcp.sndbuf_limited_us,
                bool(tcp.flags & inet_diag.APP_LIMITED),
                tcp.snd_cwnd < tcp.snd_ssthresh,
                answer.queued,
                tcp.ca_state in inet_diag.HOLES,
                tcp.window_full,
            )
        return out

    # --- one pass over all selectors ----------------------------------------------------------------------------------

    def _resolve(self, selectors: Sequence[HintSelector], inodes: dict[int, set[int]]) -> list[list[Socket]]:
        """``inodes`` holds the sockets of the process by index of its selector."""
        out: list[dict[int, Socket]] = [{} for _ in selectors]  # by cookie: a listing may show a socket twice
        exact = [
            n
            for n, s in enumerate(selectors)
            if isinstance(s, TupleSelector) and s.exact and s.protocol == socket.IPPROTO_TCP
        ]
        self._exact(selectors, exact, out)
        rest = set(range(len(selectors))) - set(exact)
        udp = {n for n in rest if isinstance(s := selectors[n], TupleSelector) and s.protocol == socket.IPPROTO_UDP}
        # An empty process has no sockets to look for.
        tcp = {n for n in rest - udp if n not in inodes or inodes[n]}
        self._listed(socket.IPPROTO_TCP, _SENDING, selectors, tcp, inodes, out)
        cookies = {n for n in tcp if isinstance(selectors[n], CookieSelector) and not out[n]}
        self._listed(socket.IPPROTO_UDP, 1 << inet_diag.ESTABLISHED, selectors, udp | cookies, inodes, out)
        return [list(found.values()) for found in out]

    def _exact(self, selectors: Sequence[HintSelector], indices: list[int], out: list[dict[int, Socket]]) -> None:
        requests = []
        for n in indices:
            s = selectors[n]
            assert isinstance(s, TupleSelector)  # noqa: S101 - narrows the type; the caller chose the indices
            assert s.src is not None  # noqa: S101 - so does `exact`
            src = _packed(s.src)
            requests.append(inet_diag.lookup_request(s.protocol, src, s.sport.first, _packed(s.dst), s.dport.first))
        for n, answer in zip(indices, self._diag.lookup(requests), strict=True):
            # The kernel also answers with a listener or with TIME_WAIT remains.
            if answer is not None and _SENDING >> answer.row.state & 1:
                out[n][answer.row.cookie] = self._socket(answer.row, socket.IPPROTO_TCP)

    def _listed(
        self,
        protocol: int,
        states: int,
        selectors: Sequence[HintSelector],
        indices: set[int],
        inodes: dict[int, set[int]],
        out: list[dict[int, Socket]],
    ) -> None:
        if not indices:
            return
        index = _Index({n: selectors[n] for n in indices}, inodes)
        for family in index.families():
            for row in self._diag.dump(family, protocol, states, index.program()):
                for n in index.match(row):
                    out[n][row.cookie] = self._socket(row, protocol)

    def _socket(self, row: Row, protocol: int, cgroup: int = 0) -> Socket:
        if row.ifindex:
            self.bound_to(row.cookie, row.ifindex)
        src, dst = ipaddress.ip_address(row.src), ipaddress.ip_address(row.dst)
        return Socket(row.cookie, Endpoints(src, row.sport, dst, row.dport, protocol), row.uid, row.inode, cgroup)


class _Index:
    """Selectors arranged so that a listed socket finds those that mean it without trying all."""

    def __init__(self, selectors: dict[int, HintSelector], inodes: dict[int, set[int]]) -> None:
        self._cookies: dict[int, list[int]] = {}
        self._tuples: dict[bytes, list[tuple[int, TupleSelector]]] = {}
        self._inodes: dict[int, list[tuple[int, ProcessSelector]]] = {}
        self._filters: list[Filter] = []
        self._selectors = list(selectors.values())
        for n, s in selectors.items():
            if isinstance(s, CookieSelector):
                self._cookies.setdefault(s.cookie, []).append(n)
            elif isinstance(s, TupleSelector):
                self._tuples.setdefault(_packed(s.dst), []).append((n, s))
                self._filters.append(_tuple_filter(s))
            else:
                for inode in inodes[n]:
                    self._inodes.setdefault(inode, []).append((n, s))
                self._filters.append(_process_filter(s))

    def families(self) -> list[int]:
        """Families to list. IPv6 always: an IPv4 peer may hang on an IPv4-mapped IPv6 socket."""
        only_v6 = all(
            (isinstance(s, TupleSelector) and len(_packed(s.dst)) == 16)
            or (isinstance(s, ProcessSelector) and s.remote is not None and s.remote.version == 6)
            for s in self._selectors
        )
        return [socket.AF_INET6] if only_v6 else [socket.AF_INET, socket.AF_INET6]

    def program(self) -> bytes:
        """Filter for the kernel; empty (everything) when cookies are sought, for which it has no condition."""
        if self._cookies or len(self._filters) > _FILTERS_PER_DUMP:
            return b""
        return inet_diag.bytecode(self._filters)

    def match(self, row: Row) -> list[int]:
        """Indices of the selectors that mean this socket."""
        found = list(self._cookies.get(row.cookie, ()))
        for n, s in self._tuples.get(row.dst, ()):
            if row.sport in s.sport and row.dport in s.dport and (s.src is None or _packed(s.src) == row.src):
                found.append(n)
        for n, p in self._inodes.get(row.inode, ()):
            if row.dport in p.dport and (p.remote is None or ipaddress.ip_address(row.dst) in p.remote):
                found.append(n)
        return found


def _tuple_filter(s: TupleSelector) -> Filter:
    src = None if s.src is None else _packed(s.src)
    dst = _packed(s.dst)
    return Filter(
        None if src is None else (src, len(src) * 8),
        (dst, len(dst) * 8),
        (s.sport.first, s.sport.last),
        (s.dport.first, s.dport.last),
    )


def _process_filter(s: ProcessSelector) -> Filter:
    remote = None if s.remote is None else (s.remote.network_address.packed, s.remote.prefixlen)
    return Filter(None, remote, (0, 0xFFFF), (s.dport.first, s.dport.last))


def _packed(address: Address) -> bytes:
    """4 or 16 bytes of it, as the device sees it."""
    return on_the_wire(address).packed


def _over(answer: Answer) -> bool:
    """What is left of a closed socket whose FIN has been acknowledged (struct inet_timewait_sock, tcp_time_wait())."""
    return answer.row.state == inet_diag.TIME_WAIT or (
        answer.row.state == inet_diag.FIN_WAIT2 and answer.tcp is None  # a full socket has something to say
    )


def process_sockets(pid: int) -> set[int]:
    """Inodes of the sockets that a process holds.

    Joined with inet_diag's inodes this is exact; psutil's net_connections would parse all of /proc/net/tcp on each call
    and gives addresses only. Raises HintError when the process is gone or belongs to somebody else.
    """
    path = f"/proc/{pid}/fd"
    inodes: set[int] = set()
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                try:
                    target = os.readlink(entry.path)  # noqa: PTH115 - a Path per descriptor triples the cost
                except FileNotFoundError:
                    continue  # closed meanwhile
                if target.startswith("socket:["):
                    inodes.add(int(target[8:-1]))
    except (FileNotFoundError, ProcessLookupError):
        raise HintError(
            "selector.process.pid", f"there is no process {pid}", "send the pid as the daemon's pid namespace counts it"
        ) from None
    except PermissionError:
        raise HintError(
            "selector.process.pid",
            f"the sockets of process {pid} are hidden from the daemon",
            "send cookies or tuples, run the daemon as the same user, or give it CAP_SYS_PTRACE",
        ) from None
    return inodes
