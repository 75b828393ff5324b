# SPDX-License-Identifier: Apache-2.0
"""Clients that wait for nothing: no flush, hints on their way while their bytes go, names and ports used again."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

import pytest
from support.habits import KB, KIB, MB, PORT, WRONG, Grown, Sink, dial, settled, transfers
from support.waiting import wait_for

from mfsd.client import Client, Event, Rejected, Stage, tuple_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.rig import Daemon

pytestmark = pytest.mark.netns


@pytest.fixture
def client(client: Client, rejected: list[Rejected]) -> Iterator[Client]:
    yield client
    assert not rejected


def test_transfers_on_a_kept_connection_without_a_flush(daemon: Daemon, client: Client, sink: Sink) -> None:
    with dial(daemon.pair) as s:
        for i in range(40):
            client.transfer(f"t{i}", s, 64 * KIB, stage=Stage.P2D, request="r")
            if not i:
                assert client.flush(5)
                grown = Grown(daemon)
            s.sendall(bytes(64 * KIB))
        settled(daemon, (40, 0, 0))
        assert grown.wrong(40 * 64 * KIB) <= WRONG
        client.transfer("next", s, MB, stage=Stage.P2D, request="r")
        assert client.flush(5)
        assert transfers(daemon) == {"next": MB}
        s.sendall(bytes(MB))
        settled(daemon, (41, 0, 0))
    sink.gets(40 * 64 * KIB + MB)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("done", [False, True])
def test_transfers_by_addresses_without_a_flush(
    daemon: Daemon, client: Client, sink: Sink, *, exact: bool, done: bool
) -> None:
    """Where nobody says so, what the last ones lack was theirs: that comes out when all has been quiet for a second."""
    with dial(daemon.pair) as s:
        there = tuple_of(*s.getpeername(), *s.getsockname()) if exact else tuple_of(daemon.pair.addr_b, PORT)
        for i in range(30):
            client.request(f"r{i}", ttft_left_s=20)
            client.transfer(f"t{i}", there, 64 * KIB, stage=Stage.P2D, request=f"r{i}")
            s.sendall(bytes(64 * KIB))
            if done:
                client.done(request=f"r{i}")
            if i % 5 == 4:
                wait_for(lambda i=i: sink.received == (i + 1) * 64 * KIB, "arrival")  # type: ignore[misc]
        settled(daemon, (30, 30 * done, 0))


def test_a_connection_per_transfer_by_addresses_without_a_flush(daemon: Daemon, client: Client, sink: Sink) -> None:
    there = tuple_of(daemon.pair.addr_b, PORT)
    for i in range(30):
        with dial(daemon.pair) as s:
            client.transfer(f"t{i}", there, 64 * KIB, stage=Stage.P2D, request="r")
            if not i:
                assert client.flush(5)  # connections that are over before anybody hears of the selector are nobody's
            s.sendall(bytes(64 * KIB))
    wait_for(lambda: sink.received == 30 * 64 * KIB, "arrival")
    settled(daemon, (30, 0, 0))


def test_a_transfer_cancelled_with_half_of_it_written_moves_none_of_those_behind_it(
    daemon: Daemon, client: Client, sink: Sink
) -> None:
    with dial(daemon.pair) as s:
        for i in range(3):
            client.transfer(f"t{i}", s, 500 * KB, stage=Stage.P2D, request="r")
        assert client.flush(5)
        s.sendall(bytes(250 * KB))
        client.cancel(transfer="t0")
        assert client.flush(5)
        s.sendall(bytes(500 * KB))
        wait_for(lambda: sink.received == 750 * KB, "arrival")
        wait_for(lambda: transfers(daemon) == {"t2": 500 * KB}, "t1 to be done, and nothing of t2")
        s.sendall(bytes(500 * KB))
        settled(daemon, (2, 0, 0))


def test_a_request_of_the_same_name_right_behind_the_last_one(daemon: Daemon, client: Client, sink: Sink) -> None:
    with dial(daemon.pair) as s:
        for i in range(20):
            client.request("same", ttft_left_s=20)
            client.transfer(f"t{i}", s, 200 * KB, stage=Stage.P2D, request="same")
            s.sendall(bytes(200 * KB))
            client.done(request="same")
        settled(daemon, (20, 20, 0))
    sink.gets(20 * 200 * KB)


def test_marks_of_single_connections_by_addresses_leave_room(
    daemon: Daemon, client: Client, sink: Sink, rejected: list[Rejected]
) -> None:
    with dial(daemon.pair) as kept:
        client.mark(tuple_of(*kept.getpeername(), *kept.getsockname()), Stage.COLLECTIVE)
        for i in range(1100):
            with dial(daemon.pair) as s:
                client.mark(tuple_of(*s.getpeername(), *s.getsockname()), Stage.COLLECTIVE)
                if i % 50 == 0:
                    assert client.flush(5)
        assert client.flush(5)
        assert not rejected
        grown = Grown(daemon)
        kept.sendall(bytes(MB))
        wait_for(lambda: sink.received == MB, "arrival")
        assert grown.wrong(MB, right="level 0") <= WRONG


def test_many_threads_with_a_connection_per_transfer(
    daemon: Daemon, client: Client, sink: Sink, events: list[Event]
) -> None:
    def one(k: int) -> None:
        for i in range(6):
            with dial(daemon.pair) as s:
                client.request(f"r{k}.{i}", ttft_left_s=60)
                client.transfer(f"t{k}.{i}", s, 64 * KIB, stage=Stage.P2D, request=f"r{k}.{i}")
                assert client.flush(20)
                s.sendall(bytes(64 * KIB))
                client.done(request=f"r{k}.{i}")

    with contextlib.ExitStack() as stack:
        for k in range(12):
            thread = threading.Thread(target=one, args=(k,))
            stack.callback(thread.join)
            thread.start()
    settled(daemon, (72, 72, 0))
    assert not events
    sink.gets(72 * 64 * KIB)
