# SPDX-License-Identifier: Apache-2.0
"""What the kernel tells of connections, and what it does with rules, on real sockets in throw-away namespaces."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np
import pytest
from support.privileges import DAEMON, call_with
from support.waiting import wait_for

from mfsd.client.selectors import cookie_of
from mfsd.datapath import _abi
from mfsd.datapath.bpf.keys import cookie_key, tuple_key
from mfsd.datapath.bpf.libbpf import LibbpfLoader
from mfsd.datapath.bpf.rules import Match
from mfsd.datapath.bpf.teller import Teller
from mfsd.ground.model import Endpoints, PortRange
from mfsd.lab.hosts.tcp import reset_at_close

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support.namespaces import NetnsPair

    from mfsd.datapath.bpf.loader import Classifier
    from mfsd.datapath.bpf.teller import Event

pytestmark = [pytest.mark.bpf, pytest.mark.netns]

T = TypeVar("T")
ROWS: Final = 64


class Bench:
    """A teller, and what the daemon would do with its tables."""

    def __init__(self, classifier: Classifier, teller: Teller, pair: NetnsPair) -> None:
        self.classifier, self.teller, self.pair = classifier, teller, pair
        teller.lend(range(ROWS // 2))

    def inside(self, namespace: str, body: Callable[[], T]) -> T:
        return self.pair.call(namespace, body)

    def events(self, count: int) -> list[Event]:
        """The next so many events of our own connections; fails if there are not so many within seconds."""
        out: list[Event] = []
        deadline = time.monotonic() + 10
        while len(out) < count and time.monotonic() < deadline:
            out += [e for e in self.teller.events() if e.sock.endpoints.dport != 0]
            time.sleep(0.001)
        assert len(out) == count, out
        return out

    def row(self, cookie: int) -> int | None:
        return self.classifier.cookies.get(cookie_key(cookie))


@pytest.fixture
def bench(netns_pair: NetnsPair) -> Iterator[Bench]:
    with contextlib.ExitStack() as stack:
        classifier = stack.enter_context(call_with(DAEMON, lambda: LibbpfLoader().open_classifier(ROWS)))
        teller = stack.enter_context(call_with(DAEMON, lambda: Teller(classifier)))
        yield Bench(classifier, teller, netns_pair)


def listener(bench: Bench, family: int = socket.AF_INET) -> socket.socket:
    both = family == socket.AF_INET6
    address = "::" if both else bench.pair.addr_b
    return bench.inside(bench.pair.b, lambda: socket.create_server((address, 0), family=family, dualstack_ipv6=both))


def joined(bench: Bench, server: socket.socket) -> tuple[socket.socket, socket.socket]:
    port = server.getsockname()[1]
    client = bench.inside(bench.pair.a, lambda: socket.create_connection((bench.pair.addr_b, port)))
    return client, server.accept()[0]


def to(bench: Bench, port: int, **more: Any) -> Match:
    return Match(None, ipaddress.ip_network(bench.pair.addr_b), PortRange(), PortRange(port, port), **more)


def test_nothing_is_said_of_connections_that_nobody_names(bench: Bench) -> None:
    with listener(bench) as server:
        client, accepted = joined(bench, server)
        cookie = cookie_of(client)
        told = bench.teller.find(cookie)
        assert told is not None
        assert str(told.endpoints.dst) == bench.pair.addr_b
        assert (told.endpoints.sport, told.endpoints.dport) == (client.getsockname()[1], server.getsockname()[1])
        assert (told.pid, told.uid) == (os.getpid(), os.geteuid())
        assert told.netns != bench.teller.netns
        other = bench.teller.find(cookie_of(accepted))
        assert other is not None
        assert other.pid == os.getpid()  # as its listener's
        client.close()
        accepted.close()
    time.sleep(0.05)
    assert not bench.teller.events()
    assert bench.teller.find(cookie) is None


def test_a_thread_is_asked_about_once_in_a_while(bench: Bench) -> None:
    """Where a rule is for somebody by a description, and no row says yet that this is one of them."""
    with listener(bench) as server, contextlib.ExitStack() as stack:
        port = server.getsockname()[1]

        def connect() -> list[socket.socket]:
            return [socket.create_connection((bench.pair.addr_b, port)) for _ in range(3)]

        assert bench.teller.rules.put(to(bench, port, asks=True), 1, 2, 2**62)
        assert bench.teller.rules.put(to(bench, port, asks=True, uid=12345), 1, 2, 2**62)
        three = bench.inside(bench.pair.a, connect)
        for one in three:
            stack.enter_context(one)
        (event,) = bench.events(1)
        assert (event.kind, event.slot, event.sock.cookie) == (_abi.EVENT_MATCHED, None, cookie_of(three[0]))
        assert event.sock.pid == os.getpid()
        assert bench.teller.rules.put(to(bench, port, pid=os.getpid()), 1, 2, 2**62)
        for one in bench.inside(bench.pair.a, connect):
            stack.enter_context(one)
        assert [e.slot is not None for e in bench.events(3)] == [True] * 3
        assert not bench.teller.events()


HEIR: Final = """
import socket, sys
parent, server = (socket.socket(fileno=int(fd)) for fd in sys.argv[1:])
made = socket.socket()
socket.send_fds(parent, [b"x"], [made.fileno()])
server.settimeout(60)
accepted, _ = server.accept()
parent.sendall(accepted.getsockopt(socket.SOL_SOCKET, 57, 8))  # SO_COOKIE
parent.recv(1)
"""


def test_who_made_a_socket_counts_not_who_holds_it(bench: Bench) -> None:
    """A descriptor made by a child and passed to us, who connect it; what a child accepts on a listener of ours."""
    ours, theirs = socket.socketpair()
    ours.settimeout(60)
    with listener(bench) as server, ours, theirs:
        fds = (theirs.fileno(), server.fileno())
        argv = ["ip", "netns", "exec", bench.pair.a, sys.executable, "-c", HEIR, *map(str, fds)]
        with subprocess.Popen(argv, pass_fds=fds) as child:
            _, (fd, *_), _, _ = socket.recv_fds(ours, 1, 1)
            with socket.socket(fileno=fd) as passed:
                passed.connect(server.getsockname())
                accepted = bench.teller.find(int.from_bytes(ours.recv(8), "little"))
                given = bench.teller.find(cookie_of(passed))
                ours.sendall(b"x")
    assert given is not None
    assert given.pid == child.pid
    assert accepted is not None
    assert accepted.pid == os.getpid()


@pytest.mark.parametrize("rule", ["user", "anybody", "elsewhere"])
def test_of_a_listener_that_is_older_nobody_knows_who_made_it(netns_pair: NetnsPair, rule: str) -> None:
    """A rule that says whose it must be decides nothing; the daemon is told, and enters whose it is."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(netns_pair.call(netns_pair.b, lambda: socket.create_server(("0.0.0.0", 0))))  # noqa: S104
        classifier = stack.enter_context(call_with(DAEMON, lambda: LibbpfLoader().open_classifier(ROWS)))
        bench = Bench(classifier, stack.enter_context(call_with(DAEMON, lambda: Teller(classifier))), netns_pair)
        port, peer = server.getsockname()[1], ipaddress.ip_network(netns_pair.addr_a)
        sports = PortRange(port + 1, port + 1) if rule == "elsewhere" else PortRange(port, port)
        uid = -1 if rule == "anybody" else 12345
        assert bench.teller.rules.put(Match(None, peer, sports, PortRange(), uid=uid), 1, 2, 2**62)
        client, accepted = joined(bench, server)
        with client, accepted:
            cookie = cookie_of(accepted)
            if rule == "elsewhere":
                time.sleep(0.1)
                assert not bench.teller.events()
            else:
                (event,) = bench.events(1)
                assert (event.kind, event.sock.cookie, event.sock.uid) == (_abi.EVENT_MATCHED, cookie, -1)
                assert (event.slot is None) == (rule == "user")
            bench.teller.own(cookie, 1000)
            told = bench.teller.find(cookie)
            assert told is not None
            assert (told.pid, told.uid) == (0, 1000)
        client.close()
        accepted.close()
        deadline = time.monotonic() + 10
        while (end := bench.teller.end_of(cookie)) is None and time.monotonic() < deadline:
            time.sleep(0.001)
        assert end is not None
        assert end.sock.uid == 1000
        bench.teller.own(cookie, 1001)
        assert bench.teller.find(cookie) is None


