# SPDX-License-Identifier: Apache-2.0
"""Devices under governance in the namespace of the calling thread, and what happens to them by ip(8) and tc(8)."""

from __future__ import annotations

import shlex
import subprocess
from typing import TYPE_CHECKING, Any

from mfsd.daemon import config_bands
from mfsd.daemon.config import parse
from mfsd.daemon.devices import Devices

if TYPE_CHECKING:
    from pathlib import Path

    from mfsd.daemon.predecessor import Predecessor


def sh(command: str) -> str:
    """Run a command; what it printed."""
    return subprocess.run(shlex.split(command), check=True, capture_output=True, text=True).stdout


def root(device: str) -> str:
    """Kind of the root qdisc."""
    return sh(f"tc qdisc show dev {device} root").split()[1]


def add_w(more: str = "") -> None:
    """A veth pair w0, w1."""
    sh(f"ip link add w0 {more} type veth peer name w1")
    for name in ("w0", "w1"):
        sh(f"ip link set {name} up")


def rename(old: str, new: str) -> None:
    """Which only a device that is down can be."""
    sh(f"ip link set {old} down")
    sh(f"ip link set {old} name {new}")
    sh(f"ip link set {new} up")


def governed(
    state_dir: Path, *devices: dict[str, Any], predecessor: Predecessor | None = None, daemon: Any = None, **more: Any
) -> Devices:
    """Devices of [[device]] sections, not cared for yet; ``daemon`` and ``more``: other sections."""
    state_dir.mkdir(exist_ok=True)
    own = {"state_dir": str(state_dir), "mode": "enforce", "slots": 64} | (daemon or {})
    config = parse({"daemon": own, "device": list(devices), **more})
    return Devices(config, config_bands.bands_of(config, config_bands.policy_of(config)), predecessor)


def end(devices: Devices) -> None:
    """As a daemon that stops."""
    devices.restore([d.name for d in devices.all])
    devices.close()
