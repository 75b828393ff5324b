# SPDX-License-Identifier: Apache-2.0
"""Rival: coflows in the order of Sincronia."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mfsd.policy.base import Policy, place
from mfsd.policy.parts import bound
from mfsd.policy.views import BACKGROUND, COLLECTIVE, P2D

if TYPE_CHECKING:
    from mfsd.policy.views import F8, I2, I4, Explanation, TransferView, Views


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


def demands(view: Views, coflow: I4) -> F8:
    """Link time in seconds that each coflow still needs, shape (c, links): devices first, then the links into peers."""
    t, devices = view.transfers, len(view.link.rate)
    links = devices + int(t.peer.max(initial=-1)) + 1
    rate = bound.rates(view, unknown=1.0)  # with an unknown rate, bytes serve as well: ratios matter
    count = int(coflow.max(initial=-1)) + 1
    cells = count * links
    flat = np.bincount(coflow * links + t.device, weights=t.left / rate[t.device], minlength=cells)
    far = t.peer >= 0
    seconds = t.left[far] / bound.peer_rates(view, far, unknown=1.0)
    flat += np.bincount(coflow[far] * links + devices + t.peer[far], weights=seconds, minlength=cells)
    matrix: F8 = flat.astype(np.float64).reshape(count, links)
    return matrix


def bssf(demand: F8) -> I4:
    """Bottleneck-select-scale-iterate: the order of coflows, first to last, for unit weights. Shape (c,).

    Filled from the back: on the link with the most demand, the coflow with the least weight per demand goes last; the
    weights of the others on that link are scaled down by what it has paid; iterate.
    """
    count = len(demand)
    weight = np.ones(count)
    alive = np.ones(count, dtype=np.bool_)
    total = demand.sum(axis=0)
    order = np.empty(count, dtype=np.int32)
    for place_ in range(count - 1, -1, -1):
        column = demand[:, int(total.argmax())]
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
class Sincronia(Policy):
    """Coflows in Sincronia's order, which is within 4x of the best mean coflow completion time.

    Source: Agarwal et al., "Sincronia: near-optimal network design for coflows", SIGCOMM 2018: greedy order (BSSF),
    any rate allocation that keeps to it. Deadlines and stages play no part, save that they define the coflows.

    Approximated with bands: the first ``levels - 1`` coflows get a level each, all others share the last one. The order
    is computed from what this host sends, not from the whole fabric's demand; background transfers are no coflows.
    Bytes of which only the stage is known (a static mark) are in the middle, as those of a coflow of unknown size. Its
    cost grows with the square of the number of coflows: for the lab and for simulation.
    """

    levels: int = 8

    @property
    def default_after(self) -> int:
        """Unhinted traffic stands above the last level, where coflows wait for their turn."""
        return self.levels - 1

    def _level(self, view: Views) -> I2:
        return np.minimum(self._positions(view), self.levels - 1).astype(np.int16)

    def unannounced(self) -> I2:
        """In the middle."""
        middle = (self.levels - 1) // 2
        return self.by_stage(kv_reuse=middle, collective=middle, p2d=middle)

    @staticmethod
    def _positions(view: Views) -> I4:
        """Position of each transfer's coflow in the order, shape (n,); past the end for background transfers."""
        rows = np.flatnonzero(view.transfers.stage != BACKGROUND)
        if not len(rows):
            return np.zeros(len(view.transfers), dtype=np.int32)
        some = dataclasses.replace(view, transfers=view.transfers.take(rows))
        coflow = coflows(some.transfers)
        order = bssf(demands(some, coflow))
        position = np.empty_like(order)
        position[order] = np.arange(len(order), dtype=np.int32)
        out = np.full(len(view.transfers), len(order), dtype=np.int32)
        out[rows] = position[coflow]
        return out

    def _reasons(self, out: Explanation, row: int, level: int, view: Views) -> None:
        position, count = int(self._positions(view)[row]), int(coflows(view.transfers).max()) + 1
        out.figures["coflow_position"] = float(position)
        out.reasons.append(f"Its coflow is number {position + 1} of {count}: {place(level)}.")
        out.reasons.append("It moves up as coflows before it finish.")
