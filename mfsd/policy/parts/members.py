# SPDX-License-Identifier: Apache-2.0
"""What a batch inherits from its requests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mfsd.policy.views import F8, BatchView, RequestView, TransferView


def earliest(values: F8, requests: RequestView, batches: BatchView) -> F8:
    """Least of ``values`` (one per request) among the requests of each batch, shape (b,); inf for empty batches."""
    out = np.full(len(batches), np.inf)
    owned = requests.batch >= 0
    np.minimum.at(out, requests.batch[owned].astype(np.intp), values[owned])  # twice as fast as with int32
    return out


def of_batch(transfers: TransferView, per_batch: F8) -> F8:
    """``per_batch`` at each transfer's batch, shape (n,); inf without one."""
    return np.append(per_batch, np.inf).take(transfers.batch)


def deadlines(transfers: TransferView, requests: RequestView, batches: BatchView) -> F8:
    """Deadline of each transfer, shape (n,); collectives and whatever has none of its own take their batch's first."""
    inherited = of_batch(transfers, earliest(requests.deadline, requests, batches))
    return np.where(np.isinf(transfers.deadline), inherited, transfers.deadline)
