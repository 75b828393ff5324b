# SPDX-License-Identifier: Apache-2.0
"""Watch the levels of connections from outside, as an operator would: by asking the daemon again and again."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

import grpc

from mfsd.v1 import control_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mfsd.lab.hosts.governor import Governor

PERIOD_S: Final = 0.02


@dataclass(frozen=True, slots=True)
class LevelChange:
    """From ``at`` (monotonic seconds, when it was first seen) the conduit had this level."""

    at: float
    conduit: int
    level: int
    """-1: the default band, -2: the scavenger."""
    rescues: int
    """Of this connection so far."""


class LevelWatch:
    """A thread that asks every ``PERIOD_S``. ``cookies``: conduit -> socket cookie. A context manager."""

    def __init__(self, governor: Governor, cookies: Mapping[int, int]) -> None:
        self._control, self._conduits = governor.control, {cookie: number for number, cookie in cookies.items()}
        self.changes: list[LevelChange] = []
        """In order of time."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="levels", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        last: dict[int, tuple[int, int]] = {}
        while not self._stop.wait(PERIOD_S):
            try:
                reply = self._control.ListConnections(pb.ListConnectionsRequest(), timeout=2.0)
            except grpc.RpcError:
                continue
            at = time.monotonic()
            for connection in reply.connections:
                conduit, now = self._conduits.get(connection.cookie), (connection.level, connection.rescues)
                if conduit is not None and last.get(conduit) != now:
                    last[conduit] = now
                    self.changes.append(LevelChange(at, conduit, *now))
