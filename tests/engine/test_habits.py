# SPDX-License-Identifier: Apache-2.0
"""How real clients use connections, and how wrong their hints may be: what is done is done, what is not is not.

The same on real sockets: tests/e2e/test_habits.py.
"""

from __future__ import annotations

import pytest
from support.harness import MSS, FakeSocket, Host, peer

from mfsd.ground.model import (
    CookieSelector,
    EndHint,
    EventKind,
    MarkHint,
    PortRange,
    RequestHint,
    Stage,
    TransferHint,
    TupleSelector,
    What,
)


def test_one_connection_per_transfer_closed_at_once() -> None:
    h = Host()
    for i in range(20):
        s = h.socket(i + 1)
        h.request(f"r{i}", 5.0)
        h.transfer(f"t{i}", s, 100 * MSS, request=f"r{i}")
        h.send(s, 100 * MSS, acked=False)
        h.done(f"r{i}", What.REQUEST)
        h.kernel.close(s)  # the FIN follows, and all is acknowledged
        h.tick(0.001)
    h.tick(0.01)
    assert h.counted == (20, 20, 0)
    assert not h.session.events
    assert h.table.taken == 0


def test_the_bytes_of_a_transfer_announced_before_its_connection_exists_count() -> None:
    h = Host()
    gone = h.socket(1)
    h.kernel.close(gone)
    h.request("r", 60.0)
    h.transfer("t", peer(gone), 3 * MSS)
    h.tick()
    for i in range(3):
        s = FakeSocket(i + 2, gone.endpoints)
        h.kernel.connect(s)
        assert h.band(s).startswith("level")  # from the first packet on
        h.send(s, MSS)
        h.kernel.close(s)
        assert h.session.transfers
        h.tick(0.01)
    assert h.counted[0] == 1


def test_a_reset_is_gone() -> None:
    h = Host()
    s = h.socket(1)
    h.request("r", 5.0)
    h.transfer("a", s, 10 * MSS)
    h.transfer("b", s, 10 * MSS)
    h.send(s, 10 * MSS)
    h.send(s, 5 * MSS, acked=False)
    h.kernel.close(s, clean=False)
    h.tick(0.01)
    assert h.counted[0] == 1
    assert [(e.kind, e.transfer_id) for e in h.session.events] == [(EventKind.CONNECTION_GONE, "b")]


def test_marks_of_sockets_that_are_gone_leave_room() -> None:
    h = Host()
    for i in range(1, 1100):
        s = h.socket(i)
        h.engine.apply(h.session, MarkHint(CookieSelector(i), Stage.COLLECTIVE), h.now)
        h.kernel.close(s)
        h.tick(0.001)
    assert not h.session.marks
    assert h.table.taken == 0


def test_marks_of_two_sessions_stack() -> None:
    h = Host()
    s = h.socket(1)
    other = h.engine.session("other", h.now)
    h.engine.apply(h.session, MarkHint(CookieSelector(1), Stage.COLLECTIVE), h.now)
    background = h.engine.session("background", h.now)
    h.engine.apply(background, MarkHint(CookieSelector(1), Stage.BACKGROUND), h.now)
    h.engine.apply(other, MarkHint(CookieSelector(1), Stage.P2D), h.now)
    h.tick()
    assert h.band(s) == "level 0"
    h.engine.end_session(background, h.now)
    h.tick(0.01)
    assert h.band(s) == "level 0"
    h.engine.end_session(h.session, h.now)
    h.tick(0.01)
    assert h.band(s) == "level 4"
    h.engine.end_session(other, h.now)
    h.tick(0.01)
    assert h.table.taken == 0 or h.band(s) == "default"


def test_nothing_of_a_dead_connection_reaches_the_next_with_its_ports() -> None:
    h = Host()
    s = h.socket(1)
    h.kernel.vanish(s)
    e = s.endpoints
    exact = TupleSelector(e.src, e.dst, PortRange(e.sport, e.sport), PortRange(e.dport, e.dport), 6)
    h.request("r", 0.5)
    h.transfer("t", exact, MSS)
    h.tick()
    h.kernel.connect(s)
    assert h.band(s).startswith("level")
    h.tick(0.01)
    h.send(s, MSS)
    h.kernel.close(s)
    h.tick(0.01)
    h.engine.end_session(h.session, h.now)
    h.tick(0.1)
    stranger = FakeSocket(2, e)
    h.kernel.connect(stranger)
    h.tick(0.01)
    assert 2 not in h.keys.cookies
    assert not h.keys.tuples


