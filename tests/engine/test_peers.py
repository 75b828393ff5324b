# SPDX-License-Identifier: Apache-2.0
"""What is learnt of the links into peers: only from windows that the network limited, never too little, audited."""

from __future__ import annotations

import math
from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.harness import MSS, FakeSocket, Host
from support.work import steps

from mfsd.daemon.config import PeerConfig
from mfsd.engine.peers import (
    AGE_S,
    MANY,
    RAISE,
    REMEMBERED,
    SEEN_S,
    SIGHTINGS,
    STEADY,
    Peers,
    limited_by_network,
)
from mfsd.engine.probes import ASKED, Probes
from mfsd.ground.model import Stage
from mfsd.ground.units import Rate

HERE = ip_address("10.0.0.2")
LINK = 125e6
"""Of Host: 1 Gbit/s."""


# --- what counts as limited by the network ----------------------------------------------------------------------------

WINDOW_S = 0.1
BEFORE = FakeSocket(1, endpoints=None)  # type: ignore[arg-type]  # not looked at
LIMITED = replace(BEFORE, busy_us=100_000)


@pytest.mark.parametrize(
    ("change", "limited"),
    [
        ({}, True),
        ({"busy_us": 92_000}, True),  # within the grain of TCP's clock
        ({"busy_us": 60_000}, False),
        ({"rwnd_limited_us": 30_000}, False),
        ({"sndbuf_limited_us": 30_000}, False),
        ({"app_limited": True}, False),
        ({"slow_start": True}, False),
        ({"queued": 140_000}, False),
    ],
)
def test_windows_limited_by_anything_else_are_left_out(change: dict[str, Any], *, limited: bool) -> None:
    assert limited_by_network(BEFORE, replace(LIMITED, **change), WINDOW_S) is limited


def test_a_lane_that_was_queued_at_the_beginning_is_left_out() -> None:
    assert not limited_by_network(replace(BEFORE, queued=140_000), LIMITED, WINDOW_S)


# --- the books --------------------------------------------------------------------------------------------------------

sightings = st.lists(st.tuples(st.floats(0.0, 8.0), st.floats(1.0, 1e10)), min_size=1, max_size=40)
"""(seconds since the one before, bytes/s)."""


def learnt(trace: list[tuple[float, float]], scale: float = 1.0) -> list[float]:
    """After each sighting of a trace."""
    peers, now, out = Peers(None), 1000.0, []
    index = peers.take(HERE)
    for gap, rate in trace:
        now += gap
        peers.saw(index, rate * scale, now)
        out.append(float(peers.learnt(now)[index]))
    return out


@given(sightings)
def test_never_below_what_was_seen_in_the_last_30_s_and_never_above_what_was_seen_at_all(
    trace: list[tuple[float, float]],
) -> None:
    times = np.cumsum([gap for gap, _ in trace])
    for i, now in enumerate(learnt(trace)):
        recent = [
            rate for rate, at in zip((r for _, r in trace[: i + 1]), times, strict=False) if times[i] - at < SEEN_S
        ]
        if len(recent) >= SIGHTINGS:
            assert max(recent) <= now <= max(rate for _, rate in trace[: i + 1])
        elif i + 1 < SIGHTINGS:
            assert now == 0


@given(sightings, st.floats(1e-3, 1e3))
def test_a_scaled_trace_gives_a_scaled_rate(trace: list[tuple[float, float]], scale: float) -> None:
    assert learnt(trace, scale) == pytest.approx([scale * rate for rate in learnt(trace)])


def seen(peers: Peers, index: int, rate: float, now: float, times: int = SIGHTINGS) -> None:
    for _ in range(times):
        peers.saw(index, rate, now)


def test_what_is_old_is_forgotten() -> None:
    peers = Peers(None)
    index = peers.take(HERE)
    seen(peers, index, 100.0, 0.0)
    assert peers.learnt(SEEN_S)[index] == 100.0
    seen(peers, index, 60.0, SEEN_S)
    assert peers.learnt(SEEN_S + 2 * AGE_S)[index] == 60.0
    assert peers.learnt(10 * SEEN_S)[index] == 0.0


@pytest.mark.parametrize(
    ("rate", "used"),
    [
        (30.0, math.inf),  # no more than a fair share: perhaps others use the link, too
        (60.0, 60.0),
        (100.0, math.inf),  # as fast as our own link
    ],
)
def test_used_between_our_links_fair_share_and_its_rate(rate: float, used: float) -> None:
    peers = Peers(None)
    index, *_ = (peers.take(ip_address(f"10.0.0.{i}")) for i in range(3))
    seen(peers, index, rate, 0.0, SIGHTINGS - 1)
    peers.refresh(0.0, 100.0)
    assert len(peers.rate) == 0
    peers.saw(index, rate, 0.0)
    peers.refresh(0.0, 100.0)
    assert (peers.rate[index] if len(peers.rate) else math.inf) == used


