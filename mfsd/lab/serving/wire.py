# SPDX-License-Identifier: Apache-2.0
"""Framed bytes over long-lived TCP connections, driven by an event loop.

A process has the ends of the hosts that it plays, each in its host's network namespace, be it all hosts of a cluster or
one. Payloads are zeros that nobody looks at, so the reader has the kernel throw them away. Headers say what frames are.
"""

from __future__ import annotations

import asyncio
import collections
import socket
import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

import numpy as np

from mfsd.client import Cookie, cookie_of
from mfsd.lab.hosts.enter import inside
from mfsd.lab.hosts.tcp import CHUNK, prepare, queued, reset_at_close

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from mfsd.ground.model import Stage
    from mfsd.lab.hosts.net import Host
    from mfsd.lab.settings import Conduit

PORT: Final = 7100
BACKLOG: Final = 4096
"""Connections that wait to be accepted: in one process nobody accepts while it connects."""
HELLO: Final = struct.Struct("=I")
"""The first bytes on a connection: number of its conduit."""
HEAD: Final = struct.Struct("=III")
"""Of a frame: key (a request, or a collective's exchange), step, payload bytes."""
ARRIVAL: Final = np.dtype([("at", "f8"), ("conduit", "u4"), ("key", "u4"), ("size", "u4")])
"""Bytes of one frame, read in one go; ``at`` in monotonic seconds."""
_ZEROS: Final = memoryview(bytes(CHUNK))
_SINK: Final = bytearray(CHUNK)


@dataclass(slots=True)
class _Frame:
    head: bytes
    left: int
    written: Callable[[], None] | None


class Sender:
    """The sending end of a conduit; frames go out in the order of ``put``."""

    def __init__(self, conduit: Conduit, sock: socket.socket) -> None:
        self.conduit, self.sock = conduit, sock
        self.cookie = Cookie(cookie_of(sock))
        """What hints name it by."""
        self._loop = asyncio.get_running_loop()
        self._frames: collections.deque[_Frame] = collections.deque()
        self._unsent = 0
        self._busy = self._polled = False
        """It will write; it does so when the socket says that it can."""
        sock.setblocking(False)

    @property
    def queued(self) -> int:
        """Bytes that the other end has not acknowledged yet."""
        return self._unsent + queued(self.sock)

    def put(self, key: int, step: int, size: int, written: Callable[[], None] | None = None) -> None:
        """Send ``size`` bytes; ``written`` is called when the socket has taken the last one.

        Not at once, but as soon as the caller waits for something: a GPU would not wait for the copying.
        """
        self._unsent += size
        self._frames.append(_Frame(HEAD.pack(key, step, size), size, written))
        if not self._busy:
            self._busy = True
            self._loop.call_soon(self._write)

    def _write(self) -> None:
        """Send one piece, and come back for the others."""
        budget = CHUNK
        while self._frames and budget > 0:
            frame = self._frames[0]
            try:
                sent = self.sock.sendmsg((frame.head, _ZEROS[: frame.left]))
            except BlockingIOError:
                break
            except ConnectionError:  # the receiver has gone, so the run is over
                self._frames.clear()
                break
            payload = max(sent - len(frame.head), 0)
            frame.head = frame.head[sent:]
            frame.left -= payload
            self._unsent -= payload
            budget -= payload
            if not frame.left:
                self._frames.popleft()
                if frame.written is not None:
                    frame.written()
        self._busy = bool(self._frames)
        if self._busy and not self._polled:
            self._loop.add_writer(self.sock, self._write)
        elif self._polled and not self._busy:
            self._loop.remove_writer(self.sock)
        self._polled = self._busy

    def close(self) -> None:
        """End the connection; what is on its way is lost."""
        self._frames.clear()
        if self._polled:
            self._loop.remove_writer(self.sock)
        _reset(self.sock)


