# SPDX-License-Identifier: Apache-2.0
"""Small messages between the processes of a lab, one JSON object a line, over unix sockets or pipes.

Unix sockets with a path cross network namespaces, so this is the lab's management network.
"""

from __future__ import annotations

import json
import socket
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Messages:
    """Both ends of a conversation. ``on_message`` is called by a thread of its own, one message after the other."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = threading.Lock()

    @classmethod
    def listen(cls, path: Path) -> Callable[[], Messages]:
        """Bind now; the result waits for the one peer. Raises OSError."""
        server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        server.bind(str(path))
        server.listen(1)

        def accept() -> Messages:
            with server:
                return cls(server.accept()[0])

        return accept

    @classmethod
    def connect(cls, path: Path) -> Messages:
        """Join a listening peer. Raises OSError."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(str(path))
        return cls(sock)

    def send(self, message: dict[str, Any]) -> None:
        """Say something; nothing happens when the peer has gone."""
        with self._lock:
            try:
                self._sock.sendall(json.dumps(message).encode() + b"\n")
            except OSError:
                return

    def receive(self, on_message: Callable[[dict[str, Any]], None]) -> None:
        """Start handing over what comes."""

        def read() -> None:
            with self._sock.makefile("rb") as lines:
                for line in lines:
                    on_message(json.loads(line))

        threading.Thread(target=read, name="messages", daemon=True).start()
