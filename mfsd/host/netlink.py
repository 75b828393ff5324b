# SPDX-License-Identifier: Apache-2.0
"""Netlink: messages and attributes as bytes, what the kernel refuses and why, and one socket for requests.

pyroute2 asks about devices elsewhere. It is not used here, because its calls can't be made from a running event loop
and cost hundreds of microseconds each, where the engine asks about many connections and lanes on a tick.

rtnetlink and sock_diag work inside ``sendmsg``, one request after the other, so every answer is in the socket's buffer
when the call returns (net/netlink/af_netlink.c, netlink_rcv_skb); further parts of a dump are made inside ``recvmsg``
(netlink_recvmsg). So nothing here ever waits: what is not there then, the kernel has left unanswered.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import sys
import threading
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# include/uapi/linux/netlink.h
NLM_REQUEST: Final = 0x1
NLM_ACK: Final = 0x4
NLM_ECHO: Final = 0x8
NLM_DUMP: Final = 0x300
NLM_REPLACE: Final = 0x100
NLM_EXCL: Final = 0x200
NLM_CREATE: Final = 0x400
_DUMP_INTR: Final = 0x10
_CAPPED: Final = 0x100
_ACK_TLVS: Final = 0x200
NLMSG_ERROR: Final = 2
NLMSG_DONE: Final = 3
NLA_NESTED: Final = 0x8000
"""Flag of an attribute that holds attributes; newer parsers insist on it."""
_NLA_TYPE: Final = 0x3FFF
_NLMSGERR_ATTR_MSG: Final = 1
_SOL_NETLINK: Final = 270
_CAP_ACK: Final = 10
_EXT_ACK: Final = 11
SO_RCVBUFFORCE: Final = 33
_SO_NETNS_COOKIE: Final = 71

HEADER: Final = struct.Struct("=IHHII")
"""struct nlmsghdr: length, type, flags, sequence, port."""
ATTR: Final = struct.Struct("=HH")
"""struct nlattr: length with header, type."""
_unpack_header: Final = HEADER.unpack_from
_unpack_attr: Final = ATTR.unpack_from
_U32: Final = struct.Struct("=I")
_ERRNO: Final = struct.Struct("=i")
_SEQ_AT: Final = 8
_MASK: Final = 0xFFFFFFFF
_BUFFER: Final = 64 << 10
"""Twice what a part of a dump can have (netlink_dump)."""
_TRIES: Final = 5
"""Of a dump during which the tables change."""


class NetlinkError(OSError):
    """The kernel refused a request. ``errno`` is its (positive) code, ``note`` its extended message, if any."""

    def __init__(self, code: int, what: str, note: str = "") -> None:
        super().__init__(code, os.strerror(code))
        self.what = what
        self.note = note

    def __str__(self) -> str:
        return f"{self.what}: {self.strerror}" + (f" ({self.note})" if self.note else "")


def fields(layout: struct.Struct, data: bytes, at: int, end: int) -> tuple[Any, ...]:
    """What a fixed part of an answer says. Raises NetlinkError where the answer ends before it does."""
    if at + layout.size > end:
        raise NetlinkError(errno.EBADMSG, "read an answer of the kernel", f"{end - at} bytes instead of {layout.size}")
    return layout.unpack_from(data, at)


# --- messages ---------------------------------------------------------------------------------------------------------


def request(kind: int, flags: int, body: bytes) -> bytes:
    """Build a request, to be numbered by the socket that sends it. ``body`` is padded to four bytes."""
    return HEADER.pack(HEADER.size + len(body), kind, NLM_REQUEST | flags, 0, 0) + body


def attr(kind: int, payload: bytes = b"") -> bytes:
    """One attribute, padded to four bytes."""
    return ATTR.pack(ATTR.size + len(payload), kind) + payload + b"\0" * (-len(payload) % 4)


def _each(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(number, position of its header, length with header) of every attribute. Cut-short data ends it."""
    while start + 4 <= end:
        length, kind = _unpack_attr(data, start)
        if length < 4 or start + length > end:
            break
        yield kind & _NLA_TYPE, start, length
        start += length + 3 & ~3


