# SPDX-License-Identifier: Apache-2.0
"""What is refused, what is freed, and that the books always balance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from support.harness import Host

from mfsd.engine.endings import AT_ONCE
from mfsd.engine.engine import DROPPED_AT_ONCE, HOUSEKEEPING_S, LINGER_S
from mfsd.engine.settings import LimitsConfig
from mfsd.ground.model import (
    BatchHint,
    CookieSelector,
    EndHint,
    EventKind,
    HintError,
    MarkHint,
    Mode,
    ProgressHint,
    RequestHint,
    Stage,
    TransferHint,
    What,
)

if TYPE_CHECKING:
    from mfsd.engine.columns import Dense


def test_a_full_table_names_the_limit_and_frees_up_again() -> None:
    h = Host(slots=2)
    h.request("r", 5.0)
    socks = [h.socket(i) for i in (1, 2, 3)]
    h.transfer("a", socks[0], 10)
    h.transfer("b", socks[1], 10)
    with pytest.raises(HintError, match=r"table is full.*daemon\.slots") as e:
        h.transfer("c", socks[2], 10)
    assert e.value.exhausted
    assert "c" not in h.session.transfers
    h.engine.apply(h.session, EndHint(What.TRANSFER, "a", cancelled=True), h.now)
    h.tick(LINGER_S + 0.2)
    h.transfer("c", socks[2], 10)
    assert h.table.taken == 2


def test_very_many_idle_connections_are_forgotten_some_at_a_time() -> None:
    h = Host(slots=256)
    h.request("r", 5.0)
    for i in range(DROPPED_AT_ONCE + 10):
        h.transfer(f"t{i}", h.socket(i + 1), 10)
    h.engine.apply(h.session, EndHint(What.REQUEST, "r", cancelled=True), h.now)
    h.tick(LINGER_S + 0.2)
    assert len(h.connections) == 10
    h.tick(0.001)
    assert not len(h.connections)


@pytest.mark.parametrize("stage", [Stage.KV_REUSE, Stage.P2D])
def test_unknown_owners_are_refused_but_for_collectives(stage: Stage) -> None:
    h = Host()
    with pytest.raises(HintError, match=r"transfer\.request_id.*announce it"):
        h.transfer("t", h.socket(1), 10, stage, request="nobody")
    h.transfer("t", h.socket(2), 10, Stage.COLLECTIVE, request="nobody")


def test_ids_are_unique() -> None:
    h = Host()
    h.request("r", 5.0)
    h.transfer("t", h.socket(1), 10)
    with pytest.raises(HintError, match=r"transfer\.id"):
        h.transfer("t", h.socket(1), 10)


def test_counts_are_bounded_per_session() -> None:
    h = Host(limits=LimitsConfig(max_requests_per_session=2, max_transfers_per_session=1))
    h.request("a", 5.0)
    h.request("b", 5.0)
    h.request("a", 9.0)  # a renewal is no new request
    with pytest.raises(HintError, match="max_requests_per_session"):
        h.request("c", 5.0)
    h.transfer("t", h.socket(1), 10, request="a")
    with pytest.raises(HintError, match="max_transfers_per_session"):
        h.transfer("u", h.socket(1), 10, request="a")


def test_batches_and_marks_are_bounded_per_session() -> None:
    h = Host(limits=LimitsConfig(max_batches_per_session=1, max_marks_per_session=1))
    h.engine.apply(h.session, BatchHint("a"), h.now)
    h.engine.apply(h.session, BatchHint("a"), h.now)
    with pytest.raises(HintError, match="max_batches_per_session"):
        h.engine.apply(h.session, BatchHint("b"), h.now)
    h.engine.apply(h.session, MarkHint(CookieSelector(1), Stage.P2D), h.now)
    h.engine.apply(h.session, MarkHint(CookieSelector(1), Stage.COLLECTIVE), h.now)
    with pytest.raises(HintError, match="max_marks_per_session"):
        h.engine.apply(h.session, MarkHint(CookieSelector(2), Stage.P2D), h.now)


def test_sessions_are_bounded() -> None:
    h = Host(limits=LimitsConfig(max_sessions=2))
    h.engine.session("second", h.now, pid=7)
    with pytest.raises(HintError, match="max_sessions"):
        h.engine.session("third", h.now, pid=8)


def test_the_end_of_a_process_frees_all_it_said() -> None:
    h = Host()
    session = h.engine.session("w", h.now, pid=7)
    s = h.socket(1)
    h.engine.apply(session, RequestHint("r", h.now + 5), h.now)
    h.engine.apply(session, BatchHint("b", ["r"], 4), h.now)
    h.engine.apply(session, TransferHint("t", "r", "", Stage.P2D, 0, 10, CookieSelector(1)), h.now)
    h.engine.apply(session, MarkHint(CookieSelector(1), Stage.P2D), h.now)
    h.tick()
    assert h.band(s).startswith("level")
    h.engine.end_session(session, h.now)
    again = h.engine.session("w", h.now)
    h.engine.end_session(session, h.now)  # the second time, when another one has its name
    assert h.engine.session("w", h.now) is again
    h.engine.end_session(again, h.now)
    h.tick(0.01)
    assert (h.engine.books.requests.n, h.engine.books.batches.n, h.engine.books.transfers.n) == (0, 0, 0)
    h.tick(LINGER_S + 0.2)
    assert h.table.taken == 0
    assert not h.keys.cookies


def test_what_nobody_completes_expires() -> None:
    h = Host()
    h.engine.apply(h.session, RequestHint("r", h.now + 1, ttl=2.0), h.now)
    hint = TransferHint("t", "r", "", Stage.P2D, 0, 10, CookieSelector(h.socket(1).cookie), ttl=2.0)
    h.engine.apply(h.session, hint, h.now)
    h.tick()
    h.tick(3.5)
    assert (h.engine.books.requests.n, h.engine.books.transfers.n) == (0, 0)
    assert EventKind.EXPIRED in [e.kind for e in h.session.events]
    assert h.engine.books.counters.transfers_expired == 1
    assert h.engine.books.counters.deadlines_missed == 1


def test_very_many_requests_expire_some_at_a_time() -> None:
    h = Host()
    for i in range(AT_ONCE + 10):
        h.request(f"r{i}", 1.0, ttl=2.0)
    h.tick(3.5)
    assert h.engine.books.requests.n == 10
    h.tick(HOUSEKEEPING_S)
    assert h.engine.books.requests.n == 0
    assert h.engine.books.counters.deadlines_missed == AT_ONCE + 10


def test_the_slot_expires_in_the_kernel_with_the_hint() -> None:
    h = Host()
    h.request("r", 1.0, ttl=2.0)
    h.engine.apply(
        h.session, TransferHint("t", "r", "", Stage.P2D, 0, 10, CookieSelector(h.socket(1).cookie), ttl=2.0), h.now
    )
    slot = h.keys.cookies[1]
    assert h.table.expires_ns[slot] == pytest.approx((h.now + 3.0) * 1e9)


def test_peers_that_are_gone_leave_no_trace() -> None:
    h = Host(slots=4)
    h.request("r", 1000.0)
    for i in range(1, 200):
        s = h.socket(i, dst=f"10.0.{i >> 4}.{i & 15}")
        h.transfer(f"t{i}", s, 10)
        h.tick()
        h.kernel.close(s)
        h.send(s, 10)
        h.tick(0.01)
    assert h.table.taken == 0
    assert len(h.connections.peers) <= 2


def test_modes() -> None:
    h = Host()
    seen = [h.engine.steers]
    for change in (h.engine.pause, h.engine.resume, lambda: h.engine.set_mode(Mode.OBSERVE)):
        change()
        seen.append(h.engine.steers)
    assert seen == [True, False, True, False]


class Books(RuleBasedStateMachine):
    """Any sequence of hints and ticks leaves rows, links and slots consistent."""

    @initialize()
    def start(self) -> None:
        self.h = Host(slots=8, limits=LimitsConfig(max_transfers_per_session=20, max_requests_per_session=6))
        self.socks = [self.h.socket(i) for i in range(1, 10)]
        self.n = self.refused = 0

    def attempt(self, hint: object) -> None:
        try:
            self.h.engine.apply(self.h.session, hint, self.h.now)  # type: ignore[arg-type]
        except HintError:
            self.refused += 1

    @rule(r=st.integers(0, 7), left=st.floats(-1, 20), b=st.sampled_from(["", "b0", "b1"]))
    def request(self, r: int, left: float, b: str) -> None:
        self.attempt(RequestHint(f"r{r}", self.h.now + left, batch_id=b, ttl=3.0))

    @rule(b=st.integers(0, 2), rs=st.lists(st.integers(0, 7), max_size=4))
    def batch(self, b: int, rs: list[int]) -> None:
        self.attempt(BatchHint(f"b{b}", [f"r{r}" for r in rs], 8, 0, 0.01))

    @rule(b=st.sampled_from(["b0", "b1", "r0", "r3"]), layer=st.integers(0, 9), done=st.booleans())
    def progress(self, b: str, layer: int, done: bool) -> None:  # noqa: FBT001 - hypothesis draws it
        self.attempt(ProgressHint(b, layer, done))

    @rule(
        r=st.integers(0, 7),
        c=st.integers(1, 12),
        size=st.integers(1, 10**6),
        stage=st.sampled_from([Stage.KV_REUSE, Stage.COLLECTIVE, Stage.P2D]),
    )
    def transfer(self, r: int, c: int, size: int, stage: Stage) -> None:
        self.n += 1
        self.attempt(TransferHint(f"t{self.n}", f"r{r}", "", stage, 1, size, CookieSelector(c), ttl=5.0))

    @rule(what=st.sampled_from(list(What)), i=st.integers(0, 12), cancelled=st.booleans())
    def end(self, what: What, i: int, cancelled: bool) -> None:  # noqa: FBT001 - hypothesis draws it
        self.attempt(EndHint(what, f"{'trb'[what]}{i}", cancelled))

    @rule(c=st.integers(1, 12), stage=st.sampled_from(list(Stage)))
    def mark(self, c: int, stage: Stage) -> None:
        self.attempt(MarkHint(CookieSelector(c), stage))

    @rule(i=st.integers(0, 8), payload=st.integers(1, 10**6), acked=st.booleans())
    def send(self, i: int, payload: int, acked: bool) -> None:  # noqa: FBT001 - hypothesis draws it
        self.h.send(self.socks[i], payload, acked=acked)

    @rule(i=st.integers(0, 8))
    def close(self, i: int) -> None:
        if self.socks[i] in self.h.kernel.sockets:
            self.h.kernel.close(self.socks[i], clean=bool(i % 2))

    @rule(dt=st.sampled_from([0.001, 0.01, 0.3, 6.0]))
    def tick(self, dt: float) -> None:
        self.h.tick(dt)

    @invariant()
    def balanced(self) -> None:
        e = self.h.engine
        stores: tuple[Dense[Any], ...] = (e.books.transfers, e.books.requests, e.books.batches)
        for store in stores:
            assert [store.row(o) for o in store.objects] == list(range(store.n))
        for t in e.books.transfers.objects:
            assert e.books.transfers.get(t, "request") == (-1 if t.request is None else t.request.row)
            assert e.books.transfers.get(t, "batch") == (-1 if t.batch is None else t.batch.row)
            assert e.books.transfers.get(t, "stream") == t.stream.index
            assert t.request is None or (t in t.request.transfers and t.request.row >= 0)
            assert t.batch is None or (t in t.batch.transfers and t.batch.row >= 0)
            assert t.computed_in is None or t.computed_in.row >= 0
            assert t in t.stream.queue
            assert t.session.transfers[t.id] is t
        for r in e.books.requests.objects:
            assert e.books.requests.get(r, "batch") == (-1 if r.batch is None else r.batch.row)
        conns = e.connections.by_slot
        assert self.h.table.taken == len(conns) == len(self.h.keys.cookies)
        streams = list(e.books.streams.all())
        assert sum(len(s.queue) for s in streams) == e.books.transfers.n
        members = e.books.streams.members
        assert [members.row(m) for m in members.objects] == list(range(members.n))
        assert {(m.stream, m.conn) for m in members.objects} == {(s, c) for s in streams for c in s.members}
        assert {(m.stream, m.conn) for m in members.objects} == {(s, c) for c in conns.values() for s in c.streams}
        assert set(e.books.transfers.objects) == set(self.h.session.transfers.values())


Books.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestBooks = Books.TestCase
