# SPDX-License-Identifier: Apache-2.0
"""Enter a network namespace; as a program: ``... enter NAMESPACE PARENT COMMAND...`` runs a command in it.

Unlike ``ip netns exec`` this makes no mount namespace, so that /sys/fs/bpf stays the host's, and the command is killed
when the thread that started it ends: nothing outlives a runner that was killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

NETNS_DIR: Final = Path("/run/netns")
CLONE_NEWNET: Final = 0x40000000
"""include/uapi/linux/sched.h"""
PR_SET_PDEATHSIG: Final = 1
"""include/uapi/linux/prctl.h"""

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def enter(name: str) -> None:
    """Move the calling thread into a named network namespace. Raises OSError."""
    fd = os.open(NETNS_DIR / name, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_libc.setns(fd, CLONE_NEWNET), f"setns {name}")
    finally:
        os.close(fd)


@contextlib.contextmanager
def inside(name: str) -> Iterator[None]:
    """Let the calling thread be in a named network namespace for a while. Sockets made meanwhile stay in it."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        enter(name)
        try:
            yield
        finally:
            _check(_libc.setns(home, CLONE_NEWNET), "setns back")
    finally:
        os.close(home)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends; at once if ``parent`` is gone already."""
    _check(_libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0), "prctl PR_SET_PDEATHSIG")
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Run a command in a namespace: NAMESPACE PARENT_PID COMMAND..."""
    name, parent, *command = sys.argv[1:]
    die_with_parent(int(parent))
    enter(name)
    os.execvp(command[0], command)  # noqa: S606 - no shell, and that is the point of this program


if __name__ == "__main__":
    main()
