# SPDX-License-Identifier: Apache-2.0
"""Random single-link cases by load class, and the best that any fixed order makes of a small one."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from mfsd.lab.sim.decide import FixedOrder
from mfsd.lab.sim.singlelink import BatchSpec, Case, RequestSpec, Run

if TYPE_CHECKING:
    from collections.abc import Sequence

LOADS: Final = {"low": 0.4, "medium": 0.7, "high": 1.0, "overload": 1.4, "collapse": 2.0}
"""Offered bytes over what the link can carry while batches arrive."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Ranges that a case is drawn from. Bytes are per layer; uniform unless said otherwise."""

    batches: tuple[int, int] = (12, 20)
    requests: tuple[int, int] = (1, 4)
    layers: tuple[int, int] = (4, 8)
    compute: tuple[float, float] = (0.002, 0.008)
    collective: tuple[float, float] = (0.2e6, 3e6)
    kv: tuple[float, float] = (0.2e6, 4e6)
    """Log-uniform, for the requests that reuse (``reuse`` of them)."""
    p2d: tuple[float, float] = (0.2e6, 4e6)
    """Log-uniform."""
    reuse: float = 0.5
    quiet: float = 0.0
    """Share of the batches without collectives."""
    slack: tuple[float, float] = (1.5, 4.0)
    """Deadline over the request's time on an idle link; the paper's objective is 3."""
    instances: int = 6
    rate: float = 1.25e9
    """10 Gbit/s."""


SMALL: Final = Shape(
    batches=(3, 5),
    requests=(1, 2),
    layers=(1, 1),
    compute=(0.01, 0.05),
    collective=(4e6, 40e6),
    kv=(5e6, 80e6),
    p2d=(5e6, 80e6),
    reuse=0.3,
    quiet=0.5,
    slack=(1.0, 2.5),
)
"""Few transfers and little slack: for brute force, with a ``limit`` to ``draw``."""


def draw(rng: np.random.Generator, load: float, shape: Shape, limit: int = 0) -> Case:
    """Draw a case with Poisson arrivals at ``load``. ``limit``: at most that many transfers in all, 0 for any."""
    while True:
        case = _draw(rng, load, shape)
        if not limit or len(Run(case).size) <= limit:
            return case


def _draw(rng: np.random.Generator, load: float, shape: Shape) -> Case:
    count = int(rng.integers(shape.batches[0], shape.batches[1] + 1))
    drafts = []
    for _ in range(count):
        layers = int(rng.integers(shape.layers[0], shape.layers[1] + 1))
        compute = float(rng.uniform(*shape.compute))
        quiet = rng.random() < shape.quiet
        collective = tuple(0.0 if quiet else float(rng.uniform(*shape.collective)) for _ in range(layers))
        members = []
        for _ in range(int(rng.integers(shape.requests[0], shape.requests[1] + 1))):
            kv = float(np.exp(rng.uniform(*np.log(shape.kv)))) if rng.random() < shape.reuse else 0.0
            p2d = float(np.exp(rng.uniform(*np.log(shape.p2d))))
            members.append((kv, p2d, float(rng.uniform(*shape.slack))))
        drafts.append((layers, compute, collective, members))
    total = sum(layers * (kv + p2d) for layers, _, _, members in drafts for kv, p2d, _ in members)
    total += sum(sum(collective) for _, _, collective, _ in drafts)
    span = total / (shape.rate * load)
    arrivals = np.sort(rng.uniform(0.0, span, count))  # Poisson arrivals, given their number
    batches = []
    for i, (arrival, (layers, compute, collective, members)) in enumerate(zip(arrivals.tolist(), drafts, strict=True)):
        requests = tuple(
            RequestSpec(
                deadline=arrival + slack * _alone(shape.rate, layers, compute, collective, kv, p2d),
                kv=(kv,) * layers,
                p2d=(p2d,) * layers,
            )
            for kv, p2d, slack in members
        )
        batches.append(BatchSpec(arrival, compute, collective, requests, i % shape.instances))
    return Case(shape.rate, tuple(batches))


def _alone(rate: float, layers: int, compute: float, collective: Sequence[float], kv: float, p2d: float) -> float:
    """Time to the first token of a request that has the link and its batch to itself (no overlap: an upper bound)."""
    return layers * compute + (sum(collective) + kv + layers * p2d) / rate


def brute_force(case: Case) -> int:
    """Most requests in time under any fixed strict order of the case's transfers. Tries all of them: n! runs."""
    best = 0
    for order in itertools.permutations(range(len(Run(case).size))):
        best = max(best, Run(case).go(FixedOrder(order), float("inf")).count)
        if best == case.requests:
            break
    return best
