# SPDX-License-Identifier: Apache-2.0
"""Feasibility and selective pruning across batches, against the black-hole effect (MFS paper, algorithm 1).

Under overload the doomed take from those who could still be in time. Batches are walked in the order of their rank;
each is charged the load of all before it. While a batch would end after its loose deadline, the request with the most
load on its bottleneck port - of this batch or of a more urgent one - is pruned, until a global budget is used up.
Pruned means demoted to the scavenger, not dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mfsd.policy.base import B1, F8, I4


@dataclass(slots=True)
class Loads:
    """Seconds of port time that is still to be sent. Ports are egress ports and, where known, peers' ingress ports."""

    request: F8
    """Shape (r, ports): bytes left over the port's rate."""
    batch: F8
    """Shape (b, ports): what belongs to the batch as a whole (collectives) and can't be pruned."""


def prune(order: I4, due_in: F8, compute: F8, loads: Loads, member: I4, prunable: B1, budget: int) -> tuple[B1, F8]:
    """Walk the batches in ``order`` and prune what makes them late.

    ``due_in``: seconds from now to each batch's loose deadline, shape (b,). ``compute``: seconds of compute left, shape
    (b,). ``member``: batch row of each request or -1, shape (r,). ``prunable``: requests that may be pruned, shape
    (r,). ``budget``: the most requests to prune in all.

    Returns the pruned requests, shape (r,), and the estimated finish of each batch in seconds from now, shape (b,).
    """
    requests, ports = loads.request.shape
    pruned = np.zeros(requests, dtype=np.bool_)
    finish = np.zeros(len(order))
    before = np.zeros(ports)
    # Candidates per port, transposed so that one port's column is contiguous; -1 for who isn't in the pool (yet).
    candidates = np.full((ports, requests), -1.0)
    by_port = np.ascontiguousarray(loads.request.T)
    members = np.argsort(member, kind="stable")
    first = np.searchsorted(member[members], np.arange(len(order)))
    last = np.searchsorted(member[members], np.arange(len(order)), side="right")
    for i in order.tolist():
        mine = members[first[i] : last[i]]
        total = before + loads.batch[i] + loads.request[mine].sum(axis=0)
        pool = mine[prunable[mine]]
        candidates[:, pool] = by_port[:, pool]
        spare = due_in[i] - compute[i]
        while budget > 0:
            port = int(total.argmax())
            if total[port] <= spare:
                break
            column = candidates[port]
            victim = int(column.argmax())
            if column[victim] <= 0.0:
                break  # nothing on the bottleneck is left to prune
            pruned[victim] = True
            candidates[:, victim] = -1.0
            total -= loads.request[victim]
            budget -= 1
        finish[i] = compute[i] + max(float(total.max(initial=0.0)), 0.0)
        before = total
    return pruned, finish
