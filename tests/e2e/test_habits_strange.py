# SPDX-License-Identifier: Apache-2.0
"""What others do to connections, and what is named in several ways, or takes long."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.habits import KB, KIB, MB, PORT, WRONG, Grown, band, counted, dial, settled, transfers, worker
from support.rig import Daemon, running
from support.waiting import WAIT_S, wait_for

from mfsd.client import Client, EventKind, Stage, process_peer, tuple_of
from mfsd.datapath.bpf import cgroup, syscall

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.habits import Sink
    from support.namespaces import NetnsPair

    from mfsd.client import Event

pytestmark = pytest.mark.netns

SOCK_OPS_PROGRAM = 13
"""BPF_PROG_TYPE_SOCK_OPS, include/uapi/linux/bpf.h."""


def test_connected_to_itself(daemon: Daemon, client: Client) -> None:
    """A socket that binds a port and connects to it: its bytes come back, and are acknowledged by itself."""
    pair = daemon.pair
    pair.run(pair.a, "ip link set lo up")

    def connect() -> socket.socket:
        s = socket.socket()
        s.bind(("127.0.0.1", 45_100))
        s.connect(("127.0.0.1", 45_100))
        return s

    with pair.call(pair.a, connect) as s:
        for i in range(3):
            client.request(f"q{i}", ttft_left_s=60)
            client.transfer(f"t{i}", s, 100 * KB, stage=Stage.P2D, request=f"q{i}")
            s.sendall(bytes(100 * KB))
            got = 0
            while got < 100 * KB:
                got += len(s.recv(100 * KB - got))
            client.done(request=f"q{i}")
            settled(daemon, (i + 1, i + 1, 0))


def test_an_operator_kills_connections(daemon: Daemon, client: Client, sink: Sink, events: list[Event]) -> None:
    """``ss -K``, as orchestrators do when they drain a peer: what had arrived has, what was on its way is lost."""
    pair = daemon.pair
    with dial(pair) as one, dial(pair) as two:
        sink.paused = True
        for name, s, size in (("met", one, 10 * KB), ("lost", two, 8 * MB)):
            client.request(name, ttft_left_s=60)
            client.transfer(name, s, size, stage=Stage.P2D, request=name)
        assert client.flush(5)
        one.sendall(bytes(10 * KB))
        client.done(request="met")
        settled(daemon, (1, 1, 0))
        two.setblocking(False)
        two.send(bytes(8 * MB))
        pair.run(pair.a, f"ss -K dst {pair.addr_b} dport = {PORT}")
        client.done(request="lost")
        settled(daemon, (1, 1, 1))
        assert [e.transfer_id for e in events if e.kind is EventKind.CONNECTION_GONE] == ["lost"]
        sink.paused = False
    with dial(pair) as s:
        client.transfer("t", s, 100 * KB, stage=Stage.P2D, request="r")
        s.sendall(bytes(100 * KB))
        settled(daemon, (2, 1, 1))


@contextlib.contextmanager
def forgetful() -> Iterator[Path]:
    """A cgroup with a program of somebody else's that sets a connection's flags as it likes: to none."""
    place = Path(str(cgroup.mounted_at())) / "mfsd-test-habits"
    place.mkdir()
    set_flags = 59  # BPF_FUNC_bpf_sock_ops_cb_flags_set
    code = b"".join(
        struct.pack("=BBhi", *insn)
        for insn in ((0xB7, 2, 0, 0), (0x85, 0, 0, set_flags), (0xB7, 0, 0, 1), (0x95, 0, 0, 0))
    )
    program = syscall.prog_load(SOCK_OPS_PROGRAM, "forgetful", code, "GPL")
    where = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    link = syscall.link_create(program, where, cgroup.SOCK_OPS, 0)
    try:
        yield place
    finally:
        for fd in (link, where, program):
            os.close(fd)
        wait_for(lambda: not (place / "cgroup.procs").read_text(), "the worker to be gone")
        place.rmdir()


ENTERS = """
with open(arguments[0] + "/cgroup.procs", "w") as f:
    f.write(str(os.getpid()))
client = Client(target=target)
for i in range(10):
    with dial() as s:
        client.request(f"q{i}", ttft_left_s=60)
        client.transfer(f"t{i}", s, 100_000, stage=Stage.P2D, request=f"q{i}")
        assert client.flush(20)
        s.sendall(bytes(100_000))
        if arguments[1] == "peer":
            s.shutdown(socket.SHUT_WR)
            s.recv(1)
    client.done(request=f"q{i}")
say(client.flush(5))
hear()
"""


@pytest.mark.parametrize("closed_by", ["worker", "peer"])
def test_a_worker_whose_cgroup_has_a_program_of_its_own(daemon: Daemon, sink: Sink, closed_by: str) -> None:
    """It hears of no end, and doesn't know that others do."""
    with forgetful() as place:
        with worker(daemon, ENTERS, str(place), closed_by) as w:
            assert w.hear() == ["True"]
            settled(daemon, (10, 10, 0))
            wait_for(lambda: not daemon.connections(), "the connections to be forgotten")
        sink.gets(1000 * KB)


def test_weights_that_take_longer_than_hints_live(netns_pair: NetnsPair, sink: Sink, tmp_path: Path) -> None:
    with (
        running(Daemon(netns_pair, tmp_path, extra="[limits]\ndefault_ttl_s = 1.5\n")) as daemon,
        daemon.client() as client,
        dial(netns_pair) as s,
    ):
        assert client.flush(20)
        grown = Grown(daemon)
        client.transfer("weights", s, 120 * MB, stage=Stage.BACKGROUND)
        client.transfer("more", s, 20 * MB, stage=Stage.BACKGROUND)
        assert client.flush(5)
        for _ in range(140):
            s.sendall(bytes(MB))
        sink.gets(140 * MB)
        settled(daemon, (2, 0, 0))
        assert grown.wrong(140 * MB, right="background") <= WRONG


