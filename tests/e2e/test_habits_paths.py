# SPDX-License-Identifier: Apache-2.0
"""How bytes get out of the process and into packets: rings, kernel threads, tunnels, offloads, odd handshakes."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
import subprocess
import threading
import time
from typing import TYPE_CHECKING, Final

import pytest
from support.habits import KB, MB, PORT, WRONG, Grown, Sink, close_hard, counted, dial, settled, three_in_turn
from support.uring import SEND, SEND_ZC, SQPOLL, Ring
from support.waiting import WAIT_S, wait_for

from mfsd.client import Client, Stage, process_peer, tuple_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from support.namespaces import NetnsPair
    from support.rig import Daemon

pytestmark = pytest.mark.netns

NAMED: Final = pytest.mark.parametrize("by", ["socket", "addresses"])
TCP_MD5SIG: Final = 14
IPV6_DSTOPTS: Final = 59
SO_MAX_PACING_RATE: Final = 47
"""include/uapi/linux/tcp.h, include/uapi/linux/in6.h, include/uapi/asm-generic/socket.h"""
LOSES: Final = "4,32 0 0 4294963256,53 0 1 {},6 0 0 0,6 0 0 2"
"""Classic BPF: of a random word (SKF_AD_RANDOM) below a number TC_ACT_SHOT comes, else TC_ACT_OK."""


# --- rings ------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[0, SQPOLL], ids=["", "polled"])
def ring(request: pytest.FixtureRequest, netns_pair: NetnsPair) -> Any:
    """A polled ring's thread lives in the namespace of whoever makes it."""
    try:
        made = netns_pair.call(netns_pair.a, lambda: Ring(request.param))
    except OSError as e:
        pytest.skip(f"this kernel has no io_uring: {e}")
    with made:
        yield made


@pytest.mark.parametrize("operation", [SEND, SEND_ZC], ids=["send", "send_zc"])
def test_io_uring_by_socket(daemon: Daemon, client: Client, sink: Sink, ring: Ring, operation: int) -> None:
    grown = Grown(daemon)
    with daemon.pair.call(daemon.pair.a, lambda: ring.connect(daemon.pair.addr_b, PORT)) as s:
        for i in range(3):
            client.transfer(f"t{i}", s, MB, stage=Stage.P2D, request="r")
            assert client.flush(5)
            ring.send(operation, s, MB)
            settled(daemon, (i + 1, 0, 0))
    assert grown.wrong(3 * MB) <= WRONG
    sink.gets(3 * MB)


def test_io_uring_by_process(daemon: Daemon, client: Client, sink: Sink, ring: Ring) -> None:
    client.mark(process_peer(os.getpid(), daemon.pair.addr_b), Stage.COLLECTIVE)
    assert client.flush(5)
    grown = Grown(daemon)
    with daemon.pair.call(daemon.pair.a, lambda: ring.connect(daemon.pair.addr_b, PORT)) as s:
        ring.send(SEND, s, MB)
        wait_for(lambda: sink.received == MB, "arrival")
    assert grown.wrong(MB, right="level 0") <= WRONG


# --- devices ----------------------------------------------------------------------------------------------------------


def above(pair: NetnsPair, kind: str) -> None:
    """Devices of this kind above those of the pair, with addresses of their own: 10.78.0.1 and 10.78.0.2."""
    ends = ((pair.a, pair.dev_a, pair.addr_a, pair.addr_b, 1), (pair.b, pair.dev_b, pair.addr_b, pair.addr_a, 2))
    for name, device, own, peer, host in ends:
        upper = device if kind == "bridge" and host == 2 else "upper"
        if kind == "vxlan":
            words = f"vxlan id 5 local {own} remote {peer} dev {device} dstport 4789".split()
        else:
            words = ["bridge"]
        if upper == "upper":
            if subprocess.run(["ip", "-n", name, "link", "add", upper, "type", *words], check=False).returncode:
                pytest.skip(f"this kernel has no {kind}")
            if kind == "bridge":
                pair.run(name, f"ip link set {device} master {upper}")
        pair.run(name, f"ip addr add 10.78.0.{host}/24 dev {upper}; ip link set {upper} up")


