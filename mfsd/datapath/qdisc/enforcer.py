# SPDX-License-Identifier: Apache-2.0
"""One device's enforcement: snapshot, plan, apply, verify, restore, and the calls of the running engine.

The order is what makes it safe. What is on the device is read and judged first; if it could not be put back exactly,
nothing is touched. Then a note of it goes to the state directory, then the root is grafted (once: a root graft drops
what is queued), then the rest of the tree grows under it. A daemon that is killed leaves a working tree without a
classifier, in which everything is default traffic; the next one finds the note and the tree and carries on without a
graft, or ``undo.restore.restore_all`` puts back what was there.

Everything acts in the network namespace that the calling thread was in when the object was made; plan, apply, verify
and restore must be called from a thread in it, the calls of the running engine may come from any.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np

from mfsd.datapath import tc
from mfsd.datapath.errors import DatapathError, EnforceError
from mfsd.datapath.facts import DeviceFacts, read_facts
from mfsd.datapath.handles import MAJOR, ROOT, is_ours
from mfsd.datapath.qdisc import plan as planning
from mfsd.datapath.qdisc import prio
from mfsd.datapath.qdisc.plan import DevicePlan, Step
from mfsd.datapath.qdisc.purge import LanePurger, Purged
from mfsd.datapath.qdisc.tree import How, Tree, differences
from mfsd.datapath.undo import notes
from mfsd.datapath.undo.notes import Owner, State
from mfsd.datapath.undo.restore import put_back, taken
from mfsd.datapath.undo.snapshot import Snapshot, capture, obstacles

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from mfsd.bands import Bands
    from mfsd.datapath.qdisc.tree import Difference, Filter
    from mfsd.units import Rate

BAND_DTYPE: Final = np.dtype(
    [("bytes", "u8"), ("packets", "u8"), ("drops", "u8"), ("backlog_bytes", "u8"), ("backlog_packets", "u8")]
)
"""Counters of one band. ``bytes`` and ``packets`` have left it; ``drops`` found it full (on prio, purged ones too)."""


class DeviceEnforcer:
    """The bands on one device.

    ``backend`` is "auto", "htb" or "prio"; ``rate`` None means the link's own. Raises EnforceError when the device
    does not exist. Close it when done; closing leaves the tree as it is.
    """

    def __init__(self, ifname: str, bands: Bands, backend: str, rate: Rate | None, state_dir: Path) -> None:
        self.ifname = ifname
        self.bands = bands
        self.backend = backend
        self.rate = rate
        self.state_dir = state_dir
        self.adopted = False
        """The last apply found its tree in place and grafted no root."""
        self._namespace = notes.namespace()
        self._ifindex = read_facts(ifname).ifindex
        self._sock = tc.TcSocket()
        self._lock = threading.RLock()
        """Two threads come here: the one that cares for devices, and the one that does what the engine orders."""
        self._tree: Tree | None = None
        self._purger: LanePurger | None = None
        self._reader = tc.StatsReader()
        self._root_query = tc.query(tc.RTM_GETQDISC, self._ifindex, 0, tc.TC_H_ROOT)

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # --- life cycle ---------------------------------------------------------------------------------------------------

    def plan(self) -> DevicePlan:
        """What apply would do now, and how restore would undo it. Changes nothing (a qdisc's module may be loaded)."""
        with self._lock:
            return self._plan()[0]

    def apply(self) -> DevicePlan:
        """Put the bands in force. Idempotent.

        Raises EnforceError with everything as it was, or saying what is not; OSError when the kernel can't be asked.
        """
        with self._lock:
            return self._apply()

    def _apply(self) -> DevicePlan:
        plan, tree, state = self._plan()
        if plan.refusals or tree is None:
            raise EnforceError(f"device {self.ifname}", "; ".join(plan.refusals))
        qdiscs, classes = self._read()
        root = tc.root_of(qdiscs)
        if root is None:
            raise EnforceError(f"device {self.ifname}", "it has no root qdisc any more")
        before = state.before if state else capture(qdiscs, classes, read_facts(self.ifname).txqlen)
        off = differences(tree, qdiscs, classes) if is_ours(root) else None
        note = State(self.ifname, self._ifindex, self._namespace, Owner.me(), plan.backend, before)
        notes.save(self.state_dir, note)
        self.adopted = off is not None and all(d.how is not How.REBUILD for d in off)
        try:
            self._install(tree, off if self.adopted else None, replaces=off is not None)
        except (DatapathError, OSError) as e:
            self._tree = self._purger = None
            problems = put_back(self._sock, note, self.state_dir)
            done = "rolled back" if not problems else f"rolling back failed, too: {'; '.join(problems)}"
            raise EnforceError(f"apply {plan.backend} to {self.ifname}", f"{e}; {done}") from e
        self._tree = tree
        self._purger = LanePurger(self._sock, self._ifindex, tree)
        self._purger.sync(self._read()[1])
        return plan

    def verify(self) -> list[str]:
        """Differences between the device's tree and the wanted one; empty when all is well."""
        with self._lock:
            if self._tree is None:
                return [f"{self.ifname}: nothing has been applied"]
            return self._differences(self._tree)

    def restore(self) -> list[str]:
        """Put the qdiscs back as they were found and forget the note. Returns what went wrong. Idempotent."""
        with self._lock:
            return self._restore()

    def _restore(self) -> list[str]:
        self._tree = self._purger = None
        try:
            state = notes.load(self.state_dir, self.ifname)
        except EnforceError as e:
            return [str(e)]
        if state is None:
            return []
        if state.taken:
            return [taken(state)]
        if (state.ifindex, state.namespace) != (self._ifindex, self._namespace):
            notes.forget(self.state_dir, self.ifname)
            return []
        return put_back(self._sock, state, self.state_dir)

    # --- for the classifier -------------------------------------------------------------------------------------------

    @property
    def major(self) -> int:
        """Handle of the qdisc that the bands' classids begin with, shifted (mfsd_dev.major)."""
        return ROOT

    @property
    def floors(self) -> bool:
        """Bands get their floors. Raises EnforceError before apply."""
        return self._applied()[0].floors

    def band_maps(self) -> list[tuple[int, int]]:
        """(classid of lane 0, lanes) per band index; lane i is classid + i. Raises EnforceError before apply."""
        return [(b.classid, b.lanes) for b in self._applied()[0].bands]

    # --- for the running engine ---------------------------------------------------------------------------------------

    def counters(self) -> np.ndarray[Any, np.dtype[Any]]:
        """Shape (bands,), dtype BAND_DTYPE: one dump of the classes, added up per band."""
        tree, purger = self._applied()
        out = np.zeros(len(tree.bands), dtype=BAND_DTYPE)
        rows = [[0] * 5 for _ in tree.bands]
        with self._lock:
            for m in self._sock.parts(tc.RTM_GETTCLASS, self._ifindex, ROOT):
                handle = tc.TCMSG.unpack_from(m.data, m.body)[4]
                band = tree.counter_classes.get(handle)
                if band is None:
                    continue
                s = self._reader.read(m)
                row = rows[band]
                row[0] += s.bytes
                row[1] += s.packets
                row[2] += s.drops
                row[3] += s.backlog_bytes
                row[4] += s.backlog_packets
            for band, gone in purger.gone.items():
                for i, value in enumerate(gone):
                    rows[band][i] += value
        out[:] = [tuple(row) for row in rows]
        return out

    def link_bytes(self) -> tuple[int, int]:
        """(bytes sent, bytes queued) of the root qdisc: one query."""
        with self._lock:
            stats = self._reader.read(self._sock.ask(self._root_query, f"look at the root of {self.ifname}"))
        return stats.bytes, stats.backlog_bytes

    def backlog(self, band: int, lane: int) -> tuple[int, int]:
        """(bytes, packets) queued in a lane now: one query. Raises ValueError for a lane that does not exist."""
        tree, purger = self._applied()
        if not 0 <= band < len(tree.bands):
            raise ValueError(f"band {band}: the device has bands 0 to {len(tree.bands) - 1}")
        queues = tree.bands[band]
        if not 0 <= lane < queues.lanes:
            raise ValueError(f"lane {lane}: band {band} has lanes 0 to {queues.lanes - 1}")
        with self._lock:
            return purger.backlog(queues.classid + lane, self._ifindex)

    def guarantee(self, shares: Mapping[int, float]) -> None:
        """Give bands (by index) so much of the link (0..1) even when bands above are busy, and all others their floors.

        Takes effect while they are backlogged. Nothing happens on a backend without floors, or where nothing changes.
        """
        with self._lock:
            tree, _ = self._applied()
            if tree.guarantee is None:
                return
            known = {(n.type, n.handle): n for n in tree.nodes}
            nodes = [n for n in tree.guarantee(shares) if known.get((n.type, n.handle)) != n]
            if nodes:
                self._sock.run([n.message(self._ifindex, change=True) for n in nodes], f"guarantees on {self.ifname}")
                self._tree = tree.with_nodes(nodes)

    def purge(self, lanes: Sequence[tuple[int, int]]) -> list[Purged]:
        """Free what is queued in these (band, lane) pairs, up to 128 per system call.

        Raises ValueError for a lane of the control or default band (or none at all) before anything is freed;
        NetlinkError when the kernel refuses one, which stops none of the others.
        """
        purger = self._applied()[1]
        with self._lock:
            return purger.purge(lanes)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _applied(self) -> tuple[Tree, LanePurger]:
        if self._tree is None or self._purger is None:
            raise EnforceError(f"device {self.ifname}", "nothing has been applied", "call apply first")
        return self._tree, self._purger

    def _read(self) -> tuple[list[tc.TcObject], list[tc.TcObject]]:
        return self._sock.tree(self._ifindex)

    def _differences(self, tree: Tree) -> list[str]:
        qdiscs, classes = self._read()
        out = [d.text for d in differences(tree, qdiscs, classes)]
        out += [f"filter of {tc.classid(want.parent)} is missing" for want in tree.filters if not self._has(want)]
        return out

    def _has(self, want: Filter) -> bool:
        return bool(self._sock.objects(tc.RTM_GETTFILTER, self._ifindex, want.parent))

    def _plan(self) -> tuple[DevicePlan, Tree | None, State | None]:
        if notes.namespace() != self._namespace:
            raise EnforceError(f"device {self.ifname}", "called from another network namespace than at first")
        device = read_facts(self.ifname)
        if device.ifindex != self._ifindex:
            raise EnforceError(f"device {self.ifname}", "it was replaced by another one of this name")
        qdiscs, classes = self._read()
        root = tc.root_of(qdiscs)
        refusals: list[str] = []
        state = notes.load(self.state_dir, self.ifname)
        if state is not None and state.taken:
            refusals.append(taken(state))
        if not device.up:
            refusals.append(f"{self.ifname} is down, so it has no qdisc yet: bring it up first (ip link set up)")
        ours = root is not None and is_ours(root)
        if state is not None and not (ours and state.same_device(self._ifindex)):
            state = None  # of a device that is gone, or of a tree that somebody replaced
        if ours and state is None:
            refusals.append(
                f"{self.ifname} carries a tree of mfsd but the note of what was there before is missing from "
                f"{self.state_dir}: remove the tree (tc qdisc del dev {self.ifname} root)"
            )
        elif state is None and device.up:
            refusals += obstacles(self._sock, self._ifindex, qdiscs, classes)
        choice = planning.choose(self._sock, device, self.bands, self.backend, self.rate)
        refusals += choice.refusals
        before = capture(qdiscs, classes, device.txqlen)
        steps: list[Step] = []
        if choice.tree is not None and not refusals:
            off = differences(choice.tree, qdiscs, classes) if ours else None
            steps = _steps(device, choice.tree, off)
        plan = DevicePlan(
            ifname=self.ifname,
            backend=choice.backend,
            major=MAJOR,
            rate=choice.rate,
            found=before.lines(),
            steps=tuple(steps),
            undo=tuple(_undo(device, state.before if state is not None else before)) if not refusals else (),
            reasons=tuple(choice.reasons),
            refusals=tuple(refusals),
        )
        return plan, choice.tree, state

    def _install(self, tree: Tree, off: list[Difference] | None, *, replaces: bool) -> None:
        """Make the tree, or (``off``) only what differs, and check it.

        ``replaces``: an older tree of ours has to go first, since a root can't be replaced by one of the same handle.
        """
        if off is None:
            messages = [tc.message(tc.RTM_DELQDISC, 0, self._ifindex, 0, tc.TC_H_ROOT)] if replaces else []
            messages += [node.message(self._ifindex) for node in tree.nodes]
        else:
            by_change = {d.node: d.how is How.CHANGE for d in off if d.node is not None}
            messages = [n.message(self._ifindex, change=by_change[n]) for n in tree.nodes if n in by_change]
        self._sock.run(messages, f"install {tree.backend} on {self.ifname}")
        for want in tree.filters:
            if off is not None and self._has(want):
                continue
            fd = prio.load_program(want)
            try:
                self._sock.run([prio.filter_message(want, self._ifindex, fd)], f"filter of {tc.classid(want.parent)}")
            finally:
                os.close(fd)
        wrong = self._differences(tree)
        if wrong:
            raise EnforceError(f"device {self.ifname}", f"the tree is not as wanted: {'; '.join(wrong)}")


def _steps(device: DeviceFacts, tree: Tree, off: list[Difference] | None) -> list[Step]:
    if off is None:
        return [Step(g.text, g.command.replace("DEV", device.ifname)) for g in tree.groups]
    if not off:
        return []
    if any(d.how is How.REBUILD for d in off):
        first = Step(f"Remove an older tree of mfsd ({off[0].text})", f"tc qdisc del dev {device.ifname} root")
        return [first, *(Step(g.text, g.command.replace("DEV", device.ifname)) for g in tree.groups)]
    changed = {d.node for d in off}
    return [
        Step(f"Repair: {g.text}", g.command.replace("DEV", device.ifname).replace(" add ", " replace "))
        for g in tree.groups
        if any(node in changed for node in g.nodes)
    ]


def _undo(device: DeviceFacts, before: Snapshot) -> list[Step]:
    if before.by_kernel:
        text = f"Delete the root; the kernel's default ({before.root.kind}) returns"
        return [Step(text, f"tc qdisc del dev {device.ifname} root")]
    return [Step(f"Put back {item.text}", "# replayed from the recorded netlink message") for item in before.ordered()]