def test_an_idle_sibling_holds_no_share() -> None:
    h = Host()
    lanes = [h.socket(i) for i in range(1, 6)]
    h.request("r", 5.0)
    h.request("s", 6.0)
    h.transfer("a", peer(lanes[0]), 500 * MSS)
    h.transfer("b", peer(lanes[0]), 500 * MSS, request="s")
    h.tick()
    h.send(lanes[2], 320 * MSS)
    h.tick(0.01)
    view = h.engine.steering.views(h.now).transfers
    assert view.left.tolist() == [180 * MSS, 500 * MSS]
    h.send(lanes[2], 180 * MSS)
    h.tick(0.01)
    assert list(h.session.transfers) == ["b"]
    h.send(lanes[2], 320 * MSS)
    h.tick(0.01)
    assert list(h.session.transfers) == ["b"]


def test_interleaved_transfers_share_what_moves() -> None:
    h = Host()
    s = h.socket(1)
    h.request("r", 60.0)
    h.transfer("big", s, 8000 * MSS, ordered=False)
    h.send(s, 1000 * MSS)
    h.tick(0.5)
    h.transfer("small", s, 1000 * MSS, ordered=False)
    h.send(s, 1000 * MSS)
    h.tick(0.5)
    view = h.engine.steering.views(h.now).transfers
    assert view.left.tolist() == [6500 * MSS, 500 * MSS]  # what went before there was another one is its own
    assert view.ahead.tolist() == [500 * MSS, 500 * MSS]
    h.send(s, 1000 * MSS)
    h.done("small")
    h.tick(0.01)
    assert list(h.session.transfers) == ["big"]
    assert h.engine.steering.views(h.now).transfers.left.tolist() == [6000 * MSS]  # 2,000 of its own have moved
    h.send(s, 6000 * MSS)
    h.tick(0.01)
    assert not h.session.transfers


def test_what_one_session_announces_changes_nothing_for_another() -> None:
    h = Host()
    s = h.socket(1)
    stranger = h.engine.session("stranger", h.now)
    h.request("r", 1.0)
    h.transfer("mine", s, 100 * MSS)
    h.engine.apply(stranger, RequestHint("x", h.now + 1), h.now)
    h.engine.apply(stranger, TransferHint("huge", "x", "", Stage.P2D, 0, 1 << 40, CookieSelector(1)), h.now)
    h.transfer("next", s, 100 * MSS)
    h.tick()
    view = h.engine.steering.views(h.now).transfers
    assert sorted(view.ahead.tolist()) == [0, 0, 100 * MSS]
    assert not h.session.events
    h.send(s, 200 * MSS)
    h.tick(0.01)
    assert not h.session.transfers


def test_a_worker_that_ends_right_after_its_last_byte_met_its_deadline() -> None:
    h = Host()
    session = h.engine.session("w", h.now, pid=7)
    s = h.socket(1)
    h.engine.apply(session, RequestHint("r", h.now + 0.1), h.now)
    h.engine.apply(session, RequestHint("late", h.now + 0.1), h.now)
    h.engine.apply(session, TransferHint("t", "r", "", Stage.P2D, 0, 100 * MSS, CookieSelector(1)), h.now)
    h.engine.apply(session, TransferHint("u", "late", "", Stage.P2D, 0, 100 * MSS, CookieSelector(1)), h.now)
    h.send(s, 200 * MSS, acked=False)
    h.engine.end_session(session, h.now)
    h.tick(0.05)
    h.ack(s, 100 * MSS)
    h.tick(0.01)
    h.tick(0.2)
    h.kernel.close(s)
    h.tick(0.01)
    assert h.counted == (2, 1, 1)
    assert (h.engine.books.requests.n, h.engine.books.transfers.n, h.table.taken) == (0, 0, 0)


def test_after_a_restart_what_is_left_is_announced() -> None:
    h = Host()
    s = h.socket(1)
    s.bytes_acked += 99 * MSS  # of a transfer of 100 that another daemon has seen the beginning of
    h.request("r", 5.0)
    h.transfer("t", s, 100 * MSS, position=1)
    h.tick()
    assert h.engine.steering.views(h.now).transfers.left.tolist() == [MSS]
    h.send(s, MSS)
    h.tick(0.01)
    assert h.counted[0] == 1


