# SPDX-License-Identifier: Apache-2.0
"""What sockets are also used for: half-closed, refused, bound, spliced, without a reader, in either direction."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import threading
import time
from typing import TYPE_CHECKING

import pytest
from support.habits import KB, MB, PORT, WRONG, Grown, Sink, band, close_hard, counted, dial, settled, transfers
from support.waiting import WAIT_S, wait_for

from mfsd.client import Client, Event, EventKind, Rejected, Stage, Transfer, tuple_of

if TYPE_CHECKING:
    from support.rig import Daemon


pytestmark = pytest.mark.netns


# --- ends -------------------------------------------------------------------------------------------------------------


def test_half_closed_by_us(daemon: Daemon, client: Client, sink: Sink) -> None:
    with dial(daemon.pair) as s:
        client.transfer("t", s, MB, stage=Stage.P2D, request="r")
        assert client.flush(5)
        s.sendall(bytes(MB))
        s.shutdown(socket.SHUT_WR)
        settled(daemon, (1, 0, 0))
    sink.gets(MB)


def test_half_closed_by_the_peer_we_go_on_sending(daemon: Daemon, client: Client) -> None:
    pair = daemon.pair
    with pair.call(pair.b, lambda: socket.create_server((pair.addr_b, PORT))) as listener, dial(pair) as s:
        other, _ = listener.accept()
        with other:
            other.shutdown(socket.SHUT_WR)
            assert s.recv(1) == b""
            client.transfer("t", s, MB, stage=Stage.P2D, request="r")
            assert client.flush(5)
            reader = threading.Thread(target=lambda: other.recv(MB, socket.MSG_WAITALL), daemon=True)
            reader.start()
            s.sendall(bytes(MB))
            settled(daemon, (1, 0, 0))
            reader.join(WAIT_S)


def test_a_reset_by_ourselves_of_what_nobody_has_read(
    daemon: Daemon, client: Client, sink: Sink, events: list[Event]
) -> None:
    sink.paused = True
    s = dial(daemon.pair)
    client.transfer("t", s, 50 * MB, stage=Stage.P2D, request="r")
    assert client.flush(5)
    s.settimeout(0.3)
    with pytest.raises(TimeoutError):
        s.sendall(bytes(50 * MB))
    close_hard(s)
    wait_for(lambda: [e for e in events if e.kind is EventKind.CONNECTION_GONE], "the word")
    assert counted(daemon)[0] == 0
    client.done(request="r")
    settled(daemon, (0, 0, 1))


def test_what_the_peer_does_not_read_is_not_done(daemon: Daemon, client: Client, sink: Sink) -> None:
    """Its window is closed: the last bytes wait in the socket, for seconds."""
    sink.paused = True
    with dial(daemon.pair) as s:
        client.transfer("t", s, 20 * MB, stage=Stage.P2D, request="r")
        assert client.flush(5)
        sender = threading.Thread(target=lambda: s.sendall(bytes(20 * MB)), daemon=True)
        sender.start()
        time.sleep(2.5)
        assert list(transfers(daemon)) == ["t"]
        assert band(daemon, s).startswith("level")
        sink.paused = False
        sender.join(WAIT_S)
        client.done(transfer="t")
        settled(daemon, (1, 0, 0))
        sink.gets(20 * MB)


def test_what_is_done_but_not_read_is_not_delivered(daemon: Daemon, client: Client, sink: Sink) -> None:
    sink.paused = True
    with dial(daemon.pair) as s:
        s.settimeout(0.3)
        sent = 0
        with contextlib.suppress(TimeoutError):
            while True:
                sent += s.send(bytes(64 * KB))
        client.transfer("t", s, 100 * KB, stage=Stage.P2D, request="r")
        assert client.flush(5)
        s.settimeout(WAIT_S)
        sender = threading.Thread(target=lambda: s.sendall(bytes(100 * KB)), daemon=True)
        sender.start()
        time.sleep(0.5)
        assert list(transfers(daemon)) == ["t"]
        sink.paused = False
        sender.join(WAIT_S)
        client.done(transfer="t")
        settled(daemon, (1, 0, 0))
        sink.gets(sent + 100 * KB)


# --- before there is a connection -------------------------------------------------------------------------------------


@pytest.mark.parametrize("earlier", [0.0, 2.0])
def test_a_socket_hinted_before_it_is_connected(daemon: Daemon, client: Client, sink: Sink, earlier: float) -> None:
    def hint(s: socket.socket) -> None:
        client.transfer("t", s, MB, stage=Stage.P2D, request="r")
        assert client.flush(5)
        time.sleep(earlier)

    grown = Grown(daemon)
    with dial(daemon.pair, before=hint) as s:
        s.sendall(bytes(MB))
        settled(daemon, (1, 0, 0))
    assert grown.wrong(MB) <= WRONG
    sink.gets(MB)


def test_a_connection_that_is_refused_and_tried_again(daemon: Daemon, client: Client, events: list[Event]) -> None:
    pair = daemon.pair
    there = tuple_of(pair.addr_b, PORT)
    client.transfer("t", there, MB, stage=Stage.P2D, request="r")
    assert client.flush(5)
    for _ in range(3):
        with pytest.raises(ConnectionRefusedError):
            dial(pair)
    with Sink(pair) as sink:
        grown = Grown(daemon)
        with dial(pair) as s:
            s.sendall(bytes(MB))
            settled(daemon, (1, 0, 0))
        assert grown.wrong(MB) <= WRONG
        assert not events
        sink.gets(MB)


def test_the_same_socket_connects_again_after_a_refusal(daemon: Daemon, client: Client, events: list[Event]) -> None:
    pair = daemon.pair
    with pair.call(pair.a, socket.socket) as s:
        client.transfer("t", s, MB, stage=Stage.P2D, request="r")
        assert client.flush(5)
        with pytest.raises(ConnectionRefusedError):
            s.connect((pair.addr_b, PORT))
        with Sink(pair) as sink:
            s.connect((pair.addr_b, PORT))
            grown = Grown(daemon)
            s.sendall(bytes(MB))
            settled(daemon, (1, 0, 0))
            assert grown.wrong(MB) <= WRONG
            assert not events
            sink.gets(MB)


def test_a_refused_socket_that_is_given_up(daemon: Daemon, client: Client, events: list[Event]) -> None:
    pair = daemon.pair
    with pair.call(pair.a, socket.socket) as s:
        client.transfer("t", s, MB, stage=Stage.P2D, request="r")
        assert client.flush(5)
        with pytest.raises(ConnectionRefusedError):
            s.connect((pair.addr_b, PORT))
    wait_for(lambda: [e.transfer_id for e in events] == ["t"], "the word")
    wait_for(lambda: daemon.status().connections == 0, "its slot")


# --- ports and devices ------------------------------------------------------------------------------------------------


def test_reconnects_from_the_same_port(daemon: Daemon, client: Client, sink: Sink) -> None:
    pair, port = daemon.pair, 45_021
    exact = tuple_of(pair.addr_b, PORT, pair.addr_a, port)
    client.mark(exact, Stage.COLLECTIVE)
    assert client.flush(5)
    grown = Grown(daemon)
    for i in range(5):
        s = dial(pair, source_port=port)
        s.sendall(bytes(200 * KB))
        wait_for(lambda i=i: sink.received == (i + 1) * 200 * KB, "arrival")  # type: ignore[misc]
        close_hard(s)
    assert grown.wrong(MB, right="level 0") <= WRONG


def test_what_the_accepting_side_sends(daemon: Daemon, client: Client) -> None:
    """Several processes' worth of listeners on one port (SO_REUSEPORT), whose accepted sockets send."""
    pair = daemon.pair

    def listen() -> socket.socket:
        s = socket.socket()
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        s.bind((pair.addr_a, 6500))
        s.listen(8)
        return s

    listeners = [pair.call(pair.a, listen) for _ in range(3)]
    client.mark(tuple_of(pair.addr_b, 0, pair.addr_a, 6500), Stage.COLLECTIVE)
    assert client.flush(5)
    grown = Grown(daemon)
    opened = [pair.call(pair.b, lambda: socket.create_connection((pair.addr_a, 6500))) for _ in range(12)]
    try:
        accepted = []
        for listener in listeners:
            listener.settimeout(0.2)
            try:
                while True:
                    accepted.append(listener.accept()[0])
            except TimeoutError:
                pass
        assert len(accepted) == 12
        for s in accepted:
            s.sendall(bytes(50 * KB))
        for peer in opened:
            assert len(peer.recv(50 * KB, socket.MSG_WAITALL)) == 50 * KB
        assert grown.wrong(12 * 50 * KB, right="level 0") <= WRONG
        client.transfer("t", accepted[0], MB, stage=Stage.P2D, request="r")
        assert client.flush(5)
        there = next(p for p in opened if p.getsockname() == accepted[0].getpeername())
        reader = threading.Thread(target=lambda: there.recv(MB, socket.MSG_WAITALL), daemon=True)
        reader.start()
        accepted[0].sendall(bytes(MB))
        settled(daemon, (1, 0, 0))
        for s in accepted:
            s.close()
        reader.join(WAIT_S)
    finally:
        for s in (*listeners, *opened):
            s.close()


