# SPDX-License-Identifier: Apache-2.0
"""Reads what comes on any number of connections, in a process that does nothing else, and throws it away."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
from typing import TYPE_CHECKING, Any, Final

from mfsd.lab.hosts.tcp import CHUNK, prepare

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

HEAD: Final = struct.Struct("=Q")
"""The first bytes on a connection: a number, which says to the reader what connection it is."""


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
    known: dict[int, tuple[socket.socket, int]] = {}
    pipe.send("listening")
    while True:
        for fd, _ in poll.poll():
            if fd == pipe.fileno():
                said(pipe.recv())
            elif fd == server.fileno():
                sock, _ = server.accept()
                (number,) = HEAD.unpack(sock.recv(HEAD.size, socket.MSG_WAITALL))
                known[sock.fileno()] = sock, number
                poll.register(sock, select.EPOLLIN)
            else:
                sock, number = known[fd]
                size = 0
                with contextlib.suppress(ConnectionError):
                    # MSG_TRUNC: throw the bytes away without copying them, tcp(7).
                    size = sock.recv_into(buffer, CHUNK, socket.MSG_TRUNC)
                    read(sock, number, size)
                if not size:
                    known.pop(fd)[0].close()
