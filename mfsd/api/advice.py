# SPDX-License-Identifier: Apache-2.0
"""What a path can bear: the engine's view of one peer."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import numpy as np

from mfsd.ground.model import HintError, tuple_selector
from mfsd.ground.wire import PATHS_MAX
from mfsd.v1 import hints_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mfsd.engine.engine import Engine
    from mfsd.ground.model import Address
    from mfsd.policy.views import Views


def address(field: str, text: str) -> Address:
    """An address of a path. Raises HintError."""
    try:
        return tuple_selector(text).dst
    except HintError as e:
        raise HintError(field, e.problem, e.fix) from None


def ways(request: pb.AdviseRequest) -> list[tuple[Address, Address | None]]:
    """The paths that are asked for: (there, from where; None: from here). Raises HintError."""
    if len(request.paths) > PATHS_MAX:
        raise HintError("paths", f"{len(request.paths)} of them", f"at most {PATHS_MAX} at a time")
    return [
        (address(f"paths[{i}].dst", p.dst), address(f"paths[{i}].src", p.src) if p.src else None)
        for i, p in enumerate(request.paths)
    ]


def ours(one: Address) -> bool:
    """It is an address of this host."""
    family = socket.AF_INET6 if one.version == 6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as s:
        try:
            s.bind((str(one), 0))
        except OSError:
            return False
    return True


def answers(engine: Engine, there: Iterable[Address], now: float) -> list[pb.Advice]:
    """Of the ways from this host to these addresses."""
    views = engine.steering.views(now)
    return [advice(engine, views, dst) for dst in there]


def advice(engine: Engine, views: Views, dst: Address) -> pb.Advice:
    """Of the way from this host to ``dst``."""
    connections, devices = engine.connections, engine.steering.devices
    if not devices:
        return pb.Advice()
    t, peer, table = views.transfers, connections.peers.index(dst), connections.table
    slots = np.zeros(0, np.int32)
    if peer >= 0:  # a slot that is free keeps the peer that it had
        slots = np.flatnonzero(table.used[: table.high] & (connections.peer[: table.high] == peer)).astype(np.int32)
    used = connections.device_of(slots)
    device = int(np.bincount(used).argmax()) if len(used) else 0
    estimator = devices[device].estimator
    far = float("inf")
    if len(slots) and len(connections.peers.rate):
        far = float(connections.peers.rate[peer])
    return pb.Advice(
        known=estimator.rate > 0,
        rate_bytes_per_s=min(estimator.rate, far),
        spare_bytes_per_s=estimator.rate * (1.0 - estimator.load),
        queued_bytes=float(t.left[t.peer == peer].sum()) if peer >= 0 else 0.0,
        device_queued_bytes=float(t.left[(t.conn >= 0) & (t.device == device)].sum()),
        guaranteed_bytes_per_s=sum(engine.steering.guarantees.given(device).values()),
    )