class _Receiver:
    """The receiving end of a conduit, which the first bytes name."""

    def __init__(self, ends: Ends, sock: socket.socket) -> None:
        self._ends, self.sock = ends, sock
        self._conduit: Conduit | None = None
        self._head = b""
        self._key = self._step = self._left = 0
        self._loop = asyncio.get_running_loop()
        sock.setblocking(False)
        self._loop.add_reader(sock, self._read)

    def _read(self) -> None:
        try:
            more = self._some()
        except BlockingIOError:
            return
        except ConnectionError:  # the sender has gone, so the run is over
            more = False
        if not more:
            self._loop.remove_reader(self.sock)

    def _some(self) -> bool:
        """Read a header and what there is of its payload; False: there will be no more."""
        if not self._left:
            form = HELLO if self._conduit is None else HEAD
            raw = self.sock.recv(form.size - len(self._head))
            self._head += raw
            if len(self._head) < form.size:
                return bool(raw)
            head, self._head = form.unpack(self._head), b""
            if self._conduit is None:
                self._conduit = self._ends.conduits[head[0]]
                return True
            self._key, self._step, self._left = head
        assert self._conduit is not None  # noqa: S101 - for the type checker
        # MSG_TRUNC: throw the bytes away without copying them, tcp(7).
        size = self.sock.recv_into(_SINK, min(self._left, CHUNK), socket.MSG_TRUNC)
        now = time.monotonic()
        self._left -= size
        self._ends.arrivals.append((now, self._conduit.number, self._key, size))
        if not self._left:
            deliver = self._ends.deliver.get((self._conduit.stage, self._conduit.instance))
            if deliver is not None:
                deliver(self._key, self._step, now)
        return bool(size)

    def close(self) -> None:
        """Stop reading."""
        self._loop.remove_reader(self.sock)
        _reset(self.sock)


class Ends:
    """The ends of all conduits at the ``local`` hosts. A context manager: leaving closes them.

    To be used inside a running event loop.
    """

    def __init__(self, conduits: Sequence[Conduit], hosts: Mapping[str, Host], local: Collection[str]) -> None:
        self.conduits = conduits
        self.deliver: dict[tuple[Stage, int], Callable[[int, int, float], None]] = {}
        """By stage and instance: what is called after a frame's last byte, with its key and step and the time."""
        self.senders: list[Sender] = []
        self.arrivals: list[tuple[float, int, int, int]] = []
        """Rows of ARRIVAL."""
        self._hosts, self._local = hosts, local
        self._by_pair: dict[tuple[Stage, int, str, str], list[Sender]] = collections.defaultdict(list)
        self._receivers: list[_Receiver] = []
        self._listeners: list[socket.socket] = []
        self._loop = asyncio.get_running_loop()

    def listen(self) -> None:
        """Accept what other ends connect."""
        for name in self._local:
            host = self._hosts[name]
            with inside(host.namespace):
                listener = prepare(socket.create_server((host.address, PORT), backlog=BACKLOG))
            listener.setblocking(False)
            self._listeners.append(listener)
            self._loop.add_reader(listener, self._accept, listener)

    def _accept(self, listener: socket.socket) -> None:
        sock, _ = listener.accept()
        self._receivers.append(_Receiver(self, prepare(sock)))

    def connect(self) -> None:
        """Open the conduits that begin here; all hosts must listen."""
        for conduit in self.conduits:
            if conduit.src in self._local:
                with inside(self._hosts[conduit.src].namespace):
                    address = self._hosts[conduit.dst].address, PORT
                    sock = prepare(socket.create_connection(address, timeout=10))
                sock.sendall(HELLO.pack(conduit.number))
                sender = Sender(conduit, sock)
                self.senders.append(sender)
                self._by_pair[conduit.stage, conduit.instance, conduit.src, conduit.dst].append(sender)

    def of(self, stage: Stage, instance: int, src: str, dst: str) -> list[Sender]:
        """Senders of a stage and instance from one host to another."""
        return self._by_pair[stage, instance, src, dst]

    def group(self, stage: Stage, instance: int) -> list[Sender]:
        """Senders of a stage and instance, from and to wherever."""
        return [s for s in self.senders if (s.conduit.stage, s.conduit.instance) == (stage, instance)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for sender in self.senders:
            sender.close()
        for receiver in self._receivers:
            receiver.close()
        for listener in self._listeners:
            self._loop.remove_reader(listener)
            listener.close()


def _reset(sock: socket.socket) -> None:
    """Close without draining: nobody wants the bytes, and the next run must find an empty network."""
    reset_at_close(sock)
    sock.close()
