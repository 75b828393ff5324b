# SPDX-License-Identifier: Apache-2.0
"""How a worker names the connection that carries a transfer, and what the kernel says of it."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import operator
import os
import socket
import struct
import termios
import threading
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol, SupportsIndex

from mfsd.ground.model import (
    CookieSelector,
    HintError,
    HintSelector,
    ProcessSelector,
    TupleSelector,
    process_selector,
    tuple_selector,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

SO_COOKIE: Final = 57
SO_PROTOCOL: Final = 38
"""include/uapi/asm-generic/socket.h; the same on all architectures but sparc and parisc."""
IPPROTO_MPTCP: Final = 262
TCP_INFO: Final = struct.Struct("=B23xI92xQ16xI")
"""tcpi_state, tcpi_unacked, tcpi_bytes_acked, tcpi_notsent_bytes in ``struct tcp_info``, include/uapi/linux/tcp.h."""
CLOSED: Final = 7
"""TCP_CLOSE, include/net/tcp_states.h."""
TRIES: Final = 3

Cookie = CookieSelector
"""A socket by its SO_COOKIE: ``Cookie(cookie_of(sock))``."""


@dataclass(frozen=True, slots=True)
class Fd:
    """A socket by its descriptor, which stays the caller's."""

    number: int


class HasFileno(Protocol):
    """Sockets of every kind: socket.socket, and what asyncio and uvloop give as ``get_extra_info("socket")``."""

    def fileno(self) -> int:
        """Descriptor."""
        ...


Connection = HasFileno | Fd | HintSelector
"""A socket, its descriptor or its cookie, or a selector made by ``tuple_of`` or ``process_peer``."""


@dataclass(slots=True)  # frozen ones take three times as long to make
class Named:
    """What a connection is to the daemon."""

    selector: HintSelector
    position: int = 0
    """Bytes written to it so far, on TCP's scale; 0: unknown."""
    fd: int = -1
    """Descriptor of a TCP socket; -1: not known."""
    fault: str = ""
    """Why hints of it can't take effect."""


def cookie_of(sock: Any) -> int:
    """SO_COOKIE of a socket: 64 bits, unique on this host until reboot, unaffected by NAT.

    Raises OSError for a socket that is closed.
    """
    (cookie,) = struct.unpack("=Q", sock.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8))
    return int(cookie)


def tuple_of(
    dst: str, dport: int | tuple[int, int], src: str = "", sport: int | tuple[int, int] = 0, *, protocol: int = 6
) -> TupleSelector:
    """Endpoints as the network device sees them. A port is one number, a (first, last) range, or 0 for any.

    Raises ValueError for what is no address or port, or could never match.
    """
    return tuple_selector(dst, _ports("dst_port", dport), src, _ports("src_port", sport), protocol)


def process_peer(pid: int, remote: str = "", port: int | tuple[int, int] = 0) -> ProcessSelector:
    """TCP sockets of a process towards an address or prefix (empty: any). Raises ValueError."""
    return process_selector(whole("pid", pid, "the number of a process"), remote, _ports("remote_port", port))


def _ports(parameter: str, ports: int | tuple[int, int]) -> tuple[int, int]:
    first, last = ports if isinstance(ports, tuple) and len(ports) == 2 else (ports, ports)
    meant = "a port, (first, last), or 0 for any"
    return whole(parameter, first, meant), whole(parameter, last, meant)


def whole(parameter: str, value: Any, meant: str) -> int:
    """A whole number of whatever type. Raises HintError, a ValueError, for what is none."""
    try:
        return operator.index(value)
    except TypeError:
        raise HintError(parameter, f"{value!r} is no whole number", f"give {meant}") from None


def name(connection: Connection) -> Named:
    """What the daemon is told. Raises OSError for a closed socket, TypeError for what is no connection."""
    if isinstance(connection, CookieSelector):
        cookie: Any = connection.cookie
        fine = isinstance(cookie, SupportsIndex) and 0 < operator.index(cookie) < 1 << 64
        return Named(connection, fault="" if fine else f"cookie: {cookie!r} is none; give Cookie(cookie_of(sock))")
    if isinstance(connection, (TupleSelector, ProcessSelector)):
        return Named(connection)
    if isinstance(connection, Fd):
        with borrowed(connection.number) as sock:
            return _of_socket(sock)
    if isinstance(connection, socket.socket) or hasattr(connection, "getsockopt"):
        return _of_socket(connection)
    if hasattr(connection, "fileno"):
        with borrowed(connection.fileno()) as sock:
            return _of_socket(sock)
    kind = type(connection).__name__
    if isinstance(connection, int):
        raise TypeError(f"an {kind} names no connection: write Fd({connection}) for a descriptor, or Cookie(...)")
    raise TypeError(f"{kind} names no connection; give a socket, Fd, Cookie, tuple_of(...) or process_peer(...)")


