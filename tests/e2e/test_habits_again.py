# SPDX-License-Identifier: Apache-2.0
"""Clients that try again, use names again, pass sockets on, come late, or end in the middle.

Some need the kernel's word on connections that are over (bpf/sockets.bpf.c).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import ssl
import subprocess
import threading
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from support.habits import (
    KB,
    KIB,
    MB,
    PORT,
    WRONG,
    Grown,
    Sink,
    counted,
    dial,
    second_link,
    settled,
    shown,
    transfers,
    worker,
)
from support.rig import Daemon, running
from support.waiting import WAIT_S, wait_for

from mfsd.client import Client, Event, Rejected, Stage

if TYPE_CHECKING:
    from pathlib import Path

    from support.namespaces import NetnsPair

pytestmark = pytest.mark.netns

PULLED = 7000
"""Where workers are asked for bytes."""


def pull(pair: NetnsPair, size: int) -> None:
    """Read from a worker until it closes."""
    with pair.call(pair.b, lambda: socket.create_connection((pair.addr_a, PULLED), WAIT_S)) as s:
        n = 0
        while part := s.recv(1 << 18):
            n += len(part)
    assert n == size


# --- once more --------------------------------------------------------------------------------------------------------


def test_what_a_reset_has_cut_off_is_sent_again_in_time(
    daemon: Daemon, client: Client, sink: Sink, rejected: list[Rejected]
) -> None:
    grown = Grown(daemon)
    for i in range(5):
        client.request(f"r{i}", ttft_left_s=20)
        with dial(daemon.pair) as s:
            client.transfer(f"t{i}", s, MB, stage=Stage.P2D, request=f"r{i}")
            assert client.flush(5)
            s.sendall(bytes(200 * KB))
            sink.reset()
            with contextlib.suppress(OSError):
                while True:
                    s.sendall(bytes(64 * KB))
        with dial(daemon.pair) as s:
            client.transfer(f"t{i}", s, MB, stage=Stage.P2D, request=f"r{i}")
            assert client.flush(5)
            s.sendall(bytes(MB))
            client.done(request=f"r{i}")
            settled(daemon, (i + 1, i + 1, 0))
    assert grown.wrong(5 * MB) <= WRONG
    assert not rejected


@pytest.mark.parametrize("done", [False, True])
def test_the_name_of_a_transfer_again_right_behind_its_last_byte(
    daemon: Daemon, client: Client, sink: Sink, rejected: list[Rejected], *, done: bool
) -> None:
    with dial(daemon.pair) as s:
        for i in range(20):
            client.request(f"r{i}", ttft_left_s=20)
            client.transfer("kv", s, 200 * KB, stage=Stage.P2D, request=f"r{i}")
            s.sendall(bytes(200 * KB))
            if done:
                client.done(transfer="kv")
        settled(daemon, (20, 0, 0))
        for i in range(20):
            client.done(request=f"r{i}")
        settled(daemon, (20, 20, 0))
    sink.gets(4 * MB)
    assert not rejected


# --- late, or early ---------------------------------------------------------------------------------------------------


def test_connections_that_are_over_before_their_hint_is_heard(
    daemon: Daemon, client: Client, sink: Sink, events: list[Event]
) -> None:
    for i in range(40):
        with dial(daemon.pair) as s:
            client.request(f"r{i}", ttft_left_s=20)
            client.transfer(f"t{i}", s, 64 * KIB, stage=Stage.P2D, request=f"r{i}")
            s.sendall(bytes(64 * KIB))
    wait_for(lambda: sink.received == 40 * 64 * KIB, "arrival")
    settled(daemon, (40, 0, 0))
    for i in range(40):
        client.done(request=f"r{i}")
    settled(daemon, (40, 40, 0))
    assert not events
    wait_for(lambda: not daemon.connections(), "nothing to be left")


HALF = """
client = Client(target=target)
s = dial()
client.request("r", ttft_left_s=20)
client.transfer("t", s, 1_000_000, stage=Stage.P2D, request="r")
client.transfer("u", s, 1_000_000, stage=Stage.P2D, request="r")
assert client.flush(20)
s.sendall(bytes(1_500_000))
say("half")
hear()
"""


def test_a_worker_killed_in_the_middle_of_a_transfer(daemon: Daemon, sink: Sink) -> None:
    with worker(daemon, HALF) as w:
        assert w.hear() == ["half"]
        wait_for(lambda: sink.received == 1500 * KB, "arrival")
        w.kill()
        settled(daemon, (1, 0, 1))
    assert not transfers(daemon)


def test_some_connections_end_while_the_daemon_is_dead(netns_pair: NetnsPair, sink: Sink, tmp_path: Path) -> None:
    seen = list[Event]()
    with (
        contextlib.ExitStack() as stack,
        running(Daemon(netns_pair, tmp_path)) as daemon,
        daemon.client(on_event=seen.append) as client,
    ):
        assert client.flush(20)
        socks = [stack.enter_context(dial(netns_pair)) for _ in range(4)]
        for i, s in enumerate(socks):
            client.request(f"r{i}", ttft_left_s=60)
            for name in "ab":
                client.transfer(f"{name}{i}", s, MB, stage=Stage.P2D, request=f"r{i}")
        assert client.flush(5)
        for s in socks:
            s.sendall(bytes(3 * MB // 2))
        wait_for(lambda: sink.received == 6 * MB, "arrival")
        daemon.end(signal.SIGKILL)
        for s in socks[:2]:
            s.sendall(bytes(MB // 2))
        wait_for(lambda: sink.received == 7 * MB, "arrival")
        socks[0].close()
        daemon.start()
        wait_for(lambda: shown(daemon, socks[3]) is not None, "it to be announced again")
        for s in socks[2:]:
            s.sendall(bytes(MB // 2))
        for i in range(4):
            client.done(request=f"r{i}")
        wait_for(lambda: not transfers(daemon), "the end")
        assert counted(daemon)[1:] == (4, 0)


# --- whose ------------------------------------------------------------------------------------------------------------


FORKS = """
client = Client(target=target)
s = dial()
client.request("r", ttft_left_s=20)
client.transfer("t", s, 1_000_000, stage=Stage.P2D, request="r")
assert client.flush(20)
if not os.fork():
    client = Client(target=target)
    client.request("q", ttft_left_s=20)
    s.sendall(bytes(1_000_000))
    client.transfer("u", s, 1_000_000, stage=Stage.P2D, request="q")
    assert client.flush(20)
    s.sendall(bytes(1_000_000))
    client.done(request="q")
    say("child")
    hear()
    os._exit(0)
