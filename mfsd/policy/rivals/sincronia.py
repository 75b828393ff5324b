# SPDX-License-Identifier: Apache-2.0
"""Rival: coflows in the order of Sincronia."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mfsd.policy.base import P2D, PolicyBase, place
from mfsd.policy.parts import bound
from mfsd.policy.parts.rli import COLLECTIVE
from mfsd.policy.views import LEVEL_NONE

if TYPE_CHECKING:
    from mfsd.policy.views import F8, I2, I4, BatchView, Explanation, LinkView, RequestView, TransferView


def coflows(transfers: TransferView) -> I4:
    """Number of each transfer's coflow, 0 .. c-1, shape (n,).

    A coflow is one collective of one layer, one request's stage-1 set per target layer, or one request's stage-3 set.
    """
    early = transfers.stage != P2D
    owner = np.where((transfers.stage == COLLECTIVE) | (transfers.request < 0), -2 - transfers.batch, transfers.request)
    layer = np.where(early, transfers.target_layer, -1)
    keys = np.stack([transfers.stage.astype(np.int64), owner.astype(np.int64), layer.astype(np.int64)])
    _, inverse = np.unique(keys, axis=1, return_inverse=True)
    return inverse.reshape(-1).astype(np.int32)


def demands(transfers: TransferView, coflow: I4, link: LinkView) -> F8:
    """Port time in seconds that each coflow still needs, shape (c, ports): egress ports, then peers' ingress ports."""
    egress = len(link.rate)
    ports = egress + int(transfers.peer.max(initial=-1)) + 1
    rate = np.where(link.rate > 0, link.rate, 1.0)  # with an unknown rate, bytes serve as well: only ratios matter
    seconds = transfers.left / rate[transfers.port]
    count = int(coflow.max(initial=-1)) + 1
    flat = np.bincount(coflow * ports + transfers.port, weights=seconds, minlength=count * ports)
    far = transfers.peer >= 0
    seconds = transfers.left[far] / bound.peer_rates(transfers, link, far, unknown=1.0)
    flat += np.bincount(coflow[far] * ports + egress + transfers.peer[far], weights=seconds, minlength=count * ports)
    matrix: F8 = flat.astype(np.float64).reshape(count, ports)
    return matrix


def bssf(demand: F8) -> I4:
    """Bottleneck-select-scale-iterate: the order of coflows, first to last, for unit weights. Shape (c,).

    Filled from the back: on the port with the most demand, the coflow with the least weight per demand goes last; the
    weights of the others on that port are scaled down by what it has paid; iterate.
    """
    count = len(demand)
    weight = np.ones(count)
    alive = np.ones(count, dtype=np.bool_)
    total = demand.sum(axis=0)
    order = np.empty(count, dtype=np.int32)
    for place_ in range(count - 1, -1, -1):
        port = int(total.argmax())
        column = demand[:, port]
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(alive & (column > 0), weight / column, np.inf)
        last = int(ratio.argmin())
        if not np.isfinite(ratio[last]):
            last = int(alive.argmax())  # no demand left anywhere: any order will do
        else:
            weight = np.maximum(weight - weight[last] * column / column[last], 0.0)
        alive[last] = False
        total = total - demand[last]
        order[place_] = last
    return order


@dataclass(frozen=True, kw_only=True)
class Sincronia(PolicyBase):
    """Coflows in Sincronia's order, which is within 4x of the best mean coflow completion time.

    Source: Agarwal et al., "Sincronia: near-optimal network design for coflows", SIGCOMM 2018: greedy order (BSSF),
    any rate allocation that keeps to it. Deadlines and stages play no part, save that they define the coflows.

    Approximated with bands: the first ``levels - 1`` coflows get a level each, all others share the last one. The order
    is computed from what this host sends, not from the whole fabric's demand. Its cost grows with the square of the
    number of coflows: for the lab and for simulation.
    """

    levels: int = 8

    @property
    def default_after(self) -> int:
        """Unhinted traffic stands above the last level, where coflows wait for their turn."""
        return self.levels - 1

    def evaluate(
        self, transfers: TransferView, requests: RequestView, batches: BatchView, link: LinkView, now: float
    ) -> I2:
        """Position of each transfer's coflow, at most levels - 1, shape (n,); NONE without a stage."""
        del requests, batches, now
        if not len(transfers):
            return np.zeros(0, dtype=np.int16)
        level = np.minimum(self._positions(transfers, link), self.levels - 1).astype(np.int16)
        return np.where(transfers.stage == 0, np.int16(LEVEL_NONE), level)

    @staticmethod
    def _positions(transfers: TransferView, link: LinkView) -> I4:
        coflow = coflows(transfers)
        order = bssf(demands(transfers, coflow, link))
        position = np.empty_like(order)
        position[order] = np.arange(len(order), dtype=np.int32)
        return position[coflow]

    def _reasons(
        self,
        out: Explanation,
        row: int,
        level: int,
        transfers: TransferView,
        requests: RequestView,
        batches: BatchView,
        link: LinkView,
        now: float,
    ) -> None:
        del requests, batches, now
        position = int(self._positions(transfers, link)[row])
        out.figures["coflow_position"] = float(position)
        out.reasons.append(
            f"Its coflow is number {position + 1} of {int(coflows(transfers).max()) + 1}: {place(level)}."
        )
        out.reasons.append("It moves up as coflows before it finish.")
