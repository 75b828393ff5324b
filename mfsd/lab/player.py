# SPDX-License-Identifier: Apache-2.0
"""TCP connections that play what an experiment wants: floods, bursts and transfers, and what arrives of them when.

The receiver, a process of its own, says on each connection when every so many bytes of it have arrived, in the clock of
the host that both share; so what is measured is the arrival of the last byte, not when anybody heard of it.
"""

from __future__ import annotations

import collections
import contextlib
import heapq
import itertools
import math
import select
import socket
import struct
import time
from typing import TYPE_CHECKING, Final, Self

from mfsd.lab.hosts.child import Child, parent
from mfsd.lab.hosts.enter import enter, inside
from mfsd.lab.hosts.sink import HEAD, read_all
from mfsd.lab.hosts.tcp import CHUNK, prepare, reset_at_close

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

    from mfsd.lab.hosts.net import Host

PORT: Final = 7001
ANSWER_S: Final = 10.0
TIME: Final = struct.Struct("=Q")
"""What the receiver tells: monotonic ns. A connection's number is after how many bytes it does so, again and again."""
NS: Final = 1e-9


class Flow:
    """One connection. ``on_arrival`` is called with the time, in seconds, when another ``unit`` bytes have arrived."""

    def __init__(self, player: Player, sock: socket.socket, unit: int) -> None:
        self.sock = sock
        self.unit = unit
        self.arrivals: list[float] = []
        self.on_arrival: Callable[[float], None] = lambda _: None
        self._player = player
        self._left = 0.0
        self._told = b""

    def send(self, size: float) -> None:
        """Write so many more bytes as soon as TCP takes them; inf: for ever."""
        if not self._left:
            self._player.poll.modify(self.sock, select.EPOLLIN | select.EPOLLOUT)
        self._left += size

    def writable(self) -> None:
        """TCP takes something."""
        with contextlib.suppress(BlockingIOError):
            self._left -= self.sock.send(_ZEROS[: int(min(self._left, CHUNK))])
        if not self._left:
            self._player.poll.modify(self.sock, select.EPOLLIN)

    def readable(self) -> None:
        """The receiver has told the time."""
        told = self._told + self.sock.recv(1 << 12)
        whole = len(told) // TIME.size * TIME.size
        self._told = told[whole:]
        for (ns,) in TIME.iter_unpack(told[:whole]):
            self.arrivals.append(ns * NS)
            self.on_arrival(ns * NS)


_ZEROS: Final = memoryview(bytes(CHUNK))


class Player:
    """Connections from one host to another, and a clock. A context manager: leaving ends the receiver."""

    def __init__(self, source: Host, sink: Host) -> None:
        self._source, self._sink = source, sink
        self.poll = select.epoll()
        self._flows: dict[int, Flow] = {}
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._number = itertools.count()

    def __enter__(self) -> Self:
        self._receiver = Child(__name__, "the receiver")
        self._receiver.say(self._sink.namespace)
        self._receiver.hear(ANSWER_S)
        return self

    def __exit__(self, *exc: object) -> None:
        self.clear()
        self._receiver.close()
        self.poll.close()

    def connect(self, unit: int, port: int = 0, pace: float = 0.0) -> Flow:
        """A new connection. ``port``: our own; 0: any. ``pace``: bytes/s that its receiver reads at most; 0: all."""
        with inside(self._source.namespace):
            sock = prepare(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
        flow = Flow(self, sock, unit)
        self._flows[sock.fileno()] = flow
        if port:
            sock.bind((self._source.address, port))
        sock.connect((self._sink.address, PORT))
        sock.sendall(HEAD.pack(unit, int(pace)))
        sock.setblocking(False)
        self.poll.register(sock, select.EPOLLIN)
        return flow

    def at(self, when: float, what: Callable[[], None]) -> None:
        """Call something at a time of the monotonic clock."""
        heapq.heappush(self._timers, (when, next(self._number), what))

    def play(self, until: float, done: Callable[[], bool] = lambda: False) -> None:
        """Let flows and timers go on until a time, or until ``done`` says so after something has happened."""
        while not done():
            now = time.monotonic()
            if now >= until:
                return
            while self._timers and self._timers[0][0] <= now:
                heapq.heappop(self._timers)[2]()
            following = min(until, self._timers[0][0] if self._timers else math.inf)
            # epoll counts in milliseconds and rounds up.
            for fd, event in self.poll.poll(max(following - time.monotonic(), 0.0)):
                if event & select.EPOLLIN:
                    self._flows[fd].readable()
                if event & select.EPOLLOUT:
                    self._flows[fd].writable()

    def clear(self) -> None:
        """Forget timers and reset all connections: what TCP still has of them is thrown away."""
        self._timers.clear()
        for flow in self._flows.values():
            reset_at_close(flow.sock)
            flow.sock.close()
        self._flows.clear()


def receive(pipe: Connection) -> None:
    """Accept, read and tell the time until the pipe is closed."""
    counts: dict[socket.socket, int] = collections.defaultdict(int)

    def read(sock: socket.socket, unit: int, size: int) -> None:
        now = TIME.pack(time.monotonic_ns())
        counts[sock] += size
        while size and counts[sock] >= unit:
            counts[sock] -= unit
            sock.send(now)

    read_all(pipe, PORT, read, lambda _: None)


def main() -> None:
    """Play the receiver."""
    pipe = parent()
    enter(pipe.recv())
    with contextlib.suppress(EOFError):
        receive(pipe)


if __name__ == "__main__":
    main()