client.done(request="r")
s.close()
assert client.flush(20)
os._exit(0)
"""


def test_a_child_goes_on_with_the_socket_of_its_parent(daemon: Daemon, sink: Sink) -> None:
    with worker(daemon, FORKS) as w:
        assert w.hear() == ["child"]
        settled(daemon, (2, 2, 0))
        sink.gets(2 * MB)


DROPS = """
from grpc import _channel  # which loads when it is needed, from a checkout that may be closed to other users
listener = socket.create_server(("0.0.0.0", 7000))
os.setgroups([])
os.setgid(1000)
os.setuid(1000)
client = Client(target=target, on_rejected=lambda r: say("rejected", r))
client.request("r", ttft_left_s=60)
assert client.flush(20)
say("up")
for n in range(5):
    s, _ = listener.accept()
    client.transfer(f"t{n}", s, 200_000, stage=Stage.P2D, request="r")
    assert client.flush(20)
    s.sendall(bytes(200_000))
    client.done(transfer=f"t{n}")
    s.close()
say("over")
hear()
"""


@pytest.mark.usefixtures("open_to_all")
def test_privileges_dropped_behind_the_listen(daemon: Daemon) -> None:
    """The listener is root's, what is accepted on it the user's."""
    grown = Grown(daemon)
    with worker(daemon, DROPS) as w:
        assert w.hear() == ["up"]
        for _ in range(5):
            pull(daemon.pair, 200 * KB)
        assert w.hear() == ["over"]
        settled(daemon, (5, 0, 0))
    assert grown.wrong(MB) <= WRONG


@pytest.fixture
def open_to_all(daemon: Daemon) -> None:
    """Any user may reach the daemon's sockets."""
    for folder in (daemon.folder, *daemon.folder.parents):
        if folder.stat().st_uid == os.getuid() and str(folder).startswith("/tmp/"):  # noqa: S108 - pytest's own
            folder.chmod(folder.stat().st_mode | 0o711)
    for name in (daemon.socket, daemon.socket.with_name(daemon.socket.name + ".id")):
        name.chmod(0o777)


