# SPDX-License-Identifier: Apache-2.0
"""Arms against each other, by hand; the page of the whole matrix."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import pytest
from support.labfakes import HEALTHY, result

from mfsd.lab.arms import ARMS
from mfsd.lab.matrix import Part
from mfsd.lab.results import tables
from mfsd.lab.results.evaluate import Table, at_level
from mfsd.lab.results.result import Health

if TYPE_CHECKING:
    from pathlib import Path

    from mfsd.lab.results.result import Result


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
    def both(regime: str, fair: list[bool], ours: list[bool]) -> list[Result]:
        return [result("none", 0.5, fair, regime=regime), result("ladder", 0.5, ours, regime=regime)]

    yes, no = [True] * 10, [False] * 10
    found = at_level(Table([*both("one", yes, yes), *both("hot", no * 3, yes * 3), *both("even", no, no)]), 0.5)
    assert found is not None
    assert found.attainment["none"].value == pytest.approx(0.5), "of regimes, whatever the number of their requests"
    assert found.attainment["ladder"].value == pytest.approx(1.0)
    assert set(found.by_regime) == {"one", "hot", "even"}


def test_no_fair_sharing_no_comparison() -> None:
    assert at_level(Table([result("ladder", 0.5, [True])]), 0.475) is None


def test_the_page_says_what_was_spoilt_and_reports_the_rest(tmp_path: Path) -> None:
    results = [result(a, 0.5, [True, False] * 5) for a in ("none", "ladder", "sjf")]
    results[2].health = Health(["the processors were 99% busy"], {**HEALTHY, "cpu": 0.99})
    part = Part("main", "policies", tuple(r.settings for r in results))
    found = tables.write_full(tmp_path, [part], {"main": results})
    assert any(ARMS["ladder"].title in row for rows in found.values() for row in rows)
    assert not any(ARMS["sjf"].title in row for rows in found.values() for row in rows), "spoilt: left out"
    full = json.loads((tmp_path / "lab.json").read_text())
    assert full["parts"]["main"]["spoilt by the machine"] == [results[2].settings.name]
    assert full["parts"]["main"]["figures"][results[1].settings.name]["attainment"] == 0.5
    text = (tmp_path / "lab.html").read_text()
    assert text.count("data:image/png;base64,") == 2
    assert "http" not in text
    assert all((tmp_path / f"lab-{name}.png").stat().st_size > 1000 for name in ("attainment", "distributions"))
    assert "| static two-class |" not in (tmp_path / "lab.md").read_text()
    assert "| deadline ladder | 0.500 |" in (tmp_path / "lab.md").read_text()


def test_nothing_run_is_no_report(tmp_path: Path) -> None:
    assert tables.write_full(tmp_path, [Part("main", "policies", ())], {"main": []}) == {}
    assert not list(tmp_path.iterdir())


def test_variants_are_compared_regime_by_regime_over_the_cells_that_all_have() -> None:
    cells = [
        result("none", 0.5, [True, False], regime="one"),
        result("none", 0.5, [True, True], regime="one", seed=1),
        result("ladder", 0.5, [True, True], regime="one"),
        result("ladder", 0.5, [False, False], regime="even"),
        result("none", 0.5, [True, False], regime="even"),
        result("mfs", 0.5, [True, False], regime="even"),
    ]
    rows = tables.variant_table(cells)
    assert rows[0] == ["policy", "cells", "one", "even", "mean", "TTFT p50", "collective"]
    assert [row[:5] for row in rows[1:]] == [
        [ARMS["none"].title, "2", "0.500", "0.500", "0.500"],  # without seed 1, which the ladder does not have
        [ARMS["mfs"].title, "1", "", "0.500", ""],
        [ARMS["ladder"].title, "2", "1.000", "0.000", "1.000"],  # the mean is over the four regimes of means
    ]
    tight = [result("none", 0.5, [True]), result("none", 0.5, [False], slo_scale=1.5)]
    assert [(row[0], row[2]) for row in tables.variant_table(tight)[1:]] == [
        ("fair sharing (no mfsd), SLO 1.5x", "0.000"),
        ("fair sharing (no mfsd), SLO 3x", "1.000"),
    ]
    assert dataclasses.replace(tight[0].settings, slo_scale=1.5) == tight[1].settings