def test_a_connection_that_a_rule_names_has_a_slot_before_it_has_sent_a_byte(bench: Bench) -> None:
    with listener(bench) as server:
        port = server.getsockname()[1]
        assert bench.teller.rules.put(to(bench, port), band=3, lanes=4, expires_ns=2**62)
        client, accepted = joined(bench, server)
        (event,) = bench.events(1)
        cookie = cookie_of(client)
        assert (event.kind, event.sock.cookie, event.active) == (_abi.EVENT_MATCHED, cookie, True)
        assert event.slot == bench.row(cookie)
        row = bench.classifier.slots[event.slot]
        assert (int(row["band"]), int(row["expires_ns"])) == (3, 2**62)
        assert 1 <= row["lane"] <= 3
        bench.teller.rules.drop(to(bench, port))
        again, accepted_again = joined(bench, server)
        time.sleep(0.02)
        assert bench.row(cookie_of(again)) is None
        for s in (client, accepted, again, accepted_again):
            s.close()


def test_the_accepting_side_is_matched_as_well(bench: Bench) -> None:
    with listener(bench) as server:
        port = server.getsockname()[1]
        rule = Match(None, ipaddress.ip_network(bench.pair.addr_a), PortRange(port, port), PortRange())
        assert bench.teller.rules.put(rule, band=2, lanes=1, expires_ns=2**62)
        client, accepted = joined(bench, server)
        (event,) = bench.events(1)
        assert (event.sock.cookie, event.active) == (cookie_of(accepted), False)
        assert bench.classifier.slots[event.slot]["lane"] == 0
        client.close()
        accepted.close()


