# SPDX-License-Identifier: Apache-2.0
"""Marks by who makes a socket and where it leads, with a time to the deadline; hints go before rules."""

from __future__ import annotations

from ipaddress import ip_network

import numpy as np
import pytest
from support.harness import Host

from mfsd.api import messages
from mfsd.engine.sockets import Established
from mfsd.engine.steering import LATELY_S
from mfsd.ground.model import INF, CookieSelector, Maker, MarkHint, PortRange, RuleSelector, Stage
from mfsd.policy.registry import make_policy

TO_6000 = RuleSelector(Maker(), dport=PortRange(6000, 6000))


def rule(h: Host, selector: RuleSelector, stage: Stage, due_in: float = float("inf")) -> None:
    session = h.engine.session("mfsd:rules", h.now)
    h.engine.apply(session, MarkHint(selector, stage, due_in=due_in, gives_way=True), h.now)


def test_connections_that_are_open_and_those_to_come_get_the_rules_band() -> None:
    h = Host()
    before = h.socket(1)
    rule(h, TO_6000, Stage.COLLECTIVE)
    h.tick()
    h.tick()
    after = h.socket(2)
    assert h.band(after) == "level 0"  # before the engine has heard of it
    h.tick()
    assert h.band(before) == h.band(after) == "level 0"


@pytest.mark.parametrize(
    ("selector", "named"),
    [
        (RuleSelector(Maker(), ip_network("10.0.0.0/24")), True),
        (RuleSelector(Maker(), ip_network("10.0.1.0/24")), False),
        (RuleSelector(Maker(), sport=PortRange(40001, 40001)), True),
        (RuleSelector(Maker(), sport=PortRange(40002, 40002)), False),
        (RuleSelector(Maker(executable="redis")), True),
        (RuleSelector(Maker(executable="ray")), False),
    ],
)
def test_all_conditions_must_hold(selector: RuleSelector, named: bool) -> None:  # noqa: FBT001 - a parameter of the test
    h = Host()
    h.kernel.makers[Maker(executable="redis")] = {1}
    rule(h, selector, Stage.COLLECTIVE)
    sock = h.socket(1)
    h.kernel._events.append(Established(sock.told, None, active=True))  # even if the kernel can't tell
    h.tick()
    marks = [m for c in h.connections.by_slot.values() for m in c.marks]
    assert bool(marks) == named


def test_hints_go_before_rules_and_marks_of_workers_do_not() -> None:
    h = Host()
    a, b = h.socket(1), h.socket(2)
    rule(h, TO_6000, Stage.COLLECTIVE)
    h.tick()
    h.engine.apply(h.session, MarkHint(RuleSelector(Maker(), sport=PortRange(40002, 40002)), Stage.COLLECTIVE), h.now)
    h.request("r", 60.0)
    for sock in (a, b):
        h.transfer(f"t{sock.cookie}", sock, 1000, Stage.P2D)
    h.tick()
    h.tick()
    assert h.band(a) == "level 4"
    assert h.band(b) == "level 0"


def test_a_rule_with_a_time_to_the_deadline_ranks_as_a_transfer_that_is_due_then() -> None:
    h = Host()
    for port, due_in in ((40001, 0.001), (40002, 0.1), (40003, 60.0)):
        rule(h, RuleSelector(Maker(), sport=PortRange(port, port)), Stage.P2D, due_in)
    h.tick()
    socks = [h.socket(n) for n in (1, 2, 3)]
    bands = [h.band(s) for s in socks]
    h.tick()
    assert [h.band(s) for s in socks] == bands == sorted(bands)
    assert len(set(bands)) == 3
    h.request("r", 0.1)
    reference = h.socket(4, dst="10.0.0.9")
    h.transfer("t", reference, 1, Stage.P2D)
    h.tick()
    assert h.band(reference) == bands[1]


@pytest.mark.parametrize("stage", [Stage.KV_REUSE, Stage.P2D])
def test_a_rules_deadline_never_puts_it_below_where_it_would_be_without(stage: Stage) -> None:
    """It is always so long from now, so that what waits for it would wait for ever."""
    h = Host("demand-bound", rate=125e6)
    for port, due_in in ((40001, 0.001), (40002, 0.1), (40003, 60.0), (40004, INF)):
        rule(h, RuleSelector(Maker(), sport=PortRange(port, port)), stage, due_in)
    h.tick()
    socks = [h.socket(n) for n in (1, 2, 3, 4)]
    h.tick()
    order = [b.name for b in h.engine.steering.bands.bands]
    places = [order.index(h.band(sock)) for sock in socks]
    assert places == sorted(places)
    assert places[2] == places[3] < order.index("default")


