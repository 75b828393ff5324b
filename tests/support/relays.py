# SPDX-License-Identifier: Apache-2.0
"""Two daemons of this process that exchange hints: 127.0.0.2 sends, 127.0.0.1 waits."""

from __future__ import annotations

import contextlib
import socket
import time
from typing import TYPE_CHECKING, Any

from mfsd.client import tuple_of
from support.daemons import Running

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from mfsd.lab.hosts.certificates import Papers

SENDER, WAITER = "127.0.0.2", "127.0.0.1"


def free_port() -> int:
    with socket.create_server((SENDER, 0)) as s:
        return int(s.getsockname()[1])


class Hosts:
    """A daemon that sends and one that waits."""

    def __init__(self, folder: Path, papers: Papers, own: Papers) -> None:
        self.folder, self.papers, self.own = folder, papers, own
        self.port = free_port()
        self.sender = self.start_sender()
        (folder / "w").mkdir()
        relay = {"peers": [f"{SENDER}:{self.port}"], **own.settings}
        self.waiter = Running(folder / "w", relay=relay)

    def start_sender(self, **more: Any) -> Running:
        (self.folder / "s").mkdir(exist_ok=True)
        limits = more.pop("limits", {})
        relay = {"listen": f"{SENDER}:{self.port}", "allow": ["waiter.test"], **self.papers.settings} | more
        return Running(self.folder / "s", relay=relay, limits=limits)

    def stop(self) -> None:
        self.waiter.stop()
        self.sender.stop()


@contextlib.contextmanager
def connection() -> Iterator[tuple[socket.socket, socket.socket]]:
    """(the end that sends, the one that waits)."""
    with socket.create_server((SENDER, 0)) as listener:
        waits = socket.create_connection(listener.getsockname())
        sends, _ = listener.accept()
        with sends, waits:
            yield sends, waits


def from_sender(sends: socket.socket) -> Any:
    return tuple_of(WAITER, 0, SENDER, sends.getsockname()[1])


def transfers(daemon: Running) -> dict[str, float]:
    """Time left by name, of the transfers that a daemon knows."""
    return daemon.ask(
        lambda e: {
            t.id: float(e.books.transfers.get(t, "deadline")) - time.monotonic()
            for s in e.books.sessions.values()
            for t in s.transfers.values()
        }
    )