def positions(data: bytes, start: int, end: int) -> dict[int, tuple[int, int]]:
    """(position of its header, length with header) per attribute number; the last one wins."""
    return {kind: (at, length) for kind, at, length in _each(data, start, end)}


def find(data: bytes, start: int, end: int, wanted: int) -> tuple[int, int]:
    """As positions, of the first attribute of this number; (0, 0) if there is none."""
    return find_two(data, start, end, wanted, wanted)[0]


def find_two(data: bytes, start: int, end: int, one: int, other: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """As find, of two attributes at once."""
    # For every connection on a tick, and _each would take three times as long.
    first = second = 0, 0
    while start + 4 <= end:
        length, kind = _unpack_attr(data, start)
        if length < 4 or start + length > end:
            break
        kind &= _NLA_TYPE
        if kind == one:
            first = first if first[1] else (start, length)
        elif kind == other:
            second = second if second[1] else (start, length)
        if first[1] and (second[1] or one == other):
            break
        start += length + 3 & ~3
    return first, second


def attrs(data: bytes, start: int = 0, end: int | None = None) -> dict[int, bytes]:
    """Payloads by attribute number (the nested and byte-order flags taken off). As positions."""
    found = positions(data, start, len(data) if end is None else end)
    return {kind: data[at + ATTR.size : at + length] for kind, (at, length) in found.items()}


def listed(data: bytes) -> list[bytes]:
    """Payloads of attributes that form a list, all of one number."""
    return [data[at + ATTR.size : at + length] for _, at, length in _each(data, 0, len(data))]


class Message(NamedTuple):
    """One received message: ``data`` holds what follows its header from ``body`` to ``end``."""

    kind: int
    flags: int
    seq: int
    data: bytes
    body: int
    end: int

    @property
    def code(self) -> int:
        """The positive errno of NLMSG_ERROR or NLMSG_DONE, 0 for an acknowledgement."""
        return -int(fields(_ERRNO, self.data, self.body, self.end)[0])

    @property
    def note(self) -> str:
        """Extended message of NLMSG_ERROR or NLMSG_DONE. An error echoes its request, whole unless capped."""
        if not self.flags & _ACK_TLVS:
            return ""
        start = self.body + _ERRNO.size
        if self.kind == NLMSG_ERROR:
            (echoed,) = fields(_U32, self.data, start, self.end)
            start += HEADER.size if self.flags & _CAPPED else echoed + 3 & ~3
        return attrs(self.data, start, self.end).get(_NLMSGERR_ATTR_MSG, b"").rstrip(b"\0").decode(errors="replace")


def messages(data: bytes) -> list[Message]:
    """What a datagram holds; cut-short data ends it."""
    out = []
    start, size = 0, len(data)
    while start + 16 <= size:
        length, kind, flags, seq, _ = _unpack_header(data, start)
        if length < 16 or start + length > size:
            break
        # Message(...) goes through a function of Python and takes twice as long.
        out.append(tuple.__new__(Message, (kind, flags, seq, data, start + 16, start + length)))
        start += length + 3 & ~3
    return out


# --- the socket -------------------------------------------------------------------------------------------------------


def opened(protocol: int, *, groups: int = 0, room: int = 0) -> socket.socket:
    """A non-blocking netlink socket that hears the multicast ``groups``, with ``room`` bytes for what comes if we may.

    Raises OSError.
    """
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
    try:
        sock.bind((0, groups))
        sock.setblocking(False)
        if room:
            with contextlib.suppress(PermissionError):
                sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, room)
    except BaseException:
        sock.close()
        raise
    return sock


def netns_cookie(sock: socket.socket) -> int:
    """Number of a socket's network namespace, never used again before the next boot. Raises OSError before 5.14."""
    return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8), sys.byteorder)


