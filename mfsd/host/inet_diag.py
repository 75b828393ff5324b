# SPDX-License-Identifier: Apache-2.0
"""The wire format of inet_diag, as far as mfsd asks: exact lookups in batches, filtered dumps, ``tcp_info``.

Why not pyroute2's ``DiagSocket``: it only dumps, and has errors switched off (a lookup of a socket that is gone would
not end).

Layouts: include/uapi/linux/{inet_diag,tcp}.h. Behaviour: net/ipv4/inet_diag.c.
"""

from __future__ import annotations

import errno
import socket
import struct
from socket import ntohs
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from mfsd.ground.model import NO_COOKIE
from mfsd.host import netlink as nl

if TYPE_CHECKING:
    from collections.abc import Sequence

NETLINK_SOCK_DIAG: Final = 4
SOCK_DIAG_BY_FAMILY: Final = 20
INET_DIAG_REQ_BYTECODE: Final = 1
INET_DIAG_INFO: Final = 2
INET_DIAG_CONG: Final = 4
INET_DIAG_SKMEMINFO: Final = 7
INET_DIAG_CGROUP_ID: Final = 21
EXT_INFO: Final = 1 << (INET_DIAG_INFO - 1)
EXT_MEMORY: Final = 1 << (INET_DIAG_SKMEMINFO - 1)

ESTABLISHED, SYN_SENT, SYN_RECV, FIN_WAIT1, FIN_WAIT2, TIME_WAIT, CLOSE, CLOSE_WAIT, LAST_ACK, LISTEN, CLOSING = range(
    1, 12
)
"""Socket states, include/net/tcp_states.h. A connected UDP socket is ESTABLISHED."""

_ID: Final = "HH16s16sIII"  # sport, dport (both network order), src, dst, ifindex, cookie low, cookie high
_REQUEST: Final = struct.Struct(f"=4BI{_ID}")  # inet_diag_req_v2
_LOOKUP: Final = nl.request(SOCK_DIAG_BY_FAMILY, 0, bytes(_REQUEST.size))[: nl.HEADER.size]
"""Header of a lookup, the same for all."""
_MESSAGE: Final = struct.Struct(f"=4B{_ID}5I")  # inet_diag_msg

_BC_JMP, _BC_S_GE, _BC_S_LE, _BC_D_GE, _BC_D_LE = 1, 2, 3, 4, 5
_BC_S_COND, _BC_D_COND = 7, 8
_BC_OP: Final = struct.Struct("=BBH")
_BC_HOST: Final = struct.Struct("=BBHi")

_CGROUP: Final = struct.Struct("=Q")

_IN_FLIGHT: Final = 64
"""Lookups per sendmsg. Replies queue up in the socket (about 2 KB each) before the first can be read, and what does not
fit into the default receive buffer of 208 KB would be dropped."""
_ANYWHERE: Final = b"\0" * 16


class DiagError(OSError):
    """inet_diag can't answer; the text says what to do."""


class Row(NamedTuple):
    """One socket (``struct inet_diag_msg``); addresses are packed, IPv4-mapped ones already 4 bytes."""

    state: int
    sport: int
    dport: int
    src: bytes
    dst: bytes
    ifindex: int
    cookie: int
    wqueue: int
    uid: int
    inode: int


class Filter(NamedTuple):
    """What the kernel may leave out of a dump; networks are (packed address, prefix length) or None for any."""

    src: tuple[bytes, int] | None
    dst: tuple[bytes, int] | None
    sport: tuple[int, int]
    dport: tuple[int, int]


def _unmapped(packed: bytes) -> bytes:
    """IPv4 of an IPv4-mapped IPv6 address (RFC 4291 2.5.5.2), else the same."""
    return packed[12:] if packed[:12] == b"\0\0\0\0\0\0\0\0\0\0\xff\xff" else packed


def _row(m: nl.Message) -> Row:
    family, state, _, _, sport, dport, src, dst, ifindex, low, high, _, _, wqueue, uid, inode = nl.fields(
        _MESSAGE, m.data, m.body, m.end
    )
    if family == socket.AF_INET:
        src, dst = src[:4], dst[:4]
    else:
        src, dst = _unmapped(src), _unmapped(dst)
    values = state, ntohs(sport), ntohs(dport), src, dst, ifindex, low | high << 32, wqueue, uid, inode
    return tuple.__new__(Row, values)  # Row(...) goes through a function of Python: a third of all this


WIN_DIVISOR: Final = 3
"""The default of net.ipv4.tcp_tso_win_divisor."""


