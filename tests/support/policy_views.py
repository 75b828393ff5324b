# SPDX-License-Identifier: Apache-2.0
"""Views for tests: small ones by hand, random ones by the thousand."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from mfsd.ground.bands import LEVEL_BACKGROUND, LEVEL_NEW, LEVEL_SCAVENGER
from mfsd.policy.views import BatchView, LinkView, RequestView, TransferView, Views

PEERS = 5


def transfers(n: int, **columns: Any) -> TransferView:
    """Stage 3, 1 MB, all of it left, unless said otherwise."""
    return TransferView.of(n, **({"stage": 3, "size": 1e6, "left": 1e6} | columns))


requests, batches = RequestView.of, BatchView.of


def link(rate: Any = 1e9, levels: int = 8, **columns: Any) -> LinkView:
    return LinkView.of(rate, levels, **columns)


def view(t: TransferView, r: RequestView | None = None, net: LinkView | None = None, now: float = 0.0) -> Views:
    """One idle batch, and a link of 1 GB/s unless another is given."""
    return Views.of(t, net or link(), requests=r, batches=batches(1), now=now)


def take(rows_of: Any, rows: Any) -> Any:
    """The rows of a view, in that order."""
    return type(rows_of)(**{f.name: getattr(rows_of, f.name)[rows] for f in dataclasses.fields(rows_of)})


def columns(v: Views) -> dict[str, bytes]:
    """Every array of a view, to compare it before and after."""
    parts: dict[str, Any] = {"transfer": v.transfers, "request": v.requests, "batch": v.batches, "link": v.link}
    return {f"{k} {f.name}": getattr(p, f.name).tobytes() for k, p in parts.items() for f in dataclasses.fields(p)}


def random_view(rng: np.random.Generator, n: int, *, requests_n: int = 12, devices: int = 1, levels: int = 8) -> Views:
    """A consistent state: transfers point at requests, requests at batches; time 0 lies among the deadlines.

    In about half of them the rates of some links into peers are known; a device's own rate may not be.
    """
    batches_n = 4
    b = batches(
        batches_n,
        layers=rng.integers(1, 40, batches_n),
        layer_compute=rng.choice([0.0, 0.002, 0.01], batches_n),
        compute_done=rng.random(batches_n) < 0.3,
        arrival=rng.uniform(-1, 0, batches_n),
        rank=rng.permutation(batches_n),
    )
    b.current_layer = (rng.random(batches_n) * b.layers).astype(np.int32)
    r = requests(
        requests_n,
        deadline=rng.choice([-0.01, 0.005, 0.02, 0.1, 0.3, 1.0, np.inf], requests_n)
        + np.where(rng.random(requests_n) < 0.7, rng.uniform(0, 0.05, requests_n), 0.0),
        arrival=rng.uniform(-1, 0, requests_n),
        batch=rng.integers(-1, batches_n, requests_n),
        compute_left=np.where(rng.random(requests_n) < 0.4, rng.uniform(0, 0.3, requests_n), 0.0),
        pruned=rng.random(requests_n) < 0.2,
    )
    owner = rng.integers(-1, requests_n, n)
    own = rng.uniform(-0.01, 1, n)
    batch = np.where(owner >= 0, r.batch[owner], rng.integers(-1, batches_n, n))
    size = rng.lognormal(13, 2, n)
    t = transfers(
        n,
        stage=rng.choice([0, 1, 2, 3, 3, 4], n),
        size=size,
        left=size * rng.uniform(1e-3, 1, n),
        ahead=np.where(rng.random(n) < 0.3, rng.lognormal(13, 1, n), 0.0),
        request=owner,
        batch=batch,
        conn=rng.integers(-1, 8, n),
        target_layer=rng.integers(0, 40, n),
        current_layer=np.where(batch >= 0, b.current_layer[batch], 0),
        computing=rng.random(n) < 0.6,
        layer_started=rng.random(n) < 0.5,
        deadline=np.where(owner >= 0, r.deadline[owner], np.where(rng.random(n) < 0.5, own, np.inf)),
        compute_left=np.where(owner >= 0, r.compute_left[owner], 0.0),
        created=rng.uniform(-1, 0, n),
        level=rng.choice([LEVEL_NEW, LEVEL_SCAVENGER, LEVEL_BACKGROUND, *range(min(levels, 14))], n),
        device=rng.integers(0, devices, n),
        peer=rng.integers(-1, PEERS, n),
        max_defer=rng.choice([0.5, np.inf, np.inf], n),
        infeasible=rng.random(n) < 0.1,
    )
    above = np.sort(rng.uniform(0, 1, (devices, levels + 1)), axis=1)
    slow = rng.choice([2e7, 2.5e8, np.inf], PEERS) if rng.random() < 0.5 else ()
    floor = rng.choice([0.0, 0.2], devices)
    net = link(
        rng.choice([0.0, 1.25e8, 1e9, 1e9], devices),
        levels,
        load=above[:, -1],
        load_above=above,
        floor=floor,
        taken=floor * rng.random(devices),
        collectives=rng.choice([0.0, 0.1, 0.3, 0.6, 0.75, 1.0], devices),
        peer_rate=slow,
    )
    if rng.random() < 0.5:
        net.unhinted[:] = rng.choice([0.0, 0.5], devices)
        net.packet[:] = rng.choice([0.0, 0.001, 0.02], devices)
        net.unannounced[:] = rng.random((devices, levels)) < 0.1
    sizes = rng.lognormal(13, 2, int(rng.integers(0, 30))) if rng.random() < 0.5 else np.zeros(0)
    return Views(t, r, b, net, 0.0, sizes, int(rng.choice([0, 3 * requests_n])))
