# SPDX-License-Identifier: Apache-2.0
"""What an earlier daemon, or this one, has left on devices that nobody here cares for.

Notes say it: a device may have been renamed, or be no longer configured, or its daemon was killed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import structlog

from mfsd.datapath import links, tc
from mfsd.datapath.bpf.attach import Attachment
from mfsd.datapath.errors import DatapathError, EnforceError, NoDeviceError
from mfsd.datapath.handles import is_ours
from mfsd.datapath.undo import notes, restore
from mfsd.datapath.undo.elsewhere import keeps, left
from mfsd.datapath.undo.notes import Namespace, State, Unreadable

if TYPE_CHECKING:
    from collections.abc import Container, Iterable
    from pathlib import Path

    from mfsd.daemon.device import Device

NAMED: Final = 20
"""Notes that are named; a status of thousands would be more than gRPC carries."""

log = structlog.get_logger(__name__)


def cut(links_of_others: Iterable[int]) -> None:
    """Take classifiers off before the qdiscs go into which they send packets: those that hang by these TCX links."""
    for fd in links_of_others:
        Attachment(0, "tcx", fd).detach()


def put_back(sock: tc.TcSocket, state_dir: Path, held: Container[int], names: Container[str]) -> list[str]:
    """Put back every device with a note but those of these indices, whose notes are in use; returns problems.

    A note that can't be read is a problem of a device of these names, else one of nobody's, and named here.
    """
    try:
        here, found = Namespace.of(sock), notes.every(state_dir)
    except OSError as e:
        return [f"notes in {state_dir}: {e}"]
    problems = []
    for note in found:
        try:
            if isinstance(note, Unreadable):
                if note.ifindex not in held and note.ifname not in names:
                    problems.append(str(note.error))
            elif note.namespace.past(here):
                notes.forget(note)
            elif note.namespace.same(here) and note.ifindex not in held and not note.taken:
                problems += _put_back(sock, note)
        except (OSError, DatapathError) as e:
            problems.append(f"{note.ifname}: {e}")
    more = len(problems) - NAMED
    return problems if more <= 0 else [*problems[:NAMED], f"notes in {state_dir}: {more} more can't be put back"]


def _put_back(sock: tc.TcSocket, note: State) -> list[str]:
    if restore.device_of(sock, note) is None and keeps(note):
        return [left(note)]
    problems = restore.put_back(sock, note)
    log.warning("put back what mfsd had left", device=note.ifname, index=note.ifindex, problems=problems)
    return problems


def forget(sock: tc.TcSocket, state_dir: Path, ifindex: int, *, moved: bool) -> None:
    """Remove the note of a device that is gone, unless it has ``moved`` with something of ours. Raises OSError."""
    here = Namespace.of(sock)
    for note in notes.every(state_dir):
        if isinstance(note, State) and note.of(ifindex, here) and not note.taken and not (moved and keeps(note)):
            notes.forget(note)


def notices(sock: tc.TcSocket, state_dir: Path, ifindex: int, name: str) -> list[str]:
    """What is to be said of a device on which this daemon has no qdiscs. Raises OSError."""
    if not _has_tree(sock, ifindex):
        return []
    try:
        note = notes.find(state_dir, ifindex, name, Namespace.of(sock))
    except EnforceError as e:
        return [str(e)]
    if note is None:
        return [restore.unnoted(name, state_dir)]
    if note.taken:
        return [restore.taken(note)]
    return ["an earlier mfsd has left its qdiscs: enforcing takes them over, mfsctl restore puts back what was there"]


def undo(sock: tc.TcSocket, state_dir: Path, ifindex: int, name: str) -> list[str] | None:
    """Put back a device on which this daemon has no qdiscs; problems, or None when there is nothing to put back.

    Raises EnforceError for a note that can't be read, and OSError.
    """
    here = Namespace.of(sock)
    if not ifindex:
        return [left(note) for note in _left(sock, state_dir, here) if note.ifname == name] or None
    note = notes.find(state_dir, ifindex, name, here)
    if note is not None:
        return [restore.taken(note)] if note.taken else restore.put_back(sock, note)
    return [restore.unnoted(name, state_dir)] if _has_tree(sock, ifindex) else None


def _left(sock: tc.TcSocket, state_dir: Path, here: Namespace) -> list[State]:
    """Notes of devices that have left with something of ours."""
    found = (note for note in notes.every(state_dir) if isinstance(note, State) and note.namespace.same(here))
    return [note for note in found if keeps(note) and not note.taken and restore.device_of(sock, note) is None]


def absent(sock: tc.TcSocket, device: Device) -> str:
    """What is to be said of a device that is not there. Raises OSError."""
    try:
        now = links.by_index(sock, device.was).name if device.was else ""
    except NoDeviceError:
        now, device.was = "", 0
    if now:
        return f"it is called {now} now, and not shaped; a device called {device.name} is set up when it appears"
    other = links.alternative(sock, device.name)
    if other:
        return f"that is an alternative name of {other}: configure it as {other}"
    return "there is no such device; it is set up when it appears"


def _has_tree(sock: tc.TcSocket, ifindex: int) -> bool:
    root = tc.root_of(sock.tree(ifindex)[0])
    return root is not None and is_ours(root)
