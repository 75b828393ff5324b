# SPDX-License-Identifier: Apache-2.0
"""Nothing outlives its session, and nobody takes more than a share."""

from __future__ import annotations

import pytest
from support.harness import FakeSocket, Host, exact_tuple

from mfsd.engine.connections import UNSEEN_S
from mfsd.engine.records import ENTRY
from mfsd.engine.settings import LimitsConfig
from mfsd.ground.model import (
    CookieSelector,
    EndHint,
    Endpoints,
    HintError,
    MarkHint,
    PortRange,
    ProcessSelector,
    RequestHint,
    Stage,
    TransferHint,
    TupleSelector,
    What,
)

THERE = exact_tuple(Host().socket(1).endpoints).dst


def by_port(port: int) -> TupleSelector:
    return TupleSelector(None, THERE, PortRange(), PortRange(port, port), 6)


def test_waiting_marks_end_with_their_sessions() -> None:
    h = Host(limits=LimitsConfig(max_selectors=1 << 20, max_selectors_per_user=1 << 20))
    for n in range(10):
        session = h.engine.session(f"s{n}", h.now)
        for port in range(1, 1025):
            h.engine.apply(session, MarkHint(by_port(port), Stage.COLLECTIVE), h.now)
        h.engine.end_session(session, h.now)
    while h.engine.leaving.under_way:  # some at a time
        h.tick(0.01)
    assert len(h.engine.watches) == 0
    assert not h.kernel.rules
    sock = h.socket(77)
    h.tick(0.01)
    assert sock.cookie not in h.keys.cookies
    assert h.engine.books.everybody.selectors == 0


def test_tuples_that_nothing_uses_lose_their_slots() -> None:
    h = Host(slots=256)
    h.request("r", 500.0)
    e = h.socket(1).endpoints
    for port in range(1, 101):
        selector = exact_tuple(Endpoints(e.src, port, e.dst, 9, 17))
        h.transfer(f"t{port}", selector, 1000, ttl=500.0)
    assert h.table.taken == 100
    h.tick(0.1)
    h.tick(UNSEEN_S + 0.2)
    h.tick(0.2)
    assert h.table.taken == 0


def test_who_may_name_only_its_own_needs_a_socket_for_a_tuple() -> None:
    h = Host()
    e = h.socket(1).endpoints
    udp = Endpoints(e.src, 5000, e.dst, 9, 17)
    session = h.engine.session("w", h.now, pid=7, uid=1000, only=1000)
    h.engine.apply(session, RequestHint("r", h.now + 5.0), h.now)
    hint = TransferHint("t", "r", "", Stage.P2D, 0, 1000, exact_tuple(udp))
    h.engine.apply(session, hint, h.now)
    assert h.table.taken == 0
    h.kernel.senders.append(FakeSocket(9, udp, uid=1000))
    h.engine.apply(session, TransferHint("u", "r", "", Stage.P2D, 0, 1000, exact_tuple(udp)), h.now)
    other = h.engine.session("x", h.now, pid=8, uid=1000, only=1000)
    h.engine.apply(other, RequestHint("r", h.now + 5.0), h.now)
    h.engine.apply(other, hint, h.now)
    assert h.table.taken == 1


