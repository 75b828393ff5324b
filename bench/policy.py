# SPDX-License-Identifier: Apache-2.0
"""How long a decision takes: levels of 10,000 and 100,000 transfers, and the inter-request algorithm.

The evaluation is MFS with all it has (MLU with the load above, RLI, RED classes, pruning, give-up), on a random state
whose rows are in all stages, new and old, on four devices. The inter-request algorithm gets 64 batches of 64 requests
that load all of 64 devices (262,144 transfers) so heavily that pruning uses up its budget. Medians; the other policies
beside it for comparison.

What the default policy takes, with guarantees, is measured in two states: 10,000 connections with a transfer each that
can all be in time (``guarantees_10000_ms``), and the random state of the others, in which more is due than fits, some
requests are lost, and connections carry transfers out of order (``demand-bound_10000_ms``).
"""

from __future__ import annotations

import gc
import statistics
import time
from typing import TYPE_CHECKING, Final

import numpy as np

from bench.common import Figure, parser, write
from mfsd.daemon.memory import keep_freed
from mfsd.ground.bands import LEVEL_NEW, LEVEL_SCAVENGER
from mfsd.policy.registry import DEFAULT, make_policy, names
from mfsd.policy.views import BatchView, LinkView, RequestView, TransferView, Views

if TYPE_CHECKING:
    from collections.abc import Callable

LEVELS: Final = 13
FULL: Final[dict[str, float | int | bool | str]] = {"rho": "above", "late_infeasible": "scavenger", "red_classes": 2}
SLOW: Final = ("sincronia",)
"""Quadratic in the number of coflows by its nature: not measured at 100,000 rows."""


def state(rng: np.random.Generator, n: int, requests: int, batches: int, devices: int) -> Views:
    """A random state at time 0."""
    of_request = rng.integers(0, batches, requests)
    current = rng.integers(0, 32, batches)
    done = rng.random(batches) < 0.3
    deadline = rng.uniform(-0.05, 2.0, requests)
    compute = np.where(done, 0.0, (32 - current) * 0.004)[of_request]
    owner = rng.integers(0, requests, n)
    batch = of_request[owner]
    stage = rng.choice([1, 2, 3, 3], n)
    size = rng.lognormal(13.0, 1.5, n)
    above = np.sort(rng.uniform(0, 1, (devices, LEVELS + 1)), axis=1)
    transfers = TransferView.of(
        n,
        stage=stage,
        size=size,
        left=size * rng.uniform(0.01, 1, n),
        ahead=np.where(rng.random(n) < 0.5, size, 0.0),
        request=np.where(stage == 2, -1, owner),
        batch=batch,
        conn=rng.integers(0, n, n),
        target_layer=rng.integers(0, 32, n),
        current_layer=current[batch],
        computing=~done[batch],
        layer_started=rng.random(n) < 0.2,
        deadline=np.where(stage == 2, np.inf, deadline[owner]),
        compute_left=np.where(stage == 2, 0.0, compute[owner]),
        created=rng.uniform(-1, 0, n),
        level=rng.choice([LEVEL_NEW, LEVEL_SCAVENGER, *range(LEVELS)], n),
        device=rng.integers(0, devices, n),
        peer=rng.integers(-1, 16, n),
    )
    of_requests = RequestView.of(
        requests,
        deadline=deadline,
        arrival=rng.uniform(-1, 0, requests),
        batch=of_request,
        compute_left=compute,
        pruned=rng.random(requests) < 0.1,
    )
    of_batches = BatchView.of(
        batches,
        layers=32,
        current_layer=current,
        layer_compute=0.004,
        compute_done=done,
        arrival=rng.uniform(-1, 0, batches),
        rank=rng.permutation(batches),
    )
    link = LinkView.of(np.full(devices, 1.25e9), LEVELS, load=above[:, -1], load_above=above)
    return Views(transfers, of_requests, of_batches, link, 0.0)


