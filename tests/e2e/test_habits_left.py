# SPDX-License-Identifier: Apache-2.0
"""Workers that end with reads unfinished, connections named in two ways, and other things left to be guessed."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest
from support.habits import KB, MB, PORT, WRONG, Grown, counted, dial, settled, transfers, worker
from support.rig import Daemon, running
from support.waiting import wait_for

from mfsd.client import Client, Stage, tuple_of

if TYPE_CHECKING:
    from pathlib import Path

    from support.habits import Sink
    from support.namespaces import NetnsPair

    from mfsd.client.selectors import Connection

pytestmark = pytest.mark.netns

READS = """
client = Client(target=target, session="w", on_rejected=lambda r: say("rejected", r))
with dial() as s:
    named = s if arguments[0] == "socket" else tuple_of(host, port)
    for name, size in (("large", 1_800_000), ("small", 200_000)):
        client.request(name, ttft_left_s=600)
        client.transfer(name, named, size, stage=Stage.P2D, request=name, interleaved=True)
    flushed = client.flush(20)
    s.sendall(bytes(int(arguments[1])))
    say(flushed)
    hear()
"""


@pytest.mark.parametrize("by", ["socket", "addresses"])
def test_workers_that_are_killed_in_the_middle_of_two_reads(daemon: Daemon, sink: Sink, by: str) -> None:
    """The bytes of both went in turns."""
    before = (0, 0, 0)
    for sent, ended in ((200 * KB, (0, 0, 2)), (MB, (1, 1, 1)), (1900 * KB, (2, 2, 0))):
        with worker(daemon, READS, by, str(sent)) as w:
            assert w.hear() == ["True"]
            w.kill()
            before = before[0] + ended[0], before[1] + ended[1], before[2] + ended[2]
            settled(daemon, before)
    sink.gets(3100 * KB)


@pytest.mark.parametrize("other", ["exact", "range"])
def test_one_connection_by_its_socket_and_by_addresses(daemon: Daemon, client: Client, sink: Sink, other: str) -> None:
    with dial(daemon.pair) as s:
        grown = Grown(daemon)
        addresses = (
            tuple_of(*s.getpeername(), *s.getsockname()) if other == "exact" else tuple_of(daemon.pair.addr_b, PORT)
        )
        ways: list[Connection] = [s, addresses, addresses, s]
        for i, named in enumerate(ways):
            client.transfer(f"t{i}", named, MB, stage=Stage.P2D, request="r")
            assert client.flush(5)
        for i in range(4):
            s.sendall(bytes(MB // 2))
            wait_for(lambda i=i: sink.received == MB * (i + 1) - MB // 2, "arrival")  # type: ignore[misc]
            assert sorted(transfers(daemon)) == [f"t{k}" for k in range(i, 4)]
            s.sendall(bytes(MB // 2))
            settled(daemon, (i + 1, 0, 0))
        assert grown.wrong(4 * MB) <= WRONG
    client.done(request="r")
    settled(daemon, (4, 1, 0))


@pytest.mark.parametrize("said", ["done", "cancelled"])
def test_a_daemon_that_is_killed_between_two_that_were_announced_together(
    netns_pair: NetnsPair, sink: Sink, tmp_path: Path, said: str
) -> None:
    """The first one's bytes are not the second one's."""
    with running(Daemon(netns_pair, tmp_path)) as daemon, daemon.client() as client, dial(netns_pair) as s:
        assert client.flush(20)
        for i in range(3):
            client.request(f"q{i}", ttft_left_s=600)
            client.transfer(f"t{i}", s, MB, stage=Stage.P2D, request=f"q{i}")
        assert client.flush(5)
        s.sendall(bytes(MB if said == "done" else MB // 2))
        if said == "done":
            client.done(request="q0")
        else:
            client.cancel(request="q0")
        assert client.flush(5)
        daemon.end(signal.SIGKILL)
        daemon.start()
        wait_for(lambda: len(transfers(daemon)) == 2, "them to be announced again")
        s.sendall(bytes(MB // 2))
        wait_for(lambda: transfers(daemon).get("t1") == MB // 2, "half of it to have gone")
        assert counted(daemon) == (0, 0, 0)
        s.sendall(bytes(MB + MB // 2))
        for i in (1, 2):
            client.done(request=f"q{i}")
        settled(daemon, (2, 2, 0))
    sink.gets(3 * MB if said == "done" else 5 * MB // 2)


def test_done_of_half_of_it_and_closed_at_once(daemon: Daemon, client: Client, sink: Sink) -> None:
    """A size that was an upper bound."""
    for i in range(20):
        with dial(daemon.pair) as s:
            client.request(f"q{i}", ttft_left_s=60)
            client.transfer(f"t{i}", s, 200 * KB, stage=Stage.P2D, request=f"q{i}")
            if i % 2:
                assert client.flush(5)
            s.sendall(bytes(100 * KB))
            client.done(request=f"q{i}")
    settled(daemon, (20, 20, 0))
    sink.gets(20 * 100 * KB)


def test_one_of_two_is_taken_back_and_the_connection_is_closed_at_once(
    daemon: Daemon, client: Client, sink: Sink
) -> None:
    for i in range(20):
        with dial(daemon.pair) as s:
            for name in ("a", "b"):
                client.request(f"{name}{i}", ttft_left_s=60)
                client.transfer(f"{name}{i}", s, 100 * KB, stage=Stage.P2D, request=f"{name}{i}")
            if i % 2:
                assert client.flush(5)
            client.cancel(request=f"a{i}")
            s.sendall(bytes(100 * KB))
            client.done(request=f"b{i}")
    settled(daemon, (20, 20, 0))
    sink.gets(20 * 100 * KB)


@pytest.mark.parametrize("said", ["cancelled", "done"])
@pytest.mark.parametrize("heard", [0, 1, 2])
def test_the_rest_of_what_is_said_of_a_connection_is_heard_when_it_is_over(
    daemon: Daemon, client: Client, sink: Sink, heard: int, said: str
) -> None:
    """The bytes of one transfer, which is the second one if the first is taken back before."""
    for i in range(3):
        with dial(daemon.pair) as s:
            names = [f"a{i}", f"b{i}"]
            for name in names[:heard]:
                client.request(name, ttft_left_s=60)
                client.transfer(name, s, 100 * KB, stage=Stage.P2D, request=name)
            assert client.flush(5)
            with daemon.held_up():
                for name in names[heard:]:
                    client.request(name, ttft_left_s=60)
                    client.transfer(name, s, 100 * KB, stage=Stage.P2D, request=name)
                if said == "cancelled":
                    client.cancel(request=names.pop(0))
                s.sendall(bytes(100 * KB))
                client.done(request=names[0])
                s.close()
                wait_for(lambda i=i: sink.received == 100 * KB * (i + 1), "arrival")  # type: ignore[misc]
            assert client.flush(5)
    wait_for(lambda: not transfers(daemon), "all to be settled")
    assert counted(daemon) == (3, 3, 0)


def test_two_processes_share_a_connection_and_one_of_them_ends(daemon: Daemon, client: Client, sink: Sink) -> None:
    body = """
with socket.socket(fileno=int(arguments[0])) as s, Client(target=target) as client:
    client.request("r", ttft_left_s=600)
    client.transfer("t", s, 500_000, stage=Stage.P2D, request="r")
    say(client.flush(20))
    hear()
    s.sendall(bytes(500_000))
    client.done(request="r")
    say(client.flush(5))
    s.detach()
"""
    with dial(daemon.pair) as s:
        s.settimeout(None)
        grown = Grown(daemon)
        with worker(daemon, body, str(s.fileno()), fds=(s.fileno(),)) as w:
            assert w.hear() == ["True"]
            w.say()
            assert w.hear() == ["True"]
            settled(daemon, (1, 1, 0))
            w.result()
        for i in range(3):
            client.request(f"q{i}", ttft_left_s=600)
            client.transfer(f"t{i}", s, 500 * KB, stage=Stage.P2D, request=f"q{i}")
            assert client.flush(5)  # the place that the connection had may have gone with the session that ended
            s.sendall(bytes(500 * KB))
            client.done(request=f"q{i}")
        settled(daemon, (4, 4, 0))
        assert grown.wrong(2 * MB) <= WRONG
    sink.gets(2 * MB)
