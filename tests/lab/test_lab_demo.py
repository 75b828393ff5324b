# SPDX-License-Identifier: Apache-2.0
"""A few seconds of the demo and of the promotion experiment, with the real daemon."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from mfsd.ground.units import Rate
from mfsd.lab import far
from mfsd.lab.hosts.enter import NETNS_DIR
from mfsd.lab.hosts.governor import environment
from mfsd.lab.promotion import Settings, run

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.netns,
    pytest.mark.bpf,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make network namespaces"),
]


def test_the_demo_writes_what_it_measured_and_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mfsd.lab", "demo", "--duration", "4", "--no-promotion", "--out", str(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment()) as demo:
        _, said = demo.communicate(timeout=120)
    assert demo.returncode == 0, said[-2000:]
    data = json.loads((tmp_path / "demo.json").read_text())
    for arm in (data["off"], data["on"]):
        assert {"requests", "deadlines_met", "ttft_p50_ms", "ttft_p99_ms"} <= arm.keys()
        assert arm["requests"] > 0
        assert arm["never_done"] == 0
        assert 0 <= arm["deadlines_met"] <= arm["requests"]
    assert data["off"]["requests"] == data["on"]["requests"]
    assert data["off"]["mfsd"] == {}
    counters = data["on"]["mfsd"]
    assert counters["hints_accepted"] > 0
    assert counters["hints_rejected"] == 0
    assert counters["transfers_completed"] > 0
    assert data["commit"]
    assert data["machine"]["kernel"]
    assert data["settings"]["transport"] == "sockets"
    assert (tmp_path / "demo.html").read_text().count("data:image/png;base64,") == 3
    network = data["network"]
    assert list(network) == ["bands alone", "network.yield"]
    for arm in network.values():
        assert len(arm["slowdown"]) == far.BANDS.small
        assert min(arm["slowdown"]) > 0.5
    assert network["network.yield"]["slowdown_p50"] < network["bands alone"]["slowdown_p50"]
    assert not list(NETNS_DIR.glob(f"mfsd-{demo.pid}x*"))


def test_rescue_promotes_what_plain_reclassification_leaves_stuck() -> None:
    rate = Rate.parse("1gbit")
    rescued = run(Settings(flows=4, rescue=True, trials=3, watch=0.5, rate=rate))
    plain = run(Settings(flows=4, rescue=False, trials=2, watch=0.5, rate=rate))
    assert all(t.latency_ms is not None for t in rescued)
    assert all(t.retransmitted > 0 for t in rescued), "a rescue purges, and TCP repeats"
    assert all(t.retransmitted == 0 for t in plain)
    assert max(t.first_ms or 0.0 for t in rescued) < 500
