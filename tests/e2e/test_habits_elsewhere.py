# SPDX-License-Identifier: Apache-2.0
"""Transfers that go elsewhere than was said first, by other hands than those that announced them, or after a while."""

from __future__ import annotations

import array
import fcntl
import os
import socket
import threading
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
from support.habits import KB, MB, PORT, WRONG, Grown, band, counted, dial, settled, transfers, worker
from support.waiting import wait_for

from mfsd.client import Client, Fd, Stage, cookie_of, tuple_of

if TYPE_CHECKING:
    from support.habits import Sink
    from support.rig import Daemon

    from mfsd.client import Event, Rejected

pytestmark = [pytest.mark.netns, pytest.mark.usefixtures("sink")]


def test_taken_back_from_a_connection_that_hangs_and_sent_on_another(
    daemon: Daemon, client: Client, events: list[Event], rejected: list[Rejected]
) -> None:
    """By the same name: its first half has gone on the first one."""
    for i in range(3):
        with dial(daemon.pair) as first, dial(daemon.pair) as second:
            client.request(f"q{i}", ttft_left_s=60)
            client.transfer(f"t{i}", first, MB, stage=Stage.P2D, request=f"q{i}")
            assert client.flush(5)
            first.sendall(bytes(MB // 2))
            client.cancel(transfer=f"t{i}")
            client.transfer(f"t{i}", second, MB, stage=Stage.P2D, request=f"q{i}")
            assert client.flush(5)
            second.sendall(bytes(MB // 2))
            wait_for(lambda i=i: transfers(daemon) == {f"t{i}": MB // 2}, "half of it")  # type: ignore[misc]
            second.sendall(bytes(MB // 2))
            client.done(request=f"q{i}")
            settled(daemon, (i + 1, i + 1, 0))
    assert not rejected
    assert not events


def test_sent_twice_and_the_first_one_counts(daemon: Daemon, client: Client) -> None:
    """Hedged over two connections; the slower one is taken back with half of it written, and carries on with others."""
    with dial(daemon.pair) as first, dial(daemon.pair) as second:
        for i in range(3):
            for name, s in (("x", first), ("y", second)):
                client.request(f"{name}{i}", ttft_left_s=60)
                client.transfer(f"{name}{i}", s, 400 * KB, stage=Stage.P2D, request=f"{name}{i}")
            assert client.flush(5)
            second.sendall(bytes(200 * KB))
            first.sendall(bytes(400 * KB))
            client.done(request=f"x{i}")
            client.cancel(request=f"y{i}")
        settled(daemon, (3, 3, 0))
        client.request("z", ttft_left_s=60)
        client.transfer("z", second, 300 * KB, stage=Stage.P2D, request="z")
        second.sendall(bytes(150 * KB))
        wait_for(lambda: transfers(daemon) == {"z": 150 * KB}, "half of it")
        second.sendall(bytes(150 * KB))
        client.done(request="z")
        settled(daemon, (4, 4, 0))
    assert not transfers(daemon)


def test_a_descriptor_number_that_is_used_again(daemon: Daemon, client: Client) -> None:
    """The socket lives on under another number; what is taken back was announced by the old one."""
    with dial(daemon.pair) as s, dial(daemon.pair) as other:
        number = fcntl.fcntl(s.fileno(), fcntl.F_DUPFD, 700)
        for name in ("a", "b"):
            client.request(name, ttft_left_s=60)
            client.transfer(name, Fd(number), 500 * KB, stage=Stage.P2D, request=name)
        assert client.flush(5)
        os.dup2(other.fileno(), number)
        other.sendall(bytes(300 * KB))
        client.cancel(request="a")
        assert client.flush(5)
        os.close(number)
        s.sendall(bytes(250 * KB))
        wait_for(lambda: transfers(daemon) == {"b": 250 * KB}, "half of it")
        s.sendall(bytes(250 * KB))
        client.done(request="b")
        settled(daemon, (1, 1, 0))


def test_two_workers_use_the_same_names_at_once(daemon: Daemon) -> None:
    with daemon.client() as one, daemon.client() as two, dial(daemon.pair) as s, dial(daemon.pair) as t:
        for c, sock in ((one, s), (two, t)):
            assert c.flush(20)
            c.request("r", ttft_left_s=60)
            c.transfer("t", sock, MB, stage=Stage.P2D, request="r")
            assert c.flush(5)
        s.sendall(bytes(MB))
        one.done(request="r")
        settled(daemon, (1, 1, 0))
        assert transfers(daemon) == {"t": MB}
        two.cancel(request="r")
        assert two.flush(5)
        two.request("r", ttft_left_s=60)
        two.transfer("t", t, MB, stage=Stage.P2D, request="r")
        t.sendall(bytes(MB))
        two.done(request="r")
        settled(daemon, (2, 2, 0))


PASSED = """
import array
with socket.socket(socket.AF_UNIX) as u, Client(target=target) as client:
    u.connect(arguments[0])
    data, ancillary, _, _ = u.recvmsg(1, socket.CMSG_SPACE(4))
    fd = array.array("i", ancillary[0][2])[0]
    with socket.socket(fileno=fd) as s:
        for i in range(3):
            client.request(f"q{i}", ttft_left_s=600)
            client.transfer(f"t{i}", s, 500_000, stage=Stage.P2D, request=f"q{i}")
            flushed = client.flush(20)
            s.sendall(bytes(500_000))
            client.done(request=f"q{i}")
        say(flushed, client.flush(5))
"""


def test_a_connection_that_is_passed_to_another_process(daemon: Daemon, client: Client) -> None:
    """SCM_RIGHTS: who made it closes it, having sent something itself."""
    path = daemon.folder / "pass"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        grown = Grown(daemon)
        with worker(daemon, PASSED, str(path)) as w:
            there, _ = listener.accept()
            with there, dial(daemon.pair) as s:
                s.settimeout(None)
                client.transfer("first", s, 500 * KB, stage=Stage.P2D, request="r")
                assert client.flush(5)
                s.sendall(bytes(500 * KB))
                there.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [s.fileno()]))])
            assert w.hear() == ["True", "True"]
            w.result()
        settled(daemon, (4, 3, 0))
        assert grown.wrong(2 * MB) <= WRONG


BY_COOKIE = """
with Client(target=target) as client:
    for i in range(3):
        client.request(f"q{i}", ttft_left_s=600)
        client.transfer(f"t{i}", Cookie(int(arguments[0])), 500_000, stage=Stage.P2D, request=f"q{i}")
        say(client.flush(20))
        hear()
        client.done(request=f"q{i}")
    say(client.flush(5))
"""


def test_one_process_announces_what_another_sends(daemon: Daemon) -> None:
    """A router, which has been told the socket's cookie and no more."""
    with dial(daemon.pair) as s:
        grown = Grown(daemon)
        with worker(daemon, BY_COOKIE, str(cookie_of(s))) as w:
            for _ in range(3):
                assert w.hear() == ["True"]
                s.sendall(bytes(500 * KB))
                w.say()
            assert w.hear() == ["True"]
            settled(daemon, (3, 3, 0))
            w.result()
        assert grown.wrong(1500 * KB) <= WRONG


def test_by_way_of_a_proxy_on_the_host(daemon: Daemon, client: Client, sink: Sink) -> None:
    """The worker's connections end there; what leaves the host is the proxy's, and named by where it goes."""
    pair = daemon.pair

    def listen() -> socket.socket:
        return socket.create_server(("127.0.0.1", 0))

    listener = pair.call(pair.a, listen)

    def relay() -> None:
        for _ in range(3):
            ours, _ = listener.accept()
            with ours, dial(pair) as theirs:
                while part := ours.recv(1 << 16):
                    theirs.sendall(part)

    thread = threading.Thread(target=relay)
    thread.start()
    with listener:
        client.mark(tuple_of(pair.addr_b, PORT), Stage.COLLECTIVE)
        assert client.flush(5)
        grown = Grown(daemon)
        for i in range(3):
            s = pair.call(pair.a, lambda: socket.create_connection(listener.getsockname()))
            with s:
                client.request(f"q{i}", ttft_left_s=60)
                client.transfer(f"t{i}", s, MB, stage=Stage.P2D, request=f"q{i}")
                assert client.flush(5)
                s.sendall(bytes(MB))
                client.done(request=f"q{i}")
        settled(daemon, (3, 3, 0))
        thread.join()
        wait_for(lambda: sink.received == 3 * MB, "arrival")
        assert grown.wrong(3 * MB) <= WRONG


def test_nothing_but_keepalives_in_the_middle(daemon: Daemon, client: Client) -> None:
    """Their sequence numbers are those of bytes that have arrived."""

    def keep_alive(s: socket.socket) -> None:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL):
            s.setsockopt(socket.IPPROTO_TCP, option, 1)

    with dial(daemon.pair, before=keep_alive) as s:
        for i in range(2):
            client.request(f"q{i}", ttft_left_s=60)
            client.transfer(f"t{i}", s, MB, stage=Stage.P2D, request=f"q{i}")
            assert client.flush(5)
            s.sendall(bytes(MB // 2))
            time.sleep(3.5)
            assert transfers(daemon) == {f"t{i}": MB // 2}
            s.sendall(bytes(MB // 2))
            client.done(request=f"q{i}")
            settled(daemon, (i + 1, i + 1, 0))


def test_urgent_bytes(daemon: Daemon, client: Client) -> None:
    """MSG_OOB: TCP counts them as any others."""
    with dial(daemon.pair) as s:
        for i in range(3):
            client.request(f"q{i}", ttft_left_s=60)
            client.transfer(f"t{i}", s, 300 * KB, stage=Stage.P2D, request=f"q{i}")
            assert client.flush(5)
            for _ in range(2):
                s.sendall(bytes(150 * KB - 1))
                s.send(b"!", socket.MSG_OOB)
            settled(daemon, (i + 1, i, 0))
            client.done(request=f"q{i}")
            settled(daemon, (i + 1, i + 1, 0))


def test_a_socket_that_paces_itself_in_small_segments(daemon: Daemon, client: Client) -> None:
    """SO_MAX_PACING_RATE, TCP_MAXSEG, TCP_NOTSENT_LOWAT, a mark of its own, and a send buffer that holds little."""

    def odd(s: socket.socket) -> None:
        s.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
        s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, 4096)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16_384)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 0x42)
        s.setsockopt(socket.SOL_SOCKET, 47, 2_000_000)  # SO_MAX_PACING_RATE, bytes a second

    with dial(daemon.pair, before=odd) as s:
        grown = Grown(daemon)
        for i in range(3):
            client.request(f"q{i}", ttft_left_s=60)
            client.transfer(f"t{i}", s, 500 * KB, stage=Stage.P2D, request=f"q{i}")
            assert client.flush(5)
            s.sendall(bytes(500 * KB))
            client.done(request=f"q{i}")
        settled(daemon, (3, 3, 0))
        assert grown.wrong(1500 * KB) <= WRONG


def test_announced_with_half_of_it_written(daemon: Daemon, client: Client) -> None:
    """What had gone before its hint is missing in the end, until it is said to be done."""
    with dial(daemon.pair) as s:
        for i in range(4):
            s.sendall(bytes(250 * KB))
            client.request(f"q{i}", ttft_left_s=60)
            client.transfer(f"t{i}", s, 500 * KB, stage=Stage.P2D, request=f"q{i}")
            s.sendall(bytes(250 * KB))
            client.done(request=f"q{i}")
            settled(daemon, (i + 1, i + 1, 0))
        client.transfer("next", s, 500 * KB, stage=Stage.P2D, request="r")
        assert client.flush(5)
        assert transfers(daemon) == {"next": 500 * KB}


def test_said_to_be_done_before_it_is_announced(daemon: Daemon, client: Client) -> None:
    """Two threads race; nothing is done by that, and nothing waits."""
    with dial(daemon.pair) as s:
        for i in range(3):
            client.done(transfer=f"t{i}")
            client.request(f"q{i}", ttft_left_s=60)
            client.transfer(f"t{i}", s, 200 * KB, stage=Stage.P2D, request=f"q{i}")
            assert client.flush(5)
            assert counted(daemon)[0] == i
            s.sendall(bytes(200 * KB))
            settled(daemon, (i + 1, i, 0))
            client.done(request=f"q{i}")
            settled(daemon, (i + 1, i + 1, 0))


def test_one_source_port_for_two_peers(daemon: Daemon, client: Client, sink: Sink) -> None:
    """SO_REUSEPORT on the side that connects: two connections that differ by their peer's address alone."""
    pair = daemon.pair
    pair.run(pair.b, "ip addr add 10.66.0.9/32 dev lo")
    pair.run(pair.a, f"ip route add 10.66.0.9/32 via {pair.addr_b}")

    def reuse(s: socket.socket) -> None:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        s.bind(("0.0.0.0", 45_000))  # noqa: S104 - of a throw-away namespace

    with ExitStack() as stack:
        one = stack.enter_context(dial(pair, before=reuse))
        two = stack.enter_context(dial(pair, before=reuse, address="10.66.0.9"))
        grown = Grown(daemon)
        client.transfer("one", tuple_of(*one.getpeername(), *one.getsockname()), MB, stage=Stage.P2D, request="r")
        client.mark(tuple_of(*two.getpeername(), *two.getsockname()), Stage.COLLECTIVE)
        assert client.flush(5)
        assert band(daemon, one) != band(daemon, two) == "level 0"
        two.sendall(bytes(MB))
        wait_for(lambda: sink.received == MB, "arrival")
        assert transfers(daemon) == {"one": MB}
        one.sendall(bytes(MB))
        settled(daemon, (1, 0, 0))
        assert grown.wrong(2 * MB) <= WRONG
