# SPDX-License-Identifier: Apache-2.0
"""Whoever calls everything urgent pays for it; a single tenant never does, and nobody pays for another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.harness import FakeSocket, Host

from mfsd.engine import fair
from mfsd.engine.lanes import LEFT_S, Lanes
from mfsd.engine.rescue import DRAIN
from mfsd.engine.settings import RescueConfig, TenantsConfig
from mfsd.engine.tenants import REMEMBERED, Tenants
from mfsd.ground.model import (
    CookieSelector,
    Endpoints,
    EventKind,
    MarkHint,
    Mode,
    PortRange,
    RequestHint,
    Stage,
    TransferHint,
    TupleSelector,
)

if TYPE_CHECKING:
    from mfsd.engine.records import Session

RATE = 125e6
A, B = 1001, 1002


def mark(h: Host, sock: FakeSocket, session: Session | None = None, stage: Stage = Stage.COLLECTIVE) -> None:
    h.engine.apply(session or h.session, MarkHint(CookieSelector(sock.cookie), stage), h.now)


def saturated(**more: Any) -> Host:
    h = Host(**more)
    for device in h.devices:
        device.estimator.band_load[1] = 1.0
    return h


def two(h: Host) -> tuple[FakeSocket, FakeSocket]:
    """Connections of A and of B, marked."""
    both = h.socket(1, uid=A), h.socket(2, uid=B)
    for sock in both:
        mark(h, sock)
    return both


def run(h: Host, seconds: float, shares: dict[FakeSocket, float]) -> list[dict[FakeSocket, str]]:
    """Let sockets move these shares of the link; bands of each at every step."""
    out = []
    for _ in range(round(seconds / 0.02)):
        for sock, share in shares.items():
            h.send(sock, int(share * RATE * 0.02))
        h.tick(0.02)
        out.append({s: h.band(s) for s in shares})
    return out


def time_above(seen: list[dict[FakeSocket, str]], sock: FakeSocket) -> float:
    return sum(bands[sock] in ("level 0", "level 1") for bands in seen) / len(seen)


def test_a_single_tenant_has_the_whole_link() -> None:
    h = saturated()
    one, other = h.socket(1, uid=A), h.socket(2, uid=A)
    mark(h, one)
    mark(h, other)
    seen = run(h, 5.0, {one: 0.7, other: 0.29})
    assert time_above(seen, one) == time_above(seen, other) == 1.0
    assert h.engine.books.counters.demotions == 0
    assert not h.session.events


def test_beside_another_each_has_its_even_part() -> None:
    h = saturated()
    greedy, modest = two(h)
    seen = run(h, 10.0, {greedy: 0.9, modest: 0.1})
    assert time_above(seen, modest) == 1.0
    assert 0.45 <= time_above(seen, greedy) * 0.9 <= 0.55
    below = {bands[greedy] for bands in seen} - {"level 0", "level 1"}
    assert below == {"level 4"}
    uses = {u.uid: u for u in h.engine.steering.urgency.uses()}
    assert uses[A].demotions == h.engine.books.counters.demotions > 0
    assert uses[B].demotions == 0
    assert uses[A].moved == pytest.approx(0.9 * RATE, rel=0.05)
    assert uses[A].allowed == pytest.approx(0.5 * RATE)


def test_who_is_demoted_is_told_once_and_when_it_is_over() -> None:
    h = saturated()
    greedy, modest = h.socket(1, uid=A), h.socket(2, uid=B)
    other = h.engine.session("other", h.now)
    mark(h, greedy)
    mark(h, modest, other)
    run(h, 5.0, {greedy: 0.9, modest: 0.1})
    assert [e.kind for e in h.session.events] == [EventKind.DEMOTED]
    assert "500 Mbit/s" in h.session.events[0].reason
    run(h, 3.0, {greedy: 0.3, modest: 0.1})
    assert [e.kind for e in h.session.events] == [EventKind.DEMOTED, EventKind.RESTORED]
    assert not other.events


def test_a_link_with_room_limits_nobody() -> None:
    h = Host()
    greedy, modest = two(h)
    assert time_above(run(h, 5.0, {greedy: 0.7, modest: 0.1}), greedy) == 1.0


def test_a_fixed_share_holds_always() -> None:
    h = Host(tenants=TenantsConfig(urgent_share=0.2))
    sock = h.socket(1, uid=A)
    mark(h, sock)
    assert 0.17 <= time_above(run(h, 10.0, {sock: 0.8}), sock) * 0.8 <= 0.23


def test_without_even_parts_nobody_is_limited() -> None:
    h = saturated(tenants=TenantsConfig(even=False))
    greedy, modest = two(h)
    assert time_above(run(h, 5.0, {greedy: 0.9, modest: 0.1}), greedy) == 1.0


def test_what_stands_below_unhinted_traffic_is_free() -> None:
    h = saturated()
    bulk, modest = h.socket(1, uid=A), h.socket(2, uid=B)
    mark(h, bulk, stage=Stage.BACKGROUND)
    mark(h, modest)
    run(h, 3.0, {bulk: 0.9, modest: 0.1})
    assert h.engine.books.counters.demotions == 0


def test_the_owner_of_the_socket_pays_whoever_hints() -> None:
    h = saturated()
    router = h.engine.session("router", h.now, pid=1, uid=5)
    greedy, modest = h.socket(1, uid=A), h.socket(2, uid=B)
    mark(h, greedy, router)
    mark(h, modest, router)
    run(h, 3.0, {greedy: 0.9, modest: 0.1})
    assert {u.uid: bool(u.demotions) for u in h.engine.steering.urgency.uses()} == {A: True, B: False}


def test_a_socket_that_is_found_later_is_its_owners() -> None:
    h = Host()
    mark_of = CookieSelector(9)
    h.engine.apply(h.session, MarkHint(mark_of, Stage.COLLECTIVE), h.now)
    assert [u.uid for u in h.engine.steering.urgency.uses()] == []
    h.socket(9, uid=A)
    for _ in range(20):
        h.tick(0.05)
    assert [u.uid for u in h.engine.steering.urgency.uses()] == [A]


def test_short_lives_are_no_way_out() -> None:
    """Connections that come and go between two counts are paid for, too."""
    h = saturated(slots=4096)
    modest = h.socket(100_000, uid=B)
    mark(h, modest)
    sent = 0.0
    for n in range(1, 500):
        sock = h.socket(n, uid=A)
        mark(h, sock)
        h.tick(0.005)
        h.send(sock, int(RATE * 0.01 * 0.9))
        sent += sock.bytes_acked
        h.send(modest, int(RATE * 0.01 * 0.1))
        h.kernel.close(sock)
        h.tick(0.005)
    use = next(u for u in h.engine.steering.urgency.uses() if u.uid == A) if h.table.taken > 1 else None
    assert use is None or use.moved > 0
    assert h.engine.books.counters.demotions > 0


def test_nothing_is_demoted_while_packets_are_not_steered() -> None:
    h = saturated()
    h.engine.set_mode(Mode.OBSERVE)
    greedy, modest = two(h)
    run(h, 3.0, {greedy: 0.9, modest: 0.1})
    assert h.engine.books.counters.demotions == 0


def test_on_one_device_beyond_the_budget_on_the_other_not() -> None:
    h = saturated(devices=2)
    greedy, modest = h.socket(1, uid=A), h.socket(2, uid=B)
    elsewhere, there = h.socket(3, uid=A, dst="10.0.1.2"), h.socket(4, uid=B, dst="10.0.1.2")
    for sock in (greedy, modest, elsewhere, there):
        mark(h, sock)
    seen = run(h, 3.0, {greedy: 0.9, modest: 0.1, elsewhere: 0.1, there: 0.2})
    assert time_above(seen, greedy) < 0.7
    assert time_above(seen, elsewhere) == 1.0


def test_budgets_can_be_changed_while_running() -> None:
    h = Host()
    sock = h.socket(1, uid=A)
    mark(h, sock)
    run(h, 1.0, {sock: 0.9})
    h.engine.set_limits(h.engine.ledger.admission.limits, RescueConfig(), TenantsConfig(urgent_share=0.1))
    assert time_above(run(h, 3.0, {sock: 0.9}), sock) < 0.3


# --- what is only announced -------------------------------------------------------------------------------------------


def announce(h: Host, session: Session, cookie: int, uid: int, size: int, due: float) -> FakeSocket:
    sock = h.socket(cookie, uid=uid)
    h.engine.apply(session, RequestHint(f"r{cookie}", h.now + due), h.now)
    hint = TransferHint(f"t{cookie}", f"r{cookie}", "", Stage.P2D, 0, size, CookieSelector(cookie))
    h.engine.apply(session, hint, h.now)
    return sock


@pytest.mark.parametrize("first", [True, False])
def test_nobody_is_given_up_for_what_others_only_announce(*, first: bool) -> None:
    h = Host("demand-bound", slots=512, rate=25e6)
    honest, bad = h.engine.session("honest", h.now, uid=A), h.engine.session("bad", h.now, uid=B)
    sock = announce(h, honest, 1, A, 2_000_000, 0.5) if first else None  # a sixth of the link
    for cookie in range(2, 202):
        announce(h, bad, cookie, B, 65_536, 0.45)  # more than the link, in pieces that are cheaper to keep
    sock = sock or announce(h, honest, 1, A, 2_000_000, 0.5)
    for _ in range(50):
        h.tick(0.01)
        band = h.band(sock)
        assert band != "scavenger"
        if band in ("level 0", "level 2"):  # what it is guaranteed it gets, and more: nobody else sends
            h.send(sock, int(0.5 * 25e6 * 0.01))
        if "t1" not in honest.transfers:
            break
    assert EventKind.INFEASIBLE not in {e.kind for e in honest.events}
    assert EventKind.INFEASIBLE in {e.kind for e in bad.events}
    completed = h.engine.books.counters.transfers_completed
    assert completed == 1


def test_who_is_alone_is_judged_as_ever_also_with_connections_still_to_come() -> None:
    h = Host("demand-bound", slots=512, rate=25e6)
    one = h.engine.session("one", h.now, uid=A)
    for cookie in range(1, 40):
        announce(h, one, cookie, A, 1_000_000, 0.3)
    e = h.socket(500, uid=A).endpoints
    h.engine.apply(one, RequestHint("w", h.now + 0.3), h.now)
    waits = TupleSelector(e.src, e.dst, PortRange(5, 9), PortRange(1, 2), 6)
    h.engine.apply(one, TransferHint("w", "w", "", Stage.P2D, 0, 1_000_000, waits), h.now)
    h.tick(0.0)
    views = h.engine.steering.views(h.now)
    alone = h.engine.steering.policy.evaluate(views)
    shared = fair.decide(h.engine.steering.policy, views, h.engine.steering._tenants_of(views.transfers.conn))
    assert alone.infeasible is not None
    assert shared.infeasible is not None
    assert alone.infeasible.any()
    assert (shared.level.tolist(), shared.infeasible.tolist()) == (alone.level.tolist(), alone.infeasible.tolist())


@given(st.lists(st.tuples(st.sampled_from([A, B, 1003]), st.integers(1, 4000), st.integers(1, 900)), max_size=30))
def test_guarantees_fit_the_link_however_it_is_shared(announced: list[tuple[int, int, int]]) -> None:
    h = Host("demand-bound", slots=128, rate=25e6)
    sessions = {uid: h.engine.session(str(uid), h.now, uid=uid) for uid in (A, B, 1003)}
    for cookie, (uid, kilobytes, ms) in enumerate(announced, 1):
        announce(h, sessions[uid], cookie, uid, kilobytes * 1000, ms / 1000)
    h.tick(0.01)
    views = h.engine.steering.views(h.now)
    decision = fair.decide(h.engine.steering.policy, views, h.engine.steering._tenants_of(views.transfers.conn))
    if decision.guarantee is not None:
        assert (decision.guarantee.sum(axis=1) <= (1.0 - views.link.floor) * views.link.rate * 1.0001).all()
    assert len(decision.level) == len(announced)


# --- rescues ----------------------------------------------------------------------------------------------------------


def starved(h: Host, cookie: int, uid: int, left: float = 0.3) -> tuple[int, int]:
    sock = h.socket(cookie, uid=uid)
    h.request(f"r{cookie}", left)
    h.transfer(f"t{cookie}", sock, 1_000_000, request=f"r{cookie}")
    h.tick()
    h.send(sock, 100_000, acked=False)
    row = h.table.rows[h.keys.cookies[cookie]]
    place = int(row["band"]), int(row["lane"])
    h.device.queued[place] = 130_000
    return place


def test_whoever_needs_many_rescues_leaves_the_others_theirs() -> None:
    h = Host(lanes=64, rescue=RescueConfig(max_per_s=10))
    greedy = {starved(h, cookie, A) for cookie in range(1, 31)}
    modest = {starved(h, cookie, B) for cookie in range(31, 35)}
    for _ in range(100):
        h.tick(0.005)
        if h.device.purged:
            break
    purged = set(h.device.purged)
    assert len(purged & greedy) <= 6
    assert purged & modest == modest


def test_whoever_lets_out_much_leaves_the_others_their_time() -> None:
    """130 kB of which nothing is left to send: let out, not purged, as long as its tenant's part of the time lasts."""
    h = Host(lanes=64, slots=128, rescue=RescueConfig(max_per_s=1000))
    modest = {}
    for greedy in range(1, 61):
        starved(h, greedy, A, left=0.15)
        if greedy in range(10, 51, 10):
            modest[100 + greedy] = starved(h, 100 + greedy, B, left=0.15)
        for _ in range(10):
            h.tick(0.005)
            for cookie, place in modest.items():
                promoted = h.table.band[h.keys.cookies[cookie]] != place[0]
                if promoted and h.device.guaranteed.get(place[0], 0.0) >= DRAIN:
                    h.device.queued[place] = 0
    assert not any(h.device.queued[place] for place in modest.values())
    assert not set(modest.values()) & set(h.device.purged)


