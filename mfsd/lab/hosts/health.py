# SPDX-License-Identifier: Apache-2.0
"""Was it the network that was measured, or the machine? An emulation on a busy machine measures the latter."""

from __future__ import annotations

import threading
import time
from typing import Final

import numpy as np
import psutil

NAP_S: Final = 0.005
CPU_MAX: Final = 0.90
"""Share of all cores over the run, above which the machine is taken for the bottleneck."""
LATE_MAX_MS: Final = 5.0
"""99th percentile of how late a sleeping thread wakes up."""
OVERSLEPT_MAX: Final = 0.10
"""Share by which late timers made the emulated computing, or the passes that it is part of, longer."""
LINK_MIN: Final = 0.90
"""Share of its rate that a contended link must have given in its best 100 ms."""


class Probe:
    """Measures the machine from its making to ``stop``: processor use and how late timers fire."""

    def __init__(self) -> None:
        self._late: list[float] = []
        self._stop = threading.Event()
        self._cpu = psutil.cpu_times()
        self._thread = threading.Thread(target=self._nap, name="probe", daemon=True)
        self._thread.start()

    def _nap(self) -> None:
        while not self._stop.is_set():
            before = time.monotonic()
            time.sleep(NAP_S)
            self._late.append(time.monotonic() - before - NAP_S)

    def stop(self) -> dict[str, float]:
        """Figures by name: ``cpu`` (0..1), ``timer_late_p99_ms``."""
        self._stop.set()
        self._thread.join()
        before, after = self._cpu, psutil.cpu_times()
        total = sum(after) - sum(before)
        idle = (after.idle + after.iowait) - (before.idle + before.iowait)
        late = float(np.percentile(self._late, 99)) if self._late else 0.0
        return {"cpu": min(max(1.0 - idle / total, 0.0), 1.0) if total > 0 else 0.0, "timer_late_p99_ms": late * 1000}


def verdict(figures: dict[str, float]) -> list[str]:
    """What is wrong with a run, in words; empty: the network was the bottleneck.

    ``figures``: ``cpu``, ``timer_late_p99_ms``, ``overslept`` (share), ``link_peak`` (share of the rate).
    """
    out = []
    if figures["cpu"] > CPU_MAX:
        out.append(f"the processors were {figures['cpu']:.0%} busy")
    if figures["timer_late_p99_ms"] > LATE_MAX_MS:
        out.append(f"one in a hundred timers was more than {figures['timer_late_p99_ms']:.1f} ms late")
    if figures["overslept"] > OVERSLEPT_MAX:
        out.append(f"emulated computing took {figures['overslept']:.0%} longer than meant")
    if figures["link_peak"] < LINK_MIN:
        out.append(f"the busiest link gave only {figures['link_peak']:.0%} of its rate in its best 100 ms")
    return out
