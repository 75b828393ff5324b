# SPDX-License-Identifier: Apache-2.0
"""Putting devices back as they were, by the daemon itself or after it was killed.

A device is found by its index, whatever it is called now. A note is kept until what it says has been put back, somebody
else has put another root there, or the kernel says that the device is gone.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from mfsd.datapath import links, tc
from mfsd.datapath.errors import DatapathError, EnforceError, NoDeviceError
from mfsd.datapath.facts import QUEUE_LENGTH
from mfsd.datapath.handles import is_ours
from mfsd.datapath.undo import elsewhere, notes
from mfsd.datapath.undo.notes import Namespace, State, Unreadable
from mfsd.datapath.undo.snapshot import MQ, Snapshot, capture
from mfsd.host import namespaces
from mfsd.host import netlink as nl

if TYPE_CHECKING:
    from pathlib import Path

    from mfsd.datapath.links import Link
    from mfsd.datapath.tc import TcSocket
    from mfsd.datapath.undo.elsewhere import Seen

NOTE_STAYS: Final = "nothing is left to put back, but the note can't be removed"
"""Of a problem that concerns the note only."""


def restore_all(
    state_dir: Path, ifname: str | None = None, *, delete: bool = False, lives: bool = False
) -> dict[str, list[str] | None]:
    """Put devices back without a daemon: those with a note in ``state_dir``, or only ``ifname``.

    Returns problems by what the devices are called now, an empty list where all went well, and None for one that is
    gone, which needs nothing. A device whose owner lives is left alone, as is one of another network namespace than
    the calling thread's; both are reported. One that has moved since is looked for. ``lives``: the owner does, whatever
    its pid means here. With ``delete`` a note that can't be read is removed, with what mfsd has put on the device.
    Raises OSError when the directory can't be read.
    """
    out: dict[str, list[str] | None] = {}
    with tc.TcSocket() as sock:
        here = Namespace.of(sock)
        called = [(_called(sock, note, here), note) for note in notes.every(state_dir)]
        exact = any(name == ifname for name, _ in called)
        for name, note in called:
            if ifname is not None and ifname != (name if exact else note.ifname):
                continue
            problems: list[str] | None
            try:
                now, problems = name, _restore_noted(sock, note, here, delete=delete, lives=lives)
                if problems is None:
                    now, problems = _elsewhere(note)
            except (DatapathError, OSError) as e:
                now, problems = name, [str(e)]
            before = out.get(now)
            out[now] = problems if before is None else before + (problems or [])
    if ifname is not None and not out:
        out[ifname] = [f"{ifname}: no note in {state_dir}, so nothing to put back"]
    return out


def without_note(state_dir: Path, ifname: str | None = None, *, delete: bool = False) -> dict[str, list[str]]:
    """Problems by device with a tree of mfsd of which no note in ``state_dir`` says what was there before.

    With ``delete`` the tree is deleted, and the kernel's default returns; the list is empty then. Raises OSError.
    """
    out: dict[str, list[str]] = {}
    with tc.TcSocket() as sock:
        here = Namespace.of(sock)
        noted = {note.ifindex for note in notes.every(state_dir) if _local(note, here)}
        objects = [tc.parse_object(m) for m in sock.parts(tc.RTM_GETQDISC, 0)]
        for ifindex in sorted({ifindex for ifindex, thing in objects if is_ours(thing)} - noted):
            try:
                name = links.by_index(sock, ifindex).name
                if ifname not in (None, name):
                    continue
                out[name] = [] if delete else [unnoted(name, state_dir)]
                if delete:
                    delete_tree(sock, ifindex)
            except NoDeviceError:
                continue
            except OSError as e:
                out[name] = [str(e)]
    return out


def _called(sock: TcSocket, note: State | Unreadable, here: Namespace) -> str:
    """What the note's device is called now; if it is not here, what it was called."""
    link = None
    if _local(note, here):
        with contextlib.suppress(NoDeviceError):
            link = device_of(sock, note) if isinstance(note, State) else links.by_index(sock, note.ifindex)
    return note.ifname if link is None else link.name


def device_of(sock: TcSocket, state: State) -> Link | None:
    """The note's device, if it is in the socket's namespace: another one may have its index now. Raises OSError."""
    try:
        link = links.by_index(sock, state.ifindex)
        root = None if state.fits(link.address) else tc.root_of(sock.tree(state.ifindex)[0])
    except NoDeviceError:
        return None
    # Somebody may have given the device another address. What carries our tree has not lost it by a move.
    return link if state.fits(link.address) or (root is not None and is_ours(root)) else None