def test_a_lane_that_two_tenants_share_is_never_purged() -> None:
    h = Host(lanes=2)
    starved(h, 1, A)
    h.socket(2, uid=B)
    h.transfer("other", CookieSelector(2), 1_000_000, request="r1")
    h.tick()
    for _ in range(60):
        h.tick(0.005)
    assert h.engine.books.counters.promotions > 0
    assert h.device.purged == []


def test_a_lane_is_not_purged_while_packets_of_its_last_tenant_may_be_left() -> None:
    lanes = Lanes(2)
    assert lanes.take(1, tcp=True) == lanes.take(2, tcp=True) == 1
    lanes.give_back(1, 1, 100.0)
    assert not lanes.alone(1, 2, 100.0 + LEFT_S)
    assert lanes.alone(1, 2, 100.1 + LEFT_S)
    assert not lanes.alone(1, 1, 1000.0)


# --- lanes ------------------------------------------------------------------------------------------------------------


def test_one_tenant_alone_has_most_lanes_and_leaves_some() -> None:
    lanes = Lanes(32)
    used = {lanes.take(1, tcp=True) for _ in range(200)}
    assert 0 not in used
    assert 22 <= len(used) <= 24
    others = {t: {lanes.take(t, tcp=True) for _ in range(50)} for t in (2, 3)}
    assert not used & others[2]
    assert not used & others[3]
    assert not others[2] & others[3]


