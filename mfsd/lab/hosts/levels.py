# SPDX-License-Identifier: Apache-2.0
"""Watch the levels of connections from outside, as an operator would: by asking the daemon again and again."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import grpc

from mfsd.v1 import control_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mfsd.lab.hosts.governor import Governor

PERIOD_S: Final = 0.02


@dataclass(frozen=True, slots=True)
class LevelChange:
    """From ``at`` (seconds since the beginning, when it was first seen) the lane's connection had this level."""

    at: float
    lane: int
    level: int
    """-1: the default band, -2: the scavenger."""
    rescues: int
    """Of this connection so far."""


class LevelWatch:
    """A thread that asks every ``PERIOD_S`` and keeps the changes. ``cookies``: lane -> socket cookie."""

    def __init__(self, governor: Governor, cookies: Mapping[str, int], begin: float) -> None:
        self._lanes = {cookie: int(lane) for lane, cookie in cookies.items()}
        self._control, self._begin = governor.control, begin
        self._changes: list[LevelChange] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="levels", daemon=True)
        self._thread.start()

    def stop(self) -> list[LevelChange]:
        """End the thread; the changes in order of time."""
        self._stop.set()
        self._thread.join()
        return self._changes

    def _run(self) -> None:
        last: dict[int, tuple[int, int]] = {}
        while not self._stop.wait(PERIOD_S):
            try:
                reply = self._control.ListConnections(pb.ListConnectionsRequest(), timeout=2.0)
            except grpc.RpcError:
                continue
            at = time.monotonic() - self._begin
            for connection in reply.connections:
                lane = self._lanes.get(connection.cookie)
                now = connection.level, connection.rescues
                if lane is not None and last.get(lane) != now:
                    last[lane] = now
                    self._changes.append(LevelChange(at, lane, *now))