class NetlinkSocket:
    """A socket for requests, in the network namespace of the thread that makes it, for as long as it lives.

    Calls may come from any thread. ``in_flight``: requests per system call, so many that they fit into the send buffer
    and all their answers into the receive buffer (208 KiB each by default, with the kernel's overhead); ``room``: bytes
    of receive buffer, where CAP_NET_ADMIN allows it. Every method raises OSError when the socket itself fails, and
    NetlinkError (EPROTO) when the kernel leaves a request unanswered.
    """

    def __init__(self, protocol: int, *, in_flight: int, room: int = 0) -> None:
        self._sock = opened(protocol, room=room)
        try:
            self._sock.setsockopt(_SOL_NETLINK, _CAP_ACK, 1)
            self._sock.setsockopt(_SOL_NETLINK, _EXT_ACK, 1)
        except BaseException:
            self._sock.close()
            raise
        self._in_flight = in_flight
        self._seq = 0
        self._into = bytearray(_BUFFER)
        self._lock = threading.Lock()

    def close(self) -> None:
        """Idempotent."""
        self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def batch(self, requests: Sequence[bytes]) -> list[Message]:
        """Send requests in order; the one answer to each, in order, which may be NLMSG_ERROR.

        For requests that have exactly one answer: those with NLM_ACK, and queries without. A refused one does not
        stop those after it.
        """
        out: list[Message] = []
        with self._alone():
            for start in range(0, len(requests), self._in_flight):
                out += self._exchange(requests[start : start + self._in_flight])
        return out

    def ask(self, raw: bytes, what: str) -> Message:
        """The one answer to a query. Raises NetlinkError when it is refused; ``what`` says what was tried."""
        (answer,) = self.batch((raw,))
        if answer.kind == NLMSG_ERROR:
            raise NetlinkError(answer.code, what, answer.note)
        return answer

    def dump(self, raw: bytes, what: str, *, torn: bool = False) -> list[Message]:
        """All parts of the answer to a request with NLM_DUMP. Raises NetlinkError when it is refused.

        When the tables change meanwhile it is asked anew, five times at most. What comes then is given as it is if it
        may be ``torn``, else NetlinkError (EINTR) is raised.
        """
        for _ in range(_TRIES):
            with self._alone():
                found, whole = self._dump(raw, what)
            if whole:
                return found
        if torn:
            return found
        raise NetlinkError(errno.EINTR, what, "the tables keep changing")

    def _exchange(self, requests: Sequence[bytes]) -> list[Message]:
        expected = self._send(requests)
        out: list[Message] = []
        while len(out) < len(requests):
            for message in self._receive():
                if message.seq == expected:  # else of an earlier request that was given up
                    out.append(message)
                    expected = expected + 1 & _MASK
        return out

    def _dump(self, raw: bytes, what: str) -> tuple[list[Message], bool]:
        """(parts, True if the tables stood still)."""
        first = self._send((raw,))
        out: list[Message] = []
        whole = True
        while True:
            for message in self._receive():
                if message.seq != first:
                    continue
                whole = whole and not message.flags & _DUMP_INTR
                if message.kind in (NLMSG_DONE, NLMSG_ERROR):
                    if message.code:
                        raise NetlinkError(message.code, what, message.note)
                    return out, whole
                out.append(message)

    def _send(self, requests: Sequence[bytes]) -> int:
        """Number requests and send them; returns the first number."""
        first = seq = self._seq
        raw = bytearray().join(requests)
        at = _SEQ_AT
        for one in requests:
            _U32.pack_into(raw, at, seq)
            at += len(one)
            seq = seq + 1 & _MASK
        self._seq = seq
        self._sock.send(raw)
        return first

    def _receive(self) -> list[Message]:
        """The messages of the next datagram. Raises BlockingIOError if there is none."""
        # Into the same memory each time: 64 KB for each of very many short answers take longer than all else.
        length = self._sock.recv_into(self._into)
        return messages(bytes(memoryview(self._into)[:length]))

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One conversation at a time. What is left of one that failed is thrown away, or it would fill the buffer."""
        with self._lock:
            try:
                yield
            except BlockingIOError:
                raise NetlinkError(errno.EPROTO, "netlink", "the kernel left a request unanswered") from None
            except BaseException:
                self._drain()
                raise

    def _drain(self) -> None:
        while True:
            try:
                self._sock.recv(_BUFFER)
            except OSError as e:
                if e.errno != errno.ENOBUFS:  # that only says that something was lost
                    return
