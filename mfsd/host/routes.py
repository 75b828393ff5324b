# SPDX-License-Identifier: Apache-2.0
"""Which device a connection leaves by, where several are shaped: the kernel's own route lookup over rtnetlink.

One request of some ten microseconds per remote address, remembered for a few seconds, on a socket of our own
(pyroute2's calls can't be made from a running event loop).
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mfsd.model import Address, Endpoints

# include/uapi/linux/rtnetlink.h, include/uapi/linux/netlink.h
RTM_NEWROUTE: Final = 24
RTM_GETROUTE: Final = 26
RTA_DST: Final = 1
RTA_SRC: Final = 2
RTA_OIF: Final = 4
_NLM_REQUEST: Final = 1
_NLMSG_ERROR: Final = 2
_NLMSGHDR: Final = struct.Struct("=IHHII")
_RTMSG: Final = struct.Struct("=BBBBBBBBI")
_RTATTR: Final = struct.Struct("=HH")
_U32: Final = struct.Struct("=I")
KEPT_S: Final = 5.0
KEPT_MAX: Final = 65_536


class HasIndex(Protocol):
    """A device."""

    ifindex: int


class RouteLookup:
    """Called with the endpoints of a connection; gives the index of its device among ``devices``, 0 if it is none.

    Traffic that a shaped device carries for another one (a bridge, a bond, a VLAN above it) has the upper device's
    index here and counts as the first device's.
    """

    def __init__(self, devices: Sequence[HasIndex], clock: Callable[[], float] = time.monotonic) -> None:
        self._devices = devices
        self._clock = clock
        self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._sock.bind((0, 0))
        self._seq = 0
        self._known: dict[tuple[Address, Address], tuple[float, int]] = {}

    def close(self) -> None:
        """Idempotent."""
        self._sock.close()

    def __call__(self, endpoints: Endpoints | None) -> int:
        """Index of the device, 0 if it is not known."""
        if endpoints is None:
            return 0
        key = (endpoints.src, endpoints.dst)
        now = self._clock()
        known = self._known.get(key)
        if known is None or known[0] < now:
            if len(self._known) >= KEPT_MAX:
                self._known.clear()
            try:
                ifindex = self.ifindex(*key)
            except OSError:
                ifindex = 0  # no route (any more): its packets go nowhere
            known = self._known[key] = (now + KEPT_S, ifindex)
        return next((i for i, p in enumerate(self._devices) if p.ifindex == known[1]), 0)

    def ifindex(self, src: Address, dst: Address) -> int:
        """Device of the route from ``src`` to ``dst``, 0 if the answer names none. Raises OSError with its errno."""
        self._seq = (self._seq + 1) & 0xFFFFFFFF
        family = socket.AF_INET6 if dst.version == 6 else socket.AF_INET
        bits = dst.max_prefixlen
        body = _RTMSG.pack(family, bits, bits, 0, 0, 0, 0, 0, 0)
        for kind, address in ((RTA_DST, dst), (RTA_SRC, src)):
            body += _RTATTR.pack(_RTATTR.size + bits // 8, kind) + address.packed
        self._sock.send(_NLMSGHDR.pack(_NLMSGHDR.size + len(body), RTM_GETROUTE, _NLM_REQUEST, self._seq, 0) + body)
        for _ in range(8):  # answers to requests that were interrupted may still be queued
            data = self._sock.recv(65536)
            length, kind, _, seq, _ = _NLMSGHDR.unpack_from(data)
            if seq != self._seq:
                continue
            if kind == _NLMSG_ERROR:
                (code,) = struct.unpack_from("=i", data, _NLMSGHDR.size)
                raise OSError(-code, os.strerror(-code))
            return _oif(data[: min(length, len(data))]) if kind == RTM_NEWROUTE else 0
        raise OSError(errno.EPROTO, "no answer to a route request")


def _oif(message: bytes) -> int:
    offset = _NLMSGHDR.size + _RTMSG.size
    while offset + _RTATTR.size <= len(message):
        length, kind = _RTATTR.unpack_from(message, offset)
        if length < _RTATTR.size:
            break
        if kind == RTA_OIF:
            return int(_U32.unpack_from(message, offset + _RTATTR.size)[0])
        offset += (length + 3) & ~3
    return 0
