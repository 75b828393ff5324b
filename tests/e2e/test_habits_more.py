# SPDX-License-Identifier: Apache-2.0
"""More habits: aborted transfers, corks, data in the SYN; sockets older than the daemon, or connected again; crowds."""

from __future__ import annotations

import contextlib
import resource
import socket
import time
from typing import TYPE_CHECKING

import pytest
from support.daemons import disconnect
from support.habits import KB, MB, PORT, WRONG, Grown, Sink, band, dial, settled, three_in_turn, transfers, worker
from support.rig import Daemon, running
from support.waiting import WAIT_S, wait_for

from mfsd.client import Client, Event, EventKind, Stage, Transfer, tuple_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.namespaces import NetnsPair

pytestmark = pytest.mark.netns

TCP_FASTOPEN_CONNECT = 30
"""include/uapi/linux/tcp.h; Python has no name for it."""


@pytest.fixture
def client(daemon: Daemon, events: list[Event]) -> Iterator[Client]:
    with daemon.client(on_event=events.append) as c:
        assert c.flush(20)
        c.request("r", ttft_left_s=600)
        yield c
        assert c.stats.rejected == 0


# --- what is written, and when ----------------------------------------------------------------------------------------


def test_a_transfer_aborted_with_half_of_it_in_the_socket(daemon: Daemon, client: Client, sink: Sink) -> None:
    """What was written of it goes before the next one all the same."""
    sink.paused = True
    with dial(daemon.pair) as s:
        client.transfer("a", s, 50 * MB, stage=Stage.P2D, request="r")
        assert client.flush(5)
        s.settimeout(0.3)
        written = 0
        with contextlib.suppress(TimeoutError):
            while True:
                written += s.send(bytes(64 * KB))
        client.cancel(transfer="a")
        client.transfer("b", s, 500 * KB, stage=Stage.P2D, request="r")
        assert client.flush(5)
        sink.paused = False
        wait_for(lambda: sink.received == written, "what had been written")
        time.sleep(0.5)
        assert transfers(daemon) == {"b": 500 * KB}
        s.settimeout(WAIT_S)
        s.sendall(bytes(500 * KB))
        settled(daemon, (1, 0, 0))


def test_corked(daemon: Daemon, client: Client, sink: Sink) -> None:
    """Said to be done while its last bytes wait for more to come."""
    with dial(daemon.pair) as s:
        for i in range(5):
            s.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
            client.transfer(f"t{i}", s, 100 * KB, stage=Stage.P2D, request="r")
            assert client.flush(5)
            for _ in range(100):
                s.sendall(bytes(KB))
            client.done(transfer=f"t{i}")
            assert client.flush(5)
            s.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)
            settled(daemon, (i + 1, 0, 0))
    sink.gets(500 * KB)


def test_byte_by_byte(daemon: Daemon, client: Client, sink: Sink) -> None:
    with dial(daemon.pair) as s:
        s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for i in range(20):
            client.transfer(f"t{i}", s, 50, stage=Stage.P2D, request="r")
        assert client.flush(5)
        for _ in range(999):
            s.send(b"x")
        wait_for(lambda: sink.received == 999, "arrival")
        wait_for(lambda: transfers(daemon) == {"t19": 1}, "all but the last byte")
        s.send(b"x")
        settled(daemon, (20, 0, 0))


def test_very_many_tiny_transfers_on_one_connection(daemon: Daemon, client: Client, sink: Sink) -> None:
    with dial(daemon.pair) as s:
        client.transfers(Transfer(f"t{i}", s, 100, Stage.P2D, "r") for i in range(5000))
        assert client.flush(20)
        s.sendall(bytes(500 * KB))
        settled(daemon, (5000, 0, 0))
    sink.gets(500 * KB)


