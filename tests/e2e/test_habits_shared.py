# SPDX-License-Identifier: Apache-2.0
"""What clients share and stand on: one selector of several sessions, descriptors, this host, devices and clocks."""

from __future__ import annotations

import dataclasses
import errno
import select
import socket
import subprocess
from typing import TYPE_CHECKING

import pytest
from support.habits import (
    KIB,
    MB,
    PORT,
    WRONG,
    Grown,
    Sink,
    band,
    counted,
    dial,
    settled,
    three_in_turn,
    worker,
)
from support.waiting import wait_for

from mfsd.client import Client, Stage, tuple_of

if TYPE_CHECKING:
    from support.rig import Daemon

pytestmark = pytest.mark.netns

SO_ZEROCOPY = 60
MSG_ZEROCOPY = 0x4000000


# --- several sessions -------------------------------------------------------------------------------------------------


def begin_as_collectives(daemon: Daemon, sink: Sink) -> None:
    """New connections are in the most urgent band from their first packet on."""
    grown = Grown(daemon)
    for _ in range(20):
        with dial(daemon.pair) as s:
            s.sendall(bytes(64 * KIB))
    wait_for(lambda: sink.received == 20 * 64 * KIB, "arrival")
    assert grown.wrong(20 * 64 * KIB, right="level 0") <= WRONG


@pytest.mark.parametrize("first_ends", [True, False], ids=["the first ends", "the second ends"])
def test_two_workers_name_the_same(daemon: Daemon, client: Client, sink: Sink, *, first_ends: bool) -> None:
    """Ranks of one model reach the same peer; one of them ends, and the other's connections begin where they should."""
    there = tuple_of(daemon.pair.addr_b, PORT)
    with daemon.client() as other:
        assert other.flush(20)
        for c in (other, client) if first_ends else (client, other):
            c.mark(there, Stage.COLLECTIVE)
            assert c.flush(5)
    begin_as_collectives(daemon, sink)


def test_two_workers_name_the_same_for_other_purposes(daemon: Daemon, client: Client, sink: Sink) -> None:
    """New connections begin where the more urgent of the two wants them, whoever was the last to speak."""
    there = tuple_of(daemon.pair.addr_b, PORT)
    with daemon.client() as other:
        client.mark(there, Stage.COLLECTIVE)
        assert client.flush(5)
        other.mark(there, Stage.BACKGROUND)
        assert other.flush(20)
        begin_as_collectives(daemon, sink)


def test_marked_connections_that_are_hinted_one_by_one(daemon: Daemon, client: Client, sink: Sink) -> None:
    """More of them than the kernel has slots of its own at a time; none is missed, also none of the last ones."""
    client.mark(tuple_of(daemon.pair.addr_b, PORT), Stage.KV_REUSE)
    assert client.flush(5)
    grown, count = Grown(daemon), 600
    for i in range(count):
        with dial(daemon.pair) as s:
            client.transfer(f"t{i}", s, 16 * KIB, stage=Stage.P2D, request="r")
            s.sendall(bytes(16 * KIB))
    settled(daemon, (count, 0, 0))
    assert grown.wrong(count * 16 * KIB) <= WRONG
    wait_for(lambda: sink.received == count * 16 * KIB, "arrival")


# --- this host --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["127.0.0.1", "10.77.0.1"])
@pytest.mark.parametrize("by", ["socket", "addresses"])
def test_prefill_and_decode_on_one_host(daemon: Daemon, client: Client, address: str, by: str) -> None:
    """No shaped device is on the way; what has arrived has arrived."""
    own = dataclasses.replace(daemon.pair, b=daemon.pair.a)
    with Sink(own) as here, dial(own, address=address) as s:
        named = s if by == "socket" else tuple_of(*s.getpeername())
        three_in_turn(daemon, client, named, s)
        assert here.received == 3 * MB


@pytest.mark.parametrize("by", ["socket", "addresses"])
def test_connections_on_one_host_closed_behind_their_last_byte(daemon: Daemon, client: Client, by: str) -> None:
    own = dataclasses.replace(daemon.pair, b=daemon.pair.a)
    with Sink(own):
        for i in range(20):
            with dial(own, address="127.0.0.1") as s:
                named = s if by == "socket" else tuple_of("127.0.0.1", PORT)
                client.transfer(f"t{i}", named, 256 * KIB, stage=Stage.P2D, request="r")
                if not i:
                    assert client.flush(5)  # from then on the kernel knows
                s.sendall(bytes(256 * KIB))
        settled(daemon, (20, 0, 0))


# --- how bytes get there ----------------------------------------------------------------------------------------------


