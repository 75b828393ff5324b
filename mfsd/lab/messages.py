# SPDX-License-Identifier: Apache-2.0
"""Messages on one connection, each of which is answered when it is there: how long that takes."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from typing import TYPE_CHECKING, Final, Self

from mfsd.lab.hosts.child import Child, parent
from mfsd.lab.hosts.enter import enter, inside
from mfsd.lab.hosts.tcp import CHUNK, prepare

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from mfsd.lab.hosts.net import Host

PORT: Final = 7100
ANSWER_S: Final = 30.0
HEAD: Final = struct.Struct("=I")
"""Before each message: its size, the head not counted."""


class Messages:
    """One connection between two hosts, with a process that answers. A context manager."""

    def __init__(self, source: Host, sink: Host) -> None:
        self._source, self._sink = source, sink
        self._stack = contextlib.ExitStack()
        self.socket: socket.socket

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            answerer = stack.enter_context(Child(__name__, "the one who answers messages"))
            answerer.say(self._sink.namespace)
            answerer.hear(ANSWER_S)
            with inside(self._source.namespace):
                self.socket = stack.enter_context(prepare(socket.socket(socket.AF_INET, socket.SOCK_STREAM)))
                self.socket.connect((self._sink.address, PORT))
            self.socket.settimeout(ANSWER_S)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def send(self, size: int) -> float:
        """Seconds from the first byte of a message of ``size`` bytes to its answer. Raises TimeoutError."""
        message = HEAD.pack(size) + bytes(size)
        begin = time.monotonic()
        self.socket.sendall(message)
        self.socket.recv(1)
        return time.monotonic() - begin


def answer(pipe: Connection) -> None:
    """Answer messages until the connection ends."""
    with prepare(socket.create_server(("", PORT))) as server:
        pipe.send("listening")
        connection, _ = server.accept()
    buffer = bytearray(CHUNK)
    with connection:
        while head := connection.recv(HEAD.size, socket.MSG_WAITALL):
            (left,) = HEAD.unpack(head)
            while left:
                left -= connection.recv_into(buffer, min(left, CHUNK), socket.MSG_TRUNC)
            connection.sendall(b".")


def main() -> None:
    """Be the process that answers."""
    pipe = parent()
    enter(pipe.recv())
    with contextlib.suppress(EOFError, ConnectionError):
        answer(pipe)


if __name__ == "__main__":
    main()
