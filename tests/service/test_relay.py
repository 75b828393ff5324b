# SPDX-License-Identifier: Apache-2.0
"""Hints that cross hosts, between daemons of this process: 127.0.0.2 sends, 127.0.0.1 waits."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from support.relays import SENDER, WAITER, Hosts, connection, from_sender, transfers
from support.waiting import WAIT_S, wait_for

from mfsd.client import Client, Event, EventKind, Stage, cookie_of, tuple_of
from mfsd.client.introduction import introduced
from mfsd.daemon.config import ConfigError, parse
from mfsd.lab.hosts.certificates import Authority, Papers
from mfsd.relay.table import KEPT_S, Table
from mfsd.v1 import hints_pb2 as pb
from mfsd.v1 import hints_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


pytestmark = pytest.mark.daemon

MB = 1_000_000
PORT = 5731


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def papers(authority: Authority) -> Papers:
    return authority.papers("sender.test", SENDER)


@pytest.fixture(scope="module")
def own(authority: Authority) -> Papers:
    return authority.papers("waiter.test", WAITER)


@pytest.fixture
def hosts(tmp_path: Path, papers: Papers, own: Papers) -> Iterator[Hosts]:
    made = Hosts(tmp_path, papers, own)
    yield made
    made.stop()


def test_a_hint_of_who_waits_reaches_the_daemon_of_who_sends(hosts: Hosts) -> None:
    with connection() as (sends, _), Client(target=hosts.waiter.target) as client:
        client.request("r", ttft_left_s=5.0)
        client.transfer("r/kv", from_sender(sends), MB, stage=Stage.P2D, request="r")
        assert client.flush(WAIT_S)
        (left,) = wait_for(lambda: transfers(hosts.sender)).values()
        assert 4.0 < left < 5.0
        assert not transfers(hosts.waiter)
        cookie = cookie_of(sends)
        wait_for(lambda: hosts.sender.ask(lambda e: cookie in e.connections.by_cookie))
        client.request("r", ttft_left_s=50.0)  # a correction follows
        wait_for(lambda: next(iter(transfers(hosts.sender).values())) > 10)
        client.done(transfer="r/kv")
        client.done(request="r")
        wait_for(lambda: not transfers(hosts.sender) or sends.send(bytes(MB)))


def test_a_peer_that_takes_few_hints_at_a_time_gets_all_of_them(
    tmp_path: Path, papers: Papers, own: Papers, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = Hosts.start_sender
    monkeypatch.setattr(Hosts, "start_sender", lambda self: start(self, limits={"max_hints_per_batch": 4}))
    hosts = Hosts(tmp_path, papers, own)
    try:
        with connection() as (sends, _), Client(target=hosts.waiter.target) as client:
            client.request("r", ttft_left_s=50.0)
            for n in range(20):
                client.transfer(f"t{n}", from_sender(sends), MB, stage=Stage.P2D, request="r")
            assert client.flush(WAIT_S)
            wait_for(lambda: len(transfers(hosts.sender)) == 20)
    finally:
        hosts.stop()


def test_columns_are_handed_on_too(hosts: Hosts) -> None:
    with connection() as (sends, waits), Client(target=hosts.waiter.target) as client:
        client.request("r", ttft_left_s=5.0)
        assert client.flush(WAIT_S)
        for n in range(20):
            where = from_sender(sends) if n % 2 else waits
            client.transfer(f"t{n}", where, MB, stage=Stage.P2D, request="r")
        assert client.flush(WAIT_S)
        wait_for(lambda: len(transfers(hosts.sender)) == 10)
        assert sorted(transfers(hosts.waiter)) == sorted(f"t{n}" for n in range(0, 20, 2))


def test_what_the_sender_knows_comes_back(hosts: Hosts) -> None:
    events: list[Event] = []
    with connection() as (sends, _), Client(target=hosts.waiter.target, on_event=events.append) as client:
        client.request("r", ttft_left_s=0.3, ttl_s=0.1)
        client.transfer("r/kv", from_sender(sends), MB, stage=Stage.P2D, request="r", ttl_s=0.1)
        wait_for(lambda: any(e.kind is EventKind.EXPIRED for e in events))
        (event,) = [e for e in events if e.kind is EventKind.EXPIRED]
        assert (event.request_id, event.transfer_id) == ("r", "r/kv")


def test_a_session_that_ends_takes_back_what_it_said_elsewhere(hosts: Hosts) -> None:
    with connection() as (sends, _):
        with Client(target=hosts.waiter.target) as client:
            client.request("r", ttft_left_s=60.0)
            client.transfer("r/kv", from_sender(sends), MB, stage=Stage.P2D, request="r")
            client.mark(tuple_of(WAITER, 0, SENDER, 1), Stage.COLLECTIVE)
            wait_for(lambda: transfers(hosts.sender))
        wait_for(lambda: not transfers(hosts.sender))
        marks = lambda e: [m for s in e.books.sessions.values() for m in s.marks if s.name.startswith("relay:")]  # noqa: E731
        wait_for(lambda: not hosts.sender.ask(marks))


def test_what_is_late_is_not_handed_on(hosts: Hosts) -> None:
    with connection() as (sends, _), Client(target=hosts.waiter.target) as client:
        client.request("late", ttft_left_s=-1.0)
        client.request("soon", ttft_left_s=60.0)
        client.transfer("late/kv", from_sender(sends), MB, stage=Stage.P2D, request="late")
        client.transfer("soon/kv", from_sender(sends), MB, stage=Stage.P2D, request="soon")
        assert client.flush(WAIT_S)
        (name,) = wait_for(lambda: transfers(hosts.sender))
        assert name.endswith("soon/kv")
        assert client.stats.rejected == 0


def test_a_sender_that_restarts_hears_again_what_is_alive(hosts: Hosts) -> None:
    with connection() as (sends, _), Client(target=hosts.waiter.target) as client:
        client.request("r", ttft_left_s=60.0)
        client.transfer("r/kv", from_sender(sends), MB, stage=Stage.P2D, request="r")
        wait_for(lambda: transfers(hosts.sender))
        hosts.sender.stop()
        client.transfer("r/more", from_sender(sends), MB, stage=Stage.P2D, request="r")
        assert client.flush(WAIT_S)  # the worker does not notice
        wait_for(lambda: any("no connection to" in n for n in hosts.waiter.daemon.notices()))
        hosts.sender = hosts.start_sender()
        wait_for(lambda: len(transfers(hosts.sender)) == 2)
        wait_for(lambda: not any("no connection to" in n for n in hosts.waiter.daemon.notices()))


def test_a_peer_that_was_gone_hears_again_of_marks_and_requests(hosts: Hosts) -> None:
    """Its name did not lead to it for a while; the link that comes after knows nothing of what the one before said."""
    marks = lambda e: [m for s in e.books.sessions.values() for m in s.marks if s.name.startswith("relay:")]  # noqa: E731
    with connection() as (sends, _), Client(target=hosts.waiter.target) as client:
        client.request("r", ttft_left_s=60.0)
        client.transfer("r/kv", from_sender(sends), MB, stage=Stage.P2D, request="r")
        client.mark(tuple_of(WAITER, 0, SENDER, 1), Stage.COLLECTIVE)
        wait_for(lambda: transfers(hosts.sender) and hosts.sender.ask(marks))

        def look_after(engine: Any, *, table: Table) -> Table:
            before: Table = engine.elsewhere.table
            for link in engine.elsewhere.look_after(table):
                link.close(0.0)
            return before

        known = hosts.waiter.ask(partial(look_after, table=Table(())))
        wait_for(lambda: not transfers(hosts.sender) and not hosts.sender.ask(marks))  # it has gone for good
        hosts.waiter.ask(partial(look_after, table=known))
        wait_for(lambda: hosts.sender.ask(marks))
        client.done(transfer="r/kv")
        client.transfer("r/more", from_sender(sends), MB, stage=Stage.P2D, request="r")
        (name,) = wait_for(lambda: transfers(hosts.sender))
        assert name.endswith("r/more")


def test_who_is_not_named_any_more_counts_for_a_while() -> None:
    """As a pod that has been told to end, and still sends; ``localhost`` is always somebody, the others never were."""
    table = Table((f"localhost:{PORT} 10.9.0.0/24",)).look_up(0.0)
    (here,) = [p for p in table.peers.values() if p.address.version == 4]
    pod = replace(here, address=ip_address("127.0.0.9"))
    table.peers[pod.address], table.named[pod] = pod, 0.0
    table.networks.append((ip_network("10.9.1.0/24"), pod))
    soon = table.look_up(KEPT_S - 1)
    assert (soon.of(pod.address), soon.of(ip_address("10.9.1.1"))) == (pod, pod)
    assert soon.look_up(KEPT_S + 1, {pod}).of(pod.address) == pod  # it is still there
    late = soon.look_up(KEPT_S + 1)
    assert (late.of(pod.address), late.of(ip_address("10.9.1.1"))) == (None, None)
    assert here in late.peers.values()


def test_advice_of_the_way_from_another_host(hosts: Hosts) -> None:
    with Client(target=hosts.waiter.target) as client:
        for _ in range(10):
            assert client.advice(WAITER, source=SENDER) is None  # a daemon without devices knows nothing
            time.sleep(0.02)
    wrong = pb.AdviseRequest(paths=[pb.Path(dst="10.0.0.1"), pb.Path(dst="x")])
    with introduced(hosts.waiter.target) as channel, pytest.raises(grpc.RpcError) as e:
        hints_pb2_grpc.HintsStub(channel).Advise(wrong)
    assert "paths[1].dst" in str(e.value)
    assert code(lambda: stub(hosts.waiter.target).Advise(wrong)) is grpc.StatusCode.UNAUTHENTICATED


# --- who may ----------------------------------------------------------------------------------------------------------


def stub(target: str, credentials: grpc.ChannelCredentials | None = None, **options: Any) -> hints_pb2_grpc.HintsStub:
    channel = (
        grpc.insecure_channel(target)
        if credentials is None
        else grpc.secure_channel(target, credentials, list(options.items()))
    )
    return hints_pb2_grpc.HintsStub(channel)


def credentials(papers: Papers | None, ca: Path) -> grpc.ChannelCredentials:
    if papers is None:
        return grpc.ssl_channel_credentials(ca.read_bytes())
    return grpc.ssl_channel_credentials(ca.read_bytes(), papers.key.read_bytes(), papers.cert.read_bytes())


def send(hosts: Hosts, papers: Papers | None, *hints: pb.Hint) -> pb.HintReply:
    said = stub(f"{SENDER}:{hosts.port}", credentials(papers, hosts.papers.ca))
    return said.Send(pb.HintBatch(session="s", seq=1, hints=hints), timeout=WAIT_S)


def code(call: Callable[[], Any]) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as e:
        call()
    return e.value.code()


def transfer(dst: str, src: str = SENDER) -> pb.Hint:
    selector = pb.Selector(tuple=pb.Tuple(src_addr=src, dst_addr=dst))
    return pb.Hint(transfer=pb.Transfer(id="t", stage=pb.STAGE_BACKGROUND, bytes=1, selector=selector))


def test_only_who_is_on_the_list_is_heard(hosts: Hosts, authority: Authority, tmp_path: Path) -> None:
    request = pb.Hint(request=pb.Request(id="r", ttft_left_us=1_000_000))
    assert send(hosts, hosts.own, request).accepted == 1
    stranger = authority.papers("stranger.test")
    assert code(lambda: send(hosts, stranger, request)) is grpc.StatusCode.PERMISSION_DENIED
    forged = Authority(tmp_path / "other").papers("waiter.test", WAITER)
    assert code(lambda: send(hosts, None, request)) is grpc.StatusCode.UNAVAILABLE  # TLS refuses
    assert code(lambda: send(hosts, forged, request)) is grpc.StatusCode.UNAVAILABLE
    plain = stub(f"{SENDER}:{hosts.port}")
    assert code(lambda: plain.Send(pb.HintBatch(session="s"), timeout=5)) is grpc.StatusCode.UNAVAILABLE


def test_a_peer_speaks_of_its_own_bytes_only(hosts: Hosts) -> None:
    reply = send(hosts, hosts.own, transfer("127.0.0.3"), transfer(WAITER))
    assert reply.accepted == 1
    assert "127.0.0.3 is not 127.0.0.1, which says so" in reply.rejected[0].status.message
    cookie = pb.Hint(connection=pb.ConnectionMark(selector=pb.Selector(cookie=7), stage=pb.STAGE_COLLECTIVE))
    batch = pb.Hint(batch=pb.Batch(id="b"))
    reply = send(hosts, hosts.own, cookie, batch)
    assert [r.status.message.partition(":")[0] for r in reply.rejected] == ["connection.selector", "hint"]


def test_a_server_that_is_not_who_it_should_be_gets_no_hints(tmp_path: Path, authority: Authority, own: Papers) -> None:
    impostor = authority.papers("impostor.test", "127.0.0.9")  # right authority, wrong host
    hosts = Hosts(tmp_path, impostor, own)
    try:
        with connection() as (sends, _), Client(target=hosts.waiter.target) as client:
            client.request("r", ttft_left_s=60.0)
            client.transfer("r/kv", from_sender(sends), MB, stage=Stage.P2D, request="r")
            assert client.flush(WAIT_S)
            wait_for(lambda: any("no connection to" in n for n in hosts.waiter.daemon.notices()))
            time.sleep(0.3)
            assert not transfers(hosts.sender)
    finally:
        hosts.stop()


@pytest.fixture
def renewable(tmp_path: Path) -> Iterator[tuple[Hosts, Callable[[Papers, str], Papers]]]:
    """Hosts with papers of their own, and what puts others, of another authority, in the place of some of these."""
    before, after = Authority(tmp_path / "before"), Authority(tmp_path / "after")
    folder = tmp_path / "hosts"
    folder.mkdir()

    def renew(old: Papers, name: str) -> Papers:
        new = after.papers(name, SENDER, WAITER)
        for file in ("ca", "key", "cert"):  # not at once: for a while they don't belong together
            getattr(old, file).write_bytes(getattr(new, file).read_bytes())
        return new

    made = []
    for name, address in (("sender.test", SENDER), ("waiter.test", WAITER)):
        papers = before.papers(name, address)
        ca = folder / f"{name}.ca"  # each host has a file of its own
        ca.write_bytes(papers.ca.read_bytes())
        made.append(replace(papers, ca=ca))
    hosts = Hosts(folder, *made)
    yield hosts, renew
    hosts.stop()


def test_who_waits_shows_and_believes_what_its_files_say_when_it_connects(
    renewable: tuple[Hosts, Callable[[Papers, str], Papers]],
) -> None:
    """As when all certificates are renewed under an authority of their own, and the sender's daemon starts again."""
    hosts, renew = renewable
    with connection() as (sends, _), Client(target=hosts.waiter.target) as client:
        client.request("r", ttft_left_s=60.0)
        client.transfer("before", from_sender(sends), MB, stage=Stage.P2D, request="r")
        wait_for(lambda: len(transfers(hosts.sender)) == 1)
        hosts.sender.stop()
        renew(hosts.papers, "sender.test")
        hosts.sender = hosts.start_sender()
        wait_for(lambda: any("no connection to" in n for n in hosts.waiter.daemon.notices()))
        renew(hosts.own, "waiter.test")
        client.transfer("after", from_sender(sends), MB, stage=Stage.P2D, request="r")
        wait_for(lambda: len(transfers(hosts.sender)) == 2)


