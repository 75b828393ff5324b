# SPDX-License-Identifier: Apache-2.0
"""How real clients use connections: kept, closed at once, opened anew for each transfer, hinted early and late.

The same on a fake kernel, with more variants: tests/engine/test_habits.py. Who speaks, and which way: the files beside.
"""

from __future__ import annotations

import contextlib
import signal
import time
from typing import TYPE_CHECKING

import pytest
from support.habits import (
    KB,
    KIB,
    MB,
    PORT,
    WRONG,
    Grown,
    Sink,
    band,
    close_hard,
    counted,
    dial,
    settled,
    shown,
    transfers,
)
from support.rig import Daemon, running
from support.waiting import WAIT_FACTOR, wait_for

from mfsd.client import Client, Event, EventKind, Stage, tuple_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.namespaces import NetnsPair

pytestmark = pytest.mark.netns


@pytest.fixture
def client(daemon: Daemon, events: list[Event]) -> Iterator[Client]:
    with daemon.client(on_event=events.append) as c:
        assert c.flush(20)
        yield c
        assert c.stats.rejected == 0


# --- one connection per transfer --------------------------------------------------------------------------------------


def test_a_connection_per_transfer_closed_right_behind_its_last_byte(
    daemon: Daemon, client: Client, sink: Sink, events: list[Event]
) -> None:
    for i in range(20):
        with dial(daemon.pair) as s:
            client.request(f"r{i}", ttft_left_s=5.0)
            client.transfer(f"t{i}", s, 256 * KIB, stage=Stage.P2D, request=f"r{i}")
            assert client.flush(5)
            s.sendall(bytes(256 * KIB))
            client.done(request=f"r{i}")
    settled(daemon, (20, 20, 0))
    assert not events, events
    sink.gets(20 * 256 * KIB)
    wait_for(lambda: daemon.status().connections == 0, "the slots to be free")


def test_one_selector_for_a_connection_per_transfer(daemon: Daemon, client: Client, sink: Sink) -> None:
    there = tuple_of(daemon.pair.addr_b, PORT)
    client.request("r", ttft_left_s=60)
    grown = Grown(daemon)
    for i in range(50):
        with dial(daemon.pair) as s:
            client.transfer(f"t{i}", there, 100 * KB, stage=Stage.P2D, request="r")
            assert client.flush(5)
            s.sendall(bytes(100 * KB))
    settled(daemon, (50, 0, 0))
    assert grown.wrong(50 * 100 * KB) <= WRONG
    sink.gets(5 * MB)


def test_a_selector_announced_before_each_connection(daemon: Daemon, client: Client, sink: Sink) -> None:
    there = tuple_of(daemon.pair.addr_b, PORT)
    client.request("r", ttft_left_s=60)
    grown = Grown(daemon)
    for i in range(50):
        client.transfer(f"t{i}", there, 64 * KIB, stage=Stage.P2D, request="r")
        if not i:
            assert client.flush(5)  # from then on the kernel knows
        with dial(daemon.pair) as s:
            s.sendall(bytes(64 * KIB))
    client.done(request="r")
    settled(daemon, (50, 1, 0))
    assert grown.wrong(50 * 64 * KIB) <= WRONG  # all of it has gone by now, then
    wait_for(lambda: sink.received == 50 * 64 * KIB, "arrival")


def test_sockets_marked_and_closed_leave_room(daemon: Daemon, client: Client, sink: Sink) -> None:
    for i in range(1100):
        with dial(daemon.pair) as s:
            client.mark(s, Stage.COLLECTIVE)
            if i % 50 == 0:
                assert client.flush(5)
    assert client.flush(5)
    assert client.stats.rejected == 0
    wait_for(lambda: daemon.status().connections == 0, "the slots to be free")
    assert not sink.received


