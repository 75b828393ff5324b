# SPDX-License-Identifier: Apache-2.0
"""When a transfer is done: on TCP's word, however the counters drift."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.harness import MSS, Host, exact_tuple

from mfsd.ground.model import EndHint, EventKind, PortRange, Stage, TupleSelector, What


def test_bytes_stuck_in_the_qdisc_do_not_count_as_delivered() -> None:
    h = Host()
    s = h.socket(1)
    h.request("r", 5.0)
    h.transfer("t", s, 100_000)
    h.tick()
    h.send(s, 100_000, acked=False)
    h.tick(0.01)
    assert h.engine.books.transfers.n == 1
    view = h.engine.steering.views(h.now).transfers
    assert view.left[0] == 100_000  # all of it may still be in the queue
    h.ack(s, 100_000)
    h.tick(0.01)
    assert h.engine.books.transfers.n == 0
    assert h.engine.books.counters.transfers_completed == 1


def test_transfers_are_retired_in_the_order_of_their_bytes() -> None:
    h = Host()
    s = h.socket(1)
    h.request("r", 5.0)
    for name in "abc":
        h.transfer(name, s, 10 * MSS)
    h.tick()
    h.send(s, 15 * MSS)
    h.tick(0.01)
    assert sorted(h.session.transfers) == ["b", "c"]
    h.send(s, 15 * MSS)
    h.tick(0.01)
    assert not h.session.transfers


def test_retransmissions_do_not_retire_the_next_transfer() -> None:
    h = Host()
    s = h.socket(1)
    h.request("r", 5.0)
    h.transfer("a", s, 100 * MSS)
    h.tick()
    h.send(s, 100 * MSS)
    h.table.rows[h.keys.cookies[1]]["bytes"] += 100 * (MSS + 66)  # the classifier saw everything twice
    h.tick(0.01)
    h.transfer("b", s, 50 * MSS)
    h.tick(0.01)
    assert list(h.session.transfers) == ["b"]
    h.send(s, 50 * MSS)
    h.tick(0.01)
    assert not h.session.transfers


def test_a_connection_in_use_before_its_first_hint_starts_from_there() -> None:
    h = Host()
    s = h.socket(1)
    s.bytes_acked = 123_456_789
    h.request("r", 5.0)
    h.transfer("t", s, 20 * MSS)
    h.tick()
    h.send(s, 20 * MSS)
    h.tick(0.01)
    assert h.engine.books.transfers.n == 0


def test_completion_waits_for_what_tcp_still_holds() -> None:
    h = Host()
    s = h.socket(1)
    h.request("r", 5.0)
    h.transfer("t", s, 100 * MSS)
    h.tick()
    h.send(s, 60 * MSS, acked=False)  # less than announced, and that is all there is
    h.engine.apply(h.session, EndHint(What.REQUEST, "r"), h.now)
    h.tick(0.01)
    assert h.engine.books.transfers.n == 1
    h.ack(s, 60 * MSS)
    h.tick(0.01)
    assert h.engine.books.transfers.n == 0
    assert h.engine.books.requests.n == 0
    assert h.engine.books.counters.deadlines_met == 1


def test_a_request_that_ends_late_counts_as_missed() -> None:
    h = Host()
    s = h.socket(1)
    h.request("r", 0.05)
    h.transfer("t", s, MSS)
    h.tick()
    h.engine.apply(h.session, EndHint(What.REQUEST, "r"), h.now)
    h.send(s, MSS, acked=False)
    h.tick(0.1)
    h.ack(s, MSS)
    h.tick(0.01)
    assert (h.engine.books.counters.deadlines_met, h.engine.books.counters.deadlines_missed) == (0, 1)


def test_cancelling_closes_the_gap_for_those_behind() -> None:
    h = Host()
    s = h.socket(1)
    h.request("r", 5.0)
    h.transfer("a", s, 100 * MSS)
    h.transfer("b", s, 10 * MSS)
    h.tick()
    h.send(s, 30 * MSS)
    h.tick(0.01)
    h.engine.apply(h.session, EndHint(What.TRANSFER, "a", cancelled=True), h.now)
    h.send(s, 10 * MSS)
    h.tick(0.01)
    assert not h.session.transfers


def test_a_transfer_over_several_lanes_is_done_when_their_sum_is() -> None:
    h = Host()
    lanes = [h.socket(i) for i in (1, 2, 3, 4)]
    any_lane = TupleSelector(
        lanes[0].endpoints.src, lanes[0].endpoints.dst, PortRange(0, 65535), PortRange(6000, 6000), 6
    )
    h.request("r", 5.0)
    h.transfer("t", any_lane, 400 * MSS)
    h.tick()
    assert [h.band(s) for s in lanes] == ["level 4"] * 4
    assert h.engine.books.transfers.n == 1
    h.send(lanes[0], 390 * MSS)
    h.tick(0.01)
    assert h.session.transfers
    h.send(lanes[2], 10 * MSS)
    h.tick(0.01)
    h.tick(0.01)
    assert not h.session.transfers
    assert h.engine.books.counters.transfers_completed == 1


def test_a_socket_of_elsewhere_is_matched_by_tuple_and_done_when_its_lane_is_empty() -> None:
    h = Host()
    s = h.socket(7)
    h.kernel.vanish(s)  # in another namespace, behind a bridge
    h.request("r", 5.0)
    h.transfer("t", exact_tuple(s.endpoints), 10 * MSS)
    slot = h.keys.tuples[s.endpoints]
    h.tick()
    row = h.table.rows[slot]
    row["sent"], row["last_ns"] = 10 * MSS, int(h.now * 1e9)
    h.device.queued[int(row["band"]), int(row["lane"])] = 5000
    h.tick(0.1)
    assert h.engine.books.transfers.n == 1
    h.device.queued.clear()
    h.tick(0.01)
    assert h.engine.books.transfers.n == 0


def test_a_dead_socket_is_noticed_and_its_slot_freed() -> None:
    h = Host()
    s = h.socket(1)
    h.request("r", 5.0)
    h.transfer("t", s, MSS)
    h.tick()
    h.send(s, MSS, acked=False)
    h.kernel.close(s, clean=False)
    h.tick(0.01)
    assert h.table.taken == 0
    assert [e.kind for e in h.session.events] == [EventKind.CONNECTION_GONE]


def test_a_socket_that_vanishes_without_a_word_is_noticed() -> None:
    h = Host()
    s = h.socket(1)
    h.request("r", 5.0)
    h.transfer("t", s, MSS)
    h.tick()
    h.send(s, MSS, acked=False)
    h.kernel.vanish(s)
    h.tick(0.01)
    assert h.session.transfers  # the word of its end may be on its way
    h.tick(0.01)
    assert h.table.taken == 0
    assert [e.kind for e in h.session.events] == [EventKind.CONNECTION_GONE]


def test_a_cookie_that_no_socket_has_is_reported() -> None:
    h = Host()
    s = h.socket(1)
    h.kernel.sockets.clear()
    h.request("r", 60.0)
    h.transfer("t", s, MSS)
    h.tick()
    for _ in range(90):
        h.tick(0.1)
        assert h.table.taken == 1  # it may be about to connect
    for _ in range(30):
        h.tick(0.1)
    assert h.table.taken == 0
    assert [e.kind for e in h.session.events] == [EventKind.CONNECTION_GONE]


@pytest.mark.parametrize("earlier", [0.3, 8.0])
def test_a_hint_may_be_earlier_than_its_socket(earlier: float) -> None:
    h = Host()
    s = h.socket(1)
    h.kernel.sockets.clear()
    h.request("r", 15.0)
    h.transfer("t", s, MSS)
    for _ in range(10):
        h.tick(earlier / 10)
    h.kernel.connect(s)
    h.tick(0.3)
    h.send(s, MSS)
    h.tick(0.01)
    assert not h.session.transfers
    assert h.engine.books.counters.transfers_completed == 1


def test_a_selector_waits_for_its_connection_and_has_its_first_byte() -> None:
    h = Host()
    s = h.socket(1)
    h.kernel.vanish(s)
    h.request("r", 5.0)
    h.tick()
    rule = TupleSelector(None, s.endpoints.dst, PortRange(0, 65535), PortRange(6000, 6010), 6)
    h.transfer("t", rule, MSS, Stage.COLLECTIVE)
    h.tick()
    assert h.table.taken == 0
    h.kernel.connect(s)
    assert h.band(s) == "level 0"  # before the engine has heard of it
    h.send(s, MSS)
    h.tick(0.05)
    assert not h.session.transfers
    assert h.engine.books.counters.transfers_completed == 1


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=12),
    chunks=st.lists(st.integers(1, 40), min_size=1, max_size=60),
)
def test_every_transfer_ends_exactly_when_its_bytes_have(sizes: list[int], chunks: list[int]) -> None:
    h = Host()
    s = h.socket(1)
    h.request("r", 500.0)
    for i, size in enumerate(sizes):
        h.transfer(str(i), s, size * MSS)
    h.tick()
    moved = 0
    for chunk in chunks:
        part = min(chunk, sum(sizes) - moved)
        if not part:
            break
        h.send(s, part * MSS)
        moved += part
        h.tick(0.01)
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        assert sorted(h.session.transfers, key=int) == [str(i) for i, end in enumerate(ends) if end > moved]
