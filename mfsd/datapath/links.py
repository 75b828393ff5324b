# SPDX-License-Identifier: Apache-2.0
"""Network devices by rtnetlink: which there are, by index and by name, and which have left.

A device is its interface index within a network namespace; its name is what the operator calls it, and may be another
one, or another device's, a moment later. Only the kernel's ENODEV means that there is no such device: whoever has no
descriptor left has not asked.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from mfsd.datapath.errors import NoDeviceError
from mfsd.host import netlink as nl

if TYPE_CHECKING:
    from mfsd.host.netlink import NetlinkSocket

# include/uapi/linux/rtnetlink.h
_DELLINK: Final = 17
_GETLINK: Final = 18
_SETLINK: Final = 19
_GROUP_LINK: Final = 1
"""RTMGRP_LINK."""
# include/uapi/linux/if_link.h
_ADDRESS: Final = 1
_IFNAME: Final = 3
_TXQLEN: Final = 13
_LINKINFO: Final = 18
_INFO_KIND: Final = 1
_NUM_TX_QUEUES: Final = 31
_GSO_MAX_SIZE: Final = 41
_NEW_NETNSID: Final = 45
_ALT_IFNAME: Final = 53
_PERM_ADDRESS: Final = 54
_GSO_IPV4_MAX_SIZE: Final = 63

_INFO: Final = struct.Struct("=BBHiII")
"""struct ifinfomsg: family, pad, hardware type, index, flags, change mask."""
_U32: Final = struct.Struct("=I")
_IFF_UP: Final = 1
_IFF_LOWER_UP: Final = 1 << 16
_NAME_MAX: Final = 15
_ALT_NAME_MAX: Final = 127
_NAMED: Final = 20
"""Devices that an error names, at most."""
_ROOM: Final = 4 << 20
"""Bytes; a message about a device is some 2 KiB, and the kernel tells of all devices of the namespace."""


@dataclass(frozen=True, slots=True)
class Link:
    """One network device. ``gso`` is the largest packet in bytes, ``txqlen`` in packets, ``tx_queues`` as allocated."""

    ifindex: int
    name: str
    up: bool
    carrier: bool
    """Somebody is at the other end of the cable; only of a device that is up."""
    hardware: int
    """Type of its frames, ARPHRD_* in include/uapi/linux/if_arp.h."""
    kind: str
    """Of virtual ones, as ``ip link`` names it; else empty."""
    txqlen: int
    tx_queues: int
    gso: int
    address: str
    """Of its hardware, in hex, the burnt-in one where there is one; empty: it has none."""


def by_index(sock: NetlinkSocket, ifindex: int) -> Link:
    """Raises NoDeviceError on the kernel's word, and NetlinkError or OSError when it can't be asked."""
    return _get(sock, ifindex, b"", f"device of index {ifindex}")


def by_name(sock: NetlinkSocket, name: str) -> Link:
    """As by_index. Alternative names are none."""
    what = f"device {name}"
    raw = name.encode()
    if 0 < len(raw) <= _NAME_MAX and b"\0" not in raw:
        with contextlib.suppress(NoDeviceError):
            found = _get(sock, 0, nl.attr(_IFNAME, raw + b"\0"), what)
            if found.name == name:
                return found
    names = sorted(link.name for link in every(sock))
    raise NoDeviceError(what, "no such device", f"devices here: {', '.join(names[:_NAMED])}")


def alternative(sock: NetlinkSocket, name: str) -> str:
    """Name of the device that has this alternative name; empty if there is none. Raises NetlinkError, OSError."""
    raw = name.encode()
    if not 0 < len(raw) <= _ALT_NAME_MAX or b"\0" in raw:
        return ""
    try:
        return _get(sock, 0, nl.attr(_ALT_IFNAME, raw + b"\0"), f"device {name}").name
    except NoDeviceError:
        return ""


def every(sock: NetlinkSocket) -> list[Link]:
    """All devices of the namespace. Raises NetlinkError, OSError."""
    raw = nl.request(_GETLINK, nl.NLM_DUMP, _INFO.pack(0, 0, 0, 0, 0, 0))
    return [_link(m) for m in sock.dump(raw, "list of devices", torn=True)]


def set_txqlen(sock: NetlinkSocket, ifindex: int, txqlen: int) -> None:
    """Write the transmit queue length, in packets. Raises NoDeviceError, NetlinkError, OSError."""
    body = _INFO.pack(0, 0, 0, ifindex, 0, 0) + nl.attr(_TXQLEN, _U32.pack(txqlen))
    what = f"set the queue length of device {ifindex}"
    (answer,) = sock.batch([nl.request(_SETLINK, nl.NLM_ACK, body)])
    if answer.code == errno.ENODEV:
        raise NoDeviceError(what, "no such device")
    if answer.code:
        raise nl.NetlinkError(answer.code, what, answer.note)


def _get(sock: NetlinkSocket, ifindex: int, attributes: bytes, what: str) -> Link:
    raw = nl.request(_GETLINK, 0, _INFO.pack(0, 0, 0, ifindex, 0, 0) + attributes)
    try:
        return _link(sock.ask(raw, what))
    except nl.NetlinkError as e:
        if e.errno == errno.ENODEV:
            raise NoDeviceError(what, "no such device") from e
        raise


def _link(m: nl.Message) -> Link:
    _, _, hardware, ifindex, flags, _ = nl.fields(_INFO, m.data, m.body, m.end)
    found = nl.attrs(m.data, m.body + _INFO.size, m.end)

    def number(kind: int) -> int:
        return int(nl.fields(_U32, found[kind], 0, len(found[kind]))[0]) if kind in found else 0

    kind = nl.attrs(found.get(_LINKINFO, b"")).get(_INFO_KIND, b"")
    address = found.get(_PERM_ADDRESS) or found.get(_ADDRESS, b"")
    return Link(
        ifindex=ifindex,
        name=_text(found.get(_IFNAME, b"")),
        up=bool(flags & _IFF_UP),
        carrier=bool(flags & _IFF_LOWER_UP),
        hardware=hardware,
        kind=_text(kind),
        txqlen=number(_TXQLEN),
        tx_queues=number(_NUM_TX_QUEUES) or 1,
        gso=max(number(_GSO_MAX_SIZE), number(_GSO_IPV4_MAX_SIZE)),
        address=address.hex() if any(address) else "",
    )


def _text(raw: bytes) -> str:
    return raw.rstrip(b"\0").decode(errors="replace")


class Departures:
    """Which devices have left the namespace: deleted, or moved to another one, also if they are back by now.

    What was on them is gone then, though index and name may be the same again. It listens from the moment it is made.
    """

    def __init__(self) -> None:
        """Raises OSError."""
        self._sock = nl.opened(socket.NETLINK_ROUTE, groups=_GROUP_LINK, room=_ROOM)

    def since(self) -> dict[int, bool] | None:
        """Devices that have left since the last call, by index; None when there were too many messages to tell.

        True: to another namespace, the last time.
        """
        gone: dict[int, bool] = {}
        lost = False
        while True:
            try:
                data = self._sock.recv(1 << 16)
            except BlockingIOError:
                return None if lost else gone
            except OSError as e:
                if e.errno != errno.ENOBUFS:
                    raise
                lost = True
                continue
            for m in nl.messages(data):
                if m.kind == _DELLINK:
                    family, _, _, ifindex, _, _ = nl.fields(_INFO, m.data, m.body, m.end)
                    if family == socket.AF_UNSPEC:  # else it has only left a bridge
                        moved = _NEW_NETNSID in nl.attrs(m.data, m.body + _INFO.size, m.end)
                        gone[ifindex] = moved

    def close(self) -> None:
        """Idempotent."""
        self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
