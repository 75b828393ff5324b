# SPDX-License-Identifier: Apache-2.0
"""An empty machine for the doctor, and what it finds there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mfsd.daemon.config import Config, DaemonConfig, DeviceConfig

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from mfsd.doctor import Context, Finding


def only(findings: Iterable[Finding]) -> Finding:
    (found,) = findings
    return found


def config(tmp_path: Path, *devices: DeviceConfig) -> Config:
    return Config(daemon=DaemonConfig(socket=tmp_path / "s", state_dir=tmp_path / "state"), device=devices)


def put(context: Context, path: str, text: str) -> None:
    target = context.root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text + "\n")
