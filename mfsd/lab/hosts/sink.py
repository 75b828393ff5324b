# SPDX-License-Identifier: Apache-2.0
"""Reads what comes on any number of connections, in a process that does nothing else, and throws it away."""

from __future__ import annotations

import contextlib
import heapq
import select
import socket
import struct
import time
from typing import TYPE_CHECKING, Any, Final

from mfsd.lab.hosts.tcp import CHUNK, prepare

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

HEAD: Final = struct.Struct("=QQ")
"""The first bytes on a connection: a number, which says to the reader what connection it is, and the bytes/s that it is
to take at most; 0: all that comes."""
STEP_S: Final = 0.01
"""Whoever is to take no more than so many bytes/s reads what it may in so long at a time."""


def read_all(
    pipe: Connection, port: int, read: Callable[[socket.socket, int, int], None], said: Callable[[Any], None]
) -> None:
    """Accept and read until the pipe is closed, which is an EOFError. Says "listening" first.

    ``read(sock, number, size)``: what to do when so much has come; ``said``: with what the parent says.
    """
    server = prepare(socket.create_server(("", port), backlog=4096))
    poll, buffer = select.epoll(), bytearray(CHUNK)
    poll.register(server, select.EPOLLIN)
    poll.register(pipe, select.EPOLLIN)
    known: dict[int, tuple[socket.socket, int, int]] = {}
    rests: list[tuple[float, int]] = []
    """When connections that are not read now will be again: a heap."""
    until: dict[int, float] = {}
    """When they were to be, the last time."""
    pipe.send("listening")
    while True:
        ready = poll.poll(max(rests[0][0] - time.monotonic(), 0.0) + 1e-4 if rests else None)
        while rests and rests[0][0] <= time.monotonic():
            rested, fd = heapq.heappop(rests)
            if fd in known:
                until[fd] = rested
                poll.modify(fd, select.EPOLLIN)
        for fd, _ in ready:
            if fd == pipe.fileno():
                said(pipe.recv())
            elif fd == server.fileno():
                sock, _ = server.accept()
                known[sock.fileno()] = sock, *HEAD.unpack(sock.recv(HEAD.size, socket.MSG_WAITALL))
                poll.register(sock, select.EPOLLIN)
            else:
                sock, number, pace = known[fd]
                size = 0
                with contextlib.suppress(ConnectionError):
                    # MSG_TRUNC: throw the bytes away without copying them, tcp(7).
                    some = max(min(int(pace * STEP_S), CHUNK), 1) if pace else CHUNK
                    size = sock.recv_into(buffer, some, socket.MSG_TRUNC)
                    read(sock, number, size)
                if not size:
                    known.pop(fd)[0].close()
                    until.pop(fd, None)
                elif pace:
                    poll.modify(sock, 0)
                    now = time.monotonic()
                    heapq.heappush(rests, (max(until.get(fd, now), now - STEP_S) + size / pace, fd))