@pytest.mark.parametrize("what", ["uid", "pid", "network", "range"])
def test_all_conditions_of_a_rule_must_hold(bench: Bench, what: str) -> None:
    with listener(bench) as server:
        port = server.getsockname()[1]
        here = ipaddress.ip_network(bench.pair.addr_b)
        others = ipaddress.ip_network("203.0.113.0/24")
        good, bad = {
            "uid": (to(bench, port, uid=os.geteuid()), to(bench, port, uid=12345)),
            "pid": (
                Match(None, None, PortRange(), PortRange(), pid=os.getpid()),
                Match(None, None, PortRange(), PortRange(), pid=1),
            ),
            "network": (
                Match(None, here.supernet(8), PortRange(), PortRange(port, port)),
                Match(None, others, PortRange(), PortRange(port, port)),
            ),
            "range": (
                Match(None, here, PortRange(), PortRange(port - 1, port + 1)),
                Match(None, here, PortRange(), PortRange(1, port - 1)),
            ),
        }[what]
        for rule, expected in ((bad, False), (good, True)):
            assert bench.teller.rules.put(rule, band=1, lanes=2, expires_ns=2**62)
            pair = joined(bench, server)
            time.sleep(0.02)
            assert (bench.row(cookie_of(pair[0])) is not None) is expected, rule
            bench.teller.rules.drop(rule)
            for s in pair:
                s.close()


def test_the_rule_that_puts_it_highest_wins(bench: Bench) -> None:
    with listener(bench) as server:
        port = server.getsockname()[1]
        bench.teller.rules.put(to(bench, port), band=5, lanes=2, expires_ns=2**62)
        bench.teller.rules.put(
            Match(None, None, PortRange(), PortRange(), pid=os.getpid()), band=2, lanes=2, expires_ns=2**62
        )
        client, accepted = joined(bench, server)
        events = bench.events(2)  # both sides are this process's
        assert {int(bench.classifier.slots[e.slot]["band"]) for e in events} == {2}
        client.close()
        accepted.close()


def test_a_tuple_hinted_before_its_connection_is_bound_to_it(bench: Bench) -> None:
    with listener(bench) as server:
        port = server.getsockname()[1]
        client = bench.inside(bench.pair.a, socket.socket)
        client.bind((bench.pair.addr_a, 0))
        src, dst = ipaddress.ip_address(bench.pair.addr_a), ipaddress.ip_address(bench.pair.addr_b)
        endpoints = Endpoints(src, client.getsockname()[1], dst, port)
        bench.classifier.tuples.add(tuple_key(endpoints), 60)
        client.connect((bench.pair.addr_b, port))
        (event,) = bench.events(1)
        assert (event.kind, event.slot, event.sock.endpoints) == (_abi.EVENT_BOUND, 60, endpoints)
        assert bench.row(cookie_of(client)) == 60
        client.close()
        server.accept()[0].close()


