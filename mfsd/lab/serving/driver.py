# SPDX-License-Identifier: Apache-2.0
"""What drivers get and give: loop.py (one process plays all hosts), processes.py (a process per host)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import numpy.typing as npt

    from mfsd.lab.hosts.health import Measure
    from mfsd.lab.hosts.levels import LevelChange
    from mfsd.lab.hosts.net import Host
    from mfsd.lab.network import Network
    from mfsd.lab.requests import Request
    from mfsd.lab.serving.forward import Log
    from mfsd.lab.settings import Settings


@dataclass(frozen=True)
class Task:
    """Let ``work`` arrive in a governed network, and wait until all is done or patience is over."""

    network: Network
    settings: Settings
    work: Sequence[Request]
    measure: Measure
    """To be entered while requests are served."""
    on_progress: Callable[[float], None]
    """To be told the seconds since the beginning."""


@dataclass
class Part:
    """What a process plays."""

    host: str
    directory: Path
    """Of the run, for management sockets."""
    settings: Settings
    hosts: dict[str, Host]
    targets: dict[str, str]
    """Address of mfsd by host, where there is one."""
    work: list[Request]
    """All requests."""
    begin: float = 0.0
    """Monotonic time of the replay's beginning, once it is known."""

    def due(self, request: Request) -> float:
        """Monotonic time of a request's deadline."""
        return self.begin + request.at + request.slo


@dataclass
class Played:
    """What has been measured. Times in monotonic seconds."""

    begin: float
    """Of the replay."""
    log: Log
    arrivals: npt.NDArray[Any]
    """What has come over which conduit when, dtype wire.ARRIVAL."""
    hints: dict[str, int]
    """client.Stats, added up."""
    cpu_s: float
    """Processor time of the emulated serving system."""
    levels: list[LevelChange] = field(default_factory=list)
    """Of P2D conduits, where they were watched."""
