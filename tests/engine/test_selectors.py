# SPDX-License-Identifier: Apache-2.0
"""Which connections a selector means, and for how long."""

from __future__ import annotations

import pytest
from support.harness import MSS, FakeSocket, Host, peer

from mfsd.ground.model import (
    CookieSelector,
    MarkHint,
    PortRange,
    ProcessSelector,
    Stage,
    TupleSelector,
)


def test_one_selector_for_one_connection_after_another() -> None:
    h = Host()
    first = h.socket(1)
    h.kernel.close(first)
    rule = peer(first)
    h.request("r", 60.0)
    for i in range(50):
        s = FakeSocket(i + 2, first.endpoints)
        h.kernel.connect(s)
        h.transfer(f"t{i}", rule, 100 * MSS)
        h.tick(0.001)
        assert h.band(s).startswith("level")
        h.send(s, 100 * MSS)
        h.kernel.close(s)
        h.tick(0.001)
    assert h.counted[0] == 50
    assert not h.session.transfers


@pytest.mark.parametrize("shaped", [True, False])
def test_a_connection_that_is_quicker_than_its_hint_is_what_the_last_one_was(*, shaped: bool) -> None:
    h = Host()
    first = h.socket(1)
    h.kernel.close(first)
    h.kernel.lately.clear()
    rule = peer(first)
    h.request("r", 60.0)
    h.transfer("t0", rule, 100 * MSS)
    for i in range(2):
        s = FakeSocket(i + 2, first.endpoints)
        h.kernel.connect(s)
        h.tick(0.01)
        assert h.band(s).startswith("level"), i
        if shaped:
            h.send(s, 100 * MSS)
        else:
            s.bytes_acked += 100 * MSS  # to this host itself, say
        h.kernel.close(s)
        h.tick(0.01)
    assert h.counted[0] == 1
    h.transfer("t1", rule, 100 * MSS)  # the hint of the second one, behind its last byte
    h.tick(3.0)
    h.tick()
    assert h.counted[0] == 2


@pytest.mark.parametrize("others", [0, 15])
def test_connections_that_were_over_before_the_first_hint_by_addresses(others: int) -> None:
    """Nobody can say which transfers they were of; so their bytes are made good once no more come."""
    h = Host()
    first = h.socket(1, active=True)
    rule, stranger = peer(first), h.socket(99, dst="10.0.0.9")
    for s in (first, stranger):
        h.send(s, 100 * MSS)
        h.kernel.close(s)
    h.request("r", 60.0)
    h.transfer("t", rule, 100 * MSS)
    h.tick(0.01)
    for i in range(others):
        s = FakeSocket(i + 2, first.endpoints)
        h.transfer(f"t{i}", rule, 100 * MSS)
        h.kernel.connect(s)
        h.tick(0.01)
        h.send(s, 100 * MSS)
        h.kernel.close(s)
        h.tick(0.01)
    assert h.counted[0] == others
    for _ in range(30):
        h.tick(0.1)
    assert h.counted[0] == others + 1
    h.transfer("u", rule, 100 * MSS)
    for _ in range(30):
        h.tick(0.1)
    assert h.counted[0] == others + 1


def test_a_selector_of_two_sessions_ends_with_the_second() -> None:
    """And the kernel puts new connections where the more urgent one of the two wants them."""
    h = Host()
    first = h.socket(1)
    rule, other = peer(first), h.engine.session("another", h.now)
    h.engine.apply(h.session, MarkHint(rule, Stage.COLLECTIVE), h.now)
    h.engine.apply(other, MarkHint(rule, Stage.P2D), h.now)
    h.tick()

    def begins(cookie: int) -> str:
        s = FakeSocket(cookie, first.endpoints)
        h.kernel.connect(s)
        return h.band(s)

    assert begins(2) == "level 0"
    h.engine.end_session(h.session, h.now)
    assert begins(3) == h.bands.bands[h.engine.steering.band_of(Stage.P2D)].name
    h.tick()
    assert {h.band(s) for s in h.kernel.sockets} == {begins(4)}
    h.engine.end_session(other, h.now)
    assert not h.kernel.rules


def test_a_hint_that_is_heard_before_the_connection_that_it_names() -> None:
    """The kernel has put that by a rule; it stays where it is, and its slot is not lost."""
    h = Host()
    h.engine.apply(h.session, MarkHint(peer(h.socket(0)), Stage.KV_REUSE), h.now)
    h.tick()
    for i in range(200):
        s = h.socket(i + 1)
        slot = h.keys.cookies[s.cookie]
        h.transfer(f"t{i}", CookieSelector(s.cookie), 100 * MSS, stage=Stage.COLLECTIVE)
        assert h.band(s) == "level 1"
        h.tick(0.01)
        assert h.keys.cookies[s.cookie] == slot
        assert h.band(s) == "level 0"
        h.send(s, 100 * MSS)
        h.kernel.close(s)
        h.tick(0.01)
    assert h.counted[0] == 200
    assert h.table.taken == 1


def test_a_mark_follows_a_selector_over_reconnects() -> None:
    h = Host()
    first = h.socket(1)
    h.engine.apply(h.session, MarkHint(peer(first), Stage.COLLECTIVE), h.now)
    h.tick()
    assert h.band(first) == "level 0"
    h.kernel.close(first)
    h.tick(7.0)
    beside = [h.socket(i) for i in (2, 3)]
    assert [h.band(s) for s in beside] == ["level 0"] * 2
    h.tick(0.01)
    for _ in range(1000):
        h.tick(1.0)
    assert [h.band(s) for s in beside] == ["level 0"] * 2
    h.engine.end_session(h.session, h.now)
    h.tick(0.2)
    assert not h.kernel.rules
    assert h.table.taken == 0
    later = FakeSocket(4, first.endpoints)
    h.kernel.connect(later)
    assert 4 not in h.keys.cookies


