# SPDX-License-Identifier: Apache-2.0
"""No band in which somebody's packets are is left with next to nothing: htb would make a long debt of the last one."""

from __future__ import annotations

import numpy as np
import pytest
from support.harness import MSS, Host

from mfsd.engine.guarantees import MOST_STANDING

RATE = 25e6
FLOORS = (0.01,) * 5


def host(policy: str = "demand-bound") -> Host:
    return Host(policy, rate=RATE, floors=FLOORS)


def level(h: Host, number: int) -> int:
    return h.bands.level_bands[number].index


def test_bands_stand_ready_before_anybody_comes() -> None:
    h = host()
    h.tick()
    assert h.device.guaranteed == dict.fromkeys([level(h, at) for at in (0, 2, 3)], MOST_STANDING)


def test_not_where_nobody_is_guaranteed_anything() -> None:
    h = host("deadline-ladder")
    h.tick()
    assert h.device.guaranteed == {}


def test_a_promoted_one_leaves_its_last_packets_what_it_had() -> None:
    h = host()
    s = h.socket(1)
    h.request("r", 0.3)
    h.transfer("t", s, int(0.2 * RATE))
    h.tick()
    first, urgent = level(h, 2), level(h, 0)
    had = h.device.guaranteed[first]
    assert had > 0.5
    h.send(s, 40 * MSS, acked=False)
    place = first, int(h.table.rows[h.keys.cookies[1]]["lane"])
    h.device.queued[place] = 40 * MSS
    while h.table.rows[h.keys.cookies[1]]["band"] == first:
        h.tick(0.01)
    assert h.table.rows[h.keys.cookies[1]]["band"] == urgent
    kept = h.device.guaranteed[first]
    assert had / 3 < kept <= had
    assert kept + h.device.guaranteed[urgent] <= 1.0
    h.device.queued[place] = 0
    for _ in range(4):
        h.send(s, MSS)
        h.tick(0.005)
    assert h.device.guaranteed.get(first, 0.0) <= MOST_STANDING
    assert h.device.guaranteed[urgent] > had


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.8])
def test_all_have_less_where_together_they_would_have_too_much(kept: float) -> None:
    h = host()
    h.tick()
    first, urgent = level(h, 2), level(h, 0)
    give, floors = h.engine.steering.guarantees, h.bands.floors
    asked = np.zeros((1, 5))
    asked[0, 2] = kept * RATE
    give.give(asked, h.engine.steering.ladder, h.now)
    before = h.device.guaranteed[first]
    asked[0] = 0.7 * RATE, 0, 0, 0, 0
    give.give(asked, h.engine.steering.ladder, h.now + 1, leaving={(0, first)})
    out = h.device.guaranteed
    assert sum(out.get(band, floor) for band, floor in enumerate(floors.tolist())) <= 1.0 + 1e-9
    assert out[first] / out[urgent] == pytest.approx(before / 0.76, rel=0.1)
    give.give(asked, h.engine.steering.ladder, h.now + 2)
    assert out is not h.device.guaranteed
    assert h.device.guaranteed.get(first, 0.0) <= MOST_STANDING
