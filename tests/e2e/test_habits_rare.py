# SPDX-License-Identifier: Apache-2.0
"""Connections that are restored, or carry very much, or have addresses of nobody; names and marks that come and go."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

import pytest
from support.habits import KB, MB, PORT, WRONG, Grown, counted, dial, settled, transfers
from support.waiting import wait_for

from mfsd.client import Client, Stage, tuple_of

if TYPE_CHECKING:
    from support.habits import Sink
    from support.namespaces import NetnsPair
    from support.rig import Daemon

    from mfsd.client import Rejected

pytestmark = pytest.mark.netns

TCP_REPAIR, TCP_REPAIR_QUEUE, TCP_QUEUE_SEQ = 19, 20, 21
RECEIVED, SENT = 1, 2
"""enum of include/uapi/linux/tcp.h."""
IP_FREEBIND = 15


def restored(pair: NetnsPair, old: socket.socket) -> socket.socket:
    """What CRIU does: the same connection on another socket, of which nothing is told to the peer."""

    def move() -> socket.socket:
        old.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
        at = {}
        for queue in (RECEIVED, SENT):
            old.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_QUEUE, queue)
            at[queue] = old.getsockopt(socket.IPPROTO_TCP, TCP_QUEUE_SEQ, 4)
        here, there = old.getsockname(), old.getpeername()
        old.close()
        new = socket.socket()
        new.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        new.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
        new.bind(here)
        for queue, seq in at.items():
            new.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_QUEUE, queue)
            new.setsockopt(socket.IPPROTO_TCP, TCP_QUEUE_SEQ, seq)
        new.connect(there)
        new.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 0)
        return new

    return pair.call(pair.a, move)


@pytest.mark.usefixtures("sink")
@pytest.mark.parametrize("by", ["socket", "addresses"])
def test_a_worker_that_was_restored_from_a_checkpoint(daemon: Daemon, client: Client, by: str) -> None:
    pair = daemon.pair
    for place in (pair.a, pair.b):
        pair.run(place, "sysctl -qw net.ipv4.tcp_timestamps=0 net.ipv4.tcp_sack=0 net.ipv4.tcp_window_scaling=0")
    there = tuple_of(pair.addr_b, PORT)
    s = dial(pair)
    client.transfer("t0", s if by == "socket" else there, 200 * KB, stage=Stage.P2D, request="r")
    assert client.flush(5)
    s.sendall(bytes(200 * KB))
    settled(daemon, (1, 0, 0))
    with restored(pair, s) as again:
        grown = Grown(daemon)
        for i in range(1, 4):
            client.transfer(f"t{i}", again if by == "socket" else there, 200 * KB, stage=Stage.P2D, request="r")
            assert client.flush(5)
            again.sendall(bytes(200 * KB))
            settled(daemon, (i + 1, 0, 0))
        assert grown.wrong(600 * KB) <= WRONG


def test_an_address_that_no_interface_has(daemon: Daemon, client: Client, sink: Sink) -> None:
    """As of proxies that speak for others (IP_FREEBIND, IP_TRANSPARENT)."""
    pair, address = daemon.pair, "10.77.0.99"
    pair.run(pair.a, f"ip route add local {address} dev lo")

    def bind(s: socket.socket) -> None:
        s.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)
        s.bind((address, 45_200))

    with dial(pair, before=bind) as s:
        grown = Grown(daemon)
        ways: list[Any] = [s, tuple_of(pair.addr_b, PORT, address, 45_200), tuple_of(pair.addr_b, PORT)]
        for i, named in enumerate(ways):
            client.request(f"q{i}", ttft_left_s=60)
            client.transfer(f"t{i}", named, 300 * KB, stage=Stage.P2D, request=f"q{i}")
            assert client.flush(5)
            s.sendall(bytes(300 * KB))
            client.done(request=f"q{i}")
            settled(daemon, (i + 1, i + 1, 0))
        assert grown.wrong(900 * KB) <= WRONG
    sink.gets(900 * KB)


def test_a_client_that_is_closed_and_opened_again_by_the_same_name(daemon: Daemon, sink: Sink) -> None:
    """In one process, on one connection, with bytes on their way."""
    with dial(daemon.pair) as s:
        for _ in range(10):
            with daemon.client(session="w") as client:
                client.request("q", ttft_left_s=60)
                client.transfer("t", s, 200 * KB, stage=Stage.P2D, request="q")
                assert client.flush(5)
                s.sendall(bytes(200 * KB))
                client.done(request="q")
        settled(daemon, (10, 10, 0))
    sink.gets(2 * MB)


def test_a_mark_is_taken_back_during_a_transfer(daemon: Daemon, client: Client, sink: Sink) -> None:
    with dial(daemon.pair) as s:
        client.mark(s, Stage.BACKGROUND)
        client.transfer("t", s, 2 * MB, stage=Stage.P2D, request="r")
        assert client.flush(5)
        grown = Grown(daemon)
        s.sendall(bytes(MB))
        client.unmark(s)
        assert client.flush(5)
        s.sendall(bytes(MB))
        settled(daemon, (1, 0, 0))
        assert grown.wrong(2 * MB) <= WRONG
    sink.gets(2 * MB)


def test_transfers_of_nothing(daemon: Daemon, client: Client, sink: Sink, rejected: list[Rejected]) -> None:
    """As of requests whose KV is there already; refused or not, the next one counts."""
    with dial(daemon.pair) as s:
        for i in range(3):
            client.request(f"q{i}", ttft_left_s=60)
            client.transfer(f"none{i}", s, 0, stage=Stage.P2D, request=f"q{i}")
            client.transfer(f"t{i}", s, 100 * KB, stage=Stage.P2D, request=f"q{i}")
            s.sendall(bytes(100 * KB))
            client.done(request=f"q{i}")
        wait_for(lambda: counted(daemon)[1:] == (3, 0), "all met")
        assert counted(daemon)[0] + len(rejected) == 6
        assert not transfers(daemon)
    sink.gets(300 * KB)
