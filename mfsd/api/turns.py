# SPDX-License-Identifier: Apache-2.0
"""Turns on the event loop: whoever has much to say gives way to others, in one batch or in many at a time."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Final

from mfsd.api.answers import SETTLE_S
from mfsd.ground.bucket import Bucket

TURN_S: Final = 0.001
"""A batch is applied for so long before others have their turn."""
CALL_S: Final = 0.001
"""Of the loop that a call takes beside what is applied, about: it is charged to who has several of them at a time."""
REST: Final = 3.0
"""So many times as long it waits then, if there are others: their calls take several rounds of the loop."""
LATELY_S: Final = 0.1
"""There are others if they have sent something within that time."""
LINES: Final = 64
"""Users that are remembered, besides those with something to say."""


class Turn:
    """Time that a batch may take at a stretch."""

    def __init__(self) -> None:
        self._since = time.perf_counter()

    @property
    def took(self) -> float:
        """Seconds of this stretch."""
        return time.perf_counter() - self._since

    @property
    def until(self) -> float:
        """When it is over, on the clock of ``time.perf_counter``."""
        return self._since + TURN_S

    async def give(self, *, contended: bool) -> None:
        """Let others have theirs."""
        took = self.took
        await asyncio.sleep(min(REST * took, SETTLE_S) if contended else 0)
        self._since = time.perf_counter()


@dataclass(slots=True)
class _Line:
    """Batches of one user."""

    credit: Bucket
    """Seconds that they may take now; they earn one for each REST of others."""
    heard: float = 0.0
    """When one came last."""
    waiting: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def earn(self) -> None:
        self.credit.fill(time.perf_counter(), 1 / (1 + REST), TURN_S)


class Lines:
    """While several users have something to say, each's batches are applied one after the other, with rests.

    However many sessions and streams a user has, others find the loop free for most of the time. Who is alone waits for
    nobody.
    """

    def __init__(self) -> None:
        self._lines: dict[int, _Line] = {}

    def turn(self, uid: int) -> _Place:
        """``async with`` it: then it is that user's turn; the last stretch of the turn is what it costs."""
        return _Place(self, self.of(uid))

    def of(self, uid: int) -> _Line:
        """The line of a user."""
        line = self._lines.get(uid)
        if line is None:
            if len(self._lines) > LINES:
                self._lines = {u: known for u, known in self._lines.items() if known.waiting}
            line = self._lines[uid] = _Line(Bucket(TURN_S, time.perf_counter()))
        return line

    def others(self, line: _Line, now: float) -> bool:
        """Somebody else has something to say."""
        return any(other is not line and now - other.heard < LATELY_S for other in self._lines.values())

    def contended(self, uid: int) -> bool:
        """Somebody else than this user has something to say."""
        return self.others(self.of(uid), time.perf_counter())

    async def earned(self, line: _Line) -> None:
        """Wait until there is something to spend, or nobody else is there."""
        line.earn()
        while line.credit.left <= 0 and self.others(line, line.credit.at):
            await asyncio.sleep(min(-line.credit.left * (1 + REST), SETTLE_S))
            line.earn()


class _Place:
    """A batch in its user's line. One for each message, so no generator of contextlib's, which costs twice as much."""

    __slots__ = ("_held", "_line", "_lines", "_turn")

    def __init__(self, lines: Lines, line: _Line) -> None:
        self._lines, self._line, self._held = lines, line, False

    async def __aenter__(self) -> Turn:
        line, now = self._line, time.perf_counter()
        line.heard = now
        line.waiting += 1
        if self._lines.others(line, now):
            try:
                await line.lock.acquire()
                self._held = True
                await self._lines.earned(line)
            except BaseException:
                self._leave()
                raise
        self._turn = Turn()
        return self._turn

    async def __aexit__(self, *exc: object) -> None:
        self._line.earn()
        self._line.credit.left -= self._turn.took + (CALL_S if self._line.waiting > 1 else 0.0)
        self._leave()

    def _leave(self) -> None:
        if self._held:
            self._line.lock.release()
        self._line.waiting -= 1
