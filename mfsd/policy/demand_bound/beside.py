# SPDX-License-Identifier: Apache-2.0
"""What is enough beside collectives that pause."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from mfsd.policy.demand_bound.load import Load, Need
from mfsd.policy.usage import WIRE

if TYPE_CHECKING:
    from mfsd.policy.demand_bound.layout import Layout
    from mfsd.policy.demand_bound.load import Margin
    from mfsd.policy.demand_bound.verdict import Verdict
    from mfsd.policy.views import F8, I2, LinkView, Views

LEAST: Final = 0.02
"""Share of a device that is as good as none."""
MOSTLY: Final = 0.8
"""Collectives that take so much of the time count as never pausing."""
NEARLY: Final = 0.97
"""Of what plain sharing gives, where less would slow collectives down for next to nothing."""

MOVING: Final = 0.2
"""Share of a device that keeps those moving whose turn has not come. Whoever stands still until then must be rescued,
which costs it a retransmission timer where all of its window is stuck; meanwhile the link is the collectives'."""
AMPLY: Final = 1.25
"""So many times what those who are due first need themselves is kept for them."""


def fair(link: LinkView, half: float) -> F8:
    """Share of each device that gives KV NEARLY what plain sharing with one of its collectives would, shape (devices,).

    By plain sharing both have half while a collective lasts, so that S seconds of it (see ``beside``; S + P = 1) take
    2 S, and KV has all of the rest: 1 / (1 + S) on average. With g of the link a collective takes S / (1 - g), and KV
    has 1 - S / (S / (1 - g) + P) on average. Where the pauses are enough, nothing; ``half`` where there are none, or
    no collectives yet.
    """
    work = link.collectives
    taken = 1.0 - NEARLY / (1.0 + work)
    slowed = work / np.maximum(taken, LEAST) - (1.0 - work)
    share = 1.0 - work / np.maximum(slowed, np.where(work > 0.0, work, 1.0))
    return np.where((work > 0.0) & (work < MOSTLY), np.minimum(share, half), half)


def beside(link: LinkView, verdict: Verdict, headroom: float) -> F8:
    """Share of each device that is enough beside its collectives, since they pause, shape (devices,).

    A collective waits for its end before the next one begins, so with S seconds of the link for each and P between
    two of them, KV that is guaranteed g of the ``room`` that others leave slows it down to X = S / (room - g), has
    all of the room in the pause, and so gets room - S / (X + P) on average. That is to be ``average``, so they are
    slowed down evenly, and no more than somebody needs. There is less ``headroom`` the more they pause, since KV
    goes on by itself then. Where they hardly do, or there are none, or where somebody is late already, all that is
    asked for is given: inf.
    """
    work, room = link.collectives, np.maximum(1.0 - link.taken, LEAST)  # S as a share of S + P
    spare = room - WIRE * verdict.average * (1.0 + (headroom - 1.0) * work**2)
    slowed = work / np.maximum(spare, LEAST) - (1.0 - work)
    enough = np.maximum(room - work / np.maximum(slowed, LEAST), 0.0) / WIRE
    given = (work <= 0.0) | (work >= MOSTLY) | (spare <= LEAST) | (verdict.rush > 0.0)
    return np.where(given, np.inf, enough)


def moved_on(view: Views, verdict: Verdict, level: I2, layout: Layout, margin: Margin, rest: F8) -> F8:
    """Share of each device, of the ``rest`` that is guaranteed, that the others have beside those due first.

    Shape (devices,). Only beside collectives that never pause: any other leave the others something. And only as far as
    those due first, by themselves, can do without, with twice the ``margin``.
    """
    t, asked, devices = view.transfers, verdict.asked, len(rest)
    busy = view.link.collectives >= MOSTLY
    if not busy.any():
        return np.zeros(devices)
    kv = asked.given.kv & (asked.due < np.inf)
    waiting = busy & (np.bincount(t.device[kv & (level == layout.others)], minlength=devices) > 0)
    if not waiting.any():
        return np.zeros(devices)
    rows = np.flatnonzero(kv & (level == layout.first))
    load = Load.of(t.device.take(rows), asked.due.take(rows), t.left.take(rows), asked.given.rate)
    need = np.zeros(devices)
    np.maximum.at(need, t.device.take(rows), Need(load, margin.twice, 1.0 - view.link.taken).shares())
    return np.where(waiting, np.clip(rest - AMPLY * need, 0.0, MOVING), 0.0)
