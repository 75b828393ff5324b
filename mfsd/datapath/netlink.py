# SPDX-License-Identifier: Apache-2.0
"""Traffic control over a plain rtnetlink socket: messages as bytes, requests in batches, statistics in place.

pyroute2 answers questions about devices elsewhere in this package. Here are bytes, for two reasons: a snapshot must be
replayed exactly as the kernel gave it, and a rescue must cost tens of microseconds, which means messages built once and
sent many at a time. rtnetlink works inside ``sendmsg``, one message after the other, so every answer is in the
socket's buffer when the call returns (net/netlink/af_netlink.c, netlink_rcv_skb).

A socket belongs to the network namespace of the thread that opened it, for as long as it lives; later calls may come
from any thread, one at a time.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from mfsd.datapath.errors import DatapathError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# include/uapi/linux/rtnetlink.h
RTM_NEWQDISC: Final = 36
RTM_DELQDISC: Final = 37
RTM_GETQDISC: Final = 38
RTM_NEWTCLASS: Final = 40
RTM_DELTCLASS: Final = 41
RTM_GETTCLASS: Final = 42
RTM_NEWTFILTER: Final = 44
RTM_GETTFILTER: Final = 46

# include/uapi/linux/netlink.h
NLM_REQUEST: Final = 0x1
NLM_ACK: Final = 0x4
NLM_ECHO: Final = 0x8
"""Without it, the answer to a single RTM_GETQDISC or RTM_GETTCLASS goes to the listeners of the multicast group only
(net/sched/sch_api.c, tclass_get_notify; net/netlink/af_netlink.c, nlmsg_notify)."""
NLM_DUMP: Final = 0x300
NLM_REPLACE: Final = 0x100
NLM_EXCL: Final = 0x200
NLM_CREATE: Final = 0x400
_NLM_DUMP_INTR: Final = 0x10
_NLMSG_ERROR: Final = 2
_NLMSG_DONE: Final = 3
_NLA_TYPE: Final = 0x3FFF
_SOL_NETLINK: Final = 270
_NETLINK_CAP_ACK: Final = 10
_NETLINK_EXT_ACK: Final = 11
_NLM_F_CAPPED: Final = 0x100
_NLM_F_ACK_TLVS: Final = 0x200
_SO_RCVBUFFORCE: Final = 33

# include/uapi/linux/rtnetlink.h, enum of TCA_*
TCA_KIND: Final = 1
TCA_OPTIONS: Final = 2
TCA_RATE: Final = 5
TCA_STATS2: Final = 7
TCA_STAB: Final = 8
# include/uapi/linux/gen_stats.h
_STATS_BASIC: Final = 1
_STATS_RATE_EST: Final = 2
_STATS_QUEUE: Final = 3
_STATS_PKT64: Final = 8

TC_H_ROOT: Final = 0xFFFFFFFF
TC_H_INGRESS: Final = 0xFFFFFFF1
CLSACT_MAJOR: Final = 0xFFFF0000
"""Handle of ingress and clsact qdiscs, whatever their parent."""

NLHDR: Final = struct.Struct("=IHHII")
TCMSG: Final = struct.Struct("=BBHiIII")
"""struct tcmsg: family, two pads, ifindex, handle, parent, info."""
_ATTR: Final = struct.Struct("=HH")
_BASIC: Final = struct.Struct("=QI")
_QUEUE: Final = struct.Struct("=IIII")
_BODY: Final = NLHDR.size + TCMSG.size
_RECEIVE: Final = 256 << 10
_BUFFER: Final = 8 << 20
_CHUNK: Final = 64 << 10
"""Bytes per sendmsg, well under the default send buffer (net.core.wmem_default, 208 KiB)."""


class NetlinkError(DatapathError):
    """The kernel refused a message. ``errno`` is its (positive) code, ``note`` its extended message, if any."""

    def __init__(self, code: int, what: str, note: str = "") -> None:
        super().__init__(what, os.strerror(code) + (f" ({note})" if note else ""))
        self.errno = code
        self.note = note


def attr(kind: int, payload: bytes = b"") -> bytes:
    """One netlink attribute, padded to four bytes."""
    return _ATTR.pack(4 + len(payload), kind) + payload + b"\0" * (-len(payload) % 4)


def kind_attr(kind: str) -> bytes:
    """TCA_KIND of a qdisc or class."""
    return attr(TCA_KIND, kind.encode() + b"\0")


def attrs(data: bytes, start: int = 0, end: int | None = None) -> dict[int, bytes]:
    """Attributes by number (the nested and byte-order flags taken off); the last one wins. Cut-short data ends it."""
    found = _positions(data, start, len(data) if end is None else end)
    return {kind: data[at + 4 : at + length] for kind, (at, length) in found.items()}


def message(kind: int, flags: int, tcm: tuple[int, int, int, int], body: bytes = b"") -> bytes:
    """Build a request. ``tcm`` is (ifindex, handle, parent, info). TcSocket.run numbers it."""
    ifindex, handle, parent, info = tcm
    data = TCMSG.pack(0, 0, 0, ifindex, handle, parent, info) + body
    return NLHDR.pack(NLHDR.size + len(data), kind, NLM_REQUEST | flags, 0, 0) + data


@dataclass(frozen=True, slots=True)
class TcObject:
    """A qdisc, class or filter as the kernel dumped it. Handles are 0xMMMMmmmm."""

    kind: str
    handle: int
    parent: int
    info: int
    options: bytes | None
    """Payload of TCA_OPTIONS; None when it has none."""
    attributes: dict[int, bytes]
    """All attributes, TCA_STATS2 among them."""

    @property
    def estimator(self) -> bool:
        """A rate estimator hangs on it (``tc ... estimator``); its parameters are not dumped."""
        return _STATS_RATE_EST in attrs(self.attributes.get(TCA_STATS2, b""))


def query(kind: int, ifindex: int, handle: int, parent: int = 0) -> bytes:
    """Build an RTM_GETQDISC or RTM_GETTCLASS for one object."""
    return message(kind, NLM_ECHO, (ifindex, handle, parent, 0))


def parse_object(data: bytes, offset: int, length: int) -> tuple[int, TcObject]:
    """(ifindex, object) of one RTM_NEW* message that begins at ``offset``."""
    _, _, _, ifindex, handle, parent, info = TCMSG.unpack_from(data, offset + NLHDR.size)
    found = attrs(data, offset + _BODY, offset + length)
    kind = found.get(TCA_KIND, b"").split(b"\0")[0].decode(errors="replace")
    return ifindex, TcObject(kind, handle, parent, info, found.get(TCA_OPTIONS), found)


@dataclass(frozen=True, slots=True)
class Stats:
    """Counters of a qdisc or class: sent since it was made, queued now."""

    bytes: int
    packets: int
    drops: int
    backlog_bytes: int
    backlog_packets: int


class StatsReader:
    """Finds the counters in messages of one family. Positions are remembered and checked, not searched anew.

    A remembered position is used only when the attribute header there is what it was, so a message with more or fewer
    attributes costs a search, never a wrong number. Layout: struct gnet_stats_basic (u64 bytes, u32 packets), struct
    gnet_stats_queue (u32 qlen, backlog, drops, ...), net/core/gen_stats.c.
    """

    def __init__(self) -> None:
        self._at: dict[int, tuple[tuple[int, bytes], tuple[int, bytes], int]] = {}

    def read(self, data: bytes, offset: int, length: int) -> Stats:
        """Counters of the message at ``offset``; zeros when it carries none."""
        known = self._at.get(length)
        if known is None or any(data[offset + at : offset + at + 4] != head for at, head in known[:2]):
            known = self._search(data, offset, length)
            if known is None:
                return Stats(0, 0, 0, 0, 0)
            self._at[length] = known
        (basic, _), (queue, _), packets64 = known
        sent, packets = _BASIC.unpack_from(data, offset + basic + 4)
        qlen, backlog, drops = struct.unpack_from("=III", data, offset + queue + 4)
        if packets64:
            (packets,) = struct.unpack_from("=Q", data, offset + packets64 + 4)
        return Stats(sent, packets, drops, backlog, qlen)

    @staticmethod
    def _search(data: bytes, offset: int, length: int) -> tuple[tuple[int, bytes], tuple[int, bytes], int] | None:
        top = _positions(data, offset + _BODY, offset + length)
        if TCA_STATS2 not in top:
            return None
        start, size = top[TCA_STATS2]
        inner = _positions(data, start + 4, start + size)
        if _STATS_BASIC not in inner or _STATS_QUEUE not in inner:
            return None
        basic, queue = inner[_STATS_BASIC][0], inner[_STATS_QUEUE][0]
        packets64 = inner.get(_STATS_PKT64, (offset, 0))[0] - offset
        return (basic - offset, data[basic : basic + 4]), (queue - offset, data[queue : queue + 4]), packets64


def _positions(data: bytes, start: int, end: int) -> dict[int, tuple[int, int]]:
    """(position of the header, length) per attribute number."""
    out: dict[int, tuple[int, int]] = {}
    while start + 4 <= end:
        length, kind = _ATTR.unpack_from(data, start)
        if length < 4 or start + length > end:
            break
        out[kind & _NLA_TYPE] = (start, length)
        start += (length + 3) & ~3
    return out


class TcSocket:
    """A NETLINK_ROUTE socket in the calling thread's network namespace.

    Raises NetlinkError when the kernel refuses a request, OSError when the socket itself fails.
    """

    def __init__(self) -> None:
        self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        self._sock.bind((0, 0))
        # Answers of a whole batch wait in the buffer; the default holds some fifty. Needs CAP_NET_ADMIN.
        with contextlib.suppress(PermissionError):
            self._sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
        self._sock.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
        self._sock.setsockopt(_SOL_NETLINK, _NETLINK_EXT_ACK, 1)
        # Answers are there when send returns; the timeout only guards against a kernel that breaks this.
        self._sock.settimeout(5.0)
        self._seq = 0
        self._lock = threading.Lock()

    def close(self) -> None:
        """Idempotent."""
        self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def run(self, messages: Sequence[bytes], what: str = "tc request") -> None:
        """Send requests in order and wait for all acknowledgements. Raises NetlinkError of the first refused one.

        A refused message does not stop those after it in the same batch; the caller rolls back.
        """
        for code, note, index in self.run_each(messages):
            if code:
                raise NetlinkError(code, f"{what} (message {index + 1} of {len(messages)})", note)

    def run_each(self, messages: Sequence[bytes]) -> list[tuple[int, str, int]]:
        """As run, but returns (errno or 0, extended message, index) per request instead of raising."""
        out: list[tuple[int, str, int]] = []
        with self._alone():
            start = 0
            while start < len(messages):
                stop, size = start, 0
                while stop < len(messages) and (stop == start or size + len(messages[stop]) <= _CHUNK):
                    size += len(messages[stop])
                    stop += 1
                out += self._run_chunk(messages[start:stop], start)
                start = stop
        return out

    def _run_chunk(self, messages: Sequence[bytes], base: int) -> list[tuple[int, str, int]]:
        first = self._seq + 1
        self._seq = (self._seq + len(messages)) & 0x7FFFFFFF
        numbered = []
        for i, raw in enumerate(messages):
            length, kind, flags, _, _ = NLHDR.unpack_from(raw)
            numbered.append(NLHDR.pack(length, kind, flags | NLM_ACK, (first + i) & 0x7FFFFFFF, 0) + raw[NLHDR.size :])
        self._send(b"".join(numbered))
        results: dict[int, tuple[int, str, int]] = {}
        while len(results) < len(messages):
            for data, offset, length, kind, seq in self._receive():
                index = (seq - first) & 0x7FFFFFFF
                if kind == _NLMSG_ERROR and index < len(messages):
                    code, note = _error(data, offset, length)
                    results[index] = (code, note, base + index)
        return [results[i] for i in range(len(messages))]

    def ask(self, raw: bytes) -> tuple[bytes, int, int]:
        """Send a request of query(): (buffer, offset, length) of the answer. Raises NetlinkError."""
        with self._alone():
            self._seq = seq = (self._seq + 1) & 0x7FFFFFFF
            length, kind, flags, _, _ = NLHDR.unpack_from(raw)
            self._send(NLHDR.pack(length, kind, flags, seq, 0) + raw[NLHDR.size :])
            while True:
                for data, offset, size, got, number in self._receive():
                    if number != seq:
                        continue
                    if got == _NLMSG_ERROR:
                        code, note = _error(data, offset, size)
                        raise NetlinkError(code, "tc query", note)
                    return data, offset, size

    def exchange(self, raw: bytes, answers: int) -> list[tuple[bytes, int, int, int, int]]:
        """Send ready-made bytes and collect ``answers`` messages: (buffer, offset, length, type, sequence).

        For the hot path: nothing is copied or numbered, so the caller's own sequence numbers come back.
        """
        out: list[tuple[bytes, int, int, int, int]] = []
        with self._alone():
            self._send(raw)
            while len(out) < answers:
                out += self._receive()
        return out

    def dump(self, kind: int, ifindex: int, parent: int = 0) -> Iterator[tuple[bytes, int, int]]:
        """(buffer, offset, length) of every message of a dump, of this device or any (qdiscs: the kernel sends all).

        Raises NetlinkError with EINTR when the tables changed meanwhile five times in a row.
        """
        for _ in range(5):
            found, whole = self._dump_once(kind, ifindex, parent)
            if whole:
                yield from found
                return
        raise NetlinkError(errno.EINTR, "dump of traffic control", "the tables keep changing")

    def _dump_once(self, kind: int, ifindex: int, parent: int) -> tuple[list[tuple[bytes, int, int]], bool]:
        out: list[tuple[bytes, int, int]] = []
        whole = True
        with self._alone():
            self._seq = seq = (self._seq + 1) & 0x7FFFFFFF
            tcm = TCMSG.pack(0, 0, 0, ifindex, 0, parent, 0)
            self._send(NLHDR.pack(NLHDR.size + len(tcm), kind, NLM_REQUEST | NLM_DUMP, seq, 0) + tcm)
            while True:
                for data, offset, length, got, number in self._receive():
                    if number != seq:
                        continue
                    if NLHDR.unpack_from(data, offset)[2] & _NLM_DUMP_INTR:
                        whole = False
                    if got == _NLMSG_DONE:
                        return out, whole
                    if got == _NLMSG_ERROR:
                        code, note = _error(data, offset, length)
                        raise NetlinkError(code, "dump of traffic control", note)
                    out.append((data, offset, length))

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One conversation at a time. What is left of one that failed is thrown away, or the next would take it."""
        with self._lock:
            try:
                yield
            except BaseException:
                with contextlib.suppress(OSError):
                    while self._sock.recv(_RECEIVE, socket.MSG_DONTWAIT):
                        pass
                raise

    def _send(self, raw: bytes) -> None:
        self._sock.send(raw)

    def _receive(self) -> list[tuple[bytes, int, int, int, int]]:
        """The messages of one datagram: (buffer, offset, length, type, sequence)."""
        data = self._sock.recv(_RECEIVE)
        out = []
        offset = 0
        while offset + NLHDR.size <= len(data):
            length, kind, _, seq, _ = NLHDR.unpack_from(data, offset)
            if length < NLHDR.size:
                break
            out.append((data, offset, length, kind, seq))
            offset += (length + 3) & ~3
        return out


