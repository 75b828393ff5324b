# SPDX-License-Identifier: Apache-2.0
"""The inter-request algorithm over the views: RED ranks, then feasibility and pruning (MFS paper, algorithm 1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mfsd.policy.mfs import pruning, red
from mfsd.policy.parts import bound
from mfsd.policy.views import Arrangement

if TYPE_CHECKING:
    from mfsd.policy.views import F8, Views


def arrange(view: Views, *, robust: bool, budget: int) -> Arrangement:
    """Rank the batches, by RED if ``robust`` else by earliest deadline, and prune at most ``budget`` requests."""
    requests, batches = view.requests, view.batches
    effective = red.effective(requests.deadline, requests.batch, len(batches))
    rank = red.ranks(effective.red if robust else effective.tight, batches.arrival)
    pruned = np.zeros(len(requests), dtype=np.bool_)
    if budget > 0 and len(batches):
        pruned, _ = pruning.prune(
            np.argsort(rank).astype(np.int32),
            effective.loose - view.now,
            compute_left(view),
            link_loads(view),
            requests.batch,
            np.isfinite(requests.deadline),
            budget,
        )
    return Arrangement(rank=rank, pruned=pruned)


def compute_left(view: Views) -> F8:
    """Seconds of compute until each batch's last first token, shape (b,): the requests' word, else the layers'."""
    requests, batches = view.requests, view.batches
    layers = np.maximum(batches.layers - batches.current_layer, 0) * batches.layer_compute
    out = np.where(batches.compute_done, 0.0, layers)
    owned = requests.batch >= 0
    np.maximum.at(out, requests.batch[owned], requests.compute_left[owned])
    return out


def link_loads(view: Views) -> pruning.Loads:
    """Link time per request and batch: this host's devices first, then the links into known peers.

    A link into a peer whose rate isn't known is taken to be as fast as the device that leads to it.
    """
    t, requests = view.transfers, len(view.requests)
    devices, peers = len(view.link.rate), int(view.transfers.peer.max(initial=-1)) + 1
    links = devices + peers
    # Row of the matrix: its request, else its batch; one row in between for what belongs to nobody (batch -1).
    owner = t.request * np.int32(links)
    alone = np.flatnonzero(t.request < 0)
    owner[alone] = (t.batch[alone] + requests + 1) * links
    cells = (requests + 1 + len(view.batches)) * links
    flat: F8 = np.bincount(owner + t.device, weights=t.left, minlength=cells).astype(np.float64, copy=False)
    matrix = flat.reshape(-1, links)
    rate = np.where(view.link.rate > 0, view.link.rate, np.inf)
    matrix /= np.append(rate, np.ones(peers))
    if peers:
        far = t.peer >= 0
        seconds = t.left[far] / bound.peer_rates(view, far)
        cell = owner[far] + t.peer[far] + devices
        matrix += np.bincount(cell, weights=seconds, minlength=cells).reshape(-1, links)
    return pruning.Loads(request=matrix[:requests], batch=matrix[requests + 1 :])