def test_a_process_is_meant_by_its_number() -> None:
    h = Host()
    mine, other = h.socket(1, pid=42), h.socket(2, pid=43)
    h.engine.apply(h.session, MarkHint(ProcessSelector(42, None, PortRange()), Stage.COLLECTIVE), h.now)
    h.tick()
    late = h.socket(3, pid=42)
    assert (h.band(mine), h.band(late)) == ("level 0", "level 0")
    assert 2 not in h.keys.cookies
    assert other in h.kernel.sockets


def test_a_process_is_the_one_that_its_session_calls_so() -> None:
    """In its pid namespace 1 is another than here."""
    h = Host()
    h.kernel.calls[70, 1] = 70
    here, there = h.socket(1, pid=1), h.socket(2, pid=70)
    session = h.engine.session("container", h.now, pid=70)
    selector = ProcessSelector(1, None, PortRange())
    h.engine.apply(session, MarkHint(selector, Stage.COLLECTIVE), h.now)
    h.tick()
    assert here.cookie not in h.keys.cookies
    assert h.band(there) == "level 0"
    h.engine.apply(session, MarkHint(selector, Stage.NONE), h.now)
    assert not session.marks


def test_what_matches_nothing_is_named_and_costs_nothing() -> None:
    h = Host()
    s = h.socket(1)
    h.kernel.vanish(s)
    h.engine.apply(h.session, MarkHint(peer(s), Stage.COLLECTIVE), h.now)
    h.tick()
    asked = h.kernel.asked
    assert not h.engine.watches.unseen(h.now)
    for _ in range(200):
        h.tick(0.01)
    assert h.kernel.asked == asked
    assert [w.selector for w in h.engine.watches.unseen(h.now)] == [peer(s)]
    h.socket(2)
    h.tick(0.01)
    assert not h.engine.watches.unseen(h.now)


def test_connections_of_descendants_are_those_of_the_process() -> None:
    h = Host()
    h.kernel.descendants[77] = {78}
    h.engine.apply(h.session, MarkHint(ProcessSelector(77, None, PortRange()), Stage.COLLECTIVE), h.now)
    own, child, stranger = (h.socket(i, pid=pid) for i, pid in ((1, 77), (2, 78), (3, 79)))
    h.tick()
    assert h.band(own) == h.band(child)
    assert 3 not in h.keys.cookies
    assert stranger.pid == 79


def test_a_selector_means_its_users_sockets_only() -> None:
    h = Host()
    before = [h.socket(1, uid=1000), h.socket(2, uid=1001), h.socket(3, uid=-1)]
    session = h.engine.session("w", h.now, pid=7, uid=1000, only=1000)
    h.engine.apply(session, MarkHint(peer(before[0]), Stage.COLLECTIVE), h.now)
    h.tick()
    after = [h.socket(4, uid=1000), h.socket(5, uid=1001)]
    h.tick(0.01)
    marked = {c.cookie for c in h.connections.by_slot.values() if c.marks}
    assert marked == {1, 4}
    assert after[1].cookie not in h.keys.cookies


def test_an_exact_tuple_ends_with_its_connection() -> None:
    h = Host()
    s = h.socket(1)
    h.request("r", 60.0)
    e = s.endpoints
    exact = TupleSelector(e.src, e.dst, PortRange(e.sport, e.sport), PortRange(e.dport, e.dport), 6)
    h.transfer("t", exact, MSS)
    h.send(s, MSS)
    h.tick(0.01)
    assert (exact, -1) in h.kernel.rules
    h.kernel.close(s)
    h.tick(0.01)
    assert not h.kernel.rules
    assert not h.session.watches


def test_what_is_not_known_ends_nothing() -> None:
    h = Host()
    s = h.socket(1)
    h.request("r", 60.0)
    h.transfer("t", s, 10 * MSS)
    h.send(s, 10 * MSS, acked=False)
    h.done("t")
    progress = h.kernel.progress
    h.kernel.progress = lambda _: None  # type: ignore[method-assign,assignment,return-value]
    for _ in range(30):
        h.tick(0.1)
    assert list(h.session.transfers) == ["t"]
    h.kernel.progress = progress  # type: ignore[method-assign]
    h.tick(0.01)
    assert list(h.session.transfers) == ["t"]
    h.ack(s, 10 * MSS)
    h.tick(0.01)
    assert h.counted[0] == 1


def test_a_search_that_fails_is_made_again() -> None:
    h = Host()
    s = h.socket(1)
    look = h.kernel.look
    h.kernel.look = h.kernel.fail  # type: ignore[method-assign]
    h.engine.apply(h.session, MarkHint(peer(s), Stage.COLLECTIVE), h.now)
    for _ in range(5):
        h.tick(0.01)
    assert not [w for w in h.session.watches.values() if w.looked]
    h.kernel.look = look  # type: ignore[method-assign]
    h.tick(0.3)
    h.tick(0.01)
    assert [w for w in h.session.watches.values() if w.looked]
    assert h.band(s) == "level 0"
