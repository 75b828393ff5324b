# SPDX-License-Identifier: Apache-2.0
"""Network namespaces of this host, as far as they can be seen, and work inside one of them."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

NAMED: Final = Path("/run/netns")
"""Where ip(8) keeps those that it has given names."""
CLONE_NEWNET: Final = 0x40000000
"""include/uapi/linux/sched.h"""


@dataclass(frozen=True, slots=True)
class Place:
    """A network namespace. ``called``: how people find it; ``path``: by which it can be entered."""

    inode: int
    called: str
    path: str


def every() -> tuple[list[Place], bool]:
    """(those that have a name or a process, False if there are others that can't be entered)."""
    found: dict[int, Place] = {}
    seen: list[int] = []
    hidden: list[int] = []
    file_system = os.stat("/proc/self/ns/net").st_dev  # noqa: PTH116 - no path
    for name in sorted(os.listdir(NAMED)) if NAMED.is_dir() else []:  # noqa: PTH208 - not paths
        _note(found, f"network namespace {name}", str(NAMED / name), file_system)
    for pid in sorted(int(entry) for entry in os.listdir("/proc") if entry.isdigit()):  # noqa: PTH208 - not paths
        try:
            _note(found, f"the network namespace of process {pid}", f"/proc/{pid}/ns/net", file_system)
        except PermissionError:
            hidden.append(pid)
        else:
            seen.append(pid)
    # Of one with more capabilities than ours we may not know which it is, but whether another one is in the same.
    known = set(map(_devices, seen)) if hidden else set()
    return list(found.values()), all(_devices(pid) in known | {0} for pid in hidden)


def _note(found: dict[int, Place], called: str, path: str, file_system: int) -> None:
    """Raises PermissionError."""
    try:
        info = os.stat(path)  # noqa: PTH116 - one per process of the host
    except PermissionError:
        raise
    except OSError:
        return  # it has ended
    if info.st_dev == file_system:  # a name can outlive its namespace
        found.setdefault(info.st_ino, Place(info.st_ino, called, path))


def _devices(pid: int) -> int:
    """Number of a file that each namespace has once; 0: the process has ended."""
    try:
        return os.stat(f"/proc/{pid}/net/dev").st_ino  # noqa: PTH116 - no path
    except (FileNotFoundError, ProcessLookupError):
        return 0


def inside(place: Place, work: Callable[[], T]) -> T:
    """Have it done in a thread that has entered the namespace; sockets made there stay in it. Raises OSError."""
    done: list[T] = []
    failed: list[Exception] = []

    def body() -> None:
        try:
            fd = os.open(place.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                libc = ctypes.CDLL(None, use_errno=True)
                if os.fstat(fd).st_ino != place.inode:
                    raise FileNotFoundError(errno.ENOENT, "it has ended", place.path)
                if libc.setns(fd, CLONE_NEWNET):  # ends with the thread
                    raise OSError(ctypes.get_errno(), "can't be entered", place.path)
            finally:
                os.close(fd)
            done.append(work())
        except Exception as e:  # noqa: BLE001 - it is the caller's
            failed.append(e)

    thread = threading.Thread(target=body, name="mfsd-elsewhere")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return done[0]
