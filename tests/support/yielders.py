# SPDX-License-Identifier: Apache-2.0
"""Connections for what is said of network.yield: a classifier's tables, the algorithm, and two namespaces."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from typing import TYPE_CHECKING, Final

import numpy as np
import pytest

from bench.parts.testrun import FOREVER, live
from mfsd.client import cookie_of
from mfsd.datapath import _abi
from mfsd.datapath.bpf import yielding
from mfsd.datapath.bpf.keys import cookie_key
from mfsd.datapath.bpf.syscall import BpfMap
from mfsd.lab.hosts.tcp import algorithm_of, queued, reset_at_close, tcp_info
from support.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy.typing as npt

    from mfsd.datapath.bpf.loader import Classifier
    from mfsd.datapath.bpf.yielding import Yielding
    from support.namespaces import NetnsPair

PATIENCE_S: Final = 20.0
URGENT: Final = 1
FIRST: Final = 5
SECOND: Final = 6
RATE: Final = 100_000_000 // 8
CHUNK: Final = bytes(1 << 16)
NEVER: Final = 0xFFFFFFFF
WINDOWS: Final = 4
FAMILIES: Final = [socket.AF_INET, socket.AF_INET6]

needs_it = pytest.mark.skipif(bool(yielding.missing()), reason=f"this kernel has no yield: {yielding.missing()}")


class Bench:
    """A classifier's tables, the algorithm, and connections from one namespace to the other."""

    def __init__(self, classifier: Classifier, loaded: Yielding, pair: NetnsPair) -> None:
        self.classifier, self.pair = classifier, pair
        self._stack = contextlib.ExitStack()
        self._rows = iter(range(classifier.rows))
        self._row: dict[socket.socket, int] = {}
        live(classifier)
        self.obey(loaded)

    def obey(self, loaded: Yielding) -> None:
        """From now on the algorithm is this one."""
        self.yielding = loaded
        loaded.settings["rate"], loaded.settings["target_us"] = RATE, 3000
        loaded.settings["class_of"][0, [FIRST, SECOND]] = _abi.YIELD_FIRST, _abi.YIELD_SECOND

    def connect(self, family: int = socket.AF_INET, algorithm: str = "", *, back: bool = False) -> socket.socket:
        """A connection whose other end reads everything; from the second namespace to the first if ``back``."""
        pair = self.pair
        here, there = (pair.b, pair.a) if back else (pair.a, pair.b)
        four, six = (pair.addr_a, pair.addr6_a) if back else (pair.addr_b, pair.addr6_b)
        address = four if family == socket.AF_INET else six
        server = pair.call(there, lambda: socket.create_server((address, 0), family=family))
        client = pair.call(here, lambda: socket.socket(family, socket.SOCK_STREAM))
        if algorithm:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, algorithm.encode())
        with server:
            client.connect(server.getsockname()[:2])
            peer, _ = server.accept()
        reader = threading.Thread(target=_drain, args=(peer,))
        reader.start()
        self._stack.callback(reader.join)
        self._stack.callback(client.close)
        return client

    def hint(self, sock: socket.socket, band: int) -> None:
        row = self._row.get(sock)
        if row is None:
            row = self._row[sock] = next(self._rows)
            self.classifier.slots["expires_ns"][row] = FOREVER
            self.classifier.slots["band"][row] = band
            self.classifier.cookies.add(cookie_key(cookie_of(sock)), row)
        self.classifier.slots["band"][row] = band

    def forget(self, sock: socket.socket) -> None:
        self.classifier.slots["expires_ns"][self._row[sock]] = 0

    def sends_until(self, sock: socket.socket, holds: Callable[[], bool]) -> None:
        """Send, and wait for what is to come of it."""
        until = time.monotonic() + PATIENCE_S
        while not holds():
            assert time.monotonic() < until, algorithm_of(sock)
            sock.sendall(CHUNK)

    def becomes(self, sock: socket.socket, algorithm: str) -> None:
        self.sends_until(sock, lambda: algorithm_of(sock) == algorithm)

    def stays(self, sock: socket.socket, algorithm: str) -> None:
        """As a yardstick, another connection gets the algorithm meanwhile."""
        other = self.connect()
        self.hint(other, FIRST)
        before = tcp_info(sock).acked
        self.sends_until(sock, lambda: tcp_info(sock).acked - before > 10 * len(CHUNK))
        self.becomes(other, self.yielding.name)
        assert algorithm_of(sock) == algorithm

    def close(self) -> None:
        self._stack.close()


