# SPDX-License-Identifier: Apache-2.0
"""Connections that send as fast as they may, and what of them arrives when: the load of the promotion experiment.

The sockets are made by the caller. One process of its own keeps those full that are wanted, another one receives, so
that neither waits for the caller's interpreter.
"""

from __future__ import annotations

import collections
import contextlib
import select
import socket
import time
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np

from mfsd.lab.hosts.child import Child, parent
from mfsd.lab.hosts.enter import enter, inside
from mfsd.lab.hosts.sink import HEAD, read_all
from mfsd.lab.hosts.tcp import CHUNK, prepare

if TYPE_CHECKING:
    from collections.abc import Collection
    from multiprocessing.connection import Connection

    import numpy.typing as npt

    from mfsd.lab.hosts.net import Host

PORT: Final = 7000
ANSWER_S: Final = 10.0
SO_SNDBUFFORCE: Final = 32
"""include/uapi/asm-generic/socket.h; Python has no name for it."""
SEND_BUFFER: Final = 4 << 20
"""Bytes: a full connection stays full at 1 Gbit/s while its filler waits 30 ms for a processor."""


def lanes_for(flows: int) -> int:
    """Leaf queues per band with which each of a user's connections has one of its own.

    Lane 0 is nobody's, and a user who is alone may have three quarters of the others (docs/security.md).
    """
    return 3 + 4 * flows // 3


class Bulk:
    """``n`` connections from one host to another, with their two processes. A context manager."""

    def __init__(self, source: Host, sink: Host, n: int, port: int = PORT) -> None:
        self._source, self._sink, self._n, self._port = source, sink, n, port
        self._stack = contextlib.ExitStack()
        self.sockets: list[socket.socket] = []

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._receiver = stack.enter_context(Child(__name__, "the bulk receiver"))
            self._receiver.say(("receive", self._sink.namespace, (self._n, self._port)))
            self._receiver.hear(ANSWER_S)
            with inside(self._source.namespace):
                for i in range(self._n):
                    s = stack.enter_context(prepare(socket.socket(socket.AF_INET, socket.SOCK_STREAM)))
                    s.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, SEND_BUFFER)
                    s.connect((self._sink.address, self._port))
                    s.sendall(HEAD.pack(i, 0))  # its index
                    self.sockets.append(s)
            fds = [s.fileno() for s in self.sockets]
            # It ends before the receiver, whose end would reset its connections.
            self._filler = stack.enter_context(Child(__name__, "the bulk sender", fds))
            self._filler.say(("fill", self._source.namespace, fds))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def want(self, indices: Collection[int]) -> None:
        """Keep these connections full, and no others."""
        self._filler.say(set(indices))

    def watch(self, index: int) -> None:
        """Note each arrival on this connection from now on."""
        self._receiver.say(index)

    def received(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Bytes by connection, shape (n,); (monotonic ns, bytes) of each arrival since ``watch``, shape (k, 2)."""
        self._receiver.say(None)
        counts, arrivals = self._receiver.hear(ANSWER_S)
        return np.array(counts), np.array(arrivals, dtype=np.int64).reshape(-1, 2)


def receive(pipe: Connection, n: int, port: int) -> None:
    """Accept and read until the pipe is closed."""
    counts, watched = [0] * n, -1
    arrivals: list[tuple[int, int]] = []

    def read(_sock: socket.socket, index: int, size: int) -> None:
        counts[index] += size
        if index == watched:
            arrivals.append((time.monotonic_ns(), size))

    def said(index: int | None) -> None:
        nonlocal watched, arrivals
        if index is None:
            pipe.send((counts, arrivals))
        else:
            watched, arrivals = index, []

    read_all(pipe, port, read, said)


def fill(pipe: Connection, fds: list[int]) -> None:
    """Keep the wanted connections full until the pipe is closed."""
    sockets = {fd: socket.socket(fileno=fd) for fd in fds}
    for s in sockets.values():
        s.setblocking(False)
    poll, data = select.epoll(), bytes(CHUNK)
    poll.register(pipe, select.EPOLLIN)
    active: dict[int, Any] = collections.defaultdict(bool)
    while True:
        for fd, _ in poll.poll():
            if fd == pipe.fileno():
                wanted = pipe.recv()
                for i, each in enumerate(fds):
                    if (i in wanted) != active[each]:
                        active[each] = not active[each]
                        poll.register(each, select.EPOLLOUT) if active[each] else poll.unregister(each)
                break
            with contextlib.suppress(BlockingIOError):
                sockets[fd].send(data)


def main() -> None:
    """Play the role that the parent says."""
    pipe = parent()
    role, namespace, more = pipe.recv()
    enter(namespace)
    with contextlib.suppress(EOFError):
        receive(pipe, *more) if role == "receive" else fill(pipe, more)


if __name__ == "__main__":
    main()