def test_much_more_is_written_than_was_announced(daemon: Daemon, client: Client, sink: Sink) -> None:
    with dial(daemon.pair) as s:
        for i in range(3):
            client.transfer(f"t{i}", s, 100 * KB, stage=Stage.P2D, request="r")
            assert client.flush(5)
            s.sendall(bytes(5 * MB))
            settled(daemon, (i + 1, 0, 0))
            wait_for(lambda i=i: sink.received == (i + 1) * 5 * MB, "arrival")  # type: ignore[misc]
        client.transfer("last", s, MB, stage=Stage.P2D, request="r")
        assert client.flush(5)
        time.sleep(0.5)
        assert transfers(daemon) == {"last": MB}
        s.sendall(bytes(MB))
        settled(daemon, (4, 0, 0))


def test_bytes_of_another_protocol_between_transfers(daemon: Daemon, client: Client, sink: Sink) -> None:
    """A header before each payload, heartbeats between them, and TLS-like overhead of one in a hundred."""
    with dial(daemon.pair) as s:
        sent = 0
        for i in range(10):
            client.transfer(f"t{i}", s, 200 * KB, stage=Stage.P2D, request="r")
            assert client.flush(5)
            s.sendall(bytes(202 * KB + 64))
            sent += 202 * KB + 64
            client.done(transfer=f"t{i}")
            wait_for(lambda n=sent: sink.received == n, "arrival")  # type: ignore[misc]
            for _ in range(5):
                s.sendall(bytes(20))
                sent += 20
            settled(daemon, (i + 1, 0, 0))


def test_the_path_loses_everything_for_a_second(
    daemon: Daemon, client: Client, sink: Sink, events: list[Event]
) -> None:
    pair = daemon.pair
    with dial(pair) as s:
        client.transfer("t", s, 5 * MB, stage=Stage.P2D, request="r")
        assert client.flush(5)
        grown = Grown(daemon)
        s.settimeout(None)
        s.sendall(bytes(MB))
        pair.run(pair.b, f"ip link set {pair.dev_b} down")
        time.sleep(1)
        pair.run(pair.b, f"ip link set {pair.dev_b} up")
        s.sendall(bytes(4 * MB - 1))
        wait_for(lambda: sink.received == 5 * MB - 1, "arrival")
        wait_for(lambda: transfers(daemon) == {"t": 1}, "all but a byte")
        s.sendall(b"x")
        settled(daemon, (1, 0, 0))
        assert grown.wrong(5 * MB) <= WRONG
    assert not events


# --- which socket -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["socket", "addresses"])
def test_a_connection_that_is_older_than_the_daemon(
    netns_pair: NetnsPair, tmp_path: Path, sink: Sink, how: str
) -> None:
    with dial(netns_pair) as s:
        s.sendall(bytes(300 * KB))
        wait_for(lambda: sink.received == 300 * KB, "arrival")
        with running(Daemon(netns_pair, tmp_path)) as daemon, daemon.client() as client:
            client.request("r", ttft_left_s=60)
            named = s if how == "socket" else tuple_of(netns_pair.addr_b, PORT)
            grown = Grown(daemon)
            three_in_turn(daemon, client, named, s)
            assert grown.wrong(3 * MB) <= WRONG


def test_a_pool_that_idles(daemon: Daemon, client: Client, sink: Sink, events: list[Event]) -> None:
    """Longer than anything about its connections is remembered."""
    with contextlib.ExitStack() as stack:
        pool = [stack.enter_context(dial(daemon.pair)) for _ in range(8)]
        for turn in range(2):
            grown = Grown(daemon)
            for i, s in enumerate(pool):
                client.transfer(f"{turn}/{i}", s, 200 * KB, stage=Stage.P2D, request="r")
                assert client.flush(5)
                s.sendall(bytes(200 * KB))
            settled(daemon, (8 * (turn + 1), 0, 0))
            assert grown.wrong(8 * 200 * KB) <= WRONG
            wait_for(lambda: daemon.status().connections == 0, "the slots to be free")
    assert not events
    sink.gets(16 * 200 * KB)


