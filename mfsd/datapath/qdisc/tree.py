# SPDX-License-Identifier: Apache-2.0
"""A qdisc tree as wanted: its messages, the tc commands that mean the same, and what differs from a device's tree.

A backend (htb.py, prio.py) describes the tree once; installing, dry runs, verification and adoption all read this one
description. Nothing here talks to the kernel.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from mfsd.bands import Role
from mfsd.datapath import netlink as nl

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mfsd.bands import BandSpec

MAJOR: Final = 0x6D66
"""Major number of the root that the classifier names: "mf". Nobody's by chance: tc's users write small numbers and the
kernel hands out 0x8001 and up (net/sched/sch_api.c, qdisc_alloc_handle)."""
ROOT: Final = MAJOR << 16
SHAPER_MAJOR: Final = 0x6D67
"""Major number of a shaper above the bands (tbf over prio)."""
CHILD_MAJOR: Final = 0x6D80
"""First major number of qdiscs inside the tree (drr of prio's bands)."""
LEAF_MAJORS: Final = range(0x1000, 0x6000)
"""Major numbers for the leaf queues that rescues make: two per lane, taken in turns."""
PURGEABLE: Final = frozenset({Role.LEVEL, Role.SCAVENGER})
"""Bands that hold hinted traffic only. Control and default carry UDP, unhinted and pure ACK packets: never purged."""

# include/uapi/linux/pkt_sched.h
TCA_HTB_PARMS: Final = 1
TCA_HTB_INIT: Final = 2
TCA_HTB_DIRECT_QLEN: Final = 5
TCA_HTB_RATE64: Final = 6
TCA_HTB_CEIL64: Final = 7
TCA_HTB_OFFLOAD: Final = 9
TCA_TBF_PARMS: Final = 1
TCA_TBF_RATE64: Final = 4
TCA_DRR_QUANTUM: Final = 1
RATESPEC: Final = struct.Struct("=BBHhHI")
"""struct tc_ratespec: cell_log, linklayer, overhead, cell_align, mpu, rate."""
HTB_GLOB: Final = struct.Struct("=IIIII")
"""struct tc_htb_glob: version, rate2quantum, defcls, debug, direct_pkts."""
HTB_OPT: Final = struct.Struct("=12s12sIIIII")
"""struct tc_htb_opt: rate, ceil, buffer, cbuffer, quantum, level, prio."""
TBF_QOPT: Final = struct.Struct("=12s12sIII")
"""struct tc_tbf_qopt: rate, peakrate, limit, buffer, mtu."""
LINKLAYER_ETHERNET: Final = 1
U32_MAX: Final = 0xFFFFFFFF

_TICK_NS: Final = 64
"""One psched tick (PSCHED_SHIFT, include/net/pkt_sched.h)."""


def ticks(size: int, rate: int) -> int:
    """Time to send ``size`` bytes at ``rate`` bytes/s in psched ticks, rounded up as tc does (tc_calc_xmittime)."""
    return min(-(-size * 1_000_000_000 // (rate * _TICK_NS)), U32_MAX)


def ratespec(rate: int) -> bytes:
    """A struct tc_ratespec for a rate in bytes/s; what is beyond 32 bits goes to a RATE64 attribute beside it."""
    return RATESPEC.pack(0, LINKLAYER_ETHERNET, 0, 0, 0, min(rate, U32_MAX))


@dataclass(frozen=True, slots=True)
class Node:
    """One qdisc or class of a wanted tree. ``live``: other options can be written into it while traffic flows."""

    kind: str
    handle: int
    parent: int
    options: bytes | None
    type: str = "qdisc"
    live: bool = False

    def message(self, ifindex: int, *, change: bool = False) -> bytes:
        """The request that makes it, or changes it in place."""
        kind, flags = {
            "qdisc": (nl.RTM_NEWQDISC, nl.NLM_CREATE | nl.NLM_REPLACE),
            "class": (nl.RTM_NEWTCLASS, nl.NLM_CREATE | nl.NLM_EXCL),
        }[self.type]
        body = nl.kind_attr(self.kind) + (nl.attr(nl.TCA_OPTIONS, self.options) if self.options is not None else b"")
        return nl.message(kind, nl.NLM_REPLACE if change else flags, (ifindex, self.handle, self.parent, 0), body)

    @property
    def name(self) -> str:
        """For messages: "class 6d66:1"."""
        return f"{self.type} {self.kind} {nl.classid(self.handle)}"


@dataclass(frozen=True, slots=True)
class BandQueues:
    """Where a band's packets queue: lane i is class ``classid + i``, and that is also its ``skb->priority``."""

    spec: BandSpec
    classid: int
    lanes: int
    first_leaf: int = 0
    """Ordinal of lane 0 among all purgeable lanes of the device."""


@dataclass(frozen=True, slots=True)
class Filter:
    """A cls_bpf filter of the tree: the packet's major number names the class, see prio.py."""

    parent: int
    classes: tuple[tuple[int, int], ...]
    """(major number, classid) pairs."""
    otherwise: int
    """Classid for everything else; 0: no match."""


@dataclass(frozen=True, slots=True)
class Group:
    """Nodes that one line of a dry run describes. ``command`` is what one would type; DEV stands for the device."""

    text: str
    command: str
    nodes: tuple[Node, ...]
    filters: tuple[Filter, ...] = ()


@dataclass(frozen=True, slots=True)
class Tree:
    """A whole wanted tree, root first, every parent before its children, the default band before other bands."""

    backend: str
    groups: tuple[Group, ...]
    bands: tuple[BandQueues, ...]
    counter_classes: dict[int, int] = field(default_factory=dict)
    """Class -> band index, of the classes under ROOT whose counters add up to the bands'."""
    counters_reset: bool = False
    """A rescue starts the counters of a band of one lane anew: they are the leaf's, not the class's (sch_prio.c)."""

    @property
    def floors(self) -> bool:
        """Bands get their floors: prio can't give any."""
        return self.backend == "htb"

    @property
    def nodes(self) -> list[Node]:
        """In the order of installation."""
        return [node for group in self.groups for node in group.nodes]

    @property
    def filters(self) -> list[Filter]:
        """In the order of installation."""
        return [f for group in self.groups for f in group.filters]

    @property
    def root(self) -> Node:
        """The node at the device's root."""
        return self.groups[0].nodes[0]


def is_ours(thing: nl.TcObject) -> bool:
    """True for a root qdisc that mfsd made."""
    return thing.parent == nl.TC_H_ROOT and thing.handle >> 16 in (MAJOR, SHAPER_MAJOR)


def number_leaves(queues: Iterable[tuple[BandSpec, int, int]]) -> tuple[BandQueues, ...]:
    """Number the lanes that may be purged: (band, classid of lane 0, lanes) -> BandQueues.

    Raises ValueError when there are more than two handles each can be had for.
    """
    out = []
    count = 0
    for spec, classid, lanes in queues:
        out.append(BandQueues(spec, classid, lanes, count))
        if spec.role in PURGEABLE:
            count += lanes
    if 2 * count > len(LEAF_MAJORS):
        allowed = len(LEAF_MAJORS) // 2
        raise ValueError(f"{count} lanes in all, at most {allowed} allowed: set fewer lanes or levels")
    return tuple(out)


class How(enum.Enum):
    """What it takes to repair a difference without touching the root."""

    ADD = "add"
    CHANGE = "change"
    REBUILD = "rebuild"


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is not as wanted. ``node`` is the wanted one."""

    text: str
    how: How
    node: Node | None = None


def differences(tree: Tree, qdiscs: Sequence[nl.TcObject], classes: Sequence[nl.TcObject]) -> list[Difference]:
    """Compare a device's tree with the wanted one. Leaf queues made by rescues belong to it; statistics don't."""
    wanted = tree.nodes
    have = {("qdisc", q.handle): q for q in qdiscs} | {("class", c.handle): c for c in classes}
    out: list[Difference] = []
    for node in wanted:
        found = have.pop((node.type, node.handle), None)
        if found is None:
            how = How.REBUILD if node is tree.root else How.ADD
            out.append(Difference(f"{node.name} is missing", how, node))
            continue
        out += _compare(node, found)
    # The classes that a classful qdisc makes by itself (tbf's one, prio's bands) are nobody's wish.
    made = {"tbf", "prio", "mq"}
    purgeable = {b.classid + i for b in tree.bands if b.spec.role in PURGEABLE for i in range(b.lanes)}
    for (kind, handle), found in have.items():
        leaf = kind == "qdisc" and handle >> 16 in LEAF_MAJORS and found.parent in purgeable and found.kind == "pfifo"
        if leaf or handle == 0 or (kind == "class" and found.kind in made):
            continue
        out.append(Difference(f"{kind} {found.kind} {nl.classid(handle)} is not ours", How.REBUILD))
    return out


def _compare(node: Node, found: nl.TcObject) -> list[Difference]:
    if found.kind != node.kind:
        return [Difference(f"{node.name} is a {found.kind}", How.REBUILD, node)]
    # A class directly under its qdisc is dumped with parent "root".
    parents = {node.parent, nl.TC_H_ROOT} if node.type == "class" and not node.parent & 0xFFFF else {node.parent}
    if found.parent not in parents:
        text = f"{node.name} hangs under {nl.classid(found.parent)} instead of {nl.classid(node.parent)}"
        return [Difference(text, How.REBUILD, node)]
    wanted, have = settings(node.kind, node.type, node.options), settings(found.kind, node.type, found.options)
    off = [f"{key} {have.get(key)!r} instead of {value!r}" for key, value in wanted.items() if have.get(key) != value]
    if not off:
        return []
    # HTB reads a new prio only once the leaf has run dry (net/sched/sch_htb.c, htb_activate).
    live = node.live and wanted.get("prio") == have.get("prio")
    return [Difference(f"{node.name} has {', '.join(off)}", How.CHANGE if live else How.REBUILD, node)]


def settings(kind: str, of: str, options: bytes | None) -> dict[str, int | bytes]:
    """What can be compared of TCA_OPTIONS, by name; rates in bytes/s, buffers in psched ticks."""
    raw = options or b""
    if kind == "htb":
        found = nl.attrs(raw)
        return _htb_class(found) if of == "class" else _htb_qdisc(found)
    if kind == "tbf" and of == "qdisc":
        return _tbf(nl.attrs(raw))
    if kind == "drr" and of == "class":
        return {"quantum": struct.unpack("=I", nl.attrs(raw)[TCA_DRR_QUANTUM])[0]}
    return {"options": raw} if raw and kind == "prio" else {}


def _htb_qdisc(found: dict[int, bytes]) -> dict[str, int | bytes]:
    if TCA_HTB_INIT not in found:
        return {}
    _, r2q, default, _, _ = HTB_GLOB.unpack_from(found[TCA_HTB_INIT])
    return {"r2q": r2q, "default": default}


def _htb_class(found: dict[int, bytes]) -> dict[str, int | bytes]:
    if TCA_HTB_PARMS not in found:
        return {}
    rate, ceil, buffer, cbuffer, quantum, _, prio = HTB_OPT.unpack_from(found[TCA_HTB_PARMS])
    return {
        "rate": _rate(rate, found.get(TCA_HTB_RATE64)),
        "ceil": _rate(ceil, found.get(TCA_HTB_CEIL64)),
        "buffer": buffer,
        "cbuffer": cbuffer,
        "quantum": quantum,
        "prio": prio,
    }


def _tbf(found: dict[int, bytes]) -> dict[str, int | bytes]:
    if TCA_TBF_PARMS not in found:
        return {}
    rate, _, limit, buffer, _ = TBF_QOPT.unpack_from(found[TCA_TBF_PARMS])
    return {"rate": _rate(rate, found.get(TCA_TBF_RATE64)), "limit": limit, "buffer": buffer}


def _rate(spec: bytes, wide: bytes | None) -> int:
    narrow = int(RATESPEC.unpack(spec)[5])
    return max(narrow, struct.unpack("=Q", wide)[0]) if wide else narrow
