# SPDX-License-Identifier: Apache-2.0
"""When the engine ticks: often while there is something to schedule, rarely when not, at once after hints.

A hint should be visible in the table within a millisecond or two, but a stream of 50,000 hints a second must not pay
for a tick each. So ticks after hints are paid from budgets. While the first lasts they come at once; beyond that hints
are gathered, so that those of a stream never buy more than ``SHARE`` of the processor. A second, larger one is for
callers who say nothing more until they have been answered, and for ticks once hints have stopped coming. Each user has
one of these of its own, and those who have asked for a tick share what it costs: who says very much has nobody else
wait. All of them together have half of the time.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import structlog

from mfsd.engine.steering import OBSERVE_S
from mfsd.ground.bucket import Bucket
from mfsd.ground.logs import Seldom

if TYPE_CHECKING:
    from collections.abc import Callable

    from mfsd.daemon.config import DaemonConfig
    from mfsd.engine.engine import Engine

SHARE: Final = 0.1
"""Of the processor, for ticks that hints ask for while more and more of them come."""
QUIET_SHARE: Final = 0.5
"""Of the processor, for ticks that somebody waits for, or when hints have stopped coming."""
QUIET_S: Final = 0.001
"""Hints have stopped coming when there have been none for so long; epoll waits in whole milliseconds."""
BURST_S: Final = 0.005
"""Budget that an idle daemon has saved up."""
WAIT_S: Final = 0.02
"""How long replies wait for a tick at most; a little more than the budget ever makes hints wait."""
SOON_S: Final = 0.001
"""Period while a rescue may be due."""
CALM_S: Final = OBSERVE_S
"""Longest period while there are transfers and nothing is to be decided."""
NOBODY: Final = -2
"""Who asks for a tick where no user does: the kernel, or who is gone."""
LATELY_S: Final = 0.1
"""Several users ask if one has done so within that time beside another."""
KNOWN: Final = 64
"""Users whose budgets are remembered, besides those who owe something."""
KEPT_S: Final = 60.0
"""Durations are reported over the last minute."""
KEPT_MAX: Final = 16_384

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Periods:
    """Seconds; see config [daemon]."""

    busy: float
    idle: float
    heartbeat: float

    @classmethod
    def of(cls, config: DaemonConfig) -> Periods:
        """As configured."""
        return cls(config.tick_ms / 1000, config.idle_tick_ms / 1000, config.heartbeat_ms / 1000)


class Ticker:
    """Drives ``engine.tick`` on the running event loop.

    ``beat(now)`` is called after each tick that succeeded. A tick that fails is logged and tried again at the next
    time; the classifier lets everything through if that goes on for longer than its heartbeat timeout.
    """

    def __init__(
        self,
        engine: Engine,
        periods: Periods,
        beat: Callable[[float], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        worked: Callable[[], float] = time.thread_time,
    ) -> None:
        """``worked``: seconds for which this thread has had the processor."""
        self.periods = periods
        self.failure = ""
        """Why the last tick failed; empty when it did not."""
        self._engine = engine
        self._beat = beat
        self._clock = clock
        self._worked = worked
        self._loop = asyncio.get_running_loop()
        self._handle: asyncio.TimerHandle | None = None
        self._due = self._latest = 0.0
        """When the next tick comes if hints stop coming, and if they don't; on the loop's clock."""
        self._poked = 0.0
        """When there were hints last, on the loop's clock."""
        self._gathering = False
        """The next tick waits for hints to stop coming."""
        self._asked: dict[int, float] = {}
        """Users who have said something since the last tick, and when last: they pay for the next one."""
        self._budget = Bucket(BURST_S, clock())
        """Seconds of processor for ticks, at SHARE."""
        self._spares: dict[int, Bucket] = {}
        """The same by user, at QUIET_SHARE."""
        self._again = 0.0
        """When the next tick may be, on the loop's clock, while several users ask: half of the time is for others."""
        self.count = 0
        """Ticks that succeeded."""
        self.busy_s = 0.0
        """Seconds that all ticks took."""
        self._ticked: asyncio.Event | None = None
        """The next one has ended, or has been waited for long enough; None: nobody waits."""
        self._took: deque[tuple[float, float]] = deque(maxlen=KEPT_MAX)
        self._seldom = Seldom()
        self._stopped = True

    def start(self) -> None:
        """Tick now and from now on."""
        self._stopped = False
        self._schedule(0.0)

    def stop(self) -> None:
        """No more ticks."""
        self._stopped = True
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def poke(self, *, waiting: bool = False, who: int = NOBODY) -> None:
        """Hints have come: tick as soon as the budgets allow.

        ``waiting``: nothing more comes from there before. ``who``: the user who has sent them.
        """
        if self._stopped:
            return
        clock = self._clock()
        self._budget.fill(clock, SHARE, BURST_S)
        spare = self._spare(who, clock)
        now = self._poked = self._asked[who] = self._loop.time()
        self._latest = min(self._latest, now if self._budget.left > 0 else now - self._budget.left / SHARE)
        due = self._latest
        if waiting:
            due = min(due, now - min(spare.left, 0.0) / QUIET_SHARE)
        elif spare.left > 0:
            due = min(due, now + QUIET_S)
        if any(other is not spare and clock - other.at < LATELY_S for other in self._spares.values()):
            due = max(due, self._again)
        if self._handle is None or due < self._due:
            self._gathering = not waiting and due > now
            self._schedule_at(due)

    def _spare(self, who: int, now: float) -> Bucket:
        """The budget of a user, up to date."""
        spare = self._spares.get(who)
        if spare is None:
            if len(self._spares) >= KNOWN:
                self._spares = {u: s for u, s in self._spares.items() if s.fill(now, QUIET_SHARE, BURST_S) < BURST_S}
            spare = self._spares[who] = Bucket(BURST_S, now)
        spare.fill(now, QUIET_SHARE, BURST_S)
        return spare

    async def ticked(self) -> None:
        """Return after the next tick; or after WAIT_S, counted from when somebody began to wait for that tick."""
        if self._ticked is None:
            self._ticked = asyncio.Event()
            self._loop.call_later(WAIT_S, self._ticked.set)
        event = self._ticked
        await event.wait()
        if self._ticked is event:
            self._ticked = None

    def _schedule(self, wait: float) -> None:
        self._gathering = False
        self._latest = self._loop.time() + wait
        self._schedule_at(self._latest)

    def _schedule_at(self, due: float) -> None:
        if self._handle is not None:
            self._handle.cancel()
        self._due = due
        self._handle = self._loop.call_at(due, self._tick)

    def _tick(self) -> None:
        self._handle = None
        if self._gathering:
            now, quiet = self._loop.time(), min(self._asked.values()) + QUIET_S  # of the first one who is
            if now < min(quiet, self._latest):
                self._schedule_at(min(quiet, self._latest))  # more hints have come
                return
        now, worked, asked = self._clock(), self._worked(), self._asked
        self._asked = {}
        try:
            self._engine.tick(now)
        except Exception as e:
            self.failure = f"{type(e).__name__}: {e}"
            if self._seldom("tick"):
                log.exception("tick failed")
        else:
            self.failure = ""
            self.count += 1
            if self._ticked is not None:
                self._ticked.set()
                self._ticked = None
            self._beat(self._clock())
        took = self._clock() - now
        self.busy_s += took
        self._again = self._loop.time() + took
        if asked:  # what comes anyway, every millisecond while a rescue may be due, is no hint's to pay for
            worked = self._worked() - worked  # nor are others that take the processor away
            self._budget.fill(now + took, SHARE, BURST_S)
            _pay(self._budget, worked)
            for who in asked:
                _pay(self._spare(who, now + took), worked / len(asked))
        self._took.append((now, took))
        if not self._stopped:
            # Never more than half of the time, however long one takes: others have their turn in between.
            self._schedule(max(self._period() - took, took))

    def _period(self) -> float:
        if self._engine.rescue_due:
            return min(SOON_S, self.periods.busy)
        period = self.periods.idle
        if not self._engine.idle:
            period = max(self.periods.busy, min(self._engine.calm_until - self._clock(), CALM_S))
        return min(period, self.periods.heartbeat)

    def durations(self) -> tuple[float, float]:
        """Median and 99th percentile of the last minute's ticks, seconds; 0 before the first."""
        since = self._clock() - KEPT_S
        while self._took and self._took[0][0] < since:
            self._took.popleft()
        if not self._took:
            return 0.0, 0.0
        p50, p99 = np.percentile([took for _, took in self._took], [50, 99])
        return float(p50), float(p99)


def _pay(budget: Bucket, worked: float) -> None:
    """For a tick. Who has nothing buys none, and owes no more than the last one of those that came anyway."""
    budget.left = max(budget.left, 0.0) - worked
