# SPDX-License-Identifier: Apache-2.0
"""Bytes over long-lived TCP connections, driven by one event loop for the whole cluster.

Both ends of a connection are in this process, though in different network namespaces, so frames need no headers: the
bytes are real, and which of them end which frame is known from the order of sending. Payloads are zeros that nobody
looks at, so the reader has the kernel throw them away.
"""

from __future__ import annotations

import asyncio
import collections
import socket
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Self

from mfsd.client.selectors import cookie_of
from mfsd.lab.hosts.enter import inside
from mfsd.lab.hosts.tcp import CHUNK, prepare

if TYPE_CHECKING:
    from collections.abc import Callable

    from mfsd.lab.hosts.net import Host
    from mfsd.model import Stage

_ZEROS: Final = memoryview(bytes(CHUNK))
_SINK: Final = bytearray(CHUNK)
BIN_S: Final = 0.1


@dataclass(slots=True)
class Meter:
    """Payload bytes per host, direction and tenth of a second: (host, "in" or "out", bin) -> bytes."""

    bins: dict[tuple[str, str, int], int] = field(default_factory=dict)

    def add(self, src: str, dst: str, at: float, size: int) -> None:
        """Bytes that arrived at time ``at`` (s)."""
        number = int(at / BIN_S)
        for key in ((src, "out", number), (dst, "in", number)):
            self.bins[key] = self.bins.get(key, 0) + size


@dataclass(slots=True)
class _Frame:
    end: int
    """Offset of its end in the connection's stream."""
    arrived: Callable[[float], None]
    written: Callable[[], None]
    out: bool = False
    """All handed to the socket."""


class Lane:
    """One connection from ``src`` to ``dst``; frames go out in the order of ``put``."""

    def __init__(self, src: Host, dst: Host, stage: Stage, sock: socket.socket, peer: socket.socket) -> None:
        self.src, self.dst, self.stage = src, dst, stage
        self.sock, self._peer = sock, peer
        self.cookie = cookie_of(sock)
        """What hints name it by."""
        self._loop = asyncio.get_running_loop()
        self._frames: collections.deque[_Frame] = collections.deque()
        self._unsent: collections.deque[_Frame] = collections.deque()
        self._put = self._sent = self._received = 0
        self._writing = False
        self.meter: Meter | None = None
        sock.setblocking(False)
        peer.setblocking(False)
        self._loop.add_reader(peer, self._readable)

    @property
    def queued(self) -> int:
        """Bytes that have not arrived."""
        return self._put - self._received

    def put(self, size: int, arrived: Callable[[float], None], written: Callable[[], None] = lambda: None) -> None:
        """Send ``size`` bytes.

        ``written`` is called when the socket has taken the last one, ``arrived`` with the time (loop seconds) when the
        reader has it.
        """
        self._put += size
        frame = _Frame(self._put, arrived, written)
        self._frames.append(frame)
        self._unsent.append(frame)
        if not self._writing:
            self._writable()

    def _writable(self) -> None:
        while self._sent < self._put:
            try:
                self._sent += self.sock.send(_ZEROS[: self._put - self._sent])
            except BlockingIOError:
                break
        while self._unsent and self._unsent[0].end <= self._sent:
            self._unsent.popleft().written()
        wanted = self._sent < self._put
        if wanted and not self._writing:
            self._loop.add_writer(self.sock, self._writable)
        elif self._writing and not wanted:
            self._loop.remove_writer(self.sock)
        self._writing = wanted

    def _readable(self) -> None:
        try:
            # MSG_TRUNC: throw the bytes away without copying them, tcp(7).
            size = self._peer.recv_into(_SINK, CHUNK, socket.MSG_TRUNC)
        except BlockingIOError:
            return
        if not size:
            self._loop.remove_reader(self._peer)
            return
        now = self._loop.time()
        self._received += size
        if self.meter is not None:
            self.meter.add(self.src.name, self.dst.name, now, size)
        while self._frames and self._frames[0].end <= self._received:
            self._frames.popleft().arrived(now)

    def close(self) -> None:
        """End the connection; what is on its way is lost."""
        self._loop.remove_reader(self._peer)
        if self._writing:
            self._loop.remove_writer(self.sock)
        # Reset rather than drain: nobody wants the bytes, and the next run must find an empty network.
        for sock in (self.sock, self._peer):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            sock.close()


class Plugboard:
    """Makes lanes between hosts. A context manager: leaving closes them."""

    def __init__(self) -> None:
        self._listeners: dict[str, socket.socket] = {}
        self.lanes: list[Lane] = []

    def connect(self, src: Host, dst: Host, stage: Stage) -> Lane:
        """A new connection."""
        listener = self._listeners.get(dst.name)
        if listener is None:
            with inside(dst.namespace):
                listener = prepare(socket.create_server((dst.address, 0), backlog=256))
            listener.settimeout(10)
            self._listeners[dst.name] = listener
        with inside(src.namespace):
            sock = prepare(socket.create_connection((dst.address, listener.getsockname()[1]), timeout=10))
        # One at a time, so what is accepted is what was just connected.
        peer, _ = listener.accept()
        lane = Lane(src, dst, stage, sock, prepare(peer))
        self.lanes.append(lane)
        return lane

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for lane in self.lanes:
            lane.close()
        for listener in self._listeners.values():
            listener.close()
