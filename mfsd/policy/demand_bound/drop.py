# SPDX-License-Identifier: Apache-2.0
"""Whom to give up where not everybody can be in time, so that as many as possible are.

Moore and Hodgson's rule: take the jobs by deadline, and whenever those so far don't fit, drop the one with the most
work among them. For one machine and jobs that are all there it leaves the fewest late (J. M. Moore, "An n job, one
machine sequencing algorithm for minimizing the number of late jobs", Management Science 15, 1968). A job here is a
request with all it has on the link, since a request with one transfer late is late as a whole; with several links it
is a good rule only. Stage 1 can't be dropped, as its whole batch runs on it: if the request whose deadline it has is
dropped, it has that of the next one of the batch.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from mfsd.policy.views import B1, F8, I4

MOST: Final = 512
"""Jobs that are looked at in one evaluation, by deadline on each link, to bound the time it takes; what is overloaded
still is looked at in the next one."""
INHERITED: Final = 4
"""Steps per job that is looked at, at most: jobs that are dropped, and what is lent from one heir to the next."""
ROUNDING: Final = 1.0 + 1e-9
"""A sum that exceeds a limit by less does not."""


@dataclass(slots=True)
class Jobs:
    """On whose behalf transfers are due."""

    of: I4
    """Number of the job, shape (n,): a request's row, else r + the row of a transfer."""
    lent: B1
    """It is due on behalf of the first request of its batch, and stays if that is dropped, shape (n,)."""
    next: I4
    """The next request of the batch by deadline, shape (r,); -1 if there is none."""
    delay: F8
    """How much later that is due, seconds, shape (r,)."""

    def heir(self, job: int, gone: set[int]) -> tuple[int, float]:
        """Who is due next in the batch of a request that is dropped, and how much later; -1 if nobody is left."""
        later = 0.0
        while job >= 0 and job in gone:
            later += float(self.delay[job])
            job = int(self.next[job])
        return job, later


def most_work_first(
    jobs: Jobs, rows: npt.NDArray[np.signedinteger], seconds: F8, work: F8, most: int
) -> tuple[set[int], int]:
    """Jobs to drop for the transfers ``rows`` of a link, shape (m,), and how many were looked at, at most ``most``.

    ``seconds``: time left. ``work``: how long the link takes for it. Both of shape (m,).
    """
    if not len(rows):
        return set(), 0
    job, lent = jobs.of.take(rows), jobs.lent.take(rows)
    order = np.lexsort((lent, job, seconds))
    job, lent, seconds, work = job.take(order), lent.take(order), seconds.take(order), work.take(order)
    # Transfers of one job that are due together count as one.
    new = (job[1:] != job[:-1]) | (seconds[1:] != seconds[:-1]) | (lent[1:] != lent[:-1])
    start = np.concatenate([[0], np.flatnonzero(new) + 1])
    work = np.add.reduceat(work, start)
    job, lent, seconds = job.take(start), lent.take(start), seconds.take(start)
    late = np.flatnonzero(np.cumsum(work) > seconds * ROUNDING)
    if not len(late):
        return set(), 0
    # All before the first that is late fit together.
    fit = int(late[0])
    schedule = _Schedule(jobs)
    schedule.begin(seconds[:fit], job[:fit], work[:fit], lent[:fit])
    look = slice(fit, fit + most)
    parts = (seconds[look].tolist(), job[look].tolist(), work[look].tolist(), lent[look].tolist())
    pending = list(zip(*parts, strict=True))
    schedule.run(pending, INHERITED * len(pending))
    return schedule.gone, min(len(job) - fit, most)


_Part = tuple[float, int, float, bool]
"""Seconds until it is due, job, work, whether it is lent."""


class _Schedule:
    """One pass over the jobs by deadline."""

    def __init__(self, jobs: Jobs) -> None:
        self.gone: set[int] = set()
        self._jobs = jobs
        self._size: dict[int, float] = {}
        self._largest: list[tuple[float, int]] = []
        """Sizes, negated, and jobs: a heap. Entries of jobs that have grown since or are gone are stale."""
        self._borrowed: dict[int, list[tuple[float, float]]] = {}
        """When parts that are lent to a job are due, and their work."""
        self._total = self._due = 0.0
        """Work of those taken and not dropped, and when the last of them is due."""

    def begin(self, seconds: F8, job: I4, work: F8, lent: B1) -> None:
        """Take what is known to fit. Arrays as in ``most_work_first``."""
        known, which = np.unique(job, return_inverse=True)
        self._size = dict(zip(known.tolist(), np.bincount(which, weights=work).tolist(), strict=True))
        self._largest = [(-its, this) for this, its in self._size.items()]
        heapq.heapify(self._largest)
        for i in np.flatnonzero(lent).tolist():
            self._borrowed.setdefault(int(job[i]), []).append((float(seconds[i]), float(work[i])))
        self._total, self._due = float(work.sum()), float(seconds.max(initial=0.0))

    def run(self, pending: list[_Part], most: int) -> None:
        """Take the rest by seconds, those that are due together at once, and drop what doesn't fit; ``most`` steps."""
        for _ in range(most):
            together = bool(pending) and pending[0][0] <= self._due
            if self._total > self._due * ROUNDING and self._largest and not together:
                for part in self._drop_largest(self._due):
                    heapq.heappush(pending, part)
            elif pending:  # sorted, so a heap
                self._take(heapq.heappop(pending), pending)
            else:
                break

    def _take(self, part: _Part, pending: list[_Part]) -> None:
        """Add what is due next, or hand on what was lent to a job that is gone."""
        due, job, work, lent = part
        if job in self.gone:
            heir, later = self._jobs.heir(job, self.gone) if lent else (-1, 0.0)
            if heir >= 0:
                heapq.heappush(pending, (due + later, heir, work, True))
            return
        self._due = due
        self._total += work
        self._size[job] = self._size.get(job, 0.0) + work
        heapq.heappush(self._largest, (-self._size[job], job))
        if lent:
            self._borrowed.setdefault(job, []).append((due, work))

    def _drop_largest(self, now: float) -> list[_Part]:
        """Drop one job, and return what was lent to it, which is due later and no earlier than ``now``."""
        negative, job = heapq.heappop(self._largest)
        if job in self.gone or self._size[job] != -negative:
            return []
        self.gone.add(job)
        self._total -= self._size[job]
        parts = self._borrowed.get(job, [])
        heir, later = self._jobs.heir(job, self.gone) if parts else (-1, 0.0)
        return [(max(due + later, now), heir, work, True) for due, work in parts] if heir >= 0 else []
