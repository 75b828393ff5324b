# SPDX-License-Identifier: Apache-2.0
"""Hints over gRPC steer real TCP connections into the right queues, and promotion works under saturation."""

from __future__ import annotations

import socket
import time
from functools import partial
from typing import TYPE_CHECKING

import pytest
from support.rig import RATE_MBIT, Daemon, Flow, class_bytes, flows, running
from support.waiting import wait_for

from mfsd.client import Client, tuple_of
from mfsd.ground.model import Event, EventKind, Stage
from mfsd.lab.hosts.tcp import tcp_info

if TYPE_CHECKING:
    from pathlib import Path

    from support.namespaces import NetnsPair

pytestmark = pytest.mark.netns

LINK = RATE_MBIT * 125_000
MB = 1_000_000


BUSY = 6
"""Saturating connections: together they keep the queue filled although their sender is one Python process."""
TRIES = 5


def in_band(daemon: Daemon, flow: Flow, band: str) -> bool:
    return daemon.band_of(flow) == band


def arrived(flow: Flow, size: int) -> bool:
    return flow.received == size


def occupy(daemon: Daemon, client: Client, late: Flow, busy: list[Flow]) -> None:
    """Let ``busy`` saturate the link above ``late``."""
    for flow in busy:
        client.mark(flow.sender, Stage.KV_REUSE)
    client.mark(late.sender, Stage.P2D)
    assert client.flush(5)
    wait_for(lambda: daemon.band_of(late) == "level 4", "deferral")
    for flow in busy:
        flow.saturate()
    wait_for(lambda: sum(f.received for f in busy) > 5 * MB, "the link to be busy")


def defer(daemon: Daemon, client: Client, late: Flow, busy: list[Flow]) -> None:
    """The same, with ``late`` having all it may have in its queue."""
    occupy(daemon, client, late, busy)
    late.saturate()


@pytest.mark.parametrize("v6", [False, True])
def test_each_stage_lands_in_its_queue(daemon: Daemon, v6: bool) -> None:  # noqa: FBT001 - a parameter of the test
    opened = [Flow.open(daemon.pair, v6=v6) for _ in range(4)]
    try:
        with daemon.client() as client:
            client.request("r", ttft_left_s=60)
            stages = [Stage.COLLECTIVE, Stage.KV_REUSE, Stage.P2D]
            for i, stage in enumerate(stages):
                client.transfer(f"t{i}", opened[i].sender, MB, stage=stage, request="r")
            assert client.flush(5)
            wait_for(lambda: daemon.band_of(opened[2]) == "level 4", "P2D to be deferred")
            before = daemon.bands()
            for flow in opened:
                flow.sender.sendall(bytes(MB))
            wait_for(lambda: all(f.received == MB for f in opened), "everything to arrive")
            after = daemon.bands()
            grown = {name: after[name].bytes - before[name].bytes for name in after}
            for name in ("level 0", "level 1", "level 4", "default"):
                assert MB <= grown[name] < 1.2 * MB, (name, grown)
            for name in ("level 2", "level 3", "scavenger"):
                assert grown[name] == 0
            # tc's own counters say the same: that is where the packets were queued.
            by_class = class_bytes(daemon.pair)
            for name in ("level 0", "level 1", "level 4"):
                major, _, lane0 = after[name].classid.partition(":")
                lanes = [f"{major}:{int(lane0, 16) + i:x}" for i in range(after[name].lanes)]
                assert sum(by_class[lane] for lane in lanes) >= MB
    finally:
        for flow in opened:
            flow.close()


def test_a_deferred_flow_starves_and_is_rescued_when_promoted(daemon: Daemon) -> None:
    with flows(daemon.pair, 1 + BUSY) as (late, *busy), daemon.client() as client:
        defer(daemon, client, late, busy)
        time.sleep(0.3)
        assert late.rate(0.5) < 0.1 * LINK  # deferred, served as its floor allows
        # It must overtake at once, although its packets sit in a starved queue.
        client.mark(late.sender, Stage.COLLECTIVE)
        assert client.flush(5)
        wait_for(lambda: late.rate(0.05) > 0.8 * LINK, "the promoted flow to get the link", timeout=2.0)
        wait_for(lambda: daemon.status().counters.rescues, "the rescue to be counted, at the next tick")
        assert daemon.status().counters.promotions >= 1


