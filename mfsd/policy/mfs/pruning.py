# SPDX-License-Identifier: Apache-2.0
"""Feasibility and selective pruning across batches, against the black-hole effect (MFS paper, algorithm 1).

Under overload the doomed take from those who could still be in time. Batches are walked in the order of their rank;
each is charged the load of all before it, and of what is left of batches that have ended their prefill. While a batch
would end after its loose deadline, the request with the most load on its bottleneck link - of this batch or of a more
urgent one - is pruned, until a global budget is used up. Pruned means demoted to the scavenger, not dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from mfsd.policy.mfs import red

if TYPE_CHECKING:
    from mfsd.policy.views import B1, F8, I4


LINKS_PER_BLOCK: Final = 16


@dataclass(slots=True)
class Loads:
    """Seconds of link time that is still to be sent, on this host's devices and, where known, the links into peers."""

    request: F8
    """Shape (r, links): bytes left over the link's rate."""
    batch: F8
    """Shape (b, links): what belongs to the batch as a whole (collectives) and can't be pruned."""
    before: F8
    """Shape (links,): what isn't of any batch, like stage 3 of those that have ended their prefill."""


def prune(order: I4, due_in: F8, compute: F8, loads: Loads, member: I4, prunable: B1, budget: int) -> tuple[B1, F8]:
    """Walk the batches in ``order`` and prune what makes them late.

    ``due_in``: seconds from now to each batch's loose deadline, shape (b,). ``compute``: seconds of compute left, shape
    (b,). ``member``: batch row of each request or -1, shape (r,). ``prunable``: requests that may be pruned, shape
    (r,). ``budget``: the most requests to prune in all.

    Returns the pruned requests, shape (r,), and the estimated finish of each batch in seconds from now, shape (b,).
    """
    requests, links = loads.request.shape
    pruned = np.zeros(requests, dtype=np.bool_)
    finish = np.zeros(len(order))
    # Requests in the order in which they join the pool, so that the pool is always a prefix of them.
    position = np.full(len(order) + 1, len(order), dtype=np.int32)
    position[order] = np.arange(len(order))
    joins = position.take(member)
    joining = np.argsort(red.narrow(joins), kind="stable")
    ends = np.searchsorted(joins.take(joining), np.arange(len(order)), side="right").tolist()
    load = loads.request.take(joining, axis=0)
    barred = np.flatnonzero(~prunable[joining])
    columns: list[F8 | None] = [None] * links
    """Per link: load of each request, -1 for who can't be pruned (any more). Made when first needed."""
    gone = [False] * requests
    total = loads.before.copy()
    worst, seconds = total.argmax, total.item  # total is only ever changed in place
    begin = 0
    for i, end in zip(order.tolist(), ends, strict=True):
        total += loads.batch[i]
        total += np.add.reduce(load[begin:end], axis=0)
        begin = end
        spare = float(due_in[i] - compute[i])
        while budget > 0:
            link = int(worst())
            if seconds(link) <= spare or end == 0:
                break
            column = columns[link]
            if column is None:
                # Neighbouring links share cache lines, so they are transposed together.
                start = link - link % LINKS_PER_BLOCK
                block = np.ascontiguousarray(load[:, start : start + LINKS_PER_BLOCK].T)
                block[:, barred] = -1.0
                columns[start : start + LINKS_PER_BLOCK] = list(block)
                column = block[link - start]
            victim = column[:end].argmax()
            if column.item(victim) <= 0.0:
                break  # nothing on the bottleneck is left to prune
            # Crossing a victim out on all links at once would touch as many cache lines as there are links, so it is
            # done when a link comes across it.
            column[victim] = -1.0
            if gone[victim]:
                continue
            gone[victim] = True
            total -= load[victim]
            budget -= 1
        finish[i] = compute[i] + max(seconds(worst()), 0.0)
    pruned[joining] = gone
    return pruned, finish
