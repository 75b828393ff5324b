# SPDX-License-Identifier: Apache-2.0
"""What network.yield costs those who need not yield, and what a busy way back costs those who do: without a daemon.

The kernel's part alone (bpf/yield.bpf.c) between two namespaces, with a table that we fill in. *Costs*: connections
over a veth pair as fast as it goes, slice by slice in changing order: one made before the algorithm was there, one that
is never hinted, and one that is urgent and runs the algorithm. *Reverse*: a link of RATE each way, one deferred
connection alone on its way, and four cubic ones on the way back that fill a queue of 50 ms; and the same with a cubic
one in the deferred one's place.
"""

from __future__ import annotations

import contextlib
import socket
import statistics
import subprocess
import threading
import time
from typing import TYPE_CHECKING, Final

from bench.common import Figure
from bench.parts.host import HERE, THERE, namespaces
from bench.parts.testrun import FOREVER, live
from mfsd.client import cookie_of
from mfsd.daemon.network_section import NetworkConfig
from mfsd.datapath import _abi
from mfsd.datapath.bpf.keys import cookie_key
from mfsd.datapath.bpf.libbpf import LibbpfLoader
from mfsd.datapath.bpf.yielding import Yielding
from mfsd.ground.units import Rate
from mfsd.lab.hosts.enter import inside
from mfsd.lab.hosts.tcp import CHUNK, CONGESTION, algorithm_of, queued, tcp_info

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mfsd.datapath.bpf.loader import Classifier

GENERATIONS: Final = 8
"""Of connections: what window one comes to, and so how fast it is, is luck."""
ROUNDS: Final = 10
"""Of each."""
SLICE: Final = 64 << 20
"""Bytes; long against the 4 MiB that a socket may buffer."""
RATE: Final = Rate.parse("200mbit")
TURNS: Final = 3
SETTLE_S: Final = 2.0
LOOK_S: Final = 3.0
BACK: Final = 4
"""Connections on the way back."""
URGENT: Final = 1
DEFERRED: Final = 5
SHAPE: Final = f"root tbf rate {int(RATE.bits_per_s)}bit burst 20kb latency 50ms"


class Ends:
    """Two namespaces, and connections whose other end reads everything. A context manager's value."""

    def __init__(self, hosts: tuple[str, str], stack: contextlib.ExitStack, classifier: Classifier) -> None:
        self.hosts, self.classifier, self._stack = hosts, classifier, stack
        self._row = 0
        live(classifier)

    def connect(self, algorithm: str, *, back: bool = False) -> socket.socket:
        """From the first to the second, or ``back``."""
        here, there = reversed(self.hosts) if back else self.hosts
        with inside(there):
            server = socket.create_server((HERE if back else THERE, 0))
        with inside(here), server:
            sender = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            sender.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, algorithm.encode())
            sender.connect(server.getsockname())
            receiver, _ = server.accept()
        reader = threading.Thread(target=_drain, args=(receiver,))
        reader.start()
        self._stack.callback(reader.join)
        self._stack.callback(sender.close)
        return sender

    def hint(self, sender: socket.socket, band: int) -> None:
        """Give a connection a slot in a band."""
        self.classifier.slots["expires_ns"][self._row], self.classifier.slots["band"][self._row] = FOREVER, band
        self.classifier.cookies.add(cookie_key(cookie_of(sender)), self._row)
        self._row += 1


@contextlib.contextmanager
def _ends() -> Iterator[Ends]:
    with contextlib.ExitStack() as stack:
        hosts = stack.enter_context(namespaces())
        yield Ends(hosts, stack, stack.enter_context(LibbpfLoader().open_classifier(64)))


@contextlib.contextmanager
def _yielding(ends: Ends) -> Iterator[Yielding]:
    with Yielding(ends.classifier) as loaded:
        settings = loaded.settings
        settings["flags"], settings["rate"] = _abi.YIELD_REPLACE, int(RATE.bytes_per_s)
        settings["target_us"] = int(NetworkConfig().target_s(RATE) * 1e6)
        settings["class_of"][0, DEFERRED] = _abi.YIELD_FIRST
        yield loaded


def _drain(receiver: socket.socket) -> None:
    buffer = bytearray(CHUNK)
    with receiver, contextlib.suppress(ConnectionError):
        while receiver.recv_into(buffer, CHUNK, socket.MSG_TRUNC):
            pass


