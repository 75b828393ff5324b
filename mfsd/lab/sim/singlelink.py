# SPDX-License-Identifier: Apache-2.0
"""One link, fluid, exact: what a policy makes of a case when levels are strict and a level is shared fairly.

Levels may be assured a rate, as classes of htb are: each gets that first, and what is left goes strictly by level.

Event driven: between two events every rate is constant, so transfers end at their exact times, whatever the period of
the timer. Events are arrivals, ends of compute, ends of transfers, and the timer at which policies are asked again;
they are asked at every other event, too, as the engine does when hints come in.

What it leaves out: packets, TCP, queues, more than one link. Hints are perfect and instant.

A batch runs layer by layer on its instance, after the batches that arrived there before it. A layer waits for its
stage-1 transfers (sent from the batch's arrival on) and its collective (sent when the layer starts), then computes;
its stage-3 transfers are sent when it has computed. A request has its first token when its batch has computed all
layers and all its stage-3 bytes have arrived.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np

from mfsd.ground.bands import LEVEL_NEW
from mfsd.ground.model import Stage
from mfsd.policy.views import COLLECTIVE, KV_REUSE, P2D

if TYPE_CHECKING:
    from mfsd.policy.views import B1, F8, I2, I4

DONE: Final = 1e-9
"""Share of a transfer's size below which what is left is rounding."""


@dataclass(frozen=True, slots=True)
class RequestSpec:
    """``kv`` and ``p2d``: bytes per layer of stages 1 and 3. ``deadline``: seconds, absolute."""

    deadline: float
    kv: tuple[float, ...] = ()
    p2d: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class BatchSpec:
    """``collective``: bytes per layer; its length is the number of layers. ``compute``: seconds per layer."""

    arrival: float
    compute: float
    collective: tuple[float, ...]
    requests: tuple[RequestSpec, ...]
    instance: int = 0


@dataclass(frozen=True, slots=True)
class Crowd:
    """Connections that always have something to send and announce none of it; of a stage if they are marked."""

    stage: Stage = Stage.NONE
    flows: int = 1


@dataclass(frozen=True, slots=True)
class Case:
    """A link of ``rate`` bytes/s and what is to be sent over it; batches by arrival."""

    rate: float
    batches: tuple[BatchSpec, ...]
    crowds: tuple[Crowd, ...] = ()

    @property
    def requests(self) -> int:
        """Requests in all."""
        return sum(len(b.requests) for b in self.batches)


@dataclass(slots=True)
class Outcome:
    """Per request, in the order of the case: when its first token came, and whether that was in time."""

    finish: F8
    met: B1

    @property
    def count(self) -> int:
        """Requests in time."""
        return int(self.met.sum())


@dataclass(slots=True)
class Order:
    """Who is served before whom: smaller keys strictly first, equal ones fairly."""

    key: F8
    """Of each active transfer, shape (len(run.active),)."""
    crowds: F8 = field(default_factory=lambda: np.zeros(0))
    """Of each crowd of the case, shape (crowds,)."""
    assured: dict[float, float] = field(default_factory=dict)
    """Bytes/s that go to a key before the order counts; in that order, too, where they exceed the rate."""

    def rates(self, rate: float, flows: I4) -> tuple[F8, F8]:
        """Bytes/s of each transfer, and of each crowd together, if the link gives ``rate``.

        ``flows``: connections of each crowd, shape (crowds,).
        """
        # Plain Python: there are a handful of them, and this is asked at every event.
        keys, crowds = self.key.tolist(), self.crowds.tolist()
        weight: dict[float, int] = dict.fromkeys(sorted({*keys, *crowds}), 0)
        for key, its in zip(keys + crowds, [1] * len(keys) + flows.tolist(), strict=True):
            weight[key] += its
        spare, each = rate, {}
        for key in weight:
            each[key] = min(self.assured.get(key, 0.0), spare)
            spare -= each[key]
        if each:
            each[next(iter(each))] += spare
        own = np.array([each[key] / weight[key] for key in keys])
        return own, np.array([each[key] / weight[key] for key in crowds]) * flows


