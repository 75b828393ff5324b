# SPDX-License-Identifier: Apache-2.0
"""What tests of clients' habits share: a receiver for any number of connections, and what a daemon makes of them."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Final, Self

from mfsd.client import Stage, cookie_of
from mfsd.lab.hosts.tcp import reset_at_close
from mfsd.v1 import control_pb2 as pb
from support.rig import RATE_MBIT
from support.waiting import WAIT_S, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mfsd.client import Client
    from support.namespaces import NetnsPair
    from support.rig import Daemon

KB: Final = 1000
MB: Final = 1_000_000
KIB: Final = 1 << 10
PORT: Final = 6000
WRONG: Final = 0.005
"""Share of hinted bytes that may be in another band."""


class Sink:
    """Accepts connections in namespace ``b`` and reads what comes, until it is closed."""

    def __init__(self, pair: NetnsPair, *, v6: bool = False, protocol: int = 0) -> None:
        family = socket.AF_INET6 if v6 else socket.AF_INET

        def listen() -> socket.socket:
            s = socket.socket(family, socket.SOCK_STREAM, protocol)
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            s.bind(("::" if v6 else "0.0.0.0", PORT))  # noqa: S104 - of a throw-away namespace
            s.listen(4096)
            s.setblocking(False)
            return s

        self.listener = pair.call(pair.b, listen)
        self.accepted: list[socket.socket] = []
        self.received = 0
        self.paused = False
        """Nothing is read meanwhile, so that windows close."""
        self._reading = threading.Lock()
        self._stop = threading.Event()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self.listener, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            for key, _ in self._selector.select(0.05):
                sock: Any = key.fileobj
                if sock is self.listener:
                    self._accept()
                elif not self.paused:
                    self._read(sock)
            if self.paused:
                time.sleep(0.01)

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            new, _ = self.listener.accept()
            new.setblocking(False)
            self.accepted.append(new)
            self._selector.register(new, selectors.EVENT_READ)

    def _read(self, sock: socket.socket) -> None:
        with self._reading:
            if sock.fileno() < 0:
                return  # reset since it was found to have something
            try:
                part = sock.recv(1 << 18)
            except BlockingIOError:
                return
            except OSError:
                part = b""
            self.received += len(part)
            if not part:
                self._selector.unregister(sock)
                sock.close()

    def gets(self, octets: int) -> None:
        """So much arrives, and no more: what was acknowledged may be still to be read."""
        wait_for(lambda: self.received >= octets, "arrival")
        assert self.received == octets

    def reset(self) -> None:
        """End all connections at once, whatever is on its way."""
        with self._reading:
            for sock in self.accepted:
                if sock.fileno() >= 0:
                    with contextlib.suppress(KeyError):
                        self._selector.unregister(sock)
                    close_hard(sock)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self.listener.close()
        for sock in self.accepted:
            sock.close()
        self._selector.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def dial(
    pair: NetnsPair,
    *,
    source_port: int = 0,
    v6: bool = False,
    address: str = "",
    before: Callable[[socket.socket], object] = lambda _: None,
) -> socket.socket:
    """A connection from ``a`` to ``b``; ``before`` is called with the socket before it is connected."""

    def connect() -> socket.socket:
        s = socket.socket(socket.AF_INET6 if v6 else socket.AF_INET, socket.SOCK_STREAM)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if source_port:
            s.bind(("::" if v6 else "0.0.0.0", source_port))  # noqa: S104 - of a throw-away namespace
        before(s)
        s.settimeout(WAIT_S)
        try:
            s.connect((address or (pair.addr6_b if v6 else pair.addr_b), PORT))
        except OSError:
            s.close()
            raise
        return s

    return pair.call(pair.a, connect)


def close_hard(sock: socket.socket) -> None:
    """By a reset, which leaves no TIME_WAIT."""
    reset_at_close(sock)
    sock.close()


def second_link(pair: NetnsPair, ours: str) -> str:
    """Add a veth pair, w0 and w1, with 10.99.0.1 behind both links; returns the configuration of w0.

    ``ours``: what the daemon's side runs for its addresses and routes.
    """
    subprocess.run(
        ["ip", "-n", pair.a, "link", "add", "w0", "type", "veth", "peer", "name", "w1", "netns", pair.b], check=True
    )
    there = """
    for i in all default v1 w1; do sysctl -qw net.ipv4.conf.$i.rp_filter=0; done
    ip addr add 10.88.0.2/24 dev w1; ip link set w1 up; ip addr add 10.99.0.1/32 dev lo
    """
    pair.run(pair.b, there)
    pair.run(pair.a, ours)
    return f'[[device]]\nname = "w0"\nbackend = "htb"\nrate = "{RATE_MBIT}mbit"\n'


class Grown:
    """How much more each band has sent since this was made, bytes."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._before = daemon.bands()

    def now(self) -> dict[str, int]:
        return {name: b.bytes - self._before[name].bytes for name, b in self._daemon.bands().items()}

    def wrong(self, hinted: int, *, right: str = "level") -> float:
        """Share of ``hinted`` payload bytes that have not gone through bands whose names begin with ``right``."""
        grown = self.now()
        others = sum(n for name, n in grown.items() if not name.startswith((right, "control")))
        assert sum(grown.values()) >= hinted, (grown, hinted)
        return others / hinted


