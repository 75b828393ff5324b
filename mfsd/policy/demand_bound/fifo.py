# SPDX-License-Identifier: Apache-2.0
"""Bytes on one connection leave in order: what stands before a transfer is due when that is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from mfsd.policy.demand_bound.load import BUCKETS, bucket

if TYPE_CHECKING:
    import numpy.typing as npt

    from mfsd.policy.views import F8, I4

_BUCKET_BITS: Final = BUCKETS.bit_length()
_PLACE_BITS: Final = 31
"""Of a float32 without its sign: good enough to see who is behind whom."""
MANY: Final = 1 << 16
"""Connections that are counted to see whether transfers share any."""


def hurried_by(conn: I4, ahead: F8, due: F8) -> I4 | None:
    """Row whose deadline each row must meet: the earliest of those on its connection at or behind it, shape (n,).

    ``conn``: connection of each row, negative if it has none. ``ahead``: bytes before it on that. ``due``: seconds
    left, inf for none. Returns None if every row has only its own to meet, as is usual: transfers are announced in the
    order of their deadlines. Deadlines of one bucket (load.py) count as equal.
    """
    rows = np.flatnonzero(conn >= 0)
    if not len(rows):
        return None
    on, seconds = (conn, due) if len(rows) == len(conn) else (conn.take(rows), due.take(rows))
    if on.max() < MANY:
        each = np.bincount(on)
        if each.max() < 2:
            return None  # nobody shares one
        # Those that several share, of which one at least is due.
        rows = rows[((each > 1) & (np.bincount(on, weights=seconds < np.inf) > 0)).take(on)]
        if not len(rows):
            return None
        on, seconds = conn.take(rows), due.take(rows)
    before = ahead.take(rows)
    # Connection, place and bucket in one number; who is due later comes first among those at one place.
    place = before.astype(np.float32).view(np.int32).astype(np.int64)
    key = ((on.astype(np.int64) << _PLACE_BITS | place) << _BUCKET_BITS) | (BUCKETS - bucket(seconds))
    if _in_order(key):
        return None
    order = np.argsort(key)
    on, seconds = on.take(order), seconds.take(order)
    # Only connections with somebody out of order matter.
    same = on[1:] == on[:-1]
    number = np.concatenate([[0], np.cumsum(~same)])
    affected = np.zeros(number[-1] + 1, dtype=np.bool_)
    affected[number[1:][same & (seconds[1:] < seconds[:-1])]] = True
    kept = np.flatnonzero(affected.take(number))
    out = np.arange(len(conn), dtype=np.int32)
    mine = rows.take(order.take(kept))
    first = _first_behind(number.take(kept), seconds.take(kept))
    out[mine] = mine.take(first)
    return out


def _in_order(key: npt.NDArray[np.int64]) -> bool:
    """Nobody is in a bucket before that of somebody ahead of it."""
    key = np.sort(key)
    same = (key[1:] ^ key[:-1]) >> (_PLACE_BITS + _BUCKET_BITS) == 0
    mask = (1 << _BUCKET_BITS) - 1
    return not (same & ((key[1:] & mask) > (key[:-1] & mask))).any()


def _first_behind(number: npt.NDArray[np.int64], due: F8) -> npt.NDArray[np.intp]:
    """Index of the earliest at or behind each, among those of its connection ``number``; itself if none is earlier.

    Both in the order of connections and of places on them, shape (m,).
    """
    # Ranks instead of deadlines, so that the number of its connection can be added without rounding anything.
    by_due = np.argsort(due)
    rank = np.empty(len(due), dtype=np.int64)
    rank[by_due] = np.arange(len(due))
    base = number * len(due)
    first = by_due.take(np.minimum.accumulate((rank + base)[::-1])[::-1] - base)
    itself = np.arange(len(due))
    return np.where(due.take(first) < due, first, itself)