def test_who_sends_shows_and_believes_what_its_files_say_when_somebody_connects(
    renewable: tuple[Hosts, Callable[[Papers, str], Papers]],
) -> None:
    hosts, renew = renewable
    request = pb.Hint(request=pb.Request(id="r", ttft_left_us=1_000_000))
    old = replace(hosts.papers, ca=hosts.folder / "old.ca")
    old.ca.write_bytes(hosts.papers.ca.read_bytes())
    certificate = hosts.papers.cert.read_bytes()
    hosts.papers.cert.write_bytes(b"no certificate")
    assert send(hosts, hosts.own, request).accepted == 1  # that of before stays in use
    hosts.papers.cert.write_bytes(certificate)
    theirs = replace(renew(hosts.own, "waiter.test"), ca=hosts.own.ca)
    assert code(lambda: send(hosts, theirs, request)) is grpc.StatusCode.UNAVAILABLE
    renew(hosts.papers, "sender.test")
    assert send(hosts, theirs, request).accepted == 1


def test_the_configuration_says_what_is_missing() -> None:
    with pytest.raises(ConfigError) as e:
        parse({"relay": {"listen": "x", "peers": ["a:1 b", "c"]}})
    found = e.value.problems
    assert found == [
        "relay.cert = (unset): required with relay.listen and relay.peers; must be an absolute path",
        "relay.key = (unset): required with relay.listen and relay.peers; must be an absolute path",
        "relay.ca = (unset): required with relay.listen and relay.peers; must be an absolute path",
        'relay.listen = "x": must be "host:port"',
        "relay.allow = []: nobody could bring hints; name those who may, or leave out relay.listen",
        'relay.peers[0] = "a:1 b": must be "host:port" or "host:port network ..."',
        'relay.peers[1] = "c": must be "host:port" or "host:port network ..."',
    ]
