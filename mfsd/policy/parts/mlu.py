# SPDX-License-Identifier: Apache-2.0
"""MLU, minimal link utilisation: the share of the residual link that a transfer needs from now on to be in time.

    MLU = size_remaining / (time_remaining * B * (1 - rho))

MFS paper, RMLQ. Above 1 the transfer can't be in time; near 1 it needs the link to itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from mfsd.policy.parts import bound, buckets
from mfsd.policy.views import P2D

if TYPE_CHECKING:
    from mfsd.policy.views import F8, I2, Views

RHO: Final = ("none", "above", "all")
"""Which load counts as immovable: none, that of more urgent levels, all of it."""
SIZE: Final = ("transfer", "request")
"""Whose bytes count: the transfer's (and what leaves before it on its connection), or all its request has left."""
MAX_RHO: Final = 0.99
"""A saturated device would make every MLU infinite and all transfers alike."""


def residual(view: Views, rho: str, level: npt.NDArray[np.integer[Any]]) -> F8:
    """Share of the device that a transfer at ``level`` (>= 0) can't push aside, 0 .. MAX_RHO, shape (n,) or (1,)."""
    link, device = view.link, view.transfers.device
    if rho == "none":
        return np.zeros(1)
    if rho == "all":
        load = link.load if len(link.load) == 1 else link.load.take(device)
        return np.clip(load, 0.0, MAX_RHO)
    columns = link.load_above.shape[1]
    share = np.clip(link.load_above, 0.0, MAX_RHO).ravel()
    cell = np.minimum(level, columns - 1)
    taken: F8 = share.take(cell if len(link.rate) == 1 else device * np.int32(columns) + cell)
    return taken


def mlu(view: Views, size: str, rho: F8) -> F8:
    """MLU of every transfer, >= 0, shape (n,): 0 without a deadline, inf past it. ``rho`` as from ``residual``."""
    t = view.transfers
    left = t.left + t.ahead
    if size == "request":
        left = np.maximum(left, bound.request_bytes(view, np.where(t.stage == P2D, t.left, 0.0)))
    time_left = t.deadline - view.now
    # left is > 0, so a room of zero gives inf and an infinite room gives 0: both are what is meant. NaN is past the
    # deadline on a device of unknown rate.
    with np.errstate(divide="ignore", invalid="ignore"):
        out: F8 = left / (np.maximum(time_left, 0.0) * (bound.path_rate(view) * (1.0 - rho)))
    if (view.link.rate <= 0).any():
        out[time_left <= 0] = np.inf
    return out


def thresholds(count: int, upper: float, ratio: float, origin: int) -> tuple[float, ...]:
    """Descending: U * E^-i for i = origin, origin + 1, ... (``upper`` U, ``ratio`` E)."""
    return tuple(upper * ratio ** -(origin + i) for i in range(count))


def steps(values: F8, descending: tuple[float, ...]) -> I2:
    """How many thresholds lie above each MLU: 0 is the most urgent step, len(descending) the least. Shape (n,)."""
    reached = buckets.bucket(values, descending)
    return np.int16(len(descending)) - reached
