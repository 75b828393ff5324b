# SPDX-License-Identifier: Apache-2.0
"""Hints that come after their bytes, or say sizes and order wrong: what is done is done, what is not is not."""

from __future__ import annotations

import pytest
from support.harness import MSS, FakeSocket, Host, peer

from mfsd.ground.model import RequestHint, What


def begun() -> tuple[Host, FakeSocket]:
    """A connection on which a transfer has been announced and has arrived."""
    h = Host()
    s = h.socket(1)
    h.request("r", 60.0)
    h.transfer("0", s, MSS)
    h.send(s, MSS)
    h.tick(0.01)
    return h, s


def test_a_hint_that_comes_after_its_bytes_does_not_delay_the_next_ones() -> None:
    h, s = begun()
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
    assert h.counted[0] == 7


@pytest.mark.parametrize("share", [1.1, 1.0, 0.9])
def test_sizes_announced_wrong_correct_themselves(share: float) -> None:
    h = Host()
    s = h.socket(1)
    h.request("r", 60.0)
    for i in range(2):
        h.transfer(str(i), s, int(100 * MSS * share))
    for i in range(40):
        h.send(s, 100 * MSS)
        h.done(str(i))
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
    h.done("b")
    h.tick(0.01)
    assert list(h.session.transfers) == ["a"]
    h.send(s, 90 * MSS)
    h.tick(0.01)
    assert list(h.session.transfers) == ["a"]
    h.send(s, 10 * MSS)
    h.tick(0.01)
    assert not h.session.transfers


def test_two_announced_at_once_behind_unhinted_bytes_are_both_to_come() -> None:
    h, s = begun()
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
    assert h.counted[0] == 3


def test_one_that_was_late_although_the_next_came_right_behind_it_corrects_itself_once_all_is_quiet() -> None:
    h, s = begun()
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
    assert h.counted[0] == 4


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
    assert h.counted[0] == 6


def test_bytes_of_a_late_hint_are_done_when_they_have_arrived() -> None:
    h, s = begun()
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
    assert h.counted[0] == 3


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
    h.done("r", What.REQUEST)
    h.kernel.close(second)
    h.tick(0.01)
    assert h.counted == (2, 1, 0)
    assert not h.session.events


@pytest.mark.parametrize("said", [True, False], ids=["done", "nothing said"])
@pytest.mark.parametrize("position", [1 + MSS, 0])
@pytest.mark.parametrize("met", [True, False])
def test_what_was_due_before_its_hint_was_heard(*, met: bool, position: int, said: bool) -> None:
    """Its client had lost the daemon for a while, which went on: what counts is when the last byte was acknowledged."""
    h, s = begun()
    h.tick(0.4)
    begin = h.now
    h.tick(0.1)
    h.send(s, 10 * MSS)
    for _ in range(10):
        h.tick(0.1)
    s.last_ack_ms = 1000
    h.engine.apply(h.session, RequestHint("q", begin + (0.5 if met else 0.05)), h.now)
    h.transfer("late", s, 10 * MSS, request="q", position=position)
    if said:
        h.done("q", What.REQUEST)
    for _ in range(10):
        h.tick(0.1)
        s.last_ack_ms += 100
    h.done("q", What.REQUEST)
    assert h.counted == (2, met, not met)
