# SPDX-License-Identifier: Apache-2.0
"""How a worker names the connection that carries a transfer, and what the kernel says of it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
import sys
import termios
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from mfsd.model import (
    CookieSelector,
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
TCP_INFO: Final = struct.Struct("=120xQ")
"""tcpi_bytes_acked in ``struct tcp_info``, include/uapi/linux/tcp.h."""
TRIES: Final = 3
NONE: Final = b"\0\0\0\0"
"""An int of 0, as ioctl has it."""

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
    return tuple_selector(dst, _ports(dport), src, _ports(sport), protocol)


def process_peer(pid: int, remote: str = "", port: int | tuple[int, int] = 0) -> ProcessSelector:
    """TCP sockets of a process towards an address or prefix (empty: any). Raises ValueError."""
    return process_selector(pid, remote, _ports(port))


def _ports(ports: int | tuple[int, int]) -> tuple[int, int]:
    return ports if isinstance(ports, tuple) else (ports, ports)


def name(connection: Connection) -> Named:
    """What the daemon is told. Raises OSError for a closed socket, TypeError for what is no connection."""
    if isinstance(connection, (CookieSelector, TupleSelector, ProcessSelector)):
        return Named(connection)
    if isinstance(connection, Fd):
        with _borrowed(connection.number) as sock:
            return _of_socket(sock)
    if isinstance(connection, socket.socket) or hasattr(connection, "getsockopt"):
        return _of_socket(connection)
    if hasattr(connection, "fileno"):
        with _borrowed(connection.fileno()) as sock:
            return _of_socket(sock)
    kind = type(connection).__name__
    if isinstance(connection, int):
        raise TypeError(f"an {kind} names no connection: write Fd({connection}) for a descriptor, or Cookie(...)")
    raise TypeError(f"{kind} names no connection; give a socket, Fd, Cookie, tuple_of(...) or process_peer(...)")


@contextlib.contextmanager
def _borrowed(fd: int) -> Iterator[socket.socket]:
    """A descriptor as a socket, which does not close it."""
    if fd < 0:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    sock = socket.socket(fileno=fd)
    try:
        yield sock
    finally:
        sock.detach()


_tcp: weakref.WeakKeyDictionary[socket.socket, CookieSelector] = weakref.WeakKeyDictionary()
"""What never changes of a TCP socket; two system calls saved each time."""


def _of_socket(sock: Any) -> Named:
    known = _tcp.get(sock) if type(sock) is socket.socket else None
    if known is not None:
        return Named(known, _position(sock))  # which fails for a socket that is closed
    selector = CookieSelector(cookie_of(sock))
    protocol = sock.getsockopt(socket.SOL_SOCKET, SO_PROTOCOL)
    if protocol == socket.IPPROTO_TCP:
        if type(sock) is socket.socket:
            _tcp[sock] = selector
        return Named(selector, _position(sock))
    if protocol == IPPROTO_MPTCP:
        return Named(
            selector,
            fault="it is a Multipath TCP (MPTCP) socket, whose bytes are sent by sockets of the kernel's own; "
            "name it by tuple_of(peer's address, peer's port), which matches those",
        )
    return Named(selector)


def _position(sock: Any) -> int:
    """Bytes written, on the scale of tcpi_bytes_acked; 0: unknown."""
    if not hasattr(sock, "fileno"):
        return 0
    number = sock.fileno()
    if fcntl.ioctl(number, termios.TIOCOUTQ, NONE) == NONE:
        return _acked(sock)  # all that was written: nobody writes meanwhile
    acked = _acked(sock)
    for _ in range(TRIES):
        queued = int.from_bytes(fcntl.ioctl(number, termios.TIOCOUTQ, NONE), sys.byteorder)  # SIOCOUTQ
        before, acked = acked, _acked(sock)
        if before == acked:
            break  # else some were acknowledged between the two calls
    return acked + queued


def _acked(sock: Any) -> int:
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO.size)
    return int(TCP_INFO.unpack(info)[0]) if len(info) == TCP_INFO.size else 0
