# SPDX-License-Identifier: Apache-2.0
"""Selectors against real sockets of a real kernel."""

from __future__ import annotations

import ipaddress
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.privileges import call_with

from mfsd.client import cookie_of
from mfsd.ground.model import CookieSelector, HintError, PortRange, ProcessSelector, TupleSelector
from mfsd.host.sockets import SocketResolver, process_sockets

if TYPE_CHECKING:
    from support.realnet import Net

    from mfsd.ground.model import HintSelector

pytestmark = pytest.mark.netns

ANY = PortRange()
V4 = ipaddress.ip_address("127.0.0.1")
V6 = ipaddress.ip_address("::1")


def port(sock: socket.socket) -> int:
    return int(sock.getsockname()[1])


def one(p: int) -> PortRange:
    return PortRange(p, p)


def cookies(resolver: SocketResolver, selector: HintSelector) -> set[int]:
    return {s.cookie for s in resolver.resolve(selector)}


@pytest.mark.parametrize(("host", "address"), [("127.0.0.1", V4), ("::1", V6)])
def test_exact_tuple_and_cookie_give_the_same_socket(
    net: Net, resolver: SocketResolver, host: str, address: ipaddress.IPv4Address
) -> None:
    server = net.listen(host)
    client, accepted = net.connect(server, host)
    (by_tuple,) = resolver.resolve(TupleSelector(address, address, one(port(client)), one(port(server))))
    assert by_tuple.cookie == cookie_of(client)
    assert (by_tuple.endpoints.src, by_tuple.endpoints.sport) == (address, port(client))
    assert (by_tuple.endpoints.dst, by_tuple.endpoints.dport) == (address, port(server))
    assert by_tuple.uid == os.getuid()
    assert by_tuple.inode == os.fstat(client.fileno()).st_ino
    assert resolver.resolve(CookieSelector(cookie_of(client))) == [by_tuple]
    # The other direction is the other socket.
    (back,) = resolver.resolve(TupleSelector(address, address, one(port(server)), one(port(client))))
    assert back.cookie == cookie_of(accepted)


def test_mapped_sockets_are_reported_as_ipv4(net: Net, resolver: SocketResolver) -> None:
    server = net.listen("::", family=socket.AF_INET6)
    client, accepted = net.connect(server, "::ffff:127.0.0.1", family=socket.AF_INET6)
    exact = TupleSelector(V4, V4, one(port(client)), one(port(server)))
    mapped = TupleSelector(
        ipaddress.ip_address("::ffff:127.0.0.1"),
        ipaddress.ip_address("::ffff:127.0.0.1"),
        one(port(client)),
        one(port(server)),
    )
    ranged = TupleSelector(None, V4, ANY, one(port(server)))
    process = ProcessSelector(os.getpid(), ipaddress.ip_network("127.0.0.0/8"), one(port(server)))
    for selector in (exact, mapped, ranged, process, CookieSelector(cookie_of(client))):
        (found,) = resolver.resolve(selector)
        assert found.cookie == cookie_of(client), selector
        assert found.endpoints.src == V4
        assert found.endpoints.dst == V4
    assert cookies(resolver, TupleSelector(None, V4, one(port(server)), ANY)) == {cookie_of(accepted)}


def test_ranges_have_inclusive_ends(net: Net, resolver: SocketResolver) -> None:
    server = net.listen("127.0.0.1")
    clients = [net.connect(server, "127.0.0.1")[0] for _ in range(12)]
    ports = sorted(port(c) for c in clients)
    by_port = {port(c): cookie_of(c) for c in clients}
    for first, last in ((ports[3], ports[7]), (ports[0], ports[0]), (ports[5], 65535), (0, ports[5]), (0, 65535)):
        expected = {by_port[p] for p in ports if first <= p <= last}
        for src in (None, V4):
            selector = TupleSelector(src, V4, PortRange(first, last), one(port(server)))
            assert cookies(resolver, selector) == expected, selector
    # and on the other side
    assert len(resolver.resolve(TupleSelector(None, V4, one(port(server)), PortRange(ports[2], ports[9])))) == sum(
        ports[2] <= p <= ports[9] for p in ports
    )


def test_other_addresses_and_listeners_do_not_match(net: Net, resolver: SocketResolver) -> None:
    server = net.listen("127.0.0.1")
    client, _ = net.connect(server, "127.0.0.1")
    other = ipaddress.ip_address("127.0.0.2")
    assert resolver.resolve(TupleSelector(None, other, ANY, ANY)) == []
    assert resolver.resolve(TupleSelector(other, V4, ANY, ANY)) == []
    assert resolver.resolve(TupleSelector(None, V6, ANY, ANY)) == []
    # The kernel answers an exact lookup of what the listener would accept with the listener.
    assert resolver.resolve(TupleSelector(V4, other, one(port(server)), one(1))) == []
    assert resolver.resolve(TupleSelector(V4, V4, one(port(server)), one(port(client) ^ 1))) == []
    assert resolver.resolve(CookieSelector(cookie_of(server))) == []


def test_a_time_wait_remain_is_no_socket(net: Net, resolver: SocketResolver) -> None:
    server = net.listen("127.0.0.1")
    client, accepted = net.connect(server, "127.0.0.1")
    exact = TupleSelector(V4, V4, one(port(client)), one(port(server)))
    assert resolver.resolve(exact)
    client.close()
    assert accepted.recv(1) == b""
    accepted.close()
    assert resolver.resolve(exact) == []
    assert resolver.resolve(TupleSelector(None, V4, ANY, ANY)) == []


