# SPDX-License-Identifier: Apache-2.0
"""From hints to bands: deferral, promotion, sharing of connections, inheritance, marks."""

from __future__ import annotations

import pytest
from support.harness import MSS, Host

from mfsd.daemon.config import parse
from mfsd.daemon.config_bands import bands_of, policy_of
from mfsd.daemon.wiring import change_policy
from mfsd.engine import delivery
from mfsd.ground.bands import LEVEL_NEW
from mfsd.ground.model import BatchHint, CookieSelector, EndHint, MarkHint, ProgressHint, Stage, What
from mfsd.policy.registry import make_policy


def test_a_loose_p2d_transfer_is_deferred_and_promoted_as_its_deadline_nears() -> None:
    h = Host()
    s = h.socket(1)
    h.request("r", 1.0)
    h.transfer("t", s, 100_000)
    h.tick()
    assert h.band(s) == "level 4"
    seen = [h.band(s)]
    for _ in range(199):
        h.tick(0.005)
        seen.append(h.band(s))
    order = list(dict.fromkeys(seen))
    assert order[:3] == ["level 4", "level 3", "level 2"]
    assert h.engine.books.counters.promotions >= 2


def test_the_rate_of_a_peers_link_decides_who_is_doomed() -> None:
    peers = parse(
        {"peer": [{"network": "10.0.0.0/8", "rate": "10gbit"}, {"network": "10.9.0.0/16", "rate": "8mbit"}]}
    ).peer
    h = Host(peers=peers)
    near, far, other = h.socket(1), h.socket(2, dst="10.9.0.1"), h.socket(3, dst="192.0.2.1")
    for sock, name in ((near, "n"), (far, "f"), (other, "o")):
        h.request(name, 1.0)
        h.transfer(name, sock, 2_000_000, request=name)  # 2 s at 8 Mbit/s, 16 ms at 1 Gbit/s
    h.tick()
    assert (h.band(near), h.band(far), h.band(other)) == ("level 4", "scavenger", "level 4")


def test_a_collective_goes_to_the_top_at_once() -> None:
    h = Host()
    s = h.socket(1)
    h.transfer("c", s, 1000, Stage.COLLECTIVE, request="")
    h.tick()
    assert h.band(s) == "level 0"


def test_the_most_urgent_transfer_of_a_shared_connection_decides() -> None:
    h = Host()
    s = h.socket(1)
    h.request("loose", 100.0)
    h.request("tight", 0.01)
    h.transfer("a", s, 100_000, request="loose")
    h.tick()
    assert h.band(s) == "level 4"
    h.transfer("b", s, 1000, request="tight")
    h.tick()
    assert h.band(s) == "level 2"


def test_bytes_without_a_hint_inherit_the_last_stage() -> None:
    h = Host()
    s = h.socket(1)
    h.transfer("c", s, 1448, Stage.COLLECTIVE, request="")
    h.tick()
    h.send(s, 1448)
    h.tick(0.01)
    assert h.engine.books.transfers.n == 0
    assert h.band(s) == "level 0"


def test_a_mark_holds_without_transfers_until_it_is_taken_back() -> None:
    h = Host()
    s = h.socket(1)
    h.engine.apply(h.session, MarkHint(CookieSelector(1), Stage.COLLECTIVE), h.now)
    h.tick()
    assert h.band(s) == "level 0"
    for _ in range(100):
        h.tick(1.0)
    assert h.band(s) == "level 0"
    h.engine.apply(h.session, MarkHint(CookieSelector(1), Stage.NONE), h.now)
    h.tick()
    assert h.band(s) == "default"


def test_a_mark_is_a_floor_under_what_transfers_say() -> None:
    h = Host()
    s = h.socket(1)
    h.engine.apply(h.session, MarkHint(CookieSelector(1), Stage.COLLECTIVE), h.now)
    h.request("r", 100.0)
    h.transfer("t", s, 1_000_000)
    h.tick()
    assert h.band(s) == "level 0"


def test_fair_leaves_everything_in_the_default_band() -> None:
    h = Host("fair")
    s = h.socket(1)
    h.transfer("c", s, 1000, Stage.COLLECTIVE, request="")
    h.tick()
    assert h.band(s) == "default"


def test_two_class_puts_kv_below_collectives() -> None:
    h = Host("two-class")
    kv, coll = h.socket(1), h.socket(2)
    h.request("r", 0.5)
    h.transfer("k", kv, 1000, Stage.KV_REUSE)
    h.transfer("c", coll, 1000, Stage.COLLECTIVE)
    h.tick()
    assert h.table.band[h.keys.cookies[2]] < h.table.band[h.keys.cookies[1]]


