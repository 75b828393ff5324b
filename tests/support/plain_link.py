# SPDX-License-Identifier: Apache-2.0
"""The single link again, with objects and loops: slow, and meant to be obviously right.

``priority`` maps a flow and the time to a sort key; smaller goes strictly first, equal keys share fairly. Keys may
depend on the flow and on what has happened, but must not change between events.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from mfsd.lab.sim.singlelink import BatchSpec, Case


@dataclass
class Flow:
    number: int
    stage: int
    size: float
    left: float
    batch: Batch
    request: Request | None
    layer: int
    sent: bool = False


@dataclass
class Request:
    number: int
    deadline: float
    flows: list[Flow] = field(default_factory=list)
    finish: float = math.nan


@dataclass
class Batch:
    spec: BatchSpec
    flows: list[Flow] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    layer: int = -1
    """-1: not started; equal to the number of layers: computed."""
    compute_end: float = math.inf

    @property
    def layers(self) -> int:
        return len(self.spec.collective)


def build(case: Case) -> list[Batch]:
    """Flows are numbered batch by batch: stage 1 by layer and request, then stage 2 by layer, then stage 3."""
    batches, number, owner = [], 0, 0
    for spec in case.batches:
        batch = Batch(spec)
        for r in spec.requests:
            batch.requests.append(Request(owner, r.deadline))
            owner += 1
        wanted: list[tuple[int, float, Request | None, int]] = []
        pairs = list(zip(batch.requests, spec.requests, strict=True))
        wanted += [(1, s.kv[k], r, k) for k in range(batch.layers) for r, s in pairs if s.kv]
        wanted += [(2, spec.collective[k], None, k) for k in range(batch.layers)]
        wanted += [(3, s.p2d[k], r, k) for k in range(batch.layers) for r, s in pairs if s.p2d]
        for stage, size, request, layer in wanted:
            if size > 0:
                flow = Flow(number, stage, size, size, batch, request, layer)
                number += 1
                batch.flows.append(flow)
                if request and stage == 3:
                    request.flows.append(flow)
        batches.append(batch)
    return batches


def simulate(case: Case, priority: Callable[[Flow, float], float]) -> dict[int, float]:
    """Time of each request's first token."""
    batches, now = build(case), 0.0
    while any(math.isnan(r.finish) for b in batches for r in b.requests):
        while any(settle(b, batches, now) for b in batches):
            pass
        active = [f for b in batches for f in b.flows if f.sent and f.left > 0]
        best = min((priority(f, now) for f in active), default=math.inf)
        served = [f for f in active if priority(f, now) == best]
        events = [b.spec.arrival for b in batches if b.spec.arrival > now]
        events += [b.compute_end for b in batches if now < b.compute_end < math.inf]
        events += [now + f.left / (case.rate / len(served)) for f in served]
        if not events:
            break
        until = min(events)
        for f in served:
            f.left -= case.rate / len(served) * (until - now)
            if f.left < 1e-9 * f.size:
                f.left = 0.0
        now = until
    return {r.number: r.finish for b in batches for r in b.requests}


def settle(batch: Batch, batches: list[Batch], now: float) -> bool:
    """Let one thing happen to a batch that is due now. False: nothing is."""
    if batch.spec.arrival > now:
        return False
    prefetch = [f for f in batch.flows if f.stage == 1 and not f.sent]
    for f in prefetch:
        f.sent = True
    if batch.layer < 0:
        before = [b for b in batches[: batches.index(batch)] if b.spec.instance == batch.spec.instance]
        if all(b.layer == b.layers for b in before):
            enter(batch, 0)
        return bool(prefetch) or batch.layer == 0
    if batch.layer < batch.layers:
        return bool(prefetch) or work(batch, now)
    return bool(prefetch) or finish(batch, now)


def work(batch: Batch, now: float) -> bool:
    """Start or end the compute of the current layer."""
    if batch.compute_end <= now:
        batch.compute_end = math.inf
        for f in batch.flows:
            f.sent |= f.stage == 3 and f.layer == batch.layer
        enter(batch, batch.layer + 1)
        return True
    waiting = any(f.left > 0 for f in batch.flows if f.stage in (1, 2) and f.layer == batch.layer)
    if waiting or batch.compute_end < math.inf:
        return False
    batch.compute_end = now + batch.spec.compute
    return True


def finish(batch: Batch, now: float) -> bool:
    """First token of one request that has all."""
    for r in batch.requests:
        if math.isnan(r.finish) and not any(f.left > 0 for f in r.flows):
            r.finish = now
            return True
    return False


def enter(batch: Batch, layer: int) -> None:
    batch.layer = layer
    for f in batch.flows:
        f.sent |= f.stage == 2 and f.layer == layer
