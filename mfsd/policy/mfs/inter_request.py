# SPDX-License-Identifier: Apache-2.0
"""The inter-request algorithm over the views: RED ranks, then feasibility and pruning (MFS paper, algorithm 1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from mfsd.policy.mfs import pruning, red
from mfsd.policy.parts import bound
from mfsd.policy.views import BACKGROUND, COLLECTIVE, P2D, Arrangement

if TYPE_CHECKING:
    import numpy.typing as npt

    from mfsd.policy.views import F8, Views

MOST: Final = 1 << 22
"""Link times that are reckoned with, by request or batch and link: 32 MB. Where there are more, links into peers that
little goes to are taken to have time enough."""


def arrange(view: Views, *, robust: bool, budget: int) -> Arrangement:
    """Rank the batches, by RED if ``robust`` else by earliest deadline, and prune at most ``budget`` requests.

    Those pruned before that have ended their prefill stay so, within the budget; the others are judged anew.
    """
    requests, batches = view.requests, view.batches
    effective = red.effective(requests.deadline, requests.batch, len(batches))
    rank = red.ranks(effective.red if robust else effective.tight, batches.arrival)
    pruned = requests.pruned & (requests.batch < 0) if budget else np.zeros(len(requests), dtype=np.bool_)
    budget -= int(pruned.sum())
    if budget > 0 and len(batches):
        more, _ = pruning.prune(
            np.argsort(rank).astype(np.int32),
            effective.loose - view.now,
            compute_left(view),
            link_loads(view),
            requests.batch,
            np.isfinite(requests.deadline),
            budget,
        )
        pruned = pruned | more
    return Arrangement(rank=rank, pruned=pruned)


def compute_left(view: Views) -> F8:
    """Seconds of compute until each batch's last first token, shape (b,): the requests' word, else the layers'."""
    requests, batches = view.requests, view.batches
    layers = np.maximum(batches.layers - batches.current_layer, 0) * batches.layer_compute
    out = np.where(batches.compute_done, 0.0, layers)
    owned = requests.batch >= 0
    np.maximum.at(out, requests.batch[owned], requests.compute_left[owned])
    return out


def octets(view: Views) -> F8:
    """Bytes that each transfer stands for, shape (n,): what is left of it, and its like in layers still to come.

    Collectives and stage 3 of a layer are announced when it is their turn. While the batch computes, each of the layers
    after the last one announced counts like that one. Nobody waits for background transfers.
    """
    t, b = view.transfers, view.batches
    out: F8 = t.left * (t.stage != BACKGROUND)
    if not len(b):
        return out
    for stage, owner in ((COLLECTIVE, t.batch), (P2D, t.request)):
        computing = (t.batch >= 0) & ~b.compute_done.take(t.batch)
        rows = np.flatnonzero((t.stage == stage) & (owner >= 0) & computing)
        if len(rows):
            whose, layer = owner.take(rows).astype(np.intp), t.target_layer.take(rows)
            last = np.full(int(whose.max()) + 1, -1, dtype=np.int32)
            np.maximum.at(last, whose, layer)
            to_come = np.maximum(b.layers.take(t.batch.take(rows)) - 1 - layer, 0)
            out[rows] += t.size.take(rows) * to_come * (layer == last.take(whose))
    return out


def link_loads(view: Views) -> pruning.Loads:
    """Link time per request and batch: this host's devices first, then the links into known peers.

    A link into a peer whose rate isn't known is taken to be as fast as the device that leads to it.
    """
    t, requests, devices = view.transfers, len(view.requests), len(view.link.rate)
    weights, rows = octets(view), requests + 1 + len(view.batches)
    # Row of the matrix: its request, else its batch; one row in between for what belongs to nobody (batch -1).
    owner = np.where(t.request >= 0, t.request, t.batch + requests + 1).astype(np.int64)
    known = t.peer >= 0
    far, seconds = np.flatnonzero(known), weights[known] / bound.peer_rates(view, known)
    busiest, link = _busiest(t.peer[far], seconds, max(MOST // rows - devices, 0))
    far, seconds = far[busiest], seconds[busiest]
    links = devices + int(link.max(initial=-1)) + 1
    cells = rows * links
    flat: F8 = np.bincount(owner * links + t.device, weights=weights, minlength=cells).astype(np.float64, copy=False)
    matrix = flat.reshape(-1, links)
    matrix /= np.append(bound.rates(view), np.ones(links - devices))
    if len(far):
        cell = owner[far] * links + devices + link
        matrix += np.bincount(cell, weights=seconds, minlength=cells).reshape(-1, links)
    outside = np.flatnonzero((view.requests.batch < 0) & ~view.requests.pruned)
    before = matrix[outside].sum(axis=0) + matrix[requests]
    return pruning.Loads(request=matrix[:requests], batch=matrix[requests + 1 :], before=before)


def _busiest(peer: npt.NDArray[np.int32], seconds: F8, most: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.int64]]:
    """Entries that go to at most ``most`` peers, those with most ``seconds`` to send; and each one's peer's number.

    ``peer`` and ``seconds`` have the shape (m,), what is returned (k,); peers are numbered from 0.
    """
    load = np.bincount(peer, weights=seconds)
    if len(load) <= most:
        return np.arange(len(peer)), peer.astype(np.int64)
    number = np.full(len(load), -1)
    number[np.argsort(-load, kind="stable")[:most]] = np.arange(most)
    entries = np.flatnonzero(number[peer] >= 0)
    return entries, number[peer[entries]]
