# SPDX-License-Identifier: Apache-2.0
"""When a promotion purges, and whose packets."""

from __future__ import annotations

import pytest
from support.harness import MSS, FakeSocket, Host

from mfsd.api.trace import of_request
from mfsd.engine.rescue import DRAIN
from mfsd.engine.settings import RescueConfig
from mfsd.ground.model import Endpoints, Mode, What

MORE = 800_000
"""Bytes that the process has written and TCP not handed down."""


def deferred(
    h: Host, cookie: int = 1, left: float = 0.2, device: int = 0, more: int = MORE
) -> tuple[FakeSocket, tuple[int, int]]:
    """A starved connection and the (band, lane) in which its packets are stuck."""
    s = h.socket(cookie, dst=f"10.0.{device}.2")
    h.request(f"r{cookie}", left)
    h.transfer(f"t{cookie}", s, 1_000_000, request=f"r{cookie}")
    h.tick()
    h.send(s, 90 * MSS, acked=False)
    s.notsent = more
    s.unsent_plus_unacked += more
    row = h.table.rows[h.keys.cookies[cookie]]
    place = (int(row["band"]), int(row["lane"]))
    h.devices[device].queued[place] = 130_000
    return s, place


def promote(h: Host) -> None:
    """Bring the deadline so near that the level rises; then let the stall time pass."""
    for _ in range(40):
        h.tick(0.005)


def test_a_starved_promoted_connection_is_purged_in_its_old_lane() -> None:
    h = Host()
    s, place = deferred(h)
    promote(h)
    assert h.device.purged[0] == place
    assert h.engine.books.counters.rescues >= 1
    assert h.band(s) != h.bands.bands[place[0]].name


def test_a_trace_says_who_was_rescued_and_for_how_long_all_were_held_back() -> None:
    h = Host("demand-bound")
    begin = h.now
    s, _ = deferred(h)
    h.transfer("behind", s, 1000, request="r1")
    promote(h)
    rescues = h.engine.books.counters.rescues
    assert rescues >= 1
    (lifted, _), *_, (given_up, _) = h.session.transfers["t1"].path
    assert begin < lifted < given_up < h.now

    def traced() -> tuple[dict[str, int], float]:
        found = of_request(h.engine, h.now, "r1")
        assert found is not None
        return {t.id: t.rescues for t in found.transfers}, found.held_back_s

    rescued, held_back = traced()
    assert rescued == {"t1": rescues, "behind": 0}
    assert held_back == pytest.approx(lifted - begin + h.now - given_up)
    h.ack(s, 90 * MSS)
    h.send(s, 1_001_000 - 90 * MSS)
    h.done("r1", What.REQUEST)
    for _ in range(10):
        h.tick(0.1)
    assert h.counted[0] == 2
    assert traced()[0] == {"t1": rescues, "behind": 0}


def test_what_tcp_sends_again_after_a_rescue_is_counted_once() -> None:
    h = Host()
    s, _ = deferred(h)
    s.total_retrans = 7  # from before
    promote(h)
    assert h.device.purged
    s.total_retrans = 9
    h.tick(0.5)
    assert h.engine.rescuer.retransmitted == 0
    h.tick(1.0)
    assert h.engine.rescuer.retransmitted == 2
    s.total_retrans = 30  # whatever for
    h.tick(2.0)
    assert h.engine.rescuer.retransmitted == 2


def test_only_its_own_lane_is_purged() -> None:
    h = Host()
    _, first = deferred(h, 1)
    _, other = deferred(h, 2, left=50.0)
    assert first[1] != other[1]
    promote(h)
    assert set(h.device.purged) == {first}


def test_an_empty_lane_needs_no_purge() -> None:
    h = Host()
    deferred(h)
    h.device.queued.clear()
    promote(h)
    assert h.device.purged == []


def test_a_lane_that_drains_by_itself_is_left_alone() -> None:
    h = Host(rescue=RescueConfig(stall_ms=20))
    s, place = deferred(h)
    band = h.table.band[h.keys.cookies[1]]
    for _ in range(60):
        h.tick(0.005)
        h.send(s, MSS)
        if h.table.band[h.keys.cookies[1]] < band:
            break
    h.tick(0.005)
    h.device.queued[place] = 0  # served meanwhile
    h.tick(0.05)
    assert h.device.purged == []