class Tcp(NamedTuple):
    """The parts of ``struct tcp_info`` that mfsd reads.

    ``unacked``, ``sacked``, ``lost`` and ``retrans`` are segments. ``last_sent_ms``: since data were sent last,
    ``last_ack_ms``: since the last acknowledgement came.
    """

    ca_state: int
    flags: int
    rto_us: int
    unacked: int
    sacked: int
    lost: int
    retrans: int
    last_sent_ms: int
    last_ack_ms: int
    snd_ssthresh: int
    snd_cwnd: int
    total_retrans: int
    bytes_acked: int
    notsent: int
    busy_us: int
    rwnd_limited_us: int
    sndbuf_limited_us: int

    @property
    def window_full(self) -> bool:
        """Nothing new is sent until something is acknowledged.

        That is so already while less than a part of the congestion window is free: tcp_tso_should_defer,
        net/ipv4/tcp_output.c.
        """
        free = self.snd_cwnd - (self.unacked - self.sacked - self.lost + self.retrans)
        return WIN_DIVISOR * free < self.snd_cwnd


_TCP_INFO: Final = struct.Struct(
    "=xB5xBI12xIIII4xI8xI16xII16xI16xQ16xI20xQQQ"
)  # ca_state@1 delivery_rate_app_limited@7 rto@8 unacked@24 sacked@28 lost@32 retrans@36 last_data_sent@44
# last_ack_recv@56 snd_ssthresh@76 snd_cwnd@80
# total_retrans@100 bytes_acked@120 notsent@144 busy_time@168 rwnd_limited@176 sndbuf_limited@184
HOLES: Final = frozenset({1, 3, 4})
"""Tcp.ca_state: TCP_CA_Disorder, TCP_CA_Recovery, TCP_CA_Loss."""
APP_LIMITED: Final = 1
"""Bit of Tcp.flags."""
_MEMORY: Final = struct.Struct("=8xI")  # SK_MEMINFO_WMEM_ALLOC, include/uapi/linux/sock_diag.h
_HEAD: Final = nl.ATTR.size
_INFO_LENGTH: Final = _HEAD + _TCP_INFO.size
_MEMORY_LENGTH: Final = _HEAD + _MEMORY.size


class Answer(NamedTuple):
    """Reply to an exact lookup; ``tcp`` is None unless asked for with EXT_INFO, and for sockets without it."""

    row: Row
    tcp: Tcp | None
    queued: int
    """Memory of packets below TCP (sk_wmem_alloc); 0 unless asked for with EXT_MEMORY."""


def lookup_request(  # every field of the kernel's key is an argument
    protocol: int,
    src: bytes,
    sport: int,
    dst: bytes,
    dport: int,
    *,
    ifindex: int = 0,
    cookie: int = NO_COOKIE,
    ext: int = 0,
) -> bytes:
    """One exact lookup, to be sent by `Diag.lookup`."""
    family = socket.AF_INET if len(dst) == 4 else socket.AF_INET6
    return _LOOKUP + _REQUEST.pack(
        family, protocol, ext, 0, 0xFFF,
        socket.htons(sport), socket.htons(dport), src, dst, ifindex, cookie & 0xFFFFFFFF, cookie >> 32,
    )  # fmt: skip


def _conditions(f: Filter) -> list[tuple[int, bytes]]:
    """Operations of a filter: (code, argument)."""
    ops: list[tuple[int, bytes]] = []
    for code, net in ((_BC_S_COND, f.src), (_BC_D_COND, f.dst)):
        if net is not None:
            packed, prefix = net
            family = socket.AF_INET if len(packed) == 4 else socket.AF_INET6
            ops.append((code, _BC_HOST.pack(family, prefix, 0, -1) + packed))
    for ge, le, (first, last) in ((_BC_S_GE, _BC_S_LE, f.sport), (_BC_D_GE, _BC_D_LE, f.dport)):
        if first > 0:
            ops.append((ge, _BC_OP.pack(0, 0, first)))
        if last < 0xFFFF:
            ops.append((le, _BC_OP.pack(0, 0, last)))
    return ops


def bytecode(filters: Sequence[Filter]) -> bytes:
    """Program for INET_DIAG_REQ_BYTECODE that accepts a socket that any of the filters accepts.

    Each filter is a run of conditions; a failing one jumps behind the run, and all but the last run end with a jump to
    the end of the program, which accepts. A jump to four bytes behind the end refuses (inet_diag_bc_run).
    """
    runs = [_conditions(f) for f in filters]
    if not all(runs):
        return b""  # a filter without conditions accepts everything
    sizes = [sum(_BC_OP.size + len(arg) for _, arg in ops) for ops in runs]
    out = bytearray()
    tail = sum(sizes) + _BC_OP.size * (len(runs) - 1)  # bytes from here to the end of the program
    for n, ops in enumerate(runs):
        last_run = n == len(runs) - 1
        left = sizes[n] + _BC_OP.size  # bytes to the start of the next run; for the last one, 4 behind the end
        for code, arg in ops:
            size = _BC_OP.size + len(arg)
            out += _BC_OP.pack(code, size, left) + arg
            left -= size
        tail -= sizes[n]
        if not last_run:
            out += _BC_OP.pack(_BC_JMP, _BC_OP.size, tail)
            tail -= _BC_OP.size
    return bytes(out)