# --- on the wire ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("flush", [False, True])
def test_more_bytes_on_the_wire_than_were_announced(
    daemon: Daemon, client: Client, tmp_path: Path, events: list[Event], *, flush: bool, done: bool
) -> None:
    """TLS: some per cent of a thousand, and a handshake."""
    key, cert = tmp_path / "key", tmp_path / "cert"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", cert, "-subj", "/CN=b"],
        check=True,
        capture_output=True,
    )
    server, ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    server.load_cert_chain(cert, key)
    ours.check_hostname, ours.verify_mode = False, ssl.CERT_NONE
    received = [0]
    with daemon.pair.call(daemon.pair.b, lambda: socket.create_server(("0.0.0.0", PORT))) as listener:  # noqa: S104

        def serve() -> None:
            plain, _ = listener.accept()
            with plain, server.wrap_socket(plain, server_side=True) as s, contextlib.suppress(OSError):
                while part := s.recv(1 << 16):
                    received[0] += len(part)

        thread = threading.Thread(target=serve)
        thread.start()
        with dial(daemon.pair) as plain, ours.wrap_socket(plain) as s:
            grown = Grown(daemon)
            for i in range(20):
                client.request(f"q{i}", ttft_left_s=20)
                client.transfer(f"t{i}", s, 300 * KB, stage=Stage.P2D, request=f"q{i}")
                if flush:
                    assert client.flush(5)
                s.sendall(bytes(300 * KB))
                if done:
                    client.done(request=f"q{i}")
            wait_for(lambda: received[0] == 6 * MB, "arrival")
            settled(daemon, (20, 20 * done, 0))
            if flush:
                assert grown.wrong(6 * MB) <= WRONG
        thread.join(WAIT_S)
    assert not events


OURS = """
sysctl -qw net.ipv4.conf.all.rp_filter=0
ip addr add 10.88.0.1/24 dev w0; ip link set w0 up
ip route add 10.99.0.1 via 10.77.0.2 dev v0 src 10.77.0.1
"""


@pytest.mark.usefixtures("sink")
def test_a_route_that_moves_to_another_device_in_the_middle(netns_pair: NetnsPair, tmp_path: Path) -> None:
    pair = netns_pair
    second = second_link(pair, OURS)
    with (
        running(Daemon(pair, tmp_path, extra=second)) as daemon,
        daemon.client() as client,
        dial(replace(pair, addr_b="10.99.0.1")) as s,
    ):
        client.request("r", ttft_left_s=60)

        def sent() -> dict[tuple[str, str], int]:
            return {(d.name, b.name): b.bytes for d in daemon.status().devices for b in d.bands}

        before = sent()
        for i in range(4):
            client.transfer(f"t{i}", s, 2 * MB, stage=Stage.P2D, request="r")
            assert client.flush(5)
            s.sendall(bytes(MB))
            if i == 1:
                pair.run(pair.a, "ip route replace 10.99.0.1 via 10.88.0.2 dev w0 src 10.77.0.1")
            s.sendall(bytes(MB))
            settled(daemon, (i + 1, 0, 0))
        grown = {key: n - before[key] for key, n in sent().items()}
        assert min(grown["v0", "level 4"], grown["w0", "level 4"]) >= 2 * MB
        assert sum(n for (_, b), n in grown.items() if not b.startswith(("level", "control"))) <= WRONG * 8 * MB
