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

from pyroute2.ethtool.ioctl import EthtoolError, IoctlEthtool

from mfsd.datapath import links, tc
from mfsd.datapath.errors import EnforceError
from mfsd.ground.units import Rate
from mfsd.host import netlink as nl

if TYPE_CHECKING:
    from mfsd.datapath.links import Link

GSO_MAX: Final = 65536
"""Bytes; GSO_LEGACY_MAX_SIZE, include/linux/netdevice.h."""
QUEUE_LENGTH: Final = 1000
"""Packets; what the kernel gives to a virtual device without a queue length on which a qdisc is put
(DEFAULT_TX_QUEUE_LEN, net/sched/sch_api.c, qdisc_create). mfsd gives it to any: queues of length 0 take nothing."""
VIRTUAL_KINDS: Final = frozenset({"veth", "bridge", "tun", "vxlan", "bond", "team", "ifb", "dummy"})
"""Kinds whose reported speed is a made-up or summed-up number."""
_LOOPBACK: Final = 1
"""Interface index of lo, first in every namespace (LOOPBACK_IFINDEX, include/net/flow.h)."""
_PROBE_HANDLE: Final = 0x6D7F0000
_ALWAYS_THERE: Final = "pfifo"
"""Part of CONFIG_NET_SCHED itself."""
_SPEED_UNKNOWN: Final = (0, 0xFFFF, 0xFFFFFFFF, -1)
_DEFAULT_QDISC: Final = "/proc/sys/net/core/default_qdisc"
"""In the initial network namespace only."""


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """One network device. ``speed`` is None where the driver knows none; ``gso`` is in bytes, ``txqlen`` in packets."""

    ifname: str
    ifindex: int
    up: bool
    carrier: bool
    kind: str
    txqlen: int
    tx_queues: int
    gso: int
    speed: Rate | None
    address: str = ""
    """As Link.address."""

    @property
    def virtual(self) -> bool:
        """No hardware behind it, so its speed means nothing."""
        return self.kind in VIRTUAL_KINDS


def read_facts(ifname: str) -> DeviceFacts:
    """Ask the kernel. Raises NoDeviceError on its word, and EnforceError when it can't be asked."""
    what = f"device {ifname}"
    try:
        with tc.TcSocket() as sock:
            return _facts(links.by_name(sock, ifname))
    except OSError as e:
        raise EnforceError(what, str(e)) from e


def facts_of(sock: tc.TcSocket, ifindex: int) -> DeviceFacts:
    """As read_facts, whatever the device is called now."""
    try:
        return _facts(links.by_index(sock, ifindex))
    except OSError as e:
        raise EnforceError(f"device of index {ifindex}", str(e)) from e


def _facts(link: Link) -> DeviceFacts:
    speed, queues = _ethtool(link.name)
    return DeviceFacts(
        ifname=link.name,
        ifindex=link.ifindex,
        up=link.up,
        carrier=link.carrier,
        kind=link.kind,
        txqlen=link.txqlen,
        tx_queues=queues or link.tx_queues,
        gso=max(link.gso, GSO_MAX),
        speed=speed,
        address=link.address,
    )


def default_qdisc() -> str | None:
    """What the kernel puts on a device, or on each queue of one, by itself; None where it does not say."""
    try:
        with open(_DEFAULT_QDISC, encoding="ascii") as file:  # noqa: PTH123 - no path is needed
            return file.read().strip()
    except OSError:
        return None


def _ethtool(ifname: str) -> tuple[Rate | None, int]:
    """(speed, real TX queues); (None, 0) where the driver does not say. Raises OSError without a descriptor to ask."""
    speed, queues = None, 0
    with contextlib.closing(IoctlEthtool(ifname)) as tool:
        with contextlib.suppress(EthtoolError, OSError):
            mbit = int(tool.get_link_settings().speed)
            speed = None if mbit in _SPEED_UNKNOWN else Rate(mbit * 125e3)
        with contextlib.suppress(EthtoolError, OSError):
            channels = tool.get_channels()
            queues = int(channels.tx_count) + int(channels.combined_count)
    return speed, queues


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