def test_done_of_what_has_expired_is_no_error() -> None:
    h = Host()
    for what in What:
        h.engine.apply(h.session, EndHint(what, "nobody"), h.now)
    h.tick()
    assert not h.session.events
    assert h.counted == (0, 0, 0)


def test_a_mark_that_comes_while_its_socket_is_being_closed_ends() -> None:
    """The key catches the last acknowledgement, and nobody ever finds the socket."""
    h = Host()
    s = h.socket(1)
    h.kernel.vanish(s)
    h.engine.apply(h.session, MarkHint(CookieSelector(1), Stage.COLLECTIVE), h.now)
    h.send(s, 0)
    h.tick(0.1)
    elsewhere = FakeSocket(2, s.endpoints)  # one that nobody finds either, but it sends
    h.engine.apply(h.session, MarkHint(CookieSelector(2), Stage.COLLECTIVE), h.now)
    h.send(elsewhere, MSS)
    for _ in range(50):
        h.tick(0.1)
    assert [m.selector for m in h.session.marks.values()] == [CookieSelector(2)]
    assert list(h.connections.by_cookie) == [2]


def test_a_request_that_has_lost_bytes_is_missed_and_over_at_once() -> None:
    h = Host()
    kept, gone = h.socket(1), h.socket(2)
    h.request("r", 60.0)
    h.transfer("a", kept, MSS)
    h.transfer("b", gone, 9 * MSS)
    h.send(kept, MSS)
    h.send(gone, MSS, acked=False)
    h.tick(0.01)
    h.done("r", What.REQUEST)
    h.kernel.close(gone, clean=False)
    h.tick(0.01)
    assert h.counted == (1, 0, 1)
    assert not h.session.requests


def test_a_socket_that_could_not_be_connected_may_try_again() -> None:
    h = Host()
    s = h.socket(1)
    s.bytes_acked = 0
    h.request("r", 60.0)
    h.transfer("t", s, MSS)
    h.kernel.close(s, clean=False)  # refused
    h.tick(0.5)
    assert not h.session.events
    h.kernel.connect(s)
    h.tick(0.01)
    h.send(s, MSS)
    h.tick(0.01)
    assert h.counted[0] == 1
    h.kernel.close(s, clean=False)
    other = h.socket(2)
    other.bytes_acked = 0
    h.transfer("u", other, MSS)
    h.kernel.close(other, clean=False)
    for _ in range(30):
        h.tick(0.1)
    assert [(e.kind, e.transfer_id) for e in h.session.events] == [(EventKind.CONNECTION_GONE, "u")]
    assert h.table.taken == 0


def test_marking_again_leaves_no_gap() -> None:
    h = Host()
    s = h.socket(1)
    unwatched: list[object] = []
    h.kernel.unwatch = lambda selector, uid: unwatched.append((selector, uid))  # type: ignore[method-assign]
    for stage in (Stage.COLLECTIVE, Stage.P2D, Stage.KV_REUSE):
        h.engine.apply(h.session, MarkHint(peer(s), stage), h.now)
        h.tick(0.01)
        assert h.kernel.rules[peer(s), -1][0] == h.engine.steering.band_of(stage)
    assert not unwatched
    assert h.band(s) == "level 1"
    h.engine.apply(h.session, MarkHint(peer(s), Stage.NONE), h.now)
    assert unwatched == [(peer(s), -1)]


@pytest.mark.parametrize("streamed", [True, False])
def test_a_session_that_nobody_vouches_for_ends_with_its_stream(*, streamed: bool) -> None:
    """Single calls have no end, so what they mark stays."""
    h = Host()
    s = h.socket(1)
    h.engine.apply(h.session, MarkHint(peer(s), Stage.COLLECTIVE), h.now)
    h.session.attached, h.session.kept = (1, True) if streamed else (0, False)
    for _ in range(100):
        h.tick(1.0)
    assert h.band(s) == "level 0"
    if streamed:
        h.session.attached, h.session.seen = 0, h.now
        h.tick(20.0)
        assert h.band(s) == "level 0"  # it may come again
        h.tick(20.0)
        h.tick(0.1)
        assert not h.engine.books.sessions
        assert not h.kernel.rules
        assert h.table.taken == 0
