# SPDX-License-Identifier: Apache-2.0
"""The kernel's monotonic clock, which BPF programs read, also where this process is shown another one.

In a time namespace CLOCK_MONOTONIC and CLOCK_BOOTTIME are shifted by fixed offsets (time_namespaces(7)). What is
written for the kernel to compare, or for a process outside to read, must be without them.
"""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Final

_NS: Final = 1_000_000_000


@functools.cache
def offset_ns(clock: str) -> int:
    """How far "monotonic" or "boottime" is ahead of the kernel's own in this process. They are fixed while it runs."""
    try:
        # The file tells of the namespace of future children; this process may still be in another one.
        if Path("/proc/self/ns/time").readlink() != Path("/proc/self/ns/time_for_children").readlink():
            return 0
        text = Path("/proc/self/timens_offsets").read_text(encoding="ascii")
    except FileNotFoundError:  # before Linux 5.6, or without CONFIG_TIME_NS
        return 0
    for line in text.splitlines():
        name, seconds, nanoseconds = line.split()
        if name == clock:
            return int(seconds) * _NS + int(nanoseconds)
    return 0


def monotonic_ns() -> int:
    """As bpf_ktime_get_ns()."""
    return time.monotonic_ns() - offset_ns("monotonic")


def monotonic() -> float:
    """The same in seconds."""
    return time.monotonic() - offset_ns("monotonic") / _NS