@contextlib.contextmanager
def borrowed(fd: int) -> Iterator[socket.socket]:
    """A descriptor as a socket, which does not close it. Raises OSError for one that is closed."""
    if not isinstance(fd, int):
        raise TypeError(f"Fd({fd!r}): a descriptor is a whole number; give Fd(sock.fileno()), or the socket")
    if fd < 0:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    sock = socket.socket(fileno=fd)
    try:
        yield sock
    finally:
        sock.detach()


_tcp: dict[int, tuple[weakref.ref[socket.socket], CookieSelector]] = {}
"""What never changes of a TCP socket, by its identity; two system calls saved each time. A WeakKeyDictionary would take
as long as one of them."""


def _remember(sock: socket.socket, selector: CookieSelector) -> None:
    key = id(sock)
    _tcp[key] = weakref.ref(sock, lambda _: _tcp.pop(key, None)), selector


def _of_socket(sock: Any) -> Named:
    known = _tcp.get(id(sock))
    if known is not None and known[0]() is sock:
        return Named(known[1], *_position(sock))  # which fails for a socket that is closed
    selector = CookieSelector(cookie_of(sock))
    protocol = sock.getsockopt(socket.SOL_SOCKET, SO_PROTOCOL)
    if protocol == socket.IPPROTO_TCP:
        if type(sock) is socket.socket:
            _remember(sock, selector)
        return Named(selector, *_position(sock))
    if protocol == IPPROTO_MPTCP:
        return Named(
            selector,
            fault="it is a Multipath TCP (MPTCP) socket, whose bytes are sent by sockets of the kernel's own; "
            "name it by tuple_of(peer's address, peer's port), which matches those",
        )
    return Named(selector)


class _Asked(threading.local):
    """Where a thread has the kernel's answers put."""

    def __init__(self) -> None:
        self.queued = ctypes.c_int()
        self.info = ctypes.create_string_buffer(TCP_INFO.size)
        self.length = ctypes.c_uint32()
        self.to_queued, self.to_length = ctypes.byref(self.queued), ctypes.byref(self.length)


_libc: Final = ctypes.PyDLL(None)
"""Its functions are called without letting go of the interpreter, which fcntl and socket do around each call: another
thread takes it then, and a call of half a microsecond lasts until that one waits. What is asked here never waits."""
_asked: Final = _Asked()


def _position(sock: Any) -> tuple[int, int]:
    """Bytes written, 0 if unknown, and the descriptor, -1 if unknown. Raises OSError for a closed socket."""
    if not hasattr(sock, "fileno"):
        return 0, -1
    number = sock.fileno()
    return _written(number), number


def written(number: int, cookie: int) -> int | None:
    """Bytes written to a socket by its descriptor; None: that is not the one of this cookie any more."""
    with contextlib.suppress(OSError), borrowed(number) as sock:
        if cookie_of(sock) == cookie:
            return _written(number)
    return None


def _written(number: int) -> int:
    """Bytes written, on the scale of tcpi_bytes_acked; 0: unknown. Raises OSError for a closed socket."""
    unacked, acked, unsent = _info(number)
    if not unacked and not unsent:
        return acked
    for _ in range(TRIES):
        queued = _queued(number)
        before, (_, acked, _) = acked, _info(number)
        if before == acked:
            break  # else some were acknowledged between the two calls
    return acked + queued


def _queued(number: int) -> int:
    """SIOCOUTQ: bytes written and not acknowledged."""
    if _libc.ioctl(number, termios.TIOCOUTQ, _asked.to_queued):
        fcntl.ioctl(number, termios.TIOCOUTQ, b"\0\0\0\0")  # says what is wrong
    return _asked.queued.value


def _info(number: int) -> tuple[int, int, int]:
    """Segments that are not acknowledged, bytes that are, bytes not sent; zeros: this kernel doesn't tell."""
    asked = _asked
    asked.length.value = TCP_INFO.size
    if _libc.getsockopt(number, socket.IPPROTO_TCP, socket.TCP_INFO, asked.info, asked.to_length):
        with borrowed(number) as sock:
            sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO)  # says what is wrong
    state, unacked, acked, unsent = TCP_INFO.unpack(asked.info)
    if asked.length.value != TCP_INFO.size:
        return 0, 0, 0
    # What the kernel says is queued in a closed one is nothing: a gap that connect(2) with AF_UNSPEC leaves.
    return (unacked, acked, unsent) if state != CLOSED else (0, acked, 0)
