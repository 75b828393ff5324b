# SPDX-License-Identifier: Apache-2.0
"""Why a transfer is where the demand-bound policy put it, in words."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from mfsd import units
from mfsd.bands import LEVEL_SCAVENGER
from mfsd.policy.base import place
from mfsd.policy.demand_bound.judge import rates
from mfsd.policy.demand_bound.load import BUCKETS, bucket
from mfsd.policy.demand_bound.verdict import NEAR_S
from mfsd.policy.views import COLLECTIVE, P2D

if TYPE_CHECKING:
    from mfsd.policy.demand_bound.policy import DemandBound
    from mfsd.policy.demand_bound.verdict import Verdict
    from mfsd.policy.views import Explanation, Views


def explain(policy: DemandBound, out: Explanation, row: int, level: int, view: Views) -> None:
    """Append reasons and figures for ``row``, which is at ``level``."""
    if view.transfers.stage[row] == COLLECTIVE:
        above = ", only KV that is about to be too late stands above it" if policy.layout.collective else ""
        out.reasons.append(f"It is a collective: {place(level)}{above}.")
        return
    verdict = policy.judge(view)
    held_until = float(policy.longest(view)[row] - (view.now - view.transfers.created[row]))
    if level == policy.layout.others and held_until <= 0 and not policy.needs(view, verdict)[row]:
        out.reasons.append(
            f"It has been held back for {units.duration(float(policy.longest(view)[row]))}, as long as it may be: it "
            f"is let through on {place(level)}, above unhinted traffic."
        )
    if verdict.lost[row]:
        _lost(out, row, level, view, verdict)
    elif math.isinf(verdict.asked.due[row]):
        out.reasons.append(f"It has no deadline that can be met: {place(level)}, below unhinted traffic.")
    else:
        _due(policy, out, row, level, view, verdict)
    if level >= policy.layout.deferred and held_until > 0:
        out.figures["held_back_until_s"] = held_until
        out.reasons.append(f"It is let through in {units.duration(held_until)} whatever it needs.")


def _due(policy: DemandBound, out: Explanation, row: int, level: int, view: Views, verdict: Verdict) -> None:
    device, lay = int(view.transfers.device[row]), policy.layout
    rate, need, laxity = float(view.link.rate[device]), float(verdict.need[row]), float(verdict.laxity[row])
    guarantee = policy.evaluate(view).guarantee
    granted = 0.0 if guarantee is None else float(guarantee[device, : lay.deferred].sum())
    out.figures |= {
        "needed_share": need,
        "needed_bytes_per_s": need * rate,
        "guaranteed_bytes_per_s": granted,
        "laxity_s": laxity,
    }
    what = "it" if verdict.first[row] else "with what is due before it, it"
    scarce = "its peer's link" if verdict.slow[row] else f"{units.rate(rate)}"
    amount = f"{need:.0%}" if verdict.slow[row] or not rate else units.rate(need * rate)
    sentence = f"{what} needs {amount} of {scarce} to be in time"
    if policy.needs(view, verdict)[row]:
        sentence += f"; {units.rate(granted)} are guaranteed on its device"
    out.reasons.append(sentence[0].upper() + sentence[1:] + ".")
    if level == lay.urgent and verdict.late[row] and verdict.next[row]:
        above = ", above the collectives" if lay.collective else ""
        out.reasons.append(
            f"It has {units.duration(laxity)} to spare and keeps a margin of more: {place(level)}{above}."
        )
    elif level < lay.deferred:
        out.reasons.append(f"{_why_above(policy, row, view, verdict)}: {place(level)}, above unhinted traffic.")
    else:
        out.reasons.append(f"That is less than {policy.defer_until:.0%} of it, so it can wait: {place(level)}, below "
                           "unhinted traffic.")  # fmt: skip
        wait = _until_promoted(policy, row, view, verdict)
        out.figures["next_promotion_s"] = wait
        out.reasons.append(f"It is promoted in {units.duration(wait)} if nothing of it is sent until then.")


def _why_above(policy: DemandBound, row: int, view: Views, verdict: Verdict) -> str:
    if policy.needs(view, verdict)[row]:
        return "It is due first" if verdict.first[row] else "Others are due before it"
    if verdict.layer_need[row] >= policy.defer_until:
        return "The layer that it feeds is about to start"
    if view.link.rate[view.transfers.device[row]] <= 0:
        return "Nobody knows what its device gives"
    return f"It has only {units.duration(float(verdict.laxity[row]))} to spare"


def _until_promoted(policy: DemandBound, row: int, view: Views, verdict: Verdict) -> float:
    """Seconds until a deferred transfer is promoted if nothing is sent: of its device's figures."""
    load, device = verdict.asked.load, int(view.transfers.device[row])
    due, total = (m[device, int(load.cell[row]) % BUCKETS :] for m in (load.due, load.total))
    with np.errstate(invalid="ignore"):
        wait = (policy.margin.leave(due) - total / policy.defer_until) / (1.0 - policy.margin_share)
    return max(min(float(np.nanmin(wait)), float(verdict.laxity[row]) - NEAR_S), 0.0)


def _lost(out: Explanation, row: int, level: int, view: Views, verdict: Verdict) -> None:
    t = view.transfers
    device, request = int(t.device[row]), int(t.request[row])
    due = float(t.deadline[row])
    if request >= 0:
        due = min(due, float(view.requests.deadline[request]))
    left = due - view.now
    rate, room = float(rates(view)[device]), float(1.0 - view.link.taken[device])
    siblings = (t.request == request) & (t.device == device) & (t.stage == P2D) & (request >= 0)
    own = float(t.left[siblings].sum() if siblings.any() else t.left[row]) / rate
    kept = float(verdict.asked.load.total[device, int(bucket(np.array([max(left, 0.0)]))[0])])
    out.figures |= {"work_s": own, "kept_before_s": kept}
    where = place(level) if level == LEVEL_SCAVENGER else f"its batch runs on it, so it stays on {place(level)}"
    if left <= 0:
        why = "its deadline has passed"
    elif t.compute_left[row] > left:
        why = f"its compute alone takes {units.duration(float(t.compute_left[row]))}"
    elif own > left * room:
        why = f"its {units.duration(own)} of work at full rate don't fit the {units.duration(left)} left"
    else:
        why = (
            f"what is due before it and was kept instead has less work each, {units.duration(kept)} in all, and "
            f"leaves too little of the {units.duration(left)} for its {units.duration(own)}, or a sibling is late"
        )
    out.reasons.append(f"Its request is given up: {why}. It is in {where}." if level == LEVEL_SCAVENGER else
                       f"Its request is given up: {why}; {where}.")  # fmt: skip
    out.reasons.append("It comes back when it fits beside the others.")
