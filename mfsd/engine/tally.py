# SPDX-License-Identifier: Apache-2.0
"""What became of transfers and requests: distributions for the metrics, and the latest ones in full for a trace.

Ends come by the thousand, so they are only noted here, as columns of a ring; who reads sorts them into buckets.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from mfsd.ground.model import INF, Stage

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from mfsd.engine.columns import Deferred
    from mfsd.engine.records import Request, Transfer
    from mfsd.policy.views import F8

SECONDS: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Upper bounds of the buckets of what takes time."""
SLACK: Final = (-10.0, -5.0, -2.0, -1.0, -0.5, -0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""The same of time to spare; below zero: late."""
TRANSFERS_KEPT: Final = 20_000
REQUESTS_KEPT: Final = 2_000
USERS_KEPT: Final = 100
UNSORTED_MAX: Final = 4_096
"""Ends noted before they are sorted although nobody reads."""
_COLUMNS: Final = ("stage", "size", "created", "begun", "deadline", "first_level")
"""Of a transfer's columns: those that are remembered."""
_NOTED: Final = np.dtype([
    ("stage", "u1"), ("size", "f8"), ("created", "f8"), ("begun", "f8"), ("deadline", "f8"), ("first_level", "i2"),
    ("ended", "f8"), ("delivered", "?"), ("uid", "i8"), ("rescues", "u4"),
])  # fmt: skip


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
    rescues: int

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
    """inf: none."""
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

    def add(self, values: F8, requests: Sequence[str]) -> None:
        """Count values, each of a request, or of none (""). What is infinite is left out."""
        finite = np.flatnonzero(np.isfinite(values))
        bucket = np.searchsorted(self.bounds, values[finite])
        for i, count in enumerate(np.bincount(bucket, minlength=len(self.counts)).tolist()):
            self.counts[i] += count
        self.sum += float(values[finite].sum())
        latest = np.full(len(self.counts), -1)
        latest[bucket] = finite  # of several the last one stays
        for i, at in enumerate(latest.tolist()):
            if at >= 0 and not requests[at]:
                at = next((k for k in reversed(finite[bucket == i].tolist()) if requests[k]), -1)  # noqa: PLW2901
            if at >= 0:
                self.exemplars[i] = Exemplar(requests[at], float(values[at]))

    def copy(self) -> Histogram:
        """As it is now."""
        out = Histogram(self.bounds)
        out.counts, out.sum, out.exemplars = self.counts[:], self.sum, self.exemplars[:]
        return out


class Tally:
    """See the module."""

    def __init__(self) -> None:
        self._transfers = np.zeros(TRANSFERS_KEPT, dtype=_NOTED)
        """The latest ones, a ring; what is no number is in lists of the same order."""
        self._names: list[str] = [""] * TRANSFERS_KEPT
        self._sessions: list[str] = [""] * TRANSFERS_KEPT
        self._requests: list[str] = [""] * TRANSFERS_KEPT
        self._paths: list[tuple[tuple[float, int], ...]] = [()] * TRANSFERS_KEPT
        self._noted = self._sorted = 0
        """How many have been noted, and sorted into buckets."""
        self.requests: deque[EndedRequest] = deque(maxlen=REQUESTS_KEPT)
        self.rescues: list[float] = []
        """Seconds from promotion to purge, not sorted in yet."""
        self._finished: list[EndedRequest] = []
        self._queue = {stage: Histogram(SECONDS) for stage in Stage}
        self._wire = {stage: Histogram(SECONDS) for stage in Stage}
        self._slack = {stage: Histogram(SLACK) for stage in Stage}
        self._request_slack = Histogram(SLACK)
        self.users: dict[int | None, list[int]] = {}
        """Requests late and in time by user, of those with a deadline; None: all users beyond the first ones."""
        self._due: dict[tuple[int | None, Stage], list[int]] = {}
        """The same of transfers, by stage, too."""
        self._listed: set[int] = set()
        self._rescue = Histogram(SECONDS)

    # --- noting -------------------------------------------------------------------------------------------------------

    def ended(
        self,
        transfers: Iterable[Transfer],
        columns: Deferred[Transfer],
        at: float | F8,
        *,
        delivered: bool,
    ) -> None:
        """Transfers are about to be struck out, which ended then: all, or each, shape (len(transfers),).

        Those younger than the last tick are left out: nothing is known of them.
        """
        every = list(transfers)
        known = [i for i, t in enumerate(every) if t.row >= 0]
        if len(known) < len(every):
            every, at = [every[i] for i in known], at if isinstance(at, float) else at[known]
        values = columns.noted(every, _COLUMNS)
        begin = 0
        while begin < len(every):
            end = min(
                begin + UNSORTED_MAX, begin + TRANSFERS_KEPT - self._noted % TRANSFERS_KEPT
            )  # where the ring begins anew
            part = slice(begin, end)
            self._note(every[part], [v[part] for v in values], at if isinstance(at, float) else at[part], delivered)
            begin = end

    def _note(self, transfers: Sequence[Transfer], values: Sequence[Any], at: float | F8, delivered: bool) -> None:  # noqa: FBT001 - private
        if self._noted + len(transfers) - self._sorted > UNSORTED_MAX:
            self._sort()
        begin = self._noted % TRANSFERS_KEPT
        rows = slice(begin, begin + len(transfers))
        for name, value in zip(_COLUMNS, values, strict=True):
            self._transfers[name][rows] = value
        self._transfers["ended"][rows], self._transfers["delivered"][rows] = at, delivered
        self._transfers["uid"][rows] = [t.session.uid for t in transfers]
        self._transfers["rescues"][rows] = [t.rescues for t in transfers]
        self._names[rows] = [t.id for t in transfers]
        self._sessions[rows] = [t.session.name for t in transfers]
        self._paths[rows] = [t.path for t in transfers]
        self._requests[rows] = ["" if t.request is None else t.request.id for t in transfers]
        self._noted += len(transfers)

    def finished(self, request: Request, arrival: float, deadline: float, at: float) -> None:
        """A request is about to be struck out."""
        one = EndedRequest(request.id, request.session.name, arrival, deadline, at)
        self.requests.append(one)
        if deadline < INF:
            self.users.setdefault(self._user(request.session.uid), [0, 0])[at <= deadline] += 1
        self._finished.append(one)
        if len(self._finished) >= UNSORTED_MAX:
            self._sort()

    def _user(self, uid: int) -> int | None:
        """None, where others have been there first."""
        if len(self._listed) < USERS_KEPT:
            self._listed.add(uid)
        return uid if uid in self._listed else None

    def _count_due(self, t: npt.NDArray[Any]) -> None:
        """Rows of _NOTED, not counted yet."""
        timed = t[(t["deadline"] < INF) & (t["delivered"] | (t["ended"] > t["deadline"]))]
        met = timed["ended"] <= timed["deadline"]
        keys, which = np.unique(timed["uid"] * len(Stage) + timed["stage"], return_inverse=True)
        late_and_met = np.bincount(which * 2 + met, minlength=2 * len(keys)).reshape(-1, 2)
        for key, (late, in_time) in zip(keys.tolist(), late_and_met.tolist(), strict=True):
            uid, stage = divmod(key, len(Stage))
            count = self._due.setdefault((self._user(uid), Stage(stage)), [0, 0])
            count[0] += late
            count[1] += in_time

    def _sort(self) -> None:
        rows = np.arange(self._sorted, self._noted) % TRANSFERS_KEPT
        self._count_due(self._transfers[rows])
        rows = rows[self._transfers["delivered"][rows]]
        self._sorted = self._noted
        every = self._transfers[rows]
        for stage in np.unique(every["stage"]).tolist():
            mine = every["stage"] == stage
            t, requests = every[mine], [self._requests[row] for row in rows[mine].tolist()]
            started = np.where(t["begun"] > 0, t["begun"], t["created"])
            self._queue[Stage(stage)].add(np.maximum(started - t["created"], 0.0), requests)
            self._wire[Stage(stage)].add(np.maximum(t["ended"] - started, 0.0), requests)
            self._slack[Stage(stage)].add(t["deadline"] - t["ended"], requests)
        finished, self._finished = self._finished, []
        slack = np.array([r.deadline - r.ended for r in finished], dtype=np.float64)
        self._request_slack.add(slack, [r.id for r in finished])
        rescues, self.rescues = self.rescues, []
        self._rescue.add(np.array(rescues, dtype=np.float64), [""] * len(rescues))

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

    def due(self) -> dict[tuple[int | None, Stage], tuple[int, int]]:
        """Transfers that had a deadline, by user (None: all beyond the first ones) and stage: late, and in time.

        Those that were cancelled before it are neither.
        """
        self._sort()
        return {key: (late, met) for key, (late, met) in self._due.items()}

    def of_request(self, request: str) -> Iterator[EndedTransfer]:
        """Its transfers that are over, as far as they are remembered, oldest first."""
        for n in range(max(self._noted - TRANSFERS_KEPT, 0), self._noted):
            row = n % TRANSFERS_KEPT
            if self._requests[row] != request:
                continue
            stage, size, created, begun, deadline, first, ended, delivered, _, rescues = self._transfers[row].item()
            yield EndedTransfer(
                self._names[row], self._sessions[row], request, Stage(stage), size, created, begun, ended, delivered,
                deadline, first, self._paths[row], rescues,
            )  # fmt: skip

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
