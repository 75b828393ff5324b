# SPDX-License-Identifier: Apache-2.0
"""How far the bytes of real TCP sockets have come."""

from __future__ import annotations

import ipaddress
import socket
import subprocess
from typing import TYPE_CHECKING, TypeVar

import pytest
from support.waiting import wait_for

from mfsd.client import cookie_of
from mfsd.ground.model import CookieSelector, Endpoints, PortRange, TupleSelector
from mfsd.host import inet_diag
from mfsd.lab.hosts.tcp import reset_at_close

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.realnet import Net

    from mfsd.host.sockets import SocketResolver, TcpProgress

T = TypeVar("T")
pytestmark = pytest.mark.netns

HOSTS = [("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6), ("::ffff:127.0.0.1", socket.AF_INET6)]


def endpoints(sock: socket.socket) -> Endpoints:
    def address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
        a = ipaddress.ip_address(text)
        return (a.ipv4_mapped or a) if isinstance(a, ipaddress.IPv6Address) else a

    src, dst = sock.getsockname(), sock.getpeername()
    return Endpoints(address(src[0]), src[1], address(dst[0]), dst[1])


def progress(resolver: SocketResolver, sock: socket.socket) -> TcpProgress:
    return told(resolver.tcp_progress([(cookie_of(sock), endpoints(sock))])[cookie_of(sock)])


def told(progress: TcpProgress | None) -> TcpProgress:
    assert progress is not None
    return progress


def first(get: Callable[[], T], good: Callable[[T], bool]) -> T:
    """That is good."""
    return wait_for(lambda: value if good(value := get()) else None)


@pytest.mark.parametrize(("host", "family"), HOSTS)
def test_acked_bytes_are_exact(net: Net, resolver: SocketResolver, host: str, family: int) -> None:
    server = net.listen("::" if family == socket.AF_INET6 else host, family=family)
    client, accepted = net.connect(server, host, family=family)
    # The side that opens counts its SYN, the other one doesn't.
    assert progress(resolver, client).bytes_acked == 1
    assert progress(resolver, accepted).bytes_acked == 0
    total = 0
    for size in (1, 1447, 100_000):
        client.sendall(b"x" * size)
        total += size
        left = size
        while left:
            left -= len(accepted.recv(left))
        assert first(lambda: progress(resolver, client), lambda p: not p.unsent_plus_unacked).bytes_acked == 1 + total
    assert progress(resolver, accepted).bytes_acked == 0
    state = progress(resolver, client)
    assert state.notsent == 0
    assert state.total_retrans == 0
    assert 1000 <= state.rto_us <= 120_000_000


def test_what_the_peer_does_not_read_stays_queued(net: Net, resolver: SocketResolver) -> None:
    server = net.listen("127.0.0.1")
    client, accepted = net.connect(server, "127.0.0.1")
    client.setblocking(False)
    written = 0
    while True:
        try:
            written += client.send(b"x" * 65536)
        except BlockingIOError:
            state = first(lambda: progress(resolver, client), lambda p: p.notsent > 0)
            break
    assert state.bytes_acked - 1 + state.unsent_plus_unacked == written
    assert 0 < state.notsent <= state.unsent_plus_unacked
    left = written
    while left:
        left -= len(accepted.recv(1 << 20))
    done = first(lambda: progress(resolver, client), lambda p: not p.unsent_plus_unacked)
    assert done.bytes_acked == 1 + written


def test_sockets_that_are_gone_are_absent(net: Net, resolver: SocketResolver) -> None:
    server = net.listen("127.0.0.1")
    pairs = [net.connect(server, "127.0.0.1") for _ in range(6)]
    asked = [(cookie_of(c), endpoints(c)) for c, _ in pairs]
    assert set(resolver.tcp_progress(asked)) == {c for c, _ in asked}
    reset, closed, shut = pairs[0], pairs[1], pairs[2]
    reset_at_close(reset[0])
    reset[0].close()
    closed[0].close()  # TIME_WAIT
    closed[1].close()
    shut[0].shutdown(socket.SHUT_WR)  # once the FIN is acknowledged, too, bytes acked (SYN and FIN) can be asked for
    alive = first(lambda: resolver.tcp_progress(asked), lambda found: told(found[asked[2][0]]).bytes_acked == 2)
    assert set(alive) == {c for c, _ in asked[1:]}
    assert [c for c, progress in alive.items() if progress is None] == [asked[1][0]], "over, and all acknowledged"


def test_a_reused_tuple_is_another_socket(net: Net, resolver: SocketResolver) -> None:
    server = net.listen("127.0.0.1")
    client, accepted = net.connect(server, "127.0.0.1")
    old, where = cookie_of(client), endpoints(client)
    reset_at_close(client)
    client.close()
    accepted.close()
    again = socket.socket()
    net.open.append(again)
    again.bind((str(where.src), where.sport))
    again.connect((str(where.dst), where.dport))
    assert endpoints(again) == where
    assert resolver.tcp_progress([(old, where)]) == {}
    assert set(resolver.tcp_progress([(old, where), (cookie_of(again), where)])) == {cookie_of(again)}


def test_more_lookups_than_fit_into_a_batch(net: Net, resolver: SocketResolver) -> None:
    server = net.listen("127.0.0.1")
    pairs = [net.connect(server, "127.0.0.1") for _ in range(150)]
    sizes = {cookie_of(c): n for n, (c, _) in enumerate(pairs)}
    for n, (client, _) in enumerate(pairs):
        client.sendall(b"y" * n)
    asked = [(cookie_of(c), endpoints(c)) for c, _ in pairs]
    gone = [(c ^ 1 << 40, e) for c, e in asked]
    found = first(
        lambda: resolver.tcp_progress([x for both in zip(asked, gone, strict=True) for x in both]),
        lambda got: not any(told(p).unsent_plus_unacked for p in got.values()),
    )
    assert {c: told(p).bytes_acked - 1 for c, p in found.items()} == sizes
    assert resolver.tcp_progress([]) == {}


def test_sockets_bound_to_a_device(net: Net, resolver: SocketResolver) -> None:
    """Their lookup key holds the interface, which is learned when they are found."""
    server = net.listen("127.0.0.1")
    client, _ = net.connect(server, "127.0.0.1", device="lo")
    port = int(server.getsockname()[1])
    for selector in (
        TupleSelector(None, ipaddress.ip_address("127.0.0.1"), PortRange(), PortRange(port, port)),
        CookieSelector(cookie_of(client)),
    ):
        (found,) = resolver.resolve(selector)
        assert found.cookie == cookie_of(client)
        assert progress(resolver, client).bytes_acked == 1


def test_a_listing_that_was_given_up_does_not_disturb(net: Net, resolver: SocketResolver) -> None:
    """Replies to an earlier request that nobody has read are told apart by their sequence numbers."""
    server = net.listen("127.0.0.1")
    client, _ = net.connect(server, "127.0.0.1")
    where = endpoints(client)
    sock = resolver._diag._sock
    own = inet_diag.lookup_request(
        6, where.src.packed, where.sport, where.dst.packed, where.dport, ext=inet_diag.EXT_INFO
    )
    sock._send([own])
    assert progress(resolver, client).bytes_acked == 1
    sock._send([inet_diag.lookup_request(6, b"\1\1\1\1", 1, b"\1\1\1\1", 1)])
    assert len(resolver.resolve(CookieSelector(cookie_of(client)))) == 1
    sock._seq = 0xFFFFFFF0
    assert resolver._diag.lookup([own] * 40).count(None) == 0


def test_a_window_is_full_while_all_of_it_is_queued(net: Net, resolver: SocketResolver) -> None:
    """A new connection's window is ten segments, which the qdisc lets out at a byte per second."""
    for command in ("ip link set lo mtu 1500", "tc qdisc replace dev lo root tbf rate 8bit burst 2000 limit 1mb"):
        subprocess.run(command.split(), check=True)
    server = net.listen("127.0.0.1")
    client, _ = net.connect(server, "127.0.0.1")
    assert not progress(resolver, client).window_full
    client.setblocking(False)
    client.send(b"x" * 65536)
    state = first(lambda: progress(resolver, client), lambda p: p.window_full)
    assert state.notsent > 0


@pytest.mark.parametrize(
    ("window", "unacked", "lost", "full"),
    [(20, 20, 0, True), (20, 14, 0, True), (20, 13, 0, False), (20, 20, 10, False), (10, 7, 0, True), (1, 1, 0, True)],
)
def test_a_window_is_full_while_tcp_waits_for_more_of_it(*, window: int, unacked: int, lost: int, full: bool) -> None:
    """It leaves what is free until that is a third of the window. A purge then frees nothing but a timer's time."""
    tcp = inet_diag.Tcp(*(0,) * len(inet_diag.Tcp._fields))._replace(snd_cwnd=window, unacked=unacked, lost=lost)
    assert tcp.window_full == full