def counted(daemon: Daemon) -> tuple[int, int, int]:
    """Transfers completed, deadlines met, deadlines missed."""
    c = daemon.status().counters
    return c.transfers_completed, c.deadlines_met, c.deadlines_missed


def shown(daemon: Daemon, sock: socket.socket) -> pb.Connection | None:
    """A connection as the daemon shows it."""
    cookie = cookie_of(sock)
    return next((c for c in daemon.connections() if c.cookie == cookie), None)


def band(daemon: Daemon, sock: socket.socket) -> str:
    """The band of a connection; empty if the daemon does not know it."""
    found = shown(daemon, sock)
    return "" if found is None else found.band


def transfers(daemon: Daemon) -> dict[str, int]:
    """Bytes left by unfinished transfer."""
    reply = daemon.control(lambda c: c.ListTransfers(pb.ListTransfersRequest(), timeout=WAIT_S))
    return {t.id: t.bytes_left for t in reply.transfers}


@contextlib.contextmanager
def worker(
    daemon: Daemon, body: str, *arguments: str, wrap: tuple[str, ...] = (), fds: tuple[int, ...] = ()
) -> Iterator[Worker]:
    """A process in namespace ``a`` that runs ``body`` with a function ``dial``; ``fds`` are its, too."""
    process = Worker(daemon, body, arguments, wrap, fds)
    try:
        yield process
    finally:
        process.end()


PRELUDE: Final = """
import os, socket, sys, time
from mfsd.client import *
target, host, port, arguments = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4:]
def dial():
    return socket.create_connection((host, port))
def say(*words):
    print(*words, flush=True)
def hear():
    return sys.stdin.readline().strip()
"""


class Worker:
    """See ``worker``."""

    def __init__(
        self, daemon: Daemon, body: str, arguments: tuple[str, ...], wrap: tuple[str, ...], fds: tuple[int, ...]
    ) -> None:
        pair = daemon.pair
        command = [sys.executable, "-c", PRELUDE + body, f"unix:{daemon.socket}", pair.addr_b, str(PORT), *arguments]
        self.popen = pair.call(
            pair.a,
            lambda: subprocess.Popen(
                [*wrap, *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                process_group=0,
                pass_fds=fds,
            ),
        )

    def hear(self) -> list[str]:
        """The words of its next line."""
        assert self.popen.stdout is not None
        line = self.popen.stdout.readline()
        if not line:
            raise AssertionError(self.popen.communicate(timeout=WAIT_S)[1])
        return line.split()

    def say(self, line: str = "") -> None:
        """What its next ``hear()`` returns."""
        assert self.popen.stdin is not None
        self.popen.stdin.write(f"{line}\n")
        self.popen.stdin.flush()

    def result(self) -> tuple[str, str]:
        """What it has yet said, on both channels, once it has ended by itself."""
        out, err = self.popen.communicate(timeout=WAIT_S)
        assert self.popen.returncode == 0, err
        return out, err

    def kill(self) -> None:
        """The process alone, and at once."""
        self.popen.kill()
        self.popen.wait(WAIT_S)

    def end(self) -> None:
        """With all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.communicate()


def settled(daemon: Daemon, wanted: tuple[int, int, int]) -> None:
    """Wait for the counters of ``counted``."""
    try:
        wait_for(lambda: counted(daemon) == wanted, f"{wanted} completed, met, missed")
    except AssertionError as e:
        raise AssertionError(f"{e}, but {counted(daemon)}; left: {transfers(daemon)}") from None


def three_in_turn(daemon: Daemon, client: Client, named: Any, sock: socket.socket) -> None:
    """Transfers of a megabyte on one connection, each announced, sent and counted before the next."""
    for i in range(3):
        client.transfer(f"t{i}", named, MB, stage=Stage.P2D, request="r")
        assert client.flush(5)
        sock.sendall(bytes(MB))
        settled(daemon, (i + 1, 0, 0))
