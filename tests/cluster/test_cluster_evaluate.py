# SPDX-License-Identifier: Apache-2.0
"""Figures from fabricated cells, by hand; resumption; the page."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from mfsd.daemon.main import main
from mfsd.lab.cluster import matrix, report
from mfsd.lab.cluster.arms import ARMS
from mfsd.lab.cluster.cell import Cell
from mfsd.lab.cluster.evaluate import Table, at_level, summary
from mfsd.lab.cluster.jobs import Work
from mfsd.lab.cluster.matrix import Part

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from mfsd.lab.cluster.regimes import Cluster

HEALTH = {"ok": True, "problems": [], "cpu": 0.3}


def result(
    arm: str, load: float, met: list[bool], *, regime: str = "one", seed: int = 0, **more: Any
) -> dict[str, Any]:
    """A cell whose requests took 0.5 s or, where not met, 2 s, with an SLO of 1 s."""
    cell = {"arm": arm, "regime": regime, "work": {"load": load, "seed": seed, "slo_scale": 3.0}}
    requests = [
        {
            "id": i,
            "at": float(i),
            "began": i + 0.1,
            "computed": i + 0.3,
            "done": i + (0.5 if ok else 2.0),
            "slo": 1.0,
            "counted": True,
            "unloaded": 1 / 3,
        }
        for i, ok in enumerate(met)
    ]
    uncounted = {"id": -1, "at": 0.0, "slo": 1.0, "done": None, "counted": False, "unloaded": 1.0}
    return {
        "cell": cell, "name": f"{regime}-{load}-{seed}-{arm}", "requests": [uncounted, *requests], "elapsed_s": 100.0,
        "collectives": [(0.0, 0.010, 1), (1.0, 0.030, 1)], "fetch_waits_s": [0.5], "health": HEALTH, **more,
    }  # fmt: skip


def test_a_cells_figures() -> None:
    cell = result("none", 1.0, [True, True, True, False])
    cell["requests"][1]["done"] = None
    found = summary(cell)
    assert found["requests"] == 4
    assert found["attainment"] == 0.5
    assert found["never_done"] == 1
    assert found["ttft_p50_ms"] == pytest.approx(500.0)
    assert found["ttft_p99_ms"] == pytest.approx(100_000.0)  # never: until the end of the run
    assert found["collective_mean_ms"] == pytest.approx(20.0)
    assert found["waiting_mean_ms"] == pytest.approx(100.0)
    assert found["prefill_mean_ms"] == pytest.approx(200.0)
    assert found["p2d_after_prefill_mean_ms"] == pytest.approx((200 + 200 + 1700) / 3)


def test_arms_are_compared_where_fair_sharing_meets_the_level() -> None:
    half, tenth = [True, False] * 50, [True, *[False] * 9] * 10
    cells = [result("none", 0.5, half), result("none", 0.9, tenth), result("ladder", 0.5, [True] * 100)]
    cells += [result("ladder", 0.9, half), result("sjf", 0.9, tenth)]
    found = at_level(Table(cells), 0.475)
    assert found is not None
    assert found.loads == {"one": 0.5}
    assert set(found.attainment) == {"none", "ladder"}, "sjf has not run there"
    assert found.over["ladder", "none"].value == pytest.approx(2.0)
    low = at_level(Table(cells), 0.0)
    assert low is not None
    assert low.loads == {"one": 0.9}
    # sjf met the very same requests: compared pairwise there is no doubt about it.
    same = low.over["sjf", "none"]
    assert (same.value, same.low, same.high) == (1.0, 1.0, 1.0)
    ours = low.over["ladder", "none"]
    assert ours.value == pytest.approx(5.0)
    assert ours.low < ours.value < ours.high


def test_means_are_over_regimes_and_leave_out_the_one_that_is_not_in_them() -> None:
    def both(regime: str, fair: list[bool], ours: list[bool]) -> list[dict[str, Any]]:
        return [result("none", 0.5, fair, regime=regime), result("ladder", 0.5, ours, regime=regime)]

    yes, no = [True] * 10, [False] * 10
    cells = both("one", yes, yes) + both("hot", no, yes * 3) + both("even", no, no)
    for cell in cells:
        if cell["cell"]["regime"] == "hot" and cell["cell"]["arm"] == "none":
            cell["requests"] += result("none", 0.5, no * 2)["requests"][1:]
    found = at_level(Table(cells), 0.5)
    assert found is not None
    assert found.attainment["none"].value == pytest.approx(0.5)
    assert found.attainment["ladder"].value == pytest.approx(1.0)
    assert set(found.by_regime) == {"one", "hot", "even"}


def test_no_fair_sharing_no_comparison() -> None:
    assert at_level(Table([result("ladder", 0.5, [True])]), 0.475) is None


def test_names_of_cells_are_unique_and_every_arm_is_known() -> None:
    cells = [c for part in matrix.full() for c in part.cells]
    names = {c.name: c for c in cells}
    assert all(names[c.name] == c for c in cells)
    assert {c.arm for c in cells} == set(ARMS)
    assert sorted(c.name for c in matrix.in_order(cells)) == sorted(names)
    assert {c.work.seed for c in cells} >= {0, 1, 2}
    assert not {c.name for c in matrix.quick().cells} & set(names), "a quick look must not overwrite the matrix"


def test_quick_fits_into_four_minutes() -> None:
    part = matrix.quick()
    assert {c.arm for c in part.cells} == {"none", "two-class", "karuna", "mfs", "ladder-net"}
    assert len({c.work.load for c in part.cells}) == 2
    assert matrix.seconds(matrix.in_order(part.cells)) < 200


def test_a_result_of_other_settings_is_not_taken_for_this_cells(tmp_path: Path) -> None:
    cell, other = (Cell("none", "one", Work(duration)) for duration in (5.0, 6.0))
    path = matrix.path_of(tmp_path, cell)
    assert path == matrix.path_of(tmp_path, other)
    path.parent.mkdir()
    path.write_text(json.dumps({"of": matrix.identity(cell)}))
    assert matrix.load(tmp_path, cell) is not None
    assert matrix.load(tmp_path, other) is None


def test_a_run_goes_on_where_it_was_and_tries_what_the_machine_spoilt_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    networks: list[tuple[str, ...]] = []
    ran: list[str] = []

    @contextlib.contextmanager
    def network(cluster: Cluster) -> Iterator[None]:
        networks.append(cluster.links)
        yield

    def run(_network: None, cell: Cell, _tell: object) -> dict[str, Any]:
        ran.append(cell.regime)
        ok = cell.regime != "hot" or ran.count("hot") == 2
        return {"health": {"ok": ok, "problems": [] if ok else ["busy"]}, "tries": ran.count(cell.regime)}

    monkeypatch.setattr(matrix, "Network", network)
    monkeypatch.setattr(matrix, "run", run)
    cells = [Cell("none", r, Work()) for r in ("one", "hot", "several")]
    matrix.run_all(tmp_path, cells[:1], "abc", lambda *_: None)
    assert ran == ["one"]
    told: list[tuple[str, int]] = []
    matrix.run_all(tmp_path, cells[1:], "abc", lambda cell, _s, number: told.append((cell.regime, number)))
    assert ran == ["one", "hot", "hot", "several"]
    assert told == [("hot", 0), ("several", 1)]
    assert len(networks) == 3, "other links, other hosts"
    found = matrix.results(tmp_path, cells)
    assert [r["tries"] for r in found] == [1, 2, 1]
    assert all(r["health"]["ok"] and r["commit"] == "abc" for r in found)
    assert not list(tmp_path.rglob("*.part"))


def test_the_reports_say_what_was_spoilt_and_load_nothing(tmp_path: Path) -> None:
    spoilt = {"ok": False, "problems": ["the processors were 99% busy"], "cpu": 0.99}
    cells = [Cell(a, "one", Work(load=0.5)) for a in ("none", "ladder", "sjf")]
    results = [result(c.arm, 0.5, [True, False] * 5) for c in cells]
    results[2]["health"] = spoilt
    part = Part("main", "policies", tuple(cells))
    data, _ = report.write_quick(tmp_path, part, results, "abc")
    assert data["health"] == {"ok": False, "problems": [f"{results[2]['name']}: the processors were 99% busy"]}
    assert data["policies"]["ladder"]["0.5"]["attainment"] == 0.5
    tables = report.write_full(tmp_path, [part], {"main": results}, "abc")
    assert tables
    assert not any(ARMS["sjf"].title in row for rows in tables.values() for row in rows), "spoilt: left out"
    full = json.loads((tmp_path / "lab.json").read_text())
    assert full["parts"]["main"]["spoilt by the machine"] == [results[2]["name"]]
    for page in ("quick.html", "lab.html"):
        text = (tmp_path / page).read_text()
        assert "data:image/png;base64," in text
        assert "http" not in text.replace("http-equiv", "")
    assert (tmp_path / "lab-attainment.png").stat().st_size > 1000


def test_variants_are_compared_regime_by_regime_over_the_cells_that_all_have() -> None:
    cells = [
        result("none", 0.5, [True, False], regime="one"),
        result("none", 0.5, [True, True], regime="one", seed=1),
        result("ladder", 0.5, [True, True], regime="one"),
        result("ladder", 0.5, [False, False], regime="even"),
        result("none", 0.5, [True, False], regime="even"),
        result("mfs", 0.5, [True, False], regime="even"),
    ]
    rows = report.variant_table(cells)
    assert rows[0] == ["policy", "cells", "one", "even", "mean", "TTFT p50", "collective"]
    assert [row[:5] for row in rows[1:]] == [
        [ARMS["none"].title, "2", "0.500", "0.500", "0.500"],  # without seed 1, which the ladder does not have
        [ARMS["mfs"].title, "1", "", "0.500", ""],
        [ARMS["ladder"].title, "2", "1.000", "0.000", "1.000"],  # the mean is over the four regimes of means
    ]
    tight = [result("none", 0.5, [True]), result("none", 0.5, [False])]
    tight[1]["cell"]["work"]["slo_scale"] = 1.5
    tight[1]["name"] += "_slo1.5"
    assert [(row[0], row[2]) for row in report.variant_table(tight)[1:]] == [
        ("fair sharing (no mfsd), SLO 1.5x", "0.000"),
        ("fair sharing (no mfsd), SLO 3x", "1.000"),
    ]


@pytest.mark.root  # the command takes precedence over other processes first
def test_the_command_line_names_what_can_be_chosen() -> None:
    runner = CliRunner()
    found = runner.invoke(main, ["lab", "parts"])
    assert found.exit_code == 0
    assert [line.split()[0] for line in found.output.splitlines()] == [p.name for p in matrix.full()]
    wrong = runner.invoke(main, ["lab", "full", "--part", "nonsense"])
    assert wrong.exit_code == 1
    assert "must be one of main, fifo" in str(wrong.exception) + wrong.output
