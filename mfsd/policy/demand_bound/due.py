# SPDX-License-Identifier: Apache-2.0
"""When KV transfers are due, and on whose behalf.

Stage 3 is due at its deadline. Stage 1 is due at the first deadline of its batch that can still be met, since the batch
waits for it, less the compute of the layers from the one that it feeds on. It has a second, softer deadline: the start
of that layer, past which GPUs stand still although no request need be late.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np

from mfsd.policy.demand_bound.drop import Jobs
from mfsd.policy.parts import bound, pick
from mfsd.policy.parts.members import earliest
from mfsd.policy.views import KV_REUSE, P2D

if TYPE_CHECKING:
    import numpy.typing as npt

    from mfsd.policy.views import B1, F8, I4, Views


@dataclass(slots=True)
class Lost:
    """Who can't be in time."""

    requests: B1
    """Shape (r,)."""
    alone: B1
    """Transfers that belong to no request, shape (n,)."""

    @classmethod
    def by_rows(cls, view: Views, rows: B1) -> Self:
        """The requests of these transfers, shape (n,), and those of them that have none."""
        request = view.transfers.request
        requests = np.zeros(len(view.requests) + 1, dtype=np.bool_)
        requests[request[rows]] = True  # request -1 is the last
        return cls(requests[:-1], rows & (request < 0))

    @classmethod
    def hopeless(cls, view: Views, given: Given, before: Lost, tolerance: float) -> Self:
        """Past their deadline, or with more compute left than time; who was lost before must do without tolerance."""
        r = view.requests
        out = cls.by_rows(view, given.seconds <= 0)
        left = r.deadline - view.now
        slack = np.where(before.requests, 1.0, 1.0 + tolerance)
        out.requests |= (left <= 0) | (r.compute_left > left * slack)
        return out

    def __or__(self, other: Lost) -> Lost:
        return Lost(self.requests | other.requests, self.alone | other.alone)

    def without(self, other: Lost) -> Lost:
        """These, but not those."""
        return Lost(self.requests & ~other.requests, self.alone & ~other.alone)

    def __bool__(self) -> bool:
        return bool(self.requests.any() or self.alone.any())

    def rows(self, view: Views) -> B1:
        """All transfers of theirs, shape (n,)."""
        if not self.requests.any():
            return self.alone
        of_requests: B1 = np.append(self.requests, False).take(view.transfers.request)
        return of_requests | self.alone


@dataclass(slots=True)
class Given:
    """What does not depend on who is lost."""

    rate: F8
    """Of each device, inf where it isn't known, shape (devices,)."""
    kv: B1
    """Which transfers are of stage 1 or 3, shape (n,)."""
    seconds: F8
    """Seconds to the deadline of each of them, shape (n,); inf for others."""
    early: npt.NDArray[np.intp]
    """Those of stage 1, if there are batches, shape (m,)."""
    layer: F8
    """Compute time per layer of the batches of those; 0 if it isn't known or they compute no more, shape (m,)."""
    after: F8
    """Seconds that the batches compute from the layers that they feed to the end, at least, shape (m,)."""

    @classmethod
    def of(cls, view: Views) -> Self:
        """As the view says."""
        t = view.transfers
        stage_1 = t.stage == KV_REUSE
        kv = stage_1 | (t.stage == P2D)
        seconds = pick.floats(kv, t.deadline - view.now, np.full(len(t), np.inf))
        early = np.flatnonzero(stage_1) if len(view.batches) else np.zeros(0, dtype=np.intp)
        layer = after = np.zeros(len(early))
        if len(early):
            b, batch = view.batches, t.batch.take(early)
            layer = np.append(b.layer_compute * ~b.compute_done, 0.0).take(batch)
            after = np.maximum(np.append(b.layers, 0).take(batch) - t.target_layer.take(early), 0) * layer
        return cls(bound.rates(view), kv, seconds, early, layer, after)

    def seconds_left(self, view: Views, lost: Lost) -> F8:
        """Until each transfer must have arrived for its own sake, shape (n,); inf if it has no deadline to meet."""
        early = self.early
        out = pick.floats(lost.rows(view), np.full(len(self.seconds), np.inf), self.seconds)
        if len(early):
            first = earliest(view, np.where(lost.requests, np.inf, view.requests.deadline)) - view.now
            first = np.append(first, np.inf).take(view.transfers.batch.take(early))
            out[early] = np.minimum(out.take(early), first) - self.after
        return out

    def seconds_to_layer(self, view: Views, due: F8) -> tuple[npt.NDArray[np.intp], F8]:
        """Stage-1 transfers that have a deadline, ``due``, and feed a layer of which it is known when it starts.

        Returns their rows and the seconds until then, at least, both of shape (m,).
        """
        t, known = view.transfers, np.flatnonzero((due.take(self.early) < np.inf) & (self.layer > 0))
        rows = self.early.take(known)
        # The current layer may be about to end.
        between = np.maximum(t.target_layer.take(rows) - t.current_layer.take(rows) - 1, 0)
        return rows, between * self.layer.take(known)


def jobs(view: Views, lost: Lost, owner: I4) -> Jobs:
    """On behalf of whom each transfer is due; ``owner``: row of the transfer whose deadline it has to meet."""
    t, r = view.transfers, view.requests
    of = np.where(t.request >= 0, t.request, len(r) + np.arange(len(t), dtype=np.int32))
    lent = np.zeros(len(t), dtype=np.bool_)
    # Requests of each batch by deadline; those that are lost, or belong to none, are nobody's first or next. Of those
    # due together the first is who has most to send: whoever stage 1 is due for is dropped the sooner.
    live = np.flatnonzero((r.batch >= 0) & ~lost.requests & np.isfinite(r.deadline))
    own = np.bincount(t.request + 1, weights=t.left * (t.stage == P2D), minlength=len(r) + 1)[1:]
    order = live[np.lexsort((-own[live], r.deadline[live], r.batch[live]))]
    batch, due = r.batch[order], r.deadline[order]
    same = batch[1:] == batch[:-1]
    following, delay = np.full(len(r), -1, dtype=np.int32), np.zeros(len(r))
    following[order[:-1][same]] = order[1:][same]
    delay[order[:-1][same]] = (due[1:] - due[:-1])[same]
    first, first_due = np.full(len(view.batches) + 1, -1, dtype=np.int32), np.full(len(view.batches) + 1, np.inf)
    starts = np.concatenate([[True], ~same]) if len(order) else np.zeros(0, dtype=np.bool_)
    first[batch[starts]], first_due[batch[starts]] = order[starts], due[starts]
    early = np.flatnonzero((t.stage == KV_REUSE) & (t.batch >= 0))
    own = np.where(lost.rows(view).take(early), np.inf, t.deadline.take(early))
    leads = early[(first.take(t.batch.take(early)) >= 0) & (first_due.take(t.batch.take(early)) <= own)]
    of[leads], lent[leads] = first.take(t.batch.take(leads)), True
    return Jobs(of.take(owner).astype(np.int32), lent.take(owner), following, delay)
