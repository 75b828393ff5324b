# SPDX-License-Identifier: Apache-2.0
"""Requests of which nobody has said when they are due: they meet nothing, miss nothing, and stand in nobody's way."""

from __future__ import annotations

import math

import pytest
from support.harness import MSS, Host

from mfsd.ground.model import RequestHint, What

MB = 1_000_000


def undated(h: Host, ttl: float = 30.0) -> None:
    h.engine.apply(h.session, RequestHint("q", math.inf, ttl=ttl), h.now)


def deadline(h: Host, name: str) -> float:
    return float(h.engine.books.transfers.get(h.session.transfers[name], "deadline"))


@pytest.mark.parametrize("end", ["arrives", "without bytes", "reset", "expires", "its session ends"])
def test_neither_met_nor_missed(end: str) -> None:
    h = Host("demand-bound")
    s = h.socket(1)
    undated(h)
    if end != "without bytes":
        h.transfer("t", s, 10 * MSS, request="q")
        h.tick()
    if end == "arrives":
        h.send(s, 10 * MSS)
        h.tick(0.01)
    if end == "reset":
        h.kernel.close(s, clean=False)
        h.tick(0.01)
    if end == "expires":
        for _ in range(70):
            h.tick(0.5)
    elif end == "its session ends":
        h.engine.end_session(h.session, h.now)
        h.kernel.close(s, clean=False)
        h.tick(1.0)
    else:
        h.done("q", What.REQUEST)
        h.tick(0.01)
    counters = h.engine.books.counters
    assert h.counted[1:] == (0, 0)
    assert counters.ended_no_deadline == 1
    assert h.engine.books.requests.n == h.engine.books.transfers.n == 0
    assert not h.engine.books.tally.users
    assert h.engine.books.tally.histograms()["request_slack"][""].counts == [0] * 18


def test_who_is_cancelled_is_not_counted() -> None:
    h = Host()
    undated(h)
    h.done("q", What.REQUEST, cancelled=True)
    assert h.engine.books.counters.ended_no_deadline == 0
    assert not h.session.requests


@pytest.mark.parametrize("ttl", [30.0, 5.0])
def test_it_is_forgotten_its_time_to_live_after_it_was_announced(ttl: float) -> None:
    h = Host()
    undated(h, ttl=ttl)
    h.tick(ttl - 0.2)
    assert list(h.session.requests) == ["q"]
    undated(h, ttl=ttl)  # renewed
    h.tick(ttl - 0.2)
    assert list(h.session.requests) == ["q"]
    h.tick(0.5)
    assert not h.session.requests


def test_a_deadline_may_become_known_and_be_taken_back() -> None:
    h = Host("demand-bound")
    s = h.socket(1)
    undated(h)
    h.transfer("t", s, MB, request="q")
    h.transfer("own", s, MB, request="q", deadline=h.now + 9.0)
    h.tick()
    assert (deadline(h, "t"), deadline(h, "own")) == (math.inf, h.now + 9.0)
    h.request("q", 2.0)
    assert (deadline(h, "t"), deadline(h, "own")) == (h.now + 2.0, h.now + 2.0)
    undated(h)
    assert (deadline(h, "t"), deadline(h, "own")) == (math.inf, h.now + 9.0)
    assert h.engine.books.without_deadline == 1
    h.request("q", 2.0)
    h.tick(0.01)
    h.send(s, 2 * MB)
    h.done("q", What.REQUEST)
    h.tick(0.01)
    assert (h.counted, h.engine.books.counters.ended_no_deadline) == ((2, 1, 0), 0)


def test_it_is_lifted_above_nobody_who_is_due_and_deferred_below_nobody() -> None:
    """At 125 MB/s; what is due needs half of the link from the beginning."""
    h = Host("demand-bound", floors=(0.01,) * 5)
    due, later, never = h.socket(1), h.socket(2), h.socket(3)
    h.request("r", 1.0)
    h.request("later", 500.0)
    undated(h)
    h.transfer("due", due, 80 * MB)
    h.transfer("later", later, 80 * MB, request="later")
    h.transfer("never", never, 10_000 * MB, request="q")
    for _ in range(20):
        h.tick(0.01)
        assert (h.band(due), h.band(later), h.band(never)) == ("level 2", "level 4", "level 3")
    assert not h.session.events  # nor can it be too late
    h.done("due", cancelled=True)
    for _ in range(60):
        h.tick(0.4)
        h.send(never, MB)
    assert h.band(never) == "level 3"
    assert not h.session.events