@NAMED
@pytest.mark.parametrize("kind", ["vxlan", "bridge"])
def test_a_device_above_the_shaped_one(daemon: Daemon, client: Client, kind: str, by: str) -> None:
    pair = daemon.pair
    above(pair, kind)
    with Sink(pair) as there, dial(pair, address="10.78.0.2") as s:
        grown = Grown(daemon)
        three_in_turn(daemon, client, s if by == "socket" else tuple_of("10.78.0.2", PORT), s)
        assert grown.wrong(3 * MB) <= WRONG
        assert there.received == 3 * MB


def test_the_header_of_a_tunnel_says_nothing_of_the_stream(daemon: Daemon, client: Client) -> None:
    """Connection after connection: what would be taken for a sequence number is ahead of every other one's."""
    pair = daemon.pair
    above(pair, "vxlan")
    with Sink(pair):
        for n in range(16):
            with dial(pair, address="10.78.0.2") as s:
                for i in range(3):
                    client.transfer(f"{n}/{i}", tuple_of("10.78.0.2", PORT), 100 * KB, stage=Stage.P2D, request="r")
                    assert client.flush(5)
                    s.sendall(bytes(100 * KB))
                    settled(daemon, (3 * n + i + 1, 0, 0))


@NAMED
def test_an_mtu_that_shrinks_on_a_device_without_offloads(daemon: Daemon, client: Client, sink: Sink, by: str) -> None:
    pair, grown = daemon.pair, Grown(daemon)
    pair.run(pair.a, f"ethtool -K {pair.dev_a} tso off gso off gro off")
    with dial(pair) as s:
        named = s if by == "socket" else tuple_of(pair.addr_b, PORT)
        client.transfer("t", named, 10 * MB, stage=Stage.P2D, request="r")
        assert client.flush(5)
        for i in range(10):
            pair.run(pair.a, f"ip link set {pair.dev_a} mtu {1500 - 80 * i}")
            s.sendall(bytes(MB))
        settled(daemon, (1, 0, 0))
    assert grown.wrong(10 * MB) <= WRONG
    sink.gets(10 * MB)


@NAMED
def test_segments_of_hundreds_of_kilobytes(daemon: Daemon, client: Client, by: str) -> None:
    """BIG TCP of IPv6, whose segments have a jumbo header before TCP's."""
    pair = daemon.pair
    for name, device in ((pair.a, pair.dev_a), (pair.b, pair.dev_b)):
        limits = ("gso_max_size", "300000", "gro_max_size", "300000")
        if subprocess.run(["ip", "-n", name, "link", "set", device, *limits], check=False).returncode:
            pytest.skip("this kernel has no BIG TCP")
    with Sink(pair, v6=True) as there, dial(pair, v6=True) as s:
        grown = Grown(daemon)
        named = s if by == "socket" else tuple_of(pair.addr6_b, PORT)
        three_in_turn(daemon, client, named, s)
        assert grown.wrong(3 * MB) <= WRONG
        assert there.received == 3 * MB


# --- packets ----------------------------------------------------------------------------------------------------------


def record_route(s: socket.socket) -> None:
    s.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, b"\x07\x27\x04" + bytes(37))


def padded(s: socket.socket) -> None:
    s.setsockopt(socket.IPPROTO_IPV6, IPV6_DSTOPTS, bytes([0, 0, 1, 4, 0, 0, 0, 0]))


def signed(s: socket.socket, peer: str) -> None:
    key = struct.pack("=H2x4s120x", socket.AF_INET, socket.inet_aton(peer)) + struct.pack(
        "=BBHI80s", 0, 0, 3, 0, b"abc"
    )
    s.setsockopt(socket.IPPROTO_TCP, TCP_MD5SIG, key)


