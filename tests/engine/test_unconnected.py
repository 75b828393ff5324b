# SPDX-License-Identifier: Apache-2.0
"""Sockets that are not connected, not yet or not any more: nothing has gone by them, whatever their worker says."""

from __future__ import annotations

import pytest
from support.harness import MSS, FakeSocket, Host, peer

from mfsd.ground.model import CookieSelector, EventKind, MarkHint, Stage, What


def refuse(h: Host, s: FakeSocket) -> None:
    h.kernel.close(s, clean=False)


def pass_by(h: Host, seconds: float) -> None:
    for _ in range(int(seconds / 0.1)):
        h.tick(0.1)


@pytest.mark.parametrize("said", ["before", "behind"])
def test_done_of_a_socket_that_was_refused(said: str) -> None:
    h = Host()
    s = h.socket(1, bytes_acked=0, unsent_plus_unacked=1)
    h.request("q", 5.0)
    h.transfer("t", s, 10 * MSS, request="q")
    if said == "before":
        h.done("q", What.REQUEST)
    h.tick(0.01)
    refuse(h, s)
    h.tick(0.01)
    if said == "behind":
        h.done("q", What.REQUEST)
    pass_by(h, 2.0)
    assert h.counted == (0, 0, 1)
    assert [e.kind for e in h.session.events] == [EventKind.CONNECTION_GONE]
    assert h.table.taken == 0


def test_done_while_nobody_answers_the_connect() -> None:
    h = Host()
    s = h.socket(1, bytes_acked=0, unsent_plus_unacked=1)
    h.request("q", 5.0)
    h.transfer("t", s, 10 * MSS, request="q")
    h.done("q", What.REQUEST)
    pass_by(h, 1.0)
    assert h.counted == (0, 0, 0)
    refuse(h, s)
    pass_by(h, 2.0)
    assert h.counted == (0, 0, 1)


def test_done_of_a_socket_that_nobody_connects() -> None:
    h = Host()
    h.request("q", 5.0)
    h.transfer("t", CookieSelector(1), 10 * MSS, request="q")
    h.done("q", What.REQUEST)
    h.tick(0.01)
    assert h.counted == (0, 0, 0)
    pass_by(h, 1.5)
    assert h.counted == (0, 0, 1)


@pytest.mark.parametrize("position", [1, 1 + MSS])
def test_but_one_that_was_connected_where_nobody_can_look(position: int) -> None:
    """Older than the daemon, in another network namespace, or over: its worker has said where it stood."""
    h = Host()
    h.request("q", 5.0)
    h.transfer("t", CookieSelector(1), 10 * MSS, request="q", position=position)
    h.done("q", What.REQUEST)
    h.tick(0.01)
    assert h.counted == (1, 1, 0)


@pytest.mark.parametrize("known", [True, False], ids=["datagrams", "nobody tells of connections"])
def test_nor_one_of_which_tcp_has_no_word(*, known: bool) -> None:
    """All of it had gone before its hint was heard."""
    h = Host(slots=256)
    if known:
        h.kernel.datagrams.update(range(1, 21))
    else:
        h.kernel.tells = False
    for i in range(1, 21):
        h.request(f"q{i}", 5.0)
        h.transfer(f"t{i}", CookieSelector(i), 10 * MSS, request=f"q{i}")
        h.done(f"q{i}", What.REQUEST)
    for _ in range(30):
        h.tick(0.01)
    assert h.counted == (20, 20, 0)


@pytest.mark.parametrize("datagrams", [True, False])
def test_nothing_follows_until_it_is_known_whether_it_is_tcps(*, datagrams: bool) -> None:
    h = Host()
    h.kernel.lists_datagrams = True
    if datagrams:
        h.kernel.datagrams.add(1)
    h.request("q", 5.0)
    h.transfer("t", CookieSelector(1), 10 * MSS, request="q")
    h.done("q", What.REQUEST)
    pass_by(h, 0.3)
    assert h.counted == (0, 0, 0)
    h.kernel.lists_datagrams = False
    pass_by(h, 1.5)
    assert h.counted == ((1, 1, 0) if datagrams else (0, 0, 1))


@pytest.mark.parametrize("after", [0.1, 3.0])
def test_done_by_addresses_where_the_last_one_was_refused(after: float) -> None:
    h = Host()
    s = FakeSocket(1, h.socket(2).endpoints, bytes_acked=0, unsent_plus_unacked=1)
    h.kernel.sockets.clear()
    h.request("q", 10.0)
    h.transfer("t", peer(s), 10 * MSS, request="q")
    h.tick(0.01)
    h.kernel.connect(s)
    h.tick(0.01)
    refuse(h, s)
    pass_by(h, after)
    h.done("q", What.REQUEST)
    pass_by(h, 2.0)
    assert h.counted == (0, 0, 1)


def test_a_sibling_that_is_refused_says_nothing_of_the_others() -> None:
    """Those have TCP's word: what is on its way has not arrived."""
    h = Host()
    one = h.socket(1)
    h.request("q", 10.0)
    h.transfer("t", peer(one), 10 * MSS, request="q")
    h.tick(0.01)
    other = h.socket(2, bytes_acked=0, unsent_plus_unacked=1)
    h.tick(0.01)
    refuse(h, other)
    h.send(one, 10 * MSS, acked=False)
    h.done("q", What.REQUEST)
    pass_by(h, 0.5)
    assert h.counted == (0, 0, 0)
    h.ack(one, 10 * MSS)
    pass_by(h, 0.1)
    assert h.counted == (1, 1, 0)


@pytest.mark.parametrize("after", [5.0, 50.0])
def test_a_mark_waits_for_its_socket_to_be_connected(after: float) -> None:
    h = Host()
    s = h.socket(1)
    h.kernel.vanish(s)
    h.engine.apply(h.session, MarkHint(CookieSelector(1), Stage.COLLECTIVE), h.now)
    pass_by(h, after)
    h.kernel.connect(s)
    h.tick(0.01)
    h.send(s, MSS)
    assert h.band(s) == "level 0"
