# SPDX-License-Identifier: Apache-2.0
"""How a restart of the daemon looks on the wire: a hinted TCP connection, and what a witness at its far end sees.

The classifier writes a DSCP into every packet of a band of hinted traffic, so a packet without it went
as unhinted traffic does. A queue that lost packets shows as a hole in what comes; that TCP sent some again does not
show it, for on a busy machine it takes packets for lost that are only late.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import struct
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.machine import Machine
    from support.namespaces import NetnsPair

PORT: Final = 5001
DSCP: Final = 46
HINTED: Final = (*(f"level {n}" for n in range(5)), "background", "scavenger")
"""Where a hinted connection may be; which of them is the policy's affair."""
CONFIG: Final = f"""
[daemon]
mode = "enforce"
[[device]]
name = "v0"
rate = "100mbit"
[bands]
lanes = 8
dscp = {{ {", ".join(f'"{name}" = {DSCP}' for name in HINTED)} }}
"""
SENDER: Final = """
import json, socket, struct, sys, time
sys.path[:0] = ["/usr/lib/mfsd/lib", "/usr/lib/mfsd/cp%d%d" % sys.version_info[:2]]
from mfsd.client import Client, Stage
hints = Client()
sock = socket.create_connection((sys.argv[1], int(sys.argv[2])))
sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
hints.request("r", ttft_left_s=60.0, ttl_s=120.0)
hints.transfer("bulk", sock, request="r", size=1 << 40, stage=Stage.COLLECTIVE, deadline_s=60.0, ttl_s=120.0)
assert hints.flush(10)
print("hinted", flush=True)
begin = time.monotonic()
while time.monotonic() - begin < float(sys.argv[3]):
    sock.sendall(bytes(5000))
    time.sleep(0.002)
# tcpi_total_retrans (struct tcp_info, include/uapi/linux/tcp.h)
retransmitted, = struct.unpack_from("I", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104), 100)
print(json.dumps({"retransmitted": retransmitted, "connects": hints.stats.connects}), flush=True)
"""


@dataclass
class Seen:
    """What became of the packets."""

    packets: int
    wrong: int
    """Packets that carried no DSCP."""
    wrong_s: float
    """The longest time in which none carried it while packets came."""
    silent_s: float
    """The longest time in which none came."""
    holes: int
    """Packets that came before something that had been sent before them: it was lost, or overtaken."""
    retransmitted: int
    connects: int
    """How often the client reached a daemon."""


class Witness:
    """Takes down each packet of the connection."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, bool]] = []
        self.holes = 0
        self._end: int | None = None
        """Sequence number behind the last byte that came."""
        self._packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800))
        self._packets.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 << 20)
        self._packets.bind(("v1", 0x0800))
        self._packets.settimeout(0.1)
        self._over = False
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over:
            with contextlib.suppress(TimeoutError):
                head, address = self._packets.recvfrom(60)
                if address[2] == socket.PACKET_OUTGOING or head[23] != socket.IPPROTO_TCP or len(head) < 60:
                    continue
                ihl = 14 + (head[14] & 15) * 4
                if struct.unpack_from("!H", head, ihl + 2)[0] == PORT and struct.unpack_from("!H", head, 16)[0] > 100:
                    self._follow(head, ihl)
                    self.marks.append((time.monotonic(), head[15] >> 2 == DSCP))

    def _follow(self, head: bytes, tcp: int) -> None:
        (begin,), total = struct.unpack_from("!I", head, tcp + 4), struct.unpack_from("!H", head, 16)[0]
        end = begin + total - (tcp - 14) - (head[tcp + 12] >> 4) * 4 & 0xFFFFFFFF
        if self._end is not None and 0 < (begin - self._end & 0xFFFFFFFF) < 1 << 31:
            self.holes += 1
        if self._end is None or (end - self._end & 0xFFFFFFFF) < 1 << 31:
            self._end = end

    def close(self) -> None:
        self._over = True
        self._thread.join()
        self._packets.close()


@contextlib.contextmanager
def _sink() -> Iterator[None]:
    with socket.create_server(("10.77.0.2", PORT)) as server:
        server.settimeout(20)

        def drain() -> None:
            with server.accept()[0] as peer:
                while peer.recv(1 << 16):
                    pass

        thread = threading.Thread(target=drain)
        thread.start()
        try:
            yield
        finally:
            thread.join(20)


@contextlib.contextmanager
def watched(machine: Machine, pair: NetnsPair, seconds: float) -> Iterator[Seen]:
    """A hinted connection for so long; do to the daemon what is to be done meanwhile. The result is filled in after."""
    machine.write("/root/sender.py", SENDER)
    seen = Seen(0, 0, 0.0, 0.0, 0, 0, 0)
    with contextlib.ExitStack() as stack:
        with pair.inside(pair.b):
            stack.enter_context(_sink())
            witness = Witness()
            stack.callback(witness.close)
        sender = machine.start(["/usr/bin/python3", "-IS", "/root/sender.py", pair.addr_b, str(PORT), str(seconds)])
        stack.callback(sender.wait)
        assert sender.stdout is not None
        if sender.stdout.readline() != "hinted\n":
            raise AssertionError(sender.communicate()[1])
        time.sleep(1)  # until its level is in force
        begin = time.monotonic()
        yield seen
        out, err = sender.communicate(timeout=seconds + 30)
        assert sender.returncode == 0, err
    report = json.loads(out)
    seen.retransmitted, seen.connects = report["retransmitted"], report["connects"]
    seen.holes = witness.holes
    marks = [m for m in witness.marks if m[0] >= begin]
    seen.packets, seen.wrong = len(marks), sum(not right for _, right in marks)
    seen.silent_s = max(b[0] - a[0] for a, b in itertools.pairwise(marks))
    since = None
    for at, right in marks:
        since = None if right else (since or at)
        seen.wrong_s = max(seen.wrong_s, at - since if since else 0.0)
