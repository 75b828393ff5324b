# SPDX-License-Identifier: Apache-2.0
"""Clients that try again, use names again, come late, or end in the middle.

The same on real sockets: tests/e2e/test_habits_again.py.
"""

from __future__ import annotations

import pytest
from support.harness import MSS, Host, peer

from mfsd.engine.sockets import End
from mfsd.ground.model import CookieSelector, EndHint, EventKind, HintError, RequestHint, Stage, TransferHint, What


def lose(h: Host, *, told: bool = True) -> None:
    """Request r loses transfer t, 100 MSS, by a reset in the middle."""
    s = h.socket(1)
    h.request("r", 60.0)
    h.transfer("t", s, 100 * MSS, position=1)
    h.send(s, 30 * MSS)
    h.tick(0.01)
    h.kernel.close(s, clean=False)
    if told:
        h.tick(0.01)
        assert [e.kind for e in h.session.events] == [EventKind.CONNECTION_GONE]


@pytest.mark.parametrize("told", [False, True], ids=["not heard of yet", "told"])
def test_what_is_lost_and_sent_again_in_time_is_met(*, told: bool) -> None:
    h = Host()
    lose(h, told=told)
    s = h.socket(2)
    h.transfer("t", s, 100 * MSS, position=1)
    h.send(s, 100 * MSS)
    h.done("r", What.REQUEST)
    h.tick(0.01)
    assert h.counted == (1, 1, 0)
    assert not h.session.lost


@pytest.mark.parametrize("gathering", [False, True])
def test_what_is_lost_and_taken_back_does_not_count(*, gathering: bool) -> None:
    h = Host()
    lose(h)
    s = h.socket(2)
    if gathering:
        h.engine.gather(h.now, on=True)
    h.engine.apply(h.session, EndHint(What.TRANSFER, "t", cancelled=True), h.now)
    if gathering:
        h.engine.gather(h.now, on=False)
    h.transfer("again", s, 100 * MSS, position=1)
    h.send(s, 100 * MSS)
    h.done("r", What.REQUEST)
    h.tick(0.01)
    assert h.counted == (1, 1, 0)


def test_what_another_request_announces_by_that_name_makes_nothing_good() -> None:
    h = Host()
    lose(h)
    s = h.socket(2)
    h.request("q", 60.0)
    h.transfer("t", s, 100 * MSS, request="q", position=1)
    h.send(s, 100 * MSS)
    for name in "qr":
        h.done(name, What.REQUEST)
    h.tick(0.01)
    assert h.counted == (1, 1, 1)


def test_one_that_is_lost_once_more_is_missed() -> None:
    h = Host()
    lose(h)
    s = h.socket(2)
    h.transfer("t", s, 100 * MSS, position=1)
    h.kernel.close(s, clean=False)
    h.tick(0.01)
    h.done("r", What.REQUEST)
    assert h.counted == (0, 0, 1)


@pytest.mark.parametrize("done", [False, True], ids=["it stands behind it", "it says done"])
def test_the_name_of_a_transfer_that_is_written_is_free(*, done: bool) -> None:
    h = Host()
    s = h.socket(1)
    for i in range(5):
        h.request(f"r{i}", 60.0)
        h.transfer("kv", s, 10 * MSS, request=f"r{i}", position=1 + 10 * MSS * i)
        h.send(s, 10 * MSS, acked=False)
        if done:
            h.done("kv")
    h.transfer("kv", s, 10 * MSS, request="r4", position=1 + 50 * MSS)
    with pytest.raises(HintError, match="announced already"):  # it stands where that one does
        h.transfer("kv", s, 10 * MSS, request="r4", position=1 + 50 * MSS)
    h.engine.apply(h.session, EndHint(What.TRANSFER, "kv", cancelled=True), h.now)
    assert h.engine.books.transfers.n == 5
    h.ack(s, 50 * MSS)
    for i in range(5):
        h.done(f"r{i}", What.REQUEST)
    h.tick(0.3)
    assert h.counted == (5, 5, 0)
    assert not h.session.transfers
    assert h.session.user.transfers == 0


