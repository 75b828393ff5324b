# SPDX-License-Identifier: Apache-2.0
"""A receiver whose port is slower than ours: its rate is learnt from TCP's own words, and shown."""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import subprocess
import time
from typing import TYPE_CHECKING

import pytest
from support.namespaces import joined_namespaces
from support.rig import RATE_MBIT, Daemon, Flow, running
from support.waiting import wait_for

from mfsd.engine.peers import AGE_S, LONG, MANY, SEEN_S
from mfsd.ground.model import Stage

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from support.namespaces import NetnsPair

    from mfsd.v1 import control_pb2 as pb

pytestmark = pytest.mark.netns

SLOW_MBIT = RATE_MBIT // 2
SLOW = "10.78.0.2"
GATEWAY = "10.78.0.1"
OTHER = "10.77.0.3"


@contextlib.contextmanager
def rival_sender(pair: NetnsPair) -> Iterator[NetnsPair]:
    """Another host that sends to the slow receiver, as near to it as ``a`` is: from ``a`` of the pair to ``b``."""
    name, here = f"{pair.b}-rival", "10.79.0.2"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        pair.run(
            pair.b,
            f"ip link add x0 type veth peer name x1 netns {name}; ip addr add 10.79.0.1/24 dev x0; ip link set x0 up",
        )
        pair.run(name, f"ip addr add {here}/24 dev x1; ip link set x1 up; ip route add default via 10.79.0.1")
        yield dataclasses.replace(pair, a=name, addr_a=here, b=f"{pair.b}-far", addr_b=SLOW)
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


@contextlib.contextmanager
def slow_receiver(pair: NetnsPair) -> Iterator[NetnsPair]:
    """A host behind ``b``, the port to which gives half of what ``a``'s does; ``b`` of the pair that is returned."""
    name = f"{pair.b}-far"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        pair.run(
            pair.b,
            f"ip link add w0 type veth peer name w1 netns {name}; ip addr add {GATEWAY}/24 dev w0; ip link set w0 up; "
            f"sysctl -qw net.ipv4.ip_forward=1; ip addr add {OTHER}/24 dev {pair.dev_b}; "
            f"tc qdisc add dev w0 root tbf rate {SLOW_MBIT}mbit burst 128k limit 1m",
        )
        pair.run(
            name,
            f"ip addr add {SLOW}/24 dev w1; ip link set w1 up; ip link set lo up; ip route add default via {GATEWAY}",
        )
        pair.run(pair.a, f"ip route add 10.78.0.0/24 via {pair.addr_b}")
        yield dataclasses.replace(pair, b=name, addr_b=SLOW)
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


def known(daemon: Daemon) -> dict[str, pb.Peer]:
    return {p.address: p for p in daemon.status().peers}


def used(daemon: Daemon) -> float:
    """Bytes/s that policies are shown of the slow receiver; 0: nothing."""
    peers = known(daemon)
    return peers[SLOW].used_bytes_per_s if SLOW in peers else 0.0


@contextlib.contextmanager
def learning(
    pair: NetnsPair, folder: Path, others: Sequence[NetnsPair] = (), extra: str = "", rivals: int = 0
) -> Iterator[tuple[Daemon, Flow]]:
    """A daemon that knows connections to the slow receiver and to ``others``; the first one, which is in use.

    ``rivals``: connections of another host to the slow receiver, in use before.
    """
    with (
        slow_receiver(pair) as far,
        rival_sender(pair) as elsewhere,
        running(Daemon(pair, folder, extra=extra)) as daemon,
        contextlib.ExitStack() as stack,
    ):
        for _ in range(rivals):
            rival = Flow.open(elsewhere)
            stack.callback(rival.close)
            rival.saturate()
        flows = [Flow.open(there) for there in (far, *others)]
        for flow in flows:
            stack.callback(flow.close)
        client = stack.enter_context(daemon.client())
        for flow in flows:
            client.mark(flow.sender, Stage.P2D)
        assert client.flush(5)
        flows[0].saturate()
        yield daemon, flows[0]


@pytest.mark.parametrize("configured", [False, True])
def test_the_rate_of_a_slow_receivers_port_is_learnt(
    netns_pair: NetnsPair, tmp_path: Path, *, configured: bool
) -> None:
    extra = f'[[peer]]\nnetwork = "{SLOW}"\nrate = "{SLOW_MBIT}mbit"' if configured else ""
    near = [netns_pair, dataclasses.replace(netns_pair, addr_b=OTHER)]
    with learning(netns_pair, tmp_path, near, extra) as (daemon, flow):
        wanted = SLOW_MBIT * 125_000
        if configured:
            wait_for(lambda: flow.received > wanted, "traffic of a second")
            peer = known(daemon)[SLOW]
            assert (peer.configured_bytes_per_s, peer.used_bytes_per_s) == (wanted, wanted)
            assert (peer.sightings, peer.learnt_bytes_per_s) == (0, 0)
            return
        wait_for(lambda: used(daemon), "the rate to be used")
        wait_for(lambda: known(daemon)[SLOW].sightings >= 20, "more windows")
        peer = known(daemon)[SLOW]
        assert 0.85 * wanted < peer.learnt_bytes_per_s < 1.3 * wanted
        # What is used follows once a second.
        wait_for(lambda: used(daemon) == known(daemon)[SLOW].learnt_bytes_per_s, "what is learnt to be used")
        assert str(ipaddress.ip_address(SLOW)) in daemon.mfsctl("--socket", str(daemon.socket), "status").stdout


def test_the_rate_of_a_single_peer_is_used_when_many_windows_agree(netns_pair: NetnsPair, tmp_path: Path) -> None:
    with learning(netns_pair, tmp_path) as (daemon, _):
        # On a busy machine windows don't agree, and count for half a minute.
        wait_for(lambda: used(daemon), "the rate to be used", 4 * SEEN_S)
        assert 0.85 * SLOW_MBIT * 125_000 < used(daemon) < 1.3 * SLOW_MBIT * 125_000
        assert known(daemon)[SLOW].sightings >= MANY


def test_the_share_of_a_single_peers_port_is_not_used(netns_pair: NetnsPair, tmp_path: Path) -> None:
    """Beside one connection of another host, and beside three: each with hosts of its own, at the same time."""
    with contextlib.ExitStack() as stack:
        tried = []
        for rivals, pair in ((1, netns_pair), (3, stack.enter_context(joined_namespaces()))):
            folder = tmp_path / str(rivals)
            folder.mkdir()
            tried.append(stack.enter_context(learning(pair, folder, rivals=rivals)))
        end = time.monotonic() + LONG * AGE_S + SEEN_S / 2
        while time.monotonic() < end:
            assert not any(used(daemon) for daemon, _ in tried)
            time.sleep(0.5)
        for daemon, flow in tried:
            assert known(daemon)[SLOW].sightings >= MANY  # enough of them, but they don't agree
            assert flow.received
