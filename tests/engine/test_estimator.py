# SPDX-License-Identifier: Apache-2.0
"""What the estimator learns of collectives from counters that are read every 20 ms."""

from __future__ import annotations

import numpy as np
import pytest

from mfsd.engine.estimator import LinkEstimator, Reading

RATE = 25e6
BAND, BANDS = 2, 8


def seen(work_s: float, pause_s: float, left: float, seconds: float, told: float | None = None) -> list[float]:
    """What it says after each reading, of collectives that get ``left`` of the link while they send."""
    estimator, offered = LinkEstimator(RATE, BANDS), np.zeros(BANDS)
    slowed, out, at = work_s / left, [], 0.0
    while at < seconds:
        phase = at % (slowed + pause_s) if pause_s else 0.0
        offered[BAND] += left * RATE * 0.001 * (phase < slowed)
        if round(at * 1000) % 20 == 0:
            sent = int(at * RATE)  # others take what they leave
            estimator.observe(Reading(at, sent, 1, offered.copy()), BAND, left if told is None else told)
            out.append(estimator.pauses.collectives)
        at = round(at + 0.001, 3)
    return out


@pytest.mark.parametrize("left", [0.9, 0.5, 0.3])
@pytest.mark.parametrize(("work_s", "pause_s"), [(0.011, 0.03), (0.01, 0.01), (0.03, 0.01)])
def test_how_long_collectives_pause_is_seen_whatever_they_are_left(work_s: float, pause_s: float, left: float) -> None:
    settled = seen(work_s, pause_s, left, 2.0)[50:]
    assert np.mean(settled) == pytest.approx(work_s / (work_s + pause_s), rel=0.15)
    assert max(settled) < 1.4 * np.mean(settled)


def test_who_never_pauses_is_seen_soon_to_need_all_of_it() -> None:
    after = seen(1.0, 0.0, 0.4, 1.0)
    assert after[0] == 0.0
    assert after[20] > 0.7
    assert after[-1] > 0.95
    assert seen(1.0, 0.0, 0.4, 1.0, told=0.8)[-1] < 0.5  # as far as it is told what they are left


def test_what_passes_collectives_does_not_make_them_pause() -> None:
    """They never do, and for half a second something above them leaves them next to nothing."""
    estimator, offered = LinkEstimator(RATE, BANDS), np.zeros(BANDS)
    for i in range(100):
        passing = 50 <= i < 75
        offered[[BAND - 1, BAND]] += RATE * 0.02 * np.array([0.95, 0.05] if passing else [0.0, 1.0])
        estimator.observe(Reading(i * 0.02, int(i * 0.02 * RATE), 1, offered.copy()), BAND)
        if i >= 40:
            assert estimator.pauses.collectives > 0.95


def test_without_collectives_there_are_none() -> None:
    assert set(seen(0.0001, 0.03, 0.9, 1.0)) == {0.0}
    estimator = LinkEstimator(RATE, BANDS)
    for i in range(50):
        estimator.observe(Reading(i * 0.02, int(i * 5e5), 1, np.full(BANDS, i * 5e5 / BANDS)))
    assert estimator.pauses.collectives == 0.0
    assert estimator.load > 0.9


@pytest.mark.parametrize("mbit", [5, 20, 200, 1000])
def test_the_rate_is_seen_though_it_passes_in_packets(mbit: int) -> None:
    """Of 64 KB, read every 20 ms: on slow links none passes between most readings, or half a second's worth of one."""
    rate, packet = mbit * 125_000.0, 68_000
    estimator, seen = LinkEstimator(2 * rate, BANDS), []
    for i in range(400):
        at = i * 0.02
        sent = int(at * rate / packet) * packet
        estimator.observe(Reading(at, sent, packet, np.full(BANDS, sent / BANDS)))
        seen.append(estimator.rate)
    assert min(seen[150:]) > 0.85 * rate
    assert max(seen[150:]) < 1.15 * rate
