# SPDX-License-Identifier: Apache-2.0
"""What decides the order on the simulated link: a policy behind views, or a fixed order."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import numpy as np

from mfsd.ground.bands import (
    BACKGROUND_FLOOR,
    DEFAULT_FLOOR,
    LEVEL_BACKGROUND,
    LEVEL_FLOOR,
    LEVEL_NONE,
    LEVEL_SCAVENGER,
    SCAVENGER_FLOOR,
)
from mfsd.lab.sim.singlelink import Case, Order, Outcome, Run
from mfsd.policy.usage import LOAD_TAU_S, Pauses
from mfsd.policy.views import COLLECTIVE, BatchView, LinkView, RequestView, TransferView, Views

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mfsd.policy.base import Policy
    from mfsd.policy.views import I2, I4

OTHERS: Final = 3
"""Default, background and scavenger; what the control band carries is not simulated."""


def simulate(
    case: Case, policy: Policy, period: float = 0.01, *, floors: bool = False, until: float = math.inf
) -> Outcome:
    """Run a case under a policy that is asked every ``period`` seconds and at every event.

    ``floors``: bands have the floors that they have by default (mfsd/ground/bands.py), else none: order is strict but
    for what the policy guarantees.
    """
    return Run(case).go(PolicyDecider(case, policy, floors=floors), period, until)


class FixedOrder:
    """Strict priority in a given order of the case's transfers, for brute force."""

    def __init__(self, order: Sequence[int]) -> None:
        self._key = np.empty(len(order))
        self._key[list(order)] = np.arange(len(order))

    def order(self, run: Run) -> Order:
        """Position of each active transfer; crowds come last."""
        return Order(self._key[run.active], np.full(len(run.flows), math.inf))


