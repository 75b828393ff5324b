# SPDX-License-Identifier: Apache-2.0
"""Traffic control over rtnetlink: requests as bytes, what is on a device, statistics in place.

Bytes for two reasons: a snapshot must be replayed exactly as the kernel gave it, and a purge must cost tens of
microseconds, which means requests built once and sent many at a time. Handles are 0xMMMMmmmm everywhere.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from mfsd.host import netlink as nl

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

# include/uapi/linux/rtnetlink.h
RTM_NEWQDISC: Final = 36
RTM_DELQDISC: Final = 37
RTM_GETQDISC: Final = 38
RTM_NEWTCLASS: Final = 40
RTM_GETTCLASS: Final = 42
RTM_NEWTFILTER: Final = 44
RTM_DELTFILTER: Final = 45
RTM_GETTFILTER: Final = 46

# enum of TCA_* there
TCA_KIND: Final = 1
TCA_OPTIONS: Final = 2
TCA_STATS2: Final = 7
TCA_STAB: Final = 8
# include/uapi/linux/gen_stats.h
_STATS_BASIC: Final = 1
_STATS_RATE_EST: Final = 2
_STATS_QUEUE: Final = 3
_STATS_PKT64: Final = 8

TC_H_ROOT: Final = 0xFFFFFFFF
# include/uapi/linux/pkt_cls.h
TCA_BPF_FD: Final = 6
TCA_BPF_NAME: Final = 7
_ETH_P_ALL: Final = 3
_NESTED: Final = frozenset({"ets"})
"""Kinds that insist on the flag of nested attributes, which is missing in their own dumps (nla_parse_nested)."""
_CLSACT_MAJOR: Final = 0xFFFF0000
"""Handle of ingress and clsact qdiscs, whatever their parent."""

TCMSG: Final = struct.Struct("=BBHiIII")
"""struct tcmsg: family, two pads, ifindex, handle, parent, info."""
_BASIC: Final = struct.Struct("=QI")
_QUEUE: Final = struct.Struct("=III")
_U64: Final = struct.Struct("=Q")
_IN_FLIGHT: Final = 256
_ROOM: Final = 8 << 20
"""Bytes of receive buffer: the default holds the answers of some fifty purges."""


def message(kind: int, flags: int, ifindex: int, handle: int, parent: int, info: int = 0, body: bytes = b"") -> bytes:
    """Build a request that changes something; it is acknowledged."""
    return nl.request(kind, flags | nl.NLM_ACK, TCMSG.pack(0, 0, 0, ifindex, handle, parent, info) + body)


def query(kind: int, ifindex: int, handle: int, parent: int = 0) -> bytes:
    """Build an RTM_GETQDISC or RTM_GETTCLASS for one object.

    Without NLM_ECHO the answer would go to the listeners of the multicast group only (net/sched/sch_api.c,
    tclass_get_notify; net/netlink/af_netlink.c, nlmsg_notify).
    """
    return nl.request(kind, nl.NLM_ECHO, TCMSG.pack(0, 0, 0, ifindex, handle, parent, 0))


def kind_attr(kind: str) -> bytes:
    """TCA_KIND of a qdisc, class or filter."""
    return nl.attr(TCA_KIND, kind.encode() + b"\0")


def put(
    what: str, kind: str, ifindex: int, handle: int, parent: int, options: bytes | None = None, *, change: bool = False
) -> bytes:
    """Build the request that makes a "qdisc", in place of what is there, or a "class"; or that changes it."""
    number, flags = {
        "qdisc": (RTM_NEWQDISC, nl.NLM_CREATE | nl.NLM_REPLACE),
        "class": (RTM_NEWTCLASS, nl.NLM_CREATE | nl.NLM_EXCL),
    }[what]
    nested = nl.NLA_NESTED if kind in _NESTED else 0
    body = kind_attr(kind) + (b"" if options is None else nl.attr(TCA_OPTIONS | nested, options))
    return message(number, nl.NLM_REPLACE if change else flags, ifindex, handle, parent, body=body)


def delete_root(ifindex: int) -> bytes:
    """Build the request that deletes a device's root; the kernel's default returns."""
    return message(RTM_DELQDISC, 0, ifindex, 0, TC_H_ROOT)


def bpf_filter(kind: int, flags: int, ifindex: int, handle: int, parent: int, options: bytes = b"") -> bytes:
    """Build a request about a cls_bpf filter of priority 1 that is for all packets."""
    body = kind_attr("bpf") + (nl.attr(TCA_OPTIONS, options) if options else b"")
    return message(kind, flags, ifindex, handle, parent, 1 << 16 | socket.htons(_ETH_P_ALL), body)


def bpf_program(fd: int, name: str) -> bytes:
    """Options of such a filter: a loaded program, which the kernel keeps as long as the filter."""
    return nl.attr(TCA_BPF_FD, struct.pack("=I", fd)) + nl.attr(TCA_BPF_NAME, name.encode() + b"\0")


@dataclass(frozen=True, slots=True)
class TcObject:
    """A qdisc, class or filter as the kernel dumped it."""

    kind: str
    handle: int
    parent: int
    info: int
    options: bytes | None
    """Payload of TCA_OPTIONS; None when it has none."""
    attributes: dict[int, bytes]
    """All attributes, TCA_STATS2 among them."""

    @property
    def estimator(self) -> bool:
        """A rate estimator hangs on it (``tc ... estimator``); its parameters are not dumped."""
        return _STATS_RATE_EST in nl.attrs(self.attributes.get(TCA_STATS2, b""))


def parse_object(m: nl.Message) -> tuple[int, TcObject]:
    """(ifindex, object) of an RTM_NEW* message."""
    _, _, _, ifindex, handle, parent, info = nl.fields(TCMSG, m.data, m.body, m.end)
    found = nl.attrs(m.data, m.body + TCMSG.size, m.end)
    kind = found.get(TCA_KIND, b"").split(b"\0")[0].decode(errors="replace")
    return ifindex, TcObject(kind, handle, parent, info, found.get(TCA_OPTIONS), found)


def _device_of(m: nl.Message) -> int:
    """Index of the device that an RTM_NEW* message is about."""
    return int(nl.fields(TCMSG, m.data, m.body, m.end)[3])


class Stats(NamedTuple):
    """Counters of a qdisc or class: sent since it was made, queued now."""

    bytes: int
    packets: int
    drops: int
    backlog_bytes: int
    backlog_packets: int


class StatsReader:
    """Finds the counters in messages of one family. Positions are remembered and checked, not searched anew.

    A remembered position is used only when the attribute header there is what it was, so a message with more or fewer
    attributes costs a search, never a wrong number. Layout: struct gnet_stats_basic (u64 bytes, u32 packets), struct
    gnet_stats_queue (u32 qlen, backlog, drops, ...), net/core/gen_stats.c.
    """

    def __init__(self) -> None:
        self._at: dict[int, tuple[tuple[int, bytes], tuple[int, bytes], int]] = {}
        """By length of the message: (offset, header) of the basic and of the queue counters, offset of a 64-bit packet
        counter or 0."""

    def read(self, m: nl.Message) -> Stats:
        """Counters of the message; zeros when it carries none."""
        data, start = m.data, m.body
        known = self._at.get(m.end - start)
        if known is None or any(data[start + at : start + at + 4] != head for at, head in known[:2]):
            known = self._search(m)
            if known is None:
                return Stats(0, 0, 0, 0, 0)
            self._at[m.end - start] = known
        (basic, _), (queue, _), packets64 = known
        sent, packets = nl.fields(_BASIC, data, start + basic + 4, m.end)
        qlen, backlog, drops = nl.fields(_QUEUE, data, start + queue + 4, m.end)
        if packets64:
            (packets,) = nl.fields(_U64, data, start + packets64 + 4, m.end)
        return Stats(sent, packets, drops, backlog, qlen)

    @staticmethod
    def _search(m: nl.Message) -> tuple[tuple[int, bytes], tuple[int, bytes], int] | None:
        top = nl.positions(m.data, m.body + TCMSG.size, m.end)
        if TCA_STATS2 not in top:
            return None
        at, size = top[TCA_STATS2]
        inner = nl.positions(m.data, at + 4, at + size)
        if _STATS_BASIC not in inner or _STATS_QUEUE not in inner:
            return None
        basic, queue = inner[_STATS_BASIC][0], inner[_STATS_QUEUE][0]
        wide = inner.get(_STATS_PKT64, (m.body, 0))[0] - m.body
        return (basic - m.body, m.data[basic : basic + 4]), (queue - m.body, m.data[queue : queue + 4]), wide


class TcSocket(nl.NetlinkSocket):
    """A NETLINK_ROUTE socket in the calling thread's network namespace."""

    def __init__(self) -> None:
        super().__init__(socket.NETLINK_ROUTE, in_flight=_IN_FLIGHT, room=_ROOM)

    def netns_cookie(self) -> int:
        """Of the socket's network namespace; 0 where the kernel tells none."""
        try:
            return nl.netns_cookie(self._sock)
        except OSError:
            return 0

    def run(self, requests: Sequence[bytes], what: str) -> None:
        """Send requests in order. Raises NetlinkError of the first refused one.

        A refused request does not stop those after it in the same batch; the caller rolls back.
        """
        for index, answer in enumerate(self.batch(requests)):
            if answer.code:
                raise nl.NetlinkError(answer.code, f"{what} (message {index + 1} of {len(requests)})", answer.note)

    def parts(self, kind: int, ifindex: int, parent: int = 0) -> list[nl.Message]:
        """A dump: the messages of this device (qdiscs: of any, the kernel sends all). Raises NetlinkError."""
        tcm = TCMSG.pack(0, 0, 0, ifindex, 0, parent, 0)
        return self.dump(nl.request(kind, nl.NLM_DUMP, tcm), "dump of traffic control")

    def objects(self, kind: int, ifindex: int, parent: int = 0) -> list[TcObject]:
        """The qdiscs, classes or filters of one device, decoded. Raises NetlinkError."""
        return [parse_object(m)[1] for m in self.parts(kind, ifindex, parent) if _device_of(m) == ifindex]

    def tree(self, ifindex: int) -> tuple[list[TcObject], list[TcObject]]:
        """(qdiscs, classes) of a device's egress. Raises NetlinkError."""
        qdiscs = self.objects(RTM_GETQDISC, ifindex)
        egress = [q for q in qdiscs if q.handle != _CLSACT_MAJOR and q.kind not in ("ingress", "clsact")]
        return egress, self.objects(RTM_GETTCLASS, ifindex)


def root_of(qdiscs: Iterable[TcObject]) -> TcObject | None:
    """The root among dumped qdiscs; None on a device without any (a bug of the driver, or a bridge port gone)."""
    return next((q for q in qdiscs if q.parent == TC_H_ROOT), None)


def classid(value: int) -> str:
    """In the notation of tc: ``1:10``, ``8001:``, ``root``."""
    if value == TC_H_ROOT:
        return "root"
    major, minor = value >> 16, value & 0xFFFF
    return f"{major:x}:{minor:x}" if minor else f"{major:x}:"
