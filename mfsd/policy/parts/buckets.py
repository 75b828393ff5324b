# SPDX-License-Identifier: Apache-2.0
"""Buckets: how a continuous key (time to a deadline, size, bytes sent) becomes one of a few levels.

Equal ratios between neighbouring edges minimise the worst relative quantisation error (MFS paper, RMLQ); quantiles
hold equally many.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mfsd.policy.views import F8, I2


MANY: Final = 32


def edges(count: int, first: float, factor: float) -> tuple[float, ...]:
    """Upper edges of all but the last of ``count`` buckets: first, first x factor, first x factor^2, ..."""
    with np.errstate(over="ignore"):  # far edges of very many buckets are infinite, and so empty
        return tuple((first * np.power(float(factor), np.arange(count - 1))).tolist())


def bucket(values: F8, upper: Sequence[float]) -> I2:
    """Index of the bucket that each value falls in: how many upper edges lie at or below it. Shape as ``values``.

    The order of the edges doesn't matter. A value on an edge belongs to the bucket above; +inf is in the last.
    """
    if len(upper) > MANY:
        return np.searchsorted(np.sort(upper), values, side="right").astype(np.int16)
    # A pass per edge beats np.searchsorted for few edges: the passes are branch-free.
    out = np.zeros(len(values), dtype=np.int8)
    for edge in upper:
        out += (values >= edge).view(np.int8)
    return out.astype(np.int16)


def quantiles(sample: F8, count: int) -> tuple[float, ...]:
    """Upper edges of all but the last of ``count`` buckets that hold equally many of a sample; none if it is empty."""
    if not len(sample):
        return ()
    return tuple(np.quantile(sample, np.arange(1, count) / count).tolist())


def among(values: F8, upper: Sequence[float]) -> I2:
    """As ``bucket``, but a value on several edges is in the middle of them. ``upper``: ascending."""
    below, up_to = (np.searchsorted(upper, values, side=side) for side in ("left", "right"))
    return ((below + up_to) // 2).astype(np.int16)


def dense_rank(keys: F8, limit: int) -> I2:
    """Position of each key in ascending order, equal keys sharing one, at most ``limit - 1``. Shape as ``keys``."""
    _, inverse = np.unique(keys, return_inverse=True)
    return np.minimum(inverse, limit - 1).astype(np.int16)


def span(count: int, first: float, last: float) -> tuple[float, ...]:
    """``count - 1`` upper edges at equal ratios from ``first`` to ``last``; ``first`` alone if there is but one."""
    if count <= 2:
        return (first,) * (count - 1)
    return edges(count, first, (last / first) ** (1 / (count - 2)))
