# SPDX-License-Identifier: Apache-2.0
"""Which socket, which addresses, which device: MPTCP, macvlan, multipath routes, mapped addresses, very many."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import subprocess
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import psutil
import pytest
from support.habits import (
    KB,
    MB,
    PORT,
    WRONG,
    Grown,
    Sink,
    band,
    close_hard,
    dial,
    second_link,
    settled,
    shown,
    three_in_turn,
    transfers,
)
from support.pods import bridged, routed
from support.rig import RATE_MBIT, Daemon, Flow, running
from support.waiting import WAIT_FACTOR, wait_for

from mfsd.client import Client, Rejected, Stage, Transfer, process_peer, tuple_of
from mfsd.client.selectors import IPPROTO_MPTCP

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.namespaces import NetnsPair

pytestmark = pytest.mark.netns

LINK = RATE_MBIT * 125_000
TRIES: Final = 4
"""A busy machine may have let go what a promotion would have to rescue."""


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    with daemon.client() as c:
        assert c.flush(20)
        yield c


def test_an_mptcp_socket_is_named_and_its_subflows_are_steered_by_addresses(daemon: Daemon) -> None:
    pair, seen = daemon.pair, list[Rejected]()

    def connect() -> socket.socket:
        s = socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP)
        s.connect((pair.addr_b, PORT))
        return s

    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP).close()
    except OSError:
        pytest.skip("this kernel has no MPTCP")
    with Sink(pair, protocol=IPPROTO_MPTCP) as sink, daemon.client(on_rejected=seen.append) as client:
        with pair.call(pair.a, connect) as s:
            client.request("r", ttft_left_s=60)
            client.transfer("no", s, MB, stage=Stage.P2D, request="r")
            assert "MPTCP" in seen[0].message
            doctor = json.loads(daemon.mfsctl("--json", "doctor", "--device", pair.dev_a).stdout)
            assert "tcp.mptcp" in {f["id"] for f in doctor["findings"]}
            client.transfer("t", tuple_of(*s.getpeername()), 5 * MB, stage=Stage.P2D, request="r")
            assert client.flush(5)
            grown = Grown(daemon)
            s.sendall(bytes(5 * MB))
            wait_for(lambda: sink.received == 5 * MB, "arrival")
            settled(daemon, (1, 0, 0))
            assert grown.wrong(5 * MB) <= WRONG
        # One that is still to come, and is in its band from its first byte on.
        client.mark(tuple_of(pair.addr_b, PORT), Stage.COLLECTIVE)
        assert client.flush(5)
        grown = Grown(daemon)
        with pair.call(pair.a, connect) as s:
            s.sendall(bytes(5 * MB))
            wait_for(lambda: sink.received == 10 * MB, "arrival")
        assert grown.wrong(5 * MB, right="level 0") <= WRONG


def test_a_socket_behind_macvlan_in_a_namespace_of_its_own(netns_pair: NetnsPair, tmp_path: Path) -> None:
    pair, own = netns_pair, f"{netns_pair.a}-mv"
    with contextlib.ExitStack() as stack:
        subprocess.run(["ip", "netns", "add", own], check=True)
        stack.callback(subprocess.run, ["ip", "netns", "del", own], check=True)
        made = subprocess.run(
            ["ip", "-n", pair.a, "link", "add", "link", "v0", "name", "mv0", "netns", own, "type", "macvlan",
             "mode", "bridge"],
            check=False,
            capture_output=True,
        )  # fmt: skip
        if made.returncode:
            pytest.skip("this kernel has no macvlan")
        pair.run(own, "ip link set lo up; ip addr add 10.77.0.9/24 dev mv0; ip link set mv0 up")
        daemon = stack.enter_context(running(Daemon(pair, tmp_path)))
        sink = stack.enter_context(Sink(pair))
        client = stack.enter_context(daemon.client())
        s = stack.enter_context(dial(replace(pair, a=own)))
        client.request("r", ttft_left_s=60)
        grown = Grown(daemon)
        for i in range(4):
            client.transfer(f"t{i}", s, MB, stage=Stage.P2D, request="r")
            assert client.flush(5)
            s.sendall(bytes(MB))
            wait_for(lambda i=i: sink.received == (i + 1) * MB, "arrival")  # type: ignore[misc]
            settled(daemon, (i + 1, 0, 0))
            time.sleep(0.7)
        assert grown.wrong(4 * MB) <= WRONG
        found = shown(daemon, s)
        assert found is not None
        assert found.bytes_sent >= 4 * MB


BOTH = """
sysctl -qw net.ipv4.fib_multipath_hash_policy=1 net.ipv4.conf.all.rp_filter=0
ip addr add 10.88.0.1/24 dev w0; ip link set w0 up
ip route add 10.99.0.1 nexthop via 10.77.0.2 dev v0 nexthop via 10.88.0.2 dev w0
"""


def test_the_device_is_the_one_that_the_packets_use(netns_pair: NetnsPair, tmp_path: Path) -> None:
    pair = netns_pair
    second = second_link(pair, BOTH)
    through = replace(pair, addr_a="0.0.0.0", addr_b="10.99.0.1")  # noqa: S104 - the route decides on the source
    with (
        contextlib.ExitStack() as stack,
        running(Daemon(pair, tmp_path, extra=second)) as daemon,
        daemon.client() as client,
    ):
        flows = []
        for _ in range(16):
            flows.append(Flow.open(through))
            stack.callback(flows[-1].close)
        for flow in flows:
            client.mark(flow.sender, Stage.KV_REUSE)
        assert client.flush(5)
        used: dict[str, list[Flow]] = {"v0": [], "w0": []}
        for flow in flows:
            before = _sent(pair)
            flow.sender.sendall(bytes(200 * KB))
            wait_for(lambda flow=flow: flow.received == 200 * KB, "arrival")  # type: ignore[misc]
            grown = {name: n - before[name] for name, n in _sent(pair).items()}
            used[max(grown, key=lambda name: grown[name])].append(flow)
        assert all(used.values()), "no choice of routes: nothing is tested"

        def believed() -> dict[str, int]:
            return {d.name: sum(b.connections for b in d.bands) for d in daemon.status().devices}

        wait_for(lambda: believed() == {name: len(fs) for name, fs in used.items()}, "the devices to be known")
        # A promotion on either device is rescued there.
        for on in used.values():
            late, *busy = on
            if len(busy) < 2:
                continue
            _is_rescued(daemon, client, late, busy)
            for flow in on:
                flow.close()


def _is_rescued(daemon: Daemon, client: Client, late: Flow, busy: list[Flow]) -> None:
    rescues = daemon.status().counters.rescues
    for flow in busy:
        flow.saturate()
    wait_for(lambda: sum(f.rate(0.1) for f in busy) > 0.8 * LINK, "the device to be busy")
    late.saturate()
    for _ in range(TRIES):
        client.mark(late.sender, Stage.P2D)
        assert client.flush(5)
        wait_for(lambda: band(daemon, late.sender) == "level 4", "deferral")
        time.sleep(0.3)
        client.mark(late.sender, Stage.COLLECTIVE)
        assert client.flush(5)
        wait_for(lambda: late.rate(0.05) > 0.6 * LINK, "promotion", 3.0 * WAIT_FACTOR)
        time.sleep(0.2)  # It is counted at the next tick.
        if daemon.status().counters.rescues > rescues:
            return
    assert WAIT_FACTOR > 1, "no rescue"  # emulated processors leave the queues too empty to need any


def _sent(pair: NetnsPair) -> dict[str, int]:
    links = json.loads(pair.run(pair.a, "ip -j -s link"))
    return {link["ifname"]: link["stats64"]["tx"]["bytes"] for link in links if link["ifname"] in ("v0", "w0")}


def test_forty_thousand_transfers_are_shown_in_pages(daemon: Daemon, client: Client, sink: Sink) -> None:
    count = 40_000
    with dial(daemon.pair) as s:
        client.request("r", ttft_left_s=600)
        for start in range(0, count, 4000):
            client.transfers(Transfer(f"t{start + i}", s, MB, Stage.P2D, "r") for i in range(4000))
        assert client.flush(20)
        assert client.stats.rejected == client.stats.dropped == 0
        table = daemon.mfsctl("--socket", str(daemon.socket), "transfers")
        assert table.returncode == 0, table.stderr
        assert sum(" P2D " in line or " p2d " in line for line in table.stdout.splitlines()) == count
        shown_json = daemon.mfsctl("--socket", str(daemon.socket), "--json", "transfers")
        assert shown_json.returncode == 0, shown_json.stderr
        assert len(json.loads(shown_json.stdout)["transfers"]) == count
        few = daemon.mfsctl("--socket", str(daemon.socket), "--json", "transfers", "--limit", "10")
        assert len(json.loads(few.stdout)["transfers"]) == 10
    assert not sink.received


def test_addresses_that_are_written_otherwise(daemon: Daemon, client: Client, sink: Sink) -> None:
    pair = daemon.pair
    client.mark(process_peer(os.getpid(), f"::ffff:{pair.addr_b}"), Stage.COLLECTIVE)
    assert client.flush(5)
    with dial(pair) as s:
        wait_for(lambda: band(daemon, s) == "level 0", "the process's connection")
    client.unmark(process_peer(os.getpid(), f"::ffff:{pair.addr_b}"))
    client.mark(tuple_of(pair.addr_b, PORT, "0.0.0.0", 45_013), Stage.COLLECTIVE)  # noqa: S104 - any address
    assert client.flush(5)
    with dial(pair, source_port=45_013) as s, dial(pair) as other:
        wait_for(lambda: band(daemon, s) == "level 0", "the connection from that port")
        assert band(daemon, other) in ("", "default")
    assert not sink.received


def test_a_mapped_socket_is_an_ipv4_one(daemon: Daemon, client: Client, sink: Sink) -> None:
    pair = daemon.pair
    client.request("r", ttft_left_s=60)
    with dial(pair, v6=True, address=f"::ffff:{pair.addr_b}") as s:
        client.transfer("t", s, MB, stage=Stage.P2D, request="r")
        client.transfer("u", tuple_of(pair.addr_b, PORT), MB, stage=Stage.P2D, request="r")
        assert client.flush(5)
        grown = Grown(daemon)
        s.sendall(bytes(MB))
        wait_for(lambda: list(transfers(daemon)) == ["u"], "its transfer by socket")
        s.sendall(bytes(MB))
        settled(daemon, (2, 0, 0))
        assert grown.wrong(2 * MB) <= WRONG
    client.mark(tuple_of(f"::ffff:{pair.addr_b}", PORT), Stage.COLLECTIVE)
    assert client.flush(5)
    with dial(pair, v6=True, address=f"::ffff:{pair.addr_b}") as s:
        wait_for(lambda: band(daemon, s) == "level 0", "the mark")
    sink.gets(2 * MB)


def test_a_hint_costs_the_same_however_many_sockets_there_are(daemon: Daemon, client: Client, sink: Sink) -> None:
    """By the daemon's processor time, which a busy machine does not change much."""
    pair, process = daemon.pair, psutil.Process(daemon.pid)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    client.request("r", ttft_left_s=600)
    turn = iter(range(10_000))

    def cost() -> float:
        before = process.cpu_times()
        for _ in range(100):
            with dial(pair) as s:
                client.transfer(f"t{next(turn)}", s, 10 * KB, stage=Stage.P2D, request="r")
                assert client.flush(20)
                s.sendall(bytes(10 * KB))
        after = process.cpu_times()
        return after.user + after.system - before.user - before.system

    with contextlib.ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        cost()
        few = cost()
        for _ in range(4000):
            stack.callback(close_hard, dial(pair))
        time.sleep(0.5)
        many = cost()
    assert many < 2 * few + 0.2, (few, many)
    assert sink.accepted


