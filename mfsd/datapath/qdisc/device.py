# SPDX-License-Identifier: Apache-2.0
"""What has to be known of a device before its qdiscs are touched, and which qdiscs the kernel has.

Everything is asked over sockets (rtnetlink, the ethtool ioctl) in the calling thread's network namespace. sysfs would
not do: a mounted sysfs shows the devices of the namespace it was mounted in, whatever the thread has entered since.
"""

from __future__ import annotations

import contextlib
import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pyroute2 import IPRoute
from pyroute2.ethtool.ioctl import EthtoolError, IoctlEthtool

from mfsd.datapath import netlink as nl
from mfsd.datapath.errors import EnforceError
from mfsd.units import Rate

if TYPE_CHECKING:
    from collections.abc import Iterator

GSO_MAX: Final = 65536
"""Bytes; GSO_LEGACY_MAX_SIZE, include/linux/netdevice.h."""
VIRTUAL_KINDS: Final = frozenset({"veth", "bridge", "tun", "vxlan", "bond", "team", "ifb", "dummy"})
"""Kinds whose reported speed is a made-up or summed-up number."""
_IFF_UP: Final = 1
_LOOPBACK: Final = 1
"""Interface index of lo, first in every namespace (LOOPBACK_IFINDEX, include/net/flow.h)."""
_PROBE_HANDLE: Final = 0x6D7F0000
_ALWAYS_THERE: Final = "pfifo"
"""Part of CONFIG_NET_SCHED itself."""
_SPEED_UNKNOWN: Final = (0, 0xFFFF, 0xFFFFFFFF, -1)


@dataclass(frozen=True, slots=True)
class Device:
    """One network device. ``speed`` is None where the driver knows none; ``gso`` is in bytes."""

    ifname: str
    ifindex: int
    up: bool
    kind: str
    txqlen: int
    tx_queues: int
    gso: int
    speed: Rate | None

    @property
    def virtual(self) -> bool:
        """No hardware behind it, so its speed means nothing."""
        return self.kind in VIRTUAL_KINDS


def read_device(ifname: str) -> Device:
    """Ask the kernel. Raises EnforceError when there is no such device in this network namespace."""
    with IPRoute() as ipr:
        found = ipr.link_lookup(ifname=ifname)
        if not found:
            known = sorted(str(link.get("ifname")) for link in ipr.get_links())
            raise EnforceError(f"device {ifname}", "no such device", f"devices here: {', '.join(known[:20])}")
        link = ipr.get_links(found[0])[0]
    gso = max(link.get("gso_max_size") or 0, link.get("gso_ipv4_max_size") or 0, GSO_MAX)
    speed, queues = _ethtool(ifname)
    return Device(
        ifname=ifname,
        ifindex=int(found[0]),
        up=bool(link["flags"] & _IFF_UP),
        kind=link.get(("linkinfo", "kind")) or "",
        txqlen=int(link.get("txqlen") or 0),
        tx_queues=queues or int(link.get("num_tx_queues") or 1),
        gso=int(gso),
        speed=speed,
    )


def set_txqlen(ifindex: int, txqlen: int) -> None:
    """Write the device's transmit queue length, in packets."""
    with IPRoute() as ipr:
        ipr.link("set", index=ifindex, txqlen=txqlen)


def _ethtool(ifname: str) -> tuple[Rate | None, int]:
    """(speed, real TX queues); (None, 0) where the driver does not say."""
    speed, queues = None, 0
    with _ioctl(ifname) as tool:
        with contextlib.suppress(EthtoolError, OSError):
            mbit = int(tool.get_link_settings().speed)
            speed = None if mbit in _SPEED_UNKNOWN else Rate(mbit * 125e3)
        with contextlib.suppress(EthtoolError, OSError):
            channels = tool.get_channels()
            queues = int(channels.tx_count) + int(channels.combined_count)
    return speed, queues


@contextlib.contextmanager
def _ioctl(ifname: str) -> Iterator[IoctlEthtool]:
    tool = IoctlEthtool(ifname)
    try:
        yield tool
    finally:
        tool.close()


def kernel_has(sock: nl.TcSocket, kind: str) -> bool:
    """True when the kernel has this qdisc, loading its module if need be. Changes nothing.

    Asks for a qdisc on lo with a size table that lacks its base: an unknown kind is ENOENT, a known one gets as far
    as the size table and is refused there, before it is grafted (net/sched/sch_api.c, qdisc_create). Older kernels
    let the qdisc look at lo first, and some want more than one transmit queue: EOPNOTSUPP from mq, mqprio and taprio.
    A kernel without any qdiscs (CONFIG_NET_SCHED) answers that, too, but for every kind.
    """
    code, note = _probe(sock, kind)
    if code == errno.EOPNOTSUPP:
        code, note = _probe(sock, _ALWAYS_THERE)
    if code == errno.EINVAL:
        return True
    if code in (errno.ENOENT, errno.EOPNOTSUPP):
        return False
    raise nl.NetlinkError(code or errno.EPROTO, f"ask whether the kernel has qdisc {kind}", note)


def _probe(sock: nl.TcSocket, kind: str) -> tuple[int, str]:
    """(errno, the kernel's words) of the refused request."""
    body = nl.kind_attr(kind) + nl.attr(nl.TCA_STAB)
    flags = nl.NLM_CREATE | nl.NLM_REPLACE
    raw = nl.message(nl.RTM_NEWQDISC, flags, (_LOOPBACK, _PROBE_HANDLE, nl.TC_H_ROOT, 0), body)
    ((code, note, _),) = sock.run_each([raw])
    return code, note
