# SPDX-License-Identifier: Apache-2.0
"""A reply comes when the kernel obeys: after the engine has ticked, and has found a new selector's connections."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from support.daemons import Api, Running, connected
from support.waiting import WAIT_S, wait_for

from mfsd.api import hints
from mfsd.client import cookie_of
from mfsd.v1 import hints_pb2 as pb

if TYPE_CHECKING:
    import socket

    from mfsd.ground.model import Selector

REQUEST = pb.Hint(request=pb.Request(id="r", ttft_left_us=600_000_000))


def transfer(name: str, selector: pb.Selector, stage: Any = pb.STAGE_P2D) -> pb.Hint:
    return pb.Hint(transfer=pb.Transfer(id=name, request_id="r", stage=stage, bytes=1000, selector=selector))


def to(sock: socket.socket) -> pb.Selector:
    """All connections to where this one goes."""
    host, port = sock.getpeername()
    return pb.Selector(tuple=pb.Tuple(dst_addr=host, dst_port=pb.PortRange(first=port)))


def band_of(daemon: Running, sock: socket.socket) -> str:
    def read(engine: Any) -> str:
        conn = engine.connections.by_cookie[cookie_of(sock)]
        return str(engine.steering.bands.bands[int(engine.connections.table.band[conn.slot])].name)

    return daemon.ask(read)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replies wait for as long as it takes, on a busy machine, too; that they do not is another test's matter."""
    for name in ("SETTLE_S", "LOOK_S"):
        monkeypatch.setattr(hints, name, WAIT_S)


@pytest.fixture
def slow(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon that does not tick any more."""
    ticker = running.daemon.ticker
    monkeypatch.setattr(ticker, "poke", lambda **_: None)
    monkeypatch.setattr(ticker, "_period", lambda: 3600.0)
    ticks = ticker.count
    wait_for(lambda: ticker.count > ticks)


@pytest.mark.usefixtures("patient")
def test_what_a_hint_says_is_in_the_table_when_it_is_answered(
    api: Api, running: Running, connection: tuple[socket.socket, socket.socket]
) -> None:
    sock = connection[0]
    for n in range(20):
        stage = pb.STAGE_COLLECTIVE if n % 2 else pb.STAGE_P2D
        last = pb.Hint(cancellation=pb.Cancellation(transfer_id=f"t{n - 1}"))
        api.send(REQUEST, last, transfer(f"t{n}", pb.Selector(cookie=cookie_of(sock)), stage))
        assert (band_of(running, sock) == "level 1") == bool(n % 2)


@pytest.mark.usefixtures("patient")
def test_what_a_new_selector_means_is_found_when_it_is_answered(
    api: Api, running: Running, connection: tuple[socket.socket, socket.socket]
) -> None:
    sock = connection[0]
    mark = pb.Hint(connection=pb.ConnectionMark(selector=to(sock), stage=pb.STAGE_COLLECTIVE))
    reply = api.send(mark)
    assert [(m.index, m.connections) for m in reply.matched] == [(0, 1)]
    assert band_of(running, sock) == "level 1"
    elsewhere = pb.Selector(tuple=pb.Tuple(dst_addr="10.9.9.9"))
    reply = api.send(REQUEST, mark, transfer("a", to(sock)), transfer("b", elsewhere), transfer("c", elsewhere))
    assert [(m.index, m.connections) for m in reply.matched] == [(1, 1), (3, 0)]
    columns = pb.TransferColumns(ids=["d"], stage=[pb.STAGE_BACKGROUND], bytes=[1], selectors=[to(connection[1])])
    api.send(transfers=columns)
    band_of(running, connection[1])  # it is known


def test_a_search_that_takes_long_delays_no_reply_for_long(
    api: Api, running: Running, connection: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on = threading.Event()
    sockets: Any = running.daemon.engine.connections.sockets
    look = sockets._look

    def slowly(selectors: list[Selector], since: float) -> None:
        assert goes_on.wait(WAIT_S)
        look(selectors, since)

    monkeypatch.setattr(sockets, "_look", slowly)
    began = time.monotonic()
    mark = pb.Hint(connection=pb.ConnectionMark(selector=to(connection[0]), stage=pb.STAGE_COLLECTIVE))
    reply = api.send(mark)
    took = time.monotonic() - began
    goes_on.set()
    assert (reply.accepted, list(reply.matched)) == (1, [])  # nobody knows yet
    assert took >= 0.1
    wait_for(lambda: running.ask(lambda e: len(e.connections)))


@pytest.mark.usefixtures("slow")
def test_a_tick_that_does_not_come_delays_no_reply_for_long(api: Api, running: Running) -> None:
    before = running.daemon.ticker.count
    began = time.monotonic()
    assert api.send(REQUEST).accepted == 1
    assert time.monotonic() - began >= 0.02
    assert running.daemon.ticker.count == before


@pytest.mark.usefixtures("slow")
def test_batches_on_their_way_share_one_wait(api: Api, running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    count, ticker, waits = 200, running.daemon.ticker, []
    ticked, counters = ticker.ticked, running.daemon.engine.books.counters
    before = counters.hints_accepted

    async def when_all_have_come() -> None:
        waits.append(1)
        while counters.hints_accepted < before + count:  # noqa: ASYNC110 - a counter, which has no events
            await asyncio.sleep(0.001)
        await ticked()

    monkeypatch.setattr(ticker, "ticked", when_all_have_come)
    batches = (api.batch(REQUEST, seq=n) for n in range(1, count + 1))
    replies = list(api.hints.Stream(batches, timeout=WAIT_S))
    assert [r.seq for r in replies] == list(range(1, count + 1))
    assert 1 <= len(waits) <= 3


@pytest.mark.usefixtures("slow")
def test_what_has_changed_nothing_waits_for_nothing(
    api: Api, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running.daemon.ticker, "ticked", None)  # which nobody could wait for
    count = 200
    for _ in range(count):
        api.send(pb.Hint())
    assert running.ask(lambda e: e.books.counters.hints_rejected) == count


def test_a_connection_that_is_made_later_is_in_its_band_too(api: Api, running: Running) -> None:
    with connected() as (first, _):
        api.send(pb.Hint(connection=pb.ConnectionMark(selector=to(first), stage=pb.STAGE_COLLECTIVE)))
        port = first.getpeername()[1]
    with connected(port) as (second, _):
        wait_for(lambda: running.ask(lambda e: cookie_of(second) in e.connections.by_cookie))
        wait_for(lambda: band_of(running, second) == "level 1")