def test_a_socket_bound_to_a_device(daemon: Daemon, client: Client, sink: Sink, events: list[Event]) -> None:
    def bind(s: socket.socket) -> None:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"v0\0")

    client.mark(tuple_of(daemon.pair.addr_b, PORT), Stage.P2D)
    assert client.flush(5)
    grown = Grown(daemon)
    with dial(daemon.pair, before=bind) as s:
        for i in range(3):
            client.transfer(f"t{i}", s, MB, stage=Stage.P2D, request="r")
            assert client.flush(5)
            s.sendall(bytes(MB))
            settled(daemon, (i + 1, 0, 0))
            time.sleep(1.2)  # it is looked after meanwhile
        assert band(daemon, s).startswith("level")
    assert not events
    assert grown.wrong(3 * MB) <= WRONG
    sink.gets(3 * MB)


# --- bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["sendfile", "splice"])
def test_bytes_that_never_were_in_the_process(daemon: Daemon, client: Client, sink: Sink, how: str) -> None:
    grown = Grown(daemon)
    with dial(daemon.pair) as s, tempfile.TemporaryFile() as file:
        file.write(bytes(2 * MB))
        file.flush()
        client.transfer("t", s, 2 * MB, stage=Stage.P2D, request="r")
        assert client.flush(5)
        s.settimeout(None)  # these calls know no other
        if how == "sendfile":
            at = 0
            while at < 2 * MB:
                at += os.sendfile(s.fileno(), file.fileno(), at, 2 * MB - at)
        else:
            out, into = os.pipe()
            at = 0
            while at < 2 * MB:
                n = os.splice(file.fileno(), into, 64 * KB, offset_src=at)
                at += n
                while n:
                    n -= os.splice(out, s.fileno(), n)
            os.close(out)
            os.close(into)
        settled(daemon, (1, 0, 0))
    assert grown.wrong(2 * MB) <= WRONG
    sink.gets(2 * MB)


