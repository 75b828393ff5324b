# SPDX-License-Identifier: Apache-2.0
"""What was on a device before mfsd, and how it is put back exactly.

A root with handle 0 is the kernel's own choice (pfifo_fast, fq_codel, noqueue, mq with such children): deleting ours
brings it back. A root that somebody made has a handle; it, its classes and its inner qdiscs are recorded as the kernel
dumps them and sent again. What can't come back exactly that way is refused before anything is touched.

ingress and clsact qdiscs hang beside the root and are never touched.
"""

from __future__ import annotations

import base64
import re
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self

from mfsd.datapath import tc
from mfsd.datapath.formats import HTB_GLOB, HTB_VERSION, TCA_HTB_INIT, TCA_HTB_OFFLOAD, U32_MAX, settings
from mfsd.ground.units import Rate
from mfsd.host import netlink as nl

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_FIFOS: Final = ("bfifo", "pfifo", "pfifo_fast", "pfifo_head_drop")
REPLAYABLE: Final = frozenset(
    {*_FIFOS, "codel", "drr", "ets", "fq", "fq_codel", "htb", "mq", "multiq", "noqueue", "prio", "sfq", "tbf"}
)
"""Kinds whose TCA_OPTIONS are dumped in the form in which they are set (with the repairs of _as_request). Others dump
less than they need (red's and choke's table, netem's distribution) or talk to hardware (mqprio, taprio)."""
EXPLICIT_CLASSES: Final = frozenset({"htb", "drr"})
"""Kinds whose classes are made by messages; the others make theirs with the qdisc, or dump flows as classes."""
_MAJOR: Final = 0xFFFF0000
MQ: Final = "mq"
"""What the kernel puts at the root of a device of several queues, to have its default on each."""
_SFQ: Final = struct.Struct("=IiIII")
"""struct tc_sfq_qopt: quantum, perturb_period, limit, divisor, flows."""
_TYPES: Final = ("qdisc", "class")
_KIND: Final = re.compile(r"[!-~]{1,15}")
"""Kinds of qdiscs, IFNAMSIZ long at most (include/net/sch_generic.h)."""
_OPTIONS_MAX: Final = 60_000
"""Bytes: the length of an attribute has 16 bits."""
_CODEL_TIMES: Final = {"codel": {1, 3, 5}, "fq_codel": {1, 3, 7}}
"""Attributes that hold times: target, interval, CE threshold (include/uapi/linux/pkt_sched.h)."""


