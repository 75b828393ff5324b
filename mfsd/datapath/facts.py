# SPDX-License-Identifier: Apache-2.0
"""What has to be known of a device before its qdiscs are touched, and which qdiscs the kernel has.

Everything is asked over sockets (rtnetlink, the ethtool ioctl) in the calling thread's network namespace. sysfs would
not do: a mounted sysfs shows the devices of the namespace it was mounted in, whatever the thread has entered since.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pyroute2.ethtool.ioctl import EthtoolError, IoctlEthtool

from mfsd.datapath import tc
from mfsd.datapath.errors import EnforceError, NoDeviceError
from mfsd.datapath.pyroute import iproute
from mfsd.host import netlink as nl
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
_NAMED: Final = 20
"""Devices that an error names, at most."""


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """One network device. ``speed`` is None where the driver knows none; ``gso`` is in bytes, ``txqlen`` in packets."""

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


def read_facts(ifname: str) -> DeviceFacts:
    """Ask the kernel. Raises NoDeviceError, and EnforceError when it can't be asked."""
    what = f"device {ifname}"
    try:
        with iproute(what) as ip:
            (link,) = ip.link("get", ifname=ifname)
    except OSError as e:
        if e.errno == errno.ENODEV:
            raise _no_device(ifname) from e
        raise EnforceError(what, str(e)) from e
    if link.get("ifname") != ifname:  # the kernel also goes by alternative names
        raise _no_device(ifname)
    gso = max(link.get("gso_max_size") or 0, link.get("gso_ipv4_max_size") or 0, GSO_MAX)
    speed, queues = _ethtool(ifname)
    return DeviceFacts(
        ifname=ifname,
        ifindex=int(link["index"]),
        up=bool(link["flags"] & _IFF_UP),
        kind=link.get(("linkinfo", "kind")) or "",
        txqlen=int(link.get("txqlen") or 0),
        tx_queues=queues or int(link.get("num_tx_queues") or 1),
        gso=int(gso),
        speed=speed,
    )


def _no_device(ifname: str) -> NoDeviceError:
    known = sorted(name for _, name in socket.if_nameindex())
    return NoDeviceError(f"device {ifname}", "no such device", f"devices here: {', '.join(known[:_NAMED])}")


def set_txqlen(ifindex: int, txqlen: int) -> None:
    """Write the device's transmit queue length, in packets. Raises NoDeviceError, EnforceError."""
    what = f"set the queue length of device {ifindex}"
    try:
        with iproute(what) as ip:
            ip.link("set", index=ifindex, txqlen=txqlen)
    except OSError as e:
        raise (NoDeviceError if e.errno == errno.ENODEV else EnforceError)(what, str(e)) from e


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


def kernel_has(sock: tc.TcSocket, kind: str) -> bool:
    """True when the kernel has this qdisc, loading its module if need be. Changes nothing. Raises NetlinkError.

    Asks for a qdisc on lo with a size table that lacks its base: an unknown kind is ENOENT, a known one gets as far
    as the size table and is refused there, before it is grafted (net/sched/sch_api.c, qdisc_create). Older kernels
    let the qdisc look at lo first, and some want more than one transmit queue: EOPNOTSUPP from mq, mqprio and taprio.
    A kernel without any qdiscs (CONFIG_NET_SCHED) answers that, too, but for every kind.
    """
    refusal = _probe(sock, kind)
    if refusal.code == errno.EOPNOTSUPP:
        refusal = _probe(sock, _ALWAYS_THERE)
    if refusal.code == errno.EINVAL:
        return True
    if refusal.code in (errno.ENOENT, errno.EOPNOTSUPP):
        return False
    raise nl.NetlinkError(refusal.code or errno.EPROTO, f"ask whether the kernel has qdisc {kind}", refusal.note)


def _probe(sock: tc.TcSocket, kind: str) -> nl.Message:
    """The kernel's refusal."""
    body = tc.kind_attr(kind) + nl.attr(tc.TCA_STAB)
    flags = nl.NLM_CREATE | nl.NLM_REPLACE
    raw = tc.message(tc.RTM_NEWQDISC, flags, _LOOPBACK, _PROBE_HANDLE, tc.TC_H_ROOT, body=body)
    return sock.batch([raw])[0]
