# SPDX-License-Identifier: Apache-2.0
"""What sessions leave behind that are over, taken out of the books some at a time.

A process that dies may have had as many sessions as its user may, and all of them full.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from mfsd.engine.columns import GONE
from mfsd.engine.endings import AT_ONCE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mfsd.engine.books import Books
    from mfsd.engine.endings import Endings
    from mfsd.engine.records import Session, Transfer

SELECTOR: Final = 4
"""Steps, of AT_ONCE in a tick, that a mark or watch takes besides its connections; the kernel is told of most."""


@dataclass(slots=True)
class Leaving:
    """Sessions that are over and still have something here."""

    books: Books
    endings: Endings
    _sessions: deque[tuple[Session, Iterator[int]]] = field(default_factory=deque)
    """And the steps that are left of each."""
    _room: int = AT_ONCE
    """Steps until the next tick."""
    _now: float = 0.0

    @property
    def under_way(self) -> bool:
        """Some are left."""
        return bool(self._sessions)

    def begin(self, session: Session, now: float) -> list[Transfer]:
        """Free what a session said, but for what its sockets may still deliver, which is returned."""
        session.over = True
        self._sessions.append((session, self._steps(session)))
        self._run(now)
        return list(session.transfers.values())

    def go_on(self, now: float) -> None:
        """A tick begins."""
        self._room = AT_ONCE
        self._run(now)

    def _run(self, now: float) -> None:
        self._now = now
        while self._sessions and self._room > 0:
            steps = next(self._sessions[0][1], 0)
            self._room -= steps
            if not steps:
                self._sessions.popleft()

    def _steps(self, session: Session) -> Iterator[int]:
        """Each yields how many it was."""
        endings = self.endings
        for mark in list(session.marks.values()):
            steps = SELECTOR + len(mark.conns)
            endings.unmark(mark, self._now)
            yield steps
        for selector, watch in list(session.watches.items()):
            if session.watches.get(selector) is watch:
                steps = SELECTOR + len(watch.conns)
                endings.unwatch(watch, self._now)
                yield steps
        for batch in list(session.batches.values()):
            steps = 1 + len(batch.requests)
            self.books.strike_batch(batch)
            yield steps
        for request in list(session.requests.values()):
            request.completed = True
            if not request.transfers and request.row != GONE:
                endings.finish(request, self._now)
            yield 1
        for stream in list(session.streams.values()):
            if not stream.queue:
                endings.close(stream)
            yield 1