def alone(rates: list[float], seconds: float, link: float = 100.0) -> float:
    """What is used of a single peer of which so much has been seen in so long; inf: nothing."""
    peers = Peers(None)
    index = peers.take(HERE)
    for at, rate in zip(np.linspace(0.0, seconds, len(rates)), rates, strict=True):
        peers.saw(index, rate, float(at))
    peers.refresh(seconds, link)
    return float(peers.rate[index]) if len(peers.rate) else math.inf


STEADILY = [30.0, 31.0] * (MANY // 2)


@pytest.mark.parametrize("scale", [0.01, 1.0, 2.9])
def test_a_single_peer_below_our_link_is_used_when_many_windows_agree(scale: float) -> None:
    assert alone([scale * rate for rate in STEADILY], 3 * AGE_S) == pytest.approx(31.0 * scale)


@pytest.mark.parametrize(
    ("rates", "seconds"),
    [
        (STEADILY[1:], 3 * AGE_S),
        (STEADILY, 0.9 * AGE_S),  # it may be one rival's time
        ([30.0, 45.0] * (MANY // 2), 3 * AGE_S),  # a share of it, for it varies
        ([3.2 * rate for rate in STEADILY], 3 * AGE_S),  # as fast as our own link, for all that can be told
    ],
)
def test_a_single_peer_is_not_used_on_less(rates: list[float], seconds: float) -> None:
    assert alone(rates, seconds) == math.inf


@given(st.floats(1.0, 1e11), st.floats(0.0, 1.0), st.floats(1e-3, 1e3))
def test_whether_a_single_peer_is_used_does_not_depend_on_the_scale(rate: float, swing: float, scale: float) -> None:
    rates = [rate, rate * (1.0 + swing)] * MANY
    used, scaled = (alone([r * s for r in rates], 4 * AGE_S, 5 * rate * s) for s in (1.0, scale))
    assert scaled == pytest.approx(scale * used)
    # The deviation of two values is half their distance.
    deviation = swing / 2 / (1 + swing / 2)
    if abs(deviation - STEADY) > 1e-6:
        assert math.isfinite(used) == (deviation < STEADY)


def test_what_is_configured_holds() -> None:
    peers = Peers(lambda address: 70.0 if address == HERE else math.inf)
    index, other = peers.take(HERE), peers.take(ip_address("10.0.0.3"))
    seen(peers, index, 90.0, 0.0)
    seen(peers, other, 80.0, 0.0)
    peers.refresh(0.0, 100.0)
    assert peers.rate.tolist() == [70.0, 80.0]
    assert peers.judged_by_what_was_learnt().tolist() == [False, True]
    (slow, fast) = peers.known(0.0)
    assert (slow.configured, slow.used, fast.learnt, fast.used) == (70.0, 70.0, 80.0, 80.0)
    third = peers.take(ip_address("10.0.0.4"))
    assert peers.rate[third] == math.inf


def test_the_audit_raises_what_gives_up_too_many() -> None:
    peers = Peers(None)
    index = peers.take(HERE)
    seen(peers, index, 100.0, 0.0)
    for n in range(49):
        peers.ended(HERE, in_time=False)
        assert peers.known(0.0)[0].given_up == n + 1
    peers.ended(HERE, in_time=True)  # 2 % of 50
    assert peers.learnt(0.0)[index] == 100.0
    peers.ended(HERE, in_time=True)
    assert peers.learnt(0.0)[index] == 100.0 * RAISE
    assert (peers.known(0.0)[0].given_up, peers.known(0.0)[0].raised) == (0, RAISE)
    peers.ended(ip_address("10.0.0.9"), in_time=True)  # gone meanwhile


def test_a_peer_without_connections_is_remembered_for_a_while() -> None:
    peers = Peers(None)
    index = peers.take(HERE)
    seen(peers, index, 100.0, 0.0)
    peers.give_back(HERE)
    other = peers.take(ip_address("10.0.0.3"))
    assert (other, peers.learnt(0.0)[other], peers.known(0.0)) == (index, 0.0, [])
    again = peers.take(HERE)
    assert peers.learnt(1.0)[again] == 100.0
    peers.give_back(HERE)
    peers.learnt(2 * SEEN_S)
    assert peers.learnt(2 * SEEN_S)[peers.take(HERE)] == 0.0
    for i in range(REMEMBERED + 10):
        address = ip_address(0x0B000000 + i)
        seen(peers, peers.take(address), 1.0, 2 * SEEN_S)
        peers.give_back(address)
    assert len(peers._remembered) == REMEMBERED


# --- the engine -------------------------------------------------------------------------------------------------------


def busy(h: Host, sock: FakeSocket, rate: float, seconds: float, **limits: int) -> None:
    """A connection that the network limits to ``rate`` for so long, in four packets per tick."""
    for _ in range(round(seconds / 0.01)):
        for _ in range(4):
            h.send(sock, round(rate * 0.01 / 4))
        sock.busy_us += 10_000
        for name, us in limits.items():
            setattr(sock, name, getattr(sock, name) + us)
        h.tick(0.01)


def far_hosts(h: Host) -> list[FakeSocket]:
    """Connections to four hosts, with something to send for long."""
    h.request("r", 500.0)
    socks = [h.socket(i + 1, dst=f"10.0.0.{i + 2}") for i in range(4)]
    for i, sock in enumerate(socks):
        h.transfer(f"t{i}", sock, 1 << 40, Stage.P2D)
    h.tick(0.01)
    return socks


def test_the_engine_learns_what_a_slow_receiver_takes() -> None:
    h = Host("demand-bound")
    slow, *_ = far_hosts(h)
    busy(h, slow, 50e6, 2.0)
    (known,) = h.connections.peers.known(h.now)
    assert known.address == slow.endpoints.dst
    assert known.sightings >= SIGHTINGS
    assert known.learnt == pytest.approx(50e6, rel=0.1)
    assert known.used == known.learnt
    assert h.engine.steering.views(h.now).link.peer_rate[h.connections.peer[h.keys.cookies[1]]] == known.used


def test_several_connections_to_a_host_add_up() -> None:
    h = Host("demand-bound")
    slow, *_ = far_hosts(h)
    twin = h.socket(99, dst=str(slow.endpoints.dst))
    h.transfer("twin", twin, 1 << 40)
    h.tick(0.01)
    for _ in range(100):
        for sock in (slow, twin):
            sock.busy_us += 10_000
            for _ in range(2):
                h.send(sock, 100 * MSS)
        h.tick(0.01)
    (known,) = h.connections.peers.known(h.now)
    assert known.learnt == pytest.approx(2 * 200 * MSS / 0.01, rel=0.1)


@pytest.mark.parametrize("limit", ["rwnd_limited_us", "sndbuf_limited_us"])
def test_the_engine_learns_nothing_where_the_receiver_or_the_process_is_slow(limit: str) -> None:
    h = Host("demand-bound")
    slow, *_ = far_hosts(h)
    busy(h, slow, 50e6, 1.0, **{limit: 5_000})
    assert h.connections.peers.known(h.now) == []


def test_the_jump_after_a_loss_is_no_rate() -> None:
    h = Host("demand-bound")
    slow, *_ = far_hosts(h)
    rate = 50e6
    for _ in range(40):
        busy(h, slow, rate, 0.05)
        slow.holes = True
        busy(h, slow, 0.1 * rate, 0.05)  # what has arrived behind the hole is not acknowledged
        h.send(slow, round(0.9 * rate * 0.05))
        slow.holes = False
    (known,) = h.connections.peers.known(h.now)
    assert known.sightings >= SIGHTINGS
    assert known.learnt < 1.2 * rate


def test_the_engine_learns_nothing_of_what_is_configured_and_asks_nobody() -> None:
    rate = Rate.parse("400mbit")
    h = Host("demand-bound", peers=[PeerConfig(network=ip_network("10.0.0.2"), rate=rate)])
    slow, *_ = far_hosts(h)
    h.tick(0.01)
    before = h.kernel.asked
    busy(h, slow, 40e6, 0.5)
    assert h.kernel.asked == before
    (known,) = h.connections.peers.known(h.now)
    assert (known.sightings, known.used) == (0, rate.bytes_per_s)


def test_who_is_given_up_by_a_learnt_rate_and_is_in_time_raises_it() -> None:
    h = Host("demand-bound")
    slow, *_ = far_hosts(h)
    busy(h, slow, 50e6, 2.0)
    peers, size = h.connections.peers, 80_000_000
    (known,) = peers.known(h.now)
    h.request("tight", 1.0)  # 80 MB in one second: our link can, theirs can't as far as is known
    sock = h.socket(50, dst=str(slow.endpoints.dst))
    h.transfer("tight", sock, size, request="tight")
    h.tick(0.01)
    assert h.engine.books.transfers.get(h.session.transfers["tight"], "given_up")
    h.send(sock, size)
    h.tick(0.01)
    h.tick(0.01)
    assert "tight" not in h.session.transfers
    (after,) = peers.known(h.now)
    assert after.raised == RAISE
    assert after.learnt == pytest.approx(known.learnt * RAISE, rel=0.1)


def test_it_costs_little() -> None:
    n, ticks = 10_000, 100
    h = Host("demand-bound", slots=n)
    for i in range(n):
        sock = h.socket(i + 1, 1024 + i, dst=f"10.0.{i % 40}.{1 + i % 50}")
        h.connections.of_socket(sock.told, h.now + 1000)
    probes, took = Probes(h.connections), []
    rows = h.table.rows
    for _ in range(ticks):
        h.now += 0.01
        rows["acked"][:n] += 100_000
        rows["packets"][:n] += 2
        for sock in h.kernel.sockets:
            sock.busy_us += 10_000
        took.append(steps(lambda: probes.run(h.now)))
    assert sum(p.sightings for p in h.connections.peers.known(h.now)) > ticks // 8
    assert h.kernel.asked <= (ticks / 4 + 1) * 2 * ASKED  # every fourth tick, at the beginning and at the end
    assert max(took) < n + 1000  # one pass is the simulated kernel's; how long it takes: bench/tick.py
