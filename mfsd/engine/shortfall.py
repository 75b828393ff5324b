# SPDX-License-Identifier: Apache-2.0
"""How much may be missing of a transfer that counts as whole."""

from __future__ import annotations

from heapq import heappop, heappush
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mfsd.engine.books import Books
    from mfsd.engine.records import Stream, Transfer
    from mfsd.policy.views import B1, F8

SLACK: Final = 0.5
"""Bytes; offsets are floating-point numbers."""
REST: Final = 0.2
"""Share of a transfer that may be missing, once nothing more is to come, for it to count as announced too large."""


def cut(books: Books, transfers: Iterable[Transfer], reached: float) -> None:
    """No more bytes of these, of one stream, will come than up to an offset of it."""
    t, some = books.transfers, list(transfers)
    rows = t.rows(some)
    if some and not some[0].stream.ordered:
        moved = dict(zip(some[0].stream.queue, shared_out(books, some[0].stream, reached).tolist(), strict=True))
        t.live("end")[rows] = t.live("start")[rows] + np.array([moved[x] for x in some])
    else:
        t.live("end")[rows] = np.minimum(t.live("end")[rows], np.maximum(reached, t.live("start")[rows]))


def shared_out(books: Books, stream: Stream, reached: float) -> F8:
    """What each of the transfers of an interleaved stream has moved of its bytes, in the order of its queue.

    Nobody can tell, so each byte is shared by those that had been announced and were not through. Of which is said that
    they are done have moved all.
    """
    t = books.transfers
    rows = t.rows(stream.queue)
    start, size = t.live("start")[rows], t.live("size")[rows]
    moved = shares(start, size, reached)
    said = np.fromiter((x.handed_over and not x.left for x in stream.queue), np.bool_, len(rows))
    theirs, others = float((size - moved)[said].sum()), float(moved[~said].sum())
    moved[said] = size[said]
    if theirs:
        moved[~said] *= max(1 - theirs / others, 0.0) if others else 0.0
    return moved


def shares(start: F8, size: F8, reached: float) -> F8:
    """What each has moved when every byte up to ``reached`` is shared by those that have begun and lack some."""
    moved = np.zeros(len(start))
    under_way: list[tuple[float, int]] = []
    level = at = 0.0  # what one that has been under way since ever would have moved by the offset ``at``
    began = moved.copy()

    def go_on(until: float) -> None:
        nonlocal level, at
        while under_way and at < until:
            first, own = under_way[0][0] - level, (until - at) / len(under_way)
            if first > own:
                level, at = level + own, until
            else:
                level, at = under_way[0][0], at + first * len(under_way)
                i = heappop(under_way)[1]
                moved[i] = size[i]
        at = max(at, until)

    for i in np.argsort(start, kind="stable").tolist():
        if start[i] >= reached:
            break
        go_on(float(start[i]))
        began[i] = level
        heappush(under_way, (level + float(size[i]), i))
    go_on(reached)
    for _, i in under_way:
        moved[i] = level - began[i]
    return moved


def lacks(transfers: Sequence[Transfer], missing: F8, size: F8) -> B1:
    """Of which so many bytes that were never written are more than a size may be announced too large; shapes (n,).

    Nobody can tell of one whose bytes may have gone before its hint.
    """
    n = len(transfers)
    told = np.fromiter((not x.maybe_late for x in transfers), np.bool_, n)
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
