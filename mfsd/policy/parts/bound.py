# SPDX-License-Identifier: Apache-2.0
"""The least time in which a transfer can still be done, whatever the network order: the basis of give-up.

A request can't produce its first token before

* its compute is over (profiled, ``compute_left``), nor before
* all its bytes for a device have passed it, alone and at full rate, nor before
* what stands before a transfer on its FIFO connection and the transfer itself have passed the device; and the same for
  the link into the peer, where its rate is known: a slow receiver dooms what the device would let through.

The bound is the maximum of the three. It is a lower bound: what it calls infeasible can't be saved by any order, as
long as rate and compute estimates hold. One transfer that is too late spoils its request, so the siblings are
infeasible with it. Nobody waits for background transfers, so they neither spoil a request nor are infeasible.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from mfsd.policy.parts import pick
from mfsd.policy.views import BACKGROUND

if TYPE_CHECKING:
    from mfsd.policy.views import B1, F8, Views


MANY: Final = 1 << 20
"""Pairs of a request and a peer, from which on those that there are are numbered first: counting beats sorting."""


def rates(view: Views, unknown: float = np.inf) -> F8:
    """Bytes/s of each device, shape (devices,); ``unknown`` where it isn't known (0)."""
    return np.where(view.link.rate > 0, view.link.rate, unknown)


def device_rate(view: Views) -> F8:
    """Bytes/s of each transfer's device, shape (n,), or (1,) when there is one; unknown (0) counts as infinite."""
    rate = rates(view)
    return rate if len(rate) == 1 else rate.take(view.transfers.device)


def path_rate(view: Views) -> F8:
    """Bytes/s of the slower of device and peer's link, shape (n,) or (1,); inf where neither is known."""
    rate = device_rate(view)
    return np.minimum(rate, _far_rate(view)) if len(view.link.peer_rate) else rate


def _far_rate(view: Views) -> F8:
    """Bytes/s of the link into each transfer's peer, shape (n,); inf where it isn't known."""
    return np.append(view.link.peer_rate, np.inf).take(view.transfers.peer)  # peer -1 takes the last


def peer_rates(view: Views, far: B1, unknown: float = np.inf) -> F8:
    """Bytes/s of the link into the peer of the transfers ``far``, which have one; where it isn't known, their device's.

    ``unknown``: what a device of unknown rate counts as. Shape (number of True in ``far``,).
    """
    rate = rates(view, unknown)[view.transfers.device[far]]
    if not len(view.link.peer_rate):
        return rate
    known = _far_rate(view)[far]
    return np.where(np.isfinite(known), known, rate)


def request_bytes(view: Views, weights: F8) -> F8:
    """Sum of ``weights`` over the transfers of its request on its device, shape (n,); own weight without a request."""
    # Rows without a request share the bins of request -1 and then take their own weight.
    request, devices = view.transfers.request, len(view.link.rate)
    key = request + np.int32(1)
    if devices > 1:
        key = key * np.int32(devices) + view.transfers.device
    sums: F8 = np.bincount(key, weights=weights).astype(np.float64, copy=False).take(key)
    return pick.floats(request >= 0, sums, weights)


def seconds_needed(view: Views) -> F8:
    """Lower bound of the time from now to the end of each transfer's request on this device, seconds, shape (n,)."""
    t = view.transfers
    own, waited_for = t.left + t.ahead, t.left * (t.stage != BACKGROUND)
    network = np.maximum(own, request_bytes(view, waited_for)) / device_rate(view)
    if len(view.link.peer_rate):
        network = np.maximum(network, _far_seconds(view, own, waited_for))
    return np.maximum(network, t.compute_left)


def _far_seconds(view: Views, own: F8, waited_for: F8) -> F8:
    """The same on the link into the peer: ``own`` bytes, or all of the request's for that peer, shape (n,)."""
    t = view.transfers
    key = (t.request + np.int64(1)) * (len(view.link.peer_rate) + 1) + t.peer + 1
    if key.max(initial=0) > MANY:
        key = np.unique(key, return_inverse=True)[1]  # else memory for each request at each peer
    together = np.bincount(key, weights=waited_for).astype(np.float64, copy=False).take(key)
    return np.maximum(own, pick.floats(t.request >= 0, together, own)) / _far_rate(view)


@dataclass(slots=True)
class Verdict:
    """Who can't be in time, whatever the order."""

    transfers: B1
    """Shape (n,)."""
    requests: B1
    """Shape (r,)."""


def judge(view: Views, margin: float = 0.0, given_up: B1 | None = None) -> Verdict:
    """Requests whose bound exceeds their time left by more than ``margin`` of it, and all their transfers.

    ``margin`` is a share of the time left (0.05: five per cent). ``given_up``, shape (n,): transfers judged infeasible
    before; their requests must fit without the margin to be feasible again, so that they don't flap. Without a deadline
    (inf) nothing is infeasible; past the deadline everything is.
    """
    request, requests = view.transfers.request, view.requests
    owned = request >= 0
    per_request: F8 | float = 1.0 + margin
    own: F8 | float = per_request
    if given_up is not None and given_up.any():
        known = np.full(len(requests) + 1, 1.0 + margin)  # one more for transfers without a request (row -1)
        known[request.take(np.flatnonzero(given_up & owned))] = 1.0
        own = known.take(request)
        own[np.flatnonzero(given_up & ~owned)] = 1.0
        per_request = known[:-1]
    time_left = view.transfers.deadline - view.now
    waited_for = view.transfers.stage != BACKGROUND
    late = ((seconds_needed(view) > time_left * own) | (time_left <= 0)) & waited_for
    left = requests.deadline - view.now
    spoiled = np.append((requests.compute_left > left * per_request) | (left <= 0), False)
    spoiled[request.take(np.flatnonzero(late & owned))] = True
    return Verdict((late | spoiled.take(request)) & waited_for, spoiled[:-1])