def test_doomed_transfers_go_to_the_scavenger_and_the_worker_hears_of_it() -> None:
    h = Host(rate=1e6)
    s = h.socket(1)
    h.request("r", 0.5)
    h.transfer("t", s, 10_000_000)  # 10 s at full rate
    h.tick()
    assert h.band(s) == "scavenger"
    events = [(e.kind.name, e.request_id, e.transfer_id) for e in h.session.events]
    assert ("INFEASIBLE", "r", "t") in events


def test_layers_of_a_batch_reach_the_policy() -> None:
    h = Host()
    s = h.socket(1)
    h.request("r", 50.0)
    h.engine.apply(h.session, BatchHint("b", ["r"], layers=32, current_layer=0, layer_compute=0.01), h.now)
    h.transfer("k", s, 1000, Stage.KV_REUSE, layer=30)
    views = h.engine.steering.views(h.now)
    assert views.transfers.current_layer[0] == 0
    assert views.requests.compute_left[0] == pytest.approx(0.32)
    h.engine.apply(h.session, ProgressHint("b", 16), h.now)
    views = h.engine.steering.views(h.now)
    assert views.transfers.current_layer[0] == 16
    assert views.transfers.layer_started[0]
    assert views.requests.compute_left[0] == pytest.approx(0.16)
    h.engine.apply(h.session, ProgressHint("b", 3), h.now)  # never goes back
    assert h.engine.steering.views(h.now).transfers.current_layer[0] == 16
    h.engine.apply(h.session, ProgressHint("b", 31, compute_done=True), h.now)
    views = h.engine.steering.views(h.now)
    assert views.requests.compute_left[0] == 0
    assert not views.transfers.computing[0]


def test_progress_of_a_lone_request_makes_it_its_own_batch() -> None:
    h = Host()
    h.request("r", 5.0)
    h.engine.apply(h.session, ProgressHint("r", 3), h.now)
    assert h.engine.books.batches.n == 1
    h.engine.apply(h.session, EndHint(What.REQUEST, "r"), h.now)
    assert h.engine.books.batches.n == 0


def test_a_policy_change_takes_effect_at_the_next_tick() -> None:
    h = Host()
    s = h.socket(1)
    h.transfer("c", s, 1000, Stage.COLLECTIVE, request="")
    h.tick()
    h.engine.steering.change_policy(make_policy("fair", 5, {}))
    h.tick(0.01)
    assert h.band(s) == "default"


def test_the_worker_hears_when_a_transfer_can_be_in_time_again() -> None:
    h = Host(rate=1e6)
    s = h.socket(1)
    h.request("r", 0.5)
    h.transfer("t", s, 10_000_000)  # 10 s at full rate
    h.tick()
    h.request("r", 60.0)  # renewed with more time
    h.tick(0.1)
    h.tick(0.1)
    events = [(e.kind.name, e.request_id, e.transfer_id) for e in h.session.events]
    assert events.count(("RESTORED", "r", "t")) == 1
    assert events.index(("INFEASIBLE", "r", "t")) < events.index(("RESTORED", "r", "t"))


def test_what_went_before_a_restart_makes_nobody_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new daemon hears full sizes and where they began, of more connections than it asks about in one tick."""
    monkeypatch.setattr(delivery, "ASK_MAX", 3)
    h = Host(rate=1e6)
    socks = [h.socket(cookie) for cookie in range(1, 9)]
    for s in socks:
        h.send(s, 950_000)  # before this daemon
    h.request("r", 0.8)
    for s in socks:
        h.transfer(str(s.cookie), s, 1_000_000, position=1)
    levels = []
    for _ in range(4):
        h.tick(0.01)
        levels.append([h.band(s) for s in socks].count("scavenger"))
    assert not h.session.events
    assert levels[-1] == 0


def test_a_changed_policy_starts_from_fresh_levels() -> None:
    h = Host("edf-all")
    s = h.socket(1)
    h.request("r", 0.01)
    h.transfer("t", s, 1000)
    h.tick()
    assert h.engine.books.transfers.live("level")[0] == 0
    config = parse({"policy": {"name": "mfs"}, "bands": {"levels": 5, "lanes": 8}})
    h.engine.steering.bands = bands_of(config, policy_of(config))
    assert change_policy(h.engine, config)
    assert h.engine.books.transfers.live("level")[0] == LEVEL_NEW


def test_policies_are_shown_the_sizes_seen_lately_at_every_tick_and_in_explanations() -> None:
    h = Host("sjf")
    h.request("r", 60.0)
    for cookie in (1, 2, 3):
        h.transfer(str(cookie), h.socket(cookie), cookie * MSS)
    for _ in range(3):
        h.tick(0.01)
        assert sorted(h.engine.steering.views(h.now).sizes.tolist()) == [MSS, 2 * MSS, 3 * MSS]
