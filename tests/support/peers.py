# SPDX-License-Identifier: Apache-2.0
"""Clients that introduce themselves, in this process and in others."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PATIENCE_S: Final = 20.0


@dataclass
class Introduced:
    """A connection to the socket that says who is who."""

    sock: socket.socket
    line: str

    @classmethod
    def to(cls, daemon_socket: Path) -> Self:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(PATIENCE_S)
        sock.connect(f"{daemon_socket}.id")
        with sock.makefile() as lines:
            return cls(sock, lines.readline().strip())

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Of a call."""
        return (("mfsd-token", self.line),)

    def close(self) -> None:
        self.sock.close()

    def hung_up(self) -> bool:
        """Waits for it."""
        with contextlib.suppress(ConnectionResetError):
            return self.sock.recv(1) == b""
        return True


WORKER: Final = """
import os, sys
from mfsd.client import Client
client = Client(sys.argv[2], sys.argv[1])
client.request("r", ttft_left_s=60.0)
print(client.flush(20), os.getpid(), client.stats.rejected, flush=True)
input()
"""


@contextlib.contextmanager
def worker(
    target: str, session: str = "worker", wrapper: tuple[str, ...] = ()
) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """A process with a client that has announced a request; what it says: flushed, its own pid, rejected."""
    with subprocess.Popen(
        [*wrapper, sys.executable, "-c", WORKER, target, session],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            yield process, process.stdout.readline().split()
        finally:
            process.kill()
