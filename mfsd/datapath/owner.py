# SPDX-License-Identifier: Apache-2.0
"""Whose something in the kernel or on disk is: a process, safe against reused pids and stepped clocks."""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from mfsd.host import clock, processes

if TYPE_CHECKING:
    from pathlib import Path

_GRAIN_S: Final = 0.015
"""Start times come in ticks of 10 ms, and may be shifted by less than one where a time namespace shifts the clock."""


def locked(*paths: Path) -> bool:
    """A process has locked one of these, perhaps one of a pid namespace whose numbers mean nothing here.

    Raises OSError.
    """
    return any(map(_locked, paths))


def _locked(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


@dataclass(frozen=True, slots=True)
class Owner:
    """A process. ``started`` is in seconds since boot, as the initial time namespace counts (host.processes)."""

    pid: int
    started: float

    @classmethod
    def me(cls) -> Self:
        """This process."""
        return cls(os.getpid(), _started(os.getpid()))

    @property
    def alive(self) -> bool:
        """It still runs (a zombie does not). Raises OSError when that can't be found out."""
        try:
            return abs(_started(self.pid) - self.started) < _GRAIN_S
        except processes.ProcessGoneError:
            return False

    @property
    def mine(self) -> bool:
        """It is this process."""
        return self.pid == os.getpid() and self.alive


def _started(pid: int) -> float:
    return processes.start_time(pid) - clock.offset_ns("boottime") / 1e9
