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
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, Self

from mfsd.datapath import links, tc
from mfsd.datapath.errors import DatapathError, EnforceError
from mfsd.datapath.facts import QUEUE_LENGTH, DeviceFacts, facts_of
from mfsd.datapath.handles import MAJOR, ROOT, is_ours
from mfsd.datapath.qdisc import care, counters, prio
from mfsd.datapath.qdisc import plan as planning
from mfsd.datapath.qdisc.plan import DevicePlan, Step, steps_of, undo_of
from mfsd.datapath.qdisc.purge import LanePurger, Purged
from mfsd.datapath.qdisc.tree import How, Tree
from mfsd.datapath.undo import notes
from mfsd.datapath.undo.notes import Namespace, Owner, State
from mfsd.datapath.undo.restore import put_back, taken, unnoted
from mfsd.datapath.undo.snapshot import capture, obstacles

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy as np

    from mfsd.datapath.qdisc.tree import Difference, Filter
    from mfsd.ground.bands import Bands, Role
    from mfsd.ground.units import Rate


NAMED: Final = 8
"""Of the differences between a tree as made and as wanted so many are named."""


class DeviceEnforcer:
    """The bands on one device: that of this name as it is made, whatever it is called later.

    ``backend`` is "auto", "htb" or "prio"; ``rate`` None means the link's own. Raises NoDeviceError when the device
    does not exist, and OSError when the kernel can't be asked. Close it when done; closing leaves the tree as it is.
    """

    def __init__(self, ifname: str, bands: Bands, backend: str, rate: Rate | None, state_dir: Path) -> None:
        self.ifname = ifname
        self.bands = bands
        self.backend = backend
        self.rate = rate
        self.state_dir = state_dir
        self.adopted = False
        """The last apply found its tree in place and grafted no root."""
        self._sock = tc.TcSocket()
        try:
            self._namespace = Namespace.of(self._sock)
            self._ifindex = links.by_name(self._sock, ifname).ifindex
        except BaseException:
            self._sock.close()
            raise
        self._lock = threading.RLock()
        """Two threads come here: the one that cares for devices, and the one that does what the engine orders."""
        self._tree: Tree | None = None
        self._facts: DeviceFacts | None = None
        """What the tree was made for."""
        self._seen: DeviceFacts | None = None
        """What it was when it was last verified."""
        self._shares: dict[int, float] = {}
        """Guarantees by band."""
        self._state: State | None = None
        """The note of the tree, so that it can be undone without a descriptor to read the file."""
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

    @property
    def ifindex(self) -> int:
        """Of the device."""
        return self._ifindex

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
        self._finish_restore()
        plan, tree, state, device = self._plan()
        if plan.refusals or tree is None:
            raise EnforceError(f"device {self.ifname}", "; ".join(plan.refusals))
        qdiscs, classes = self._read()
        root = tc.root_of(qdiscs)
        if root is None:
            raise EnforceError(f"device {self.ifname}", "it has no root qdisc any more")
        before = state.before if state else capture(qdiscs, classes, device.txqlen)
        off = self._off(tree) if is_ours(root) else None
        note = State(self.ifname, self._ifindex, self._namespace, Owner.me(), plan.backend, before)
        note = replace(note, address=device.address, kind=device.kind, path=state.path if state else None)
        note = notes.save(self.state_dir, note)
        notes.forget_others(self.state_dir, note)
        gone = self._purger.gone if self._purger is not None else {}
        self.adopted = off is not None and all(d.how is not How.REBUILD for d in off)
        try:
            self._put(tree, off, device)
        except (DatapathError, OSError) as e:
            self._tree = self._purger = self._state = None
            problems = put_back(self._sock, note)
            done = "rolled back" if not problems else f"rolling back failed, too: {'; '.join(problems)}"
            raise EnforceError(f"apply {plan.backend} to {self.ifname}", f"{e}; {done}") from e
        self._tree, self._facts, self._seen, self._state = tree, device, device, note
        self._purger = LanePurger(self._sock, self._ifindex, tree, device.txqlen or QUEUE_LENGTH)
        self._purger.sync(self._read()[1])
        if self.adopted:
            self._purger.gone = gone
        return plan

    def verify(self) -> list[str]:
        """Differences between the device's tree and the wanted one; empty when all is well.

        Wanted is what the device's link gives now, so a new link speed is a difference.
        """
        with self._lock:
            if self._tree is None:
                return [f"{self.ifname}: nothing has been applied"]
            return [d.text for d in self._off(self._wanted())]

    def remarks(self) -> list[str]:
        """What is not as it should be of a device whose tree is in place, and can't be helped here. After verify."""
        with self._lock:
            if self._facts is None or self._seen is None:
                return []
            return care.remarks(self._facts, self._seen, self.rate) + self._keep_note()

    def _keep_note(self) -> list[str]:
        """Who has deleted or damaged the note has deleted what was on the device: it is written again."""
        if self._state is not None and not notes.kept(self._state):
            try:
                self._state = notes.save(self.state_dir, self._state)
            except EnforceError as e:
                return [f"its note was lost: {e}"]
        return []

    def in_place(self) -> bool:
        """The device has a root of mfsd, whatever is below it. Raises NetlinkError."""
        with self._lock:
            root = tc.root_of(self._read()[0])
        return root is not None and is_ours(root)

    def restore(self) -> list[str]:
        """Put the qdiscs back as they were found and forget the note. Returns what went wrong. Idempotent.

        Raises OSError when the kernel can't be asked, or the note not be removed. Of what this object has applied, no
        descriptor is needed to restore it.
        """
        with self._lock:
            return self._restore()

    def _restore(self) -> list[str]:
        state, self._state = self._state, None
        self._tree = self._purger = None
        self._shares = {}
        if state is None:
            try:
                state = notes.find(self.state_dir, self._ifindex, self.ifname, self._namespace)
            except EnforceError as e:
                return [str(e)]
            if state is None:
                return [unnoted(self.ifname, self.state_dir)] if self.in_place() else []
            if state.taken:
                return [taken(state)]
        return put_back(self._sock, state)

    def _finish_restore(self) -> None:
        """What a daemon was killed at: half of what was there is nothing to remember."""
        state = notes.find(self.state_dir, self._ifindex, self.ifname, self._namespace)
        if state is not None and state.restoring and not state.taken and not self.in_place():
            problems = put_back(self._sock, state)
            if problems:
                raise EnforceError(f"device {self.ifname}", "; ".join(problems))

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
        """Shape (bands,), dtype counters.BAND_DTYPE: one dump of the classes, added up per band."""
        tree, purger = self._applied()
        with self._lock:
            return counters.by_band(self._sock, self._reader, self._ifindex, tree, purger.gone)

    def queued(self, roles: frozenset[Role]) -> int:
        """Bytes queued in all bands of these roles now: one dump of the classes."""
        counted = self.counters()
        return sum(int(counted["backlog_bytes"][b.index]) for b in self.bands.bands if b.role in roles)

    def link_bytes(self) -> tuple[int, int]:
        """(bytes sent, bytes queued) of the root qdisc: one query."""
        with self._lock:
            stats = self._reader.read(self._sock.ask(self._root_query, f"look at the root of {self.ifname}"))
        return stats.bytes, stats.backlog_bytes

    def backlog(self, band: int, lane: int) -> tuple[int, int]:
        """(bytes, packets) queued in a lane now: one query. Raises ValueError for a lane that does not exist."""
        classid = self._applied()[0].queues(band, lane).classid + lane
        query = tc.query(tc.RTM_GETTCLASS, self._ifindex, classid)
        with self._lock:
            stats = self._reader.read(self._sock.ask(query, f"look at lane {tc.classid(classid)}"))
        return stats.backlog_bytes, stats.backlog_packets

    def guarantee(self, shares: Mapping[int, float]) -> None:
        """Give bands (by index) so much of the link (0..1) even when bands above are busy, and all others their floors.

        Takes effect while they are backlogged. Nothing happens on a backend without floors, or where nothing changes.
        """
        with self._lock:
            tree, _ = self._applied()
            if tree.guarantee is None:
                return
            self._shares = dict(shares)
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

    def _wanted(self) -> Tree:
        """The tree for the device as it is now: link speed and largest packet may have changed."""
        tree, device = self._applied()[0], facts_of(self._sock, self._ifindex)
        self._seen = device
        if device == self._facts:
            return tree
        choice = planning.choose(self._sock, device, self.bands, self.backend, self.rate)
        if choice.tree is None or choice.backend != tree.backend:
            return tree
        return care.guaranteed(choice.tree, self._shares)

    def _plan(self) -> tuple[DevicePlan, Tree | None, State | None, DeviceFacts]:
        if not Namespace.of(self._sock).same(self._namespace):
            raise EnforceError(f"device {self.ifname}", "called from another network namespace than at first")
        device = facts_of(self._sock, self._ifindex)
        if device.ifname != self.ifname:
            raise EnforceError(f"device {self.ifname}", f"it is called {device.ifname} now")
        qdiscs, classes = self._read()
        root = tc.root_of(qdiscs)
        refusals: list[str] = []
        state = notes.find(self.state_dir, self._ifindex, self.ifname, self._namespace)
        if state is not None and state.taken:
            refusals.append(taken(state))
        if not device.up:
            refusals.append(f"{self.ifname} is down, so it has no qdisc yet: bring it up first (ip link set up)")
        ours = root is not None and is_ours(root)
        if not ours:
            if state is not None and state.gave(device.address) and device.txqlen == QUEUE_LENGTH:
                device = replace(device, txqlen=0)  # it has been away since, or somebody has replaced the tree
            state = None
        if ours and state is None:
            refusals.append(unnoted(self.ifname, self.state_dir))
        elif state is None and device.up:
            refusals += obstacles(self._sock, self._ifindex, qdiscs, classes)
        choice = planning.choose(self._sock, device, self.bands, self.backend, self.rate)
        refusals += choice.refusals
        before = capture(qdiscs, classes, device.txqlen)
        steps: list[Step] = []
        tree = choice.tree
        if tree is not None and not refusals:
            tree = care.guaranteed(tree, self._shares)
            steps = steps_of(device, tree, self._off(tree) if ours else None)
        plan = DevicePlan(
            ifname=self.ifname,
            backend=choice.backend,
            major=MAJOR,
            rate=choice.rate,
            found=before.lines(),
            steps=tuple(steps),
            undo=tuple(undo_of(device, state.before if state is not None else before)) if not refusals else (),
            reasons=tuple(choice.reasons),
            refusals=tuple(refusals),
        )
        return plan, tree, state, device

    def _put(self, tree: Tree, off: list[Difference] | None, device: DeviceFacts) -> None:
        """Make the tree, or mend what is ``off``; where that is refused, make all of it anew."""
        # Queues take their length from the device's. One that had none keeps the new one until it is restored.
        if not device.txqlen:
            links.set_txqlen(self._sock, self._ifindex, QUEUE_LENGTH)
        try:
            if self.adopted and off is not None:
                try:
                    self._install(tree, off)
                except (DatapathError, OSError):
                    links.by_index(self._sock, self._ifindex)
                else:
                    return
            self.adopted = False
            self._install(tree, None, replaces=off is not None)
        finally:
            if not device.txqlen and off is not None:
                links.set_txqlen(self._sock, self._ifindex, 0)

    def _install(self, tree: Tree, off: list[Difference] | None, *, replaces: bool = False) -> None:
        """Make the tree, or (``off``) only what differs, and check it.

        ``replaces``: an older tree of ours has to go first, since a root can't be replaced by one of the same handle.
        """
        if off is None:
            messages = [tc.delete_root(self._ifindex)] if replaces else []
            messages += [node.message(self._ifindex) for node in tree.nodes]
        else:
            messages = [prio.flush_message(self._ifindex, d.filters) for d in off if d.filters]
            messages += [d.found.removal(self._ifindex) for d in off if d.found is not None]
            by_change = {d.node: d.how is How.CHANGE for d in off if d.node is not None}
            messages += [n.message(self._ifindex, change=by_change[n]) for n in tree.nodes if n in by_change]
        self._sock.run(messages, f"install {tree.backend} on {self.ifname}")
        for want in tree.filters:
            if off is not None and self._has(want):
                continue
            fd = prio.load_program(want)
            try:
                self._sock.run([prio.filter_message(want, self._ifindex, fd)], f"filter of {tc.classid(want.parent)}")
            finally:
                os.close(fd)
        wrong = [d.text for d in self._off(tree)]
        if wrong:
            more = f"; and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
            raise EnforceError(f"device {self.ifname}", f"the tree is not as wanted: {'; '.join(wrong[:NAMED])}{more}")

    def _off(self, tree: Tree) -> list[Difference]:
        return care.off(self._sock, self._ifindex, tree)

    def _has(self, want: Filter) -> bool:
        return bool(self._sock.objects(tc.RTM_GETTFILTER, self._ifindex, want.parent))
