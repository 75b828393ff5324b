# SPDX-License-Identifier: Apache-2.0
"""From what happened to figures, words and pages."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pytest
from support.labfakes import HEALTHY, TWO_RANKS, demo_cell, request, result

from mfsd.ground.model import Stage
from mfsd.ground.units import Rate
from mfsd.lab import demo, far
from mfsd.lab.fifo import Outcome
from mfsd.lab.hosts import health
from mfsd.lab.hosts.levels import LevelChange
from mfsd.lab.promotion import Trial, latency_ms
from mfsd.lab.results import report, story, tables
from mfsd.lab.results.figures import summary
from mfsd.lab.results.result import RESULT, Health, link_bins, result_of
from mfsd.lab.serving.driver import Played
from mfsd.lab.serving.forward import Log
from mfsd.lab.serving.wire import ARRIVAL
from mfsd.lab.settings import PRESETS

if TYPE_CHECKING:
    from pathlib import Path

WORK = [request(i, i % 2, at=float(i)) for i in range(10)]
P2D = {c.src: c.number for c in reversed(TWO_RANKS.conduits()) if c.stage is Stage.P2D}
"""Rank -> its first conduit to the decode host."""
HELD_BACK = [LevelChange(at, P2D["p0"], level, n) for at, level, n in ((1.0, 2, 0), (3.9, 4, 0), (4.52, 3, 1))]
"""Request 4 (rank 0): level 4 until 4.52 s, then level 3 by a rescue; its bytes come after that."""


# --- figures ----------------------------------------------------------------------------------------------------------


def test_a_cells_figures() -> None:
    cell = result("none", 1.0, [True, True, True, False])
    cell.requests[1] = dataclasses.replace(cell.requests[1], done=None)
    found = summary(cell)
    assert (found["requests"], found["deadlines_met"], found["never_done"]) == (4, 2, 1)
    assert found["attainment"] == 0.5
    assert found["ttft_p50_ms"] == pytest.approx(500.0)
    assert found["ttft_p99_ms"] == pytest.approx(100_000.0), "never: until the end of the run"
    assert found["collective_mean_ms"] == pytest.approx(20.0)
    assert found["waiting_mean_ms"] == pytest.approx(100.0)
    assert found["prefill_mean_ms"] == pytest.approx(200.0)
    assert found["p2d_after_prefill_mean_ms"] == pytest.approx((200 + 200 + 1700) / 3)
    assert found["kv_reuse_stall_ms"] == pytest.approx(500.0)
    json.dumps(found, allow_nan=False)


def test_nothing_done_is_a_result_as_well() -> None:
    figures = summary(demo_cell(WORK, {}, [])[0])
    assert (figures["deadlines_met"], figures["never_done"]) == (0, 10)
    assert figures["ttft_p50_ms"] == pytest.approx(1000 * (40 - 5)), "the fifth latest of those that waited for ever"
    json.dumps(figures, allow_nan=False)


def test_a_result_comes_back_from_its_file_as_it_was() -> None:
    cell = result("ladder", 0.5, [True, False], regime="hot", slo_scale=2.0)
    assert RESULT.validate_json(RESULT.dump_json(cell)) == cell


def rows(*arrivals: tuple[float, int, int, int]) -> np.ndarray[Any, Any]:
    return np.array(list(arrivals), dtype=ARRIVAL)


def test_what_processes_measured_becomes_a_result_in_seconds_since_the_beginning() -> None:
    class Watched:
        figures = {"cpu": 0.2, "timer_late_p99_ms": 1.0}  # noqa: RUF012 - stands for an instance
        counters = {"rescues": 3}  # noqa: RUF012 - as above
        ended = 107.0

    settings = dataclasses.replace(TWO_RANKS, warm_up=0.5)
    work = [request(0, 0), request(1, 1, at=1.0)]
    log = Log(began={0: 100.1}, computed={0: 100.4}, done={0: 100.9}, exchanges={"0/0": (100.2, 100.25, 7)})
    log.overslept, log.passes, log.late = 0.06, 0.3, [0.001, 0.002]
    # 12 MB of P2D from p0 within a tenth of a second: 1 Gbit/s carries 11.96 MB of payload.
    p2d = P2D["p0"]
    played = Played(100.0, log, rows((100.31, p2d, 0, 6_000_000), (100.39, p2d, 0, 6_000_000)), {"sent": 9}, 3.5)
    watched: Any = Watched()
    found = result_of(settings, work, played, watched, {"a": "1"})
    first, second = found.requests
    assert (first.began, first.computed, first.done) == pytest.approx((0.1, 0.4, 0.9))
    assert (second.began, second.computed, second.done) == (None, None, None)
    assert (first.counted, second.counted) == (False, True)
    assert found.collectives == [pytest.approx((0.2, 0.05, 7))]
    assert found.elapsed == 7.0
    assert found.health.figures["overslept"] == pytest.approx(0.2)
    assert found.health.figures["link_peak"] == pytest.approx(12e6 / (12.5e6 * 1448 / 1514), rel=1e-3)
    assert found.health.figures["emulator_cpu"] == 0.5
    assert found.health.problems == ["late emulated computing made forward passes 20% longer"]
    assert found.used["p0 out"] == pytest.approx(found.health.figures["link_peak"] / 10, rel=1e-3)
    assert found.used["p1 out"] == 0


def test_links_are_counted_each_way_where_they_have_a_rate() -> None:
    one = rows((5.0, P2D["p1"], 0, 1_000_000))
    bins = link_bins(TWO_RANKS, one, 4.85, 1.0)
    assert {link for link, row in bins.items() if row.any()} == {"p1 out"}, "nothing limits what comes into a host"
    limited = dataclasses.replace(TWO_RANKS, switch="fifo", decode_rate="100mbit")
    bins = link_bins(limited, one, 4.85, 1.0)
    assert {link for link, row in bins.items() if row.any()} == {"p1 out", "d0 in"}
    assert bins["d0 in"].sum() == pytest.approx(10 * bins["p1 out"].sum())
    assert np.flatnonzero(bins["d0 in"]).tolist() == [1]


# --- health -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("figure", "value", "word"),
    [
        ("cpu", 0.97, "processors"),
        ("timer_late_p99_ms", 12.0, "timers"),
        ("overslept", 0.3, "computing"),
        ("link_peak", 0.4, "rate"),
    ],
)
def test_each_sign_of_a_busy_machine_is_said(figure: str, value: float, word: str) -> None:
    assert health.verdict(HEALTHY) == []
    (problem,) = health.verdict({**HEALTHY, figure: value})
    assert word in problem


class Governor:
    """A daemon that has counted and worked a little more each time that it is asked."""

    def __init__(self) -> None:
        self.counted, self.spent = 0, 5.0

    def status(self) -> Any:
        return type("Status", (), {"tick_p50_ms": 0.7})()

    def counters(self) -> dict[str, int]:
        self.counted += 10
        return {"rescues": self.counted}

    def cpu_seconds(self) -> float:
        self.spent += 0.5
        return self.spent


def test_the_machine_is_measured_while_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = iter([(100.0, 700.0), (160.0, 740.0)])  # seconds of work and of leisure: 60 and 40 in between

    def cpu_times() -> Any:
        worked, idle = next(busy)
        return type("Times", (tuple,), {"idle": idle, "iowait": 0.0})((worked, idle))

    nap = time.sleep
    monkeypatch.setattr(psutil, "cpu_times", cpu_times)
    monkeypatch.setattr(time, "sleep", lambda s: nap(s + 0.02))
    governors: Any = [Governor(), Governor()]
    with health.Measure(governors) as measure:
        nap(0.2)
    figures = measure.figures
    assert figures["cpu"] == pytest.approx(0.6)
    assert 20 <= figures["timer_late_p99_ms"] < 200
    assert figures["tick_p50_ms"] == 0.7
    assert measure.counters == {"rescues": 20}, "of both"
    assert figures["mfsd_cpu"] == pytest.approx(2 * 0.5 / 0.2, rel=0.6)


# --- stories ----------------------------------------------------------------------------------------------------------


def test_a_deferred_and_promoted_transfer_is_found_and_told() -> None:
    on, played = demo_cell(WORK, {r.id: r.at + 0.6 for r in WORK}, HELD_BACK)
    best = story.stories(on, played)[0]
    assert best.request.id == 4
    assert best.conduit == P2D["p0"]
    assert best.promoted == pytest.approx(4.52)
    assert [s.level for s in best.steps] == [4, 3]
    assert best.deferred == pytest.approx(0.5)
    assert best.steps[1].rescued
    assert best.early < 0.2
    assert best.tellable
    words = story.describe(best)
    assert "Request 4" in words
    assert "rescue" in words
    assert "0.400 s early" in words


def test_without_a_promotion_the_page_says_so() -> None:
    on, played = demo_cell(WORK, {r.id: r.at + 0.6 for r in WORK}, [LevelChange(0.0, P2D["p0"], 4, 0)])
    best = story.stories(on, played)[0]
    assert best.promoted is None
    assert "never promoted" in story.describe(best)
    assert "No prefill-to-decode" in story.describe(None)


def test_the_scavenger_is_the_lowest_level() -> None:
    assert story.rank_of(-2) > story.rank_of(4) > story.rank_of(0)


# --- pages ------------------------------------------------------------------------------------------------------------


def test_the_demos_verdict_is_honest() -> None:
    arms = [{"deadlines_met": n, "requests": 10} for n in (4, 6)]
    assert demo.verdict(*arms) == "With mfsd 6 of 10 requests met their deadline, without it 4."
    assert "worse" in demo.verdict(*reversed(arms))
    assert "no difference" in demo.verdict(arms[0], arms[0])


def test_the_demos_page_is_self_contained_and_tells_figures_and_settings(tmp_path: Path) -> None:
    off, _ = demo_cell(WORK, {r.id: r.at + 1.2 for r in WORK}, [])
    on, played = demo_cell(WORK, {r.id: r.at + 0.6 for r in WORK}, HELD_BACK)
    off.settings = dataclasses.replace(off.settings, arm="none")
    off.health = Health(["the odd & <ends>"], dict(HEALTHY))
    on.commit = off.commit = "c0ffee"
    beyond = {
        "bands alone": far.Arm(Outcome([50.0, 60.0, 130.0], [], 0.99, 1.0, [], [], 0)),
        "network.yield": far.Arm(None, "no & BTF"),
    }
    rows, words = demo.write(tmp_path, (off, on), played, {}, beyond)
    assert any("60.0 with bands alone." in line for line in words)
    assert any("no & BTF" in line for line in words), "an arm that can't be run is said, and the others are shown"
    assert rows[1] == ["deadlines met", "0 of 10", "10 of 10"]
    text, data = (tmp_path / "demo.html").read_text(), json.loads((tmp_path / "demo.json").read_text())
    assert text.count("data:image/png;base64,") == 3
    assert all((tmp_path / f"demo-{name}.png").stat().st_size > 1000 for name in ("timeline", "ttft", "network"))
    assert "network.yield could not be run: no &amp; BTF" in text
    assert data["network"]["bands alone"]["slowdown_p50"] == 60
    assert "<td>0 of 10</td><td>10 of 10</td>" in text
    assert "With mfsd 10 of 10 requests met their deadline, without it 0." in text
    assert "Request 4 (rank 0" in text
    assert "the odd &amp; &lt;ends&gt;" in text
    assert not re.search(r'(?:src|href)\s*=\s*"(?!#|data:)', text), "nothing is loaded from elsewhere"
    for field in dataclasses.fields(off.settings):
        assert f"<td>{field.name}</td>" in text
        assert field.name in data["settings"]
    assert data["settings"]["arm"] == "none, ladder", "where cells differ, all values"
    assert data["settings"]["commit"] == "c0ffee"
    assert data["health"]["ok"] is False
    assert (data["off"]["deadlines_met"], data["on"]["deadlines_met"]) == (0, 10)


def test_a_promotion_that_never_came_is_not_given_a_number() -> None:
    never = Trial(None, None, 0, 0, 0, 0.0, rescued=False)
    soon = Trial(3.0, 3.5, 90, 0, 0, 0.0, rescued=True)
    plain = demo.promotions([never, soon, never], 2.0)
    assert (plain["promotion_p50_ms"], plain["promotion_censored"]) == (2000, 2)
    base = summary(demo_cell(WORK, {}, [])[0])
    row = demo.table({**base, **plain}, {**base, **demo.promotions([soon], 0.3)})[-1]
    assert row[1:] == ["not within 2000 ms", "3 ms"]


def test_a_table_adds_up_the_seeds_and_names_what_the_machine_spoilt() -> None:
    cells = [result("none", 0.4, [True, False], seed=0), result("none", 0.4, [True] * 3, seed=1)]
    cells += [result("ladder", 0.4, [False], seed=0)]
    cells[1].health = Health(["the processors were 99% busy"], {**HEALTHY, "cpu": 0.99})
    head, fair, ladder = tables.cells_table(cells)
    assert head[:4] == ["policy", "runs", "in time", "share"]
    assert fair[:4] == ["fair sharing (no mfsd)", "2", "4 of 5", "0.800"]
    assert (fair[-1], ladder[-1]) == ("the processors were 99% busy", "ok")
    more = tables.cells_table([*cells, result("none", 0.6, [True])])
    assert [row[:2] for row in more[1:]] == [
        ["fair sharing (no mfsd)", "0.4"], ["deadline ladder", "0.4"], ["fair sharing (no mfsd)", "0.6"],
    ]  # fmt: skip


def test_no_figure_of_a_table_is_cut_where_nobody_limits_its_width(capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"a policy with a rather long name, number {i}" for i in range(12)]
    report.show([["policy", *names], ["x", *(f"{i}.123456789" for i in range(12))]], "wide")
    said = capsys.readouterr().out
    assert all(name in said for name in names)
    assert said.splitlines()[-1].split() == ["x", *(f"{i}.123456789" for i in range(12))]


def test_every_preset_can_be_run_and_told() -> None:
    for preset in PRESETS.values():
        assert preset.settings.check().name.startswith(f"{preset.settings.regime}_none")


# --- promotions -------------------------------------------------------------------------------------------------------

MS = 1_000_000


def stream(*pieces: tuple[float, int]) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    return np.array([(int(ms * MS), size) for ms, size in pieces], dtype=np.int64).reshape(-1, 2)


def test_promotion_latency_is_the_first_full_window() -> None:
    rate = Rate.parse("1gbit")
    full = 120_000  # bytes per millisecond: a little more than the payload that the link carries
    at_once = stream(*((100 + i + 0.5, full) for i in range(30)))
    assert latency_ms(at_once, 100 * MS, rate) == 0
    late = stream((101.5, 5_000), *((140 + i + 0.5, full) for i in range(30)))
    assert latency_ms(late, 100 * MS, rate) == 39, "nine tenths are enough, so a window may begin 1 ms early"
    assert latency_ms(stream(*((100 + i + 0.5, full // 2) for i in range(300))), 100 * MS, rate) is None
    assert latency_ms(stream((50, 10 * full)), 100 * MS, rate) is None, "what came before does not count"
    assert latency_ms(stream(), 0, rate) is None
