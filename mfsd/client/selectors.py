# SPDX-License-Identifier: Apache-2.0
"""How a worker names the connection that carries a transfer."""

from __future__ import annotations

import ipaddress
import socket
import struct
from typing import Final

from mfsd.model import CookieSelector, PortRange, ProcessSelector, Selector, TupleSelector

SO_COOKIE: Final = 57
"""include/uapi/asm-generic/socket.h; the same on all architectures but sparc and parisc."""

Connection = socket.socket | int | Selector
"""A socket, a socket cookie, or a selector made by ``tuple_of`` or ``process_peer``."""


def cookie_of(sock: socket.socket) -> int:
    """SO_COOKIE of a socket: 64 bits, unique on this host until reboot, unaffected by NAT.

    Raises OSError for a socket that is closed.
    """
    (cookie,) = struct.unpack("=Q", sock.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8))
    return int(cookie)


def tuple_of(
    dst: str, dport: int | tuple[int, int], src: str = "", sport: int | tuple[int, int] = 0, *, protocol: int = 6
) -> TupleSelector:
    """Endpoints as the network device sees them. A port is one number, a (first, last) range, or 0 for any.

    Raises ValueError for what is no address or port.
    """
    return TupleSelector(
        ipaddress.ip_address(src) if src else None,
        ipaddress.ip_address(dst),
        _ports(sport),
        _ports(dport),
        protocol,
    )


def process_peer(pid: int, remote: str = "", port: int | tuple[int, int] = 0) -> ProcessSelector:
    """TCP sockets of a process towards an address or prefix (empty: any). Raises ValueError."""
    return ProcessSelector(pid, ipaddress.ip_network(remote) if remote else None, _ports(port))


def selector_of(connection: Connection) -> Selector:
    """The selector that says the same. Raises OSError for a closed socket, TypeError for anything else."""
    if isinstance(connection, socket.socket):
        return CookieSelector(cookie_of(connection))
    if isinstance(connection, int):
        return CookieSelector(connection)
    if isinstance(connection, CookieSelector | TupleSelector | ProcessSelector):
        return connection
    raise TypeError(f"{type(connection).__name__} names no connection; give a socket, a cookie or a selector")


def _ports(ports: int | tuple[int, int]) -> PortRange:
    first, last = ports if isinstance(ports, tuple) else (ports, ports)
    if not 0 <= first <= last <= 65535:
        raise ValueError(f"ports {first}..{last}: must be 0 to 65535, first <= last")
    return PortRange(first, last) if last else PortRange()
