# SPDX-License-Identifier: Apache-2.0
"""Connections that go on sending when all that was announced on them has arrived: sizes may be announced too small.

What comes then is still due when the last transfer was, but nobody knows how much it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from mfsd.ground.model import INF

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import numpy.typing as npt

    from mfsd.engine.books import Books
    from mfsd.engine.records import Stream, Transfer
    from mfsd.policy.views import F8


LEAST: Final = 8192
"""Bytes beyond that are some: fewer may be words between transfers."""


class Beyond:
    """Until when, and from where on, by slot."""

    def __init__(self, slots: int) -> None:
        self._until: F8 = np.zeros(slots)
        """When the last transfer is due, if it has arrived and its worker has not said that it was all; 0: none."""
        self._since: F8 = np.zeros(slots)
        """Where that one ended, on TCP's scale."""

    def forget(self, slot: int) -> None:
        """Something else is announced there, or the connection is gone."""
        self._until[slot] = 0.0

    def note(self, books: Books, delivered: Mapping[Stream, Iterable[Transfer]]) -> None:
        """These transfers have arrived, and are still in their queues."""
        for stream, some in delivered.items():
            last, members = stream.queue.last, list(stream.members)
            if last not in some or last.handed_over or not stream.ordered or len(members) != 1:
                continue
            until = float(books.transfers.get(last, "deadline"))
            if until < INF:
                self._until[members[0].slot] = until
                end = float(books.transfers.get(last, "end"))
                self._since[members[0].slot] = books.streams.position_at(stream, end)

    def slots(self, high: int, sent: Callable[[], F8], now: float) -> npt.NDArray[np.int32]:
        """Where more has left, by LEAST, before it is due. ``sent``: by slot, shape (high,), asked if it matters."""
        slots = np.flatnonzero(self._until[:high] > now)
        if len(slots):
            slots = slots[sent().take(slots) > self._since.take(slots) + LEAST]
        return slots.astype(np.int32)
