# SPDX-License-Identifier: Apache-2.0
"""The demand-bound policy: every transfer that can be in time is guaranteed what it needs for that, and no more."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Final

import numpy as np

from mfsd.ground.bands import LEVEL_SCAVENGER, Classes, Urgency
from mfsd.policy.base import Policy
from mfsd.policy.demand_bound.beside import LEAST, MOSTLY, beside, fair, moved_on
from mfsd.policy.demand_bound.calm import lasts
from mfsd.policy.demand_bound.crowd import REST, crowded, few
from mfsd.policy.demand_bound.layout import Layout
from mfsd.policy.demand_bound.load import Margin, Need, evenly
from mfsd.policy.demand_bound.verdict import HELD_S, NEAR_S, Verdict
from mfsd.policy.demand_bound.words import Case, explain
from mfsd.policy.parts import buckets, pick
from mfsd.policy.parts.params import option
from mfsd.policy.views import COLLECTIVE, KV_REUSE, P2D, Decision

if TYPE_CHECKING:
    import numpy.typing as npt

    from mfsd.policy.views import B1, F8, I2, Explanation, LinkView, Views

DOUBT: Final = 10.0
"""So many times too small or too large a size may be announced for a transfer to be no later than by plain sharing."""
PACKETS: Final = 4
"""Largest packets whose time is kept in hand at least: one is on the wire when somebody is promoted, and the two that
the promoted one had in its queue are sent again."""
HOLD: Final = 0.7
"""A transfer that is guaranteed stays so until it needs less than this share of ``defer_until``; and see HELD_S."""


@dataclass(frozen=True, kw_only=True)
class DemandBound(Policy):
    """Do no harm: whatever plain sharing would have in time is in time, and all else waits. Source: docs/policies.md.

    Levels, most urgent first (with four there is no "urgent", with three "first" and "others" are one)::

        0  urgent       about to be too late; above the collectives
        1  collectives
        2  first        stage 3 that needs its guarantee; due first
        3  others       needs its guarantee; stage 1, or due later. And KV of which only the stage is known (rules)
           the default band: unhinted traffic
        4  deferred     needs less than ``defer_until`` of its link; with more levels, halves of that
           background, scavenger: stage 3 of requests that can't be in time

    What a transfer needs is the demand bound (load.py): the largest share of its link that it and all that is due
    before it must get from now on, in the order of their deadlines, with a margin for ticks, rescues and TCP. From
    ``defer_until`` on it is guaranteed: the policy asks for ``headroom`` times the bound for all who are together, and
    for the level of those due first, so that they are served by deadline. Half of the link is enough until then, so
    deferring costs nobody a deadline that sharing the link with one competitor would meet, and the collectives lose
    only what somebody needs. Beside collectives that never pause it has what it needs from the beginning, where it
    waits, as a receiver may read no faster: they lose as much, only sooner. More than ``most`` is taken from them only
    when there is nothing but the margin to spare, and until then no more than is enough together with what they leave
    by themselves, in their pauses.

    Where a crowd (crowd.py) waits on a device, nobody there is deferred, and those of it who are due together are
    guaranteed together what they need, on the level of the others.

    A transfer that has been deferred or given up for ``max_defer`` is let through whatever it needs.

    Stage 1 is due when due.py says, and also stands above unhinted traffic if it needs ``defer_until`` of the link to
    be there when its layer starts. It is never given up, since the requests of a batch run together.
    """

    levels: int = 5
    defer_until: float = option(0.5, "share of its link from which on a transfer is guaranteed it", low=0.05, high=1.0)
    most: float = option(
        0.7,
        "share of the link that is guaranteed at most until somebody is about to be too late, if collectives pause",
        low=0.0,
        high=1.0,
    )
    most_short: float = option(
        0.4, "the same where a quarter can't be in time, so that the passes all wait for go on", low=0.0, high=1.0
    )
    margin_ms: float = option(25.0, "time in hand, for ticks, rescues and TCP", low=0.0)
    margin_share: float = option(0.03, "the same as a share of the time left", low=0.0, high=0.4)
    headroom: float = option(1.1, "guarantee over need", low=1.0, high=10.0)
    give_up: float = option(0.05, "share by which a link may be overcommitted before a request is given up", low=0.0)
    max_defer_kv_s: float = option(15.0, "longest time that stage 1 is held back, if its hint gives none", low=0.0)
    max_defer_p2d_s: float = option(15.0, "longest time that stage 3 is held back, if its hint gives none", low=0.0)
    overdue_share: float = option(0.05, "share guaranteed to those held back for so long", low=0.0, high=0.9)

    @cached_property
    def layout(self) -> Layout:
        """Which level is for what."""
        return Layout.of(self.levels)

    @property
    def margin(self) -> Margin:
        """Time in hand, where packets take next to none."""
        return Margin(self.margin_ms / 1e3, self.margin_share)

    def margin_on(self, link: LinkView) -> Margin:
        """Time in hand on each device: on slow ones it is that of some packets."""
        return Margin(np.maximum(self.margin_ms / 1e3, PACKETS * link.packet)[:, None], self.margin_share)

    @property
    def least_levels(self) -> int:
        """Collectives, guaranteed, deferred."""
        return Layout.LEAST

    @property
    def default_after(self) -> int:
        """Whoever needs a guarantee stands above unhinted traffic, the deferred below."""
        return self.layout.deferred

    @property
    def classes(self) -> Classes:
        """Those due first go with the collectives, others and the nearer half of the deferred in the middle.

        Stage 1 arrives where collectives do, and has a share of those ports only when it is about to be too late.
        """
        urgent = self.layout.first + 1
        middle = self.layout.deferred - urgent + (self.levels - self.layout.deferred + 1) // 2
        last = self.levels - urgent - middle
        return Classes((Urgency.URGENT,) * urgent + (Urgency.MIDDLE,) * middle + (Urgency.LAST,) * last)

    @cached_property
    def _edges(self) -> tuple[float, ...]:
        """Needs that divide the deferred levels, falling."""
        return tuple(self.defer_until / 2.0**i for i in range(1, self.levels - self.layout.deferred))

    def unannounced(self) -> I2:
        """Collectives first, then KV, above unhinted traffic: nobody knows how long it can wait."""
        lay = self.layout
        return self.by_stage(kv_reuse=lay.others, collective=lay.collective, p2d=lay.others)

    # --- deciding -----------------------------------------------------------------------------------------------------

    def judge(self, view: Views) -> Verdict:
        """Who can be in time, and what that takes."""
        margin, calm = self.margin_on(view.link), HOLD * self.defer_until
        return Verdict.of(view, self.layout, margin, give_up=self.give_up, calm=calm)

    def infeasible(self, view: Views) -> B1:
        """Transfers of requests that can't be in time beside the others, shape (n,)."""
        return self.judge(view).lost

    def _level(self, view: Views) -> I2:
        return self._decide(view).level

    def _decide(self, view: Views) -> Decision:
        verdict = self.judge(view)
        needs = self.needs(view, verdict)
        level = self._levels(view, verdict, needs)
        overdue = self.overdue(view, level)
        level = pick.levels(overdue, np.int16(self.layout.others), level)
        guarantee = self._guarantee(view, verdict, needs & ~overdue, level, overdue)
        given_up = self._given_up(view, verdict, level, guarantee)
        return Decision(level, guarantee, given_up, verdict.lost, lasts(view, verdict, self.longest))

    def needs(self, view: Views, verdict: Verdict) -> B1:
        """Transfers that need a guarantee, shape (n,)."""
        held = self.layout.guaranteed(view.transfers.level)
        held &= (verdict.need >= HOLD * self.defer_until) | (verdict.laxity < HELD_S)
        needs = (verdict.need >= self.defer_until) | held | verdict.late
        # Others have a deadline, too, if they stand before KV on its connection.
        needs &= (verdict.asked.due < np.inf) & verdict.asked.given.kv
        return needs

    def _levels(self, view: Views, verdict: Verdict, needs: B1) -> I2:
        t, lay = view.transfers, self.layout
        above = needs | self._near(view, verdict) | (verdict.layer_need >= self.defer_until)
        if (view.link.rate <= 0).any():
            above |= view.link.rate.take(t.device) <= 0  # nobody knows what it needs
        above |= self.crowd(view, verdict)
        above &= verdict.asked.due < np.inf
        was = t.level == lay.others
        first = few(view, above & verdict.first & (t.stage != KV_REUSE), was)
        level = pick.levels(above, lay.place(first), self._deferred(verdict.need, t.level))
        urgent = few(view, needs & verdict.late & verdict.next, was)
        level = pick.levels(urgent, np.int16(lay.urgent), level)
        level = pick.levels(verdict.open, np.int16(lay.others), level)
        level = pick.levels(verdict.lost & (t.stage == P2D), np.int16(LEVEL_SCAVENGER), level)
        return pick.levels(t.stage == COLLECTIVE, np.int16(lay.collective), level)

    def _near(self, view: Views, verdict: Verdict) -> B1:
        """Transfers that have little to spare, shape (n,).

        But for the deferred that have had what they need all the time: a promotion would cost some of what is left.
        """
        t, near = view.transfers, verdict.laxity < NEAR_S
        if near.any():
            had = (t.level >= self.layout.deferred) & (t.level < self.levels) & ~verdict.greedy
            near &= ~(had & verdict.asked.given.kv & (view.link.collectives >= MOSTLY).take(t.device))
        return near

    def crowd(self, view: Views, verdict: Verdict) -> B1:
        """Transfers that are part of a crowd, or of what is left of one, shape (n,): they are not deferred."""
        t, lay = view.transfers, self.layout
        there = verdict.asked.given.kv & (verdict.asked.due < np.inf)
        if np.count_nonzero(there) < REST:
            return np.zeros(len(t), dtype=np.bool_)
        was = (t.level == lay.first) | (t.level == lay.others)
        return there & ~few(view, there, was)

    def _deferred(self, need: F8, old: I2) -> I2:
        """Levels of those that can wait, shape (n,): those that need more are on the first of them."""
        first = self.layout.deferred
        if not self._edges:
            return np.full(len(need), first, dtype=np.int16)
        last = np.int16(first + len(self._edges))
        rising = last - buckets.bucket(need, self._edges)
        falling = last - buckets.bucket(need, [HOLD * edge for edge in self._edges])
        return np.clip(np.where((old >= first) & (old <= last), old, rising), falling, rising).astype(np.int16)

    def longest(self, view: Views) -> F8:
        """Seconds for which each transfer may be held back, shape (n,)."""
        t = view.transfers
        default = np.where(t.stage == KV_REUSE, self.max_defer_kv_s, self.max_defer_p2d_s)
        return np.where(np.isfinite(t.max_defer), t.max_defer, default)

    def overdue(self, view: Views, level: I2) -> B1:
        """KV transfers at a low ``level`` that have been held back for as long as they may be, shape (n,)."""
        t = view.transfers
        least = min(self.max_defer_kv_s, self.max_defer_p2d_s, t.max_defer.min(initial=np.inf))
        if view.now - t.created.min(initial=np.inf) < least:
            return np.zeros(len(t), dtype=np.bool_)
        low = ((t.stage == KV_REUSE) | (t.stage == P2D)) & (level >= self.layout.deferred)
        overdue: B1 = low & (view.now - t.created >= self.longest(view))
        return overdue

    def _guarantee(self, view: Views, verdict: Verdict, needs: B1, level: I2, overdue: B1) -> F8:
        """Bytes/s by device and level, shape (devices, levels).

        What is needed goes to the level of who is due first, so that they are served by deadline.
        """
        lay, link, devices = self.layout, view.link, len(view.link.rate)
        asks = np.flatnonzero(needs & (level < lay.deferred))
        waits, fits = self._meanwhile(view, verdict, level)
        beyond = (link.beyond > 0) & (link.collectives >= MOSTLY)
        unknown = link.unannounced.copy()
        unknown[:, lay.others] |= np.bincount(view.transfers.device[verdict.open], minlength=devices) > 0
        more = bool(unknown[:, lay.first : lay.deferred].any())
        if not len(asks) and not overdue.any() and not len(waits) and not beyond.any() and not more:
            return np.zeros((devices, self.levels))
        cell = view.transfers.device * np.int32(self.levels) + level
        earliest = np.full(devices * self.levels, np.inf)
        np.minimum.at(earliest, cell.take(asks), verdict.asked.due.take(asks))
        due = earliest.reshape(devices, self.levels)
        there, leads = due < np.inf, due[:, lay.first] <= due[:, lay.others]
        out = np.zeros((devices, self.levels))
        left = np.maximum(1.0 - link.floor, 0.0)

        def give(level: int, share: F8) -> None:
            nonlocal left
            share = share.clip(0.0, left)
            out[:, level] += share
            left = left - share

        give(lay.urgent, np.where(there[:, lay.urgent], self.headroom * self._rush(view, verdict, level), 0.0))
        most = np.where(verdict.short, min(self.most_short, self.most), self.most)
        most = np.where((verdict.rush > 0.0) & ~there[:, lay.urgent], 1.0, most)  # a crowd that is about to be too late
        # Collectives that never pause lose as much in any case, and what is asked of them late may be too late.
        asked = np.where((link.collectives >= MOSTLY) & ~verdict.short, 1.0, most)
        rest = np.minimum(np.minimum(self.headroom * verdict.total, asked), beside(view.link, verdict, self.headroom))
        rest -= out[:, lay.urgent]
        ahead = there[:, lay.first] & leads
        moving = np.where(ahead, moved_on(view, verdict, level, lay, self.margin_on(link), rest), 0.0)
        give(lay.first, np.where(ahead, rest - moving, 0.0))
        give(lay.others, np.where(there[:, lay.others] & ~leads, rest, moving))
        if overdue.any():
            waiting = np.bincount(view.transfers.device[overdue], minlength=devices) > 0
            give(lay.others, np.where(waiting, self.overdue_share, 0.0))
        # More than was announced: nobody knows how much it needs, but half of the link has been enough until now.
        give(lay.others, np.where(beyond, self.defer_until, 0.0))
        if len(waits):
            fit, sure = waits[fits], waits[~fits]
            doubt, steady = np.zeros((2, devices * self.levels))
            np.maximum.at(doubt, cell.take(fit), self._doubt(view, verdict, fit))
            np.maximum.at(steady, cell.take(sure), self._steady(view, verdict, sure))
            for wait in range(lay.deferred, self.levels):
                own, together = (of.reshape(devices, self.levels)[:, wait] for of in (doubt, steady))
                give(wait, np.maximum(np.minimum(own, self.defer_until), np.minimum(together, most) - out.sum(axis=1)))
        # Nor when these are due, and how much they are, but plain sharing with collectives would give them something.
        for known in range(lay.first, lay.deferred) if more else ():
            part = np.clip(most - out.sum(axis=1), 0.0, fair(link, self.defer_until))
            give(known, np.where(unknown[:, known], part, 0.0))
        return out * link.rate[:, None]

    def _rush(self, view: Views, verdict: Verdict, level: I2) -> F8:
        """Share of each device that has those in time who are urgent, shape (devices,); 0 where nobody is late.

        They share what they get, which would be too little for the first of them, were it only what that needs.
        """
        rows = np.flatnonzero((level == self.layout.urgent) & verdict.asked.given.kv & (verdict.asked.due < np.inf))
        if not len(rows):
            return verdict.rush
        t, asked = view.transfers, verdict.asked
        shares = evenly(t.device.take(rows), asked.due.take(rows), t.left.take(rows), asked.given.rate)
        return np.where(verdict.rush > 0.0, np.maximum(verdict.rush, shares), 0.0)

    def _doubt(self, view: Views, verdict: Verdict, rows: npt.NDArray[np.intp]) -> F8:
        """Share of their devices that these rows would need if sizes were announced DOUBT times too small, shape (m,).

        Of each by itself what was sent counts once, not DOUBT times: what is left of what was announced comes to
        nothing long before the transfer does.
        """
        t, device = view.transfers, view.transfers.device.take(rows)
        left, size = t.left.take(rows), t.size.take(rows)
        work = (DOUBT * size - np.maximum(size - left, 0.0)) / verdict.asked.given.rate.take(device)
        seconds = self.margin_on(view.link).on(device).leave(verdict.asked.due.take(rows)[:, None])[:, 0]
        own = np.where(seconds > 0.0, work / np.where(seconds > 0.0, seconds, 1.0), 0.0)
        return np.maximum(DOUBT * verdict.need.take(rows), own)

    def _steady(self, view: Views, verdict: Verdict, rows: npt.NDArray[np.intp]) -> F8:
        """Share of their devices with which these rows need not be promoted, shape (m,).

        It is what they need with twice the margin, and for a crowd half of the link, as long as that is enough: each of
        its connections has to open its window.
        """
        if not len(rows):
            return np.zeros(0)
        twice = Need(verdict.asked.load, self.margin_on(view.link).twice, 1.0 - view.link.taken).shares().take(rows)
        share = self.headroom * np.maximum(verdict.need.take(rows), np.minimum(twice, self.defer_until))
        return np.where(crowded(view, rows), np.maximum(share, self.defer_until), share)

    def _meanwhile(self, view: Views, verdict: Verdict, level: I2) -> tuple[npt.NDArray[np.intp], B1]:
        """Rows of the deferred that have a part of their device meanwhile, shape (m,), and who have enough for DOUBT.

        As by plain sharing: as much as is enough if sizes were announced DOUBT times too small, and no more than is
        guaranteed them later. Beside collectives that never pause so much may not fit: there the others have what they
        need, together with all that is guaranteed: a receiver may take no more than that at a time, and collectives
        would only wait later. Collectives that pause leave some.
        """
        link = view.link
        plain, busy = (link.unhinted >= LEAST) & (link.collectives <= 0.0), link.collectives >= MOSTLY
        if not (plain | busy).any():
            return np.zeros(0, dtype=np.intp), np.zeros(0, dtype=np.bool_)
        waits = (level >= self.layout.deferred) & (level < self.levels) & (verdict.asked.due < np.inf)
        waits &= verdict.asked.given.kv
        device = view.transfers.device
        fits = plain.take(device) | (DOUBT * verdict.need <= 1.0)
        rows = np.flatnonzero(waits & (fits | ~verdict.greedy) & (plain | busy).take(device))
        return rows, fits.take(rows)

    def _given_up(self, view: Views, verdict: Verdict, level: I2, guarantee: F8) -> F8 | None:
        """Bytes/s for the lost, shape (devices,): what is guaranteed to nobody, up to ``defer_until``; None: nothing.

        Sizes may have been announced too large, and plain sharing would have them in time. Only until they are due,
        where few are lost, and where no collectives wait for it; beside those that never pause if there is nobody else.
        """
        t, link = view.transfers, view.link
        there = (level == LEVEL_SCAVENGER) & (t.deadline > view.now)
        if not there.any():
            return None
        devices = len(link.rate)
        wait = np.bincount(t.device[there], minlength=devices)
        single = (link.collectives >= MOSTLY) & (np.bincount(t.device[t.stage != COLLECTIVE], minlength=devices) == 1)
        some = (wait > 0) & ~verdict.short & ((link.collectives <= 0.0) | single)
        left = np.maximum(1.0 - link.floor, 0.0) * link.rate - guarantee.sum(axis=1)
        return np.where(some, np.clip(left, 0.0, self.defer_until * link.rate), 0.0)

    # --- words --------------------------------------------------------------------------------------------------------

    def _reasons(self, out: Explanation, row: int, level: int, view: Views) -> None:
        verdict = self.judge(view)
        needs = self.needs(view, verdict)
        guarantee = self.evaluate(view).guarantee
        assert guarantee is not None  # noqa: S101 (for mypy)
        case = Case(
            row=row,
            level=level,
            verdict=verdict,
            needs=bool(needs[row]),
            granted=float(guarantee[view.transfers.device[row], : self.layout.deferred].sum()),
            meanwhile=float(guarantee[view.transfers.device[row], level]) if level < self.levels else 0.0,
            beside=float(beside(view.link, verdict, self.headroom)[view.transfers.device[row]]),
            longest=float(self.longest(view)[row]),
            crowd=bool(self.crowd(view, verdict)[row]),
            let_through=bool(self.overdue(view, self._levels(view, verdict, needs))[row]),
            layout=self.layout,
            margin=self.margin_on(view.link),
            defer_until=self.defer_until,
        )
        explain(case, out, view)

    def _verdict(self, out: Explanation, row: int, view: Views) -> None:
        """The reasons say it."""
