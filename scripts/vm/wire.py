# SPDX-License-Identifier: Apache-2.0
"""A slow wire between two network cards of a guest, so that their drivers push back as real ones do.

A veth never pushes back: bare prio on it has nothing to put in order. The cards are virtio-net; qemu hands their frames
to this process over Unix sockets, a length before each frame. The relay passes them on at a fixed rate in one
direction. When it is late, the socket fills, then the card's ring, and then the driver stops its transmit queue.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from pathlib import Path

MBIT: Final = 50
"""From the first card to the second; the way back is as fast as it gets."""
_CHUNK: Final = 4096
_BUFFER: Final = 16384
"""Of each socket, bytes: what waits here is beyond any band."""
_CATCH_UP_S: Final = 0.005
"""What a late wake-up may make good for."""


class Wire:
    """Listens on two sockets; whoever connects is joined. A context manager, whose threads end with it."""

    def __init__(self, folder: Path) -> None:
        self.paths = (folder / "wire0", folder / "wire1")
        self._listeners = [_listen(path) for path in self.paths]
        self._ends: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._join, daemon=True)]

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *exc: object) -> None:
        for s in (*self._listeners, *self._ends):
            with contextlib.suppress(OSError):  # not connected (any more)
                s.shutdown(socket.SHUT_RDWR)
            s.close()
        for thread in self._threads:
            thread.join(5)
        for path in self.paths:
            path.unlink(missing_ok=True)

    def _join(self) -> None:
        for listener in self._listeners:
            try:
                end, _ = listener.accept()
            except OSError:  # closed before qemu came
                return
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
            self._ends.append(end)
        first, second = self._ends
        for source, to, rate in ((first, second, MBIT * 125_000), (second, first, None)):
            thread = threading.Thread(target=_relay, args=(source, to, rate), daemon=True)
            self._threads.append(thread)
            thread.start()


def _listen(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen(1)
    return listener


def _relay(source: socket.socket, to: socket.socket, rate: int | None) -> None:
    """Copy until either side is closed, at ``rate`` bytes/s."""
    due = time.monotonic()
    with contextlib.suppress(OSError):
        while data := source.recv(_CHUNK):
            to.sendall(data)
            if rate is None:
                continue
            now = time.monotonic()
            due = max(due, now - _CATCH_UP_S) + len(data) / rate
            if due > now:
                time.sleep(due - now)
