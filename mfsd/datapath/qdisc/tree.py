# SPDX-License-Identifier: Apache-2.0
"""A qdisc tree as wanted: its messages, the tc commands that mean the same, and what differs from a device's tree.

A backend (htb.py, prio.py) describes the tree once; installing, dry runs, verification and adoption all read this one
description. Nothing here talks to the kernel.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from mfsd.datapath import tc
from mfsd.datapath.formats import settings
from mfsd.datapath.handles import LEAF_MAJORS
from mfsd.ground.bands import HINTED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from mfsd.ground.bands import BandSpec

PURGEABLE: Final = HINTED
"""Control and default carry UDP, unhinted and pure ACK packets: never purged."""


@dataclass(frozen=True, slots=True)
class Node:
    """One qdisc or class of a wanted tree.

    ``live``: other options can be written into it while traffic flows. ``made``: a class that its qdisc makes itself.
    """

    kind: str
    handle: int
    parent: int
    options: bytes | None
    type: str = "qdisc"
    live: bool = False
    made: bool = False

    def message(self, ifindex: int, *, change: bool = False) -> bytes:
        """The request that makes it, or changes it in place."""
        change = change or self.made
        return tc.put(self.type, self.kind, ifindex, self.handle, self.parent, self.options, change=change)

    def removal(self, ifindex: int) -> bytes:
        """The request that deletes a queue; its class gets a new one."""
        return tc.message(tc.RTM_DELQDISC, 0, ifindex, self.handle, self.parent)

    @property
    def name(self) -> str:
        """For messages: "class 6d66:1"."""
        return f"{self.type} {self.kind} {tc.classid(self.handle)}"


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
    guarantee: Callable[[Mapping[int, float]], list[Node]] | None = None
    """What is guaranteed by band index (share of the link, 0..1) -> the nodes that give it, and to all others their
    floors; to be changed in place. None: bands have no floors either."""

    def queues(self, band: int, lane: int) -> BandQueues:
        """A band, by index. Raises ValueError where there is none, or it has not that lane."""
        if not 0 <= band < len(self.bands):
            raise ValueError(f"band {band}: the device has bands 0 to {len(self.bands) - 1}")
        found = self.bands[band]
        if not 0 <= lane < found.lanes:
            raise ValueError(f"lane {lane}: band {band} has lanes 0 to {found.lanes - 1}")
        return found

    def with_nodes(self, nodes: Iterable[Node]) -> Tree:
        """The same tree with some nodes as given."""
        new = {(n.type, n.handle): n for n in nodes}
        groups = tuple(
            replace(g, nodes=tuple(new.get((n.type, n.handle), n) for n in g.nodes))
            if any((n.type, n.handle) in new for n in g.nodes)
            else g
            for g in self.groups
        )
        return replace(self, groups=groups)

    @property
    def floors(self) -> bool:
        """Bands get their floors: prio can't give any."""
        return self.guarantee is not None

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
    REMOVE = "remove"
    REBUILD = "rebuild"


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is not as wanted. ``node`` is the wanted one, ``found`` what has to go."""

    text: str
    how: How
    node: Node | None = None
    found: Node | None = None
    filters: int = 0
    """Qdisc whose filters have to go."""

    @property
    def command(self) -> str:
        """What one would type to remove it; DEV stands for the device."""
        if self.found is None:
            return f"tc filter del dev DEV parent {tc.classid(self.filters)}" if self.filters else ""
        return f"tc qdisc del dev DEV parent {tc.classid(self.found.parent)} handle {tc.classid(self.found.handle)}"


def differences(tree: Tree, qdiscs: Sequence[tc.TcObject], classes: Sequence[tc.TcObject]) -> list[Difference]:
    """Compare a device's tree with the wanted one. Leaf queues made by rescues belong to it; statistics don't."""
    wanted = tree.nodes
    inner = {n.parent for n in wanted if n.type == "class"}
    have = {("qdisc", q.handle): q for q in qdiscs} | {("class", c.handle): c for c in classes}
    out: list[Difference] = []
    for node in wanted:
        found = have.pop((node.type, node.handle), None)
        if found is None:
            how = How.REBUILD if node is tree.root else How.ADD
            out.append(Difference(f"{node.name} is missing", how, node))
            continue
        out += _compare(node, found, inner=node.handle in inner)
    return _foreign(tree, have) + out


def _foreign(tree: Tree, have: dict[tuple[str, int], tc.TcObject]) -> list[Difference]:
    """What is on the device beyond the wanted nodes. A queue of somebody else on a class of ours can go by itself."""
    # The classes that a classful qdisc makes by itself (tbf's one, prio's bands) are nobody's wish.
    made = {"tbf", "prio", "ets", "mq"}
    purgeable = {b.classid + i for b in tree.bands if b.spec.role in PURGEABLE for i in range(b.lanes)}
    majors = {n.handle >> 16 for n in tree.nodes if n.type == "qdisc"}
    foreign = {handle >> 16 for kind, handle in have if kind == "qdisc" and handle >> 16 not in majors}
    out: list[Difference] = []
    for (kind, handle), found in have.items():
        leaf = kind == "qdisc" and handle >> 16 in LEAF_MAJORS and found.parent in purgeable and found.kind == "pfifo"
        if leaf or handle == 0 or (kind == "class" and found.kind in made):
            continue
        node = Node(found.kind, handle, found.parent, None, kind)
        if (handle if kind == "class" else found.parent) >> 16 in foreign:
            continue  # it goes with the queue that it hangs below
        own = kind == "qdisc" and found.parent >> 16 in majors
        how, what = (How.REMOVE, node) if own else (How.REBUILD, None)
        out.append(Difference(f"{node.name} is not ours", how, found=what))
    return out


def _compare(node: Node, found: tc.TcObject, *, inner: bool) -> list[Difference]:
    if found.kind != node.kind:
        return [Difference(f"{node.name} is a {found.kind}", How.REBUILD, node)]
    # A class directly under its qdisc is dumped with parent "root".
    parents = {node.parent, tc.TC_H_ROOT} if node.type == "class" and not node.parent & 0xFFFF else {node.parent}
    if found.parent not in parents:
        text = f"{node.name} hangs under {tc.classid(found.parent)} instead of {tc.classid(node.parent)}"
        return [Difference(text, How.REBUILD, node)]
    wanted, have = settings(node.kind, node.type, node.options), settings(found.kind, node.type, found.options)
    if inner:  # htb neither uses nor changes these of a class that has others below (net/sched/sch_htb.c)
        wanted = {key: value for key, value in wanted.items() if key not in ("prio", "quantum")}
    off = [f"{key} {have.get(key)!r} instead of {value!r}" for key, value in wanted.items() if have.get(key) != value]
    if not off:
        return []
    # HTB reads a new prio only once the leaf has run dry (net/sched/sch_htb.c, htb_activate).
    live = node.live and (inner or wanted.get("prio") == have.get("prio"))
    return [Difference(f"{node.name} has {', '.join(off)}", How.CHANGE if live else How.REBUILD, node)]