def test_udp_is_never_purged() -> None:
    h = Host()
    s = h.socket(1)
    e = s.endpoints
    s.endpoints = Endpoints(e.src, e.sport, e.dst, e.dport, 17)
    h.request("r", 0.2)
    h.transfer("t", s, 10_000_000)
    h.tick()
    row = h.table.rows[h.keys.cookies[1]]
    assert row["lane"] == 0  # kept for what must not be purged
    h.send(s, 90 * MSS, acked=False)
    h.device.queued[int(row["band"]), 0] = 130_000
    promote(h)
    assert h.device.purged == []


def test_observing_purges_nothing() -> None:
    h = Host()
    h.engine.set_mode(Mode.OBSERVE)
    deferred(h)
    promote(h)
    assert h.engine.books.counters.promotions > 0
    assert h.device.purged == []


def test_disabled_purges_nothing() -> None:
    h = Host(rescue=RescueConfig(enabled=False))
    deferred(h)
    promote(h)
    assert h.device.purged == []


@pytest.mark.parametrize(("notsent", "window_full"), [(0, False), (MORE, True)])
def test_what_only_a_timer_would_repair_is_let_out_instead(notsent: int, window_full: bool) -> None:  # noqa: FBT001
    """130 kB at a quarter of 1 Gbit/s: 4 ms, against a timeout of 200."""
    h = Host()
    s, place = deferred(h, more=notsent)
    s.window_full = window_full
    begin = h.now
    while h.device.guaranteed.get(place[0], 0.0) < DRAIN:
        assert h.now < begin + 1.0
        h.tick(0.005)
    assert sum(h.device.guaranteed.values()) <= 1.0
    h.device.queued[place] = 0
    promote(h)
    assert h.device.purged == []
    assert h.device.guaranteed.get(place[0], 0.0) < DRAIN
    assert h.engine.books.counters.rescues == 1


def test_what_is_left_after_it_was_let_out_is_purged() -> None:
    h = Host()
    _, place = deferred(h, more=0)
    promote(h)
    promote(h)
    assert place in h.device.purged


def test_who_was_let_out_before_anybody_looked_again_is_counted() -> None:
    """As on a busy machine: the next look comes after the time for it."""
    h = Host()
    _, place = deferred(h, more=0)
    while h.device.guaranteed.get(place[0], 0.0) < DRAIN:
        h.tick(0.005)
    h.device.queued[place] = 0
    h.tick(0.2)
    h.tick(0.005)
    assert h.device.purged == []
    assert h.engine.books.counters.rescues == 1


def test_who_is_back_where_it_was_is_not_purged() -> None:
    h = Host()
    s, place = deferred(h, more=0)
    while h.device.guaranteed.get(place[0], 0.0) < DRAIN:
        h.tick(0.005)
    for _ in range(40):
        h.request("r1", 0.2)  # as at first
        h.tick(0.005)
    assert h.band(s) == h.bands.bands[place[0]].name
    assert h.device.purged == []


def test_who_flips_connections_takes_no_more_than_a_share_of_the_time_from_others() -> None:
    h = Host(slots=64, lanes=32, rescue=RescueConfig(max_per_s=1000))
    let_out = ticks = 0
    for cookie in range(1, 41):
        _, place = deferred(h, cookie, left=0.15, more=0)
        for _ in range(10):
            h.tick(0.005)
            ticks += 1
            let_out += h.device.guaranteed.get(place[0], 0.0) >= DRAIN
    assert 0 < let_out <= 0.4 * ticks


def test_a_lane_that_is_let_out_soon_makes_room_for_the_next_one() -> None:
    """Two are promoted 60 ms apart: the first took 10 ms of the device's time, so it may do so again."""
    h = Host(slots=64, lanes=32)
    for cookie in (1, 2):
        _, place = deferred(h, cookie, left=0.15, more=0)
        while h.device.guaranteed.get(place[0], 0.0) < DRAIN:
            assert h.device.purged == []
            h.tick(0.005)
        h.tick(0.005)
        h.device.queued[place] = 0
        h.tick(0.005)
        h.tick(0.005)
        assert h.device.guaranteed.get(place[0], 0.0) < DRAIN
    assert h.device.purged == []
    assert h.engine.books.counters.rescues == 2


