# SPDX-License-Identifier: Apache-2.0
"""Devices behind bridges whose packets netfilter sees, which takes their socket away (br_netfilter_hooks.c)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

_TABLES: Final = ("iptables", "ip6tables")


def netfilter_sees(device: str, root: Path = Path("/")) -> str:
    """Name of the bridge that a device is a port of, if it is such a one; else empty. Two or three small files.

    ``root`` stands before /proc and /sys.
    """
    bridge = root / "sys/class/net" / device / "brport/bridge"
    if not bridge.exists():
        return ""
    own = [bridge / f"bridge/nf_call_{table}" for table in _TABLES]
    general = [root / f"proc/sys/net/bridge/bridge-nf-call-{table}" for table in _TABLES]
    return bridge.resolve().name if any(_on(path) for path in (*own, *general)) else ""


def notices(devices: Iterable[str]) -> list[str]:
    """What operators should know of devices."""
    return [
        f"{device}: netfilter sees what {bridge} brings, so hints by socket do nothing for its pods (mfsctl doctor)"
        for device in devices
        if (bridge := netfilter_sees(device))
    ]


def _on(path: Path) -> bool:
    try:
        return path.read_text(encoding="ascii").strip() == "1"
    except OSError:
        return False  # no br_netfilter here
