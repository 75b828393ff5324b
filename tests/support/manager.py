# SPDX-License-Identifier: Apache-2.0
"""What a daemon under systemd sees of it: notes, a store of descriptors, and a start with what is stored."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FIRST = 3
"""SD_LISTEN_FDS_START, sd_listen_fds(3)."""


class Manager:
    """Keeps what it is told to keep, by name."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "notify"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self._path))
        self.stored: dict[str, int] = {}
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while True:
            data, fds, _flags, _address = socket.recv_fds(self._socket, 4096, 8)
            said = dict(line.split("=", 1) for line in data.decode().splitlines())
            if said.get("STOP") == "1":
                return
            name = said.get("FDNAME", "")
            with self._lock:
                if "FDSTOREREMOVE" in said and name in self.stored:
                    os.close(self.stored.pop(name))
                for fd in fds:
                    self.stored[name] = fd

    def start(self) -> tuple[dict[str, str], tuple[str, ...], tuple[int, ...]]:
        """For the next process: environment, what goes before its command, descriptors to pass on."""
        with self._lock:
            stored = dict(self.stored)
        moves = " ".join(f"{FIRST + 100 + i}<&{fd}" for i, fd in enumerate(stored.values()))
        moves += " " + " ".join(f"{FIRST + i}<&{FIRST + 100 + i}" for i in range(len(stored)))
        close = " ".join(f"{FIRST + 100 + i}<&-" for i in range(len(stored)))
        script = f'exec {moves}; exec {close}; LISTEN_PID=$$ exec "$@"' if stored else 'exec "$@"'
        environment = {"NOTIFY_SOCKET": str(self._path)}
        if stored:
            environment |= {"LISTEN_FDS": str(len(stored)), "LISTEN_FDNAMES": ":".join(stored)}
        return environment, ("bash", "-c", script, "bash"), tuple(stored.values())

    def close(self) -> None:
        """Let go of everything."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
            end.sendto(b"STOP=1", str(self._path))
        self._thread.join()
        self._socket.close()
        for fd in self.stored.values():
            os.close(fd)
        self.stored.clear()


@contextlib.contextmanager
def managed(folder: Path) -> Iterator[Manager]:
    """One, closed afterwards."""
    manager = Manager(folder)
    try:
        yield manager
    finally:
        manager.close()
