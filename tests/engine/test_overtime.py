# SPDX-License-Identifier: Apache-2.0
"""Transfers that take longer than their time to live: as long as they move, they live."""

from __future__ import annotations

from itertools import pairwise

import pytest
from support.harness import MSS, FakeSocket, Host, peer

from mfsd.engine.overtime import AGAIN_S, TELL_MAX
from mfsd.engine.records import EVENTS_KEPT
from mfsd.ground.model import INF, Event, EventKind, Stage, What
from mfsd.ground.wire import OVERTIME_S

MB = 1_000_000
TTL_S = 30.0


@pytest.mark.parametrize("by", ["socket", "addresses"])
def test_weights_that_take_minutes(by: str) -> None:
    h = Host()
    s = h.socket(1)
    for name in ("weights", "more"):
        h.transfer(name, s if by == "socket" else peer(s), 100 * MB, Stage.BACKGROUND, request="")
    h.tick(0.01)
    for i in range(200):
        h.send(s, MB)
        h.tick(0.5)
        if i < 199:
            assert list(h.session.transfers) == ["weights", "more"][i >= 99 :]
            assert h.band(s) == "background"
    h.tick(0.01)
    assert h.counted[0] == 2
    assert {e.kind for e in h.session.events} == {EventKind.OVERTIME}


def told(h: Host) -> list[str]:
    """Of which transfers their worker has been told, since the last time, that they outlive their time to live."""
    out = [e.transfer_id for e in h.session.events if e.kind is EventKind.OVERTIME]
    h.session.events.clear()
    return out


@pytest.mark.parametrize("by", ["socket", "addresses", "turns"])
def test_workers_are_told_before_it_is_over_and_for_as_long_as_it_lasts(by: str) -> None:
    """So that they need not guess what another daemon must hear of."""
    h = Host()
    s = h.socket(1)
    h.request("q", 1.0)
    h.transfer("kv", peer(s) if by == "addresses" else s, 1000 * MB, request="q", ordered=by != "turns")
    h.tick(0.01)
    began, when = h.now, list[float]()
    while h.now < began + 90.0:
        h.send(s, MB // 10)
        h.tick(0.1)
        mine = [e for e in h.session.events if e.kind is EventKind.OVERTIME]
        assert all((e.request_id, e.transfer_id) == ("q", "kv") for e in mine)
        when += [h.now - began] * len(mine)
        h.session.events.clear()
    assert TTL_S <= when[0] <= TTL_S + 0.5  # its deadline is a second off
    assert max(b - a for a, b in pairwise(when)) < OVERTIME_S / 3
    assert len(when) <= 60 / AGAIN_S + 1
    for _ in range(20):  # and no longer
        h.tick(0.5)
    assert EventKind.EXPIRED in {e.kind for e in h.session.events}
    assert not told(h)


def test_nobody_is_told_of_what_ends_in_time() -> None:
    h = Host()
    s = h.socket(1)
    for i in range(50):
        h.transfer(f"w{i}", s, MB, Stage.BACKGROUND, request="")
        h.send(s, MB)
        h.tick(1.0)
    assert not told(h)


def test_what_is_told_takes_no_other_events_place_though_nobody_reads() -> None:
    h = Host()
    s = h.socket(1)
    names = [f"w{i}" for i in range(3 * TELL_MAX)]
    for name in names:
        h.transfer(name, s, MB, Stage.BACKGROUND, request="")
    h.session.tell(Event(EventKind.DEMOTED, "", "", "first"))
    for _ in range(500):
        h.send(s, MB // 10)
        h.tick(0.1)
    assert h.session.events[0].reason == "first"
    assert len(h.session.events) == EVENTS_KEPT // 2
    h.session.events.clear()
    seen = set[str]()
    for _ in range(100):  # who reads again hears of all that are left
        h.send(s, MB // 10)
        h.tick(0.1)
        seen |= set(told(h))
    assert seen >= set(h.session.transfers)


def several_in_turns(h: Host, s: FakeSocket, count: int) -> None:
    for i in range(count):
        h.transfer(f"w{i}", s, 100 * MB, Stage.BACKGROUND, request="", ordered=False)
    h.tick(0.01)


def test_weights_that_are_written_in_turns() -> None:
    """None of them is through before the last bytes of all are written."""
    h = Host()
    s = h.socket(1)
    several_in_turns(h, s, 3)
    for _ in range(299):
        h.send(s, MB)
        h.tick(0.5)
        assert len(h.session.transfers) == 3
    h.send(s, MB)
    for i in range(3):
        h.done(f"w{i}")
    h.tick(0.1)
    assert h.counted[0] == 3
    assert {e.kind for e in h.session.events} == {EventKind.OVERTIME}


def test_what_nobody_ends_does_not_live_by_others_that_are_written_in_its_turns() -> None:
    h = Host()
    s = h.socket(1)
    h.transfer("forgotten", s, 10 * MB, Stage.BACKGROUND, request="", ordered=False)
    for i in range(100):
        h.transfer(f"w{i}", s, 10 * MB, Stage.BACKGROUND, request="", ordered=False)
        for _ in range(10):
            h.send(s, MB)
            h.tick(0.1)
        h.done(f"w{i}")
    h.tick(1.0)
    assert not h.session.transfers


@pytest.mark.parametrize(("left", "counted", "none"), [(1.0, (1, 0, 1), 0), (INF, (1, 0, 0), 1)])
def test_a_request_that_is_late_or_never_due_lives_with_its_bytes(
    left: float, counted: tuple[int, int, int], none: int
) -> None:
    h = Host()
    s = h.socket(1)
    h.request("q", left)
    h.transfer("t", s, 100 * MB, request="q")
    for _ in range(100):
        h.send(s, MB)
        h.tick(0.5)
    h.done("q", What.REQUEST)
    h.tick(0.1)
    assert (h.counted, h.engine.books.counters.ended_no_deadline) == (counted, none)
    assert EventKind.EXPIRED not in {e.kind for e in h.session.events}


@pytest.mark.parametrize("words", [0, 100], ids=["nothing", "a word now and then"])
def test_what_does_not_move_is_forgotten(words: int) -> None:
    h = Host()
    s = h.socket(1)
    h.request("q", 1.0)
    h.transfer("t", s, 100 * MB, request="q")
    for _ in range(10):
        h.send(s, MB)
        h.tick(0.1)
    for _ in range(70):
        if words:
            h.send(s, words)
        h.tick(0.5)
    assert [(e.kind, e.transfer_id) for e in h.session.events if e.kind is EventKind.EXPIRED] == [
        (EventKind.EXPIRED, "t")
    ]
    assert h.counted == (0, 0, 1)


def test_nor_does_one_live_by_the_bytes_of_others() -> None:
    """On another connection."""
    h = Host()
    s, other = h.socket(1), h.socket(2)
    h.send(s, MSS)
    h.transfer("t", s, MB, Stage.BACKGROUND, request="")
    h.transfer("u", other, 1000 * MB, Stage.BACKGROUND, request="")
    for _ in range(70):
        h.send(other, MB)
        h.tick(0.5)
    assert list(h.session.transfers) == ["u"]


def test_the_kernel_obeys_all_the_while() -> None:
    """Who looks comes every 0.1 s only, and past its slot's expiry a connection would be unhinted until then."""
    h = Host()
    s = h.socket(1)
    h.transfer("weights", s, 100 * MB, Stage.BACKGROUND, request="")
    h.tick(0.01)
    for _ in range(500):
        h.send(s, MB // 10)
        h.tick(0.1)
        assert h.table.expires_ns[h.keys.cookies[1]] > (h.now + 0.1) * 1e9