def test_process_selector_sees_that_process_only(net: Net, resolver: SocketResolver) -> None:
    server = net.listen("127.0.0.1")
    mine, _ = net.connect(server, "127.0.0.1")
    code = (
        "import socket, sys\n"
        f"s = socket.create_connection(('127.0.0.1', {port(server)}))\n"
        "print(s.getsockname()[1], flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child_port = int(child.stdout.readline())
        net.open.append(server.accept()[0])
        (found,) = resolver.resolve(ProcessSelector(child.pid, None, ANY))
        assert found.endpoints.sport == child_port
        assert resolver.resolve(ProcessSelector(child.pid, ipaddress.ip_network("10.0.0.0/8"), ANY)) == []
        assert resolver.resolve(ProcessSelector(child.pid, ipaddress.ip_network("::/0"), ANY)) == []
        assert resolver.resolve(ProcessSelector(child.pid, None, one(port(server) ^ 1))) == []
        own = ProcessSelector(os.getpid(), ipaddress.ip_network("127.0.0.1/32"), one(port(server)))
        assert cookies(resolver, own) == {cookie_of(mine)}
        child.communicate(b"")
    with pytest.raises(HintError, match="there is no process") as caught:
        resolver.resolve(ProcessSelector(child.pid, None, ANY))
    assert caught.value.field == "selector.process.pid"
    assert resolver.resolve_many([ProcessSelector(child.pid, None, ANY)]) == [[]]


def test_hidden_process_names_the_fix() -> None:
    """Root without capabilities, and a process of somebody else."""
    with subprocess.Popen(["sleep", "600"], user=65534) as child:
        try:
            with pytest.raises(HintError, match="CAP_SYS_PTRACE") as caught:
                call_with(frozenset(), lambda: process_sockets(child.pid))
            assert caught.value.field == "selector.process.pid"
            assert process_sockets(child.pid) == set()
        finally:
            child.kill()


@pytest.mark.parametrize(("host", "address", "family"), [("127.0.0.1", V4, 2), ("::1", V6, 10)])
def test_connected_udp_by_exact_tuple(
    net: Net, resolver: SocketResolver, host: str, address: ipaddress.IPv4Address, family: int
) -> None:
    a, b = socket.socket(family, socket.SOCK_DGRAM), socket.socket(family, socket.SOCK_DGRAM)
    net.open += [a, b]
    b.bind((host, 0))
    a.connect((host, port(b)))
    (found,) = resolver.resolve(TupleSelector(address, address, one(port(a)), one(port(b)), 17))
    assert found.cookie == cookie_of(a)
    assert found.endpoints.protocol == 17
    # b is not connected: its cookie would stand for all its peers.
    assert resolver.resolve(TupleSelector(address, address, one(port(b)), one(port(a)), 17)) == []
    assert cookies(resolver, CookieSelector(cookie_of(a))) == {cookie_of(a)}
    # TCP and UDP ports are different worlds.
    assert resolver.resolve(TupleSelector(address, address, one(port(a)), one(port(b)), 6)) == []


def test_resolve_many_agrees_with_resolve(net: Net, resolver: SocketResolver) -> None:
    s4, s6 = net.listen("127.0.0.1"), net.listen("::1")
    c4 = [net.connect(s4, "127.0.0.1")[0] for _ in range(5)]
    c6 = [net.connect(s6, "::1")[0] for _ in range(5)]
    selectors: list[HintSelector] = [
        TupleSelector(None, V4, ANY, one(port(s4))),
        TupleSelector(None, V6, ANY, one(port(s6))),
        TupleSelector(V4, V4, one(port(c4[0])), one(port(s4))),
        TupleSelector(V6, V6, one(port(c6[1])), one(port(s6))),
        TupleSelector(V4, V4, one(1), one(2)),
        ProcessSelector(os.getpid(), None, one(port(s6))),
        ProcessSelector(os.getpid(), ipaddress.ip_network("127.0.0.0/30"), ANY),
    ]
    for chosen in (selectors, [*selectors, CookieSelector(cookie_of(c6[2]))]):
        together = resolver.resolve_many(chosen)
        assert [{s.cookie for s in found} for found in together] == [cookies(resolver, s) for s in chosen]
        assert [len(found) for found in together][:6] == [5, 5, 1, 1, 0, 5]
    assert resolver.resolve_many([]) == []


@pytest.mark.parametrize("rules", [2, 250, 251, 600])
def test_many_rules_share_a_listing(net: Net, resolver: SocketResolver, rules: int) -> None:
    """Both ways of listing (filter program, everything) find the same."""
    server = net.listen("127.0.0.1")
    clients = [net.connect(server, "127.0.0.1")[0] for _ in range(8)]
    wanted = [TupleSelector(None, V4, one(port(c)), PortRange(port(server), port(server))) for c in clients]
    absent = [TupleSelector(None, V4, one(p), PortRange(1, 2)) for p in range(1, rules - 1)]
    found = resolver.resolve_many([*wanted[: rules // 2], *absent, *wanted[rules // 2 :]])
    assert {s.cookie for sockets in found for s in sockets} == {cookie_of(c) for c in clients}
    assert all(not s for s in found[len(wanted[: rules // 2]) : len(wanted[: rules // 2]) + len(absent)])


def test_no_descriptor_is_leaked(own_netns: None) -> None:  # noqa: ARG001 - the fixture's effect
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        with SocketResolver() as r:
            r.resolve(CookieSelector(1))
            r.resolve(ProcessSelector(os.getpid(), None, ANY))
        r.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
