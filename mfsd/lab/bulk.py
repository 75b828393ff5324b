# SPDX-License-Identifier: Apache-2.0
"""Connections that send as fast as they may, and what of them arrives when: the load of the promotion experiment.

The sockets are made by the caller. One process of its own keeps those full that are wanted, another one receives, so
that neither waits for the caller's interpreter. The three share one page-backed area (``Area``).
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import socket
import struct
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np

from mfsd.lab.hosts.enter import die_with_parent, enter, inside
from mfsd.lab.hosts.governor import environment, python
from mfsd.lab.hosts.net import LabError
from mfsd.lab.hosts.tcp import CHUNK, prepare

if TYPE_CHECKING:
    import numpy.typing as npt

    from mfsd.lab.hosts.net import Host

PORT: Final = 7000
LOG: Final = 1 << 17
"""Arrivals remembered per trial: a tenth of a second at 1 Gbit/s in single segments is below 10,000."""
SO_SNDBUFFORCE: Final = 32
"""include/uapi/asm-generic/socket.h; Python has no name for it."""
SEND_BUFFER: Final = 4 << 20
"""Bytes: a full connection stays full at 1 Gbit/s while its filler waits 30 ms for a processor."""
HEAD: Final = struct.Struct("=I")
"""The first bytes on a connection: its index."""


class Area:
    """Memory shared by the processes: ``n`` connections, of which one is watched closely."""

    def __init__(self, n: int, fd: int | None = None) -> None:
        self.n = n
        size = 64 + 16 * n + 16 * LOG
        self.fd = os.memfd_create("mfsd-lab") if fd is None else fd
        if fd is None:
            os.ftruncate(self.fd, size)
        words: npt.NDArray[np.uint64] = np.frombuffer(mmap.mmap(self.fd, size), dtype=np.uint64)
        self._head = words[:8]
        self.wanted = words[8 : 8 + n]
        """1: keep this connection full."""
        self.received = words[8 + n : 8 + 2 * n]
        """Bytes that have arrived, by connection."""
        self._log = words[8 + 2 * n :].reshape(LOG, 2)

    @property
    def listening(self) -> bool:
        """The receiver is ready."""
        return bool(self._head[0])

    def watch(self, index: int) -> None:
        """Start a new log of arrivals, of this connection."""
        self._head[1] = 0
        self._head[2] = index

    def arrivals(self) -> npt.NDArray[np.uint64]:
        """(monotonic ns, bytes) of each arrival since ``watch``, shape (k, 2)."""
        return self._log[: int(self._head[1])].copy()

    def set_listening(self) -> None:
        """Say that connections are accepted."""
        self._head[0] = 1

    def arrived(self, index: int, size: int) -> None:
        """Count, and log if watched."""
        self.received[index] += size
        if index == self._head[2] and self._head[1] < LOG:
            self._log[int(self._head[1])] = (time.monotonic_ns(), size)
            self._head[1] += 1


class Bulk:
    """``n`` connections from one host to another, with their two processes. A context manager."""

    def __init__(self, source: Host, sink: Host, n: int) -> None:
        self.area = Area(n)
        self.source, self.sink = source, sink
        self.sockets: list[socket.socket] = []
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        try:
            self._start("receive", [self.area.fd])
            self._wait()
            with inside(self.source.namespace):
                for i in range(self.area.n):
                    s = prepare(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
                    s.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, SEND_BUFFER)
                    self.sockets.append(s)
                    s.connect((self.sink.address, PORT))
                    s.sendall(HEAD.pack(i))
            self._start("fill", [self.area.fd, *(s.fileno() for s in self.sockets)])
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _wait(self) -> None:
        until = time.monotonic() + 10
        while not self.area.listening:
            if time.monotonic() > until or self._processes[0].poll() is not None:
                raise LabError("the receiver of the bulk connections does not start")
            time.sleep(0.01)

    def _start(self, role: str, fds: list[int]) -> None:
        host = self.sink if role == "receive" else self.source
        command = [*python("mfsd.lab.bulk"), role, host.namespace, str(os.getpid()), str(self.area.n), *map(str, fds)]
        # S603: our own module, with names that we made.
        self._processes.append(subprocess.Popen(command, pass_fds=fds, env=environment()))  # noqa: S603

    def close(self) -> None:
        """Idempotent."""
        while self._processes:  # the sender before the receiver, whose end would reset its connections
            process = self._processes.pop()
            process.kill()
            process.wait()
        for s in self.sockets:
            s.close()
        self.sockets.clear()
        if self.area.fd >= 0:
            os.close(self.area.fd)
            self.area.fd = -1


def receive(area: Area) -> None:
    """Accept and read for ever."""
    server = prepare(socket.create_server(("", PORT), backlog=area.n + 1))
    poll = select.epoll()
    poll.register(server, select.EPOLLIN)
    known: dict[int, tuple[socket.socket, int]] = {}
    buffer = bytearray(CHUNK)
    area.set_listening()
    while True:
        for fd, _ in poll.poll():
            if fd == server.fileno():
                connection, _ = server.accept()
                (index,) = HEAD.unpack(connection.recv(HEAD.size, socket.MSG_WAITALL))
                known[connection.fileno()] = connection, index
                poll.register(connection, select.EPOLLIN)
                continue
            connection, index = known[fd]
            try:
                # MSG_TRUNC: throw the bytes away without copying them, tcp(7).
                size = connection.recv_into(buffer, CHUNK, socket.MSG_TRUNC)
            except OSError:
                size = 0
            if size:
                area.arrived(index, size)
            else:
                poll.unregister(fd)


def fill(area: Area, fds: list[int]) -> None:
    """Keep the wanted connections full, for ever."""
    sockets = [socket.socket(fileno=fd) for fd in fds]
    for s in sockets:
        s.setblocking(False)
    poll, data, active = select.epoll(), bytes(CHUNK), set[int]()
    index = {s.fileno(): i for i, s in enumerate(sockets)}
    while True:
        for fd, i in index.items():
            if area.wanted[i] and fd not in active:
                poll.register(fd, select.EPOLLOUT)
                active.add(fd)
            elif not area.wanted[i] and fd in active:
                poll.unregister(fd)
                active.discard(fd)
        if not active:
            time.sleep(0.0005)
            continue
        for fd, _ in poll.poll(0.005):
            if area.wanted[index[fd]]:
                with contextlib.suppress(BlockingIOError):
                    sockets[index[fd]].send(data)


def main() -> None:
    """ROLE NAMESPACE PARENT_PID N AREA_FD SOCKET_FD..."""
    role, namespace, parent, n, area_fd, *fds = sys.argv[1:]
    die_with_parent(int(parent))
    enter(namespace)
    area = Area(int(n), int(area_fd))
    roles: dict[str, Any] = {"receive": lambda: receive(area), "fill": lambda: fill(area, [int(fd) for fd in fds])}
    roles[role]()


if __name__ == "__main__":
    main()
