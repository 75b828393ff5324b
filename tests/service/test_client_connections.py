# SPDX-License-Identifier: Apache-2.0
"""How a worker names its connections, and what is said of those that can't be hinted."""

from __future__ import annotations

import asyncio
import re
import socket
import time
from typing import TYPE_CHECKING, Any

import pytest
import uvloop
from support.daemons import Running, connected, disconnect
from support.waiting import WAIT_S, wait_for

from mfsd.client import Client, Cookie, Fd, Rejected, Stage, Transfer, cookie_of, process_peer, tuple_of
from mfsd.client.selectors import name
from mfsd.ground.model import CookieSelector, ProcessSelector, TupleSelector

if TYPE_CHECKING:
    from collections.abc import Callable


def streams(daemon: Running) -> dict[str, Any]:
    """What each transfer of the only session is on."""
    return daemon.ask(
        lambda e: {t.id: t.stream.selector for s in e.books.sessions.values() for t in s.transfers.values()}
    )


# --- what may be named ------------------------------------------------------------------------------------------------


def test_sockets_descriptors_and_cookies_are_told_apart_by_type(
    running: Running, connection: tuple[socket.socket, socket.socket]
) -> None:
    sock = connection[0]
    with Client(target=running.target) as client:
        same: list[Any] = [sock, Fd(sock.fileno()), Cookie(cookie_of(sock))]
        for i, one in enumerate(same):
            client.transfer(f"t{i}", one, 100, stage=Stage.BACKGROUND)
        assert client.flush(WAIT_S)
        cookie = CookieSelector(cookie_of(sock))
        assert streams(running) == {"t0": cookie, "t1": cookie, "t2": cookie}
        with pytest.raises(TypeError, match=rf"write Fd\({sock.fileno()}\) for a descriptor, or Cookie"):
            client.transfer("t", sock.fileno(), 100, stage=Stage.BACKGROUND)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="str names no connection"):
            client.mark("eth0", Stage.COLLECTIVE)  # type: ignore[arg-type]
    assert sock.fileno() >= 0  # a borrowed descriptor stays open
    assert sock.getpeername()