@pytest.mark.parametrize("active", [False, True], ids=["accepted", "opened"])
@pytest.mark.parametrize("done", [False, True])
def test_a_connection_that_was_over_before_anybody_had_named_it(*, active: bool, done: bool) -> None:
    h = Host()
    s = h.socket(1, active=active, bytes_acked=int(active))
    h.send(s, 20 * MSS)
    h.kernel.close(s)
    h.request("r", 60.0)
    for i in range(2):
        h.transfer(f"t{i}", s, 10 * MSS, position=int(active) + i * 10 * MSS)
        if done:
            h.done(f"t{i}")
        h.tick(0.01)
    h.done("r", What.REQUEST)
    h.tick(0.01)
    assert h.counted == (2, 1, 0)
    assert not h.session.events
    assert h.table.taken == 0


@pytest.mark.parametrize("heard", [0, 4, 10], ids=["before", "in the middle", "behind"])
def test_the_first_transfer_on_an_accepted_connection(heard: int) -> None:
    """Nothing had been written when it was announced, which is no position; the others are placed by theirs."""
    h = Host()
    s = h.socket(1, active=False, bytes_acked=0)
    h.request("r", 60.0)
    h.send(s, heard * MSS, acked=False)
    h.transfer("t0", s, 10 * MSS)
    h.send(s, (10 - heard) * MSS, acked=False)
    for i in range(2):
        h.transfer(f"t{i + 1}", s, 10 * MSS, position=10 * (i + 1) * MSS)
        h.tick(0.01)
        h.send(s, 10 * MSS, acked=False)
    for i in range(3):
        h.ack(s, 10 * MSS)
        h.tick(0.3)
        assert h.counted[0] == i + 1
    assert not h.session.events


def test_the_only_transfer_on_an_accepted_connection_that_is_over_by_then() -> None:
    h = Host()
    s = h.socket(1, active=False, bytes_acked=0)
    h.request("r", 60.0)
    h.send(s, 10 * MSS, acked=False)
    h.transfer("t", s, 10 * MSS)
    h.kernel.close(s)
    h.tick(0.01)
    assert h.counted[0] == 1


def test_one_behind_another_that_is_said_to_be_done_first() -> None:
    """Both are written, in the order of their positions."""
    h = Host()
    s = h.socket(1)
    for name in "ab":
        h.request(name, 60.0)
        h.transfer(name, s, 10 * MSS, request=name, position=1 + (name == "b") * 10 * MSS)
        h.send(s, 10 * MSS, acked=False)
    h.done("b", What.REQUEST)
    h.ack(s, 15 * MSS)
    h.tick(0.01)
    h.tick(0.3)
    assert list(h.session.transfers) == ["b"]
    h.ack(s, 5 * MSS)
    h.tick(0.3)
    assert h.counted == (2, 1, 0)


def test_a_reset_of_an_accepted_connection_that_has_delivered_nothing() -> None:
    h = Host()
    s = h.socket(1, active=False, bytes_acked=0)
    h.request("r", 60.0)
    h.transfer("t", s, 10 * MSS)
    h.send(s, 5 * MSS, acked=False)
    h.kernel.close(s, clean=False)
    h.tick(0.01)
    assert [e.kind for e in h.session.events] == [EventKind.CONNECTION_GONE]


def test_one_that_was_reset_before_anybody_had_named_it() -> None:
    h = Host()
    s = h.socket(1)
    h.send(s, 15 * MSS)
    h.kernel.close(s, clean=False)
    h.request("r", 60.0)
    for i in range(2):
        h.transfer(f"t{i}", s, 10 * MSS, position=1 + i * 10 * MSS)
    h.tick(0.01)
    assert h.counted == (1, 0, 0)
    assert [(e.kind, e.transfer_id) for e in h.session.events] == [(EventKind.CONNECTION_GONE, "t1")]


def test_a_socket_that_has_ended_may_be_connected_once_more() -> None:
    h = Host()
    s = h.socket(1)
    h.kernel.close(s)
    h.request("r", 60.0)
    h.transfer("t", s, 10 * MSS)  # of an unconnected socket no position is known
    h.tick(0.01)
    s.bytes_acked = 1
    h.kernel.connect(s)
    h.send(s, 10 * MSS)
    h.tick(0.01)
    assert h.counted == (1, 0, 0)


def test_what_others_have_ended_is_nobody_elses() -> None:
    h = Host()
    h.session = h.engine.session("user", h.now, uid=1000, only=1000)
    s = h.socket(1, uid=1001)
    h.send(s, 10 * MSS)
    h.kernel.close(s)
    h.request("r", 60.0)
    h.transfer("t", s, 10 * MSS, position=1)
    h.tick(0.01)
    assert h.counted == (0, 0, 0)


