# SPDX-License-Identifier: Apache-2.0
"""What NCCL's profiler plugin (nccl/profiler.c) says, turned into hints: the plugin starts this, nobody else does.

    python3 -m mfsd.integrations.nccl       (its standard input is the plugin's socket)

Each datagram is one of

    mark COMM COOKIE            a connection of a communicator
    begin COMM SEQUENCE BYTES   a collective or a send begins on the network; bytes that this rank sends, about
    end COMM SEQUENCE           it is over
    over COMM                   the communicator is gone

A communicator's connections are marked as stage 2. What begins is announced, as spread evenly over them. All of it ends
with the process that has NCCL, at the latest.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

from mfsd.client import Cookie, Stage, Transfer
from mfsd.integrations import guard

if TYPE_CHECKING:
    from mfsd.client import Client

LINE: Final = 128
LEAST: Final = 65_536
"""Bytes; what is smaller is over before its hint counts."""
GOING_ON: Final = 64
"""Operations of a communicator that are followed; the oldest go first."""
CONNECTIONS: Final = 64
"""Over so many of its connections its bytes are announced; with more the mark must do."""


class _Communicator:
    def __init__(self) -> None:
        self.cookies: list[int] = []
        self.going_on: OrderedDict[str, list[str]] = OrderedDict()
        """By sequence: names of transfers."""


class Bridge:
    """From lines to hints."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._comms: dict[str, _Communicator] = {}
        self._guard = guard.Guard()

    def hear(self, line: str) -> None:
        """One datagram. What is not understood is left alone: the plugin may be newer."""
        self._guard("a hint of NCCL's", lambda: self._hear(line.split()))

    def _hear(self, words: list[str]) -> None:
        match words:
            case ["mark", comm, cookie]:
                self._comms.setdefault(comm, _Communicator()).cookies.append(int(cookie))
                self._client.mark(Cookie(int(cookie)), Stage.COLLECTIVE)
            case ["begin", comm, sequence, size]:
                self._begin(comm, sequence, int(size))
            case ["end", comm, sequence]:
                self._end(comm, sequence)
            case ["over", comm]:
                self._over(comm)

    def _begin(self, comm: str, sequence: str, size: int) -> None:
        one = self._comms.get(comm)
        if one is None or not 0 < len(one.cookies) <= CONNECTIONS or size < LEAST:
            return
        names = [f"nccl/{comm}/{sequence}/{i}" for i in range(len(one.cookies))]
        each = size // len(names)
        self._client.transfers(
            Transfer(name, Cookie(cookie), each, Stage.COLLECTIVE, interleaved=True)
            for name, cookie in zip(names, one.cookies, strict=True)
        )
        one.going_on[sequence] = names
        if len(one.going_on) > GOING_ON:
            self._end(comm, next(iter(one.going_on)))

    def _end(self, comm: str, sequence: str) -> None:
        one = self._comms.get(comm)
        for name in one.going_on.pop(sequence, ()) if one is not None else ():
            self._client.done(transfer=name)

    def _over(self, comm: str) -> None:
        one = self._comms.pop(comm, None)
        if one is None:
            return
        for names in one.going_on.values():
            for name in names:
                self._client.done(transfer=name)
        for cookie in one.cookies:
            self._client.unmark(Cookie(cookie))


def main() -> None:
    """Listen until the plugin's process ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(fileno=os.dup(0)) as plugin, guard.client() as client:
        bridge = Bridge(client)
        with contextlib.suppress(ConnectionError):
            while line := plugin.recv(LINE):
                bridge.hear(line.decode(errors="replace"))


if __name__ == "__main__":
    main()
