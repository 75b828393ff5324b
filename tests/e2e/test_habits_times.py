# SPDX-License-Identifier: Apache-2.0
"""Daemons that are held up, reloaded or gone; workers that come again; requests that run out of time."""

from __future__ import annotations

import signal
import socket
import struct
import threading
import time
from typing import TYPE_CHECKING

import pytest
from support.habits import (
    KB,
    MB,
    PORT,
    WRONG,
    Grown,
    dial,
    settled,
    transfers,
    worker,
)
from support.rig import Daemon, running
from support.waiting import wait_for

from mfsd.client import Client, Event, EventKind, Stage, tuple_of

if TYPE_CHECKING:
    from pathlib import Path

    from support.habits import Sink
    from support.namespaces import NetnsPair

pytestmark = pytest.mark.netns

UDP_SEGMENT = 103


def test_met_while_the_daemon_gets_no_processor(daemon: Daemon, client: Client, sink: Sink) -> None:
    """On kept connections, and on one for each transfer, which are hinted meanwhile."""
    kept = [dial(daemon.pair) for _ in range(4)]
    for i in range(10):
        client.request(f"k{i}", ttft_left_s=1.5)
        client.transfer(f"k{i}", kept[i % 4], 100 * KB, stage=Stage.P2D, request=f"k{i}")
    assert client.flush(5)
    with daemon.held_up():
        for i in range(10):
            kept[i % 4].sendall(bytes(100 * KB))
            client.done(request=f"k{i}")
        for i in range(10):
            with dial(daemon.pair) as s:
                client.request(f"n{i}", ttft_left_s=1.5)
                client.transfer(f"n{i}", s, 100 * KB, stage=Stage.P2D, request=f"n{i}")
                s.sendall(bytes(100 * KB))
            client.done(request=f"n{i}")
        wait_for(lambda: sink.received == 2 * MB, "arrival")
        time.sleep(2)
    settled(daemon, (20, 20, 0))
    for s in kept:
        s.close()


def test_missed_while_the_daemon_gets_no_processor(daemon: Daemon, client: Client, sink: Sink) -> None:
    kept = [dial(daemon.pair) for _ in range(4)]
    for i in range(8):
        client.request(f"k{i}", ttft_left_s=1)
        client.transfer(f"k{i}", kept[i % 4], 100 * KB, stage=Stage.P2D, request=f"k{i}")
    assert client.flush(5)
    with daemon.held_up():
        time.sleep(1.5)
        for i in range(8):
            kept[i % 4].sendall(bytes(100 * KB))
            client.done(request=f"k{i}")
        wait_for(lambda: sink.received == 800 * KB, "arrival")
        time.sleep(0.5)
    settled(daemon, (8, 0, 8))
    for s in kept:
        s.close()


def test_reloads_in_the_middle(daemon: Daemon, client: Client, sink: Sink) -> None:
    """Another policy, and back, by SIGHUP."""
    grown, over = Grown(daemon), threading.Event()

    def reload() -> None:
        n = 0
        while not over.wait(0.3):
            daemon.write_config(policy='name = "demand-bound"' if n % 2 else 'name = "deadline-ladder"')
            daemon.send_signal(signal.SIGHUP)
            n += 1

    other = threading.Thread(target=reload)
    other.start()
    try:
        with dial(daemon.pair) as s:
            for i in range(60):
                client.request(f"q{i}", ttft_left_s=60)
                client.transfer(f"t{i}", s, 500 * KB, stage=Stage.P2D, request=f"q{i}")
                assert i or client.flush(5)
                s.sendall(bytes(500 * KB))
                client.done(request=f"q{i}")
            settled(daemon, (60, 60, 0))
    finally:
        over.set()
        other.join()
    assert grown.wrong(30 * MB) <= WRONG
    assert not transfers(daemon)
    sink.gets(30 * MB)


RESTARTED = """
client = Client(target=target, session="w", on_rejected=lambda r: say("rejected", r))
with dial() as s:
    client.request("r", ttft_left_s=600)
    client.transfer("t", s, 1_000_000, stage=Stage.P2D, request="r")
    flushed = client.flush(20)
    s.sendall(bytes(1_000_000 if arguments[0] == "whole" else 500_000))
    if arguments[0] == "whole":
        client.done(request="r")
        flushed = flushed and client.flush(5)
    say(flushed)
    hear()
"""


def test_a_worker_that_is_killed_and_comes_again_by_the_same_names(daemon: Daemon, sink: Sink) -> None:
    for i in range(6):
        with worker(daemon, RESTARTED, "half" if i % 2 else "whole") as w:
            assert w.hear() == ["True"]
            w.kill()
    settled(daemon, (3, 3, 3))
    wait_for(lambda: not daemon.connections(), "the connections to be forgotten")
    sink.gets(4_500_000)


EXECS = """
if arguments[0] == "first":
    client = Client(target=target, session="w")
    s = dial()
    s.set_inheritable(True)
    client.request("r", ttft_left_s=600)
    client.transfer("t", s, 400_000, stage=Stage.P2D, request="r")
    say(client.flush(20))
    s.sendall(bytes(400_000))
    os.execv(sys.executable, [sys.executable, "-c", sys.orig_argv[2], *sys.argv[1:4], "second", str(s.fileno())])
with socket.socket(fileno=int(arguments[1])) as s:
    client = Client(target=target, session="w", on_rejected=lambda r: say("rejected", r))
    client.request("r", ttft_left_s=600)
    client.transfer("t", s, 600_000, stage=Stage.P2D, request="r")
    say(client.flush(20))
    s.sendall(bytes(600_000))
    client.done(request="r")
    say(client.flush(5))
    hear()
"""


