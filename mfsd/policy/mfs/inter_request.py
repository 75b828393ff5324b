# SPDX-License-Identifier: Apache-2.0
"""The inter-request algorithm over the views: RED ranks, then feasibility and pruning (MFS paper, algorithm 1)."""

from __future__ import annotations

import numpy as np

from mfsd.policy.mfs import pruning, red
from mfsd.policy.parts import bound
from mfsd.policy.views import F8, Arrangement, BatchView, LinkView, RequestView, TransferView


def arrange(
    transfers: TransferView,
    requests: RequestView,
    batches: BatchView,
    link: LinkView,
    now: float,
    *,
    robust: bool,
    budget: int,
) -> Arrangement:
    """Rank the batches, by RED if ``robust`` else by earliest deadline, and prune at most ``budget`` requests."""
    effective = red.effective(requests.deadline, requests.batch, len(batches))
    rank = red.ranks(effective.red if robust else effective.tight, batches.arrival)
    pruned = np.zeros(len(requests), dtype=np.bool_)
    if budget > 0 and len(batches):
        pruned, _ = pruning.prune(
            np.argsort(rank).astype(np.int32),
            effective.loose - now,
            compute_left(requests, batches),
            port_loads(transfers, len(requests), len(batches), link),
            requests.batch,
            np.isfinite(requests.deadline),
            budget,
        )
    return Arrangement(rank=rank, pruned=pruned)


def compute_left(requests: RequestView, batches: BatchView) -> F8:
    """Seconds of compute until each batch's last first token, shape (b,): the requests' word, else the layers'."""
    layers = np.maximum(batches.layers - batches.current_layer, 0) * batches.layer_compute
    out = np.where(batches.compute_done, 0.0, layers)
    owned = requests.batch >= 0
    np.maximum.at(out, requests.batch[owned], requests.compute_left[owned])
    return out


def port_loads(transfers: TransferView, requests: int, batches: int, link: LinkView) -> pruning.Loads:
    """Port time per request and batch: this host's egress ports first, then the ingress ports of known peers.

    A peer's port whose rate isn't known is taken to be as fast as the port that leads to it.
    """
    egress = len(link.rate)
    peers = int(transfers.peer.max(initial=-1)) + 1
    ports = egress + peers
    # Row of the matrix: its request, else its batch; one row in between for what belongs to nobody (batch -1).
    owner = transfers.request * np.int32(ports)
    alone = np.flatnonzero(transfers.request < 0)
    owner[alone] = (transfers.batch[alone] + requests + 1) * ports
    cells = (requests + 1 + batches) * ports
    flat: F8 = np.bincount(owner + transfers.port, weights=transfers.left, minlength=cells).astype(
        np.float64, copy=False
    )
    matrix = flat.reshape(-1, ports)
    rate = np.where(link.rate > 0, link.rate, np.inf)
    matrix /= np.append(rate, np.ones(peers))
    if peers:
        far = transfers.peer >= 0
        seconds = transfers.left[far] / bound.peer_rates(transfers, link, far)
        cell = owner[far] + transfers.peer[far] + egress
        matrix += np.bincount(cell, weights=seconds, minlength=cells).reshape(-1, ports)
    return pruning.Loads(request=matrix[:requests], batch=matrix[requests + 1 :])
