# SPDX-License-Identifier: Apache-2.0
"""A deadline is met if the last byte was acknowledged by then, whenever somebody looked, and whose turn it was."""

from __future__ import annotations

import pytest
from support.harness import MSS, FakeSocket, Host

from mfsd.ground.model import What

N = 200
"""More connections than are asked in one tick."""


def announced(n: int, due_in: float = 0.1) -> tuple[Host, list[FakeSocket]]:
    """A request with a transfer on each of so many connections, which has left and is on its way."""
    h = Host(slots=2 * N)
    socks = [h.socket(i + 1) for i in range(n)]
    for i, s in enumerate(socks):
        h.request(f"q{i}", due_in)
        h.transfer(f"t{i}", s, 10 * MSS, request=f"q{i}", position=s.bytes_acked)
    h.tick()
    for s in socks:
        h.send(s, 10 * MSS, acked=False)
    return h, socks


def acknowledge(h: Host, socks: list[FakeSocket]) -> None:
    for s in socks:
        h.ack(s, s.unsent_plus_unacked)
        h.kernel.acked_at[s.cookie] = h.now


@pytest.mark.parametrize("met", [True, False])
def test_a_crowd_that_is_asked_in_turns(*, met: bool) -> None:
    h, socks = announced(N)
    h.tick(0.01)
    h.now += 0.08 if met else 0.1
    acknowledge(h, socks)
    h.now += 0.005
    for i in range(N):
        h.done(f"q{i}", What.REQUEST)
    for _ in range(20):
        h.tick(0.01)
    assert h.counted == (N, N * met, N * (not met))


@pytest.mark.parametrize("unknown", [0, 3])
@pytest.mark.parametrize("said", [0.05, 0.3])
def test_announced_a_little_too_large_and_said_to_be_done_late(said: float, unknown: int) -> None:
    """Its last byte was in time; who can't be asked for some ticks says so later."""
    h = Host()
    s = h.socket(1)
    h.request("q", 0.1)
    h.transfer("t", s, 11 * MSS, request="q", position=1)
    h.tick()
    h.send(s, 10 * MSS, acked=False)
    h.tick(0.02)
    acknowledge(h, [s])
    for _ in range(int(said / 0.01)):
        h.tick(0.01)
    h.done("q", What.REQUEST)
    ask = h.kernel.progress
    h.kernel.progress = lambda _: None  # type: ignore[method-assign, assignment, return-value]
    for _ in range(unknown):
        h.tick(0.01)
    h.kernel.progress = ask  # type: ignore[method-assign]
    for _ in range(5):
        h.tick(0.01)
    assert h.counted == (1, 1, 0)


def test_of_what_was_never_written_the_word_is_all_there_is() -> None:
    h = Host()
    s = h.socket(1)
    h.kernel.acked_at[1] = h.now
    for name, due in (("late", 0.1), ("met", 0.5)):
        h.request(name, due)
        h.transfer(name, s, MSS, request=name, position=1)
    for _ in range(20):
        h.tick(0.01)
    for name in ("late", "met"):
        h.done(name, What.REQUEST)
    h.tick(0.01)
    h.tick(0.01)
    assert h.counted == (2, 1, 1)


@pytest.mark.parametrize("met", [True, False])
def test_a_tick_that_is_late_by_less_than_is_held_up(*, met: bool) -> None:
    """A packet of the next one had told of the acknowledgement before the deadline, or behind it."""
    h = Host()
    s = h.socket(1)
    h.request("q", 0.1)
    h.request("next", 1.0)
    for name in ("q", "next"):
        h.transfer(name, s, 10 * MSS, request=name)
    h.tick()
    h.send(s, 10 * MSS, acked=False)
    h.done("q", What.REQUEST)
    h.tick(0.09)
    h.now += 0.005 if met else 0.012
    h.ack(s, 10 * MSS)
    h.send(s, MSS, acked=False)
    h.now += 0.012 if met else 0.005
    h.tick()
    assert h.counted == (1, met, not met)


@pytest.mark.parametrize("met", [True, False])
@pytest.mark.parametrize("told", [True, False])
def test_connections_that_end_by_hundreds_while_nobody_looks(*, told: bool, met: bool) -> None:
    """What TCP says of those in TIME_WAIT is known before all of what the kernel tells is heard, or instead."""
    h, socks = announced(N, due_in=1.0 if met else 0.3)
    for i in range(N):
        h.done(f"q{i}", What.REQUEST)
    h.now += 0.5
    for s in socks:
        h.kernel.close(s)
        h.kernel.time_wait.add(s.cookie)
    if not told:
        h.kernel.events()
    h.now += 1.0
    for _ in range(40):
        h.tick(0.01)
    assert h.counted == (N, N * met, N * (not met))
    assert not h.connections.by_slot