@pytest.mark.parametrize("named", ["exactly", "by port"])
def test_a_routed_pod_is_matched_by_addresses(daemon: Daemon, client: Client, sink: Sink, named: str) -> None:
    """Routing costs packets their socket: that the kernel tells of the pod's connection is not enough."""
    pair = daemon.pair
    with routed(pair) as inside:
        exact = tuple_of(pair.addr_b, PORT, "10.79.0.9", 41_001)
        selector = exact if named == "exactly" else tuple_of(pair.addr_b, PORT)
        with dial(inside, source_port=41_001) as s:
            client.mark(selector, Stage.COLLECTIVE)
            assert client.flush(5)
            grown = Grown(daemon)
            s.sendall(bytes(MB))
            wait_for(lambda: sink.received == MB, "arrival")
            assert grown.wrong(MB, right="level 0") <= WRONG
            client.unmark(selector)
            client.request("r", ttft_left_s=60)
            for i in range(2):
                client.transfer(f"t{i}", selector, MB, stage=Stage.P2D, request="r")
                assert client.flush(5)
                grown = Grown(daemon)
                s.sendall(bytes(MB))
                wait_for(lambda i=i: sink.received == (2 + i) * MB, "arrival")  # type: ignore[misc]
                settled(daemon, (i + 1, 0, 0))
                assert grown.wrong(MB) <= WRONG
        assert client.stats.rejected == 0


@pytest.mark.parametrize("seen", [0, 1], ids=["bridge alone", "netfilter sees it"])
def test_a_bridged_pod(daemon: Daemon, client: Client, sink: Sink, seen: int) -> None:
    """By its socket, which a bridge leaves to packets; by addresses where netfilter takes it away."""
    with bridged(daemon.pair, seen=seen) as inside:
        client.request("r", ttft_left_s=60)
        assert any("netfilter sees what br0 brings" in n for n in daemon.status().notices) == seen
        found = json.loads(daemon.mfsctl("--json", "doctor", "--all", "--config", str(daemon.config)).stdout)
        assert ("device.bridged:v0" in {f["id"] for f in found["findings"]}) == seen
        with dial(inside) as s:
            named = tuple_of(*s.getpeername(), *s.getsockname()) if seen else s
            grown = Grown(daemon)
            three_in_turn(daemon, client, named, s)
            assert grown.wrong(3 * MB) <= WRONG
        sink.gets(3 * MB)
