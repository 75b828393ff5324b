# SPDX-License-Identifier: Apache-2.0
"""Whatever ends at once, by thousands, is struck out some at a time: counted, not timed."""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

import pytest
from support.harness import FakeSocket, Host

from mfsd.engine.books import Books
from mfsd.engine.carriage import Carriage
from mfsd.engine.endings import AT_ONCE, CONCLUDED, FOUND, FOUND_LEAST, Endings
from mfsd.engine.engine import HOUSEKEEPING_S
from mfsd.engine.hearing import CLOSED, STEPS
from mfsd.engine.locating import AT_ONCE as SEARCHED
from mfsd.engine.locating import LOCATE_S
from mfsd.engine.settings import LimitsConfig
from mfsd.engine.sockets import ON_THE_WAY_S
from mfsd.ground.model import (
    BatchHint,
    CookieSelector,
    MarkHint,
    PortRange,
    RequestHint,
    Stage,
    TupleSelector,
    What,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from mfsd.engine.records import Session

N = 700
"""More than is done at a time of anything but what has arrived."""


@dataclass
class Counted:
    """How often a method was called, and how often at most in one call of the host's."""

    most: int = 0
    now: int = 0
    seen: list[Any] = field(default_factory=list)

    def during(self, call: Callable[[], object]) -> None:
        self.now = 0
        call()
        self.most = max(self.most, self.now)


def counted(monkeypatch: pytest.MonkeyPatch, where: type, name: str) -> Counted:
    """Count calls of a method, which does what it does."""
    count, method = Counted(), getattr(where, name)

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        count.now += 1
        count.seen.append(args)
        return method(self, *args, **kwargs)

    monkeypatch.setattr(where, name, counting)
    return count


def until(h: Host, count: Counted, over: Callable[[], bool], every: float = 0.01) -> None:
    """Tick until it is over."""
    for _ in range(N):
        if over():
            return
        count.during(lambda: h.tick(every))
    raise AssertionError("it never ends")


def crowded(n: int = N) -> Host:
    """A worker with a transfer under way on each of ``n`` connections."""
    h = Host(slots=4 * N)
    h.request("r", 60.0)
    for i in range(n):
        sock = h.socket(i + 1)
        h.transfer(f"t{i}", sock, 1 << 20)
        sock.unsent_plus_unacked = 1000
    h.tick(0.01)
    return h


def close_all(h: Host, *, clean: bool) -> None:
    for sock in list(h.kernel.sockets):
        h.now += 1e-6
        h.kernel.close(sock, clean=clean)


def test_connections_that_are_closed_together_end_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    h = crowded()
    closed = counted(monkeypatch, Endings, "closed")
    close_all(h, clean=False)
    closed.during(lambda: h.engine.hear(h.now))
    assert h.engine.hearing.more
    assert not h.engine.idle
    until(h, closed, lambda: not h.connections.by_slot)
    assert len(closed.seen) == N
    assert closed.most <= STEPS // (1 + CLOSED) + 1 + FOUND
    assert not h.engine.books.transfers.n
    h.tick(0.01)
    assert not h.engine.hearing.more


@pytest.mark.parametrize("told", [True, False])
def test_nor_more_when_their_process_was_killed(monkeypatch: pytest.MonkeyPatch, *, told: bool) -> None:
    """Then TCP is asked about all of them, which says that they are gone, before what the kernel tells is heard."""
    h = crowded()
    closed = counted(monkeypatch, Endings, "closed")
    for sock in list(h.kernel.sockets):
        h.kernel.close(sock, clean=False) if told else h.kernel.vanish(sock)
    closed.during(lambda: h.engine.end_session(h.session, h.now))
    until(h, closed, lambda: not h.connections.by_slot)
    assert len(closed.seen) == N
    assert closed.most <= max(STEPS // (1 + CLOSED) + 1 + FOUND_LEAST if told else 0, FOUND)


def test_nor_more_when_all_have_delivered_and_tcp_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are in TIME_WAIT, and what the kernel has told of that had no room."""
    h = crowded()
    closed = counted(monkeypatch, Endings, "closed")
    h.done("r", What.REQUEST)
    close_all(h, clean=True)
    h.kernel.time_wait.update(range(1, N + 1))
    h.kernel.events()
    until(h, closed, lambda: not h.connections.by_slot)
    assert len(closed.seen) == N
    assert closed.most <= FOUND
    assert h.counted == (N, 1, 0)


def test_what_no_word_is_waited_for_any_more_is_given_up_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    h = crowded()
    concluded = counted(monkeypatch, Endings, "conclude")
    close_all(h, clean=True)
    until(h, concluded, lambda: not h.connections.by_slot)
    h.now += ON_THE_WAY_S
    until(h, concluded, lambda: not h.engine.books.transfers.n)
    assert concluded.most == CONCLUDED
    assert len(concluded.seen) == N


def test_nor_does_the_end_of_their_session_look_at_each_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    h = crowded()
    close_all(h, clean=True)
    while h.connections.by_slot:
        h.engine.hear(h.now)
    passes = counted(monkeypatch, Endings, "_end")
    passes.during(lambda: h.engine.end_session(h.session, h.now))
    assert passes.most < 5  # those that were short, and the others
    until(h, passes, lambda: not h.engine.books.transfers.n)


def test_requests_of_a_session_that_ends_are_finished_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    h = Host()
    for i in range(3 * AT_ONCE):
        h.engine.apply(h.session, RequestHint(f"r{i}", h.now + 60), h.now)
    finished = counted(monkeypatch, Endings, "finish")
    finished.during(lambda: h.engine.end_session(h.session, h.now))
    until(h, finished, lambda: not h.engine.books.requests.n)
    assert finished.most == AT_ONCE
    assert len(finished.seen) == 3 * AT_ONCE
    assert h.engine.books.everybody.bytes == 0


def _marks_by_socket(h: Host, session: Session, n: int) -> None:
    for _ in range(n):
        sock = h.socket(1 + len(h.kernel.sockets))
        h.engine.apply(session, MarkHint(CookieSelector(sock.cookie), Stage.COLLECTIVE), h.now)


def _marks_by_address(h: Host, session: Session, n: int) -> None:
    peer = ip_address(f"10.1.0.{len(session.name)}")
    for port in range(1, n + 1):
        selector = TupleSelector(None, peer, PortRange(), PortRange(port, port), 6)
        h.engine.apply(session, MarkHint(selector, Stage.COLLECTIVE), h.now)


def _batches(h: Host, session: Session, n: int) -> None:
    for i in range(n):
        h.engine.apply(session, BatchHint(f"b{i}", [], 0, 0, 0.0), h.now)


def _requests(h: Host, session: Session, n: int) -> None:
    for i in range(n):
        h.engine.apply(session, RequestHint(f"r{i}", h.now + 60), h.now)


@pytest.mark.parametrize(
    ("fill", "where", "name"),
    [
        (_marks_by_socket, Endings, "unmark"),
        (_marks_by_address, Endings, "unmark"),
        (_batches, Books, "strike_batch"),
        (_requests, Endings, "finish"),
    ],
)
def test_sessions_of_a_process_that_dies_end_some_at_a_time_together(
    monkeypatch: pytest.MonkeyPatch, fill: Callable[[Host, Session, int], None], where: type, name: str
) -> None:
    h = Host(slots=4 * N)
    sessions = [h.engine.session("s" * i, h.now, uid=1000) for i in range(1, 11)]
    for session in sessions:
        fill(h, session, 2 * AT_ONCE // 10)
    h.tick(0.01)
    struck = counted(monkeypatch, where, name)

    def die() -> None:
        for session in sessions:
            h.engine.end_session(session, h.now)

    struck.during(die)
    assert not h.engine.idle
    until(h, struck, lambda: h.engine.idle)
    assert len(struck.seen) >= 10 * (2 * AT_ONCE // 10)
    assert struck.most <= AT_ONCE
    assert not h.engine.books.everybody.bytes
    assert not any(s.marks or s.watches or s.batches or s.requests for s in sessions)


def test_nobody_is_named_any_more_by_a_session_that_is_over() -> None:
    h = Host(slots=4 * N)
    first, second = (h.engine.session(name, h.now) for name in ("first", "second"))
    _batches(h, first, 2 * AT_ONCE)
    e = h.socket(1).endpoints
    selector = TupleSelector(None, e.dst, PortRange(), PortRange(), 6)
    h.engine.apply(second, MarkHint(selector, Stage.COLLECTIVE), h.now)
    h.tick(0.01)
    for session in (first, second):
        h.engine.end_session(session, h.now)
    assert second.marks  # its turn has not come
    late = h.socket(2)
    h.engine.hear(h.now)
    assert not second.marks[selector].conns - {h.connections.by_cookie[1]}
    until(h, Counted(), lambda: h.engine.idle)
    assert not second.marks
    assert late.cookie not in h.connections.by_cookie or not h.connections.by_cookie[late.cookie].marks


def test_batches_that_expire_together_are_struck_out_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    h = Host()
    _batches(h, h.session, 2 * AT_ONCE)
    h.engine.apply(h.session, RequestHint("r", h.now + 600, "b0"), h.now)
    struck = counted(monkeypatch, Books, "strike_batch")
    h.now += LimitsConfig().default_ttl_s + 1
    until(h, struck, lambda: h.engine.books.batches.n == 1, every=HOUSEKEEPING_S)
    assert struck.most <= AT_ONCE
    assert len(struck.seen) == 2 * AT_ONCE - 1


def test_cookies_that_no_socket_has_are_given_up_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    h = Host(slots=4 * N)
    h.request("r", 60.0)
    for i in range(N):
        h.transfer(f"t{i}", CookieSelector(i + 1), 1000)
    h.tick(0.01)
    dropped = counted(monkeypatch, Endings, "drop")
    until(h, dropped, lambda: not h.connections.by_slot, every=0.1 * LOCATE_S)
    assert len(dropped.seen) == N
    assert dropped.most <= SEARCHED


def test_all_cookies_are_searched_for_in_turn() -> None:
    h = Host(slots=4 * N)
    h.request("r", 60.0)
    for i in range(N):
        h.transfer(f"t{i}", CookieSelector(i + 1), 1000)
    last = next(reversed(h.connections.by_cookie))
    e = Host().socket(1).endpoints
    h.kernel.sockets.append(FakeSocket(last, e))  # the kernel does not tell of it
    for _ in range(N // SEARCHED + 1):
        h.tick(0.0)
    assert h.connections.by_cookie[last].endpoints is not None


def test_a_selector_takes_what_is_open_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    h = Host(slots=4 * N)
    socks = [h.socket(i + 1) for i in range(N)]
    e = socks[0].endpoints
    h.engine.apply(
        h.session, MarkHint(TupleSelector(None, e.dst, PortRange(), PortRange(), 6), Stage.COLLECTIVE), h.now
    )
    (watch,) = h.session.watches.values()
    asked = counted(monkeypatch, Carriage, "joined")
    until(h, asked, lambda: watch.looked)
    assert len(watch.conns) == N
    assert asked.most <= STEPS


def test_answers_for_very_many_selectors_of_one_peer_compare_none_with_another() -> None:
    h = Host(limits=LimitsConfig(max_marks_per_session=4 * N))
    e = h.socket(1).endpoints
    for port in range(1, N + 1):
        selector = TupleSelector(None, e.dst, PortRange(), PortRange(port, port), 6)
        h.engine.apply(h.session, MarkHint(selector, Stage.COLLECTIVE), h.now)
    compared = 0
    plain = TupleSelector.__eq__

    def comparing(self: TupleSelector, other: object) -> bool:
        nonlocal compared
        compared += 1
        return plain(self, other)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TupleSelector, "__eq__", comparing)
        while not all(w.looked for w in h.session.watches.values()):
            h.tick(0.01)
    assert compared < 10 * N