class OnlyFileno:
    """A stranger's socket class."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def fileno(self) -> int:
        return self._sock.fileno()


class OnlyGetsockopt:
    def __init__(self, sock: socket.socket) -> None:
        self.getsockopt = sock.getsockopt


def test_anything_that_is_a_socket_will_do(connection: tuple[socket.socket, socket.socket]) -> None:
    sock = connection[0]
    sock.sendall(b"x" * 1000)
    assert name(sock) == name(OnlyFileno(sock)) == name(Fd(sock.fileno()))
    assert name(OnlyGetsockopt(sock)).selector == CookieSelector(cookie_of(sock))  # type: ignore[arg-type]


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_the_sockets_of_event_loops(running: Running, loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    said: dict[str, Any] = {}

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async def work(client: Client) -> int:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        sock = writer.get_extra_info("socket")
        writer.write(b"x" * 1000)
        await writer.drain()
        client.transfer("t", sock, 100, stage=Stage.BACKGROUND)
        client.mark(sock, Stage.COLLECTIVE)
        assert await asyncio.to_thread(client.flush, WAIT_S)
        said.update(streams(running))
        assert name(sock).position == 1001
        cookie = cookie_of(sock)
        writer.write_eof()
        assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()
        server.close()
        await server.wait_closed()
        return cookie

    with Client(target=running.target) as client, asyncio.Runner(loop_factory=loop) as runner:
        cookie = runner.run(work(client))
        assert client.stats.rejected == 0
        assert said == {"t": CookieSelector(cookie)}


def test_a_closed_socket_is_an_error_at_the_call(connection: tuple[socket.socket, socket.socket]) -> None:
    sock = connection[0]
    sock.close()
    for gone in (sock, OnlyFileno(sock), Fd(1 << 20), Fd(-1)):
        with pytest.raises(OSError, match="Bad file descriptor"), Client(target="") as client:
            client.transfer("t", gone, 1, stage=Stage.BACKGROUND)


# --- addresses --------------------------------------------------------------------------------------------------------


def test_addresses_are_as_on_the_wire() -> None:
    plain = tuple_of("10.0.0.2", 6000)
    assert tuple_of("::ffff:10.0.0.2", 6000) == plain
    assert tuple_of("10.0.0.2", 6000, "0.0.0.0") == plain  # noqa: S104 - any address
    assert tuple_of("fd00::1", 5, "::") == tuple_of("fd00::1", 5)
    assert tuple_of("::ffff:10.0.0.2", 1, "::ffff:10.0.0.1", 2) == tuple_of("10.0.0.2", 1, "10.0.0.1", 2)
    assert process_peer(7, "::ffff:10.0.0.2") == process_peer(7, "10.0.0.2")
    assert process_peer(7, "::ffff:10.0.0.0/120") == process_peer(7, "10.0.0.0/24")
    assert process_peer(7, "fd00::/64").remote is not None
    assert isinstance(process_peer(7), ProcessSelector)
    assert isinstance(plain, TupleSelector)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: tuple_of("0.0.0.0", 1), "dst_addr: 0.0.0.0 is no peer's address"),  # noqa: S104 - refused
        (lambda: tuple_of("::", 1), "dst_addr: :: is no peer's address"),
        (lambda: tuple_of("224.0.0.1", 1), "no peer's address"),
        (lambda: tuple_of("", 1), "dst_addr: is empty"),
        (lambda: tuple_of("host", 1), "'host' is no IP address"),
        (lambda: tuple_of("fe80::1%eth0", 1), "has a zone"),
        (lambda: tuple_of("fd00::1", 1, "10.0.0.1"), "different families"),
        (lambda: tuple_of("10.0.0.2", 70_000), "dst_port: 70000 is no port;"),
        (lambda: tuple_of("10.0.0.2", -1), "dst_port: -1 is no port;"),
        (lambda: tuple_of("10.0.0.2", "80"), "dst_port: '80' is no whole number"),  # type: ignore[arg-type]
        (lambda: tuple_of("10.0.0.2", (1, 2, 3)), "dst_port: (1, 2, 3) is no whole number"),  # type: ignore[arg-type]
        (lambda: process_peer("7"), "pid: '7' is no whole number"),  # type: ignore[arg-type]
        (lambda: tuple_of("10.0.0.2", 1, protocol=6000), "unknown protocol"),
        (lambda: tuple_of("10.0.0.2", 1, protocol=17), "UDP needs both addresses"),
        (lambda: process_peer(0), "0 is no process id"),
        (lambda: process_peer(7, "0.0.0.0"), "no peer's address"),  # noqa: S104 - refused
        (lambda: process_peer(7, "10.0.0.7/24"), "has host bits set"),
    ],
)
def test_what_could_never_match_is_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        make()


# --- where a transfer begins ------------------------------------------------------------------------------------------


def test_the_position_is_what_tcp_counts(connection: tuple[socket.socket, socket.socket]) -> None:
    client, server = connection
    assert name(client).position == 1  # its SYN
    assert name(server).position == 0  # nothing yet, which is as good as unknown
    for sock, base in ((client, 1), (server, 0)):
        sock.setblocking(False)
        written = 0
        for _ in range(1000):  # until neither of the buffers takes more
            try:
                written += sock.send(b"x" * 65536)
            except BlockingIOError:
                break
        assert written > 65536
        assert name(sock).position == base + written
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        assert (name(udp).position, name(udp).fault) == (0, "")
    with socket.socket() as unconnected:
        assert name(unconnected).position == 0
    with connected() as (sock, _):
        sock.sendall(bytes(1000))
        disconnect(sock)
        assert name(sock).position == 0


def test_a_socket_in_the_place_of_one_that_is_gone_is_not_taken_for_it() -> None:
    places: dict[int, list[int]] = {}
    for _ in range(50):
        with socket.socket() as sock:
            assert name(sock).selector == name(sock).selector == CookieSelector(cookie_of(sock))
            places.setdefault(id(sock), []).append(cookie_of(sock))
        del sock
    assert len(places) < 50  # or nothing was tried
    assert all(len(set(cookies)) == len(cookies) for cookies in places.values())


@pytest.mark.parametrize("writes", [False, True])
def test_after_a_restart_what_is_still_being_written_is_announced_however_old(
    start: Callable[..., Running], *, writes: bool
) -> None:
    first = start()
    with connected() as (sock, _), Client("worker", first.target) as client:
        client.transfer("weights", sock, 1_000_000, stage=Stage.BACKGROUND, ttl_s=0.05)
        assert client.flush(WAIT_S)
        if writes:
            sock.sendall(bytes(100_000))
        first.stop()
        time.sleep(0.1)  # its time to live is over
        start()
        wait_for(lambda: client.stats.connects == 2 and client.flush(1))
        assert client.stats.announced_again == int(writes)


def test_after_a_restart_what_is_left_is_announced(start: Callable[..., Running]) -> None:
    """Of 30 MB in two transfers the first has gone, and nine tenths of the other have, when another daemon comes."""
    size, more = 10_000_000, 20_000_000
    first = start()
    with connected() as (sock, peer), Client("worker", first.target) as client:

        def move(octets: int) -> None:
            sock.setblocking(True)
            while octets:
                part = min(octets, 65536)
                sock.sendall(b"x" * part)
                while part:
                    part -= len(peer.recv(part))
                    octets -= min(octets, 65536) if not part else 0

        client.request("r", ttft_left_s=60.0)
        move(5_000_000)  # of before
        client.transfer("a", sock, size, stage=Stage.P2D, request="r")
        client.transfer("b", sock, more, stage=Stage.P2D, request="r")
        assert client.flush(WAIT_S)
        move(size)
        client.done(transfer="a")
        assert client.flush(WAIT_S)
        move(more * 9 // 10)
        first.stop()
        second = start()
        wait_for(lambda: client.stats.connects == 2 and client.flush(1))

        def left() -> list[tuple[str, float]]:
            def read(engine: Any) -> list[tuple[str, float]]:
                view = engine.steering.views(second.daemon.ticker._clock()).transfers
                return [(t.id, float(view.left[row])) for row, t in enumerate(engine.books.transfers.objects)]

            return second.ask(read)

        wait_for(lambda: left() == [("b", more // 10)])
        move(more // 10)
        wait_for(lambda: second.ask(lambda e: e.books.counters.transfers_completed) == 1)
        assert client.stats.rejected == 0


# --- many at once -----------------------------------------------------------------------------------------------------


def test_many_at_once_go_by_columns(running: Running, connection: tuple[socket.socket, socket.socket]) -> None:
    sock, rows = connection[0], []
    apply = running.daemon.engine.transfers

    def noted(session: Any, columns: Any, now: float) -> Any:
        rows.append(len(columns))
        return apply(session, columns, now)

    running.daemon.engine.transfers = noted  # type: ignore[method-assign]
    with Client(target=running.target, batch=200) as client:
        client.request("r", ttft_left_s=60.0)
        client.transfers(Transfer(f"t{i}", sock, 100, Stage.P2D, "r", layer=i, interleaved=True) for i in range(500))
        client.cancel(transfer="t7")
        client.transfer("last", Fd(sock.fileno()), 5, stage=Stage.KV_REUSE, request="r", deadline_s=3.0, ttl_s=1.0)
        assert client.flush(WAIT_S)
        assert (client.stats.accepted, client.stats.rejected) == (503, 0)
    assert sum(rows) == 500
    wanted = {f"t{i}" for i in range(500)} - {"t7"} | {"last"}
    assert running.ask(lambda e: {t.id for t in e.books.transfers.objects} | {"last"}) <= wanted
    assert running.ask(lambda e: e.books.counters.hints_accepted) == 503


def test_a_bad_one_among_many_is_told(running: Running) -> None:
    seen: list[Rejected] = []
    with Client(target=running.target, on_rejected=seen.append) as client:
        client.request("r", ttft_left_s=60.0)
        client.transfers(Transfer(f"t{i}", Cookie(1), 0 if i == 13 else 5, Stage.P2D, "r") for i in range(20))
        assert client.flush(WAIT_S)
        wait_for(lambda: seen)
        assert (client.stats.accepted, client.stats.rejected) == (20, 1)
    assert getattr(seen[0].hint, "id", None) == "t13"
    assert seen[0].message.startswith("transfers.bytes[12]: 0 bytes") or "bytes[13]" in seen[0].message