def _slice(sender: socket.socket) -> tuple[float, float]:
    """Send SLICE bytes until they are acknowledged: seconds, and seconds of processor of all threads."""
    chunk = bytes(CHUNK)
    begin, busy = time.perf_counter(), time.process_time()
    for _ in range(SLICE // CHUNK):
        sender.sendall(chunk)
    while queued(sender):
        time.sleep(0.0002)
    return time.perf_counter() - begin, time.process_time() - busy


def costs() -> list[Figure]:
    """Throughput and processor per byte of connections that need not yield, over those of one that nobody looks at."""
    seen: dict[str, list[tuple[float, float]]] = {"plain": [], "unhinted": [], "urgent": []}
    with _ends() as ends:
        plain = [ends.connect(CONGESTION) for _ in range(GENERATIONS)]
        with _yielding(ends) as loaded:
            for one in plain:
                senders = {"plain": one, "unhinted": ends.connect(CONGESTION), "urgent": ends.connect(loaded.name)}
                ends.hint(senders["urgent"], URGENT)
                for i in range(-2, ROUNDS):
                    names = [*senders][i % 3 :] + [*senders][: i % 3]
                    for name in names:
                        took = _slice(senders[name])
                        if i >= 0:  # the first rounds warm up
                            seen[name].append(took)
                if (running := algorithm_of(senders["urgent"])) != loaded.name:
                    raise RuntimeError(f"the urgent connection ran {running}: not what is measured")
    out = []
    for name in ("unhinted", "urgent"):
        pairs = list(zip(seen[name], seen["plain"], strict=True))
        speed = statistics.median(base[0] / one[0] for one, base in pairs)
        busy = statistics.median(one[1] / base[1] for one, base in pairs)
        out += [
            Figure.against(f"{name}_throughput_ratio", speed, "", target=0.98, want="at least"),
            Figure.against(f"{name}_cpu_per_byte_ratio", busy, "", target=1.03, want="at most"),
        ]
    rate = SLICE / statistics.median(took for took, _ in seen["plain"])
    return [*out, Figure("plain_throughput_gbit", rate * 8e-9, "Gbit/s")]


class _Filled:
    """Connections that are kept full meanwhile. A context manager."""

    def __init__(self, *senders: socket.socket) -> None:
        self._ends = threading.Event()
        self._threads = [threading.Thread(target=self._fill, args=(s,)) for s in senders]

    def _fill(self, sender: socket.socket) -> None:
        chunk = bytes(CHUNK)
        while not self._ends.is_set():
            sender.sendall(chunk)

    def __enter__(self) -> None:
        for thread in self._threads:
            thread.start()

    def __exit__(self, *exc: object) -> None:
        self._ends.set()
        for thread in self._threads:
            thread.join()


def _goodput(sender: socket.socket) -> float:
    """Bytes/s, once it has settled."""
    time.sleep(SETTLE_S)
    begin, before = time.monotonic(), tcp_info(sender).acked
    time.sleep(LOOK_S)
    return (tcp_info(sender).acked - before) / (time.monotonic() - begin)


def reverse() -> list[Figure]:
    """Goodput with a busy way back over that with an idle one, of a deferred connection and of a cubic one."""
    alone: dict[str, list[float]] = {"deferred": [], "cubic": []}
    beside: dict[str, list[float]] = {"deferred": [], "cubic": []}
    with _ends() as ends, _yielding(ends) as loaded:
        for name, device in zip(ends.hosts, ("v0", "v1"), strict=True):
            subprocess.run(["ip", "netns", "exec", name, *f"tc qdisc add dev {device} {SHAPE}".split()], check=True)
        for _ in range(TURNS):
            for name, goodput in alone.items():
                sender = ends.connect(loaded.name if name == "deferred" else CONGESTION)
                if name == "deferred":
                    ends.hint(sender, DEFERRED)
                with _Filled(sender):
                    goodput.append(_goodput(sender))
                    with _Filled(*(ends.connect(CONGESTION, back=True) for _ in range(BACK))):
                        beside[name].append(_goodput(sender))
    kept = {name: sum(beside[name]) / sum(alone[name]) for name in alone}
    share = sum(alone["deferred"]) / sum(alone["cubic"])
    return [
        Figure.against("reverse_kept_share", kept["deferred"], "", target=0.85, want="at least",
                       baseline=kept["cubic"], ratio=kept["deferred"] / kept["cubic"]),
        Figure("idle_share", share, "", baseline=1.0),
    ]  # fmt: skip
