# SPDX-License-Identifier: Apache-2.0
"""Capabilities, as the kernel shows them (proc(5))."""

from __future__ import annotations

from typing import Final

CAP_SYS_PTRACE: Final = 19
"""include/uapi/linux/capability.h. Without it /proc/PID/exe of other users' processes can't be read."""


def effective(status: str) -> int | None:
    """Mask of effective capabilities, from the text of /proc/PID/status. None: it does not say."""
    for line in status.splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return None
