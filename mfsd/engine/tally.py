# SPDX-License-Identifier: Apache-2.0
"""What became of transfers and requests: distributions for the metrics, and the latest ones in full for a trace.

Ends come by the thousand, so each is only noted here; who reads sorts them into buckets.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Final, NamedTuple

from mfsd.model import INF, Stage

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from mfsd.engine.columns import Deferred
    from mfsd.engine.records import Request, Transfer

SECONDS: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Upper bounds of the buckets of what takes time."""
SLACK: Final = (-10.0, -5.0, -2.0, -1.0, -0.5, -0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""The same of time to spare; below zero: late."""
TRANSFERS_KEPT: Final = 20_000
REQUESTS_KEPT: Final = 2_000
USERS_KEPT: Final = 100
UNSORTED_MAX: Final = 4_096
"""Ends noted before they are sorted although nobody reads."""
_COLUMNS: Final = ("size", "created", "begun", "deadline", "first_level")


class EndedTransfer(NamedTuple):
    """One that is over. Times are CLOCK_MONOTONIC seconds."""

    id: str
    session: str
    request: str
    stage: Stage
    size: float
    created: float
    begun: float
    """When its first byte left, to within a tick; 0: nobody saw it."""
    ended: float
    delivered: bool
    """Else it was cancelled, expired or cut off."""
    deadline: float
    first_level: int
    path: tuple[tuple[float, int], ...]

    @property
    def started(self) -> float:
        """When its first byte left; of one that came and went between two ticks, when it was announced."""
        return self.begun or self.created


class EndedRequest(NamedTuple):
    """One that is over."""

    id: str
    session: str
    arrival: float
    deadline: float
    ended: float
    """When its last byte was delivered; inf: its process ended before."""


class Exemplar(NamedTuple):
    """One of those in a bucket."""

    request: str
    value: float


@dataclass(slots=True)
class Histogram:
    """How often values fell into buckets, each with its latest exemplar."""

    bounds: tuple[float, ...]
    """Highest value of each bucket but the last."""
    counts: list[int] = field(init=False)
    sum: float = 0.0
    exemplars: list[Exemplar | None] = field(init=False)

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)
        self.exemplars = [None] * (len(self.bounds) + 1)

    def add(self, value: float, request: str = "") -> None:
        """Count one value."""
        if math.isinf(value):
            return
        i = bisect_left(self.bounds, value)
        self.counts[i] += 1
        self.sum += value
        if request:
            self.exemplars[i] = Exemplar(request, value)

    def copy(self) -> Histogram:
        """As it is now."""
        out = Histogram(self.bounds)
        out.counts, out.sum, out.exemplars = self.counts[:], self.sum, self.exemplars[:]
        return out


class Tally:
    """See the module."""

    def __init__(self) -> None:
        self.transfers: deque[EndedTransfer] = deque(maxlen=TRANSFERS_KEPT)
        self.requests: deque[EndedRequest] = deque(maxlen=REQUESTS_KEPT)
        self.rescues: list[float] = []
        """Seconds from promotion to purge, not sorted in yet."""
        self._ended: list[EndedTransfer] = []
        self._finished: list[EndedRequest] = []
        self._queue = {stage: Histogram(SECONDS) for stage in Stage}
        self._wire = {stage: Histogram(SECONDS) for stage in Stage}
        self._slack = {stage: Histogram(SLACK) for stage in Stage}
        self._request_slack = Histogram(SLACK)
        self.users: dict[int | None, list[int]] = {}
        """Requests late and in time by user; None: all users beyond the first ones."""
        self._rescue = Histogram(SECONDS)

    # --- noting -------------------------------------------------------------------------------------------------------

    def ended(
        self, transfers: Iterable[Transfer], columns: Deferred[Transfer], now: float, delivered_at: float | None
    ) -> None:
        """Transfers are about to be struck out. Those younger than the last tick are left out: nothing is known."""
        at = now if delivered_at is None else delivered_at
        for t in transfers:
            values = columns.noted(t, _COLUMNS)
            if values is None:
                continue
            size, created, begun, deadline, first = values
            request = "" if t.request is None else t.request.id
            one = EndedTransfer(
                t.id, t.session.name, request, t.stage, size, created, begun, at, delivered_at is not None, deadline,
                first, t.path,
            )  # fmt: skip
            self.transfers.append(one)
            self._ended.append(one)
        if len(self._ended) >= UNSORTED_MAX:
            self._sort()

    def finished(self, request: Request, arrival: float, deadline: float, at: float) -> None:
        """A request is about to be struck out."""
        one = EndedRequest(request.id, request.session.name, arrival, deadline, at)
        self.requests.append(one)
        uid = request.session.uid
        known = uid if uid in self.users or len(self.users) < USERS_KEPT else None
        self.users.setdefault(known, [0, 0])[at <= deadline] += 1
        self._finished.append(one)
        if len(self._finished) >= UNSORTED_MAX:
            self._sort()

    def _sort(self) -> None:
        ended, self._ended = self._ended, []
        for t in ended:
            if not t.delivered:
                continue
            self._queue[t.stage].add(max(t.started - t.created, 0.0), t.request)
            self._wire[t.stage].add(max(t.ended - t.started, 0.0), t.request)
            self._slack[t.stage].add(t.deadline - t.ended, t.request)
        finished, self._finished = self._finished, []
        for r in finished:
            self._request_slack.add(r.deadline - r.ended, r.id)
        rescues, self.rescues = self.rescues, []
        for seconds in rescues:
            self._rescue.add(seconds)

    # --- reading ------------------------------------------------------------------------------------------------------

    def histograms(self) -> dict[str, dict[str, Histogram]]:
        """Copies of all distributions, by name and stage ("" where stages don't count)."""
        self._sort()
        by_stage = {"queue": self._queue, "wire": self._wire, "slack": self._slack}
        out = {
            name: {stage.name.lower(): h.copy() for stage, h in of.items() if stage is not Stage.NONE}
            for name, of in by_stage.items()
        }
        return out | {"request_slack": {"": self._request_slack.copy()}, "rescue": {"": self._rescue.copy()}}

    def of_request(self, request: str) -> Iterator[EndedTransfer]:
        """Its transfers that are over, as far as they are remembered, oldest first."""
        return (t for t in self.transfers if t.request == request)

    def finished_as(self, request: str, session: str = "") -> EndedRequest | None:
        """The latest request of this name (of a session, if that is named) that is over."""
        return next((r for r in reversed(self.requests) if r.id == request and session in ("", r.session)), None)


def spent(first: int, path: Iterable[tuple[float, int]], begin: float, end: float) -> dict[int, float]:
    """Seconds at each level between two moments, given the first level and (when, level) of the changes after it."""
    out: dict[int, float] = {}
    steps = [(-INF, first), *path, (INF, first)]
    for (since, level), (until, _) in pairwise(steps):
        seconds = min(until, end) - max(since, begin)
        if seconds > 0:
            out[level] = out.get(level, 0.0) + seconds
    return out