def whole(value: Any, most: int = U32_MAX, *, least: int = 0) -> int:
    """A number of a note. Raises ValueError for anything else."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{str(value)[:40]} is no whole number from {least} to {most}")
    return value


@dataclass(frozen=True, slots=True)
class Saved:
    """One qdisc or class, as it was dumped."""

    type: str
    kind: str
    handle: int
    parent: int
    options: bytes | None

    @classmethod
    def of(cls, kind: str, thing: tc.TcObject) -> Self:
        """From a dump."""
        return cls(kind, thing.kind, thing.handle, thing.parent, thing.options)

    def to_json(self) -> dict[str, Any]:
        """Options in base64."""
        options = None if self.options is None else base64.b64encode(self.options).decode()
        return {
            "type": self.type,
            "kind": self.kind,
            "handle": self.handle,
            "parent": self.parent,
            "options": options,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Undo to_json. Raises KeyError, TypeError or ValueError on anything else."""
        options = None if data["options"] is None else base64.b64decode(data["options"], validate=True)
        if data["type"] not in _TYPES or not _KIND.fullmatch(data["kind"]) or len(options or b"") > _OPTIONS_MAX:
            raise ValueError(f"neither a qdisc nor a class: {str(data)[:100]}")
        return cls(data["type"], data["kind"], whole(data["handle"]), whole(data["parent"]), options)

    @property
    def text(self) -> str:
        """One line as tc shows it; of the options those that tell one tree from another."""
        place = "root" if self.parent == tc.TC_H_ROOT else f"parent {tc.classid(self.parent)}"
        try:
            values = settings(self.kind, self.type, self.options)
        except (struct.error, KeyError):  # of a damaged note
            values = {}
        raw = self.options or b""
        words = []
        if self.kind in ("pfifo", "bfifo", "pfifo_head_drop") and len(raw) == 4:
            words.append(f"limit {struct.unpack('=I', raw)[0]}{'b' if self.kind == 'bfifo' else 'p'}")
        words += [f"{key} {Rate(float(int(values[key])))}" for key in ("rate", "ceil") if key in values]
        if "default" in values:
            words.append(f"default {int(values['default']):#x}")
        if "prio" in values:
            words.append(f"prio {values['prio']!r}")
        return " ".join([self.type, self.kind, tc.classid(self.handle) if self.handle else "0:", place, *words])


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All of a device's egress tree: qdiscs (root first) and the classes that messages made."""

    qdiscs: tuple[Saved, ...]
    classes: tuple[Saved, ...]
    txqlen: int

    @property
    def root(self) -> Saved:
        """The root qdisc."""
        return self.qdiscs[0]

    @property
    def by_kernel(self) -> bool:
        """Nobody chose this root; it comes back when ours is deleted."""
        return self.root.handle == 0

    def to_json(self) -> dict[str, Any]:
        """For the state file."""
        return {
            "txqlen": self.txqlen,
            "qdiscs": [q.to_json() for q in self.qdiscs],
            "classes": [c.to_json() for c in self.classes],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Undo to_json. Raises KeyError, TypeError or ValueError on anything else."""
        qdiscs = tuple(Saved.from_json(q) for q in data["qdiscs"])
        if not qdiscs or qdiscs[0].parent != tc.TC_H_ROOT:
            raise ValueError("no root qdisc recorded")
        snapshot = cls(qdiscs, tuple(Saved.from_json(c) for c in data["classes"]), whole(data["txqlen"]))
        snapshot.ordered()
        return snapshot

    def replay(self, ifindex: int) -> list[bytes]:
        """Messages that bring the tree back in place of ours. The first is the one root graft.

        Raises ValueError for options that the kernel has never dumped.
        """
        if self.by_kernel:
            return [tc.delete_root(ifindex)]
        try:
            return [tc.put(i.type, i.kind, ifindex, i.handle, i.parent, _as_request(i)) for i in self.ordered()]
        except (struct.error, KeyError) as e:
            raise ValueError(f"options that can't be: {e}") from e

    def ordered(self) -> list[Saved]:
        """What replay has to make, parents first, and the queue of a class right behind the class.

        Raises ValueError when something has no parent here, or a handle twice.
        """
        explicit = {c.handle for c in self.classes}
        below: dict[int, list[Saved]] = {}
        everything = [*(q for q in self.qdiscs if q.handle), *self.classes]
        if len({(i.type, i.handle) for i in everything}) < len(everything):
            raise ValueError("a handle comes twice")
        for item in everything[1:] if self.root.handle else everything:
            # A class directly under its qdisc is dumped with parent "root". Classes that come with their qdisc (mq,
            # prio, tbf) are not in the list; what hangs on one stands below the qdisc.
            qdisc = item.handle & _MAJOR if item.parent == tc.TC_H_ROOT else item.parent & _MAJOR
            parent = item.parent if item.parent in explicit else qdisc
            if item.type == "class" and item.handle & _MAJOR != qdisc:
                raise ValueError(f"{item.text} is in another qdisc than its parent")
            below.setdefault(parent, []).append(item)
        done: list[Saved] = []
        waiting = [self.root] if self.root.handle else []
        while waiting:
            item = waiting.pop()
            done.append(item)
            waiting += reversed(below.pop(item.handle, []))
        for orphans in below.values():
            raise ValueError(f"{orphans[0].text} has no parent in the dump")
        return done

    @property
    def defaults(self) -> set[str]:
        """Kinds that the kernel chose: of the root, or of the queues below a root that it chose (mq)."""
        return {q.kind for q in self.qdiscs if q.kind != MQ} if self.by_kernel else set()

    @property
    def items(self) -> tuple[Saved, ...]:
        """Qdiscs, then classes."""
        return self.qdiscs + self.classes

    def like(self, now: Snapshot) -> bool:
        """``now`` is as this was: what had a handle exactly, statistics aside; what the kernel chose, in kind.

        The kernel's choice can have other settings when the device's MTU has changed, and another number of queues
        (ethtool -L), also below an mq that somebody made; and what it would not choose any more
        (net.core.default_qdisc) can only be put back with a handle.
        """
        if self.by_kernel:
            return {q.kind for q in now.qdiscs if q.kind != MQ} == self.defaults and not now.classes
        chosen = {q.parent for q in self.qdiscs if not q.handle}
        only: set[int] = set()
        if self.root.kind == MQ:
            only = chosen - {q.parent for q in now.qdiscs}
            only |= {q.parent for q in now.qdiscs if not q.handle} - {q.parent for q in self.qdiscs}
        return self._normal(chosen - only, only) == now._normal(chosen - only, only)

    def _normal(self, chosen: set[int], only: set[int]) -> set[tuple[Any, ...]]:
        """``chosen``: parents of qdiscs that the kernel chose; ``only``: queues that the device has not always had."""
        kinds = {(q.kind, q.parent) for q in self.qdiscs if q.parent in chosen}
        exact = (i for i in self.items if i.type == "class" or i.parent not in chosen | only)
        return kinds | {(i.type, i.kind, i.handle, i.parent, _steady(i)) for i in exact}

    def lines(self) -> tuple[str, ...]:
        """As tc shows it, one line each."""
        return tuple(item.text for item in self.items)


def capture(qdiscs: Iterable[tc.TcObject], classes: Iterable[tc.TcObject], txqlen: int) -> Snapshot:
    """From a device's egress tree; without a root where there is none (the device is down, or gone)."""
    saved = [Saved.of("qdisc", q) for q in qdiscs]
    saved.sort(key=lambda q: (q.parent != tc.TC_H_ROOT, q.handle, q.parent))
    return Snapshot(tuple(saved), tuple(Saved.of("class", c) for c in classes if c.kind in EXPLICIT_CLASSES), txqlen)


def obstacles(
    sock: tc.TcSocket, ifindex: int, qdiscs: Sequence[tc.TcObject], classes: Sequence[tc.TcObject]
) -> list[str]:
    """Why a device's egress tree could not be put back exactly; empty when it can. Asks for filters."""
    root = tc.root_of(qdiscs)
    if root is None:
        return ["the device has no root qdisc"]
    if root.handle == 0:
        return []
    out = [reason for q in qdiscs if q.handle for reason in _obstacles("qdisc", q)]
    out += [reason for c in classes if c.kind in EXPLICIT_CLASSES for reason in _obstacles("class", c)]
    holders = [q.handle for q in qdiscs if q.handle] + [c.handle for c in classes if c.kind in EXPLICIT_CLASSES]
    for holder in holders:
        count = len(sock.objects(tc.RTM_GETTFILTER, ifindex, holder))
        if count:
            out.append(
                f"{tc.classid(holder)} has filters ({count} entries), which can't be put back exactly; "
                f"remove them first (tc filter del dev DEV parent {tc.classid(holder)})"
            )
    return out


def _obstacles(kind: str, thing: tc.TcObject) -> list[str]:
    name = f"{kind} {thing.kind} {tc.classid(thing.handle)}"
    out = []
    if thing.kind not in REPLAYABLE:
        out.append(f"{name}: qdiscs of kind {thing.kind} can't be put back exactly")
    if tc.TCA_STAB in thing.attributes:
        out.append(f"{name} has a size table (stab), whose contents the kernel does not give out")
    if thing.estimator:
        out.append(f"{name} has a rate estimator, whose parameters the kernel does not give out")
    if thing.kind == "htb" and TCA_HTB_OFFLOAD in nl.attrs(thing.options or b""):
        out.append(f"{name} is offloaded to the device")
    return out


def _as_request(item: Saved) -> bytes | None:
    """TCA_OPTIONS as they are set, from TCA_OPTIONS as they are dumped."""
    if item.options is not None and item.kind in _CODEL_TIMES and item.type == "qdisc":
        found = nl.attrs(item.options)
        for number in _CODEL_TIMES[item.kind] & found.keys():
            found[number] = struct.pack("=I", codel_request(*struct.unpack("=I", found[number])))
        return b"".join(nl.attr(number, payload) for number, payload in found.items())
    if item.options is not None and item.kind == "sfq" and item.type == "qdisc" and len(item.options) >= _SFQ.size:
        quantum, perturb, limit, divisor, flows = _SFQ.unpack_from(item.options)
        # Asking for a limit also cuts the flows down to it (sfq_change), so nobody has asked for this one.
        limit = 0 if flows > limit else limit
        return _SFQ.pack(quantum, perturb, limit, divisor, flows) + item.options[_SFQ.size :]
    if item.options is None or item.kind != "htb" or item.type != "qdisc":
        return item.options
    # The dump says version 0x30011, a request must say 3 (net/sched/sch_htb.c, htb_init and htb_dump).
    found = nl.attrs(item.options)
    _, r2q, default, _, _ = HTB_GLOB.unpack_from(found[TCA_HTB_INIT])
    found[TCA_HTB_INIT] = HTB_GLOB.pack(HTB_VERSION, r2q, default, 0, 0)
    return b"".join(nl.attr(number, payload) for number, payload in found.items())


def codel_request(dumped: int) -> int:
    """Microseconds to ask for so that the kernel stores what it dumped as ``dumped``.

    It keeps times in units of 1024 ns and rounds down both ways (include/net/codel.h, codel_time_to_us), so 5 ms are
    dumped as 4999 us, and asking for 4999 us would store one unit less.
    """
    units = -(-dumped * 1000 // 1024)
    return min(-(-units * 1024 // 1000), U32_MAX)


def _steady(item: Saved) -> bytes | None:
    """Options without the counter that htb keeps among them (direct_pkts)."""
    if item.kind == "htb" and item.type == "qdisc" and item.options:
        return _as_request(item)
    return item.options
