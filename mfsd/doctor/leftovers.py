# SPDX-License-Identifier: Apache-2.0
"""What an earlier daemon has left: notes in the state directory, a socket that nobody serves."""

from __future__ import annotations

import errno
import socket
from typing import TYPE_CHECKING, Final

from mfsd.datapath.errors import EnforceError
from mfsd.datapath.undo import notes
from mfsd.doctor.finding import Finding, Severity

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from mfsd.doctor.finding import Check, Context


def notes_left(context: Context) -> Iterator[Finding]:
    """A note without its daemon means that the daemon was killed."""
    folder = context.config.daemon.state_dir
    names = notes.recorded(folder)
    if not names:
        yield Finding("state.notes", Severity.OK, "No daemon has left its qdiscs behind", f"no notes in {folder}")
    for name in names:
        try:
            state = notes.load(folder, name)
        except EnforceError as e:
            yield Finding(
                f"state.notes:{name}",
                Severity.FAIL,
                f"The note of what was on {name} can't be read",
                str(e),
                "mfsd can't put the device back, and will not touch it",
                f"look at the device (tc qdisc show dev {name}), then remove {notes.path_of(folder, name)}",
            )
            continue
        if state is None:
            continue
        seen = f"{notes.path_of(folder, name)}, by pid {state.owner.pid}"
        if state.owner.alive:
            yield Finding(f"state.notes:{name}", Severity.OK, f"A running daemon has {name}", seen)
        else:
            yield Finding(
                f"state.notes:{name}",
                Severity.WARN,
                f"A daemon that is gone has left its qdiscs on {name}",
                seen,
                "all traffic runs in their default band, so nothing is steered but they limit the rate; what was there "
                "before is in the note. The next start of mfsd takes them over",
                "start mfsd, or put the device back: mfsctl restore",
            )


def answers(path: Path) -> bool:
    """Somebody listens on this socket."""
    return _knock(path) == 0


def _knock(path: Path) -> int:
    with socket.socket(socket.AF_UNIX) as s:
        s.settimeout(3)
        return s.connect_ex(str(path))


def stale_socket(context: Context) -> Iterator[Finding]:
    """A socket file without a daemon."""
    path = context.config.daemon.socket
    if not path.exists():
        yield Finding("state.socket", Severity.INFO, "mfsd is not running", f"there is no socket {path}")
        return
    code = _knock(path)
    if code == 0:
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


CHECKS: Final[tuple[Check, ...]] = (notes_left, stale_socket)
