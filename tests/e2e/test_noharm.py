# SPDX-License-Identifier: Apache-2.0
"""Do no harm, on real TCP: the default policy misses no transfer that plain TCP has in time.

The cases are those in which the policy before it starved a transfer that plain sharing meets, and their like; the whole
suite is bench/noharm.py. Where it looks like harm a case is played twice again: a late wake-up of the machine is none.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import pytest

from mfsd.ground.units import Rate
from mfsd.lab.hosts.net import Fabric
from mfsd.lab.noharm import HOSTS, RATE, Arm, Beside, Case, Link, Wanted

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make network namespaces"),
]

WORST: Final = [
    Case.one(beside, alone, due / alone)
    for beside, alone, due in [
        (Beside.MARK, 0.2, 0.6),
        (Beside.MARK, 0.2, 1.4),
        (Beside.MARK, 0.84, 2.5),
        (Beside.BURSTS_50, 0.84, 2.5),
        (Beside.BURSTS_75, 0.2, 0.6),
        (Beside.BULK_1, 0.2, 0.6),
        (Beside.BULK_1, 0.2, 1.4),
        (Beside.BULK_1, 0.84, 2.5),
        (Beside.BULK_4, 0.2, 1.4),
        (Beside.LOOSER, 0.84, 2.5),
        (Beside.EQUAL, 0.2, 0.6),
        (Beside.DOOMED, 0.2, 0.6),
    ]
]
SLOW: Final = Rate.parse("20mbit")
"""A packet of 64 KB takes 26 ms."""
ON_SLOW_LINKS: Final = [
    Case.one(Beside.BULK_1, 0.2, 4.0),
    Case.one(Beside.BULK_1, 0.8, 3.0),
    Case.one(Beside.MARK, 0.8, 3.0),
]
WRONG: Final = [
    Case.one(beside, 0.2, factor, said)
    for beside, factor, said in [
        (Beside.BULK_1, 3.0, 0.1),
        (Beside.BULK_1, 3.0, 10.0),
        (Beside.BULK_4, 7.0, 0.1),
        (Beside.BULK_4, 7.0, 10.0),
        (Beside.MARK, 3.0, 0.1),
        (Beside.MARK, 3.0, 10.0),
        (Beside.LOOSER, 3.0, 10.0),
        (Beside.BACKGROUND, 3.0, 10.0),
    ]
]
"""Sizes are announced ten times too small, and too large."""
SLOW_READERS: Final = [
    Case.one(Beside.MARK, alone, 1.25 / read, read=read) for alone, read in [(0.2, 0.4), (0.2, 0.25), (0.5, 0.3)]
]
"""They take less than half of the link, and four fifths of the time at that."""
CROWDS: Final = [Case(Beside.MARK, (Wanted(0.004, 0.5),) * 40)] * 2
RULED: Final = [
    Case(beside, (Wanted(alone, due, announced=False),))
    for beside, alone, due in [
        (Beside.MARK, 0.2, 0.6),
        (Beside.MARK, 0.84, 2.5),
        (Beside.BURSTS_75, 0.2, 0.6),
        (Beside.BULK_1, 0.2, 0.6),
        (Beside.BULK_4, 0.2, 1.4),
    ]
]
"""Nothing but their stage is known."""
MOST: Final = 3
"""Times that a case is played."""


@pytest.fixture
def fabric() -> Iterator[Fabric]:
    with Fabric(HOSTS) as hosts:
        yield hosts


def play(fabric: Fabric, arm: Arm, cases: list[Case], rate: Rate) -> list[list[bool]]:
    with Link(fabric, arm, rate=rate) as link:
        return [link.play(case).met for case in cases]


@pytest.mark.parametrize(
    ("cases", "rate"),
    [(WORST, RATE), (ON_SLOW_LINKS, SLOW), (WRONG, RATE), (SLOW_READERS, RATE), (CROWDS, RATE), (RULED, RATE)],
    ids=["worst", "slow link", "wrong sizes", "slow readers", "crowds", "by stage only"],
)
def test_whatever_plain_tcp_has_in_time_is_in_time(fabric: Fabric, cases: list[Case], rate: Rate) -> None:
    plain = play(fabric, Arm.PLAIN, cases, rate)
    met = [case for case, there in zip(cases, plain, strict=True) if all(there)]
    assert len(met) > len(cases) * 2 // 3 - 1, "plain TCP itself misses most: the test says nothing"
    late = met
    for _ in range(MOST):
        outcome = play(fabric, Arm.DEFAULT, late, rate)
        late = [case for case, here in zip(late, outcome, strict=True) if not all(here)]
        if not late:
            break
    assert not late
