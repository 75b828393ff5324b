# SPDX-License-Identifier: Apache-2.0
"""From what happened to figures, words and pages."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from support.labfakes import TINY, job, outcome

from mfsd.lab import pictures, report, results, story
from mfsd.lab.arm import Plan
from mfsd.lab.hosts import health
from mfsd.lab.hosts.levels import LevelChange
from mfsd.lab.promotion import Trial, latency_ms
from mfsd.units import Rate

JOBS = [job(i, i % 2, at=float(i)) for i in range(10)]
PLAN = Plan(JOBS, TINY)
GOOD = {"cpu": 0.5, "timer_late_p99_ms": 1.0, "overslept": 0.01, "link_peak": 0.99}


def test_a_summary_counts_what_was_in_time() -> None:
    done = {i: i + (0.5 if i < 7 else 1.5) for i in range(9)}
    figures = results.summary(PLAN, outcome(PLAN, done, governed=True))
    assert (figures["requests"], figures["deadlines_met"], figures["never_done"]) == (10, 7, 1)
    assert figures["ttft_p50_ms"] == pytest.approx(500)
    assert figures["ttft_p99_ms"] == pytest.approx((9 + PLAN.patience_s - 9) * 1000), "never done counts, too"
    assert figures["collective_mean_ms"] == pytest.approx(2.0)
    assert figures["mfsd"] == {"rescues": 5}
    json.dumps(figures)


def test_nothing_done_is_a_result_as_well() -> None:
    figures = results.summary(PLAN, outcome(PLAN, {}, governed=False))
    assert figures["deadlines_met"] == 0
    assert figures["never_done"] == 10
    json.dumps(figures, allow_nan=False)


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
    assert health.verdict(GOOD) == []
    (problem,) = health.verdict({**GOOD, figure: value})
    assert word in problem


def test_a_probe_measures() -> None:
    figures = health.Probe().stop()
    assert 0.0 <= figures["cpu"] <= 1.0
    assert figures["timer_late_p99_ms"] >= 0.0


def test_the_verdict_is_honest() -> None:
    arms = [{"deadlines_met": n, "requests": 10} for n in (4, 6)]
    assert report.verdict(*arms) == "With mfsd 6 of 10 requests met their deadline, without it 4."
    assert "worse" in report.verdict(*reversed(arms))
    assert "no difference" in report.verdict(arms[0], arms[0])


def test_a_deferred_and_promoted_transfer_is_found_and_told() -> None:
    on = outcome(PLAN, {j.id: j.at + 0.6 for j in JOBS}, governed=True)
    # Request 4 (rank 0): level 4 until 4.52 s, then level 3 by a rescue; all its bytes come after that.
    on.levels[0] = [LevelChange(1.0, 0, 2, 0), LevelChange(3.9, 0, 4, 0), LevelChange(4.52, 0, 3, 1)]
    best = story.stories(PLAN, on)[0]
    assert best.timing.id == 4
    assert best.promoted == 4.52
    assert [s.level for s in best.steps] == [4, 3]
    assert best.deferred == pytest.approx(0.5)
    assert best.steps[1].rescued
    assert best.early < 0.2
    assert best.tellable
    words = report.describe(best)
    assert "Request 4" in words
    assert "rescue" in words
    assert "0.400 s early" in words


def test_without_a_promotion_the_page_says_so() -> None:
    on = outcome(PLAN, {j.id: j.at + 0.6 for j in JOBS}, governed=True)
    on.levels[0] = [LevelChange(0.0, 0, 4, 0)]
    best = story.stories(PLAN, on)[0]
    assert best.promoted is None
    assert "never promoted" in report.describe(best)
    assert "No prefill-to-decode" in report.describe(None)


def test_the_scavenger_is_the_lowest_level() -> None:
    assert story.rank_of(-2) > story.rank_of(4) > story.rank_of(0)


def test_the_page_is_self_contained_and_tells_the_figures() -> None:
    off = outcome(PLAN, {j.id: j.at + 1.2 for j in JOBS}, governed=False)
    on = outcome(PLAN, {j.id: j.at + 0.6 for j in JOBS}, governed=True)
    on.levels[0] = [LevelChange(3.9, 0, 4, 0), LevelChange(4.52, 0, 3, 1)]
    best = story.stories(PLAN, on)[0]
    arms = {"off": results.summary(PLAN, off), "on": results.summary(PLAN, on)}
    data = {**arms, "machine": {"cpu": "<odd & ends>"}, "commit": "c0ffee", "settings": {"link": "1gbit"}}
    rows = report.rows(arms["off"], arms["on"])
    text = report.page(data, rows, best, pictures.timeline(PLAN, on, best), pictures.cdf(PLAN, off, on))
    assert text.count("<svg") == 2
    assert "0 of 10" in text
    assert "10 of 10" in text
    assert "&lt;odd &amp; ends&gt;" in text
    assert not re.search(r'(?:src|href)\s*=\s*"(?!#)', text), "nothing is loaded from elsewhere"


def test_a_promotion_that_never_came_is_not_given_a_number() -> None:
    never = Trial(None, None, 0, 0, 0, 0, 0.0)
    soon = Trial(3.0, 3.5, 0, 90, 0, 0, 0.0)
    plain = report.promotion_summary([never, soon, never], 2.0)
    assert (plain["promotion_p50_ms"], plain["promotion_censored"]) == (2000, 2)
    base = results.summary(PLAN, outcome(PLAN, {}, governed=False))
    row = report.rows({**base, **plain}, {**base, **report.promotion_summary([soon], 0.3)})[-1]
    assert row[1:] == ("not within 2000 ms", "3 ms")


MS = 1_000_000


def stream(*pieces: tuple[float, int]) -> np.ndarray[tuple[int, ...], np.dtype[np.uint64]]:
    return np.array([(int(ms * MS), size) for ms, size in pieces], dtype=np.uint64).reshape(-1, 2)


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
