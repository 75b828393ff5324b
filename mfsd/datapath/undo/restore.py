# SPDX-License-Identifier: Apache-2.0
"""Putting devices back as they were, by the daemon itself or after it was killed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mfsd.datapath import tc
from mfsd.datapath.errors import DatapathError, NoDeviceError
from mfsd.datapath.facts import read_facts, set_txqlen
from mfsd.datapath.handles import is_ours
from mfsd.datapath.undo import notes
from mfsd.datapath.undo.snapshot import Saved, Snapshot, capture
from mfsd.host import netlink as nl

if TYPE_CHECKING:
    from pathlib import Path

    from mfsd.datapath.undo.notes import State


def restore_all(state_dir: Path, ifname: str | None = None) -> dict[str, list[str]]:
    """Put devices back without a daemon: those with a note in ``state_dir``, or only ``ifname``.

    Returns problems per device, an empty list where all went well. A device whose owner lives is left alone, as is one
    of another network namespace than the calling thread's; both are reported. A device that is gone needs nothing.
    """
    out: dict[str, list[str]] = {}
    for name in notes.recorded(state_dir):
        if ifname is not None and name != ifname:
            continue
        try:
            out[name] = _restore_one(state_dir, name)
        except (DatapathError, OSError) as e:
            out[name] = [str(e)]
    if ifname is not None and ifname not in out:
        out[ifname] = [f"{ifname}: no note in {state_dir}, so nothing to put back"]
    return out


def _restore_one(state_dir: Path, ifname: str) -> list[str]:
    state = notes.load(state_dir, ifname)
    if state is None:
        return []
    if state.taken:
        return [taken(state)]
    if state.namespace != notes.namespace():
        file = notes.path_of(state_dir, ifname)
        text = f"{ifname}: the note is of another network namespace (inode {state.namespace}); run this inside it, "
        return [f"{text}or remove {file} if that namespace is gone"]
    try:
        device = read_facts(ifname)
    except NoDeviceError:
        device = None
    if device is None or device.ifindex != state.ifindex:
        notes.forget(state_dir, ifname)
        return []
    with tc.TcSocket() as sock:
        return put_back(sock, state, state_dir)


def put_back(sock: tc.TcSocket, state: State, state_dir: Path) -> list[str]:
    """Replay what was there, compare, forget the note; returns problems.

    Never leaves a half-made tree: the kernel's default is better than half of somebody's, so that is what stays when
    the replay is refused, and the problems say so. A device that is gone, or goes meanwhile, needs nothing. Raises
    NetlinkError, EnforceError.
    """
    try:
        problems = _put_back(sock, state)
    except NoDeviceError:
        problems = []
    notes.forget(state_dir, state.ifname)
    return problems


def _put_back(sock: tc.TcSocket, state: State) -> list[str]:
    qdiscs, _ = sock.tree(state.ifindex)
    root = tc.root_of(qdiscs)
    problems: list[str] = []
    if root is not None and is_ours(root):
        try:
            sock.run(state.before.replay(state.ifindex), f"put back the qdiscs of {state.ifname}")
        except nl.NetlinkError as e:
            sock.batch([tc.message(tc.RTM_DELQDISC, 0, state.ifindex, 0, tc.TC_H_ROOT)])
            problems.append(f"{e}; the kernel's default is in place instead of {'; '.join(state.before.lines())}")
    elif root is not None and root.handle != state.before.root.handle:
        text = f"{root.kind} {tc.classid(root.handle)}"
        problems.append(f"{state.ifname}: somebody replaced mfsd's root by {text}; it was left alone")
    device = read_facts(state.ifname)
    if device.txqlen != state.before.txqlen:
        # Grafting a qdisc onto a device without a queue gives it one (sch_api.c, qdisc_create).
        set_txqlen(state.ifindex, state.before.txqlen)
    if not problems:
        qdiscs, classes = sock.tree(state.ifindex)
        if tc.root_of(qdiscs) is None:
            read_facts(state.ifname)  # is it still there?
        problems += _compare(state, capture(qdiscs, classes, state.before.txqlen))
    return problems


def _compare(state: State, now: Snapshot) -> list[str]:
    before, after = state.before.normal(), now.normal()
    if before == after:
        return []
    lost = [line.text for line in (*state.before.qdiscs, *state.before.classes) if not _in(line, now)]
    new = [line.text for line in (*now.qdiscs, *now.classes) if not _in(line, state.before)]
    return [f"{state.ifname}: not as before; missing: {lost or 'nothing'}; instead: {new or 'nothing'}"]


def _in(item: Saved, snapshot: Snapshot) -> bool:
    return item in snapshot.qdiscs or item in snapshot.classes


def taken(state: State) -> str:
    """Why a device with a live owner is left alone."""
    return (
        f"{state.ifname} belongs to a running mfsd (pid {state.owner.pid}): "
        "ask it (mfsctl restore) or stop it (systemctl stop mfsd)"
    )