@pytest.mark.parametrize("known", [False, True])
def test_what_a_user_accepts_on_a_listener_of_another_is_its_own(*, known: bool) -> None:
    h = Host()
    s = h.socket(1, uid=0, accepted_by=1000)
    if known:
        h.request("r", 60.0)
        h.transfer("root", s, MSS)
    h.session = h.engine.session("user", h.now, uid=1000, only=1000)
    h.request("r", 60.0)
    h.transfer("t", s, MSS)
    assert h.connections.by_cookie[1].uid == 1000
    h.session = h.engine.session("other", h.now, uid=1001, only=1001)
    h.request("r", 60.0)
    with pytest.raises(HintError, match="no connection of user 1001"):
        h.transfer("t", s, MSS)


@pytest.mark.parametrize("closes", [False, True])
@pytest.mark.parametrize(
    ("written", "whole"), [(0, False), (50, False), (90, True), (100, True)], ids=["nothing", "half", "most", "all"]
)
def test_what_a_worker_had_not_written_when_it_ended_is_not_done(written: int, *, whole: bool, closes: bool) -> None:
    h = Host()
    session = h.engine.session("w", h.now, pid=7)
    s = h.socket(1)
    h.engine.apply(session, RequestHint("r", h.now + 5.0), h.now)
    h.engine.apply(session, TransferHint("t", "r", "", Stage.P2D, 0, 100 * MSS, CookieSelector(1), position=1), h.now)
    h.send(s, written * MSS)
    h.tick(0.01)
    h.engine.end_session(session, h.now)
    if closes:
        h.kernel.close(s)
    h.tick(0.05)
    h.tick(0.3)
    assert h.counted == (int(whole), int(whole), int(not whole))
    assert (h.engine.books.requests.n, h.engine.books.transfers.n) == (0, 0)


@pytest.mark.parametrize("told", [False, True])
def test_a_connection_that_is_closed_with_half_of_a_transfer_written(*, told: bool) -> None:
    """The kernel closes those of a process that is killed, perhaps before anybody hears that it is gone."""
    h = Host()
    s = h.socket(1)
    h.request("r", 5.0)
    h.transfer("t", s, 100 * MSS, position=1)
    h.send(s, 50 * MSS)
    if told:
        h.kernel.close(s)
    else:
        h.kernel.vanish(s)
        h.kernel.ends[1] = End(s.told, s.bytes_acked + 1, clean=True, active=True, at=h.now)
    h.tick(0.01)
    h.tick(1.0)
    assert [(e.kind, e.reason) for e in h.session.events] == [
        (EventKind.CONNECTION_GONE, "its connection was closed before all had arrived")
    ]
    h.done("r", What.REQUEST)
    assert h.counted == (0, 0, 1)


def test_a_worker_that_ended_before_any_connection_of_its_selector() -> None:
    h = Host()
    session = h.engine.session("w", h.now, pid=7)
    s = h.socket(1)
    h.kernel.close(s)
    h.engine.apply(session, RequestHint("r", h.now + 5.0), h.now)
    h.engine.apply(session, TransferHint("t", "r", "", Stage.P2D, 0, 100 * MSS, peer(s)), h.now)
    h.engine.end_session(session, h.now)
    h.tick(0.1)
    assert h.counted == (0, 0, 1)


@pytest.mark.parametrize("ends", [False, True])
def test_what_arrives_while_the_daemon_is_held_up_arrived_when_it_did(*, ends: bool) -> None:
    """Known by a later packet, or by the end of the connection."""
    h = Host()
    s = h.socket(1)
    for name, left in (("late", 0.5), ("r", 1.0)):
        h.request(name, left)
        h.transfer(f"t{name}", s, 10 * MSS, request=name)
    h.tick()
    for _ in range(2):
        h.now += 0.7 / 2
        h.send(s, 10 * MSS)
    if ends:
        h.kernel.close(s)
    else:
        h.send(s, MSS)
    h.now += 1.0
    h.done("late", What.REQUEST)
    h.done("r", What.REQUEST)
    h.tick()
    h.tick(0.3)
    assert h.counted == (2, 1, 1)