class PolicyDecider:
    """Shows a policy the views that the engine would, and turns its levels into an order.

    A policy that is ``clairvoyant`` is told in ``RequestView.compute_left`` everything that is still to come for the
    first token, others what is left of the compute.
    """

    def __init__(self, case: Case, policy: Policy, *, floors: bool = False) -> None:
        self.policy = policy
        self._clairvoyant = policy.clairvoyant
        self._pruned = np.zeros(case.requests, dtype=np.bool_)
        self._rank = np.zeros(len(case.batches), dtype=np.int32)
        self._arranged = 0
        levels, after = policy.levels, policy.default_after
        # Bands as in mfsd/ground/bands.py, without control; a band per level.
        self._level_bands = np.array([*range(after), *range(after + 1, levels + 1)])
        self._other_bands = np.array([after, levels + 1, levels + 2])
        self._above = np.array([*self._level_bands, levels + 2])
        self._floors = np.zeros(levels + OTHERS)
        if floors:
            self._floors[self._level_bands] = LEVEL_FLOOR
            self._floors[self._other_bands] = (DEFAULT_FLOOR, BACKGROUND_FLOOR, SCAVENGER_FLOOR)
        marks = policy.unannounced()[[crowd.stage for crowd in case.crowds]] if case.crowds else np.zeros(0, np.int16)
        self._crowds = self._bands(marks).astype(np.float64)
        self._usage = np.zeros(levels + OTHERS)
        self._granted = 0.0
        self._collectives = int(self._bands(policy.unannounced()[[COLLECTIVE]])[0])
        self._pauses = Pauses()
        self._then = 0.0

    def order(self, run: Run) -> Order:
        """Ask the policy; the default band stands after ``default_after`` levels."""
        active = np.array(run.active, dtype=np.int32)
        self._account(run)
        view = self._view(run, active)
        if self._arranged != run.arrivals_or_departures:
            self._arranged = run.arrivals_or_departures
            arrangement = self.policy.arrange(view)
            if arrangement is not None:
                self._pruned[self._requests] = view.requests.pruned = arrangement.pruned
                self._rank[self._batches] = view.batches.rank = arrangement.rank
        self.decision = self.policy.evaluate(view)
        run.level[active] = self.decision.level
        run.seen_layer[active] = view.transfers.current_layer
        if self.decision.infeasible is not None:
            run.infeasible[active] = self.decision.infeasible
        assured = self._floors * run.case.rate
        if self.decision.guarantee is not None:
            assured[self._level_bands] += self.decision.guarantee[0]
            self._granted = float(self.decision.guarantee[0].sum()) / run.case.rate
        if self.decision.given_up is not None:
            assured[-1] += self.decision.given_up[0]
        given = {float(band): rate for band, rate in enumerate(assured.tolist()) if rate}
        return Order(self._bands(self.decision.level).astype(np.float64), self._crowds, given)

    def _bands(self, level: I2) -> I4:
        default, background, scavenger = self._other_bands.tolist()
        band = np.where(level >= default, level + 1, level).astype(np.int32)
        band[level == LEVEL_NONE] = default
        band[level == LEVEL_BACKGROUND] = background
        band[level == LEVEL_SCAVENGER] = scavenger
        return band

    def _account(self, run: Run) -> None:
        """Load per band since the last decision; rates are constant in between."""
        seconds, self._then = run.now - self._then, run.now
        weight = 1.0 - math.exp(-seconds / LOAD_TAU_S)
        share = run.share.get(float(self._collectives), 0.0)
        used = np.minimum(self._usage, self._floors)
        left = 1.0 - self._granted - (used.sum() - used[self._collectives])
        self._pauses.observe(share, left, seconds)
        self._usage *= 1.0 - weight
        for band, share in run.share.items():
            self._usage[int(band)] += weight * share

    # --- view ---------------------------------------------------------------------------------------------------------

    def _view(self, run: Run, active: I4) -> Views:
        case = run.case
        ids = [b for b in range(len(case.batches)) if run.arrived[b] and not run.departed[b]]
        self._batches = np.array(ids, dtype=np.int32)
        batch_row = np.full(len(case.batches) + 1, -1, dtype=np.int32)
        batch_row[self._batches] = np.arange(len(self._batches))
        alive = np.isnan(run.finish) & (batch_row[run.batch_of] >= 0)
        self._requests = np.flatnonzero(alive)
        request_row = np.full(case.requests + 1, -1, dtype=np.int32)
        request_row[self._requests] = np.arange(len(self._requests))

        specs = [case.batches[b] for b in ids]
        layer = np.array([run.layer[b] for b in ids], dtype=np.int32)
        done = np.array([run.compute_done[b] for b in ids], dtype=np.bool_)
        compute = np.array([self._compute_left(run, b) for b in ids])
        batches = BatchView.of(
            len(specs),
            layers=[len(s.collective) for s in specs],
            current_layer=layer,
            layer_compute=[s.compute for s in specs],
            compute_done=done,
            arrival=[s.arrival for s in specs],
            rank=self._rank[self._batches],
        )
        of_batch = batch_row[run.batch_of[self._requests]]
        requests = RequestView.of(
            len(of_batch),
            deadline=run.deadline[self._requests],
            arrival=batches.arrival[of_batch],
            batch=of_batch,
            compute_left=compute[of_batch],
            pruned=self._pruned[self._requests],
        )
        request = request_row[run.request[active]]
        batch = batch_row[run.batch[active]]
        owned = request >= 0
        transfers = TransferView.of(
            len(active),
            stage=run.stage[active],
            size=run.size[active],
            left=run.left[active],
            request=request,
            batch=batch,
            conn=active,
            target_layer=run.target_layer[active],
            current_layer=layer[batch],
            computing=~done[batch],
            layer_started=layer[batch] != run.seen_layer[active],
            deadline=np.where(owned, run.deadline[run.request[active]], np.inf),
            compute_left=np.where(owned, compute[batch], 0.0),
            created=run.created[active],
            level=run.level[active],
            infeasible=run.infeasible[active],
        )
        return Views(transfers, requests, batches, self._link(case), run.now)

    def _link(self, case: Case) -> LinkView:
        above, others = np.concatenate([[0.0], np.cumsum(self._usage)]), self._other_bands
        return LinkView.of(
            case.rate,
            self.policy.levels,
            load=np.minimum(above[-1], 1.0),
            load_above=np.minimum(above[self._above], 1.0),
            floor=self._floors.sum(),
            taken=np.minimum(self._usage, self._floors)[others].sum(),
            collectives=self._pauses.collectives,
            unhinted=self._usage[others[0]],
        )

    def _compute_left(self, run: Run, b: int) -> float:
        spec = run.case.batches[b]
        if run.compute_done[b]:
            return 0.0
        computing = math.isfinite(run.compute_ends[b])
        left = (len(spec.collective) - run.layer[b] - computing) * spec.compute
        if computing:
            left += run.compute_ends[b] - run.now
        if self._clairvoyant:
            return left + self._to_come(run, b)
        return left

    def _to_come(self, run: Run, b: int) -> float:
        """Seconds of link that the batch's first tokens still need beyond what is being sent now."""
        first = run.layer[b] + 1 if run.started[b] else 0
        collectives = sum(run.case.batches[b].collective[first:])
        # The last layer's stage 3 can only be sent once all is computed.
        last = sum(float(run.size[f]) for f in run.p2d_of[b][-1])
        return (collectives + last) / run.case.rate