def test_another_policy_ranks_rules_anew() -> None:
    h = Host()
    rule(h, TO_6000, Stage.P2D, 0.001)
    sock = h.socket(1)
    h.tick()
    before = h.band(sock)
    h.engine.steering.change_policy(make_policy("two-class", 5, {}))
    h.tick()
    assert h.band(sock) != before


def test_a_rule_that_is_taken_back_lets_go() -> None:
    h = Host()
    rule(h, TO_6000, Stage.COLLECTIVE)
    sock = h.socket(1)
    h.tick()
    rule(h, TO_6000, Stage.NONE)
    h.tick(1.0)
    assert not h.kernel.rules
    assert sock.cookie not in h.connections.by_cookie


def test_what_a_rule_finds_open_begins_where_the_kernel_puts_those_to_come() -> None:
    """By its deadline, not by its stage alone; and at once, not at the next tick."""
    h = Host("deadline-ladder", rate=125e6)
    known = h.socket(1)
    rule(h, TO_6000, Stage.P2D, due_in=0.05)
    h.engine.watches.look(h.now)
    h.engine.hear(h.now)
    to_come = h.socket(2)
    assert h.band(known) == h.band(to_come) != "default"


def test_a_cookies_mark_is_obeyed_at_once() -> None:
    h = Host()
    sock = h.socket(1)
    h.engine.apply(h.session, MarkHint(CookieSelector(1), Stage.COLLECTIVE), h.now)
    assert h.band(sock) == "level 0"


def test_what_is_written_in_turns_moves_with_its_stage_and_what_is_written_in_order_waits() -> None:
    """Nobody can hold back, or give up, interleaved bytes without holding back what is written behind them."""
    h = Host("demand-bound", rate=125e6)
    apart, shared, other = (h.socket(n) for n in (1, 2, 3))
    h.request("late", -1.0)
    h.request("r", 60.0)
    h.transfer("deferred", apart, 1000, Stage.P2D, request="r")
    h.transfer("interleaved", shared, 1000, Stage.P2D, request="r", ordered=False)
    h.transfer("lost", other, 1000, Stage.P2D, request="late", ordered=False)
    h.tick()
    assert h.band(apart) == "level 4"
    assert h.band(shared) == h.band(other) == "level 3"
    (level,) = [
        int(h.engine.books.transfers.get(t, "level")) for t in h.session.transfers.values() if t.id == "interleaved"
    ]
    assert level == 4
    why = messages.explanation(h.engine, h.now, transfer_id="interleaved")
    assert why is not None
    assert "moves at level 3" in why.reasons[-1]
    why = messages.explanation(h.engine, h.now, transfer_id="deferred")
    assert why is not None
    assert not any("moves at" in reason for reason in why.reasons)
    stores = h.socket(4)
    h.transfer("store", stores, 1000, Stage.BACKGROUND, ordered=False)
    h.tick()
    assert h.band(stores) == "background"


def test_what_rules_alone_know_counts_while_it_moves_and_nothing_is_announced_there() -> None:
    h = Host("demand-bound", rate=125e6)
    rule(h, TO_6000, Stage.P2D)
    sock = h.socket(1)
    h.tick()

    def unannounced() -> list[int]:
        return np.flatnonzero(h.engine.steering.views(h.now).link.unannounced[0]).tolist()

    assert unannounced() == []
    h.send(sock, 10_000)
    assert unannounced() == [3]
    h.request("r", 60.0)
    h.transfer("t", sock, 1000)
    assert unannounced() == []
    h.done("t")
    h.send(sock, 1000)
    h.tick()
    assert unannounced() == [3]
    h.tick(LATELY_S + 0.1)
    assert unannounced() == []


def test_what_is_written_in_turns_counts_while_it_moves_at_its_stages_level() -> None:
    h = Host("demand-bound", rate=125e6)
    s = h.socket(1)
    h.request("r", 600.0)
    h.transfer("t", s, 10**6, Stage.P2D, request="r", ordered=False)
    h.tick()
    assert np.flatnonzero(h.engine.steering.views(h.now).link.unannounced[0]).tolist() == [3]
    h.transfer("u", h.socket(2), 10**6, Stage.P2D, request="r")
    h.send(s, 10**6)
    h.tick()
    assert not h.engine.steering.views(h.now).link.unannounced.any()
