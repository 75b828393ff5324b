# SPDX-License-Identifier: Apache-2.0
"""What decides the order on the simulated link: a policy behind views, or a fixed order."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import numpy as np

from mfsd.bands import LEVEL_NONE, LEVEL_SCAVENGER
from mfsd.policy.views import BatchView, LinkView, RequestView, TransferView, Views
from mfsd.sim.singlelink import Case, Outcome, Run

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mfsd.policy.base import Policy
    from mfsd.policy.views import F8, I2, I4

LOAD_TAU_S: Final = 0.1
"""Time constant of the load average, as in mfsd/engine/estimator.py."""


def simulate(case: Case, policy: Policy, period: float = 0.01) -> Outcome:
    """Run a case under a policy that is asked every ``period`` seconds and at every event."""
    return Run(case).go(PolicyDecider(case, policy), period)


class FixedOrder:
    """Strict priority in a given order of the case's transfers, for brute force."""

    def __init__(self, order: Sequence[int]) -> None:
        self._key = np.empty(len(order))
        self._key[list(order)] = np.arange(len(order))

    def order(self, run: Run) -> F8:
        """Position of each active transfer."""
        return self._key[run.active]


class PolicyDecider:
    """Shows a policy the views that the engine would, and turns its levels into an order.

    A policy that is ``clairvoyant`` is told in ``RequestView.compute_left`` everything that is still to come for the
    first token, others what is left of the compute.
    """

    def __init__(self, case: Case, policy: Policy) -> None:
        self.policy = policy
        self._clairvoyant = policy.clairvoyant
        self._pruned = np.zeros(case.requests, dtype=np.bool_)
        self._rank = np.zeros(len(case.batches), dtype=np.int32)
        self._arranged = 0
        self._usage = np.zeros(policy.levels + 2)
        self._last: tuple[float, float, I4] | None = None
        """Time, bytes left of the active transfers and their bands at the last decision."""

    def order(self, run: Run) -> F8:
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
        level = self.policy.evaluate(view).level
        run.level[active] = level
        run.seen_layer[active] = view.transfers.current_layer
        band = self._bands(level)
        self._last = (run.now, float(run.left[active].sum()), band[band == band.min()])
        return band.astype(np.float64)

    def _bands(self, level: I2) -> I4:
        after, levels = self.policy.default_after, self.policy.levels
        band = np.where(level >= after, level + 1, level).astype(np.int32)
        band[level == LEVEL_NONE] = after
        band[level == LEVEL_SCAVENGER] = levels + 1
        return band

    def _account(self, run: Run) -> None:
        """Load per band since the last decision: between two decisions one band has the whole link."""
        if self._last is None:
            return
        then, _, bands = self._last
        weight = 1.0 - math.exp(-(run.now - then) / LOAD_TAU_S)
        self._usage *= 1.0 - weight
        self._usage[bands[0]] += weight

    # --- view ---------------------------------------------------------------------------------------------------------

    def _view(self, run: Run, active: I4) -> Views:
        case = run.case
        self._batches = np.array(
            [b for b in range(len(case.batches)) if run.arrived[b] and not run.departed[b]], dtype=np.int32
        )
        batch_row = np.full(len(case.batches) + 1, -1, dtype=np.int32)
        batch_row[self._batches] = np.arange(len(self._batches))
        alive = np.isnan(run.finish) & (batch_row[run.batch_of] >= 0)
        self._requests = np.flatnonzero(alive)
        request_row = np.full(case.requests + 1, -1, dtype=np.int32)
        request_row[self._requests] = np.arange(len(self._requests))

        specs = [case.batches[b] for b in self._batches]
        layer = np.array([run.layer[b] for b in self._batches], dtype=np.int32)
        done = np.array([run.compute_done[b] for b in self._batches], dtype=np.bool_)
        compute = np.array([self._compute_left(run, int(b)) for b in self._batches])
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
        )
        return Views(transfers, requests, batches, self._link(case), run.now)

    def _link(self, case: Case) -> LinkView:
        above = np.concatenate([[0.0], np.cumsum(self._usage)])
        levels, after = self.policy.levels, self.policy.default_after
        at = np.concatenate([np.arange(after), np.arange(after + 1, levels + 1), [levels + 1]])
        return LinkView.of(case.rate, levels, load=np.minimum(above[-1], 1.0), load_above=np.minimum(above[at], 1.0))

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
