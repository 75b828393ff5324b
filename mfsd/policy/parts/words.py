# SPDX-License-Identifier: Apache-2.0
"""Numbers as operators read them."""

from __future__ import annotations

import math

STAGES = {0: "unstaged", 1: "KV reuse (stage 1)", 2: "collective (stage 2)", 3: "prefill-to-decode (stage 3)"}


def seconds(value: float) -> str:
    """``0.0421`` -> ``42.1 ms``."""
    if math.isinf(value):
        return "for ever" if value > 0 else "never"
    if abs(value) < 1e-3:
        return f"{value * 1e6:.0f} us"
    return f"{value * 1e3:.3g} ms" if abs(value) < 1 else f"{value:.3g} s"


def size(value: float) -> str:
    """``1500000`` -> ``1.5 MB``."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f} B"


def rate(value: float) -> str:
    """Bytes/s -> ``1 Gbit/s``."""
    bits = value * 8
    for unit, scale in (("Gbit/s", 1e9), ("Mbit/s", 1e6), ("kbit/s", 1e3)):
        if bits >= scale:
            return f"{bits / scale:.3g} {unit}"
    return f"{bits:.0f} bit/s"