def test_a_process_that_executes_another_program_with_its_socket(daemon: Daemon, sink: Sink) -> None:
    """The same pid and name of a session, another client; each's bytes are its own."""
    grown = Grown(daemon)
    with worker(daemon, EXECS, "first") as w:
        assert [w.hear() for _ in range(3)] == [["True"]] * 3
        settled(daemon, (2, 2, 0))
    assert grown.wrong(MB) <= WRONG
    sink.gets(MB)
    wait_for(lambda: not daemon.connections(), "the connection to be forgotten")


def test_a_worker_that_ends_while_there_is_no_daemon(netns_pair: NetnsPair, sink: Sink, tmp_path: Path) -> None:
    daemon = Daemon(netns_pair, tmp_path)
    with worker(daemon, RESTARTED.replace("20)", "1)"), "half") as w:
        assert w.hear() == ["False"]
        w.kill()
        with running(daemon):
            with worker(daemon, RESTARTED, "whole") as again:
                assert again.hear() == ["True"]
            settled(daemon, (1, 1, 0))
    sink.gets(1_500_000)


def test_a_request_that_expires_with_half_of_it_sent(
    daemon: Daemon, client: Client, sink: Sink, events: list[Event]
) -> None:
    with dial(daemon.pair) as s:
        client.request("q", ttft_left_s=0.3, ttl_s=0.5)
        client.transfer("t", s, MB, stage=Stage.P2D, request="q", ttl_s=0.5)
        assert client.flush(5)
        s.sendall(bytes(MB // 2))
        settled(daemon, (0, 0, 1))
        wait_for(lambda: [e.transfer_id for e in events if e.kind is EventKind.EXPIRED] == ["t"], "the word")
        s.sendall(bytes(MB // 2))
        client.done(request="q")
        client.transfer("u", s, MB, stage=Stage.P2D, request="r")
        assert client.flush(5)
        s.sendall(bytes(MB))
        settled(daemon, (1, 0, 1))
        client.done(request="r")
        settled(daemon, (1, 1, 1))
    sink.gets(2 * MB)


def test_pipelined_requests_of_which_some_are_taken_back(daemon: Daemon, client: Client, sink: Sink) -> None:
    """Five are announced ahead; the second and the last are cancelled before a byte of theirs is written."""
    with dial(daemon.pair) as s:
        for i in range(5):
            client.request(f"q{i}", ttft_left_s=60)
            client.transfer(f"t{i}", s, 300 * KB, stage=Stage.P2D, request=f"q{i}")
        s.sendall(bytes(300 * KB))
        with daemon.held_up():
            client.cancel(request="q1")
            client.cancel(request="q4")
            s.sendall(bytes(600 * KB))
            wait_for(lambda: sink.received == 900 * KB, "arrival")
        # One that was taken for arrived before that was heard is counted until what came in its place is.
        wait_for(lambda: not transfers(daemon), "all that was written")
        settled(daemon, (3, 0, 0))
        for i in range(5):
            client.done(request=f"q{i}")
        settled(daemon, (3, 3, 0))
    sink.gets(900 * KB)


@pytest.mark.parametrize("what", ["request", "transfer"])
@pytest.mark.parametrize("after", [0, 30 * KB, 600 * KB])
def test_what_is_taken_back_while_the_daemon_gets_no_processor(
    daemon: Daemon, client: Client, sink: Sink, after: int, what: str
) -> None:
    """So many bytes are written before a word of that is heard; of the second one 100 KB had been."""
    with dial(daemon.pair) as s:
        for i in range(4):
            client.request(f"q{i}", ttft_left_s=2)
            client.transfer(f"t{i}", s, 300 * KB, stage=Stage.P2D, request=f"q{i}")
        assert client.flush(5)
        with daemon.held_up():
            s.sendall(bytes(400 * KB))
            client.cancel(**{what: "q1" if what == "request" else "t1"})
            s.sendall(bytes(after))
            wait_for(lambda: sink.received == 400 * KB + after, "arrival")
            time.sleep(0.1)
        s.sendall(bytes(600 * KB - after))
        # One that was taken for arrived before that was heard is counted until what came in its place is.
        wait_for(lambda: not transfers(daemon), "all that was written")
        settled(daemon, (3, 0, 0))
        time.sleep(2)
        for i in (0, 2, 3):
            client.done(request=f"q{i}")
        settled(daemon, (3, 3, 0))


@pytest.mark.parametrize("by", ["socket", "addresses"])
def test_datagrams_that_the_kernel_cuts(daemon: Daemon, client: Client, by: str) -> None:
    """UDP_SEGMENT, as QUIC sends. Nobody acknowledges them to TCP: the worker's word ends them."""
    pair = daemon.pair

    def connect() -> socket.socket:
        s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        s.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("=i", 1200))
        s.connect((pair.addr_b, PORT))
        return s

    with (
        pair.call(pair.b, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as there,
        pair.call(pair.a, connect) as s,
    ):
        there.bind((pair.addr_b, PORT))
        grown = Grown(daemon)
        named = s if by == "socket" else tuple_of(pair.addr_b, PORT, *s.getsockname(), protocol=socket.IPPROTO_UDP)
        client.transfer("t", named, MB, stage=Stage.P2D, request="r")
        assert client.flush(5)
        for _ in range(MB // 48_000 + 1):
            s.send(bytes(48_000))
        client.done(request="r")
        settled(daemon, (1, 1, 0))
    assert grown.wrong(MB) <= WRONG
