# SPDX-License-Identifier: Apache-2.0
"""RED, robust effective deadline of a batch, against the piggyback effect.

One tight request would drag a whole loose batch up with it. So the sorted deadlines are cut at the largest adjacent
gap into tight and loose, and with f the share of the tight ones

    RED = f * min(tight) + (1 - f) * min(loose)

MFS paper, algorithm 1. A batch of one request, and a batch whose deadlines are all equal, has that
deadline.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from mfsd.policy.views import F8, I4


@dataclass(slots=True)
class Effective:
    """Per batch, shape (b,); inf for batches without a request that has a deadline."""

    red: F8
    tight: F8
    """Earliest deadline of the batch."""
    loose: F8
    """Earliest deadline behind the largest gap: what feasibility is judged against."""
    share: F8
    """f, share of the tight requests; 1 for a batch of one."""


def effective(deadline: F8, batch: I4, batches: int) -> Effective:
    """RED of ``batches`` batches from the deadlines and batch rows (-1: none) of all requests, both shape (r,).

    Requests without a deadline (inf) don't count. Among equal gaps the first cuts.
    """
    out = Effective(
        red=np.full(batches, np.inf),
        tight=np.full(batches, np.inf),
        loose=np.full(batches, np.inf),
        share=np.ones(batches),
    )
    use = np.flatnonzero((batch >= 0) & np.isfinite(deadline))
    order = use.take(np.argsort(deadline.take(use)))
    order = order.take(np.argsort(narrow(batch.take(order)), kind="stable"))
    b, d = batch.take(order), deadline.take(order)
    if not len(b):
        return out
    start = np.flatnonzero(np.r_[True, b[1:] != b[:-1]])
    count = np.diff(np.r_[start, len(b)])
    which = b[start]
    out.tight[which] = out.loose[which] = out.red[which] = d[start]

    # Gap behind each request; -1 behind the last of a batch, so that it never cuts where there is another gap.
    gap = np.r_[np.diff(d), -1.0]
    gap[start + count - 1] = -1.0
    largest = np.maximum.reduceat(gap, start)
    position = np.arange(len(b)) - np.repeat(start, count)
    candidate = np.where(gap == np.repeat(largest, count), position, len(b))
    cut = np.minimum.reduceat(candidate, start)

    many = count > 1
    start, count, cut, which = start[many], count[many], cut[many], which[many]
    share = (cut + 1) / count
    out.share[which] = share
    out.loose[which] = d[start + cut + 1]
    # Written as an offset from the tight one, so that equal deadlines give exactly that deadline.
    out.red[which] = d[start] + (1.0 - share) * (out.loose[which] - d[start])
    return out


def narrow(numbers: I4) -> npt.NDArray[np.int16] | I4:
    """As int16 if they fit: numpy sorts that stably in linear time."""
    fits = len(numbers) == 0 or (numbers.min() >= -0x8000 and numbers.max() < 0x8000)
    return numbers.astype(np.int16) if fits else numbers


def ranks(key: F8, arrival: F8) -> I4:
    """Position of each batch by ascending key, 0 first; ties by arrival, then by row. Shape (b,)."""
    order = np.lexsort((arrival, key))
    out = np.empty(len(key), dtype=np.int32)
    out[order] = np.arange(len(key), dtype=np.int32)
    return out