def test_a_clean_end_says_how_much_arrived(bench: Bench) -> None:
    with listener(bench) as server:
        bench.teller.rules.put(to(bench, server.getsockname()[1]), band=1, lanes=2, expires_ns=2**62)
        client, accepted = joined(bench, server)
        client.sendall(bytes(300_000))
        client.close()
        while accepted.recv(1 << 20):
            pass
        accepted.close()
        _, end = bench.events(2)
        assert (end.kind, end.clean) == (_abi.EVENT_CLOSED, True)
        assert end.acked == 300_002  # the SYN and the FIN count


def test_a_reset_is_no_clean_end(bench: Bench) -> None:
    with listener(bench) as server:
        bench.teller.rules.put(to(bench, server.getsockname()[1]), band=1, lanes=2, expires_ns=2**62)
        client, accepted = joined(bench, server)
        client.sendall(bytes(100))
        assert accepted.recv(1)
        reset_at_close(accepted)
        accepted.close()
        _, end = bench.events(2)
        assert (end.kind, end.clean) == (_abi.EVENT_CLOSED, False)
        client.close()


@pytest.mark.parametrize("clean", [True, False], ids=["by FINs", "by a reset"])
@pytest.mark.parametrize("opened", [True, False], ids=["opened", "accepted"])
def test_how_connections_ended_that_nobody_named_is_remembered(bench: Bench, *, clean: bool, opened: bool) -> None:
    with listener(bench) as server:
        ours, theirs = joined(bench, server)
        if not opened:
            ours, theirs = theirs, ours
        with ours, theirs:
            cookie = cookie_of(ours)
            ours.sendall(bytes(1000))
            theirs.recv(1000, socket.MSG_WAITALL)
            assert bench.teller.end_of(cookie) is None
            if clean:
                ours.shutdown(socket.SHUT_WR)
                theirs.recv(1)
                theirs.close()
            else:
                reset_at_close(ours)
        end = wait_for(lambda: bench.teller.end_of(cookie), "its end")
    assert (end.clean, end.active, end.sock.pid) == (clean, opened, os.getpid())
    assert end.acked == 1000 + opened + clean
    assert not bench.teller.events()


def test_a_socket_that_nobody_answered_has_not_ended(bench: Bench) -> None:
    with listener(bench) as server:
        port = server.getsockname()[1]
    with bench.inside(bench.pair.a, socket.socket) as s:
        with pytest.raises(ConnectionRefusedError):
            s.connect((bench.pair.addr_b, port))
        assert bench.teller.end_of(cookie_of(s)) is None


