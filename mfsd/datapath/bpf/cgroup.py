# SPDX-License-Identifier: Apache-2.0
"""The root of the cgroup v2 hierarchy, mounted or not, for programs that are to see the whole host."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mfsd.datapath.bpf import syscall
from mfsd.datapath.errors import LoaderError

if TYPE_CHECKING:
    from collections.abc import Iterable

SOCK_CREATE: Final = 2
SOCK_OPS: Final = 3
"""enum bpf_attach_type, of cgroups."""
# Numbers of Linux 5.2, the same on every architecture but alpha (include/uapi/asm-generic/unistd.h).
_FSOPEN: Final = 430
_FSCONFIG: Final = 431
_FSMOUNT: Final = 432
_FSOPEN_CLOEXEC: Final = 1
_FSMOUNT_CLOEXEC: Final = 1
_FSCONFIG_CMD_CREATE: Final = 6
_HOSTS_NAMESPACE: Final = 0xEFFFFFFB
"""Inode of the initial cgroup namespace (PROC_CGROUP_INIT_INO, include/linux/proc_ns.h)."""


def open_root(path: Path | None = None) -> int:
    """A descriptor of its directory, at ``path`` or where it is mounted; if it is nowhere, of a mount without a place.

    The latter needs CAP_SYS_ADMIN, and ends with the descriptor. Raises LoaderError.
    """
    where = path if path is not None else mounted_at()
    if where is None and Path("/proc/self/ns/cgroup").stat().st_ino != _HOSTS_NAMESPACE:
        fix = "mount the host's /sys/fs/cgroup into the container, or run it in the host's cgroup namespace"
        raise LoaderError("finding the root of cgroup v2", "only a part of it is to be seen here", fix)
    try:
        return _detached() if where is None else os.open(where, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as e:
        what = "mounting cgroup v2" if where is None else f"opening {where}"
        fix = "mount it (mount -t cgroup2 none /sys/fs/cgroup/unified)" if where is None else "let mfsd read it"
        raise LoaderError(what, str(e), fix) from e


def attach(programs: Iterable[tuple[int, int]]) -> list[int]:
    """Hang programs, each with its enum bpf_attach_type, on the root: descriptors of their links, all or none.

    Raises LoaderError.
    """
    root, links = open_root(), []
    try:
        for program, hook in programs:
            links.append(syscall.link_create(program, root, hook, 0))
    except OSError as e:
        for link in links:
            os.close(link)
        fix = "mfsd needs CAP_NET_ADMIN and CAP_BPF, and the kernel CONFIG_CGROUP_BPF"
        raise LoaderError("attaching to the root of cgroup v2", str(e), fix) from e
    finally:
        os.close(root)
    return links


def behind(program: int, hook: int) -> list[int]:
    """Ids of the programs that run on the root after this one, in their order; empty where nobody can tell."""
    root = open_root()
    try:
        ids, own = syscall.prog_query(root, hook), syscall.prog_id(program)
    except OSError:
        return []
    finally:
        os.close(root)
    return ids[ids.index(own) + 1 :] if own in ids else []


def mounted_at(mountinfo: str | None = None, *, host: bool | None = None) -> Path | None:
    """Where the root of the host's hierarchy is mounted in the caller's mount namespace; None: nowhere.

    In a cgroup namespace of its own ("/" is that one's root) what lies above is named from there: "/../..".
    ``mountinfo``, ``host`` (the caller is in the host's cgroup namespace): for tests.
    """
    if mountinfo is None:
        mountinfo = Path("/proc/self/mountinfo").read_text(encoding="utf-8")
    if host is None:
        host = Path("/proc/self/ns/cgroup").stat().st_ino == _HOSTS_NAMESPACE
    found: tuple[int, Path] | None = None
    for line in mountinfo.splitlines():
        # mountinfo, proc(5): ... root mount-point options [optional fields] - type source options
        front, _, back = line.partition(" - ")
        root, place = front.split(" ")[3:5]
        up = [part for part in root.split("/") if part]
        if back.split(" ", 1)[0] != "cgroup2" or any(part != ".." for part in up) or not (up or host):
            continue
        if found is None or len(up) > found[0]:
            found = len(up), Path(place.encode().decode("unicode_escape"))
    return None if found is None else found[1]


def _detached() -> int:
    context = _call(_FSOPEN, b"cgroup2", _FSOPEN_CLOEXEC)
    try:
        _call(_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)
        mount = _call(_FSMOUNT, context, _FSMOUNT_CLOEXEC, 0)
    finally:
        os.close(context)
    try:
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mount)
    finally:
        os.close(mount)


def _call(number: int, *arguments: object) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    result = int(libc.syscall(ctypes.c_long(number), *arguments))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