class Diag:
    """A NETLINK_SOCK_DIAG socket of the network namespace of the thread that makes it. Thread-safe.

    Raises DiagError when the kernel has no inet_diag for TCP.
    """

    def __init__(self) -> None:
        try:
            self._sock = nl.NetlinkSocket(NETLINK_SOCK_DIAG, in_flight=_IN_FLIGHT)
        except OSError as e:
            raise DiagError(
                e.errno, f"no NETLINK_SOCK_DIAG socket ({e.strerror}); the kernel needs CONFIG_INET_DIAG"
            ) from e
        try:
            # Without tcp_diag an exact lookup gives ENOENT, as for a socket that is gone; so list nothing once.
            self.dump(socket.AF_INET, socket.IPPROTO_TCP, 1 << LISTEN, sport=1)
        except BaseException:
            self._sock.close()
            raise

    def close(self) -> None:
        """Idempotent."""
        self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def lookup(self, requests: Sequence[bytes]) -> list[Answer | None]:
        """Answers to exact lookups, in order; None where there is no such socket. Raises DiagError.

        Mind that the kernel also answers with a listener that would accept such a connection, and with TIME_WAIT
        remains.
        """
        try:
            return [_answer(m) for m in self._sock.batch(requests)]
        except nl.NetlinkError as e:
            raise DiagError(e.errno, str(e)) from e

    def dump(self, family: int, protocol: int, states: int, program: bytes = b"", *, sport: int = 0) -> list[Row]:
        """Sockets of a family (AF_INET6 includes IPv4-mapped ones) in any of ``states``, a mask of ``1 << state``.

        ``program`` comes from `bytecode`. A socket that changes its state meanwhile may be missed or come twice, as in
        ss(8). Raises DiagError.
        """
        return [_row(m) for m in self._dump(family, protocol, states, program, sport)]

    def with_cgroups(self, family: int, protocol: int, states: int) -> list[tuple[Row, int]]:
        """As `dump`, and the id of the cgroup (v2) of who made each socket; 0: the kernel does not tell.

        Needs no capability, unlike finding the process that has a socket. Raises DiagError.
        """
        out = []
        for m in self._dump(family, protocol, states):
            at, length = nl.find(m.data, m.body + _MESSAGE.size, m.end, INET_DIAG_CGROUP_ID)
            told = length >= _HEAD + _CGROUP.size
            out.append((_row(m), _CGROUP.unpack_from(m.data, at + _HEAD)[0] if told else 0))
        return out

    def algorithms(self) -> list[tuple[bytes, str]]:
        """(the peer's address, the congestion control) of each established TCP connection. Raises DiagError."""
        out = []
        for family in (socket.AF_INET, socket.AF_INET6):
            for m in self._dump(family, socket.IPPROTO_TCP, 1 << ESTABLISHED, ext=1 << (INET_DIAG_CONG - 1)):
                name = nl.attrs(m.data, m.body + _MESSAGE.size, m.end).get(INET_DIAG_CONG, b"")
                out.append((_row(m).dst, name.rstrip(b"\0").decode(errors="replace")))
        return out

    def _dump(
        self, family: int, protocol: int, states: int, program: bytes = b"", sport: int = 0, ext: int = 0
    ) -> list[nl.Message]:
        body = _REQUEST.pack(
            family, protocol, ext, 0, states, socket.htons(sport), 0, _ANYWHERE, _ANYWHERE, 0, 0, 0,
        ) + (nl.attr(INET_DIAG_REQ_BYTECODE, program) if program else b"")  # fmt: skip
        module = "udp_diag" if protocol == socket.IPPROTO_UDP else "tcp_diag"
        request = nl.request(SOCK_DIAG_BY_FAMILY, nl.NLM_DUMP, body)
        try:
            return self._sock.dump(request, f"listing sockets with {module}", torn=True)
        except nl.NetlinkError as e:
            if e.errno == errno.ENOENT:
                raise DiagError(
                    e.errno, f"the kernel can't list sockets: module {module} is missing; run `modprobe {module}`"
                ) from e
            raise DiagError(e.errno, str(e)) from e


def _answer(m: nl.Message) -> Answer | None:
    """What an exact lookup found. Raises NetlinkError."""
    if m.kind == nl.NLMSG_ERROR:
        # ESTALE: other cookie. EINVAL: an IPv6 lookup in a kernel without IPv6.
        if m.code not in (0, errno.ENOENT, errno.ESTALE, errno.EINVAL):
            raise nl.NetlinkError(m.code, "socket lookup", m.note)
        return None
    row, data = _row(m), m.data
    (info, of_info), (memory, of_memory) = nl.find_two(
        data, m.body + _MESSAGE.size, m.end, INET_DIAG_INFO, INET_DIAG_SKMEMINFO
    )
    tcp = tuple.__new__(Tcp, _TCP_INFO.unpack_from(data, info + _HEAD)) if of_info >= _INFO_LENGTH else None  # as _row
    queued = _MEMORY.unpack_from(data, memory + _HEAD)[0] if of_memory >= _MEMORY_LENGTH else 0
    return tuple.__new__(Answer, (row, tcp, queued))