def _local(note: State | Unreadable, here: Namespace) -> bool:
    return note.namespace.same(here) if isinstance(note, State) else note.inode == here.inode


def _restore_noted(
    sock: TcSocket, note: State | Unreadable, here: Namespace, *, delete: bool, lives: bool
) -> list[str] | None:
    """Problems; None when the device has left."""
    if isinstance(note, Unreadable):
        if not delete:
            return [str(note.error)]
        with contextlib.suppress(NoDeviceError):
            delete_tree(sock, links.by_name(sock, note.ifname).ifindex if not note.ifindex else note.ifindex)
        note.path.unlink(missing_ok=True)
        return []
    if note.namespace.past(here):
        notes.forget(note)
        return []
    left = note.namespace.same(here) and device_of(sock, note) is None
    if note.taken or (lives and not left):
        return [taken(note)]
    if not note.namespace.same(here):
        text = f"{note.ifname}: the note is of another network namespace (inode {note.namespace.inode}); run this "
        return [f"{text}inside it, or remove {note.path} if that namespace is gone"]
    return None if left else put_back(sock, note)


def _elsewhere(note: State | Unreadable) -> tuple[str, list[str] | None]:
    """Put back a device that has left its namespace: what it is called now, and as _restore_noted."""
    assert isinstance(note, State)  # noqa: S101 - for the type checker
    seen, whole = elsewhere.find(note)
    if len(seen) == 1:
        return seen[0].name, namespaces.inside(seen[0].place, lambda: _moved(seen[0]))
    if seen:
        which = ", ".join(s.name for s in seen)
        return note.ifname, [f"{elsewhere.left(note)}. It may be any of these: {which}"]
    if elsewhere.keeps(note) and not whole:
        return note.ifname, [f"{elsewhere.left(note)}. Not all network namespaces could be looked into"]
    notes.forget(note)
    return note.ifname, None


def _moved(seen: Seen) -> list[str]:
    with tc.TcSocket() as sock:
        root = tc.root_of(sock.tree(seen.state.ifindex)[0])
        if root is not None and is_ours(root):  # it had none when it came, so that is another daemon's
            return [f"{elsewhere.left(seen.state)}. {seen.name} may be it, and carries a tree of mfsd"]
        return [f"{seen.name}: {p}" for p in put_back(sock, seen.state)]


def unnoted(name: str, state_dir: Path) -> str:
    """What to do about a tree without a note."""
    return (
        f"{name} carries a tree of mfsd, but the note of what was there before is missing from {state_dir}: is that "
        f"the right state_dir? If so, mfsctl restore {name} --delete (or tc qdisc del dev {name} root) removes the "
        "tree, and the kernel's default returns"
    )


def delete_tree(sock: TcSocket, ifindex: int) -> None:
    """Delete mfsd's root from a device, if it has one. Raises NetlinkError."""
    root = tc.root_of(sock.tree(ifindex)[0])
    if root is not None and is_ours(root):
        sock.run([tc.delete_root(ifindex)], f"delete mfsd's qdiscs from device {ifindex}")


def put_back(sock: TcSocket, state: State) -> list[str]:
    """Replay what was there, compare, forget the note; returns problems. No descriptor is needed.

    Never leaves a half-made tree: the kernel's default is better than half of somebody's, so that is what stays when
    the replay is refused, and the problems say so; the note is kept then. A device that is gone, or goes meanwhile,
    needs nothing. A note that can't be removed is a problem of its own. Raises NetlinkError.
    """
    try:
        problems, done = _put_back(sock, state)
    except NoDeviceError:
        problems, done = [], True
    if done:
        try:
            notes.forget(state)
        except OSError as e:
            problems.append(f"{state.ifname}: {NOTE_STAYS}: {e.strerror}; remove {state.path}")
    return problems