def test_data_in_the_syn(daemon: Daemon, client: Client) -> None:
    pair = daemon.pair
    for name in (pair.a, pair.b):
        pair.run(name, "sysctl -qw net.ipv4.tcp_fastopen=0x607")  # both ways, without a cookie
    with Sink(pair) as sink:

        def fast(s: socket.socket) -> None:
            s.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1)

        client.mark(tuple_of(pair.addr_b, PORT), Stage.COLLECTIVE)
        assert client.flush(5)
        grown = Grown(daemon)
        for _ in range(5):
            with dial(pair, before=fast) as s:
                s.sendall(bytes(200 * KB))
        wait_for(lambda: sink.received == MB, "arrival")
        assert grown.wrong(MB, right="level 0") <= WRONG
        client.unmark(tuple_of(pair.addr_b, PORT))

        def hinted(s: socket.socket) -> None:
            fast(s)
            client.transfer("t", s, MB, stage=Stage.P2D, request="r")
            assert client.flush(5)

        grown = Grown(daemon)
        with dial(pair, before=hinted) as s:
            s.sendall(bytes(MB - 1))
            wait_for(lambda: sink.received == 2 * MB - 1, "arrival")
            wait_for(lambda: transfers(daemon) == {"t": 1}, "all but a byte")
            s.sendall(b"x")
            settled(daemon, (1, 0, 0))
        assert grown.wrong(MB) <= WRONG


@pytest.mark.usefixtures("sink")
@pytest.mark.parametrize("hinted", ["connected", "not yet"])
def test_a_socket_that_is_disconnected_and_connected_again(
    daemon: Daemon, client: Client, events: list[Event], hinted: str
) -> None:
    """connect(2) with AF_UNSPEC, which Python's connect() has not: the same socket and cookie, another connection."""
    with dial(daemon.pair) as s:
        for i in range(4):
            if hinted == "connected" or i == 0:
                client.transfer(f"t{i}", s, 300 * KB, stage=Stage.P2D, request="r")
                assert client.flush(5)
            grown = Grown(daemon)
            s.sendall(bytes(300 * KB))
            settled(daemon, (i + 1, 0, 0))
            assert grown.wrong(300 * KB) <= WRONG
            disconnect(s)
            if hinted == "not yet":
                client.transfer(f"t{i + 1}", s, 300 * KB, stage=Stage.P2D, request="r")
                assert client.flush(5)
            s.connect((daemon.pair.addr_b, PORT))
    assert not [e for e in events if e.kind is EventKind.CONNECTION_GONE]


def test_link_local_addresses(daemon: Daemon, client: Client) -> None:
    """The interface is part of what such a connection is looked up by."""
    pair = daemon.pair
    there = pair.run(pair.b, f"ip -6 -o addr show dev {pair.dev_b} scope link").split()[3].split("/")[0]
    index = pair.call(pair.a, lambda: socket.if_nametoindex(pair.dev_a))
    with Sink(pair, v6=True) as sink:

        def connect() -> socket.socket:
            s = socket.socket(socket.AF_INET6)
            s.settimeout(WAIT_S)
            s.connect((there, PORT, 0, index))
            return s

        grown = Grown(daemon)
        with pair.call(pair.a, connect) as s:
            for i in range(2):
                client.transfer(f"t{i}", s, MB, stage=Stage.P2D, request="r")
                assert client.flush(5)
                s.sendall(bytes(MB))
                settled(daemon, (i + 1, 0, 0))
                time.sleep(1.2)
            client.mark(tuple_of(there, PORT), Stage.COLLECTIVE)
            assert client.flush(5)
            wait_for(lambda: band(daemon, s) == "level 0", "the mark by addresses")
        with pair.call(pair.a, connect) as s:
            s.sendall(bytes(MB))
            wait_for(lambda: sink.received == 3 * MB, "arrival")
        assert grown.wrong(3 * MB) <= WRONG


