# SPDX-License-Identifier: Apache-2.0
"""Sockets that a worker itself has yield in the network while they are deferred (docs/network.md)."""

from __future__ import annotations

import contextlib
import errno
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from mfsd.client.selectors import Fd, borrowed

if TYPE_CHECKING:
    from mfsd.client.selectors import HasFileno

ALGORITHM: Final = "mfsd_yield"
"""What names of the daemon's congestion control begin with (mfsd/datapath/bpf/yielding.py)."""
AVAILABLE: Final = Path("/proc/sys/net/ipv4/tcp_available_congestion_control")
NAME_MAX: Final = 16
"""TCP_CA_NAME_MAX of include/net/tcp.h."""
_GONE: Final = frozenset({errno.ENOENT, errno.EPERM, errno.EBUSY})
"""The algorithm has gone meanwhile, or this one may not be chosen by everybody."""


def give_way(connection: HasFileno | Fd) -> bool:
    """Have a TCP socket yield in the network while it is deferred. True: it will.

    For connections of other network namespaces that are older than the daemon, which finds all others itself. Needs no
    privileges. False where ``network.yield`` is off, and for sockets that run anything but cubic, which is what this
    one runs while it is not deferred. It holds until the socket has had no hint for five seconds, or the daemon ends.
    Raises OSError for a closed socket and what is not TCP.
    """
    with contextlib.ExitStack() as stack:
        if isinstance(connection, Fd) or not hasattr(connection, "setsockopt"):
            number = connection.number if isinstance(connection, Fd) else connection.fileno()
            sock: Any = stack.enter_context(borrowed(number))
        else:
            sock = connection
        runs = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, NAME_MAX).rstrip(b"\0").decode()
        if runs.startswith(ALGORITHM):
            return True
        return runs == "cubic" and any(_chosen(sock, name) for name in reversed(_available()))


def _available() -> list[str]:
    """Of all daemons at work; the latest is the last."""
    try:
        return [name for name in AVAILABLE.read_text(encoding="ascii").split() if name.startswith(ALGORITHM)]
    except OSError:
        return []


def _chosen(sock: Any, name: str) -> bool:
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode())
    except OSError as e:
        if e.errno not in _GONE:
            raise
        return False
    return True
