# SPDX-License-Identifier: Apache-2.0
"""How much may be missing of a transfer that counts as whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mfsd.engine.books import Books
    from mfsd.engine.records import Transfer
    from mfsd.policy.views import B1, F8

SLACK: Final = 0.5
"""Bytes; offsets are floating-point numbers."""
REST: Final = 0.2
"""Share of a transfer that may be missing, once nothing more is to come, for it to count as announced too large."""


def cut(books: Books, transfers: Iterable[Transfer], reached: float) -> None:
    """No more bytes of these, of one stream, will come than up to an offset of it."""
    t = books.transfers
    rows = t.rows(transfers)
    t.live("end")[rows] = np.minimum(t.live("end")[rows], np.maximum(reached, t.live("start")[rows]))


def lacks(transfers: Sequence[Transfer], missing: F8, size: F8) -> B1:
    """Of which so many bytes that were never written are more than a size may be announced too large; shapes (n,).

    Nobody can tell of interleaved ones, nor of one whose bytes may have gone before its hint.
    """
    n = len(transfers)
    told = np.fromiter((x.stream.ordered and not x.maybe_late for x in transfers), np.bool_, n)
    debt = np.fromiter((x.stream.debt for x in transfers), np.float64, n)
    out: B1 = told & (missing > np.maximum(REST * size, debt + SLACK))
    return out


def short(books: Books, transfers: Sequence[Transfer]) -> list[Transfer]:
    """Those whose worker ended before it had written all of them."""
    t, left = books.transfers, [x for x in transfers if x.left]
    rows = t.rows(left)
    size = t.live("size")[rows]
    missing = size - t.live("end")[rows] + t.live("start")[rows]
    return [x for x, is_short in zip(left, lacks(left, missing, size).tolist(), strict=True) if is_short]
