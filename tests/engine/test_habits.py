# SPDX-License-Identifier: Apache-2.0
"""How real clients use connections, and how wrong their hints may be: what is done is done, what is not is not.

The same on real sockets: tests/e2e/test_habits.py.
"""

from __future__ import annotations

import pytest
from support.harness import MSS, FakeSocket, Host

from mfsd.model import (
    CookieSelector,
    EndHint,
    EventKind,
    MarkHint,
    PortRange,
    ProcessSelector,
    Stage,
    TupleSelector,
    What,
)


def peer(s: FakeSocket) -> TupleSelector:
    """All connections to where this one goes."""
    return TupleSelector(None, s.endpoints.dst, PortRange(), PortRange(6000, 6000), 6)


def done(h: Host, name: str, what: What = What.TRANSFER) -> None:
    h.engine.apply(h.session, EndHint(what, name), h.now)


def counted(h: Host) -> tuple[int, int, int]:
    c = h.engine.books.counters
    return c.transfers_completed, c.deadlines_met, c.deadlines_missed


def test_one_connection_per_transfer_closed_at_once() -> None:
    h = Host()
    for i in range(20):
        s = h.socket(i + 1)
        h.request(f"r{i}", 5.0)
        h.transfer(f"t{i}", s, 100 * MSS, request=f"r{i}")
        h.send(s, 100 * MSS, acked=False)
        done(h, f"r{i}", What.REQUEST)
        h.kernel.close(s)  # the FIN follows, and all is acknowledged
        h.tick(0.001)
    h.tick(0.01)
    assert counted(h) == (20, 20, 0)
    assert not h.session.events
    assert h.table.taken == 0


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
    assert counted(h)[0] == 50
    assert not h.session.transfers


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
    assert counted(h)[0] == 1


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
    assert counted(h)[0] == 1
    assert [(e.kind, e.transfer_id) for e in h.session.events] == [(EventKind.CONNECTION_GONE, "b")]


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
    h.engine.apply(other, MarkHint(CookieSelector(1), Stage.P2D), h.now)
    h.tick()
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


def test_a_hint_that_comes_after_its_bytes_does_not_delay_the_next_ones() -> None:
    h = Host()
    s = h.socket(1)
    h.request("r", 60.0)
    h.transfer("0", s, MSS)
    h.send(s, MSS)
    h.tick(0.01)
    h.send(s, 100 * MSS)
    h.tick(1.0)
    h.transfer("late", s, 100 * MSS)
    h.tick(0.1)
    for i in range(1, 6):
        h.transfer(str(i), s, 100 * MSS)
        h.tick(0.001)
        h.send(s, 100 * MSS)
        h.tick(0.01)
        assert not h.session.transfers
    assert counted(h)[0] == 7


@pytest.mark.parametrize("share", [1.1, 1.0, 0.9])
def test_sizes_announced_wrong_correct_themselves(share: float) -> None:
    h = Host()
    s = h.socket(1)
    h.request("r", 60.0)
    for i in range(2):
        h.transfer(str(i), s, int(100 * MSS * share))
    for i in range(40):
        h.send(s, 100 * MSS)
        done(h, str(i))
        h.transfer(str(i + 2), s, int(100 * MSS * share))
        h.tick(0.01)
        assert len(h.session.transfers) <= 3
    h.tick(0.3)
    assert len(h.session.transfers) <= 2


def test_bytes_that_go_in_another_order_than_announced() -> None:
    h = Host()
    s = h.socket(1)
    h.request("r", 60.0)
    h.transfer("a", s, 100 * MSS)
    h.transfer("b", s, 10 * MSS)
    h.send(s, 10 * MSS)
    done(h, "b")
    h.tick(0.01)
    assert list(h.session.transfers) == ["a"]
    h.send(s, 90 * MSS)
    h.tick(0.01)
    assert list(h.session.transfers) == ["a"]
    h.send(s, 10 * MSS)
    h.tick(0.01)
    assert not h.session.transfers


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
    assert view.left.tolist() == [7000 * MSS, 500 * MSS]
    assert view.ahead.tolist() == [500 * MSS, 500 * MSS]
    h.send(s, 1000 * MSS)
    done(h, "small")
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
    from mfsd.model import RequestHint, TransferHint  # noqa: PLC0415

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
    from mfsd.model import RequestHint, TransferHint  # noqa: PLC0415

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
    assert counted(h) == (2, 1, 1)
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
    assert counted(h)[0] == 1


def test_done_of_what_has_expired_is_no_error() -> None:
    h = Host()
    for what in What:
        h.engine.apply(h.session, EndHint(what, "nobody"), h.now)


