# SPDX-License-Identifier: Apache-2.0
"""The lab over gloo and Mooncake's transfer engine: everything but the transports, which are an extra."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from mfsd.daemon.main import main
from mfsd.lab.models import MIXTRAL, Scaled
from mfsd.lab.real import run as real
from mfsd.lab.real.memory import SLICE, Memory, Watch
from mfsd.lab.workload import Job
from mfsd.units import Rate

SCALED = Scaled(MIXTRAL, Rate.parse("200mbit"), 2, 4)
JOBS = [Job(0, 0.0, 0, 60_000, 512, 0, 0.1, 0.3), Job(1, 0.5, 1, 300, 300, 0, 0.1, 0.3)]
INSTALLED = all(importlib.util.find_spec(m) is not None for m in ("torch", "mooncake"))


def test_regions_lie_side_by_side_and_every_slice_is_watched() -> None:
    memory = Memory.of(JOBS, SCALED)
    large, small = (SCALED.kv(j.tokens) for j in JOBS)
    assert large > 2 * SLICE > SLICE > small
    assert memory.total == 4 * (large + small)
    assert memory.offset(0, 3) + large == memory.offset(1, 0)
    marks = memory.marks(0)
    assert marks[0] == SLICE - 1
    assert marks[-1] == 4 * large - 1
    assert len(marks) == 4 * -(-large // SLICE)
    assert memory.marks(1).tolist() == [4 * large + small * (i + 1) - 1 for i in range(4)]


def test_a_request_is_complete_when_its_last_slice_is_there_wherever_that_lies() -> None:
    memory = Memory.of(JOBS, SCALED)
    data = np.zeros(memory.total, dtype=np.uint8)
    watch = Watch(memory, data)
    watch.expect(0)
    data[memory.offset(1, 0) :] = 1  # nobody has asked for it yet
    hole = memory.offset(0, 1)
    data[:hole] = data[hole + SLICE : memory.offset(1, 0)] = 1
    watch.look(1.0)
    assert watch.done == {}
    data[hole : hole + SLICE] = 1
    watch.expect(1)
    watch.look(2.0)
    assert watch.done == {0: 2.0, 1: 2.0}
    assert [at for at, _ in watch.slices[0]] == [1.0, 2.0]
    assert sum(n for _, n in watch.slices[0]) == len(memory.marks(0))
    watch.look(3.0)
    assert watch.done == {0: 2.0, 1: 2.0}


def _results(done: dict[str, float]) -> dict[str, Any]:
    def log(*exchanges: float) -> dict[str, Any]:
        return {"exchanges": list(exchanges), "fetch_waits": [0.25], "computed": 1.0, "overslept": 0.01}

    return {
        "p0": {"log": log(0.010, 0.030), "hints": [{"sent": 3}, {"sent": 1}]},
        "p1": {"log": log(0.020, 0.010), "hints": [{"sent": 2}]},
        "d0": {"done": done, "slices": {"0": [[1.02, 8], [1.07, 4]]}},
        "s0": {},
    }


def test_figures_count_what_never_came_and_take_the_rank_that_did_not_wait() -> None:
    plan = real.Plan(JOBS, SCALED)
    health = {"cpu": 0.2, "timer_late_p99_ms": 1.0}
    found = real.figures(plan, _results({"0": 10.25}), 10.0, 20.0, health)
    assert (found["requests"], found["deadlines_met"], found["never_done"]) == (2, 1, 1)
    assert found["ttft_p50_ms"] == pytest.approx(250.0)
    assert found["ttft_p99_ms"] == pytest.approx(19_500.0)
    assert found["collective_mean_ms"] == pytest.approx(10.0)
    assert found["kv_reuse_stall_ms"] == pytest.approx(500.0)
    assert found["hints"] == {"sent": 6}
    each = 4 * SCALED.kv(60_000) / len(Memory.of(JOBS, SCALED).marks(0))
    assert found["health"]["link_peak"] == pytest.approx(12 * each / (25e6 * 1448 / 1514 * 0.1), rel=1e-3)
    assert found["health"]["ok"] == (found["health"]["link_peak"] >= 0.9)


def test_the_table_adds_up_runs_and_names_what_the_machine_spoilt() -> None:
    plan = real.Plan(JOBS, SCALED)
    results = _results({"0": 10.25, "1": 10.6})
    runs = {
        str(seed): real.figures(plan, results, 10.0, 20.0, {"cpu": cpu, "timer_late_p99_ms": 1.0})
        for seed, cpu in ((0, 0.2), (1, 0.99))
    }
    rows = real.table({"none": runs})
    assert rows[1][:3] == ["fair sharing (no mfsd)", "2", "4 of 4"]
    assert "the processors were 99% busy" in rows[1][-1]


@pytest.mark.root  # the command takes precedence over other processes first
@pytest.mark.skipif(INSTALLED, reason="the extra is installed")
def test_without_the_extra_the_command_says_what_to_install() -> None:
    found = CliRunner().invoke(main, ["lab", "real"])
    assert found.exit_code == 1
    assert "pip install 'mfsd[transports]'" in str(found.exception) + found.output
