# SPDX-License-Identifier: Apache-2.0
"""The systemd unit, as far as it can be checked without a running systemd."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

UNIT = Path(__file__).resolve().parents[2] / "systemd" / "mfsd.service"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_accepts_it(tmp_path: Path) -> None:
    # The program is not installed where the tests run; everything else is checked as it is.
    unit = tmp_path / "mfsd.service"
    unit.write_text(UNIT.read_text().replace("ExecStart=/usr/bin/mfsd", f"ExecStart={sys.executable}"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], check=False, capture_output=True, text=True
    )
    ours = [line for line in done.stderr.splitlines() if "mfsd" in line]
    assert done.returncode == 0, done.stderr
    assert not ours


def test_two_capabilities_suffice() -> None:
    lines = UNIT.read_text().splitlines()
    for key in ("AmbientCapabilities", "CapabilityBoundingSet"):
        assert f"{key}=CAP_BPF CAP_NET_ADMIN" in lines