def _drain(peer: socket.socket) -> None:
    room = bytearray(1 << 20)
    with peer, contextlib.suppress(ConnectionError):
        while peer.recv_into(room, 0, socket.MSG_TRUNC):  # thrown away uncopied
            pass


@contextlib.contextmanager
def filled(*socks: socket.socket) -> Iterator[None]:
    """They send all they can meanwhile."""
    ends = threading.Event()

    def send(sock: socket.socket) -> None:
        while not ends.is_set():
            sock.sendall(CHUNK)

    threads = [threading.Thread(target=send, args=(s,)) for s in socks]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ends.set()
        for thread in threads:
            thread.join()


def acked(*socks: socket.socket, seconds: float = 1.5) -> npt.NDArray[np.int64]:
    """Bytes of each that were acknowledged in so many seconds, after as many to settle."""
    time.sleep(seconds)
    before = np.array([tcp_info(s).acked for s in socks])
    time.sleep(seconds)
    grown: npt.NDArray[np.int64] = np.array([tcp_info(s).acked for s in socks]) - before
    return grown


def settles(measure: Callable[[], float], holds: Callable[[float], bool]) -> None:
    """It holds in one of a few windows: a busy machine's first may show more of the machine than of its link."""
    seen: list[float] = []
    while len(seen) < WINDOWS and not (seen and holds(seen[-1])):
        seen.append(measure())
    assert holds(seen[-1]), seen


def sleeper(bench: Bench, *, nodelay: int = 1) -> socket.socket:
    """A deferred connection that ran cubic. Its next packet is due in half an hour, and nothing of it is in flight."""
    bench.yielding.settings["flags"] = _abi.YIELD_REPLACE
    sock = bench.connect(algorithm="cubic")
    reset_at_close(sock)  # if it fails: no half an hour's end
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * len(CHUNK))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, nodelay)
    bench.hint(sock, FIRST)
    bench.becomes(sock, bench.yielding.name)
    bench.sends_until(sock, lambda: bool((bench.yielding.paths()[1]["base_us"] < NEVER).any()))
    wait_for(lambda: not queued(sock), "an idle connection")
    (key,), (path,) = bench.yielding.paths()
    path["share"], path["part"], path["delay_us"], path["target_us"], path["in_group"] = 1, 1, 1_000_000, 1000, 0
    bench.yielding.settings["rate"] = 1
    paths = BpfMap(bench.yielding.path_map, _abi.PATH_KEY_DTYPE.itemsize, _abi.PATH_DTYPE.itemsize)
    paths.update(key.tobytes(), path.tobytes())
    sock.sendall(CHUNK)
    wait_for(lambda: queued(sock) < len(CHUNK), "its first packet")
    assert queued(sock), "it is paced"
    bench.yielding.settings["rate"] = RATE
    return sock


def rtt_us(sock: socket.socket) -> int:
    """Its smoothed round trip (tcpi_rtt of include/uapi/linux/tcp.h)."""
    return int(struct.unpack_from("=I", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104), 68)[0])


def share(first: socket.socket, second: socket.socket) -> float:
    """Of the first of two that send all they can, once they have settled."""
    with filled(first, second):
        return part(acked(first, second))


def part(grown: npt.NDArray[np.int64]) -> float:
    """Of the first."""
    return float(grown[0] / grown.sum())
