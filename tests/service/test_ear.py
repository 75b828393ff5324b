# SPDX-License-Identifier: Apache-2.0
"""Hearing the kernel on the event loop."""

from __future__ import annotations

import asyncio
import os
from types import SimpleNamespace
from typing import Any

import pytest
from support.harness import Host

from mfsd.daemon.config import Config
from mfsd.daemon.ear import Ear
from mfsd.daemon.ticker import Periods, Ticker

MANY = 400


@pytest.mark.parametrize("with_fd", [True, False], ids=["ring", "searches"])
def test_of_very_much_it_hears_some_and_others_have_their_turns(*, with_fd: bool) -> None:
    h = Host(slots=2 * MANY)
    h.request("r", 60.0)
    for i in range(MANY):
        h.transfer(f"t{i}", h.socket(i + 1), 1000)
    h.tick(0.01)
    for sock in list(h.kernel.sockets):
        h.kernel.close(sock)
    told, tell = os.pipe()
    os.write(tell, b"x")  # readable from now on, as a ring is that is never empty

    async def body() -> None:
        rounds = hears = 0
        loop = asyncio.get_running_loop()
        hear = h.engine.hear

        def counted(now: float) -> None:
            nonlocal hears
            hears += 1
            hear(now)

        def turn() -> None:
            nonlocal rounds
            rounds += 1
            loop.call_soon(turn)

        h.engine.hear = counted  # type: ignore[method-assign]
        teller: Any = SimpleNamespace(fd=told) if with_fd else None
        ticker = Ticker(h.engine, Periods.of(Config().daemon), lambda _: None, clock=lambda: h.now)
        ear = Ear(h.engine, ticker, teller, lambda: h.now)
        ear.hear()
        assert not hears, "it has not been started"
        ear.start()
        ear.hear()
        loop.call_soon(turn)
        async with asyncio.timeout(20):
            while h.connections.by_slot:  # noqa: ASYNC110 - a counter has no event
                await asyncio.sleep(0)
        assert hears > MANY // 64
        assert rounds > 5 * hears
        ear.stop()
        ear.stop()
        before = hears
        ear.hear()
        for _ in range(100):
            await asyncio.sleep(0)
        assert hears == before

    try:
        asyncio.run(body())
    finally:
        os.close(told)
        os.close(tell)
