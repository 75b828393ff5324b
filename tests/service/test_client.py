# SPDX-License-Identifier: Apache-2.0
"""The SDK against real daemons: never waits, reconnects, tells a new daemon what is alive."""

from __future__ import annotations

import math
import os
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from support.daemons import Running, connected
from support.waiting import wait_for

from mfsd.client import Client, Cookie, EventKind, Rejected, Stage, Transfer, cookie_of, process_peer, tuple_of
from mfsd.client.encode import COLUMNS
from mfsd.ground.model import (
    Event,
    RequestHint,
    TransferHint,
)

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from pathlib import Path


def known(daemon: Running, what: str) -> set[str]:
    """Names of what the daemon knows of the only session, by kind."""
    return daemon.ask(lambda e: {n for s in e.books.sessions.values() for n in getattr(s, what)})


def token_of(daemon: Running) -> str:
    """That of the client of the session "worker"."""
    maker: Any = daemon.ask(lambda e: e.books.sessions["worker"].maker)
    return str(maker.token)


def test_every_call_arrives(running: Running, connection: tuple[socket.socket, socket.socket]) -> None:
    sock = connection[0]
    with Client("worker", running.target) as client:
        client.request("r", ttft_left_s=5.0, compute_left_s=0.1, ttl_s=3.0)
        client.batch("b", ["r"], layers=4, layer_compute_s=0.01)
        client.layer("b", 2)
        client.transfer("t", sock, 1 << 20, stage=Stage.P2D, request="r", layer=1, deadline_s=4.0, max_defer_s=8.0)
        client.transfer("c", Cookie(cookie_of(sock)), 100, stage=Stage.COLLECTIVE, batch="b")
        client.mark(sock, Stage.COLLECTIVE)
        assert client.flush(20)
        stats = client.stats
        assert (stats.sent, stats.accepted, stats.rejected, stats.dropped) == (6, 6, 0, 0)
        assert known(running, "transfers") == {"t", "c"}
        t, c = running.ask(lambda e: (e.books.transfers.live("hold_until") - e.books.sessions["worker"].seen).tolist())
        assert (7 < t <= 8, c) == (True, math.inf)
        assert running.ask(lambda e: e.books.sessions["worker"].pid) == os.getpid()
        assert running.ask(lambda e: int(e.books.batches.live("current_layer")[0])) == 2
        client.unmark(sock)
        client.cancel(transfer="t")
        client.cancel(batch="b")
        client.cancel(request="r")
        assert client.flush(20)
        assert client.stats.rejected == 0
        assert (known(running, "requests"), known(running, "transfers")) == (set(), set())


def test_a_connection_may_be_named_by_tuple_or_process(
    running: Running, connection: tuple[socket.socket, socket.socket]
) -> None:
    sock = connection[0]
    (src, sport), (dst, dport) = sock.getsockname(), sock.getpeername()
    with Client(target=running.target) as client:
        client.request("r", ttft_left_s=5.0)
        client.transfer("t1", tuple_of(dst, dport, src, sport), 10, stage=Stage.P2D, request="r")
        client.transfer("t2", tuple_of(dst, (dport, dport)), 10, stage=Stage.P2D, request="r")
        client.transfer("t3", process_peer(os.getpid(), dst, dport), 10, stage=Stage.P2D, request="r")
        client.transfer("t4", sock, 10, stage=Stage.P2D, request="r")
        assert client.flush(20)
        assert client.stats.rejected == 0
        cookies = running.ask(lambda e: {c.cookie for c in e.connections.by_slot.values()})
        assert cookies == {cookie_of(sock)}


def test_nonsense_is_refused_at_the_call(connection: tuple[socket.socket, socket.socket]) -> None:
    with Client(target="") as client:
        with pytest.raises(TypeError, match="str names no connection"):
            client.transfer("t", "eth0", 1, stage=Stage.P2D)  # type: ignore[arg-type]
        connection[0].close()
        with pytest.raises(OSError, match="Bad file descriptor"):
            client.mark(connection[0], Stage.COLLECTIVE)
    with pytest.raises(ValueError, match=r"dst_port: 2\.\.1 is no port range"):
        tuple_of("10.0.0.1", (2, 1))
    with pytest.raises(ValueError, match="dst_addr: 'somewhere' is no IP address"):
        tuple_of("somewhere", 1)


