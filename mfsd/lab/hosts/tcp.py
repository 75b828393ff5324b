# SPDX-License-Identifier: Apache-2.0
"""TCP sockets as all experiments use them, and what the kernel says about them."""

from __future__ import annotations

import fcntl
import socket
import struct
import termios
from dataclasses import dataclass
from typing import Final

CONGESTION: Final = "cubic"
"""Of every connection in the lab, by setsockopt: as root, since a namespace may only default to what the machine's
tcp_allowed_congestion_control lists, and that is not ours to change."""
CHUNK: Final = 1 << 18
"""Bytes per system call."""
MSS: Final = 1448
"""Payload of a full segment over IPv4 with timestamps at an MTU of 1500."""
FRAME: Final = 1514
"""The same on the wire, as qdiscs count it."""
EFFICIENCY: Final = MSS / FRAME
"""Share of a link's rate that TCP payload gets."""
_INFO: Final = 248
"""Bytes of struct tcp_info up to tcpi_total_rto_time (include/uapi/linux/tcp.h, Linux 6.7)."""


def prepare(sock: socket.socket) -> socket.socket:
    """Set what all sockets of the lab have; a listening socket passes it on."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, CONGESTION.encode())
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def algorithm_of(sock: socket.socket) -> str:
    """Name of the congestion control that a connection runs now."""
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0").decode()


def reset_at_close(sock: socket.socket) -> None:
    """Have its close send a reset: what is on its way is thrown away, and nothing stays in TIME_WAIT."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@dataclass(frozen=True, slots=True)
class TcpInfo:
    """Counters since the connection was made, and what there is of it now."""

    retransmitted: int
    """Segments, of MSS bytes at most."""
    rtos: int
    """Retransmission timeouts; always 0 before Linux 6.7, which does not count them."""
    acked: int
    """Bytes that the other end has acknowledged, and 1 for a SYN of ours."""
    unacked: int
    """Segments under way."""
    window: int
    """Congestion window, segments."""


def tcp_info(sock: socket.socket) -> TcpInfo:
    """Ask the kernel. Raises OSError for a closed socket."""
    raw = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO).ljust(_INFO, b"\0")
    places = ("=I", 100), ("=H", 240), ("=Q", 120), ("=I", 24), ("=I", 80)
    return TcpInfo(*(struct.unpack_from(kind, raw, at)[0] for kind, at in places))


def queued(sock: socket.socket) -> int:
    """Bytes that the other end has not acknowledged yet."""
    return int(struct.unpack("=i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))[0])
