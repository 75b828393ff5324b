# SPDX-License-Identifier: Apache-2.0
"""What the classifier costs: nanoseconds per packet, and throughput of one TCP stream over a veth pair.

*Per packet*: BPF_PROG_TEST_RUN in the kernel, the classifier and an empty program in turn within each round, pinned to
one CPU; the median over the rounds of the difference. The packet is a full-size TCP segment, as data is. Packets run
back to back with warm caches, which is the case at high rates.

*Throughput*: one connection between two namespaces; each round sends the same amount with and without the classifier
on the device, in changing order, and gives a ratio; the median of the ratios. The connection is hinted, so that every
packet is looked up, counted and steered.

Run as root: ``python -m bench.classifier``.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import statistics
import struct
import threading
import time
from typing import TYPE_CHECKING, Final

from bench.common import Figure, parser, write
from bench.parts.host import THERE, namespaces
from bench.parts.testrun import FOREVER, describe, run_packet, upcoming_cookies
from mfsd.client import cookie_of
from mfsd.datapath import _abi
from mfsd.datapath.bpf.attach import attach
from mfsd.datapath.bpf.keys import cookie_key, tuple_key
from mfsd.datapath.bpf.libbpf import BpfObject, LibbpfLoader, object_path
from mfsd.ground.model import Endpoints
from mfsd.lab.hosts.enter import inside

if TYPE_CHECKING:
    from mfsd.datapath.bpf.loader import Classifier

ROUNDS: Final = 301
REPEAT: Final = 10_000
"""About a millisecond, less than a time slice: most runs are not interrupted, and the median is one of those."""
SLOTS: Final = _abi.DEFAULT_SLOTS
FILLED: Final = 10_000
"""Connections in the table, so that the hash maps are as full as on a busy host."""

STREAM_ROUNDS: Final = 160
STREAM_BYTES: Final = 64 << 20
"""Short slices, so that both of a round meet the same machine; long against the 4 MiB that a socket may buffer."""
CHUNK: Final = 1 << 20

SRC, DST = ipaddress.ip_address("10.0.0.1"), ipaddress.ip_address("10.0.0.2")
SPORT, DPORT = 40000, 5001


def full_segment() -> bytes:
    """Ethernet, IPv4, TCP and data: 1514 bytes."""
    data = bytes(1514 - 14 - 20 - 20)
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 40 + len(data), 1, 0, 64, 6, 0, SRC.packed, DST.packed)
    tcp = struct.pack("!HHIIBBHHH", SPORT, DPORT, 1, 1, 0x50, 0x10, 64, 0, 0)
    return bytes(12) + b"\x08\x00" + ip + tcp + data


def set_up(c: Classifier) -> None:
    """Describe a daemon, a device, and many connections."""
    describe(c)
    c.slots["expires_ns"][:FILLED], c.slots["band"], c.slots["lane"] = FOREVER, 3, 2
    for i in range(FILLED):
        c.cookies.add(cookie_key(FOREVER + i), i)
        c.tuples.add(tuple_key(Endpoints(DST, i + 1, SRC, DPORT)), i)


class PacketCost:
    """The per-packet figures."""

    def __init__(self, c: Classifier, empty_fd: int) -> None:
        self.c, self.empty_fd, self.frame = c, empty_fd, full_segment()
        self.over: dict[str, list[int]] = {}
        self.empty: list[int] = []

    def measure(self, name: str, stat: int) -> None:
        """One round of one case; the counters must say that it was this case."""
        size = len(self.frame)
        before = int(self.c.stats()[stat])
        empty = run_packet(self.empty_fd, self.frame, wire_len=size, gso_segs=1, repeat=REPEAT).ns
        ours = run_packet(self.c.prog_fd, self.frame, wire_len=size, gso_segs=1, repeat=REPEAT).ns
        grown = int(self.c.stats()[stat]) - before
        if grown != REPEAT:
            raise RuntimeError(f"{name}: {grown} of {REPEAT} packets took the path that is measured")
        self.empty.append(empty)
        self.over.setdefault(name, []).append(ours - empty)

    def rounds(self) -> None:
        """All cases in turn, round by round."""
        key = tuple_key(Endpoints(SRC, SPORT, DST, DPORT))
        for _ in range(ROUNDS):
            self.measure("miss", _abi.STAT_MISS)
            self.c.tuples.add(key, 7)
            self.measure("tuple_hit", _abi.STAT_TUPLE)
            cookies = [cookie_key(cookie) for cookie in upcoming_cookies(50)]
            for cookie in cookies:
                self.c.cookies.add(cookie, 7)
            self.measure("cookie_hit", _abi.STAT_COOKIE)
            for cookie in cookies:
                self.c.cookies.delete(cookie)
            self.c.tuples.delete(key)
            timeout = int(self.c.host["timeout_ns"][0])
            self.c.host["timeout_ns"], self.c.host["heartbeat_ns"] = 1, 1
            self.measure("stale", _abi.STAT_STALE)
            self.c.host["timeout_ns"], self.c.host["heartbeat_ns"] = timeout, time.monotonic_ns()

    def figures(self) -> list[Figure]:
        """Medians over the rounds."""
        base = statistics.median(self.empty)
        cost = {name: float(statistics.median(ns)) for name, ns in self.over.items()}
        return [
            Figure.against(
                "cookie_hit_ns_over_empty", cost["cookie_hit"], "ns", target=60, want="at most", baseline=base
            ),
            Figure("tuple_hit_ns_over_empty", cost["tuple_hit"], "ns", baseline=base),
            Figure("miss_ns_over_empty", cost["miss"], "ns", baseline=base),
            Figure("stale_ns_over_empty", cost["stale"], "ns", baseline=base),
        ]


def connect(hosts: tuple[str, str]) -> tuple[socket.socket, socket.socket]:
    """TCP connection from the first host to the second; (sender, receiver)."""
    with inside(hosts[1]):
        server = socket.create_server((THERE, DPORT))
    with inside(hosts[0]):
        sender = socket.create_connection((THERE, DPORT), timeout=10)
    receiver, _ = server.accept()
    server.close()
    sender.settimeout(None)
    return sender, receiver


def drain(receiver: socket.socket) -> None:
    """Read until the end."""
    buffer = bytearray(CHUNK)
    while receiver.recv_into(buffer):
        pass


def stream(sender: socket.socket) -> float:
    """Send STREAM_BYTES; bytes per second."""
    chunk = bytes(CHUNK)
    start = time.perf_counter()
    for _ in range(STREAM_BYTES // CHUNK):
        sender.sendall(chunk)
    return STREAM_BYTES / (time.perf_counter() - start)


def throughput(c: Classifier) -> list[Figure]:
    """Throughput with the classifier to that without, round by round."""
    rates: dict[bool, list[float]] = {True: [], False: []}
    with namespaces() as hosts:
        sender, receiver = connect(hosts)
        reader = threading.Thread(target=drain, args=(receiver,))
        reader.start()
        c.cookies.add(cookie_key(cookie_of(sender)), 7)
        before = int(c.slots["bytes"][7])
        with inside(hosts[0]):
            device = socket.if_nametoindex("v0")
            for i in range(-3, STREAM_ROUNDS):
                for on in (i % 2 == 0, i % 2 == 1):
                    with attach(c, device) if on else contextlib.nullcontext():
                        rate = stream(sender)
                    if i >= 0:  # the first rounds warm up
                        rates[on].append(rate)
        seen = int(c.slots["bytes"][7]) - before
        sender.close()
        reader.join()
        receiver.close()
    if seen < STREAM_ROUNDS * STREAM_BYTES * 0.9:
        raise RuntimeError(f"the classifier saw {seen} bytes of the stream, {STREAM_ROUNDS * STREAM_BYTES} were sent")
    ratio = statistics.median(a / b for a, b in zip(rates[True], rates[False], strict=True))
    return [
        Figure.against("throughput_ratio", ratio, "1", target=0.98, want="at least", baseline=1.0, ratio=ratio),
        Figure("throughput_without_gbit", statistics.median(rates[False]) * 8e-9, "Gbit/s"),
    ]


def main() -> None:
    """Measure and report."""
    parser(__doc__).parse_args()
    with BpfObject(object_path("empty")) as obj:
        obj.load()
        empty_fd = obj.program_fd("mfsd_empty")
    cpus = os.sched_getaffinity(0)
    with LibbpfLoader().open_classifier(SLOTS) as c:
        set_up(c)
        os.sched_setaffinity(0, {max(cpus)})
        packets = PacketCost(c, empty_fd)
        packets.rounds()
        os.sched_setaffinity(0, cpus)
        c.host["heartbeat_ns"] = time.monotonic_ns()
        write("classifier", [*packets.figures(), *throughput(c)])
    os.close(empty_fd)


if __name__ == "__main__":
    main()
