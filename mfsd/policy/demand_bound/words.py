# SPDX-License-Identifier: Apache-2.0
"""Why a transfer is where the demand-bound policy put it, in words."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mfsd.ground import units
from mfsd.ground.bands import LEVEL_SCAVENGER
from mfsd.policy.base import place
from mfsd.policy.demand_bound.load import BUCKETS, Margin, bucket
from mfsd.policy.demand_bound.verdict import NEAR_S, Verdict
from mfsd.policy.parts.bound import rates
from mfsd.policy.views import COLLECTIVE, P2D

if TYPE_CHECKING:
    from mfsd.policy.demand_bound.layout import Layout
    from mfsd.policy.views import Explanation, Views


@dataclass(slots=True)
class Case:
    """What was decided about one transfer."""

    row: int
    level: int
    verdict: Verdict
    needs: bool
    """It needs a guarantee."""
    granted: float
    """Bytes/s that its device guarantees to KV."""
    meanwhile: float
    """The same of its level: what those who wait there have."""
    beside: float
    """Share of its device that is enough beside the collectives there; inf: they count for nothing."""
    longest: float
    """Seconds that it may be held back."""
    crowd: bool
    """It is part of one."""
    let_through: bool
    """It has been for so long."""
    layout: Layout
    margin: Margin
    defer_until: float

    @property
    def deferred(self) -> bool:
        """It stands below unhinted traffic."""
        return self.level >= self.layout.deferred


def explain(case: Case, out: Explanation, view: Views) -> None:
    """Append reasons and figures."""
    row, verdict, where = case.row, case.verdict, place(case.level)
    if view.transfers.stage[row] == COLLECTIVE:
        above = ", only KV that is about to be too late stands above it" if case.layout.collective else ""
        out.reasons.append(f"It is a collective: {where}{above}.")
        return
    held_until = case.longest - (view.now - float(view.transfers.created[row]))
    if case.let_through:
        out.reasons.append(
            f"It has been held back for {units.duration(case.longest)}, as long as it may be: it is let through on "
            f"{where}, above unhinted traffic."
        )
    if verdict.lost[row]:
        _lost(case, out, view)
    elif math.isinf(verdict.asked.due[row]):
        out.reasons.append(
            f"Nobody knows when it is due: {where}, above unhinted traffic, with as much as by plain sharing "
            "beside collectives."
        )
    else:
        _needed(case, out, view)
        _place(case, out, view)
    if case.deferred and held_until > 0:
        out.figures["held_back_until_s"] = held_until
        out.reasons.append(f"It is let through in {units.duration(held_until)} whatever it needs.")


def _needed(case: Case, out: Explanation, view: Views) -> None:
    rate, row, verdict = float(view.link.rate[view.transfers.device[case.row]]), case.row, case.verdict
    need, laxity = float(verdict.need[row]), float(verdict.laxity[row])
    out.figures |= {
        "needed_share": need,
        "needed_bytes_per_s": need * rate,
        "guaranteed_bytes_per_s": case.granted,
        "laxity_s": laxity,
    }
    if verdict.slow[row]:
        amount = f"{need:.0%} of the link into its peer"
    elif rate:
        amount = f"{units.rate(need * rate)} of {units.rate(rate)}"
    else:
        amount = "nobody knows how much of its device"
    whose = "it" if verdict.first[row] else "with what is due before it, it"
    granted = ""
    if case.needs and not case.granted and case.beside <= 0.0:
        granted = ", which the collectives leave: nothing is guaranteed on its device"
    elif case.needs and not verdict.greedy[row]:
        rest = ", the collectives leave the rest" if case.granted < need * rate and math.isfinite(case.beside) else ""
        granted = f", and {units.rate(case.granted)} are guaranteed on its device{rest}"
    out.reasons.append(f"{whose.capitalize()} needs {amount} to be in time{granted}.")
    if verdict.greedy[row]:
        out.reasons.append(
            "Others on its device can't be in time, and it would need more than an equal share: it is promised nothing."
        )


def _place(case: Case, out: Explanation, view: Views) -> None:
    row, verdict, where = case.row, case.verdict, place(case.level)
    laxity = units.duration(max(float(verdict.laxity[row]), 0.0))
    if case.level == case.layout.urgent and verdict.late[row] and verdict.next[row]:
        above = ", above the collectives" if case.layout.collective else ""
        out.reasons.append(
            f"Only {laxity} are to spare for it or what is due after it, less than the margin: {where}{above}."
        )
    elif case.needs:
        why = (
            "It is due first" if verdict.first[row] and case.level != case.layout.others else "Others are due before it"
        )
        out.reasons.append(f"{why}: {where}, above unhinted traffic.")
    elif not case.deferred and not case.let_through:
        if verdict.layer_need[row] >= case.defer_until:
            why = "The layer that it feeds is about to start"
        elif view.link.rate[view.transfers.device[row]] <= 0:
            why = "Nobody knows what its device gives"
        elif case.crowd and verdict.laxity[row] >= NEAR_S:
            why = "It is one of very many, which are not deferred"
        else:
            why = f"It has only {laxity} to spare"
        out.reasons.append(f"{why}: {where}, above unhinted traffic.")
    elif case.deferred:
        wait = _until_promoted(case, view)
        out.figures["next_promotion_s"] = wait
        have = f", with {units.rate(case.meanwhile)} meanwhile" if case.meanwhile else ""
        out.reasons.append(
            f"That is less than {case.defer_until:.0%} of it, so it can wait: {where}, below unhinted traffic{have}. "
            f"It is promoted in {units.duration(wait)} if nothing of it is sent until then."
        )


def _until_promoted(case: Case, view: Views) -> float:
    """Seconds until a deferred transfer is promoted if nothing is sent, by the figures of its device."""
    load, device = case.verdict.asked.load, int(view.transfers.device[case.row])
    due, total = (m[device, int(load.cell[case.row]) % BUCKETS :] for m in (load.due, load.total))
    wait = (case.margin.on(np.array([device])).leave(due) - total / case.defer_until) / (1.0 - case.margin.share)
    return max(min(float(wait.min()), float(case.verdict.laxity[case.row]) - NEAR_S), 0.0)


def _lost(case: Case, out: Explanation, view: Views) -> None:
    t, row = view.transfers, case.row
    device, request = int(t.device[row]), int(t.request[row])
    left = float(t.deadline[row]) - view.now
    if request >= 0:
        left = min(left, float(view.requests.deadline[request]) - view.now)
    rate, room = float(rates(view)[device]), float(1.0 - view.link.taken[device])
    siblings = (t.request == request) & (t.device == device) & (t.stage == P2D) & (request >= 0)
    own = float(t.left[siblings].sum() if siblings.any() else t.left[row]) / rate
    kept = float(case.verdict.asked.load.total[device, int(bucket(np.array([max(left, 0.0)]))[0])])
    out.figures |= {"work_s": own, "kept_before_s": kept}
    if left <= 0:
        why = "its deadline has passed"
    elif t.compute_left[row] > left:
        why = f"its compute alone takes {units.duration(float(t.compute_left[row]))}"
    elif own > left * room:
        why = f"its {units.duration(own)} of work at full rate don't fit the {units.duration(left)} left"
    else:
        why = (
            f"what is due before it and was kept instead has less work each, {units.duration(kept)} in all, and leaves "
            f"too little of the {units.duration(left)} for its {units.duration(own)}, or a sibling is late"
        )
    out.reasons.append(f"Its request is given up: {why}.")
    if case.level == LEVEL_SCAVENGER:
        out.reasons.append(f"So it is in {place(case.level)}. It comes back when it fits beside the others.")
    elif t.stage[row] != P2D:
        out.reasons.append(f"Its batch runs on stage 1 all the same, which is on {place(case.level)}.")