def test_rejections_reach_the_worker(running: Running) -> None:
    seen: list[Rejected] = []
    with Client(target=running.target, on_rejected=seen.append) as client:
        client.request("r", ttft_left_s=5.0)
        client.transfer("t", Cookie(1), -1, stage=Stage.P2D, request="r")
        assert client.flush(20)
        wait_for(lambda: seen)
    assert isinstance(seen[0].hint, TransferHint)
    assert seen[0].message.startswith("transfer.bytes: -1 bytes")


NONSENSE: list[tuple[str, Callable[[Client], None]]] = [
    ("size: 1180591620717411303424", lambda c: c.transfer("a", Cookie(1), 1 << 70, stage=Stage.P2D, request="r")),
    ("size: 1.5", lambda c: c.transfer("b", Cookie(1), 1.5, stage=Stage.P2D, request="r")),  # type: ignore[arg-type]
    ("layer: -1", lambda c: c.transfer("c", Cookie(1), 1, stage=Stage.P2D, request="r", layer=-1)),
    ("ttl_s: nan", lambda c: c.transfer("d", Cookie(1), 1, stage=Stage.P2D, request="r", ttl_s=math.nan)),
    ("deadline_s: nan", lambda c: c.transfer("e", Cookie(1), 1, stage=Stage.P2D, request="r", deadline_s=math.nan)),
    ("id: 7", lambda c: c.transfer(7, Cookie(1), 1, stage=Stage.P2D, request="r")),  # type: ignore[arg-type]
    ("request: '\\udc80'", lambda c: c.transfer("f", Cookie(1), 1, stage=Stage.P2D, request="\udc80")),
    ("size: 0.5", lambda c: c.transfers([Transfer("g", Cookie(1), 0.5, Stage.P2D, "r")])),  # type: ignore[arg-type]
    ("ttft_left_s: inf", lambda c: c.request("x", ttft_left_s=math.inf)),
    ("ttl_s: inf", lambda c: c.request("x", ttft_left_s=1.0, ttl_s=math.inf)),
    ("layers: -4", lambda c: c.batch("b", [], layers=-4)),
    ("requests: [1]", lambda c: c.batch("b", [1], layers=4)),  # type: ignore[list-item]
    ("current_layer: 0.5", lambda c: c.layer("b", 0.5)),  # type: ignore[arg-type]
    ("id: 7", lambda c: c.done(transfer=7)),  # type: ignore[arg-type]
    ("stage: 'p2d'", lambda c: c.transfer("h", Cookie(1), 1, stage="p2d", request="r")),  # type: ignore[arg-type]
    ("stage: 'p2d'", lambda c: c.mark(Cookie(1), "p2d")),  # type: ignore[arg-type]
    ("ttft_left_s: '1'", lambda c: c.request("x", ttft_left_s="1")),  # type: ignore[arg-type]
    ("ttft_left_s: None", lambda c: c.request("x", ttft_left_s=None)),
    ("ttft_left_s: None", lambda c: c.request("x")),
    ("no_deadline: is said together", lambda c: c.request("x", ttft_left_s=1.0, no_deadline=True)),
    ("max_defer_s: '1'", lambda c: c.transfers([Transfer("i", Cookie(1), 1, Stage.P2D, "r", max_defer_s="1")])),  # type: ignore[arg-type]
    ("size: True", lambda c: c.transfer("l", Cookie(1), True, stage=Stage.BACKGROUND)),
    ("size: False", lambda c: c.transfers([Transfer("m", Cookie(1), False, Stage.BACKGROUND)])),
    ("layer: True", lambda c: c.transfer("n", Cookie(1), 1, stage=Stage.BACKGROUND, layer=True)),
    ("ttft_left_s: 1000", lambda c: c.request("x", ttft_left_s=10**400)),
    ("ttft_left_s: a huge number", lambda c: c.request("x", ttft_left_s=10**5000)),
    ("deadline_s: 1000", lambda c: c.transfer("o", Cookie(1), 1, stage=Stage.BACKGROUND, deadline_s=10**400)),
    ("max_defer_s: 1000", lambda c: c.transfer("p", Cookie(1), 1, stage=Stage.BACKGROUND, max_defer_s=10**400)),
    ("cookie: 0", lambda c: c.transfer("j", Cookie(0), 1, stage=Stage.BACKGROUND)),
    ("cookie: 18446744073709551616", lambda c: c.transfers([Transfer("k", Cookie(1 << 64), 1, Stage.BACKGROUND)])),
    ("cookie: -1", lambda c: c.mark(Cookie(-1), Stage.COLLECTIVE)),
    ("requests: 'r1'", lambda c: c.batch("b", "r1")),
    ("transfer: is empty", lambda c: c.done()),
    ("transfer: is empty", lambda c: c.cancel(transfer="")),
]