def test_without_a_free_slot_the_daemon_is_told_all_the_same(bench: Bench) -> None:
    with listener(bench) as server:
        bench.teller.rules.put(to(bench, server.getsockname()[1]), band=1, lanes=2, expires_ns=2**62)
        pairs = [joined(bench, server) for _ in range(ROWS // 2 + 3)]
        events = bench.events(len(pairs))
        assert [e.slot is None for e in events] == [False] * (ROWS // 2) + [True] * 3
        assert len({e.slot for e in events[: ROWS // 2]}) == ROWS // 2
        for pair in pairs:
            for s in pair:
                s.close()


def test_what_is_put_together_is_not_mixed_up_with_what_interrupts_it(netns_pair: NetnsPair) -> None:
    """On one processor connections are opened while packets that timers let out establish and end others."""
    rounds, at_once = 20, 150
    for namespace, device in ((netns_pair.a, netns_pair.dev_a), (netns_pair.b, netns_pair.dev_b)):
        netns_pair.run(namespace, f"tc qdisc add dev {device} root tbf rate 10mbit burst 2000 latency 2s")
    with contextlib.ExitStack() as stack:
        classifier = stack.enter_context(LibbpfLoader().open_classifier(2 * rounds * at_once))
        bench = Bench(classifier, stack.enter_context(Teller(classifier)), netns_pair)
        bench.teller.lend(range(ROWS // 2, rounds * at_once))
        server = stack.enter_context(listener(bench))
        server.listen(2 * at_once)
        server.settimeout(60)
        assert bench.teller.rules.put(to(bench, server.getsockname()[1]), band=3, lanes=4, expires_ns=2**62)

        def connect() -> list[socket.socket]:
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # of this thread
            opened = [socket.socket() for _ in range(at_once)]
            for s in opened:
                s.setblocking(False)
                assert s.connect_ex(server.getsockname()) == errno.EINPROGRESS
            return opened

        for _ in range(rounds):
            opened = bench.inside(bench.pair.a, connect)
            accepted = [server.accept()[0] for _ in opened]
            rows = {cookie_of(s): bench.row(cookie_of(s)) for s in opened}
            heard: list[Event] = []
            while bench.teller.waiting:
                heard += bench.teller.events()
            told = {e.sock.cookie: e.slot for e in heard if e.kind == _abi.EVENT_MATCHED}
            for s in (*opened, *accepted):
                s.close()
            assert None not in rows.values()
            assert told == rows


def test_more_rules_for_a_peer_than_the_kernel_looks_at(bench: Bench) -> None:
    """Then every connection to it is reported, and the daemon matches."""
    with listener(bench) as server:
        port = server.getsockname()[1]
        for i in range(_abi.RULES_PER_PEER + 1):
            assert bench.teller.rules.put(to(bench, i + 1), band=1, lanes=2, expires_ns=2**62)
        client, accepted = joined(bench, server)
        (event,) = bench.events(1)
        assert (event.kind, event.slot) == (_abi.EVENT_MATCHED, None)
        bench.teller.rules.drop(to(bench, 1))
        again, accepted_again = joined(bench, server)
        time.sleep(0.02)
        assert not bench.teller.events()
        assert port > _abi.RULES_PER_PEER
        for s in (client, accepted, again, accepted_again):
            s.close()


def test_ipv6_and_ipv4_on_an_ipv6_socket(bench: Bench) -> None:
    with listener(bench, socket.AF_INET6) as server:
        server_port = server.getsockname()[1]
        bench.teller.rules.put(to(bench, server_port), band=1, lanes=2, expires_ns=2**62)

        def connect() -> socket.socket:
            s = socket.socket(socket.AF_INET6)
            s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            s.connect((f"::ffff:{bench.pair.addr_b}", server_port))
            return s

        client = bench.inside(bench.pair.a, connect)
        (event,) = bench.events(1)
        assert str(event.sock.endpoints.dst) == bench.pair.addr_b
        assert event.sock.cookie == cookie_of(client)
        client.close()
        server.accept()[0].close()


def test_the_directory_as_a_whole(bench: Bench) -> None:
    with listener(bench) as server:
        pairs = [joined(bench, server) for _ in range(300)]
        cookies, rows = bench.teller.all()
        known = dict(zip(cookies.tolist(), bench.teller.told(cookies, rows), strict=True))
        for client, accepted in pairs:
            assert known[cookie_of(client)].endpoints.dport == server.getsockname()[1]
            client.close()
            accepted.close()


def test_older_connections_can_be_entered(bench: Bench) -> None:
    e = Endpoints(ipaddress.ip_address("10.0.0.1"), 1234, ipaddress.ip_address("fd00::1"), 80)
    bench.teller.add(2**60 + 1, e, 1000)
    told = bench.teller.find(2**60 + 1)
    assert told is not None
    assert (told.endpoints, told.pid, told.uid, told.netns) == (e, 0, 1000, bench.teller.netns)


def test_the_links_go_with_the_process(netns_pair: NetnsPair) -> None:
    code = """
import sys, time
from mfsd.datapath.bpf.libbpf import LibbpfLoader
from mfsd.datapath.bpf.teller import Teller
teller = Teller(LibbpfLoader().open_classifier(64))
print("attached", flush=True)
time.sleep(60)
"""
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "attached\n"
    shown = subprocess.run(["bpftool", "cgroup", "tree"], check=False, capture_output=True, text=True).stdout
    assert "mfsd_connection" in shown
    owner.kill()
    owner.communicate()
    time.sleep(0.1)
    shown = subprocess.run(["bpftool", "cgroup", "tree"], check=False, capture_output=True, text=True).stdout
    assert "mfsd_connection" not in shown
    del netns_pair


def test_where_the_stream_stands_is_in_the_slot(bench: Bench) -> None:
    """The classifier is not attached here, so the slot stays as the kernel has made it."""
    with listener(bench) as server:
        bench.teller.rules.put(to(bench, server.getsockname()[1]), band=1, lanes=2, expires_ns=2**62)
        client, accepted = joined(bench, server)
        (event,) = bench.events(1)
        row = bench.classifier.slots[event.slot]
        assert [int(row[n]) for n in ("bytes", "packets", "last_ns", "acked", "sent", "ifindex")] == [0] * 6
        assert np.all(bench.classifier.slots["expires_ns"][ROWS // 2 :] == 0)
        client.close()
        accepted.close()