ODD: Final[dict[str, Callable[[socket.socket], None]]] = {
    "options of IP": record_route,
    "extension headers": padded,
    "signed": lambda s: signed(s, "10.77.0.2"),
    "small segments": lambda s: s.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 200),
    "paced": lambda s: s.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, 2 * MB),
    "bbr": lambda s: s.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"bbr"),
    "small buffer": lambda s: s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1),
}


@NAMED
@pytest.mark.parametrize("odd", ODD)
def test_odd_packets(daemon: Daemon, client: Client, odd: str, by: str) -> None:
    """Longer headers, shorter segments, another pace: what counts is TCP's word."""
    pair, v6 = daemon.pair, odd == "extension headers"
    with Sink(pair, v6=v6) as there, contextlib.ExitStack() as stack:
        try:
            if odd == "signed":
                signed(there.listener, pair.addr_a)
            s = stack.enter_context(dial(pair, v6=v6, before=ODD[odd]))
        except OSError as e:
            if e.errno in (errno.ENOPROTOOPT, errno.ENOENT):
                pytest.skip(f"this kernel has no such option: {e}")
            raise
        grown = Grown(daemon)
        three_in_turn(daemon, client, s if by == "socket" else tuple_of(pair.addr6_b if v6 else pair.addr_b, PORT), s)
        assert grown.wrong(3 * MB) <= WRONG
        assert there.received == 3 * MB


