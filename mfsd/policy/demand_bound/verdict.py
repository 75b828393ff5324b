# SPDX-License-Identifier: Apache-2.0
"""What the levels and guarantees of the demand-bound policy follow from: who can be in time, and what that takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

import numpy as np

from mfsd.policy.demand_bound.judge import Asked, Far, judge
from mfsd.policy.demand_bound.load import Load, Margin, Need
from mfsd.policy.views import BACKGROUND, P2D

if TYPE_CHECKING:
    import numpy.typing as npt

    from mfsd.policy.demand_bound.layout import Layout
    from mfsd.policy.views import B1, F8, Views

    Counts = npt.NDArray[np.intp]

FIRST_S: Final = 0.02
"""Work, as time at full rate, that counts as due first: two ticks of it, so that the level isn't empty in between while
whoever comes next gets going."""
STAYS_FIRST: Final = 3.0
"""Whoever is due first stays so until so many times that is due before it."""
NEXT_S: Final = 0.01
"""Work that is let past the collectives at a time. Its transfers share what there is instead of going one by one, so
that it must be well below the margin. Whoever is urgent stays so while nothing moves but time."""

SHORT: Final = 2, 1 / 4
"""A device is short if so many stage-3 transfers on it can't be in time, such a share of all that it has, and of the
work. With fewer lost the rest still fits: sets that earliest deadline first would meet lose one to TCP, and no more for
that. The last bytes of the lost take seconds at their floor, and are little beside the others."""
CROWDED: Final = 4, 1 / 3
"""The same of a device that is crowded."""

NEAR_S: Final = 0.1
"""With less to spare a transfer stands above unhinted traffic whatever it needs, here and in the fabric."""
HELD_S: Final = 0.25
"""With less to spare a transfer that is guaranteed stays so, whatever it needs: deferred, it would be promoted again
soon, and each promotion costs some of the margin."""


@dataclass(frozen=True, slots=True)
class _Gone:
    """What of stage 3 is lost, by device; shapes (devices,)."""

    count: Counts
    there: Counts
    """Transfers of all stages."""
    left: F8
    of: F8
    """What is left of the lost, and of all of stage 3, bytes; nothing where none is lost."""

    @classmethod
    def among(cls, view: Views, lost: B1, there: Counts) -> Self:
        """``lost``: of all stages."""
        t, devices = view.transfers, len(there)
        late = t.stage == P2D
        gone = late & lost
        if not gone.any():
            return cls(np.zeros(devices, dtype=np.intp), there, np.zeros(devices), np.zeros(devices))
        left, of = (
            np.bincount(t.device[some], weights=t.left[some], minlength=devices).astype(np.float64, copy=False)
            for some in (gone, late)
        )
        return cls(np.bincount(t.device[gone], minlength=devices), there, left, of)

    def lacking(self, least: tuple[int, float]) -> B1:
        """Devices on which so many are lost, and such a share of them and of the work, shape (devices,)."""
        count, share = least
        lacking: B1 = (self.count >= count) & (self.count >= share * self.there) & (self.left >= share * self.of)
        return lacking


@dataclass(slots=True)
class Verdict:
    """Arrays per transfer have the shape (n,), those per device (devices,)."""

    asked: Asked
    lost: B1
    """Its request can't be in time."""
    open: B1
    """It is KV of which nobody knows when it is due."""
    short: B1
    """Much of what the device has can't be in time."""
    need: F8
    """Share of its scarcest link that must go to it and to what is due before it."""
    greedy: B1
    """Its device is crowded, and it would need more than an equal share of it: it is promised nothing."""
    late: B1
    """No more than the margin is left to it or to somebody due later: it is about to be too late. Not of the greedy."""
    first: B1
    """It is among those due first."""
    next: B1
    """It is among the first of those."""
    laxity: F8
    """Seconds that it, and whoever is due later, has to spare; inf without a deadline."""
    layer_need: F8
    """As ``need``, to be there when its layer starts; 0 if there is none."""
    slow: B1
    """The link into its peer is scarcer than its device."""
    total: F8
    """Share of the device that must go to KV but for the greedy; 0 if it is so little that nobody needs a guarantee."""
    average: F8
    """Share of the device that must go to KV but for the greedy on average, if all goes well."""
    rush: F8
    """Share of the device that must go to what is late."""

    @classmethod
    def of(cls, view: Views, layout: Layout, margin: Margin, *, give_up: float, calm: float) -> Self:
        """``give_up``, ``calm``: as in judge.py."""
        t, link = view.transfers, view.link
        asked = judge(view, give_up, calm)
        rate, room = asked.given.rate, 1.0 - link.taken
        here, before = Need(asked.load, margin, room), asked.load.before()
        was_urgent, was_first = t.level == layout.urgent, t.level == layout.first
        lost = asked.lost.rows(view) & (t.stage != BACKGROUND)
        there = np.bincount(t.device, minlength=len(rate))
        gone = _Gone.among(view, lost, there)
        greedy = _greedy(view, asked, gone.lacking(CROWDED), there)
        promised, some = here, bool(greedy.any())
        if some:
            due = np.where(greedy, np.inf, asked.due)
            promised = Need(Load.of(t.device, due, t.left, rate), margin, room)
        rush, late, first, following = promised.rush(), promised.late(), before < FIRST_S, before < NEXT_S
        most = np.maximum(promised.steady(), rush)
        # Whoever was urgent, or due first, stays so for longer.
        if was_urgent.any():
            late |= promised.later() & was_urgent
        was_first |= was_urgent
        if was_first.any():
            well_before = asked.load.well_before()
            following |= (well_before < NEXT_S) & was_urgent
            first |= (well_before < STAYS_FIRST * FIRST_S) & was_first
        out = cls(
            asked=asked,
            lost=lost,
            open=asked.given.kv & (asked.due == np.inf) & ~lost,
            short=gone.lacking(SHORT),
            need=here.shares(),
            greedy=greedy,
            late=late & ~greedy if some else late,
            first=first,
            next=following,
            laxity=here.laxity(),
            layer_need=np.zeros(len(t)),
            slow=np.zeros(len(t), dtype=np.bool_),
            total=np.where((most >= calm) | (promised.spare() < HELD_S), most, 0.0),
            average=promised.average(),
            rush=rush,
        )
        if asked.far is not None:
            out._far(view, asked.far, margin, was_urgent)
        if len(asked.given.early):
            rows, seconds = asked.given.seconds_to_layer(view, asked.due)
            early = Load.of(t.device.take(rows), seconds, t.left.take(rows), rate)
            out.layer_need[rows] = Need(early, margin, np.ones(len(rate))).shares()
        return out

    def _far(self, view: Views, far: Far, margin: Margin, was_urgent: B1) -> None:
        """Add what the links into peers ask: to be served at their pace, not when the device would be in time."""
        rows, before = far.rows, far.load.before()
        device = np.zeros(len(far.rate), dtype=np.int32)
        np.maximum.at(device, far.link, view.transfers.device.take(rows))  # the last one, where several lead there
        margin = margin.on(device)
        there, greedy = Need(far.load, margin, np.ones(len(far.rate))), self.greedy.take(rows)
        promised = there
        if greedy.any():
            due, left = np.where(greedy, np.inf, self.asked.due.take(rows)), view.transfers.left.take(rows)
            promised = Need(Load.of(far.link, due, left, far.rate), margin, np.ones(len(far.rate)))
        need = there.shares()
        self.slow[rows] = slow = need > self.need.take(rows)
        self.need[rows] = np.maximum(self.need.take(rows), need)
        self.late[rows] |= (promised.late() | (promised.later() & was_urgent.take(rows))) & ~greedy
        self.first[rows] |= (before < FIRST_S) & slow
        self.next[rows] |= (before < NEXT_S) & slow
        self.laxity[rows] = np.minimum(self.laxity.take(rows), there.laxity())

        def on_devices(share: F8) -> F8:
            """Share of the devices' rates that these shares of the links' are."""
            asked = np.bincount(device, weights=np.minimum(share, 1.0) * far.rate, minlength=len(view.link.rate))
            return np.minimum(asked / self.asked.given.rate, 1.0)

        self.total = np.maximum(self.total, on_devices(np.maximum(promised.steady(), promised.rush())))
        self.average = np.maximum(self.average, on_devices(promised.average()))
        self.rush = np.maximum(self.rush, on_devices(promised.rush()))


def _greedy(view: Views, asked: Asked, crowded: B1, there: Counts) -> B1:
    """Transfers on crowded devices that would be in time by more than an equal share of the rate only, shape (n,).

    Where not all can be in time, what is promised to some is taken from the collectives, which all forward passes wait
    for, and so from those who come next. What plain sharing would have in time is kept; more would cost more than it
    saves.
    """
    t = view.transfers
    if not crowded.any():
        return np.zeros(len(t), dtype=np.bool_)
    work = t.left / asked.given.rate.take(t.device)
    greedy: B1 = work * there.take(t.device) > asked.due
    return greedy & crowded.take(t.device)
