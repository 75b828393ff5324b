# SPDX-License-Identifier: Apache-2.0
"""Room for everybody on the unix socket of the services: connections beyond a user's part are hung up on.

gRPC accepts whatever comes, says nothing of who it is, and has no limit. Each connection takes a descriptor, and who
holds all of them keeps others out, operators as well. So now and then this process looks through its own descriptors:
the kernel says of each whose connection it is (SO_PEERCRED). The newest of those that are too many are shut down, which
gRPC takes for their end. Root and mfsd's own user have no part as users: there, each process has one, as large as the
descriptors allow, so that one that has lost count of its connections keeps out neither others of root nor who looks.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Final

import structlog

from mfsd.api.identity import UCRED
from mfsd.ground.logs import Seldom

if TYPE_CHECKING:
    from collections.abc import Container

    from mfsd.api.identity import Identities

LOOK_S: Final = 1.0
"""How often; as long gRPC waits before it accepts again, once it has been out of descriptors."""
KEPT: Final = 32
"""Descriptors for everything else that comes up."""
EACH: Final = 2
"""Connections for each session that a user may have: clients that come back have two for a moment."""
HIGHEST: Final = 1 << 16
"""Descriptors that are looked at where the kernel can't list them, for want of one."""


log = structlog.get_logger(__name__)


class Room:
    """Looks after the connections of one socket. For one thread at a time."""

    def __init__(self, bound: Container[str], identities: Identities) -> None:
        """``bound``: names that the socket has been bound with."""
        self._bound = bound
        self._identities = identities
        self._looks = 0
        self._seen: dict[int, int] = {}
        """Connections, by inode, that there were at the last look; in which look they were seen first."""
        # Shutting down needs a descriptor that is not closed, and used for something else, in between.
        self._spare = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Idempotent."""
        spare, self._spare = self._spare, -1
        if spare >= 0:
            os.close(spare)

    async def keep(self) -> None:
        """Look again and again, until cancelled."""
        seldom = Seldom()
        try:
            while True:
                await asyncio.sleep(LOOK_S)
                for uid, count in (await asyncio.to_thread(self.make)).items():
                    if count and seldom(str(uid)):
                        log.warning("too many connections: hung up on the newest", user=uid, connections=count)
        finally:
            self.close()

    def make(self) -> dict[int, int]:
        """Hang up on those who are too many; how many they were, by user."""
        own, seen = 0, dict[int, int]()
        parts = defaultdict[tuple[int, int], list[tuple[int, int, int]]](list)
        self._looks += 1
        for fd in _descriptors():
            whose = self._whose(fd)
            if whose is None:
                own += 1
                continue
            with contextlib.suppress(OSError):
                inode = os.fstat(fd).st_ino
                seen[inode] = self._seen.get(inode, self._looks)
                parts[whose].append((seen[inode], fd, inode))
        self._seen = seen
        room = max(resource.getrlimit(resource.RLIMIT_NOFILE)[0] - own - KEPT, 0)
        even = room // (len(parts) + 1)
        out: Counter[int] = Counter()
        for (uid, process), some in parts.items():
            most = max(even, EACH) if process else min(even, EACH * self._identities.limit)
            if len(some) > most:
                out[uid] += sum(self._hang_up(fd, inode) for _, fd, inode in sorted(some)[most:])
        return out

    def _whose(self, fd: int) -> tuple[int, int] | None:
        """Whose connection to the socket it is: (user, process if that may everything, else 0). None: it is none."""
        try:
            sock = socket.socket(fileno=fd)
        except OSError:
            return None
        try:
            listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            if sock.family != socket.AF_UNIX or listens or sock.getsockname() not in self._bound:
                return None
            pid, uid, _ = UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size))
            return uid, pid if self._identities.rights.superuser(uid) else 0
        except OSError:
            return None
        finally:
            sock.detach()

    def _hang_up(self, fd: int, inode: int) -> bool:
        """Unless the descriptor is another one's meanwhile."""
        with contextlib.suppress(OSError):
            os.dup2(fd, self._spare, inheritable=False)
            sock = socket.socket(fileno=self._spare)
            try:
                if os.fstat(self._spare).st_ino == inode:
                    sock.shutdown(socket.SHUT_RDWR)
                    return True
            finally:
                sock.detach()
        return False


def _descriptors() -> list[int]:
    """Of this process."""
    with contextlib.suppress(OSError):
        return [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]
    return list(range(min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], HIGHEST)))