def test_what_is_not_tcp_has_lane_zero() -> None:
    h = Host()
    e = h.socket(1, uid=A).endpoints
    udp = h.socket(2, uid=B)
    udp.endpoints = Endpoints(e.src, 9, e.dst, 9, 17)
    mark(h, udp)
    assert h.table.lane[h.keys.cookies[2]] == 0


@given(st.lists(st.tuples(st.integers(1, 6), st.booleans(), st.integers(0, 5)), max_size=80), st.integers(1, 9))
def test_lanes_are_nobody_elses_as_long_as_there_are_some(steps: list[tuple[int, bool, int]], count: int) -> None:
    lanes, held = Lanes(count), list[tuple[int, int]]()
    for tenant, leaves, which in steps:
        if leaves and held:
            lane, owner = held.pop(which % len(held))
            lanes.give_back(lane, owner, 0.0)
            continue
        own = {x for x, owner in held if owner == tenant}
        empty = set(range(1, count)) - {x for x, _ in held}
        lane = lanes.take(tenant, tcp=True)
        assert 0 <= lane < count
        assert (lane == 0) == (count == 1)
        others = {owner for x, owner in held if x == lane} - {tenant}
        assert not others or not empty or count == 1 or own
        held.append((lane, tenant))
        assert lanes.alone(lane, tenant, 1000.0) == (not others)


def test_places_of_tenants_are_reused_and_begin_anew() -> None:
    tenants = Tenants(8)
    first = tenants.join(0, 7)
    tenants.part(0, first)
    assert tenants.join(0, 7) == first  # it still owes what it owed
    tenants.part(0, first)
    for uid in range(100, 100 + 2 * REMEMBERED):
        tenants.part(1, tenants.join(1, uid))
    assert len(tenants) <= REMEMBERED + 2
    assert tenants.uid(tenants.join(2, 7)) == 7
    assert np.count_nonzero(tenants.of) == 1


def test_a_place_that_goes_to_another_tenant_brings_no_debts() -> None:
    h = Host(tenants=TenantsConfig(urgent_share=0.1))
    sock = h.socket(1, uid=A)
    mark(h, sock)
    run(h, 0.5, {sock: 0.9})
    index = h.connections.by_cookie[1].tenant
    h.connections.tenants._uids[index] = B  # as Tenants._new does
    h.tick(0.02)
    assert [(u.uid, u.demotions) for u in h.engine.steering.urgency.uses()] == [(B, 0)]
