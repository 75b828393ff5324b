# SPDX-License-Identifier: Apache-2.0
"""Framed bytes over long-lived TCP connections: one writing thread per lane, one reading thread per connection.

Payloads are zeros that nobody looks at, so the reader has the kernel throw them away. Headers say what frames are.
"""

from __future__ import annotations

import collections
import socket
import struct
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from mfsd.lab.hosts.tcp import CHUNK, prepare
from mfsd.model import Stage

if TYPE_CHECKING:
    from collections.abc import Callable

HEAD: Final = struct.Struct("=BxHIQd")
_ZEROS: Final = memoryview(bytes(CHUNK))


@dataclass(frozen=True, slots=True)
class Frame:
    """One message. ``key`` is a request, or an iteration for a collective; ``size`` is the payload in bytes."""

    stage: Stage
    key: int
    layer: int
    size: int
    sent: float = 0.0
    """When it was handed to its lane, monotonic seconds (one machine, one clock)."""

    def pack(self) -> bytes:
        """The header."""
        return HEAD.pack(self.stage, self.layer, self.key, self.size, self.sent)

    @classmethod
    def unpack(cls, raw: bytes) -> Frame:
        """The reverse. Raises ValueError for an unknown stage."""
        stage, layer, key, size, sent = HEAD.unpack(raw)
        return cls(Stage(stage), key, layer, size, sent)


@dataclass(frozen=True, slots=True)
class Arrival:
    """Bytes read in one go."""

    at: float
    stage: int
    key: int
    size: int
    lane: int


class Lane:
    """An outgoing connection that sends frames in order. ``index`` is told to the receiver."""

    def __init__(self, address: tuple[str, int], index: int) -> None:
        self.index = index
        self.sock = prepare(socket.create_connection(address, timeout=10))
        self.sock.settimeout(None)
        self.sock.sendall(struct.pack("=B", index))
        self._queue: collections.deque[tuple[Frame, Callable[[], None]]] = collections.deque()
        self._changed = threading.Condition()
        self._closed = False
        self.queued = 0
        """Payload bytes not yet handed to the socket."""
        self._thread = threading.Thread(target=self._write, name=f"lane-{index}", daemon=True)
        self._thread.start()

    def put(self, frame: Frame, announce: Callable[[], None], written: Callable[[], None]) -> None:
        """Queue a frame. ``announce`` is called at once, in the order of the queue; ``written`` after its last byte."""
        with self._changed:
            announce()
            self._queue.append((frame, written))
            self.queued += frame.size
            self._changed.notify()

    def _write(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if not self._queue:
                    return
                frame, written = self._queue.popleft()
            try:
                self.sock.sendall(frame.pack())
                left = frame.size
                while left:
                    left -= self.sock.send(_ZEROS[:left])
            except OSError:
                return  # the receiver has gone, so the run is over
            with self._changed:
                self.queued -= frame.size
            written()

    def close(self) -> None:
        """End the connection; what is queued is lost."""
        with self._changed:
            self._closed = True
            self._queue.clear()
            self._changed.notify()
        self.sock.close()


class Server:
    """Accepts lanes and reads them. ``on_frame`` is called by the reading threads, after a frame's last byte."""

    def __init__(self, port: int, on_frame: Callable[[Frame, float], None]) -> None:
        self._server = prepare(socket.create_server(("", port), backlog=64))
        self._on_frame = on_frame
        self._logs: list[list[Arrival]] = []
        threading.Thread(target=self._accept, name="accept", daemon=True).start()

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._server.getsockname()[1])

    def arrivals(self) -> list[Arrival]:
        """Everything read so far, in no order across connections."""
        return [a for log in self._logs for a in list(log)]

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            log: list[Arrival] = []
            self._logs.append(log)
            threading.Thread(target=self._read, args=(connection, log), name="reader", daemon=True).start()

    def _read(self, connection: socket.socket, log: list[Arrival]) -> None:
        buffer = bytearray(CHUNK)
        with connection:
            try:
                (lane,) = connection.recv(1) or (0,)
                while True:
                    raw = connection.recv(HEAD.size, socket.MSG_WAITALL)
                    if len(raw) < HEAD.size:
                        return
                    frame = Frame.unpack(raw)
                    left = frame.size
                    now = time.monotonic()
                    while left:
                        # MSG_TRUNC: throw the bytes away without copying them, tcp(7).
                        size = connection.recv_into(buffer, min(left, CHUNK), socket.MSG_TRUNC)
                        if not size:
                            return
                        now = time.monotonic()
                        left -= size
                        log.append(Arrival(now, frame.stage, frame.key, size, lane))
                    self._on_frame(frame, now)
            except OSError:
                return  # the sender was killed: the run is over

    def close(self) -> None:
        """Accept no more."""
        self._server.close()