def test_a_new_connection_that_is_promoted_waits_for_no_timer(daemon: Daemon) -> None:
    """All that its window allows is in the starved queue, and nothing follows whose SACKs would repair a purge.

    On a busy machine the floor may have let it go before the mark is heard, with nothing left to rescue: then another.
    """
    with flows(daemon.pair, TRIES + BUSY) as opened, daemon.client() as client:
        new, busy = opened[:TRIES], opened[TRIES:]
        occupy(daemon, client, new[0], busy)
        rescues = daemon.status().counters.rescues
        for late in new:
            client.mark(late.sender, Stage.P2D)
            assert client.flush(5)
            wait_for(partial(in_band, daemon, late, "level 4"), "deferral")
            late.sender.sendall(bytes(MB // 20))
            assert late.received < MB // 20
            client.mark(late.sender, Stage.COLLECTIVE)
            assert client.flush(5)
            wait_for(partial(arrived, late, MB // 20), "arrival")
            assert tcp_info(late.sender).rtos == 0
            time.sleep(0.2)  # It is counted at the next tick.
            if daemon.status().counters.rescues > rescues:
                return
        pytest.fail(f"no rescue was counted, {TRIES} times")


def test_a_transfer_rises_as_its_deadline_nears(daemon: Daemon) -> None:
    """Eight connections would share the link evenly; the dated one needs more than an eighth of what is left."""
    with flows(daemon.pair, 8) as (late, *others), daemon.client() as client:
        for i, flow in enumerate(others):
            client.request(f"o{i}", ttft_left_s=60)
            client.transfer(f"o{i}", flow.sender, 100 * MB, stage=Stage.P2D, request=f"o{i}")
        client.request("r", ttft_left_s=1.5)
        client.transfer("t", late.sender, 5 * MB, stage=Stage.P2D, request="r")
        assert client.flush(5)
        for flow in (*others, late):
            flow.saturate()
        seen: list[str] = []

        def risen() -> bool:
            seen.append(daemon.band_of(late))
            return seen[-1] in ("level 2", "level 3")

        wait_for(risen, "promotion")
        assert seen[0] == "level 4"
        assert daemon.status().counters.promotions >= 1


def test_without_rescue_the_same_promotion_stalls(netns_pair: NetnsPair, tmp_path: Path) -> None:
    """The reason for rescue: were this test to fail, plain re-classification would do, and rescue could go."""
    with (
        running(Daemon(netns_pair, tmp_path, extra="[rescue]\nenabled = false")) as daemon,
        flows(netns_pair, 1 + BUSY) as (late, *busy),
        daemon.client() as client,
    ):
        defer(daemon, client, late, busy)
        time.sleep(0.3)
        client.mark(late.sender, Stage.COLLECTIVE)
        assert client.flush(5)
        wait_for(lambda: daemon.band_of(late) == "level 0", "re-classification")
        assert late.rate(0.4) < 0.5 * LINK


def test_expired_hints_let_go(daemon: Daemon) -> None:
    with flows(daemon.pair, 1) as (flow,), daemon.client() as client:
        client.request("r", ttft_left_s=0.3, ttl_s=0.3)
        client.transfer("t", flow.sender, 50 * MB, stage=Stage.P2D, request="r", ttl_s=0.3)
        assert client.flush(5)
        wait_for(lambda: daemon.band_of(flow).startswith(("level", "scav")), "the hint to act")
        wait_for(lambda: daemon.band_of(flow) == "", "the hint to expire")
        before = daemon.bands()["default"].bytes
        flow.sender.sendall(bytes(MB))
        wait_for(lambda: flow.received == MB, "arrival")
        assert daemon.bands()["default"].bytes - before >= MB


def test_a_stopped_daemon_harms_nobody_and_takes_up_again(daemon: Daemon) -> None:
    with flows(daemon.pair, 1) as (flow,), daemon.client() as client:
        client.mark(flow.sender, Stage.COLLECTIVE)
        assert client.flush(5)
        wait_for(lambda: daemon.band_of(flow) == "level 0", "the mark to act")
        with daemon.held_up():
            time.sleep(1.3)  # heartbeat_timeout_ms is 1000
            flow.sender.sendall(bytes(MB))
            wait_for(lambda: flow.received == MB, "traffic to flow without a daemon")
        status = wait_for(daemon.status, "the daemon to answer again")
        assert status.devices[0].stats["stale"] > 0
        grown = daemon.bands()["level 0"].bytes
        flow.sender.sendall(bytes(MB))
        wait_for(lambda: flow.received == 2 * MB, "arrival")
        assert daemon.bands()["level 0"].bytes - grown >= MB


def test_a_new_socket_with_old_ports_inherits_nothing(daemon: Daemon) -> None:
    flow = Flow.open(daemon.pair, port=6001, source_port=45_001)
    with daemon.client() as client:
        client.mark(flow.sender, Stage.COLLECTIVE)
        assert client.flush(5)
        wait_for(lambda: daemon.band_of(flow) == "level 0", "the mark to act")
        flow.close()
        flow = Flow.open(daemon.pair, port=6001, source_port=45_001)
        try:
            before = daemon.bands()
            flow.sender.sendall(bytes(MB))
            wait_for(lambda: flow.received == MB, "arrival")
            after = daemon.bands()
            assert after["default"].bytes - before["default"].bytes >= MB
            assert after["level 0"].bytes == before["level 0"].bytes
        finally:
            flow.close()


def test_hints_for_dead_sockets_come_back_as_events(daemon: Daemon) -> None:
    with flows(daemon.pair, 1) as (flow,):
        events: list[Event] = []
        with daemon.client(on_event=events.append) as client:
            client.request("r", ttft_left_s=30)
            client.transfer("t", flow.sender, MB, stage=Stage.P2D, request="r")
            assert client.flush(5)
            flow.close()
            wait_for(lambda: [e for e in events if e.kind == EventKind.CONNECTION_GONE], "the event")
            wait_for(lambda: daemon.status().connections == 0, "the slot to be freed")


def test_a_selector_by_ports_waits_for_its_socket(daemon: Daemon) -> None:
    pair = daemon.pair
    with daemon.client() as client:
        client.mark(tuple_of(pair.addr_b, (6100, 6110)), Stage.COLLECTIVE)
        assert client.flush(5)
        wait_for(lambda: daemon.status().pending_selectors == 1, "the selector to be named, after a second")
        flow = Flow.open(pair, port=6105)
        try:
            wait_for(lambda: daemon.band_of(flow) == "level 0", "the rule to find its socket")
            assert daemon.status().pending_selectors == 0
        finally:
            flow.close()


def test_unhinted_traffic_is_left_alone(daemon: Daemon) -> None:
    def sender() -> socket.socket:
        return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)

    with daemon.pair.call(daemon.pair.a, sender) as s:
        before = daemon.status().devices[0]
        for _ in range(100):
            s.sendto(bytes(1000), (daemon.pair.addr_b, 9))
        after = daemon.status().devices[0]
    assert after.stats["miss"] - before.stats["miss"] >= 100
    assert all(b.bytes == 0 for b in after.bands if b.name.startswith("level"))


def test_advice_says_what_the_way_to_a_peer_bears_and_what_is_announced_on_it(daemon: Daemon) -> None:
    there = daemon.pair.addr_b
    with flows(daemon.pair, 1) as (flow,), daemon.client() as client:
        idle = wait_for(lambda: client.advice(there), "the first word")
        assert idle.rate == pytest.approx(LINK)
        assert (idle.queued, idle.device_queued) == (0.0, 0.0)
        client.request("r", ttft_left_s=60)
        client.transfer("t", flow.sender, 30 * MB, stage=Stage.P2D, request="r")
        assert client.flush(5)

        def announced() -> float:
            said = client.advice(there)
            return said.queued if said is not None else 0.0

        wait_for(lambda: announced() == 30 * MB, "what is announced")
        client.cancel(transfer="t")
        assert client.flush(5)
        wait_for(lambda: announced() == 0.0, "that it is taken back")
        flow.saturate()
        wait_for(lambda: (said := client.advice(there)) is not None and said.spare < 0.2 * LINK, "the load to be seen")
