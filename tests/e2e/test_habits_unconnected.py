# SPDX-License-Identifier: Apache-2.0
"""Sockets that are not connected yet, or never are, and workers that say they are done all the same."""

from __future__ import annotations

import contextlib
import socket
import time
from typing import TYPE_CHECKING

import pytest
from support.habits import KB, MB, PORT, WRONG, Grown, band, dial, settled, transfers
from support.waiting import wait_for

from mfsd.client import Client, Stage, tuple_of

if TYPE_CHECKING:
    from support.habits import Sink
    from support.rig import Daemon

pytestmark = pytest.mark.netns


@pytest.mark.parametrize("by", ["socket", "addresses"])
@pytest.mark.parametrize("after", [0.0, 2.5])
def test_done_although_the_connection_was_refused(daemon: Daemon, client: Client, by: str, after: float) -> None:
    """As in a ``finally``."""
    pair = daemon.pair
    with pair.call(pair.a, socket.socket) as s:
        client.request("q", ttft_left_s=60)
        there = s if by == "socket" else tuple_of(pair.addr_b, PORT)
        client.transfer("t", there, 100 * KB, stage=Stage.P2D, request="q")
        assert client.flush(5)
        with pytest.raises(ConnectionRefusedError):
            s.connect((pair.addr_b, PORT))
        time.sleep(after)
        client.done(request="q")
        settled(daemon, (0, 0, 1))
    assert not transfers(daemon)


def test_done_although_nobody_has_answered(daemon: Daemon, client: Client) -> None:
    pair = daemon.pair
    pair.run(pair.a, f"ip neigh replace 10.77.0.77 lladdr 02:00:00:00:00:77 dev {pair.dev_a}")
    with pair.call(pair.a, socket.socket) as s:
        s.settimeout(0.3)
        client.request("q", ttft_left_s=60)
        client.transfer("t", s, 100 * KB, stage=Stage.P2D, request="q")
        assert client.flush(5)
        with pytest.raises(TimeoutError):
            s.connect(("10.77.0.77", 6999))
        client.done(request="q")
        assert client.flush(5)
        time.sleep(0.5)
        assert transfers(daemon) == {"t": 100 * KB}
    settled(daemon, (0, 0, 1))


def test_done_of_a_socket_that_was_never_connected(daemon: Daemon, client: Client) -> None:
    pair = daemon.pair
    with pair.call(pair.a, socket.socket) as s:
        client.request("q", ttft_left_s=60)
        client.transfer("t", s, 100 * KB, stage=Stage.P2D, request="q")
        client.done(request="q")
        settled(daemon, (0, 0, 1))


def test_datagrams_that_had_gone_before_their_hint_was_heard(daemon: Daemon, client: Client) -> None:
    """Nobody acknowledges them, so their worker's word counts, whether anybody has seen them or not."""
    pair = daemon.pair
    with daemon.held_up():
        socks = [pair.call(pair.a, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(5)]
        for i, s in enumerate(socks):
            client.request(f"q{i}", ttft_left_s=60)
            client.transfer(f"t{i}", s, 10 * KB, stage=Stage.P2D, request=f"q{i}")
            for _ in range(10):
                s.sendto(bytes(KB), (pair.addr_b, 7000))
            client.done(request=f"q{i}")
    settled(daemon, (5, 5, 0))
    for s in socks:
        s.close()


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize(("version", "size"), [(4, KB), (4, 4 * KB), (6, KB)])
def test_datagrams_that_nobody_says_are_done(
    daemon: Daemon, client: Client, version: int, size: int, *, closed: bool
) -> None:
    """What has left has, in however many fragments, also if the socket is closed at once."""
    pair, grown = daemon.pair, Grown(daemon)
    family, there = (socket.AF_INET, pair.addr_b) if version == 4 else (socket.AF_INET6, pair.addr6_b)
    for i in range(5):
        with pair.call(pair.a, lambda: socket.socket(family, socket.SOCK_DGRAM)) as s:
            client.request(f"q{i}", ttft_left_s=60)
            client.transfer(f"t{i}", s, 100 * KB, stage=Stage.P2D, request=f"q{i}")
            assert client.flush(5)
            for _ in range(100 * KB // size):
                s.sendto(bytes(size), (there, 7000))
            if not closed:
                settled(daemon, (i + 1, 0, 0))
    settled(daemon, (5, 0, 0))
    assert grown.wrong(500 * KB) <= WRONG


def test_marked_long_before_they_are_connected(daemon: Daemon, client: Client, sink: Sink) -> None:
    """As by groups that make their sockets, and wait for each other."""

    def mark(s: socket.socket) -> None:
        client.mark(s, Stage.COLLECTIVE)
        assert client.flush(5)
        time.sleep(4)

    grown = Grown(daemon)
    with dial(daemon.pair, before=mark) as s:
        s.sendall(bytes(MB))
        sink.gets(MB)
        assert band(daemon, s) == "level 0"
    assert grown.wrong(MB, right="level 0") <= WRONG


def test_marked_and_closed_before_they_are_connected(daemon: Daemon, client: Client, sink: Sink) -> None:
    """More than may be marked: those give way."""
    pair = daemon.pair
    for _ in range(1100):
        with pair.call(pair.a, socket.socket) as s:
            client.mark(s, Stage.COLLECTIVE)
    assert client.flush(10)
    time.sleep(1.5)  # until then they may be a pool whose sockets are connected next
    with dial(pair) as s:
        client.mark(s, Stage.COLLECTIVE)
        assert client.flush(5)
        s.sendall(bytes(100 * KB))
        sink.gets(100 * KB)
        assert band(daemon, s) == "level 0"


def test_many_that_end_while_the_daemon_gets_no_processor(daemon: Daemon, client: Client, sink: Sink) -> None:
    """In time, on a connection each, which the daemon knew before."""
    socks = [dial(daemon.pair) for _ in range(300)]
    for i, s in enumerate(socks):
        client.request(f"q{i}", ttft_left_s=3)
        client.transfer(f"t{i}", s, 10 * KB, stage=Stage.P2D, request=f"q{i}")
    assert client.flush(5)
    with daemon.held_up():
        for i, s in enumerate(socks):
            s.sendall(bytes(10 * KB))
            client.done(request=f"q{i}")
            s.close()
        with contextlib.suppress(AssertionError):
            wait_for(lambda: sink.received == 3000 * KB, "arrival")
        time.sleep(3.5)
    settled(daemon, (300, 300, 0))