def test_one_user_at_its_limits_leaves_room_for_others() -> None:
    limits = LimitsConfig(
        max_connections_per_user=4, max_selectors_per_user=3, max_transfers_per_user=5, max_sessions_per_user=2
    )
    h = Host(slots=16, limits=limits)
    greedy = [h.engine.session(f"g{i}", h.now, pid=i, uid=1, only=1) for i in (1, 2)]
    with pytest.raises(HintError, match="max_sessions_per_user"):
        h.engine.session("g3", h.now, pid=3, uid=1, only=1)
    socks = [h.socket(i, uid=1) for i in range(1, 8)]
    for session in greedy:
        h.engine.apply(session, RequestHint("r", h.now + 5.0), h.now)

    def said(session_hints: list[tuple[int, object]]) -> list[str]:
        out = []
        for n, hint in session_hints:
            try:
                h.engine.apply(greedy[n], hint, h.now)  # type: ignore[arg-type]
            except HintError as e:
                out.append(str(e) if e.exhausted else "something else")
        return out

    marks = said([(i % 2, MarkHint(CookieSelector(s.cookie), Stage.COLLECTIVE)) for i, s in enumerate(socks)])
    assert len(marks) == 3
    assert "max_connections_per_user" in marks[0]
    selectors = said([(i % 2, MarkHint(ProcessSelector(i + 1, None, PortRange()), Stage.COLLECTIVE)) for i in range(5)])
    assert len(selectors) == 2
    assert "max_selectors_per_user" in selectors[0]
    one = CookieSelector(socks[0].cookie)
    transfers = said([(i % 2, TransferHint(str(i), "r", "", Stage.P2D, 0, 9, one)) for i in range(8)])
    assert len(transfers) == 3
    assert "max_transfers_per_user" in transfers[0]
    honest = h.engine.session("honest", h.now, pid=9, uid=2, only=2)
    own = h.socket(50, uid=2)
    h.engine.apply(honest, RequestHint("r", h.now + 5.0), h.now)
    h.engine.apply(honest, TransferHint("t", "r", "", Stage.P2D, 0, 9, CookieSelector(own.cookie)), h.now)
    h.engine.apply(honest, MarkHint(ProcessSelector(1, None, PortRange()), Stage.COLLECTIVE), h.now)
    for session in greedy:
        h.engine.end_session(session, h.now)
    h.tick(10.0)
    h.tick(10.0)
    user = greedy[0].user
    assert (user.sessions, user.connections, user.selectors, user.transfers, user.bytes) == (0, 0, 0, 0, 0)


def test_memory_of_one_user_is_bounded() -> None:
    h = Host(limits=LimitsConfig(max_mb_per_user=0.01))
    for i in range(10_000 // (ENTRY + 1)):
        h.request(str(i), 5.0)
    with pytest.raises(HintError, match="max_mb_per_user"):
        h.request("x", 5.0)
    h.engine.apply(h.session, EndHint(What.REQUEST, "0", cancelled=True), h.now)
    h.request("x", 5.0)


def test_a_range_in_a_full_table_takes_what_there_is_and_no_tick_fails() -> None:
    h = Host(slots=16)
    socks = [h.socket(i) for i in range(1, 21)]
    h.engine.apply(h.session, MarkHint(by_port(6000), Stage.COLLECTIVE), h.now)
    for _ in range(3):
        h.tick(0.3)
    assert 12 <= h.table.taken <= 16
    h.engine.end_session(h.session, h.now)
    h.tick(0.3)
    assert h.table.taken == 0
    assert not h.keys.cookies
    assert len(socks) == 20


def test_a_request_is_counted_once_however_its_transfers_end() -> None:
    h = Host()
    h.request("r", 5.0)
    e = h.socket(1).endpoints
    for port in (1, 2, 3):
        h.transfer(f"t{port}", exact_tuple(Endpoints(e.src, port, e.dst, 9, 6)), 1000)
    h.engine.apply(h.session, EndHint(What.REQUEST, "r", cancelled=False), h.now)
    for _ in range(20):
        h.tick(1.0)
    counters = h.engine.books.counters
    assert counters.deadlines_met + counters.deadlines_missed == 1


def test_a_session_that_says_nothing_ends() -> None:
    limits = LimitsConfig()
    h = Host(limits=limits)
    h.engine.session("quiet", h.now, pid=1, uid=5, only=5, maker=object())
    h.engine.session("nameless", h.now)
    h.tick(limits.default_ttl_s + 0.2)
    assert set(h.engine.books.sessions) == {"quiet"}
    h.tick(limits.max_ttl_s)
    assert not h.engine.books.sessions
    assert h.engine.books.user(5).idle
