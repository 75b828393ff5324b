# SPDX-License-Identifier: Apache-2.0
"""How much may be missing of a transfer that counts as whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from mfsd.engine.books import Books
    from mfsd.engine.records import Transfer

SLACK: Final = 0.5
"""Bytes; offsets are floating-point numbers."""
REST: Final = 0.2
"""Share of a transfer that may be missing, once nothing more is to come, for it to count as announced too large."""


def cut(books: Books, transfer: Transfer, reached: float) -> None:
    """No more of its bytes will come than up to an offset of its stream."""
    t = books.transfers
    t.put(transfer, "end", min(float(t.get(transfer, "end")), max(reached, float(t.get(transfer, "start")))))


def lacks(transfer: Transfer, missing: float, size: float) -> bool:
    """So many bytes that were never written are more than a size may be announced too large.

    Nobody can tell of interleaved ones, nor of one whose bytes may have gone before its hint.
    """
    stream = transfer.stream
    return stream.ordered and not transfer.maybe_late and missing > max(REST * size, stream.debt + SLACK)


def is_short(books: Books, transfer: Transfer) -> bool:
    """Its worker ended before it had written all of it."""
    t = books.transfers
    size = float(t.get(transfer, "size"))
    return lacks(transfer, size - float(t.get(transfer, "end")) + float(t.get(transfer, "start")), size)
