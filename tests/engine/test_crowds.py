# SPDX-License-Identifier: Apache-2.0
"""Very many of something: what ends ends in one pass, no tick takes long, and nothing outlives its session."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.crowds import FEW, MANY, MORE, crowd, is_one_pass
from support.harness import Host

from mfsd.engine import delivery, steering
from mfsd.engine.books import Books
from mfsd.engine.endings import AT_ONCE, ROOM, ROOM_BESIDE
from mfsd.engine.engine import CAUGHT_UP
from mfsd.engine.records import EVENTS_KEPT, TRANSFER_COLUMNS
from mfsd.engine.steering import FEASIBLE_S
from mfsd.engine.views import BESIDE, SHOWN, Shown
from mfsd.ground.bands import LEVEL_NEW
from mfsd.ground.model import (
    CookieSelector,
    EndHint,
    EventKind,
    RequestHint,
    Stage,
    TransferHint,
    What,
)


class Row:
    row = -1


def all_end_some_at_a_time(h: Host, tick: float) -> None:
    for _ in range(3 * MANY // AT_ONCE):
        before = h.engine.books.transfers.n
        assert is_one_pass(lambda: h.tick(tick))
        ended = before - h.engine.books.transfers.n
        assert ended <= ROOM + 2 * AT_ONCE
        if not h.engine.books.transfers.n:
            return
    pytest.fail(f"{h.engine.books.transfers.n} transfers are left")


@pytest.mark.parametrize("ordered", [True, False])
def test_a_session_of_very_many_transfers_ends_in_one_pass(*, ordered: bool) -> None:
    h, sock = crowd(MANY, ordered=ordered)
    h.send(sock, 1000 * MANY // 2)
    assert is_one_pass(lambda: h.engine.end_session(h.session, h.now))
    all_end_some_at_a_time(h, 0.05)
    opened = len(h.engine.books.streams)
    assert opened == 0
    assert h.session.user.transfers == h.engine.books.everybody.transfers == 0


@pytest.mark.parametrize("clean", [True, False])
def test_a_connection_of_very_many_transfers_ends_some_at_a_time(*, clean: bool) -> None:
    h, sock = crowd(MANY)
    h.send(sock, 1000 * MANY if clean else 1000)
    h.kernel.close(sock, clean=clean)
    all_end_some_at_a_time(h, 0.01)
    completed = h.engine.books.counters.transfers_completed
    assert completed == (MANY if clean else 1)
    streams = len(h.session.streams)
    assert streams == 0
    opened = len(h.engine.books.streams)
    assert opened == 0
    assert sum(e.kind is EventKind.CONNECTION_GONE for e in h.session.events) <= EVENTS_KEPT
    again = h.socket(5)
    h.transfer("again", again, 1000)  # nothing of the old stream is in its way
    h.send(again, 1000)
    h.tick(0.01)
    left = len(h.session.transfers)
    assert left == 0


def test_what_has_arrived_is_struck_out_as_fast_as_hints_come() -> None:
    """Not only at ticks, of which there are few while hints come by the thousand."""
    h, sock = crowd(4 * ROOM)
    h.send(sock, 1000 * 4 * ROOM)
    h.now += 0.01
    h.engine.endings.deliver([(list(h.session.transfers.values()), h.now)], h.now)
    left = h.engine.books.transfers.n
    assert left == 3 * ROOM  # that was this tick's part
    h.now += 0.2
    for _ in range(2 * ROOM // CAUGHT_UP):
        h.engine.gather(h.now, on=True)
        h.engine.gather(h.now, on=False)
    left = h.engine.books.transfers.n
    assert left == ROOM
    h.request("after", 5.0)
    h.tick(0.01)
    assert not h.session.transfers
    assert h.engine.books.counters.transfers_completed == 4 * ROOM
    assert {x.ended for x in h.engine.books.tally.of_request("r")} == {h.now - 0.21}  # when it had arrived
    request = h.session.requests["r"]
    assert request.delivered_at == h.now - 0.21


def test_a_tick_looks_through_so_many_and_the_next_one_through_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "LOOK_MAX", 10)
    h = Host()
    h.request("r", 20.0)
    socks = [h.socket(i) for i in range(1, 9)]
    for k, sock in enumerate(socks):
        for i in range(4):
            h.transfer(f"{k}/{i}", sock, 1000)
    h.tick(0.01)
    h.engine.apply(h.session, EndHint(What.REQUEST, "r"), h.now)  # though nothing was written
    left = []
    for _ in range(3):
        h.tick(0.01)
        left.append(len(h.session.transfers))
    assert left == [20, 8, 0]


def test_all_who_cannot_be_in_time_are_known_at_once_and_told_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steering, "TELL_MAX", 10)
    h = Host()
    sock = h.socket(1)
    for i in range(25):
        h.request(str(i), 0.02)
        h.transfer(str(i), sock, 1 << 40, request=str(i))
    told = []
    for _ in range(3):
        h.tick(FEASIBLE_S + 0.01)
        assert h.engine.books.transfers.live("infeasible").all()
        told.append([e.transfer_id for e in h.session.events if e.kind is EventKind.INFEASIBLE])
    assert [len(part) for part in told] == [10, 20, 25]
    assert len(set(told[-1])) == 25


@pytest.mark.parametrize("ordered", [True, False])
def test_very_many_transfers_expire_some_at_a_time(*, ordered: bool) -> None:
    h, _ = crowd(MANY, ordered=ordered)
    h.now += 100.0
    rounds = 0
    while h.engine.books.transfers.n:
        before = h.engine.books.transfers.n
        assert is_one_pass(lambda: h.tick(0.11))
        rounds += 1
        assert before - h.engine.books.transfers.n <= 2 * AT_ONCE
    assert rounds <= MANY / AT_ONCE + 1
    assert h.session.user.bytes == 0


def test_a_request_of_very_many_transfers_is_cancelled_without_a_word() -> None:
    h, _ = crowd(MANY)
    h.session.events.clear()
    cancel = EndHint(What.REQUEST, "r", cancelled=True)
    assert is_one_pass(lambda: h.engine.apply(h.session, cancel, h.now))
    assert "r" not in h.session.requests
    for _ in range(MANY // AT_ONCE + 2):
        h.tick(0.11)
    assert not h.session.transfers
    assert not [e for e in h.session.events if e.kind is EventKind.EXPIRED]
    assert h.engine.books.counters.transfers_expired == 0


def test_handed_over_transfers_whose_peer_never_reads_cost_little() -> None:
    h, sock = crowd(FEW)
    h.send(sock, 1000 * FEW, acked=False)
    h.engine.end_session(h.session, h.now)
    h.tick(0.01)
    for _ in range(20):
        assert is_one_pass(lambda: h.tick(0.01), FEW)
    assert h.engine.books.transfers.n == FEW
    h.ack(sock, 1000 * FEW)
    h.tick(0.5)
    h.tick(0.01)
    assert h.engine.books.transfers.n == 0


def test_very_many_streams_that_wait_take_turns() -> None:
    h = Host(slots=4096, limits=MORE)
    h.request("r", 20.0)
    socks = [h.socket(i) for i in range(1, 2001)]
    for sock in socks:
        h.transfer(str(sock.cookie), sock, 1000)
        h.send(sock, 1000, acked=False)
    h.engine.end_session(h.session, h.now)
    h.tick(0.01)  # also looks whether some are gone
    h.kernel.asked = 0
    h.tick(0.01)
    assert h.kernel.asked <= 2 * 64
    for sock in socks:
        h.ack(sock, 1000)
    for _ in range(100):
        h.tick(0.01)
    assert h.engine.books.transfers.n == 0
    assert h.engine.books.counters.transfers_completed == 2000


@given(
    st.lists(st.tuples(st.integers(0, 100), st.integers(1, 50), st.booleans()), min_size=1, max_size=8),
    st.integers(0, 120),
)
def test_interleaved_bytes_are_shared_as_if_one_ended_after_the_other(
    announced: list[tuple[int, int, bool]], offset: int
) -> None:
    h = Host()
    sock = h.socket(1)
    h.request("r", 20.0)
    for i, (_, size, _) in enumerate(announced):
        h.transfer(str(i), sock, size, ordered=False)
    stream = h.session.streams[CookieSelector(1)]
    h.tick()
    t = h.engine.books.transfers
    starts = sorted(start for start, _, _ in announced)
    for transfer, start in zip(stream.queue, starts, strict=True):
        t.put(transfer, "start", float(start))
        t.put(transfer, "end", float(start + t.get(transfer, "size")))
    h.send(sock, offset)
    ended = {x for x, (_, _, over) in zip(stream.queue, announced, strict=True) if over}
    want = {}
    for other in stream.queue:
        began = float(t.get(other, "start"))
        for one in ended:
            since, own = float(t.get(one, "start")), float(t.get(one, "size"))
            began += max(min(own, offset - max(began, since)), 0.0)
        want[other] = began
    h.engine.endings.gaps.uncount(stream, list(ended), delivered=True)
    assert all(t.get(x, "start") == pytest.approx(want[x]) for x in stream.queue if x not in ended)
    assert all(t.get(x, "end") - t.get(x, "start") == t.get(x, "size") for x in stream.queue)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(0, 5)), min_size=1, max_size=20),
    st.integers(0, 5),
)
def test_interleaved_bytes_are_those_of_whoever_was_announced_by_then(
    announced: list[tuple[int, int, int]], last: int
) -> None:
    """Transfers of several connections, each after so many megabytes of the one that it is announced on."""
    h, mb = Host(), 1_000_000
    socks = [h.socket(i) for i in range(1, 5)]
    h.request("r", 20.0)
    moved: dict[str, float] = {}
    of: dict[str, int] = {}

    def send(which: int, count: int) -> None:
        h.send(socks[which], count * mb)
        sharing = [name for name in of if of[name] == which]
        for name in sharing:
            moved[name] += count * mb / len(sharing)

    for i, (which, size, before) in enumerate(announced):
        send(which, before)
        of[str(i)], moved[str(i)] = which, 0.0
        h.transfer(str(i), socks[which], size * 200 * mb, ordered=False)
        h.tick()
    for which in range(4):
        send(which, last)
    view = h.engine.steering.views(h.now, h.connections.positions.moved(h.engine.books.streams)).transfers
    for transfer, left in zip(h.engine.books.transfers.objects, view.left.tolist(), strict=True):
        whole = float(h.engine.books.transfers.get(transfer, "size"))
        assert left == pytest.approx(whole - moved[transfer.id])


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40)), min_size=1, max_size=20))
def test_what_stands_before_interleaved_bytes(announced: list[tuple[int, int]]) -> None:
    h = Host()
    socks = [h.socket(i) for i in range(1, 5)]
    h.request("r", 20.0)
    for i, (which, size) in enumerate(announced):
        h.transfer(str(i), socks[which], size * 100_000, ordered=False)
    h.tick()
    view = h.engine.steering.views(h.now, h.connections.positions.moved(h.engine.books.streams)).transfers
    rows = h.engine.books.transfers.objects
    for transfer, ahead in zip(rows, view.ahead.tolist(), strict=True):
        sizes = [100_000 * s for w, s in announced if socks[w].cookie == transfer.stream.selector.cookie]  # type: ignore[union-attr]
        own = float(h.engine.books.transfers.get(transfer, "size"))
        assert ahead == pytest.approx(np.minimum(sizes, own).sum() - own)


def test_a_policy_is_shown_so_many_at_a_time_and_of_every_user_some() -> None:
    h, sock = crowd(SHOWN + 5000)
    other = h.engine.session("other", h.now, uid=7)
    h.engine.apply(other, RequestHint("r", h.now + 20.0), h.now)
    mine = h.socket(2, uid=7)
    for i in range(3):
        hint = TransferHint(str(i), "r", "", Stage.P2D, 0, 1000, CookieSelector(mine.cookie))
        h.engine.apply(other, hint, h.now)
    h.tick(0.01)
    rows, t = Shown().rows(h.engine.books, h.now), h.engine.books.transfers
    assert rows is not None
    assert len(rows) == BESIDE + 3  # beside another user
    assert all(t.get(x, "level") != LEVEL_NEW for x in other.transfers.values())
    waiting = [x for x in h.session.transfers.values() if t.get(x, "level") == LEVEL_NEW]
    ahead = [x for x in waiting if int(x.id) < 1000]
    assert (len(waiting), len(ahead)) == (5000, 0)  # those that are sent first are shown first
    for _ in range((SHOWN + 5000) // BESIDE):
        h.send(sock, 1000 * BESIDE)
        for _ in range(BESIDE // ROOM_BESIDE + 1):
            h.tick(0.01)
    assert sum(t.get(x, "level") == LEVEL_NEW for x in h.session.transfers.values()) == 0


def test_a_connection_whose_transfers_are_not_shown_yet_is_where_its_stage_is() -> None:
    h, _ = crowd(SHOWN + 1)
    late = h.socket(2)
    h.now += 1.0
    h.transfer("late", late, 1000, stage=Stage.COLLECTIVE)
    h.tick(0.01)
    assert h.engine.books.transfers.get(h.session.transfers["late"], "level") == LEVEL_NEW
    assert h.band(late) == "level 0"


@given(st.lists(st.integers(0, 40_000), min_size=1, max_size=6))
def test_what_is_shown_is_shared_evenly(have: list[int]) -> None:
    books = Books()
    books.streams.owner = np.arange(len(have), dtype=np.int32)
    stream = np.repeat(np.arange(len(have), dtype=np.int32), have)
    objects: list[Any] = [Row() for _ in stream]
    values = [np.zeros(len(stream), dtype=kind) for kind in TRANSFER_COLUMNS.values()]
    values[list(TRANSFER_COLUMNS).index("stream")] = stream
    books.transfers.extend(objects, values)
    rows = Shown().rows(books, 0.0)
    each = SHOWN if np.count_nonzero(have) == 1 else BESIDE
    wanted = sum(min(h, each) for h in have)
    if wanted == sum(have) <= SHOWN:
        assert rows is None
        return
    assert rows is not None
    got = np.bincount(stream[rows], minlength=len(have))
    assert min(wanted, SHOWN - len(have) + 1) <= got.sum() <= min(wanted, SHOWN)
    assert len(set(rows.tolist())) == len(rows)
    most = got.max()
    assert all(g in (h, most) for g, h in zip(got.tolist(), have, strict=True))
