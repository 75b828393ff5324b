# SPDX-License-Identifier: Apache-2.0
"""Clients that wait for nothing: hints that are on their way while their bytes go, names that are used again at once.

The same on real sockets: tests/e2e/test_habits_hasty.py.
"""

from __future__ import annotations

from ipaddress import ip_address
from random import Random

import pytest
from support.harness import MSS, Host, exact_tuple

from mfsd.engine.settings import LimitsConfig
from mfsd.ground.model import MarkHint, PortRange, Stage, TupleSelector, What

SIZE = 40 * MSS


def test_a_transfer_begins_where_its_worker_stood_although_the_hint_came_later() -> None:
    h = Host()
    s = h.socket(1)
    h.request("r", 60.0)
    stood = s.bytes_acked
    for i in range(8):
        h.send(s, SIZE // 2 if i else 0)  # what goes while the hint is on its way
        h.transfer(f"t{i}", s, SIZE, position=stood)
        stood += SIZE
        h.tick(0.001)
        h.send(s, SIZE - SIZE // 2 if i else SIZE)
        h.tick(0.001)
        assert not h.session.transfers


def test_many_that_are_announced_together_behind_their_bytes_begin_where_their_worker_stood() -> None:
    h = Host()
    s = h.socket(1)
    h.request("r", 60.0)
    h.transfer("first", s, SIZE, position=1)
    h.send(s, 4 * SIZE)
    for i in range(1, 4):
        h.transfer(f"t{i}", s, SIZE, position=1 + i * SIZE)
    h.tick(0.001)
    assert h.counted[0] == 4
    h.transfer("next", s, SIZE, position=1 + 4 * SIZE)
    h.tick(2.0)
    h.tick(2.0)
    assert list(h.session.transfers) == ["next"]


@pytest.mark.parametrize("exact", [False, True])
def test_hints_by_addresses_that_come_while_their_bytes_go_are_made_good_once_all_is_quiet(*, exact: bool) -> None:
    """Nobody can say where the worker stood. The last ones would be missing for good."""
    h = Host()
    s = h.socket(1)
    there = (
        exact_tuple(s.endpoints)
        if exact
        else TupleSelector(None, s.endpoints.dst, PortRange(), PortRange(6000, 6000), 6)
    )
    for i in range(3):
        h.request(f"r{i}", 0.5)
    h.transfer("t0", there, SIZE, request="r0")
    h.tick(0.001)
    h.send(s, SIZE)
    h.tick(0.001)
    h.send(s, SIZE + SIZE // 3)  # all of t1 and a part of t2
    for i in range(1, 3):
        h.transfer(f"t{i}", there, SIZE, request=f"r{i}")
    h.tick(0.001)
    h.send(s, SIZE - SIZE // 3)
    s.last_ack_ms = 0
    h.tick(0.001)
    assert list(h.session.transfers) == ["t1", "t2"]
    for i in range(3):
        h.done(f"r{i}", What.REQUEST)
    for name in ("t1", "t2"):  # had their worker not said so
        h.session.transfers[name].handed_over = False
    s.last_ack_ms = 1500
    h.tick(1.5)
    assert h.counted == (3, 3, 0)  # in time, although it was found out later


def test_bytes_that_a_worker_has_written_of_a_cancelled_transfer_are_not_the_next_ones() -> None:
    h = Host()
    s = h.socket(1)
    h.request("r", 60.0)
    for name in ("a", "b"):
        h.transfer(name, s, SIZE)
    h.tick(0.001)
    h.send(s, 10 * MSS)
    s.unsent_plus_unacked = s.notsent = 10 * MSS  # more of it is in the socket
    h.done("a", cancelled=True)
    s.unsent_plus_unacked = s.notsent = 0
    h.send(s, 10 * MSS)
    h.send(s, SIZE - 1)
    h.tick(0.001)
    assert list(h.session.transfers) == ["b"]
    h.send(s, 1)
    h.tick(0.001)
    assert h.counted[0] == 2 - 1


def test_what_was_written_when_the_word_of_a_cancellation_came_may_have_been_the_next_ones() -> None:
    h = Host()
    s = h.socket(1)
    h.request("r", 60.0)
    for name in ("a", "b"):
        h.transfer(name, s, SIZE)
    h.tick(0.001)
    s.unsent_plus_unacked = s.notsent = SIZE  # all of b: nothing was written of a
    h.done("a", cancelled=True)
    s.unsent_plus_unacked = s.notsent = 0
    h.send(s, SIZE)
    h.tick(0.001)
    h.tick(1.5)
    h.tick(0.1)
    assert h.counted[0] == 1


def test_the_name_of_a_request_that_is_done_is_free_before_its_bytes_have_arrived() -> None:
    h = Host()
    s = h.socket(1)
    for i in range(10):
        h.request("same", 5.0)
        h.transfer(f"t{i}", s, SIZE, request="same")
        h.send(s, SIZE, acked=False)
        h.done("same", What.REQUEST)
    h.tick(0.001)
    assert h.counted == (0, 0, 0)
    h.ack(s, 10 * SIZE)
    h.tick(0.3)
    assert h.counted == (10, 10, 0)
    assert not h.engine.books.requests.n
    assert not h.session.user.bytes


def test_a_request_that_is_done_and_expires_before_its_bytes_have_arrived_is_counted_once() -> None:
    h = Host()
    s = h.socket(1)
    h.request("other", 60.0)
    h.request("r", 0.1, ttl=0.2)
    h.transfer("t", s, SIZE, request="r")
    h.send(s, SIZE, acked=False)
    h.done("r", What.REQUEST)
    for _ in range(5):
        h.tick(0.2)
    assert h.counted == (0, 0, 1)
    assert list(h.session.requests) == ["other"]
    assert h.engine.books.requests.n == 1


def test_marks_of_single_connections_that_are_over_give_way_to_new_ones() -> None:
    h = Host(limits=LimitsConfig(max_marks_per_session=4))
    kept = h.socket(99)
    h.engine.apply(h.session, MarkHint(exact_tuple(kept.endpoints), Stage.COLLECTIVE), h.now)
    h.tick(0.001)
    for i in range(20):
        s = h.socket(i + 1)
        h.engine.apply(h.session, MarkHint(exact_tuple(s.endpoints), Stage.COLLECTIVE), h.now)
        h.tick(0.001)
        assert h.band(s) == h.band(kept) == "level 0"
        h.kernel.close(s)
        h.tick(0.001)
    assert len(h.session.marks) == 4


def test_the_first_hint_of_a_connection_by_addresses_may_come_behind_several_transfers() -> None:
    h = Host()
    s = h.socket(1)
    h.send(s, 3 * SIZE)
    h.tick(0.001)
    h.request("r", 60.0)
    for i in range(3):
        h.transfer(f"t{i}", exact_tuple(s.endpoints), SIZE)
    h.tick(0.001)
    assert len(h.session.transfers) == 3
    h.tick(1.5)
    h.tick(0.1)
    assert h.counted[0] == 3


def test_a_hint_by_addresses_that_comes_while_the_one_before_it_is_not_acknowledged_yet() -> None:
    h = Host()
    s = h.socket(1)
    h.request("r", 60.0)
    there = exact_tuple(s.endpoints)
    h.transfer("t0", there, SIZE)
    h.tick(0.001)
    h.send(s, SIZE, acked=False)
    for i in range(1, 4):
        h.send(s, SIZE // 2, acked=False)
        h.transfer(f"t{i}", there, SIZE)
        h.tick(0.001)
        h.send(s, SIZE - SIZE // 2, acked=False)
    h.ack(s, s.unsent_plus_unacked)
    h.tick(0.3)
    assert h.session.transfers
    s.last_ack_ms = 1500
    h.tick(1.5)
    h.tick(0.1)
    assert h.counted[0] == 4


@pytest.mark.parametrize("closes", [False, True], ids=["one connection", "one each"])
@pytest.mark.parametrize("seed", range(25))
def test_however_late_hints_by_addresses_are_nothing_is_missing_in_the_end(seed: int, *, closes: bool) -> None:
    h, count, chance = Host(slots=256), 12, Random(seed)
    h.request("r", 600.0)
    there = TupleSelector(None, ip_address("10.0.0.2"), PortRange(), PortRange(6000, 6000), 6)
    h.transfer("t0", there, SIZE)
    h.tick(0.001)
    s, said = h.socket(1), 1
    for i in range(count):
        if closes and i:
            h.kernel.close(s)
            s = h.socket(i + 1)
        part = chance.randrange(SIZE)
        for some in (part, SIZE - part):
            h.send(s, some, acked=chance.random() < 0.5)
            while said <= i and chance.random() < 0.4:
                h.transfer(f"t{said}", there, SIZE)
                said += 1
            if chance.random() < 0.5:
                h.tick(0.001)
            if chance.random() < 0.5:
                h.ack(s, s.unsent_plus_unacked)
    for i in range(said, count):
        h.transfer(f"t{i}", there, SIZE)
    h.ack(s, s.unsent_plus_unacked)
    s.last_ack_ms = 1500
    for _ in range(20):
        h.tick(0.1)
    assert h.counted[0] == count
