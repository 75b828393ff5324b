# SPDX-License-Identifier: Apache-2.0
"""What one tenant announces must not make another's transfers late on paper, and given up for that.

A policy reckons whether all that is announced can be in time, and gives up as few as it must. It believes what is
announced: a tenant who announces much and never sends it would be made room for by giving up others. So where something
is given up and several tenants have transfers, each tenant's are judged again as if its even part of each device were
all that there is. What is in time that way stays in time; what is not shares what they leave.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np

from mfsd.policy.views import Decision

if TYPE_CHECKING:
    import numpy.typing as npt

    from mfsd.policy.base import Policy
    from mfsd.policy.views import F8, Views

    Rows = npt.NDArray[np.intp]

MOST: Final = 16
"""Tenants that are judged apart; where there are more, parts would be too small to mean anything."""
IN_HAND: Final = 1.1
"""What is in time that way needs so much more than it announces: headers, and the policy's margins."""
LEAST: Final = 0.02
"""Share of a device that the others are judged by at least."""


def decide(policy: Policy, views: Views, tenant: npt.NDArray[np.int32]) -> Decision:
    """The policy's decision, without one tenant's announcements at another's cost. ``tenant``: by row, shape (n,)."""
    together = policy.evaluate(views)
    if together.infeasible is None or not together.infeasible.any() or tenant.min() == tenant.max():
        return together
    present = np.unique(tenant)
    if len(present) > MOST:
        return together
    level, infeasible = together.level.copy(), together.infeasible.copy()
    guarantee = None if together.guarantee is None else np.zeros_like(together.guarantee)
    kept = np.zeros(len(tenant), dtype=np.bool_)
    for one in present:
        rows = np.flatnonzero(tenant == one)
        own = policy.evaluate(_part(views, rows, np.full(len(views.link.rate), 1.0 / len(present))))
        if own.infeasible is None:
            return together
        fine = ~own.infeasible
        level[rows[fine]], infeasible[rows[fine]], kept[rows[fine]] = own.level[fine], False, True
        if guarantee is not None and own.guarantee is not None:
            guarantee += own.guarantee
    rest = np.flatnonzero(~kept)
    if len(rest):
        others = policy.evaluate(_part(views, rest, np.maximum(1.0 - _need(views, np.flatnonzero(kept)), LEAST)))
        level[rest] = others.level
        if others.infeasible is not None:
            infeasible[rest] = others.infeasible
        if guarantee is not None and others.guarantee is not None:
            guarantee += others.guarantee
    if guarantee is not None:
        most = (1.0 - views.link.floor) * views.link.rate
        given = guarantee.sum(axis=1)
        guarantee *= np.minimum(1.0, most / np.maximum(given, 1e-9))[:, None]
    return Decision(level, guarantee, infeasible=infeasible)


def _part(views: Views, rows: Rows, share: F8) -> Views:
    """Some transfers, on links of which they have these shares."""
    return replace(views, transfers=views.transfers.take(rows), link=replace(views.link, rate=views.link.rate * share))


def _need(views: Views, rows: Rows) -> F8:
    """Share of each device that some transfers need to be in time, earliest deadline first."""
    t = views.transfers
    out = np.zeros(len(views.link.rate))
    for device, rate in enumerate(views.link.rate.tolist()):
        mine = rows[(t.device[rows] == device) & np.isfinite(t.deadline[rows])]
        if len(mine) and rate > 0:
            mine = mine[np.argsort(t.deadline[mine])]
            seconds = np.maximum(t.deadline[mine] - views.now, 1e-3)
            out[device] = min(float((np.cumsum(t.left[mine]) / seconds).max()) * IN_HAND / rate, 1.0)
    return out