def test_pages_that_the_process_keeps(daemon: Daemon, client: Client, sink: Sink) -> None:
    """MSG_ZEROCOPY: the kernel sends from the process's own memory."""
    grown, data = Grown(daemon), bytes(MB)
    with dial(daemon.pair) as s:
        s.setsockopt(socket.SOL_SOCKET, SO_ZEROCOPY, 1)
        for i in range(3):
            client.transfer(f"t{i}", s, MB, stage=Stage.P2D, request="r")
            assert client.flush(5)
            sent = 0
            while sent < MB:
                sent += s.send(memoryview(data)[sent:], MSG_ZEROCOPY)
            settled(daemon, (i + 1, 0, 0))
    assert grown.wrong(3 * MB) <= WRONG
    sink.gets(3 * MB)


def test_hinted_while_the_connect_is_under_way(daemon: Daemon, client: Client, sink: Sink) -> None:
    pair, grown = daemon.pair, Grown(daemon)

    def begin() -> socket.socket:
        s = socket.socket()
        s.setblocking(False)
        assert s.connect_ex((pair.addr_b, PORT)) == errno.EINPROGRESS
        return s

    for i in range(20):
        with pair.call(pair.a, begin) as s:
            client.transfer(f"t{i}", s, 256 * KIB, stage=Stage.P2D, request="r")
            assert client.flush(5)
            assert select.select([], [s], [], 60)[1]
            s.setblocking(True)
            s.sendall(bytes(256 * KIB))
    settled(daemon, (20, 0, 0))
    assert grown.wrong(20 * 256 * KIB) <= WRONG
    sink.gets(20 * 256 * KIB)


def test_a_second_descriptor_of_a_socket(daemon: Daemon, client: Client, sink: Sink) -> None:
    s = dial(daemon.pair)
    with s.dup() as twin:
        client.transfer("t0", s, MB, stage=Stage.P2D, request="r")
        s.close()
        client.transfer("t1", twin, MB, stage=Stage.P2D, request="r")
        assert client.flush(5)
        twin.sendall(bytes(MB))
        settled(daemon, (1, 0, 0))
        twin.sendall(bytes(MB))
        settled(daemon, (2, 0, 0))
    sink.gets(2 * MB)


def test_a_socket_with_a_priority_and_a_type_of_service_of_its_own(daemon: Daemon, client: Client, sink: Sink) -> None:
    def choose(s: socket.socket) -> None:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, 6)
        s.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, 0x28)

    grown = Grown(daemon)
    with dial(daemon.pair, before=choose) as s:
        three_in_turn(daemon, client, s, s)
    assert grown.wrong(3 * MB) <= WRONG
    sink.gets(3 * MB)


# --- what it stands on ------------------------------------------------------------------------------------------------


def test_a_worker_whose_clock_is_another(daemon: Daemon, sink: Sink) -> None:
    """A container in a time namespace: what it says of time is how long, never when."""
    body = """
with Client(target=target) as client, dial() as s:
    assert client.flush(20)
    client.request("r", ttft_left_s=600)
    client.transfer("t", s, 1_000_000, stage=Stage.P2D, request="r")
    assert client.flush(5)
    s.sendall(bytes(1_000_000))
    client.done(request="r")
    assert client.flush(5)
    say(time.monotonic())
    hear()
"""
    wrap = ("unshare", "--time", "--monotonic", "100000000", "--fork", "--kill-child")
    with worker(daemon, body, wrap=wrap) as w:
        assert float(w.hear()[0]) > 1e8
        settled(daemon, (1, 1, 0))
        w.say()
    sink.gets(MB)


@pytest.mark.parametrize("by", ["socket", "addresses"])
def test_a_vlan_on_the_shaped_device(daemon: Daemon, client: Client, by: str) -> None:
    pair = daemon.pair
    for name, device, address in ((pair.a, pair.dev_a, "10.78.0.1"), (pair.b, pair.dev_b, "10.78.0.2")):
        made = subprocess.run(
            ["ip", "-n", name, "link", "add", "link", device, "name", "vlan5", "type", "vlan", "id", "5"],
            check=False,
            capture_output=True,
        )
        if made.returncode:
            pytest.skip("this kernel has no VLANs")
        pair.run(name, f"ip addr add {address}/24 dev vlan5; ip link set vlan5 up")
    with Sink(pair) as there, dial(pair, address="10.78.0.2") as s:
        grown = Grown(daemon)
        three_in_turn(daemon, client, s if by == "socket" else tuple_of("10.78.0.2", PORT), s)
        assert grown.wrong(3 * MB) <= WRONG
        assert band(daemon, s).startswith("level")
        assert counted(daemon)[0] == 3
        assert there.received == 3 * MB