def _put_back(sock: TcSocket, state: State) -> tuple[list[str], bool]:
    """(problems, the note has served its purpose)."""
    link = device_of(sock, state)
    if link is None:
        raise NoDeviceError(f"device of index {state.ifindex}", f"it is not {state.ifname} any more")
    qdiscs, classes = sock.tree(state.ifindex)
    root = tc.root_of(qdiscs)
    if root is None:
        links.by_index(sock, state.ifindex)  # is it still there?
        _queue_length(sock, state)
        return _without_root(state, link)
    ours = is_ours(root)
    if not ours and state.before.like(capture(qdiscs, classes, 0)):
        _queue_length(sock, state)
        return [], True
    if not ours and root.handle not in _left_by_us(state):
        text = f"{root.kind} {tc.classid(root.handle)}"
        was = "; ".join(state.before.lines())
        return [f"{link.name}: somebody replaced mfsd's root by {text}; it was left alone. Before mfsd: {was}"], True
    problems: list[str] = []
    if ours or state.restoring:
        # From the first message on it is not our tree any more. A full disk must not keep us from it.
        with contextlib.suppress(EnforceError):
            state = notes.save(_state_dir(state), replace(state, restoring=True))
        messages = state.before.replay(state.ifindex) if ours or not state.before.by_kernel else []
        if not ours and root.handle:
            messages.insert(0, tc.delete_root(state.ifindex))
        try:
            sock.run(messages, f"put back the qdiscs of {link.name}")
        except nl.NetlinkError as e:
            links.by_index(sock, state.ifindex)
            sock.batch([tc.delete_root(state.ifindex)])
            instead = f"the kernel's default is in place instead of {'; '.join(state.before.lines())}"
            return [f"{e}; {instead}; the note is kept, mfsctl restore tries again"], False
        problems = _settle(sock, state, link.name)
    _queue_length(sock, state)
    now = capture(*sock.tree(state.ifindex), 0)
    if not now.qdiscs:
        return _without_root(state, links.by_index(sock, state.ifindex))
    if not state.before.like(now):
        problems.append(_unlike(state, link.name, now))
    return problems, not problems


def _without_root(state: State, link: Link) -> tuple[list[str], bool]:
    """A device that is down has no root but one that somebody made; what the kernel chooses comes when it is up."""
    if state.before.by_kernel and not link.up:
        return [], True
    return [f"{link.name} has no root qdisc; {'; '.join(state.before.lines())} was there before"], False


def _queue_length(sock: TcSocket, state: State) -> None:
    """Take back the one that mfsd gave. What somebody else has set meanwhile is kept."""
    if state.before.txqlen == 0 and links.by_index(sock, state.ifindex).txqlen == QUEUE_LENGTH:
        links.set_txqlen(sock, state.ifindex, 0)


def _state_dir(state: State) -> Path:
    """Where its note is. Raises ValueError when it was never written."""
    if state.path is None:
        raise ValueError("no note")
    return state.path.parent


def _left_by_us(state: State) -> set[int]:
    """Handles that a root can have after a restore that was cut short."""
    return {state.before.root.handle, 0} if state.restoring else {state.before.root.handle}


# --- what the kernel chose --------------------------------------------------------------------------------------------


def _settle(sock: TcSocket, state: State, name: str) -> list[str]:
    """Make what the kernel chooses otherwise now (net.core.default_qdisc was changed) as it was, by name."""
    qdiscs, _ = sock.tree(state.ifindex)
    messages: list[bytes] = []
    what = f"put back the default qdiscs of {name}"
    try:
        if state.before.by_kernel:
            root = tc.root_of(qdiscs)
            now = {q.kind for q in qdiscs if q.kind != MQ}
            if root is None or now == state.before.defaults or len(state.before.defaults) != 1:
                return []
            (kind,) = state.before.defaults
            if root.kind != MQ:
                messages = [_make(state.ifindex, kind, tc.TC_H_ROOT)]
            else:
                sock.run([_make(state.ifindex, MQ, tc.TC_H_ROOT)], what)
                qdiscs, _ = sock.tree(state.ifindex)
                messages = [_make(state.ifindex, kind, q.parent) for q in qdiscs if q.parent != tc.TC_H_ROOT]
        else:
            kinds = {q.parent: q.kind for q in state.before.qdiscs if not q.handle}
            messages = [
                _make(state.ifindex, kinds[q.parent], q.parent)
                for q in qdiscs
                if kinds.get(q.parent, q.kind) != q.kind and not q.handle
            ]
        sock.run(messages, what)
    except nl.NetlinkError as e:
        links.by_index(sock, state.ifindex)
        return [str(e)]
    return []


def _make(ifindex: int, kind: str, parent: int) -> bytes:
    """Of a kind, with the kernel's settings and a handle of its choice."""
    return tc.put("qdisc", kind, ifindex, 0, parent)


# --- is it as it was? -------------------------------------------------------------------------------------------------


def _unlike(state: State, name: str, now: Snapshot) -> str:
    lost = [item.text for item in state.before.items if item not in now.items]
    new = [item.text for item in now.items if item not in state.before.items]
    return (
        f"{name}: not as before; missing: {lost or 'nothing'}; instead: {new or 'nothing'}; "
        f"if that is right, remove {state.path}"
    )


def taken(state: State) -> str:
    """Why a device with a live owner is left alone."""
    return (
        f"{state.ifname} belongs to a running mfsd (pid {state.owner.pid}): "
        "ask it (mfsctl restore) or stop it (systemctl stop mfsd)"
    )
