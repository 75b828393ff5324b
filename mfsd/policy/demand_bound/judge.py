# SPDX-License-Identifier: Apache-2.0
"""Which requests can still be in time, and what they ask of the links.

A request is lost when its deadline has passed, when its compute alone takes longer, or when a link can't carry all that
is due and it is the one to go (drop.py): with all its bytes on every link. What stands before a transfer on its
connection is due when that is. What is lost stays lost until it fits beside the others without the tolerance that the
others have, so that nobody goes back and forth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

import numpy as np

from mfsd.policy.demand_bound.drop import MOST, most_work_first
from mfsd.policy.demand_bound.due import Given, Lost, jobs
from mfsd.policy.demand_bound.fifo import hurried_by
from mfsd.policy.demand_bound.load import Load, bucket

if TYPE_CHECKING:
    import numpy.typing as npt

    from mfsd.policy.views import B1, F8, I4, Views

RETURNS: Final = (16, 4)
"""So many requests may come back in one evaluation, if the smallest alone fits: the smaller ones, if not all do."""


@dataclass(slots=True)
class Far:
    """Links into peers whose rate is known and that could be short of time."""

    rows: npt.NDArray[np.intp]
    """Transfers to them, shape (m,)."""
    link: npt.NDArray[np.intp]
    """Which of the links each takes, shape (m,)."""
    rate: F8
    """Bytes/s, shape (links,)."""
    load: Load

    @classmethod
    def of(cls, view: Views, due: F8, calm: float) -> Self | None:
        """Those that need a share ``calm`` of their rate or more; None if there are none."""
        t, rate = view.transfers, view.link.peer_rate
        if not np.isfinite(rate).any():
            return None
        rows = np.flatnonzero((t.peer >= 0) & (due < np.inf))
        rows = rows[np.isfinite(rate[t.peer[rows]])]
        peer, seconds, left = t.peer.take(rows).astype(np.intp), due.take(rows), t.left.take(rows)
        first = np.full(len(rate), np.inf)
        np.minimum.at(first, peer, seconds)
        busy = np.bincount(peer, weights=left, minlength=len(rate)) > calm * rate * first
        busy &= first < np.inf
        if not busy.any():
            return None
        kept = np.flatnonzero(busy[peer])
        rows, link = rows[kept], (np.cumsum(busy) - 1).take(peer[kept])
        return cls(rows, link, rate[busy], Load.of(link, seconds[kept], left[kept], rate[busy]))


@dataclass(slots=True)
class Asked:
    """What those who can be in time ask."""

    given: Given
    lost: Lost
    due: F8
    """Seconds until each transfer must have arrived, for itself or for who waits behind it, shape (n,); inf: never."""
    hurried_by: I4 | None
    """Row whose deadline that is, shape (n,); None: each its own."""
    load: Load
    """On the devices, an entry per transfer."""
    far: Far | None

    @classmethod
    def of(cls, view: Views, given: Given, lost: Lost, calm: float) -> Self:
        """If these are lost. ``calm``: share of its rate below which a peer's link is of no interest."""
        t = view.transfers
        due = given.seconds_left(view, lost)
        by = hurried_by(t.conn, t.ahead, due)
        if by is not None:
            due = due.take(by)
        return cls(given, lost, due, by, Load.of(t.device, due, t.left, given.rate), Far.of(view, due, calm))

    def overloaded(self, view: Views, room: F8, far_room: float) -> list[tuple[npt.NDArray[np.intp], float]]:
        """Rows, and bytes/s that it gives, of every link that can't have all in time: devices, then peers.

        ``room``: share of their rate that the devices give, shape (devices,); ``far_room``: the same of peers' links.
        """
        out = []
        for device in np.flatnonzero(self.load.overloaded(room)).tolist():
            rows = np.flatnonzero((view.transfers.device == device) & (self.due < np.inf))
            out.append((rows, float(self.given.rate[device] * room[device])))
        far = self.far
        if far is not None:
            short = np.flatnonzero(far.load.overloaded(np.full(len(far.rate), far_room))).tolist()
            out.extend((far.rows[far.link == link], float(far.rate[link] * far_room)) for link in short)
        return out

    def drop(self, view: Views, room: F8, far_room: float, most: int) -> tuple[Lost | None, int]:
        """Whom to give up so that the rest fits every link; None if all fit. ``most``: jobs to look at.

        Also returns how many were looked at.
        """
        links = self.overloaded(view, room, far_room)
        if not links:
            return None, 0
        n, r = len(view.transfers), len(view.requests)
        work = jobs(view, self.lost, np.arange(n, dtype=np.int32) if self.hurried_by is None else self.hurried_by)
        gone, seen = np.zeros(r + n, dtype=np.bool_), 0
        for rows, rate in links:
            left = rows[~gone[work.of[rows]]]  # without what another link has dropped
            some = max(most // len(links), 1)
            dropped, looked = most_work_first(work, left, self.due[left], view.transfers.left[left] / rate, some)
            gone[list(dropped)] = True
            seen += looked
        return (Lost(gone[:r], gone[r:]) if gone.any() else None), seen


def judge(view: Views, tolerance: float, calm: float) -> Asked:
    """Decide who is lost. ``tolerance``: share by which a link may be overcommitted before somebody is."""
    given, before = Given.of(view), Lost.by_rows(view, view.transfers.infeasible)
    hopeless = Lost.hopeless(view, given, before, tolerance)
    room = 1.0 - view.link.taken
    asked = Asked.of(view, given, before | hopeless, calm)
    more, seen = asked.drop(view, room * (1.0 + tolerance), 1.0 + tolerance, MOST)
    if not seen:
        waiting = before.without(hopeless)
        return _restore(view, asked, waiting, room, calm) if waiting else asked
    while more is not None:
        # Whoever is dropped frees other links and moves deadlines of stage 1, so look again.
        asked = Asked.of(view, given, asked.lost | more, calm)
        if seen >= MOST:
            break
        more, looked = asked.drop(view, room * (1.0 + tolerance), 1.0 + tolerance, MOST - seen)
        seen += looked
    return asked


def _restore(view: Views, asked: Asked, waiting: Lost, room: F8, calm: float) -> Asked:
    """Take back some of those ``waiting`` if all still fit."""
    candidates = _could_fit(view, asked, waiting, room)
    some = _returned(view, asked, candidates[:1], room, calm)
    if some is None:
        return asked
    for count in RETURNS:
        more = _returned(view, asked, candidates[:count], room, calm) if len(candidates) > count // 4 else None
        if more is not None:
            return more
    return some


def _returned(view: Views, asked: Asked, jobs: npt.NDArray[np.intp], room: F8, calm: float) -> Asked | None:
    """With these jobs back; None if there are none, or if not all whom they hurry fit."""
    r = len(view.requests)
    back = np.zeros(r + len(view.transfers), dtype=np.bool_)
    back[jobs] = True
    returning = Lost(back[:r], back[r:])
    if not returning:
        return None
    tried = Asked.of(view, asked.given, asked.lost.without(returning), calm)
    hurried = tried.due < asked.due  # theirs, and stage 1 and what stands before them, which they hurry
    return None if any(hurried[rows].any() for rows, _ in tried.overloaded(view, room, 1.0)) else tried


def _could_fit(view: Views, asked: Asked, waiting: Lost, room: F8) -> npt.NDArray[np.intp]:
    """Jobs of ``waiting`` that would fit the devices if nobody else came back, least work first.

    Of equal ones that with fewest bytes: on a device whose rate is not known nothing is work.
    """
    t, r, devices = view.transfers, len(view.requests), len(view.link.rate)
    seconds = asked.given.seconds_left(view, asked.lost.without(waiting))
    theirs: B1 = waiting.rows(view)
    rows = np.flatnonzero(theirs & (seconds < np.inf))
    seconds, request, device = seconds.take(rows), t.request.take(rows), t.device.take(rows)
    cell = np.where(request >= 0, request, r + rows) * devices + device
    work = t.left.take(rows) / asked.given.rate.take(device)
    needed = np.bincount(cell, weights=work, minlength=(r + len(t)) * devices)
    spare = np.full(len(needed), np.inf)
    free = asked.load.spare(room)[device, bucket(seconds)]
    np.minimum.at(spare, cell, np.minimum(free, seconds * room.take(device)))
    there = (spare < np.inf).reshape(-1, devices).any(axis=1)
    fits = np.flatnonzero(there & (needed <= spare).reshape(-1, devices).all(axis=1))
    left = np.bincount(cell // devices, weights=t.left.take(rows), minlength=r + len(t))
    return fits[np.lexsort((left.take(fits), needed.reshape(-1, devices)[fits].sum(axis=1)))]
