# SPDX-License-Identifier: Apache-2.0
"""What an earlier daemon has left: notes in the state directory, a socket that nobody serves."""

from __future__ import annotations

import errno
import socket
from typing import TYPE_CHECKING, Final

from mfsd.daemon.config import LOCK
from mfsd.datapath import tc
from mfsd.datapath.owner import locked
from mfsd.datapath.undo import notes
from mfsd.datapath.undo.elsewhere import keeps, left
from mfsd.datapath.undo.notes import Namespace, State, Unreadable
from mfsd.datapath.undo.restore import device_of, without_note
from mfsd.doctor.finding import Finding, Severity
from mfsd.ground.wire import beside
from mfsd.host import clock

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from mfsd.datapath.links import Link
    from mfsd.doctor.finding import Check, Context


def notes_left(context: Context) -> Iterator[Finding]:
    """A note without its daemon means that the daemon was killed."""
    folder = context.config.daemon.state_dir
    with tc.TcSocket() as sock:
        here = Namespace.of(sock)
        found = notes.every(folder)
        now = {
            note.path: device_of(sock, note) for note in found if isinstance(note, State) and note.namespace.same(here)
        }
    if not found:
        yield Finding("state.notes", Severity.OK, "No daemon has left its qdiscs behind", f"no notes in {folder}")
    for note in found:
        if isinstance(note, Unreadable):
            yield Finding(
                f"state.notes:{note.ifname}",
                Severity.FAIL,
                f"The note of what was on {note.ifname} can't be read",
                f"{note.path}: {note.error.cause}",
                "mfsd can't put the device back, and will not touch it",
                note.error.fix,
            )
        else:
            yield _noted(note, here, now.get(note.path))


def _noted(note: State, here: Namespace, now: Link | None) -> Finding:
    name, number, seen = note.ifname, f"state.notes:{note.ifname}", f"{note.path}, by pid {note.owner.pid}"
    if note.owner.alive:
        return Finding(number, Severity.OK, f"A running daemon has {name}", seen)
    if note.namespace.past(here):
        return Finding(number, Severity.INFO, f"A note about {name} is of before the last boot", seen,
                       "nothing of that is left; the next start of mfsd removes it")  # fmt: skip
    if not note.namespace.same(here):
        meaning = "whether its qdiscs are as they should be can only be seen there"
        return Finding(number, Severity.WARN, f"A note about {name} is of another network namespace", seen, meaning,
                       f"mfsctl restore in there, or remove {note.path} if that namespace is gone")  # fmt: skip
    if now is None and keeps(note):
        title = f"{name} has left its network namespace with a queue length of mfsd's"
        fix = "mfsctl restore" if note.path is None else f"mfsctl restore {name} --state-dir {note.path.parent}"
        return Finding(number, Severity.WARN, title, seen, left(note), fix)
    if now is None:
        return Finding(number, Severity.INFO, f"A note about {name} is of a device that is gone", seen,
                       "nothing is left to put back", "mfsctl restore removes it")  # fmt: skip
    called = f"{name}, which is called {now.name} now" if now.name != name else name
    return Finding(
        number,
        Severity.WARN,
        f"A daemon that is gone has left its qdiscs on {called}",
        seen,
        "all traffic runs in their default band, so nothing is steered but they limit the rate; what was there "
        "before is in the note. The next start of mfsd takes them over",
        "start mfsd, or put the device back: mfsctl restore",
    )


def trees_left(context: Context) -> Iterator[Finding]:
    """A tree of mfsd without a note can't be undone."""
    for name, problems in without_note(context.config.daemon.state_dir).items():
        yield Finding(
            f"state.trees:{name}",
            Severity.FAIL,
            f"{name} carries mfsd's bands, but nobody knows what was there before",
            "; ".join(problems),
            "mfsd will not take them over, because it could not put the device back",
            f"if state_dir is right, remove them: mfsctl restore {name} --delete; the kernel's default returns",
        )


def clocks(_: Context) -> Iterator[Finding]:
    """In a time namespace the daemon's clock is not the one that the classifier reads."""
    shift = clock.offset_ns("monotonic") / 1e9
    if shift:
        yield Finding(
            "state.clock",
            Severity.INFO,
            "This process is in a time namespace of its own",
            f"its monotonic clock is {abs(shift):g} s {'ahead of' if shift > 0 else 'behind'} the kernel's",
            "mfsd reckons by the kernel's clock, so this does no harm",
        )


def answers(path: Path) -> bool:
    """Somebody listens on this socket."""
    return _knock(path) == 0


def _knock(path: Path) -> int:
    with socket.socket(socket.AF_UNIX) as s:
        s.settimeout(3)
        return s.connect_ex(str(path))


def _runs(state_dir: Path) -> bool:
    """A daemon has locked the folder, as far as may be seen."""
    try:
        return locked(state_dir / LOCK, state_dir)
    except OSError:
        return False


def _hangs(path: Path) -> bool:
    """Whoever listens on the socket that gives tokens says nothing. False where there is none."""
    with socket.socket(socket.AF_UNIX) as s:
        s.settimeout(3)
        try:
            s.connect(str(beside(path)))
            s.recv(1)
        except TimeoutError:
            return True
        except OSError:
            pass
    return False


def stale_socket(context: Context) -> Iterator[Finding]:
    """A socket file without a daemon."""
    path = context.config.daemon.socket
    both = path, beside(path)
    gone = [p for p in both if _knock(p) in (errno.ENOENT, errno.ECONNREFUSED)]
    if gone and _runs(context.config.daemon.state_dir):
        yield Finding(
            "state.socket",
            Severity.FAIL,
            "mfsd runs, but can't be reached",
            f"nobody listens on {' nor '.join(map(str, gone))}",
            "no hints, and no mfsctl; what it has decided stays in force as long as it lives",
            "it makes again within seconds what was deleted, unless something else is there: remove that",
        )
        return
    if not path.exists():
        yield Finding("state.socket", Severity.INFO, "mfsd is not running", f"there is no socket {path}")
        return
    code = _knock(path)
    if code == 0 and _hangs(path):
        yield Finding(
            "state.socket",
            Severity.FAIL,
            "mfsd hangs",
            f"{path} takes connections, and nobody says anything",
            "hints are lost, and nothing is promoted",
            "look at its log (journalctl -u mfsd), and restart it (systemctl restart mfsd)",
        )
    elif code == 0:
        yield Finding("state.socket", Severity.OK, "mfsd is running", f"{path} answers")
    elif code == errno.ECONNREFUSED:
        yield Finding(
            "state.socket",
            Severity.INFO,
            "mfsd is not running, but has left its socket",
            f"nobody listens on {path}",
            "it was killed; the next start removes the file",
        )
    else:
        yield Finding(
            "state.socket", Severity.INFO, "Can't tell whether mfsd runs", f"{path}: {errno.errorcode.get(code, code)}"
        )


CHECKS: Final[tuple[Check, ...]] = (notes_left, trees_left, clocks, stale_socket)
