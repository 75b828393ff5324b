# SPDX-License-Identifier: Apache-2.0
"""Which device a connection leaves by, where several are shaped: the kernel's own route lookup over rtnetlink.

One request of some ten microseconds per remote address, remembered for a few seconds.
"""

from __future__ import annotations

import socket
import struct
import time
from typing import TYPE_CHECKING, Final, Protocol

from mfsd.host import netlink as nl

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mfsd.model import Address, Endpoints

# include/uapi/linux/rtnetlink.h
RTM_GETROUTE: Final = 26
RTA_DST: Final = 1
RTA_SRC: Final = 2
RTA_OIF: Final = 4
_RTMSG: Final = struct.Struct("=BBBBBBBBI")
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
        self._sock = nl.NetlinkSocket(socket.NETLINK_ROUTE, in_flight=1)
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
        family = socket.AF_INET6 if dst.version == 6 else socket.AF_INET
        bits = dst.max_prefixlen
        body = _RTMSG.pack(family, bits, bits, 0, 0, 0, 0, 0, 0)
        body += nl.attr(RTA_DST, dst.packed) + nl.attr(RTA_SRC, src.packed)
        answer = self._sock.ask(nl.request(RTM_GETROUTE, 0, body), "route lookup")
        at, _ = nl.find(answer.data, answer.body + _RTMSG.size, answer.end, RTA_OIF)
        return int(_U32.unpack_from(answer.data, at + nl.ATTR.size)[0]) if at else 0
