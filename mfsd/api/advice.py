# SPDX-License-Identifier: Apache-2.0
"""What a path can bear: the engine's view of one peer."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt

from mfsd.ground.model import HintError, tuple_selector
from mfsd.ground.wire import PATHS_MAX
from mfsd.v1 import hints_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mfsd.engine.engine import Engine
    from mfsd.ground.model import Address
    from mfsd.policy.views import F8


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
    host = _Host.at(engine, now) if engine.steering.devices else None
    return [advice(engine, host, dst) for dst in there]


@dataclass(frozen=True, slots=True)
class _Host:
    """What all of its ways have in common, added up once: whoever asks may ask for many, while there is much to add."""

    leaves_by: npt.NDArray[np.intp]
    """Connections by device that they leave by and by peer, shape (devices, peers + 1)."""
    left: F8
    """Bytes that unfinished transfers have left, by peer; the last one: where none is known."""
    device_left: F8
    """The same by device, of those with a connection."""

    @classmethod
    def at(cls, engine: Engine, now: float) -> Self:
        connections, t = engine.connections, engine.steering.views(now).transfers
        table, none, devices = connections.table, len(connections.peers), len(engine.steering.devices)
        slots = np.flatnonzero(table.used[: table.high]).astype(np.int32)
        peer = connections.peer.take(slots)
        place = connections.device_of(slots) * (none + 1) + np.where(peer >= 0, peer, none)
        known = t.conn >= 0
        return cls(
            leaves_by=np.bincount(place, minlength=devices * (none + 1)).reshape(devices, -1),
            left=_sums(np.where(t.peer >= 0, t.peer, none), t.left, none + 1),
            device_left=_sums(t.device[known], t.left[known], devices),
        )


def _sums(of: npt.NDArray[np.int32], values: F8, count: int) -> F8:
    """By index, shape (count,)."""
    return np.bincount(of, weights=values, minlength=count).astype(np.float64)


def advice(engine: Engine, host: _Host | None, dst: Address) -> pb.Advice:
    """Of the way from this host to ``dst``; ``host`` None: nothing of it is shaped."""
    if host is None:
        return pb.Advice()
    connections, devices = engine.connections, engine.steering.devices
    peer, device, far = connections.peers.index(dst), 0, float("inf")
    if peer >= 0 and host.leaves_by[:, peer].any():
        device, rate = int(host.leaves_by[:, peer].argmax()), connections.peers.rate
        far = float(rate[peer]) if peer < len(rate) else far
    estimator = devices[device].estimator
    return pb.Advice(
        known=estimator.rate > 0,
        rate_bytes_per_s=min(estimator.rate, far),
        spare_bytes_per_s=estimator.rate * (1.0 - estimator.load),
        queued_bytes=float(host.left[peer]) if peer >= 0 else 0.0,
        device_queued_bytes=float(host.device_left[device]),
        guaranteed_bytes_per_s=sum(engine.steering.guarantees.given(device).values()),
    )
