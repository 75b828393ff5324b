# SPDX-License-Identifier: Apache-2.0
"""Whose batches are applied when several users have some."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from typing import TYPE_CHECKING

import pytest

from mfsd.api.turns import LINES, REST, TURN_S, Lines
from mfsd.daemon import turns

if TYPE_CHECKING:
    from collections.abc import Coroutine

HOSTILE, HONEST = 1, 2
MANY = 50


def work(seconds: float) -> None:
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass


async def batches(lines: Lines, uid: int, count: int, seconds: float, done: list[int]) -> None:
    for _ in range(count):
        async with lines.turn(uid):
            work(seconds)
            done.append(uid)
        await asyncio.sleep(0)


async def together(*parts: Coroutine[None, None, None]) -> None:
    await asyncio.gather(*parts)


def test_many_streams_of_a_user_have_one_turn_between_two_of_anothers() -> None:
    lines, done = Lines(), list[int]()
    hostile = [batches(lines, HOSTILE, 20, TURN_S, done) for _ in range(MANY)]
    honest = batches(lines, HONEST, 10, TURN_S / 10, done)
    asyncio.run(asyncio.wait_for(together(honest, *hostile), 60))
    mine = [i for i, uid in enumerate(done) if uid == HONEST]
    assert len(done) == 20 * MANY + 10
    assert mine[-1] < MANY + 30  # the first turns of the streams may come before anybody knows of others


def test_who_is_alone_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    waits, sleep = list[float](), asyncio.sleep

    async def noted(seconds: float) -> None:
        waits.append(seconds)
        await sleep(seconds)

    monkeypatch.setattr(asyncio, "sleep", noted)
    lines, done = Lines(), list[int]()
    asyncio.run(together(*(batches(lines, HOSTILE, 2, TURN_S, done) for _ in range(MANY))))
    assert not any(waits)
    both = [(uid, MANY) for uid in (HOSTILE, HONEST)]
    asyncio.run(together(*(batches(lines, uid, count, TURN_S, done) for uid, count in both)))
    assert any(waits)


def test_a_failure_and_a_caller_that_goes_give_the_turn_back() -> None:
    lines, done = Lines(), list[int]()

    async def fail() -> None:
        async with lines.turn(HOSTILE):
            raise ValueError

    async def stay() -> None:
        async with lines.turn(HOSTILE):
            await asyncio.sleep(60)

    async def body() -> None:
        await batches(lines, HONEST, 1, 0.0, done)
        await asyncio.gather(fail(), return_exceptions=True)
        gone = asyncio.create_task(stay())
        waits = asyncio.create_task(stay())
        await asyncio.sleep(0)
        waits.cancel()
        gone.cancel()
        await asyncio.gather(gone, waits, return_exceptions=True)
        await batches(lines, HONEST, 1, 0.0, done)
        await batches(lines, HOSTILE, 3, TURN_S, done)

    asyncio.run(asyncio.wait_for(body(), 60))
    assert done.count(HOSTILE) == 3
    assert not any(line.waiting or line.lock.locked() for line in lines._lines.values())


def test_users_that_say_nothing_more_are_forgotten() -> None:
    lines, done = Lines(), list[int]()
    for uid in range(3 * LINES):
        asyncio.run(batches(lines, uid, 1, 0.0, done))
    assert len(lines._lines) <= LINES + 1
    assert REST > 1  # others have more of the loop than whoever says most


class Knot:
    """Garbage that only a collection finds."""

    def __init__(self) -> None:
        self.me = self


@pytest.mark.parametrize(("idle", "most"), [(True, turns.QUIET), (False, turns.BUSY)])
def test_old_garbage_is_collected_sooner_while_nobody_waits(
    monkeypatch: pytest.MonkeyPatch, *, idle: bool, most: int
) -> None:
    monkeypatch.setattr(turns, "LOOK_S", 0.0)
    before = gc.get_threshold()

    async def left(collections: int) -> bool:
        gc.collect()
        knot: Knot | None = Knot()
        seen = weakref.ref(knot)
        for _ in range(2):
            gc.collect(1)  # it is old now
        knot = None
        for _ in range(collections - 2):
            gc.collect(1)
        task = asyncio.create_task(turns.collect(lambda: idle))
        for _ in range(5):
            await asyncio.sleep(0)
        task.cancel()
        return seen() is not None

    try:
        gc.set_threshold(0)
        assert asyncio.run(left(most))
        assert not asyncio.run(left(most + 1))
    finally:
        gc.set_threshold(*before)


def test_who_has_several_calls_at_a_time_is_charged_for_more_than_what_is_applied() -> None:
    """What gRPC and the loop do for a call is most of what it costs; whoever has one after the other waits for that."""
    lines = Lines()

    async def two() -> None:
        async with lines.turn(HOSTILE):
            await together(batches(lines, HOSTILE, 1, 0.0, []))

    asyncio.run(two())
    assert lines.of(HOSTILE).credit.left <= 0