# --- the first byte ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [True, False])
def test_all_that_is_sent_right_after_flush_is_in_its_band(
    daemon: Daemon, client: Client, sink: Sink, *, kept: bool
) -> None:
    grown, total = Grown(daemon), 0
    client.request("r", ttft_left_s=60)
    with contextlib.ExitStack() as stack:
        s = stack.enter_context(dial(daemon.pair))
        for i in range(5 if kept else 1):
            client.transfer(f"t{i}", s, MB, stage=Stage.P2D, request="r")
            assert client.flush(5)
            s.sendall(bytes(MB))
            total += MB
        settled(daemon, (total // MB, 0, 0))
    assert grown.wrong(total) <= WRONG
    sink.gets(total)


def test_a_mark_by_addresses_holds_over_reconnects_and_for_the_one_beside(
    daemon: Daemon, client: Client, sink: Sink
) -> None:
    there = tuple_of(daemon.pair.addr_b, PORT)
    client.mark(there, Stage.COLLECTIVE)
    assert client.flush(5)
    grown = Grown(daemon)
    with dial(daemon.pair) as first:
        first.sendall(bytes(MB))
        wait_for(lambda: band(daemon, first) == "level 0", "the first")
    with dial(daemon.pair) as second, dial(daemon.pair) as third:
        for s in (second, third):
            s.sendall(bytes(MB))
        wait_for(lambda: band(daemon, second) == band(daemon, third) == "level 0", "both")
        wait_for(lambda: sink.received == 3 * MB, "arrival")
    assert grown.wrong(3 * MB, right="level 0") <= WRONG
    client.close()
    wait_for(lambda: daemon.status().connections == 0, "the end of the session to end it")
    with dial(daemon.pair) as stranger:
        grown = Grown(daemon)
        stranger.sendall(bytes(MB))
        wait_for(lambda: sink.received == 4 * MB, "arrival")
        assert grown.now()["default"] >= MB


def test_marking_again_leaves_no_gap(daemon: Daemon, client: Client, sink: Sink) -> None:
    """While a selector changes its stage again and again, no new connection is missed."""
    there, grown, total = tuple_of(daemon.pair.addr_b, PORT), Grown(daemon), 0
    client.mark(there, Stage.COLLECTIVE)
    assert client.flush(5)
    for i in range(60):
        for _ in range(20):
            client.mark(there, Stage.P2D if i % 2 else Stage.COLLECTIVE)
        with dial(daemon.pair) as s:
            s.sendall(bytes(64 * KIB))
        total += 64 * KIB
    wait_for(lambda: sink.received == total, "arrival")
    assert grown.wrong(total) <= WRONG


# --- nothing of a dead connection -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", ["closed", "reset"])
def test_a_stranger_with_the_ports_of_a_dead_connection(daemon: Daemon, client: Client, sink: Sink, ends: str) -> None:
    pair, port = daemon.pair, 45_017
    client.transfer("t", tuple_of(pair.addr_b, PORT, pair.addr_a, port), MB, stage=Stage.COLLECTIVE)
    assert client.flush(5)
    grown = Grown(daemon)
    s = dial(pair, source_port=port)
    s.sendall(bytes(MB))
    settled(daemon, (1, 0, 0))
    assert grown.wrong(MB, right="level 0") <= WRONG
    if ends == "reset":
        close_hard(s)
    else:
        s.close()
        wait_for(lambda: not pair.run(pair.a, f"ss -Htan state connected exclude time-wait sport = :{port}"), "FINs")
        pair.run(pair.a, f"ss -K state time-wait sport = :{port} || true")
    wait_for(lambda: daemon.status().connections == 0, "the connection to be over")
    grown = Grown(daemon)

    def again() -> bool:
        nonlocal s
        with contextlib.suppress(OSError):
            s = dial(pair, source_port=port)
            return True
        return False

    wait_for(again, "the ports to be free")
    with s:
        s.sendall(bytes(MB))
        wait_for(lambda: sink.received == 2 * MB, "arrival")
        assert grown.now()["default"] >= MB
        assert grown.now()["level 0"] == 0


# --- hints that are wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [False, True], ids=["alone", "with the next"])
def test_a_hint_that_comes_a_second_after_its_bytes(
    daemon: Daemon, client: Client, sink: Sink, *, at_once: bool
) -> None:
    """Announced together with the next one, it may be true: that comes out when all is quiet."""
    client.request("r", ttft_left_s=60)
    with dial(daemon.pair) as s:
        s.sendall(bytes(200 * KB))
        wait_for(lambda: sink.received == 200 * KB, "arrival")
        time.sleep(1)
        client.transfer("late", s, 200 * KB, stage=Stage.P2D, request="r")
        if not at_once:
            assert client.flush(5)
            time.sleep(0.1)
        for i in range(6):
            client.transfer(f"t{i}", s, 200 * KB, stage=Stage.P2D, request="r")
            assert client.flush(5)
            s.sendall(bytes(200 * KB))
            wait_for(lambda i=i: sink.received == (2 + i) * 200 * KB, "arrival")  # type: ignore[misc]
            if not at_once:
                wait_for(lambda: not transfers(daemon), "what has arrived to be done")
        settled(daemon, (7, 0, 0))


@pytest.mark.parametrize("share", [1.1, 0.9])
def test_sizes_announced_wrong(daemon: Daemon, client: Client, sink: Sink, share: float) -> None:
    size, said = 200 * KB, int(200 * KB * share)
    client.request("r", ttft_left_s=60)
    with dial(daemon.pair) as s:
        for i in range(2):
            client.transfer(f"t{i}", s, said, stage=Stage.P2D, request="r")
        for i in range(20):
            s.sendall(bytes(size))
            client.done(transfer=f"t{i}")
            client.transfer(f"t{i + 2}", s, said, stage=Stage.P2D, request="r")
            assert client.flush(5)
            wait_for(lambda i=i: sink.received == (i + 1) * size, "arrival")  # type: ignore[misc]
            wait_for(lambda: len(transfers(daemon)) <= 2, "what was done to be over")
        assert counted(daemon)[0] >= 20


def test_transfers_written_in_another_order(daemon: Daemon, client: Client, sink: Sink) -> None:
    client.request("r", ttft_left_s=60)
    with dial(daemon.pair) as s:
        client.transfer("a", s, MB, stage=Stage.P2D, request="r")
        client.transfer("b", s, 100 * KB, stage=Stage.P2D, request="r")
        assert client.flush(5)
        s.sendall(bytes(100 * KB))
        client.done(transfer="b")
        wait_for(lambda: list(transfers(daemon)) == ["a"], "b alone to be done")
        s.sendall(bytes(MB - 100))
        wait_for(lambda: sink.received == MB + 100 * KB - 100, "arrival")
        time.sleep(0.1)
        assert list(transfers(daemon)) == ["a"]
        s.sendall(bytes(100))
        settled(daemon, (2, 0, 0))


@pytest.mark.parametrize("wait", [0.0, 1.0])
def test_interleaved_reads_share_what_moves(daemon: Daemon, client: Client, sink: Sink, wait: float) -> None:
    big, small = 20 * MB, 2 * MB
    client.request("r", ttft_left_s=60)
    with dial(daemon.pair) as s:
        client.transfer("big", s, big, stage=Stage.P2D, request="r", interleaved=True)
        assert client.flush(5)
        s.sendall(bytes(5 * MB))
        time.sleep(wait)
        client.transfer("small", s, small, stage=Stage.P2D, request="r", interleaved=True)
        assert client.flush(5)
        s.sendall(bytes(2 * small))
        client.done(transfer="small")
        wait_for(lambda: list(transfers(daemon)) == ["big"], "the small one to be done")
        s.sendall(bytes(big - 5 * MB - small - 10))
        wait_for(lambda: sink.received == big + small - 10, "arrival")
        time.sleep(0.1)
        assert list(transfers(daemon)) == ["big"]
        s.sendall(bytes(10))
        settled(daemon, (2, 0, 0))


def test_done_of_what_has_expired(daemon: Daemon, client: Client, events: list[Event]) -> None:
    client.request("r", ttft_left_s=0.1, ttl_s=0.2)
    client.transfer("t", tuple_of(daemon.pair.addr_b, PORT), MB, stage=Stage.P2D, request="r", ttl_s=0.2)
    assert client.flush(5)
    wait_for(lambda: [e for e in events if e.kind is EventKind.EXPIRED], "expiry")
    client.done(transfer="t")
    client.done(request="r")
    assert client.flush(5)
    assert client.stats.rejected == 0
    assert counted(daemon)[1:] == (0, 1)


# --- several connections ----------------------------------------------------------------------------------------------


def test_one_of_five_connections_carries_all(daemon: Daemon, client: Client, sink: Sink, events: list[Event]) -> None:
    """Each of four requests needs three quarters of the link until it is due."""
    size, rate = 6 * MB, 24 * MB
    there = tuple_of(daemon.pair.addr_b, PORT)
    with contextlib.ExitStack() as stack:
        lanes = [stack.enter_context(dial(daemon.pair)) for _ in range(5)]
        for i in range(4):
            client.request(f"r{i}", ttft_left_s=size / rate * 4 / 3 + 0.1)
            client.transfer(f"t{i}", there, size, stage=Stage.P2D, request=f"r{i}")
            assert client.flush(5)
            lanes[2].sendall(bytes(size))
            client.done(request=f"r{i}")
            wait_for(lambda i=i: sink.received == (i + 1) * size, "arrival")  # type: ignore[misc]
        settled(daemon, (4, 4, 0))
        assert not events
        # Two at a time: neither ends before its bytes have gone.
        client.request("s", ttft_left_s=60)
        for name in ("first", "second"):
            client.transfer(name, there, 5 * MB, stage=Stage.P2D, request="s")
        assert client.flush(5)
        lanes[4].sendall(bytes(5 * MB))
        wait_for(lambda: list(transfers(daemon)) == ["second"], "the first")
        lanes[0].sendall(bytes(3 * MB))
        wait_for(lambda: transfers(daemon).get("second", 0) <= 2 * MB, "three of five")
        time.sleep(0.2)
        assert transfers(daemon) == {"second": 2 * MB}
        lanes[1].sendall(bytes(2 * MB))
        settled(daemon, (6, 4, 0))


# --- ends -------------------------------------------------------------------------------------------------------------


def test_only_a_reset_is_gone(daemon: Daemon, client: Client, sink: Sink, events: list[Event]) -> None:
    client.request("r", ttft_left_s=60)
    s = dial(daemon.pair)
    client.transfer("a", s, MB, stage=Stage.P2D, request="r")
    client.transfer("b", s, 40 * MB, stage=Stage.P2D, request="r")
    assert client.flush(5)
    s.sendall(bytes(MB))
    wait_for(lambda: list(transfers(daemon)) == ["b"], "the first")
    sink.paused = True
    s.sendall(bytes(100 * KB))
    sink.reset()
    wait_for(lambda: events, "the word")
    assert [(e.kind, e.transfer_id) for e in events] == [(EventKind.CONNECTION_GONE, "b")]
    assert counted(daemon)[0] == 1
    s.close()


def test_a_daemon_killed_when_a_transfer_is_nearly_through(netns_pair: NetnsPair, sink: Sink, tmp_path: Path) -> None:
    size, seen = 50 * MB, list[Event]()
    with running(Daemon(netns_pair, tmp_path)) as daemon, daemon.client(on_event=seen.append) as client:
        with dial(netns_pair) as s:
            assert client.flush(20)
            client.request("r", ttft_left_s=size / (24 * MB) + 4 * WAIT_FACTOR)
            client.transfer("t", s, size, stage=Stage.P2D, request="r")
            assert client.flush(5)
            s.sendall(bytes(size * 99 // 100))
            wait_for(lambda: sink.received >= size * 95 // 100, "most of it")
            daemon.end(signal.SIGKILL)
            daemon.start()
            wait_for(lambda: shown(daemon, s) is not None, "it to be announced again")
            wait_for(lambda: transfers(daemon).get("t", size) <= size // 100, "what is left to be known")
            s.sendall(bytes(size - size * 99 // 100))
            client.done(request="r")
            settled(daemon, (1, 1, 0))
        assert not [e for e in seen if e.kind is EventKind.INFEASIBLE]