@pytest.mark.parametrize("absent", [False, True], ids=["daemon", "no daemon yet"])
def test_what_can_not_be_sent_is_refused_and_stops_nothing_else(
    tmp_path: Path, start: Callable[..., Running], *, absent: bool
) -> None:
    daemon = None if absent else start()
    seen: list[Rejected] = []
    with Client(target=f"unix:{tmp_path / 'mfsd.sock'}", on_rejected=seen.append) as client:
        for words, say in NONSENSE:
            say(client)
            assert seen[-1].message.startswith(words), seen[-1].message
        assert len(seen) == len(NONSENSE) == client.stats.rejected
        client.request("r", ttft_left_s=5.0)
        client.transfer("t", Cookie(1), 1, stage=Stage.P2D, request="r")
        daemon = daemon or start()
        assert client.flush(20)
        assert known(daemon, "transfers") == {"t"}


def test_a_hint_that_can_not_be_written_after_all_takes_no_other_with_it(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mfsd.client.client.fault", lambda _: "")  # as if one more kind of nonsense had been forgotten
    with Client(target=running.target) as client:
        many = [Transfer(f"t{i}", Cookie(1), 1, Stage.BACKGROUND) for i in range(COLUMNS)]
        many[3] = Transfer("odd", Cookie(1), 1, "odd")  # type: ignore[arg-type]
        client.transfers(many)
        client.request("odd", ttft_left_s=math.nan)
        client.request("r", ttft_left_s=5.0)
        assert client.flush(20)
        assert client.stats.dropped == 2
        assert known(running, "transfers") == {t.id for t in many} - {"odd"}
        assert known(running, "requests") == {"r"}


def test_nan_is_no_time_to_wait(running: Running) -> None:
    with Client(target=running.target) as client:
        for wait in (client.flush, client.close):
            with pytest.raises(ValueError, match="timeout: nan"):
                wait(math.nan)
        assert client.flush(20)


def test_where_the_daemon_listens_may_be_a_path_and_is_no_session(running: Running) -> None:
    path = running.target.removeprefix("unix:")
    with Client(target=path) as client:
        assert client.flush(20)
    for wrong in (path, running.target, 7):
        with pytest.raises(ValueError, match=r"session = .*target="):
            Client(wrong)  # type: ignore[arg-type]


def test_events_reach_the_worker_and_a_faulty_callback_does_no_harm(running: Running) -> None:
    seen: list[Event] = []

    def callback(event: Event) -> None:
        seen.append(event)
        raise RuntimeError("faulty")

    with Client(target=running.target, on_event=callback) as client:
        for name in ("t1", "t2"):
            client.request("r", ttft_left_s=600.0)
            with connected() as (sock, _):
                client.transfer(name, sock, 1000, stage=Stage.P2D, request="r")
                assert client.flush(20)
            wait_for(lambda name=name: name in {e.transfer_id for e in seen})  # type: ignore[misc]
    assert {e.kind for e in seen} == {EventKind.CONNECTION_GONE}


# --- without a daemon, and with another one ---------------------------------------------------------------------------


def test_without_a_daemon_nothing_waits_and_the_next_daemon_hears_what_is_alive(
    tmp_path: Path, start: Callable[..., Running]
) -> None:
    with Client(target=f"unix:{tmp_path / 'mfsd.sock'}") as client:
        for name in ("over", "alive"):
            client.request(name, ttft_left_s=60.0)
            client.transfer(f"{name}/t", tuple_of("10.1.2.3", 1), 10, stage=Stage.P2D, request=name)
        client.done(transfer="over/t")
        client.done(request="over")
        assert not client.flush(0)
        assert not client.stats.connected
        daemon = start()
        wait_for(lambda: client.flush(1))
        assert (known(daemon, "requests"), known(daemon, "transfers")) == ({"alive"}, {"alive/t"})
        assert client.stats.rejected == 0


def test_a_new_epoch_hears_again_what_is_alive_and_only_that(start: Callable[..., Running]) -> None:
    first = start()
    with Client("worker", first.target) as client:
        client.batch("b", ["r1", "r2"], layers=8)
        client.mark(tuple_of("10.1.2.4", 9), Stage.COLLECTIVE)
        for name in ("r1", "r2", "r3"):
            client.request(name, ttft_left_s=60.0, batch="b")
            client.transfer(f"{name}/t", tuple_of("10.1.2.3", 1), 10, stage=Stage.P2D, request=name)
        client.layer("b", 5)
        assert client.flush(20)
        epoch = first.ask(lambda e: e.epoch)
        first.stop()
        wait_for(lambda: not client.stats.connected)
        client.cancel(transfer="r3/t")  # while nobody listens
        client.cancel(request="r3")
        client.request("r4", ttft_left_s=60.0)
        second = start()
        assert second.ask(lambda e: e.epoch) != epoch
        wait_for(lambda: client.flush(1))
        assert known(second, "requests") == {"r1", "r2", "r4"}
        assert known(second, "transfers") == {"r1/t", "r2/t"}
        assert known(second, "batches") == {"b"}
        assert second.ask(lambda e: len(e.books.sessions["worker"].marks)) == 1
        assert second.ask(lambda e: int(e.books.batches.live("current_layer")[0])) == 5
        stats = client.stats
        assert stats.connects == 2
        assert stats.announced_again >= 7
        assert stats.rejected == 0


def test_the_same_daemon_gets_what_it_has_not_answered(running: Running) -> None:
    with Client("worker", running.target) as client:
        client.request("r1", ttft_left_s=60.0)
        assert client.flush(20)
        link = client._link
        assert link is not None
        token = token_of(running)
        # The connection breaks, the daemon lives on.
        stream = link._stream
        assert stream is not None
        stream.call.cancel()
        wait_for(lambda: link._stream is not stream)
        client.request("r2", ttft_left_s=60.0)
        client.cancel(request="r1")
        wait_for(lambda: client.flush(1))
        assert known(running, "requests") == {"r2"}
        assert client.stats.announced_again == 0
        assert token_of(running) == token  # it need not introduce itself again


def test_the_queue_is_bounded_and_the_oldest_goes(tmp_path: Path, start: Callable[..., Running]) -> None:
    with Client(target=f"unix:{tmp_path / 'mfsd.sock'}", queue=4) as client:
        for n in range(10):
            client.request(f"r{n}", ttft_left_s=60.0)
        wait_for(lambda: client.stats.dropped == 6)
        daemon = start()
        wait_for(lambda: client.flush(1))
        assert known(daemon, "requests") == {"r6", "r7", "r8", "r9"}


def test_batches_shrink_to_what_the_daemon_takes(start: Callable[..., Running]) -> None:
    daemon = start(limits={"max_hints_per_batch": 2})
    with Client(target=daemon.target, batch=64) as client:
        assert client.flush(20)
        link = client._link
        assert link is not None
        with link._changed:  # so that they go as one batch
            link._queue.extend(RequestHint(f"r{n}", time.monotonic() + 60, ttl=0) for n in range(20))
            link._changed.notify_all()
        wait_for(lambda: known(daemon, "requests") == {f"r{n}" for n in range(20)})


def test_several_threads_may_use_one_client(running: Running) -> None:
    with Client(target=running.target) as client:

        def work(worker: int) -> None:
            for n in range(200):
                client.request(f"{worker}/{n}", ttft_left_s=60.0)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert client.flush(20)
        assert running.ask(lambda e: e.books.requests.n) == 800


def test_the_child_of_a_fork_sends_nothing(running: Running) -> None:
    with Client(target=running.target) as client:
        client.request("parent", ttft_left_s=60.0)
        assert client.flush(20)
        child = os.fork()
        if child == 0:
            client.request("child", ttft_left_s=60.0)
            client.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        client.request("parent2", ttft_left_s=60.0)
        assert client.flush(20)
        assert known(running, "requests") == {"parent", "parent2"}


def test_the_target_comes_from_the_environment(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MFSD_TARGET", running.target)
    with Client() as client:
        client.request("r", ttft_left_s=60.0)
        assert client.flush(20)
    monkeypatch.setenv("MFSD_TARGET", "")
    with Client() as client:
        client.request("r", ttft_left_s=60.0)
        assert client.flush(0)
        assert client.stats.sent == 0


def test_close_is_idempotent_and_later_calls_do_nothing(running: Running) -> None:
    client = Client(target=running.target)
    client.request("r", ttft_left_s=60.0)
    client.close(timeout=20)
    client.close()
    client.request("r2", ttft_left_s=60.0)
    assert client.flush()
    assert known(running, "requests") <= {"r"}
