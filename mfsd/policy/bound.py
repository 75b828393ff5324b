# SPDX-License-Identifier: Apache-2.0
"""The least time in which a transfer can still be done, whatever the network order: the basis of give-up.

A request can't produce its first token before

* its compute is over (profiled, ``compute_left``), nor before
* all its bytes on a port have passed it, alone and at full rate, nor before
* what stands before a transfer on its FIFO connection and the transfer itself have passed the port.

The bound is the maximum of the three. It is a lower bound: what it calls infeasible can't be saved by any order, as
long as rate and compute estimates hold. One transfer that is too late spoils its request, so the siblings are
infeasible with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mfsd.policy.base import B1, F8, LinkView, TransferView


def port_rate(transfers: TransferView, link: LinkView) -> F8:
    """Bytes/s of each transfer's port, shape (n,) or (1,) when there is one port; unknown (0) counts as infinite."""
    rate = np.where(link.rate > 0, link.rate, np.inf)
    return rate if len(rate) == 1 else rate[transfers.port]


def request_bytes(transfers: TransferView, ports: int, weights: F8) -> F8:
    """Sum of ``weights`` over the transfers of the same request and port, shape (n,); own weight without a request."""
    key = transfers.request * ports + transfers.port
    owned = transfers.request >= 0
    if owned.all():
        return np.bincount(key, weights=weights)[key] if len(key) else weights
    if not owned.any():
        return weights
    # Rows without a request share one bin past all others and then take their own weight.
    key = np.where(owned, key, key.max() + 1)
    sums: F8 = np.bincount(key, weights=weights)[key]
    return np.where(owned, sums, weights)


def seconds_needed(transfers: TransferView, link: LinkView) -> F8:
    """Lower bound of the time from now to the end of each transfer's request on this port, seconds, shape (n,)."""
    own = transfers.left + transfers.ahead
    together = request_bytes(transfers, len(link.rate), transfers.left)
    network = np.maximum(own, together) / port_rate(transfers, link)
    return np.maximum(network, transfers.compute_left)


def infeasible(transfers: TransferView, link: LinkView, now: float, margin: float | F8 = 0.0) -> B1:
    """Transfers whose bound exceeds their time left by more than ``margin`` of it, and their siblings, shape (n,).

    ``margin`` is a share of the time left (0.05: five per cent), one for all or one per row. Without a deadline (inf)
    nothing is infeasible; past the deadline everything is.
    """
    time_left = transfers.deadline - now
    late = (seconds_needed(transfers, link) > time_left * (1.0 + margin)) | (time_left <= 0)
    requests = transfers.request[late]
    requests = requests[requests >= 0]
    if len(requests):
        spoiled = np.zeros(int(transfers.request.max()) + 1, dtype=np.bool_)
        spoiled[requests] = True
        late |= (transfers.request >= 0) & spoiled[transfers.request]
    return late