def test_a_process_is_meant_by_its_number() -> None:
    h = Host()
    mine, other = h.socket(1, pid=42), h.socket(2, pid=43)
    h.engine.apply(h.session, MarkHint(ProcessSelector(42, None, PortRange()), Stage.COLLECTIVE), h.now)
    h.tick()
    late = h.socket(3, pid=42)
    assert (h.band(mine), h.band(late)) == ("level 0", "level 0")
    assert 2 not in h.keys.cookies
    assert other in h.kernel.sockets


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


def test_two_announced_at_once_behind_unhinted_bytes_are_both_to_come() -> None:
    h = Host()
    s = h.socket(1)
    h.request("r", 60.0)
    h.transfer("0", s, MSS)
    h.send(s, MSS)
    h.tick(0.01)
    h.send(s, 100 * MSS)
    h.tick(0.01)
    for name in "ab":
        h.transfer(name, s, 100 * MSS)
    assert list(h.session.transfers) == ["a", "b"]
    for name, left in (("a", ["b"]), ("b", [])):
        h.tick(0.9)
        h.send(s, 100 * MSS)
        h.tick(0.01)
        assert list(h.session.transfers) == left, name
    assert counted(h)[0] == 3


def test_one_that_was_late_although_the_next_came_right_behind_it_corrects_itself_once_all_is_quiet() -> None:
    h = Host()
    s = h.socket(1)
    h.request("r", 60.0)
    h.transfer("0", s, MSS)
    h.send(s, MSS)
    h.tick(0.01)
    h.send(s, 100 * MSS)
    h.tick(0.01)
    for name in "ab":
        h.transfer(name, s, 100 * MSS)
    h.send(s, 100 * MSS)
    h.tick(0.01)
    h.transfer("c", s, 100 * MSS)
    h.send(s, 100 * MSS)
    for _ in range(12):
        h.tick(0.1)
    assert not h.session.transfers
    assert counted(h)[0] == 4


def test_a_request_that_has_lost_bytes_is_missed_and_over_at_once() -> None:
    h = Host()
    kept, gone = h.socket(1), h.socket(2)
    h.request("r", 60.0)
    h.transfer("a", kept, MSS)
    h.transfer("b", gone, 9 * MSS)
    h.send(kept, MSS)
    h.send(gone, MSS, acked=False)
    h.tick(0.01)
    done(h, "r", What.REQUEST)
    h.kernel.close(gone, clean=False)
    h.tick(0.01)
    assert counted(h) == (1, 0, 1)
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
    assert counted(h)[0] == 1
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
    done(h, "t")
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
    assert counted(h)[0] == 1


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


@pytest.mark.parametrize("position", [0, 1 + 100 * MSS])
def test_the_first_hint_of_a_connection_may_be_late_too(position: int) -> None:
    h = Host()
    s = h.socket(1)
    s.bytes_acked, s.last_sent_ms = 1 + 100 * MSS, 1000
    h.request("r", 60.0)
    h.transfer("late", s, 100 * MSS, position=position)
    h.tick(0.1)
    for i in range(5):
        h.transfer(str(i), s, 100 * MSS)
        h.tick(0.001)
        h.send(s, 100 * MSS)
        h.tick(0.01)
        assert not h.session.transfers
    assert counted(h)[0] == 6


def test_bytes_of_a_late_hint_are_done_when_they_have_arrived() -> None:
    h = Host()
    s = h.socket(1)
    h.request("r", 60.0)
    h.transfer("0", s, MSS)
    h.send(s, MSS)
    h.tick(0.01)
    h.send(s, 100 * MSS, acked=False)
    h.transfer("late", s, 100 * MSS)
    h.tick(0.1)
    h.transfer("next", s, 100 * MSS)
    h.tick(0.01)
    assert list(h.session.transfers) == ["late", "next"]
    h.ack(s, 100 * MSS)
    h.tick(0.01)
    assert list(h.session.transfers) == ["next"]
    h.send(s, 100 * MSS)
    h.tick(0.01)
    assert counted(h)[0] == 3


def test_a_late_hint_of_a_connection_that_is_closed_already_is_done_when_its_worker_says_so() -> None:
    h = Host()
    first = h.socket(1)
    h.request("r", 60.0)
    h.transfer("a", peer(first), 100 * MSS)
    h.tick(0.01)
    h.send(first, 100 * MSS)
    h.kernel.close(first)
    second = FakeSocket(2, first.endpoints)
    h.kernel.connect(second)
    h.send(second, 100 * MSS)
    h.tick(0.01)
    h.transfer("b", peer(first), 100 * MSS)
    done(h, "r", What.REQUEST)
    h.kernel.close(second)
    h.tick(0.01)
    assert counted(h) == (2, 1, 0)
    assert not h.session.events


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
