# SPDX-License-Identifier: Apache-2.0
"""Real connections."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field


@dataclass
class Net:
    """Makes real connections and closes them all in the end."""

    open: list[socket.socket] = field(default_factory=list)

    def listen(self, host: str, port: int = 0, *, family: int | None = None) -> socket.socket:
        family = family if family is not None else socket.AF_INET6 if ":" in host else socket.AF_INET
        server = socket.socket(family, socket.SOCK_STREAM)
        self.open.append(server)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        server.bind((host, port))
        server.listen(1024)
        return server

    def connect(
        self, server: socket.socket, host: str, *, family: int | None = None, device: str | None = None
    ) -> tuple[socket.socket, socket.socket]:
        """(client, accepted)."""
        family = family if family is not None else socket.AF_INET6 if ":" in host else socket.AF_INET
        client = socket.socket(family, socket.SOCK_STREAM)
        self.open.append(client)
        if device is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
        client.connect((host, server.getsockname()[1]))
        accepted, _ = server.accept()
        self.open.append(accepted)
        return client, accepted
