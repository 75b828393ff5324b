# SPDX-License-Identifier: Apache-2.0
"""Crowds that are promoted together take what they are guaranteed to where their packets are."""

from __future__ import annotations

import pytest
from support.harness import MSS, FakeSocket, Host

from mfsd.engine.rescue import DRAIN

SLOW = 25e6
CROWD = 30
"""No crowd to the policy, which would not defer it."""
SIZE = 316_000
STUCK = 80_000
"""Of each: 2.4 MB, 96 ms of the link at full rate and 384 ms at a quarter of it."""
AFTER_S = 2.0
"""After so long without an answer retransmission timers have gone off, and doubled, some times."""


def crowd(h: Host, count: int = CROWD, left: float = 2.8) -> list[tuple[FakeSocket, tuple[int, int]]]:
    """Starved connections, all due together, and the (band, lane) in which all that each may have on its way is."""
    socks = [h.socket(cookie) for cookie in range(1, count + 1)]
    for s in socks:
        h.request(f"r{s.cookie}", left)
        h.transfer(f"t{s.cookie}", s, SIZE, request=f"r{s.cookie}")
    h.tick()
    places = []
    for s in socks:
        h.send(s, STUCK // MSS * MSS, acked=False)
        s.notsent, s.window_full, s.rto_us = SIZE - s.unsent_plus_unacked, True, int(AFTER_S * 1e6)
        s.unsent_plus_unacked = SIZE
        row = h.table.rows[h.keys.cookies[s.cookie]]
        place = int(row["band"]), int(row["lane"])
        h.device.queued[place] = h.device.queued.get(place, 0) + STUCK
        places.append(place)
    return list(zip(socks, places, strict=True))


def until_promoted(h: Host, band: int) -> None:
    begin = h.now
    while (h.table.band[: h.table.high] == band).any():
        assert h.now < begin + 5.0
        h.tick(0.005)


def test_a_crowd_whose_timers_have_gone_off_is_let_out_by_what_it_is_guaranteed() -> None:
    """At a quarter of the link that would take longer than a timer by default does; by now those take seconds."""
    h = Host("demand-bound", slots=256, lanes=32, rate=SLOW)
    band = crowd(h)[0][1][0]
    until_promoted(h, band)
    queued = h.device.queued
    for _ in range(200):
        h.tick(0.002)
        share = h.device.guaranteed.get(band, 0.0)
        assert sum(h.device.guaranteed.values()) <= 1.0
        fullest = max(queued, key=lambda place: queued[place])
        queued[fullest] = max(queued[fullest] - int(share * SLOW * 0.002), 0)
        if not any(queued.values()):
            break
        assert h.device.purged == []
    assert not any(queued.values())
    for _ in range(100):
        h.tick(0.002)
    assert h.device.purged == []
    assert h.device.guaranteed.get(band, 0.0) < DRAIN


@pytest.mark.parametrize("which", range(2))
def test_a_lane_is_not_purged_of_what_only_a_timer_would_repair(which: int) -> None:
    """Two share a lane: one would go on at once, but its purge would cost the other a timeout."""
    h = Host("demand-bound", slots=256, lanes=2, rate=SLOW)
    pair = crowd(h, 2, left=0.5)
    assert pair[0][1] == pair[1][1]
    hasty, place = pair[which]
    hasty.window_full = False
    until_promoted(h, place[0])
    for _ in range(10):
        h.tick(0.002)
        assert h.device.purged == []
    assert h.device.guaranteed[place[0]] >= DRAIN
    h.device.queued[place] = 0
    for _ in range(100):
        h.tick(0.002)
    assert h.device.purged == []