def test_tiny_and_huge_hints(daemon: Daemon, client: Client, sink: Sink) -> None:
    with dial(daemon.pair) as s:
        for i in range(20):
            client.transfer(f"tiny{i}", s, 1, stage=Stage.P2D, request="r")
            assert client.flush(5)
            s.sendall(b"x")
        settled(daemon, (20, 0, 0))
        client.transfer("huge", s, 1 << 40, stage=Stage.P2D, request="r")
        client.transfer("next", s, MB, stage=Stage.P2D, request="r")
        assert client.flush(5)
        s.sendall(bytes(MB))
        client.done(transfer="huge")  # it was a mistake: this is all there is
        assert client.flush(5)
        wait_for(lambda: list(transfers(daemon)) == ["next"], "the huge one")
        s.sendall(bytes(MB))
        settled(daemon, (22, 0, 0))
    sink.gets(2 * MB + 20)


def test_the_same_said_twice(daemon: Daemon, client: Client, sink: Sink, rejected: list[Rejected]) -> None:
    with dial(daemon.pair) as s:
        for _ in range(2):
            client.transfer("t", s, MB, stage=Stage.P2D, request="r")
        assert client.flush(5)
        wait_for(lambda: rejected, "the second to be refused")
        client.transfers(Transfer("u", s, MB, Stage.P2D, "r") for _ in range(12))
        assert client.flush(5)
        wait_for(lambda: len(rejected) == 12, "eleven of twelve to be refused")
        s.sendall(bytes(2 * MB))
        client.done(transfer="t")
        client.done(transfer="t")
        settled(daemon, (2, 0, 0))
    sink.gets(2 * MB)


def test_one_transfer_over_many_connections(daemon: Daemon, client: Client, sink: Sink) -> None:
    pair = daemon.pair
    client.transfer("t", tuple_of(pair.addr_b, PORT), 8 * MB, stage=Stage.P2D, request="r")
    assert client.flush(5)
    grown, opened = Grown(daemon), [dial(pair) for _ in range(4)]
    for i, s in enumerate(opened):
        s.sendall(bytes(MB))
        if i % 2:
            s.close()
    opened += [dial(pair) for _ in range(2)]
    for s in (opened[0], opened[2], *opened[4:]):
        s.sendall(bytes(MB - 1))
    wait_for(lambda: sink.received == 8 * MB - 4, "arrival")
    time.sleep(0.1)
    assert list(transfers(daemon)) == ["t"]
    opened[0].sendall(bytes(4))
    settled(daemon, (1, 0, 0))
    assert grown.wrong(8 * MB) <= WRONG
    for s in opened:
        s.close()


def test_several_owners_of_one_connection(daemon: Daemon, client: Client, sink: Sink) -> None:
    """What one announces changes nothing for the other, and the most urgent one decides."""
    with dial(daemon.pair) as s, daemon.client() as other:
        client.transfer("mine", s, MB, stage=Stage.P2D, request="r")
        assert client.flush(5)
        other.request("x", ttft_left_s=600)
        other.transfer("huge", s, 1 << 40, stage=Stage.P2D, request="x")
        other.mark(s, Stage.COLLECTIVE)
        assert other.flush(5)
        wait_for(lambda: band(daemon, s) == "level 0", "the other's mark")
        s.sendall(bytes(MB))
        wait_for(lambda: list(transfers(daemon)) == ["huge"], "mine to be done")
        other.close()
        wait_for(lambda: band(daemon, s) != "level 0", "the other's mark to end")
    sink.gets(MB)