def overload(rng: np.random.Generator, batches: int, each: int, devices: int) -> Views:
    """Every request has bytes on every device, more than fit before the deadlines."""
    requests = batches * each
    view = state(rng, requests * devices, requests, batches, devices)
    t, r = view.transfers, view.requests
    t.stage[:] = 3
    t.request[:] = np.repeat(np.arange(requests), devices)
    t.device[:] = np.tile(np.arange(devices), requests)
    t.peer[:] = -1
    r.batch[:] = np.repeat(np.arange(batches), each)
    needed = t.left.sum() / devices / view.link.rate[0]
    r.deadline[:] = rng.uniform(0.1, 0.7, requests) * needed
    r.compute_left[:] = 0.0
    view.batches.layer_compute[:] = 0.0
    t.batch[:], t.deadline[:] = r.batch[t.request], r.deadline[t.request]
    return view


def feasible(rng: np.random.Generator, n: int, requests: int, batches: int, devices: int) -> Views:
    """As `state`, a connection per transfer, everybody in time: half of each device is due within two seconds."""
    view = state(rng, n, requests, batches, devices)
    t, r = view.transfers, view.requests
    t.conn[:], t.ahead[:] = np.arange(n), 0.0
    r.deadline[:] = rng.uniform(0.3, 2.0, requests)
    t.deadline[:] = np.where(t.stage == 2, np.inf, r.deadline[np.maximum(t.request, 0)])
    due = np.bincount(t.device, weights=t.left * (t.stage != 2), minlength=devices)
    scale = view.link.rate / due
    t.left *= scale[t.device]
    t.size *= scale[t.device]
    return view


def median_ms(run: Callable[[], object], repeat: int) -> float:
    """Median wall-clock time of a call, after two for warming up."""
    run()
    run()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def main() -> None:
    """Measure and report."""
    parser(__doc__).parse_args()
    keep_freed()  # otherwise page faults of large temporaries are measured, not the policy
    rng = np.random.default_rng(1)
    small, large = state(rng, 10_000, 1_000, 64, 4), state(rng, 100_000, 10_000, 256, 4)
    crowd, calm = overload(rng, 64, 64, 64), feasible(rng, 10_000, 1_000, 64, 4)
    full = make_policy("mfs", LEVELS, FULL)
    gc.disable()

    arrangement = full.arrange(crowd)
    assert arrangement is not None
    pruned = int(arrangement.pruned.sum())
    figures = [
        Figure.against("eval_10000_ms", median_ms(lambda: full.evaluate(small), 200), "ms", target=1.0, want="at most"),
        Figure.against(
            "eval_100000_ms", median_ms(lambda: full.evaluate(large), 40), "ms", target=15.0, want="at most"
        ),
        Figure.against(
            "inter_request_ms", median_ms(lambda: full.arrange(crowd), 40), "ms", target=5.0, want="at most"
        ),
        Figure(
            "inter_request_pruned", pruned, "requests", baseline=len(crowd.requests), ratio=pruned / len(crowd.requests)
        ),
        Figure("infeasible_10000_ms", median_ms(lambda: full.infeasible(small), 100), "ms"),
    ]
    guaranteed = make_policy(DEFAULT, None)
    decision = guaranteed.evaluate(calm)
    assert decision.guarantee is not None
    assert decision.guarantee.any()
    assert decision.infeasible is not None
    assert not decision.infeasible.any()
    calm.transfers.level[:] = decision.level
    figures.append(
        Figure.against(
            "guarantees_10000_ms", median_ms(lambda: guaranteed.evaluate(calm), 200), "ms", target=1.0, want="at most"
        )
    )
    for name in names():
        policy = make_policy(name, None if name == "llf" else LEVELS)
        repeat = 3 if name in SLOW else 50
        figures.append(
            Figure(f"{name}_10000_ms", median_ms(lambda p=policy: p.evaluate(small), repeat), "ms")  # type: ignore[misc]
        )
    write("policy", figures)


if __name__ == "__main__":
    main()