def test_a_lane_that_cannot_be_let_out_yet_waits_for_its_turn() -> None:
    """The second one is promoted 5 ms after the first one's lane is empty."""
    h = Host(slots=64, lanes=32)
    (_, first), (_, second) = (deferred(h, cookie, left=left, more=0) for cookie, left in ((1, 0.16), (2, 0.18)))
    while h.device.guaranteed.get(first[0], 0.0) < DRAIN:
        h.tick(0.005)
    for _ in range(2):
        h.tick(0.005)
    h.device.queued[first] = 0
    turns = 0
    while h.device.queued[second]:
        h.tick(0.005)
        let_out = h.device.guaranteed.get(second[0], 0.0) >= DRAIN
        turns += let_out
        if turns > 2:
            h.device.queued[second] = 0
        assert h.now < 1001.0
    assert h.device.purged == []


def test_a_crowd_that_is_promoted_together_is_let_out_together() -> None:
    """130 kB of each of forty: 166 ms at a quarter of the link, all of it theirs. Purges would cost all a timeout."""
    h = Host(slots=64, lanes=64)
    places = [deferred(h, cookie, left=0.3, more=0)[1] for cookie in range(1, 41)]
    band = places[0][0]
    while h.device.guaranteed.get(band, 0.0) < DRAIN:
        h.tick(0.002)
    begin = h.now
    for place in places:
        while h.now < begin + 130_000 / (DRAIN * 125e6):
            h.tick(0.002)
            assert h.device.guaranteed.get(band, 0.0) >= DRAIN
        begin += 130_000 / (DRAIN * 125e6)
        h.device.queued[place] = 0
    for _ in range(100):
        h.tick(0.002)
    assert h.device.purged == []
    assert h.device.guaranteed.get(band, 0.0) < DRAIN


def test_a_lane_that_many_share_the_band_with_is_purged() -> None:
    h = Host(slots=64, lanes=32)
    for cookie in range(2, 22):
        _, beside = deferred(h, cookie, left=0.3)
    _, place = deferred(h, more=0)  # 130 kB, and as much of each: 87 ms at a quarter of the link
    assert beside[0] == place[0]
    begin = h.now
    while place not in h.device.purged:
        assert h.device.guaranteed.get(place[0], 0.0) < DRAIN
        assert h.now < begin + 1.0
        h.tick(0.005)


def test_a_floor_that_the_device_cannot_give_drains_nothing() -> None:
    h = Host(floors=(0.0, 0.0, 0.05, 0.05, 0.05))
    h.device.floors = False  # prio
    deferred(h)
    promote(h)
    assert h.device.purged != []


def test_rescues_are_bounded_per_second_and_the_rest_follow() -> None:
    h = Host(slots=64, lanes=32, rescue=RescueConfig(max_per_s=10))
    for cookie in range(1, 21):
        deferred(h, cookie, left=0.3)
    for _ in range(100):
        h.tick(0.005)
        if h.engine.books.counters.rescues:
            break
    assert 0 < h.engine.books.counters.rescues <= 10
    for _ in range(400):
        h.tick(0.01)
    assert len(set(h.device.purged)) == 20


def test_a_device_that_uses_up_its_rescues_leaves_the_others_theirs() -> None:
    h = Host(slots=64, lanes=32, rescue=RescueConfig(max_per_s=10), devices=2)
    for cookie in range(1, 21):
        deferred(h, cookie, left=0.3)
    deferred(h, 21, left=0.3, device=1)
    for _ in range(100):
        h.tick(0.005)
        if h.device.purged:
            break
    assert len(h.device.purged) == 10  # all that it may have in its first second
    assert len(h.devices[1].purged) == 1


def test_without_devices_there_is_nothing_to_rescue() -> None:
    h = Host(devices=0)
    s = h.socket(1)
    h.request("r", 1.0)
    h.transfer("t", s, MSS)
    h.tick()
    promote(h)
    promote(h)
    promote(h)
    promote(h)
    assert h.engine.books.counters.promotions > 0