class Decider(Protocol):
    """Decides levels; a policy behind views (mfsd/lab/sim/decide.py), or a fixed order."""

    def order(self, run: Run) -> Order:
        """Say who is served before whom from now on."""
        ...


class Run:
    """State of one simulation. Arrays over transfers have the shape of all transfers of the case, sent or not."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.now = 0.0
        self._number(case)
        n = len(self.size)
        self.left = self.size.copy()
        self.created = np.zeros(n)
        self.level: I2 = np.full(n, LEVEL_NEW, dtype=np.int16)
        self.infeasible = np.zeros(n, dtype=np.bool_)
        self.seen_layer = np.full(n, -1, dtype=np.int32)
        self.active: list[int] = []
        self.flows = np.array([c.flows for c in case.crowds], dtype=np.int32)
        self.carried = np.zeros(len(case.crowds))
        """Bytes of each crowd so far."""
        self.share: dict[float, float] = {}
        """Of the link since the last decision, by key."""
        b = len(case.batches)
        self.layer = [0] * b
        self.compute_ends = [math.inf] * b
        self.compute_done = [False] * b
        self.arrived: list[bool] = [False] * b
        self.departed: list[bool] = [False] * b
        self.started: list[bool] = [False] * b
        self.finish = np.full(case.requests, np.nan)
        self.arrivals_or_departures = 0
        self._waiting = [0] * b
        """Transfers that the current layer of a batch still waits for."""
        self._p2d_left = [0] * case.requests
        self._queue: dict[int, list[int]] = {}
        self._events: list[tuple[float, int, int]] = [(spec.arrival, 0, i) for i, spec in enumerate(case.batches)]
        heapq.heapify(self._events)

    def _number(self, case: Case) -> None:
        rows: list[tuple[int, float, int, int, int]] = []
        self.kv_of: list[list[list[int]]] = []
        self.collective_of: list[list[int]] = []
        self.p2d_of: list[list[list[int]]] = []
        self.first_request: list[int] = []
        request = 0

        def add(stage: int, size: float, owner: int, batch: int, layer: int) -> list[int]:
            if size <= 0:
                return []
            rows.append((stage, size, owner, batch, layer))
            return [len(rows) - 1]

        for b, spec in enumerate(case.batches):
            layers = len(spec.collective)
            owners = list(enumerate(spec.requests, request))
            self.first_request.append(request)
            self.kv_of.append(
                [
                    [f for i, r in owners for f in add(KV_REUSE, r.kv[k] if r.kv else 0.0, i, b, k)]
                    for k in range(layers)
                ]
            )
            self.collective_of.append([f for k in range(layers) for f in add(COLLECTIVE, spec.collective[k], -1, b, k)])
            self.p2d_of.append(
                [[f for i, r in owners for f in add(P2D, r.p2d[k] if r.p2d else 0.0, i, b, k)] for k in range(layers)]
            )
            request += len(owners)
        columns = np.array(rows, dtype=np.float64).reshape(len(rows), 5)
        self.stage = columns[:, 0].astype(np.uint8)
        self.size = columns[:, 1].copy()
        self.request = columns[:, 2].astype(np.int32)
        self.batch = columns[:, 3].astype(np.int32)
        self.target_layer = columns[:, 4].astype(np.int32)
        self.deadline = np.array([r.deadline for spec in case.batches for r in spec.requests])
        self.batch_of = np.array([b for b, s in enumerate(case.batches) for _ in s.requests], dtype=np.int32)

    # --- what happens -------------------------------------------------------------------------------------------------

    def _send(self, transfers: list[int]) -> None:
        self.created[transfers] = self.now
        self.active.extend(transfers)

    def _arrive(self, b: int) -> None:
        spec = self.case.batches[b]
        self.arrived[b] = True
        self.arrivals_or_departures += 1
        first = self.first_request[b]
        for i, request in enumerate(spec.requests):
            self._p2d_left[first + i] = sum(1 for size in request.p2d if size > 0)
        self._send([f for layer in self.kv_of[b] for f in layer])
        queue = self._queue.setdefault(spec.instance, [])
        queue.append(b)
        if queue[0] == b:
            self._start_layer(b)

    def _start_layer(self, b: int) -> None:
        self.started[b] = True
        layer = self.layer[b]
        collective = [f for f in self.collective_of[b] if self.target_layer[f] == layer]
        self._send(collective)
        self._waiting[b] = len(collective) + sum(1 for f in self.kv_of[b][layer] if self.left[f] > 0)
        if not self._waiting[b]:
            self._compute(b)

    def _compute(self, b: int) -> None:
        self.compute_ends[b] = self.now + self.case.batches[b].compute
        heapq.heappush(self._events, (self.compute_ends[b], 1, b))

    def _computed(self, b: int) -> None:
        self.compute_ends[b] = math.inf
        self._send(self.p2d_of[b][self.layer[b]])
        self.layer[b] += 1
        if self.layer[b] < len(self.case.batches[b].collective):
            self._start_layer(b)
            return
        self.compute_done[b] = True
        first = self.first_request[b]
        for request in range(first, first + len(self.case.batches[b].requests)):
            if not self._p2d_left[request]:
                self._first_token(request)
        queue = self._queue[self.case.batches[b].instance]
        queue.pop(0)
        if queue:
            self._start_layer(queue[0])

    def _first_token(self, request: int) -> None:
        self.finish[request] = self.now
        b = int(self.batch_of[request])
        first = self.first_request[b]
        if not np.isnan(self.finish[first : first + len(self.case.batches[b].requests)]).any():
            self.departed[b] = True
            self.arrivals_or_departures += 1

    def _delivered(self, f: int) -> None:
        self.left[f] = 0.0
        b = int(self.batch[f])
        if self.stage[f] == P2D:
            request = int(self.request[f])
            self._p2d_left[request] -= 1
            if self.compute_done[b] and not self._p2d_left[request]:
                self._first_token(request)
        elif self.started[b] and self.target_layer[f] == self.layer[b]:
            self._waiting[b] -= 1
            if not self._waiting[b]:
                self._compute(b)

    # --- time ---------------------------------------------------------------------------------------------------------

    def go(self, decider: Decider, period: float, until: float = math.inf) -> Outcome:
        """Run to the end, or to ``until``. ``period``: seconds between timer events, inf for none."""
        tick = 0
        while (self._events or self.active) and self.now < until:
            while self._events and self._events[0][0] <= self.now:
                _, kind, b = heapq.heappop(self._events)
                if kind == 0:
                    self._arrive(b)
                else:
                    self._computed(b)
            horizon = min(self._events[0][0] if self._events else math.inf, until)
            if not self.active and not len(self.flows):
                if horizon < math.inf:
                    self.share = {}
                    self.now = horizon
                continue
            order = decider.order(self)
            if math.isfinite(period):
                tick = max(tick, math.floor(self.now / period * (1 + 1e-12)) + 1)
                horizon = min(horizon, tick * period)
            self._serve(order, horizon)
        # A finish that is late by rounding only is in time.
        return Outcome(finish=self.finish, met=self.finish <= self.deadline * (1 + 1e-9) + 1e-12)

    def _serve(self, order: Order, horizon: float) -> None:
        """Send until a transfer ends, at most until ``horizon``."""
        ids = np.array(self.active, dtype=np.intp)
        rate, crowd_rate = order.rates(self.case.rate, self.flows)
        every = zip(
            np.concatenate([order.key, order.crowds]).tolist(), np.concatenate([rate, crowd_rate]).tolist(), strict=True
        )
        self.share = {}
        for key, its in every:
            self.share[key] = self.share.get(key, 0.0) + its / self.case.rate
        served = rate > 0
        end = self.now + float((self.left[ids[served]] / rate[served]).min(initial=math.inf))
        until = min(end, horizon)
        self.left[ids] -= rate * (until - self.now)
        self.carried += crowd_rate * (until - self.now)
        self.now = until
        # Looked at after every event: rounding must not leave a crumb behind for a later turn.
        done = ids[self.left[ids] <= DONE * self.size[ids]]
        if len(done):
            ended = set(done.tolist())
            self.active = [f for f in self.active if f not in ended]
            for f in done.tolist():
                self._delivered(f)