@NAMED
def test_plain_old_tcp_on_a_path_that_loses(daemon: Daemon, client: Client, sink: Sink, by: str) -> None:
    """No timestamps, no SACK, small windows, one packet in fifty lost: what is sent again counts once."""
    pair = daemon.pair
    for name in (pair.a, pair.b):
        pair.run(name, "sysctl -qw net.ipv4.tcp_timestamps=0 net.ipv4.tcp_sack=0 net.ipv4.tcp_window_scaling=0")
    program = LOSES.format(2**32 // 50)
    pair.run(pair.b, f"tc qdisc add dev v1 clsact; tc filter add dev v1 ingress bpf da bytecode '{program}'")
    grown = Grown(daemon)
    with dial(pair) as s:
        three_in_turn(daemon, client, s if by == "socket" else tuple_of(pair.addr_b, PORT), s)
        for i in range(20):
            with dial(pair) as one:
                client.transfer(f"c{i}", one, 64 * KB, stage=Stage.P2D, request="r")
                assert client.flush(5)
                one.sendall(bytes(64 * KB))
        settled(daemon, (23, 0, 0))
    assert grown.wrong(3 * MB + 20 * 64 * KB) <= WRONG
    wait_for(lambda: sink.received == 3 * MB + 20 * 64 * KB, "arrival")


# --- handshakes -------------------------------------------------------------------------------------------------------


@NAMED
def test_both_sides_connect_at_once(daemon: Daemon, client: Client, by: str) -> None:
    """Simultaneous open: their SYNs cross, since one of them waits in a queue."""
    pair = daemon.pair
    slow, fast = "rate 40kbit burst 1600 limit 100000", "rate 100mbit burst 64000 limit 100000"

    def bound(address: str) -> socket.socket:
        s = socket.socket()
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        s.bind((address, PORT))
        s.setblocking(False)
        return s

    with Sink(pair):
        dial(pair).close()  # neighbours know each other
    pair.run(pair.b, f"tc qdisc add dev v1 root tbf {slow}")
    ours, theirs = pair.call(pair.a, lambda: bound(pair.addr_a)), pair.call(pair.b, lambda: bound(pair.addr_b))
    with ours, theirs, pair.call(pair.b, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as filler:
        for _ in range(3):
            filler.sendto(bytes(1400), (pair.addr_a, 9))
        grown = Grown(daemon)
        client.transfer("t", ours if by == "socket" else tuple_of(pair.addr_b, PORT), MB, stage=Stage.P2D, request="r")
        assert client.flush(5)
        assert theirs.connect_ex((pair.addr_a, PORT)) == errno.EINPROGRESS
        assert ours.connect_ex((pair.addr_b, PORT)) == errno.EINPROGRESS
        assert select.select([], [ours], [], WAIT_S)[1]
        assert not ours.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        pair.run(pair.b, f"tc qdisc change dev v1 root tbf {fast}")
        ours.setblocking(True)
        theirs.setblocking(True)
        reader = threading.Thread(target=lambda: theirs.recv(MB, socket.MSG_WAITALL), daemon=True)
        reader.start()
        ours.sendall(bytes(MB))
        settled(daemon, (1, 0, 0))
        reader.join(WAIT_S)
    assert grown.wrong(MB) <= WRONG


def test_accepted_by_syn_cookies(daemon: Daemon, client: Client) -> None:
    pair = daemon.pair
    pair.run(pair.a, "sysctl -qw net.ipv4.tcp_syncookies=2")  # always
    client.mark(tuple_of(pair.addr_b, (1, 65535)), Stage.COLLECTIVE)
    assert client.flush(5)
    with (
        pair.call(pair.a, lambda: socket.create_server((pair.addr_a, PORT))) as listener,
        pair.call(pair.b, lambda: socket.create_connection((pair.addr_a, PORT))) as peer,
        listener.accept()[0] as s,
    ):
        grown = Grown(daemon)
        reader = threading.Thread(target=lambda: peer.recv(MB, socket.MSG_WAITALL), daemon=True)
        reader.start()
        s.sendall(bytes(MB))
        reader.join(WAIT_S)
        wait_for(lambda: sum(grown.now().values()) >= MB, "what the bands have sent")
        assert grown.wrong(MB, right="level 0") <= WRONG


# --- ends -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["peer", "we"])
def test_reset_behind_the_last_acknowledgement(daemon: Daemon, client: Client, who: str) -> None:
    """Nothing is lost any more: neither is the request."""
    pair, size = daemon.pair, 256 * KB
    with pair.call(pair.b, lambda: socket.create_server((pair.addr_b, PORT))) as listener:

        def serve() -> None:
            for _ in range(20):
                peer, _ = listener.accept()
                left = size
                while left:
                    left -= len(peer.recv(1 << 18))
                peer.send(b"!")
                if who == "peer":
                    close_hard(peer)
                else:
                    with contextlib.suppress(ConnectionResetError):
                        peer.recv(1)
                    peer.close()

        server = threading.Thread(target=serve, daemon=True)
        server.start()
        for i in range(20):
            s = dial(pair)
            client.transfer(f"t{i}", s, size, stage=Stage.P2D, request="r")
            if i % 2:
                assert client.flush(5)
            s.sendall(bytes(size))
            with contextlib.suppress(ConnectionResetError):
                assert s.recv(1) == b"!"
            close_hard(s)
        server.join(WAIT_S)
    settled(daemon, (20, 0, 0))
    client.done(request="r")
    settled(daemon, (20, 1, 0))


def test_closed_long_before_the_peer_reads(daemon: Daemon, client: Client, sink: Sink) -> None:
    """The kernel goes on sending; what is not acknowledged is not done, whatever the worker says."""
    sink.paused = True
    s = dial(daemon.pair)
    client.transfer("t", s, 3 * MB, stage=Stage.P2D, request="r")
    assert client.flush(5)
    s.settimeout(1)
    with contextlib.suppress(TimeoutError):
        while True:
            s.send(bytes(64 * KB))
    s.close()
    client.done(request="r")
    time.sleep(2)
    assert counted(daemon) == (0, 0, 0)
    sink.paused = False
    settled(daemon, (1, 1, 0))
    wait_for(lambda: not daemon.connections(), "the connection to be forgotten")
