# SPDX-License-Identifier: Apache-2.0
"""What the engine is told of sockets when something goes wrong: never that they are gone."""

from __future__ import annotations

import ipaddress
import os
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from support.daemons import connected
from support.waiting import WAIT_S, wait_for

from mfsd.client import cookie_of, process_peer, tuple_of
from mfsd.daemon import pace
from mfsd.daemon.sockets import HostSockets
from mfsd.engine.sockets import Found
from mfsd.ground.model import Endpoints, Maker
from mfsd.host.makers import Census
from mfsd.host.sockets import DiagError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mfsd.host.makers import Makers


@pytest.fixture
def host() -> Iterator[HostSockets]:
    made = HostSockets(None)
    yield made
    made.close()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    with connected() as both:
        yield both


def named(sock: socket.socket) -> tuple[int, Endpoints]:
    (here, sport), (there, dport) = sock.getsockname(), sock.getpeername()
    return cookie_of(sock), Endpoints(ipaddress.ip_address(here), sport, ipaddress.ip_address(there), dport)


def answers(host: HostSockets) -> list[Found]:
    got: list[Found] = []

    def some() -> bool:
        got.extend(e for e in host.events() if isinstance(e, Found))
        return bool(got)

    wait_for(some)
    return got


@pytest.mark.parametrize("error", [DiagError(5, "no answer"), ValueError("a fault of ours"), MemoryError()])
def test_a_search_that_fails_says_so_and_the_next_one_is_made(
    host: HostSockets, pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any) -> Any:
        raise error

    selector = tuple_of("127.0.0.1", pair[0].getpeername()[1])
    with monkeypatch.context() as broken:
        broken.setattr(host._diag, "resolve_many", fail)
        host.look([selector])
        assert answers(host) == [Found(selector, None)]
    host.look([selector])
    (found,) = answers(host)
    assert [s.cookie for s in found.sockets or ()] == [cookie_of(pair[0])]


def test_tcp_that_does_not_answer_is_not_a_socket_that_is_gone(
    host: HostSockets, pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise DiagError(5, "no answer")

    asked = [named(pair[0])]
    assert set(host.progress(asked) or ()) == {cookie_of(pair[0])}
    monkeypatch.setattr(host._asked, "tcp_progress", fail)
    assert host.progress(asked) is None


def test_progress_does_not_wait_for_a_listing(host: HostSockets, pair: tuple[socket.socket, socket.socket]) -> None:
    going, go_on = threading.Event(), threading.Event()
    dump = host._diag._diag.dump

    def slow(*arguments: Any, **more: Any) -> Any:
        with host._diag._diag._sock._lock:  # as a listing of very many does
            going.set()
            go_on.wait(20)
        return dump(*arguments, **more)

    host._diag._diag.dump = slow  # type: ignore[method-assign]
    host.look([tuple_of("127.0.0.1", 1)])
    try:
        assert going.wait(20)
        answer: list[Any] = []
        loop = threading.Thread(target=lambda: answer.append(host.progress([named(pair[0])])), daemon=True)
        loop.start()
        loop.join(20)
        assert answer, "it waited"
        assert set(answer[0]) == {cookie_of(pair[0])}
    finally:
        go_on.set()


def test_nobody_waits_for_a_listing_of_udp_sockets(host: HostSockets, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any user may have very many of them, and hint cookies that nobody has."""
    listings: list[int] = []
    go_on = threading.Event()
    listed = host._diag.datagrams

    def slowly() -> set[int]:
        listings.append(threading.get_ident())
        go_on.wait(WAIT_S)
        return listed()

    monkeypatch.setattr(host._datagrams, "_listed", slowly)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        theirs, nobodys = cookie_of(sock), 2**62
        for _ in range(100):
            assert host.datagram(theirs) is None
            assert host.datagram(nobodys) is None
        go_on.set()
        said: dict[int, bool] = {}

        def all_said() -> bool:
            wanted = {theirs, nobodys} - said.keys()
            said.update({c: d for c in wanted if (d := host.datagram(c)) is not None})
            return len(said) == 2

        wait_for(all_said)
        assert said == {theirs: True, nobodys: False}
    assert len(listings) <= 2
    assert threading.get_ident() not in listings


def test_a_socket_bound_to_a_device_is_known_to_both(host: HostSockets) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as sock:
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo\0")
        except PermissionError:
            pytest.skip("needs to bind to a device")
        sock.connect(listener.getsockname())
        host.look([tuple_of("127.0.0.1", listener.getsockname()[1])])
        (found,) = answers(host)
        assert found.sockets
        assert set(host.progress([named(sock)]) or ()) == {cookie_of(sock)}


def test_slow_searches_for_processes_do_not_pile_up(host: HostSockets, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of the thread beside them would wait for all of them."""
    looked: list[float] = []
    go_on = threading.Event()

    def slowly(*_: Any) -> dict[Maker, Makers]:
        looked.append(time.monotonic())
        go_on.wait(WAIT_S)
        return {}

    monkeypatch.setattr(pace, "FAMILIES_S", 0.0)
    monkeypatch.setattr(Census, "look", slowly)
    host.watch(process_peer(os.getpid()), -1, 3, 2, 2**62)
    for _ in range(100):
        host.events()
    wait_for(lambda: looked, "the first one")
    monkeypatch.setattr(pace, "FAMILIES_S", 600.0)
    host.look([tuple_of("127.0.0.1", 1)])
    go_on.set()
    answers(host)
    assert len(looked) <= 2
