# SPDX-License-Identifier: Apache-2.0
"""Builders of views for tests: small ones by hand, random ones by the thousand."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from mfsd.policy.views import LEVEL_NEW, BatchView, LinkView, RequestView, TransferView

TRANSFER = {
    "stage": (np.uint8, 3),
    "size": (np.float64, 1e6),
    "left": (np.float64, 1e6),
    "ahead": (np.float64, 0.0),
    "request": (np.int32, -1),
    "batch": (np.int32, -1),
    "conn": (np.int32, 0),
    "target_layer": (np.int32, 0),
    "current_layer": (np.int32, 0),
    "computing": (np.bool_, False),
    "layer_started": (np.bool_, True),
    "deadline": (np.float64, np.inf),
    "compute_left": (np.float64, 0.0),
    "created": (np.float64, 0.0),
    "level": (np.int16, LEVEL_NEW),
    "port": (np.int32, 0),
    "peer": (np.int32, -1),
}
REQUEST = {
    "deadline": (np.float64, np.inf),
    "arrival": (np.float64, 0.0),
    "batch": (np.int32, -1),
    "compute_left": (np.float64, 0.0),
    "pruned": (np.bool_, False),
}
BATCH = {
    "layers": (np.int32, 1),
    "current_layer": (np.int32, 0),
    "layer_compute": (np.float64, 0.0),
    "compute_done": (np.bool_, False),
    "arrival": (np.float64, 0.0),
    "rank": (np.int32, 0),
}


def _columns(n: int, schema: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    unknown = set(given) - set(schema)
    assert not unknown, unknown
    return {
        name: np.broadcast_to(np.asarray(given.get(name, default), dtype=dtype), (n,)).copy()
        for name, (dtype, default) in schema.items()
    }


def transfers(n: int, **given: Any) -> TransferView:
    return TransferView(**_columns(n, TRANSFER, given))


def requests(n: int, **given: Any) -> RequestView:
    return RequestView(**_columns(n, REQUEST, given))


def batches(n: int, **given: Any) -> BatchView:
    return BatchView(**_columns(n, BATCH, given))


def link(rate: Any = 1e9, load: Any = 0.0, levels: int = 8, load_above: Any = 0.0, peer_rate: Any = ()) -> LinkView:
    rate = np.atleast_1d(np.asarray(rate, dtype=np.float64))
    ports = len(rate)
    return LinkView(
        rate=rate,
        load=np.broadcast_to(np.asarray(load, dtype=np.float64), (ports,)).copy(),
        load_above=np.broadcast_to(np.asarray(load_above, dtype=np.float64), (ports, levels + 1)).copy(),
        peer_rate=np.asarray(peer_rate, dtype=np.float64),
    )


def take(view: Any, rows: Any) -> Any:
    """The rows of a view, in that order."""
    return type(view)(**{f.name: getattr(view, f.name)[rows] for f in dataclasses.fields(view)})


Views = tuple[TransferView, RequestView, BatchView, LinkView]


def random_views(
    rng: np.random.Generator, n: int, *, requests_n: int = 12, batches_n: int = 4, ports: int = 1, levels: int = 8
) -> Views:
    """A consistent state: transfers point at requests, requests at batches; time 0 lies among the deadlines."""
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
    current = np.where(batch >= 0, b.current_layer[batch], 0)
    size = rng.lognormal(13, 2, n)
    t = transfers(
        n,
        stage=rng.choice([0, 1, 2, 3, 3], n),
        size=size,
        left=size * rng.uniform(1e-3, 1, n),
        ahead=np.where(rng.random(n) < 0.3, rng.lognormal(13, 1, n), 0.0),
        request=owner,
        batch=batch,
        conn=rng.integers(-1, 8, n),
        target_layer=rng.integers(0, 40, n),
        current_layer=current,
        computing=rng.random(n) < 0.6,
        layer_started=rng.random(n) < 0.5,
        deadline=np.where(owner >= 0, r.deadline[owner], np.where(rng.random(n) < 0.5, own, np.inf)),
        compute_left=np.where(owner >= 0, r.compute_left[owner], 0.0),
        created=rng.uniform(-1, 0, n),
        level=rng.choice([LEVEL_NEW, 0x7FFF, *range(levels)], n),
        port=rng.integers(0, ports, n),
        peer=rng.integers(-1, 5, n),
    )
    above = np.sort(rng.uniform(0, 1, (ports, levels + 1)), axis=1)
    net = link(rng.choice([1.25e8, 1e9], ports), above[:, -1], levels, above)
    return t, r, b, net