@pytest.mark.parametrize("by", ["addresses", "process", "turns"])
def test_weights_that_take_longer_than_hints_live_over_restarts(
    netns_pair: NetnsPair, sink: Sink, tmp_path: Path, by: str
) -> None:
    """By what the daemon has said of them: the client can't see how much of them has been written."""
    with (
        running(Daemon(netns_pair, tmp_path, extra="[limits]\ndefault_ttl_s = 1.5\n")) as daemon,
        daemon.client() as client,
        dial(netns_pair) as s,
    ):
        assert client.flush(20)
        there: Any = {
            "addresses": tuple_of(netns_pair.addr_b, PORT), "process": process_peer(os.getpid(), netns_pair.addr_b),
            "turns": s,
        }[by]  # fmt: skip
        for name in ("weights", "more"):
            client.transfer(name, there, 400 * MB, stage=Stage.BACKGROUND, interleaved=by == "turns", ttl_s=1.5)
        client.transfer("never", tuple_of("10.77.0.99", PORT), MB, stage=Stage.BACKGROUND, ttl_s=1.5)
        assert client.flush(5)
        over = threading.Event()

        def send() -> None:
            while not over.is_set():
                s.sendall(bytes(100 * KB))
                time.sleep(0.02)

        sends = threading.Thread(target=send)
        sends.start()
        try:
            for _ in range(2):
                time.sleep(4.0)
                assert sorted(transfers(daemon)) == ["more", "weights"]
                daemon.end(signal.SIGKILL)
                time.sleep(2.0)
                daemon.start()
                assert client.flush(20)
                wait_for(lambda: sorted(transfers(daemon)) == ["more", "weights"], "it to be announced again")
                wait_for(lambda: band(daemon, s) == "background", "its band")
                grown = Grown(daemon)
                time.sleep(4.0)
                assert sorted(transfers(daemon)) == ["more", "weights"]
                assert grown.wrong(10 * MB, right="background") <= WRONG
        finally:
            over.set()
            sends.join(WAIT_S)
        for name in ("weights", "more"):
            client.cancel(transfer=name)
        assert client.flush(5)
        daemon.end(signal.SIGKILL)
        daemon.start()
        assert client.flush(20)
        assert transfers(daemon) == {}
    assert sink.received > 40 * MB


@pytest.mark.usefixtures("sink")
def test_a_selector_of_several_and_their_sockets(daemon: Daemon, client: Client) -> None:
    """What is announced for one of them is none of what is announced for all."""
    pair = daemon.pair
    socks = [dial(pair) for _ in range(3)]
    client.transfer("all", tuple_of(pair.addr_b, PORT), 3 * MB, stage=Stage.P2D, request="r")
    assert client.flush(5)
    wait_for(lambda: all(band(daemon, s).startswith("level") for s in socks), "all to be known")
    for i in range(5):
        client.transfer(f"t{i}", socks[0], 500 * KB, stage=Stage.P2D, request="r")
        assert client.flush(5)
        socks[0].sendall(bytes(500 * KB))
        settled(daemon, (i + 1, 0, 0))
        assert transfers(daemon) == {"all": 3 * MB}
    for s in socks:
        s.sendall(bytes(MB - 1))
    wait_for(lambda: transfers(daemon) == {"all": 3}, "nearly all")
    socks[2].sendall(bytes(3))
    settled(daemon, (6, 0, 0))
    for s in socks:
        s.close()


def test_two_selectors_of_one_pipelined_connection(daemon: Daemon, client: Client, sink: Sink) -> None:
    pair = daemon.pair
    with dial(pair) as s:
        for i in range(6):
            there = tuple_of(pair.addr_b, PORT if i % 2 else (PORT - 10, PORT + 10))
            client.transfer(f"t{i}", there, 500 * KB, stage=Stage.P2D, request="r")
        assert client.flush(5)
        wait_for(lambda: band(daemon, s).startswith("level"), "it to be known")
        for i in range(6):
            s.sendall(bytes(500 * KB - 1))
            sink_has = (i + 1) * 500 * KB - 1
            wait_for(lambda n=sink_has: sink.received == n, "arrival")  # type: ignore[misc]
            time.sleep(0.3)
            assert counted(daemon)[0] == i
            s.sendall(b"x")
            settled(daemon, (i + 1, 0, 0))


def test_a_peer_that_talks_all_the_time(daemon: Daemon, client: Client) -> None:
    """Its words are acknowledgements, too: they don't say when the last byte arrived."""
    pair, over = daemon.pair, threading.Event()
    with (
        pair.call(pair.b, lambda: socket.create_server((pair.addr_b, PORT))) as listener,
        dial(pair) as s,
        listener.accept()[0] as there,
    ):

        def talk() -> None:
            there.settimeout(0.001)
            while not over.is_set():
                with contextlib.suppress(TimeoutError):
                    there.recv(1 << 20)
                there.send(b"word")
                with contextlib.suppress(BlockingIOError):
                    s.recv(4 * KIB, socket.MSG_DONTWAIT)

        talks = threading.Thread(target=talk)
        talks.start()
        try:
            for i in range(5):
                client.request(f"q{i}", ttft_left_s=0.5)
                client.transfer(f"t{i}", s, 100 * KB, stage=Stage.P2D, request=f"q{i}")
                assert client.flush(5)
                s.sendall(bytes(100 * KB))
                time.sleep(0.8)
                client.done(request=f"q{i}")
            settled(daemon, (5, 5, 0))
        finally:
            over.set()
            talks.join()