def test_datagrams_of_an_unconnected_socket(daemon: Daemon, client: Client, events: list[Event]) -> None:
    pair = daemon.pair
    with (
        pair.call(pair.b, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as far,
        pair.call(pair.a, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as s,
    ):
        far.bind((pair.addr_b, 7000))
        grown = Grown(daemon)
        for i in range(3):
            client.transfer(f"t{i}", s, 100_000, stage=Stage.P2D, request="r")
            assert client.flush(5)
            for _ in range(100):
                s.sendto(bytes(1000), (pair.addr_b, 7000))
            client.done(transfer=f"t{i}")
            settled(daemon, (i + 1, 0, 0))
        assert grown.wrong(300_000) <= WRONG
    assert not events


def test_sockets_that_are_none(daemon: Daemon, events: list[Event]) -> None:
    """A listener, a unix socket, a closed one: an error or a word, and the next hint works."""
    pair = daemon.pair
    left, right = socket.socketpair()
    closed = socket.socket()
    closed.close()
    with daemon.client(on_event=events.append) as client, left, right, Sink(pair) as sink:
        client.request("r", ttft_left_s=60)
        with pytest.raises((OSError, ValueError, TypeError)):
            client.transfer("closed", closed, 100, stage=Stage.P2D, request="r")
        with pair.call(pair.a, lambda: socket.create_server(("", 7100))) as listener:
            announced = set()
            for name, s in (("unix", left), ("listener", listener)):
                with contextlib.suppress(OSError, ValueError, TypeError):
                    client.transfer(name, s, 100, stage=Stage.P2D, request="r")
                    announced.add(name)
            assert client.flush(5)
            wait_for(lambda: announced <= {e.transfer_id for e in events}, f"word about {announced}")
        with dial(pair) as s:
            client.transfer("t", s, MB, stage=Stage.P2D, request="r")
            assert client.flush(5)
            s.sendall(bytes(MB))
            settled(daemon, (1, 0, 0))
        sink.gets(MB)


# --- whose ------------------------------------------------------------------------------------------------------------


SENDS_ALL = """
client = Client(target=target)
s = dial()
client.request("r", ttft_left_s=20)
client.transfer("t", s, 1_000_000, stage=Stage.P2D, request="r")
assert client.flush(20)
s.sendall(bytes(1_000_000))
"""


def test_a_worker_that_ends_right_behind_its_last_byte(daemon: Daemon, sink: Sink) -> None:
    body = SENDS_ALL + "client.done(request='r'); client.flush(20); os._exit(0)"
    for i in range(3):
        with worker(daemon, body) as one:
            one.popen.wait(WAIT_S)
        settled(daemon, (i + 1, i + 1, 0))
    sink.gets(3 * MB)


def test_a_worker_killed_behind_its_last_byte(daemon: Daemon, sink: Sink) -> None:
    """It never said that it was done; all has arrived in time."""
    body = SENDS_ALL + "os.kill(os.getpid(), 9)"
    with worker(daemon, body) as one:
        one.popen.wait(WAIT_S)
    settled(daemon, (1, 1, 0))
    sink.gets(MB)


@pytest.mark.usefixtures("sink")
def test_more_connections_at_once_than_events_have_room(daemon: Daemon, client: Client) -> None:
    """While the daemon gets no processor at all."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    client.mark(tuple_of(daemon.pair.addr_b, PORT), Stage.COLLECTIVE)
    assert client.flush(5)
    with contextlib.ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        with daemon.held_up():
            opened = [stack.enter_context(dial(daemon.pair)) for _ in range(3000)]
        wait_for(lambda: daemon.status().devices[0].bands[1].connections == 3000, "all to be marked", 10)
        assert len({s.getsockname() for s in opened}) == 3000
    wait_for(lambda: daemon.status().connections == 0, "all to be over")