def error_code(data: bytes, offset: int) -> int:
    """The positive errno of an NLMSG_ERROR message, 0 for an acknowledgement."""
    (code,) = struct.unpack_from("=i", data, offset + NLHDR.size)
    return -int(code)


def is_error(kind: int) -> bool:
    """True for the type of acknowledgements and refusals."""
    return kind == _NLMSG_ERROR


def _error(data: bytes, offset: int, length: int) -> tuple[int, str]:
    """(errno, extended message) of an NLMSG_ERROR. The request is echoed whole unless the kernel capped it."""
    code = error_code(data, offset)
    _, _, flags, _, _ = NLHDR.unpack_from(data, offset)
    note = ""
    if flags & _NLM_F_ACK_TLVS:
        start = offset + NLHDR.size + 4
        (echoed,) = struct.unpack_from("=I", data, start)
        start += NLHDR.size if flags & _NLM_F_CAPPED else (echoed + 3) & ~3
        note = attrs(data, start, offset + length).get(1, b"").rstrip(b"\0").decode(errors="replace")
    return code, note


def objects(sock: TcSocket, kind: int, ifindex: int, parent: int = 0) -> list[TcObject]:
    """A dump of qdiscs, classes or filters of one device, decoded."""
    decoded = (parse_object(*found) for found in sock.dump(kind, ifindex, parent))
    return [thing for device, thing in decoded if device == ifindex]


def classid(value: int) -> str:
    """In the notation of tc: ``1:10``, ``8001:``, ``root``."""
    if value == TC_H_ROOT:
        return "root"
    major, minor = value >> 16, value & 0xFFFF
    return f"{major:x}:{minor:x}" if minor else f"{major:x}:"
