# SPDX-License-Identifier: Apache-2.0
"""When the engine ticks."""

from __future__ import annotations

import asyncio
import selectors
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from mfsd.daemon.config import Config
from mfsd.daemon.ticker import BURST_S, CALM_S, KNOWN, QUIET_S, QUIET_SHARE, SHARE, WAIT_S, Periods, Ticker

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass
class Engine:
    """Counts ticks and says what the ticker wants to know."""

    idle: bool = True
    busy_s: float = 0.0
    ticks: int = 0
    rescue_due: bool = False
    calm_until: float = 0.0
    fail: bool = False
    loop: Still | None = None
    """Whose time ticks take; None: real time."""

    def tick(self, _now: float) -> None:
        self.ticks += 1
        if self.loop is not None:
            self.loop.work(self.busy_s)
        else:
            end = time.thread_time() + self.busy_s
            while time.thread_time() < end:
                pass
        if self.fail:
            raise ZeroDivisionError


NEVER = Periods(busy=3600.0, idle=3600.0, heartbeat=3600.0)


class Still(asyncio.SelectorEventLoop):
    """Its time passes while it waits, and as a test says: on a busy machine any hint may seem to be the last one."""

    def __init__(self) -> None:
        self.now = self.worked = 0.0
        """Seconds since it was made, and those of them for which its thread had the processor."""
        super().__init__(Passing(self))

    def time(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        self.now += seconds
        self.worked += seconds


class Passing(selectors.SelectSelector):
    """Waits for nothing but the time of a loop."""

    def __init__(self, loop: Still) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        self._loop.now += timeout or 0.0
        return super().select(0)


def run(engine: Engine, periods: Periods, body: Callable[[Ticker, list[float]], Any]) -> None:
    loop = engine.loop

    async def main() -> None:
        beats: list[float] = []
        clocks: dict[str, Any] = {} if loop is None else {"clock": loop.time, "worked": lambda: loop.worked}
        ticker = Ticker(cast("Any", engine), periods, beats.append, **clocks)
        ticker.start()
        try:
            await asyncio.wait_for(body(ticker, beats), 20)
        finally:
            ticker.stop()

    with asyncio.Runner(loop_factory=None if loop is None else lambda: loop) as runner:
        runner.run(main())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - the conditions are about counters, which have no events
        await asyncio.sleep(0.001)


def test_hints_bring_a_tick_that_nothing_else_would() -> None:
    engine = Engine()

    async def body(ticker: Ticker, beats: list[float]) -> None:
        await until(lambda: engine.ticks == 1)
        for n in range(2, 5):
            ticker.poke()
            ticker.poke()
            await until(lambda n=n: engine.ticks == n)  # type: ignore[misc]
        assert len(beats) == 4
        assert ticker.durations()[1] >= ticker.durations()[0] > 0

    run(engine, NEVER, body)


def test_hints_never_buy_more_than_their_share() -> None:
    loop = Still()
    engine = Engine(busy_s=0.002, loop=loop)

    async def body(ticker: Ticker, _beats: list[float]) -> None:
        while engine.ticks < 50:
            ticker.poke()
            loop.now += QUIET_S / 4
            await asyncio.sleep(0)
        took = loop.time()
        assert engine.ticks * engine.busy_s <= took * SHARE + BURST_S + 2 * engine.busy_s

    run(engine, NEVER, body)


def test_who_waits_gets_a_larger_share() -> None:
    engine = Engine(busy_s=0.002)

    async def body(ticker: Ticker, _beats: list[float]) -> None:
        start = time.monotonic()
        while engine.ticks < 100:
            before = engine.ticks
            ticker.poke(waiting=True)
            await until(lambda before=before: engine.ticks > before)  # type: ignore[misc]
        took = time.monotonic() - start
        worked = engine.ticks * engine.busy_s
        assert worked <= took * QUIET_SHARE + BURST_S + 2 * engine.busy_s

    run(engine, NEVER, body)


def test_users_pay_for_their_own_ticks() -> None:
    """Who asks and asks has nobody else wait."""
    engine = Engine(busy_s=0.004)

    async def body(ticker: Ticker, _beats: list[float]) -> None:
        await until(lambda: engine.ticks == 1)
        ticker._budget.left = -1000.0
        ticker.poke(waiting=True, who=1)
        await until(lambda: engine.ticks == 2)
        ticker._budget.left = ticker._spares[1].left = -1000.0
        ticker.poke(waiting=True, who=1)
        far = ticker._due
        ticker.poke(waiting=True, who=2)
        # At once, but that half of the time is others'.
        assert ticker._due == max(ticker._again, ticker._poked) < far - 100
        await until(lambda: engine.ticks == 3)

    run(engine, NEVER, body)


def test_those_who_ask_for_a_tick_share_what_it_costs() -> None:
    engine = Engine(busy_s=0.004)

    async def body(ticker: Ticker, _beats: list[float]) -> None:
        await until(lambda: engine.ticks == 1)
        for who in (1, 2):
            ticker.poke(waiting=True, who=who)
        await until(lambda: engine.ticks == 2)
        for who in (1, 2):
            assert BURST_S - engine.busy_s < ticker._spares[who].left <= BURST_S - engine.busy_s / 2

    run(engine, NEVER, body)


def test_nobody_keeps_another_one_gathering() -> None:
    """One who sends and sends has not stopped; the tick of another one, who has, does not wait for that."""
    engine = Engine()

    async def body(ticker: Ticker, _beats: list[float]) -> None:
        await until(lambda: engine.ticks == 1)
        ticker._budget.left = -1000.0
        ticker.poke(who=2)
        while engine.ticks == 1:
            ticker.poke(who=1)
            await asyncio.sleep(0)

    run(engine, NEVER, body)


def test_very_many_users_are_not_all_remembered() -> None:
    engine = Engine()

    async def body(ticker: Ticker, _beats: list[float]) -> None:
        for who in range(4 * KNOWN):
            ticker.poke(who=who)
        assert len(ticker._spares) <= KNOWN

    run(engine, NEVER, body)


def test_once_hints_have_stopped_coming_they_get_their_tick() -> None:
    """Long before the small budget would allow it."""
    loop = Still()
    engine = Engine(busy_s=0.02, loop=loop)

    async def body(ticker: Ticker, _beats: list[float]) -> None:
        ticker.poke()
        await until(lambda: engine.ticks == 1)
        engine.busy_s = 0.0
        await asyncio.sleep(0.05)  # the budget is at -15 ms, and needs 150 ms; the other one is above zero
        ticker.poke()
        for _ in range(20):  # more and more of them
            loop.now += QUIET_S / 2
            await asyncio.sleep(0)
            ticker.poke()
        assert engine.ticks == 1
        assert ticker._due <= ticker._poked + QUIET_S
        await until(lambda: engine.ticks == 2)

    run(engine, NEVER, body)


def test_hints_do_not_pay_for_ticks_that_nobody_asked_for() -> None:
    """Such as those of a rescue that may be due, which come every millisecond."""
    engine = Engine(busy_s=0.005, rescue_due=True)

    async def body(ticker: Ticker, _beats: list[float]) -> None:
        await until(lambda: engine.ticks == 10)
        engine.rescue_due = False
        await until(lambda: engine.ticks == 11)
        ticker.poke()
        assert ticker._latest <= ticker._poked
        await until(lambda: engine.ticks == 12)

    run(engine, NEVER, body)


def test_nobody_owes_more_than_one_tick() -> None:
    """Ticks come while there is something to schedule, whoever asks: seconds of debt took a minute to earn."""
    engine = Engine(idle=False, busy_s=0.004)

    async def body(ticker: Ticker, _beats: list[float]) -> None:
        while engine.ticks < 50:
            ticker.poke(who=1)
            await asyncio.sleep(0)
        assert ticker._budget.left >= -2 * engine.busy_s
        assert ticker._spares[1].left >= -2 * engine.busy_s

    run(engine, Periods(busy=0.005, idle=0.005, heartbeat=1.0), body)


def test_whoever_waits_for_a_tick_waits_for_the_next_one_and_not_for_long() -> None:
    engine = Engine()

    async def body(ticker: Ticker, _beats: list[float]) -> None:
        await until(lambda: engine.ticks == 1)
        waiters = [asyncio.create_task(ticker.ticked()) for _ in range(3)]
        await asyncio.sleep(0)
        ticker.poke()
        await asyncio.gather(*waiters)
        assert (engine.ticks, ticker.count) == (2, 2)
        start = time.monotonic()
        await asyncio.gather(ticker.ticked(), ticker.ticked())  # nothing asks for a tick
        assert time.monotonic() - start >= WAIT_S
        assert ticker.count == 2
        engine.fail = True
        waiter = asyncio.create_task(ticker.ticked())
        await asyncio.sleep(0)
        ticker.poke()
        await waiter
        assert ticker.count == 2  # one that has failed is none

    run(engine, NEVER, body)


def test_periods_follow_the_engine() -> None:
    engine = Engine()
    periods = Periods.of(Config().daemon)

    async def body(ticker: Ticker, _beats: list[float]) -> None:
        assert ticker._period() == periods.idle
        engine.idle = False
        assert ticker._period() == periods.busy
        engine.calm_until = time.monotonic() + 100.0
        assert ticker._period() == max(CALM_S, periods.busy)
        engine.calm_until = time.monotonic()
        assert ticker._period() == periods.busy
        ticker.periods = Periods(busy=1.0, idle=1.0, heartbeat=0.5)
        assert ticker._period() == 0.5
        engine.rescue_due = True
        assert ticker._period() < 0.01

    run(engine, periods, body)


def test_a_failing_tick_gives_no_sign_of_life_and_is_tried_again() -> None:
    engine = Engine(fail=True)

    async def body(ticker: Ticker, beats: list[float]) -> None:
        await until(lambda: engine.ticks >= 3)
        assert (beats, ticker.failure) == ([], "ZeroDivisionError: ")
        engine.fail = False
        await until(lambda: len(beats) > 0)
        assert ticker.failure == ""

    run(engine, Periods(busy=0.002, idle=0.002, heartbeat=1.0), body)


def test_a_stopped_ticker_stays_stopped() -> None:
    engine = Engine()

    async def body(ticker: Ticker, _beats: list[float]) -> None:
        await until(lambda: engine.ticks == 1)
        ticker.stop()
        ticker.poke()
        await asyncio.sleep(0.02)
        assert engine.ticks == 1

    run(engine, NEVER, body)
