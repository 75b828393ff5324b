# SPDX-License-Identifier: Apache-2.0
"""The wire format of inet_diag, as far as mfsd asks: exact lookups in batches, filtered dumps, ``tcp_info``.

Why not pyroute2's ``DiagSocket``: it only dumps, has errors switched off (a lookup of a socket that is gone would not
end), and takes hundreds of microseconds per message, where the engine asks how far many connections are on a tick.

Layouts: include/uapi/linux/{netlink,inet_diag,tcp}.h. Behaviour: net/ipv4/inet_diag.c.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import threading
from typing import TYPE_CHECKING, Final, NamedTuple, Self

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType

NETLINK_SOCK_DIAG: Final = 4
SOCK_DIAG_BY_FAMILY: Final = 20
NLM_F_REQUEST: Final = 0x1
NLM_F_DUMP: Final = 0x300
NLM_F_DUMP_INTR: Final = 0x10
NLMSG_ERROR: Final = 2
NLMSG_DONE: Final = 3
INET_DIAG_REQ_BYTECODE: Final = 1
INET_DIAG_INFO: Final = 2
EXT_INFO: Final = 1 << (INET_DIAG_INFO - 1)
NO_COOKIE: Final = 0xFFFFFFFF_FFFFFFFF
"""INET_DIAG_NOCOOKIE: any socket with these endpoints."""

ESTABLISHED, SYN_SENT, SYN_RECV, FIN_WAIT1, FIN_WAIT2, TIME_WAIT, CLOSE, CLOSE_WAIT, LAST_ACK, LISTEN, CLOSING = range(
    1, 12
)
"""Socket states, include/net/tcp_states.h. A connected UDP socket is ESTABLISHED."""

STATE_NAMES: Final = {
    ESTABLISHED: "established",
    SYN_SENT: "syn-sent",
    SYN_RECV: "syn-recv",
    FIN_WAIT1: "fin-wait-1",
    FIN_WAIT2: "fin-wait-2",
    TIME_WAIT: "time-wait",
    CLOSE: "close",
    CLOSE_WAIT: "close-wait",
    LAST_ACK: "last-ack",
    LISTEN: "listen",
    CLOSING: "closing",
}

_NLMSGHDR: Final = struct.Struct("=IHHII")
_ID: Final = "HH16s16sIII"  # sport, dport (both network order), src, dst, ifindex, cookie low, cookie high
_REQUEST: Final = struct.Struct(f"=IHHII4BI{_ID}")  # nlmsghdr and inet_diag_req_v2
_MESSAGE: Final = struct.Struct(f"=4B{_ID}5I")  # inet_diag_msg
_ATTR: Final = struct.Struct("=HH")
_ERRNO: Final = struct.Struct("=i")

_BC_JMP, _BC_S_GE, _BC_S_LE, _BC_D_GE, _BC_D_LE = 1, 2, 3, 4, 5
_BC_S_COND, _BC_D_COND = 7, 8
_BC_OP: Final = struct.Struct("=BBH")
_BC_HOST: Final = struct.Struct("=BBHi")

_BATCH: Final = 64
"""Lookups per sendmsg. Replies queue up in the socket (about 2 KB each) before the first can be read, and what does not
fit into the default receive buffer of 208 KB would be dropped."""
_DUMP_TRIES: Final = 4


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


def _row(buffer: memoryview, at: int) -> Row:
    family, state, _, _, sport, dport, src, dst, ifindex, low, high, _, _, wqueue, uid, inode = _MESSAGE.unpack_from(
        buffer, at
    )
    if family == socket.AF_INET:
        src, dst = src[:4], dst[:4]
    else:
        src, dst = _unmapped(src), _unmapped(dst)
    return Row(state, socket.ntohs(sport), socket.ntohs(dport), src, dst, ifindex, low | high << 32, wqueue, uid, inode)


class Tcp(NamedTuple):
    """The parts of ``struct tcp_info`` that mfsd reads; times in microseconds."""

    rto_us: int
    snd_cwnd: int
    total_retrans: int
    bytes_acked: int
    notsent: int


_TCP_INFO: Final = struct.Struct(
    "=8xI68xI16xI16xQ16xI"
)  # rto@8 snd_cwnd@80 total_retrans@100 bytes_acked@120 notsent@144


class Answer(NamedTuple):
    """Reply to an exact lookup; ``tcp`` is None unless asked for with EXT_INFO, and for sockets without it."""

    row: Row
    tcp: Tcp | None


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
    """One exact lookup, to be sent by `Diag.lookup` (which fills in the sequence number)."""
    family = socket.AF_INET if len(dst) == 4 else socket.AF_INET6
    return _REQUEST.pack(
        _REQUEST.size, SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST, 0, 0,
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
            self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG)
        except OSError as e:
            raise DiagError(
                e.errno, f"no NETLINK_SOCK_DIAG socket ({e.strerror}); the kernel needs CONFIG_INET_DIAG"
            ) from e
        try:
            self._sock.bind((0, 0))
            self._lock = threading.Lock()
            self._seq = 0
            self._buffer = memoryview(bytearray(1 << 17))  # dumps come in parts of at most 32 KB
            # Without tcp_diag an exact lookup gives ENOENT, as for a socket that is gone; so list nothing once.
            for _ in self.dump(socket.AF_INET, socket.IPPROTO_TCP, 1 << LISTEN, sport=1):
                pass
        except BaseException:
            self._sock.close()
            raise

    def close(self) -> None:
        """Idempotent."""
        self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def fileno(self) -> int:
        """Descriptor of the netlink socket; -1 when closed."""
        return self._sock.fileno()

    def lookup(self, requests: Sequence[bytes]) -> list[Answer | None]:
        """Answers to exact lookups, in order; None where there is no such socket.

        The kernel handles a request inside sendmsg, so all replies of a batch are there when it returns, each with the
        sequence number of its request. Mind that it also answers with a listener that would accept such a connection,
        and with TIME_WAIT remains.
        """
        out: list[Answer | None] = [None] * len(requests)
        with self._lock:
            for start in range(0, len(requests), _BATCH):
                self._lookup(requests[start : start + _BATCH], out, start)
        return out

    def _lookup(self, batch: Sequence[bytes], out: list[Answer | None], start: int) -> None:
        first = self._next_seq(len(batch))
        blob = bytearray().join(batch)
        for n in range(len(batch)):
            struct.pack_into("=I", blob, n * _REQUEST.size + 8, first + n)
        self._sock.send(blob)
        waiting = len(batch)
        while waiting:
            try:
                size = self._sock.recv_into(self._buffer, 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                raise DiagError(
                    errno.ENOBUFS, f"the kernel left {waiting} of {len(batch)} socket lookups unanswered"
                ) from None
            at = 0
            while at + _NLMSGHDR.size <= size:
                length, kind, _, seq, _ = _NLMSGHDR.unpack_from(self._buffer, at)
                n = seq - first
                if 0 <= n < len(batch):  # else a leftover of a dump that was given up
                    waiting -= 1
                    if kind == SOCK_DIAG_BY_FAMILY:
                        body = at + _NLMSGHDR.size
                        out[start + n] = Answer(_row(self._buffer, body), self._tcp(body + _MESSAGE.size, at + length))
                    elif kind == NLMSG_ERROR:
                        self._check(_ERRNO.unpack_from(self._buffer, at + _NLMSGHDR.size)[0])
                at += length + 3 & ~3

    @staticmethod
    def _check(code: int) -> None:
        # ESTALE: other cookie. EINVAL: an IPv6 lookup in a kernel without IPv6.
        if -code not in (0, errno.ENOENT, errno.ESTALE, errno.EINVAL):
            raise DiagError(-code, f"socket lookup: {os.strerror(-code)}")

    def _tcp(self, at: int, end: int) -> Tcp | None:
        """INET_DIAG_INFO among the attributes between two offsets of the buffer."""
        while at + _ATTR.size <= end:
            length, kind = _ATTR.unpack_from(self._buffer, at)
            if kind == INET_DIAG_INFO and length >= _ATTR.size + _TCP_INFO.size:
                return Tcp._make(_TCP_INFO.unpack_from(self._buffer, at + _ATTR.size))
            if length < _ATTR.size:
                break
            at += length + 3 & ~3
        return None

    def dump(self, family: int, protocol: int, states: int, program: bytes = b"", *, sport: int = 0) -> Iterator[Row]:
        """Sockets of a family (AF_INET6 includes IPv4-mapped ones) in any of ``states``, a mask of ``1 << state``.

        ``program`` comes from `bytecode`. A socket that changes its state meanwhile may be missed or come twice, as in
        ss(8). Raises DiagError.
        """
        rows: list[Row] = []
        with self._lock:
            for _ in range(_DUMP_TRIES):
                rows.clear()
                if self._dump(family, protocol, states, program, sport, rows):
                    break
        return iter(rows)

    def _dump(self, family: int, protocol: int, states: int, program: bytes, sport: int, rows: list[Row]) -> bool:
        """Fill ``rows``; False when the kernel says that the dump is inconsistent."""
        attr = _ATTR.pack(_ATTR.size + len(program), INET_DIAG_REQ_BYTECODE) + program if program else b""
        none = b"\0" * 16
        self._drain()
        seq = self._next_seq(1)
        self._sock.send(
            _REQUEST.pack(
                _REQUEST.size + len(attr), SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST | NLM_F_DUMP, seq, 0,
                family, protocol, 0, 0, states, socket.htons(sport), 0, none, none, 0, 0, 0,
            ) + attr
        )  # fmt: skip
        consistent = True
        while True:
            size = self._sock.recv_into(self._buffer)
            at = 0
            while at + _NLMSGHDR.size <= size:
                length, kind, flags, got, _ = _NLMSGHDR.unpack_from(self._buffer, at)
                body = at + _NLMSGHDR.size
                at += length + 3 & ~3
                if got != seq:
                    continue
                consistent = consistent and not flags & NLM_F_DUMP_INTR
                if kind == SOCK_DIAG_BY_FAMILY:
                    rows.append(_row(self._buffer, body))
                elif kind in (NLMSG_DONE, NLMSG_ERROR):
                    code = -_ERRNO.unpack_from(self._buffer, body)[0]
                    if code:
                        raise self._dump_error(code, protocol)
                    return consistent

    @staticmethod
    def _dump_error(code: int, protocol: int) -> DiagError:
        module = "udp_diag" if protocol == socket.IPPROTO_UDP else "tcp_diag"
        if code == errno.ENOENT:
            return DiagError(
                code, f"the kernel can't list sockets: module {module} is missing; run `modprobe {module}`"
            )
        return DiagError(code, f"listing sockets with {module}: {os.strerror(code)}")

    def _drain(self) -> None:
        """Drop what an earlier call that raised has left unread."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self._sock.recv_into(self._buffer, 0, socket.MSG_DONTWAIT)

    def _next_seq(self, count: int) -> int:
        first = self._seq + 1
        if first + count > 0xFFFFFFFF:
            first = 1
        self._seq = first + count - 1
        return first
