# SPDX-License-Identifier: Apache-2.0
"""Was it the network that was measured, or the machine? An emulation on a busy machine measures the latter."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Final, Self

import numpy as np
import psutil

from mfsd.lab.hosts.governor import added_up

if TYPE_CHECKING:
    from collections.abc import Collection

    from mfsd.lab.hosts.governor import Governor

NAP_S: Final = 0.005
CPU_MAX: Final = 0.90
"""Share of all cores over the run, above which the machine is taken for the bottleneck."""
LATE_MAX_MS: Final = 5.0
"""99th percentile of how late a sleeping thread wakes up."""
OVERSLEPT_MAX: Final = 0.10
"""Share by which late timers made forward passes longer."""
LINK_MIN: Final = 0.90
"""Share of its rate that a contended link must have given in its best 100 ms."""


class Measure:
    """Looks after the machine, and its daemons, while requests are served. A context manager."""

    def __init__(self, governors: Collection[Governor]) -> None:
        self._governors = governors
        self.ended = 0.0
        """Monotonic seconds."""
        self.figures: dict[str, float] = {}
        """``cpu`` (0..1), ``timer_late_p99_ms``; of daemons ``mfsd_cpu`` (processors' worth), ``tick_p50_ms``."""
        self.counters: dict[str, int] = {}
        """The daemons' own, counted from entering."""
        self._late: list[float] = []
        self._stop = threading.Event()

    def __enter__(self) -> Self:
        self._began, self._before, self._spent = time.monotonic(), self._counters(), self._cpu_seconds()
        self._cpu = psutil.cpu_times()
        self._thread = threading.Thread(target=self._nap, name="health", daemon=True)
        self._thread.start()
        return self

    def _nap(self) -> None:
        while not self._stop.is_set():
            before = time.monotonic()
            time.sleep(NAP_S)
            self._late.append(time.monotonic() - before - NAP_S)

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        self.ended, before, after = time.monotonic(), self._cpu, psutil.cpu_times()
        if exc[0] is not None:  # daemons may be gone
            return
        idle = (after.idle + after.iowait) - (before.idle + before.iowait)
        self.figures = {
            "cpu": min(max(1.0 - idle / max(sum(after) - sum(before), 1e-9), 0.0), 1.0),
            "timer_late_p99_ms": float(np.percentile(self._late, 99)) * 1000,
            "mfsd_cpu": (self._cpu_seconds() - self._spent) / (self.ended - self._began),
            "tick_p50_ms": max((g.status().tick_p50_ms for g in self._governors), default=0.0),
        }
        self.counters = {k: v - self._before[k] for k, v in self._counters().items()}

    def _counters(self) -> dict[str, int]:
        return added_up(g.counters() for g in self._governors)

    def _cpu_seconds(self) -> float:
        return sum(g.cpu_seconds() for g in self._governors)


def verdict(figures: dict[str, float]) -> list[str]:
    """What is wrong with a run, in words; empty: the network was the bottleneck, as far as was measured.

    ``figures``: ``cpu``, ``timer_late_p99_ms``, ``overslept`` (share), ``link_peak`` (share of the rate).
    """
    out = []
    if (busy := figures.get("cpu", 0.0)) > CPU_MAX:
        out.append(f"the processors were {busy:.0%} busy")
    if (late := figures.get("timer_late_p99_ms", 0.0)) > LATE_MAX_MS:
        out.append(f"one in a hundred timers was more than {late:.1f} ms late")
    if (longer := figures.get("overslept", 0.0)) > OVERSLEPT_MAX:
        out.append(f"late emulated computing made forward passes {longer:.0%} longer")
    if (peak := figures.get("link_peak", 1.0)) < LINK_MIN:
        out.append(f"the busiest link gave only {peak:.0%} of its rate in its best 100 ms")
    return out
