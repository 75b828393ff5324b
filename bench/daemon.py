# SPDX-License-Identifier: Apache-2.0
"""What the daemon costs when nothing happens: resident memory and processor time, idle and with 1,000 hinted sockets.

The real process in a namespace of its own, enforcing htb on one end of a veth pair.
"""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING

from bench.common import Figure, write
from bench.parts.host import daemon, namespaces
from mfsd.client import Client, Stage, tuple_of

if TYPE_CHECKING:
    from pathlib import Path

    import psutil

IDLE_S = 10.0
CONNECTIONS = 1000
SCRAPES = 50
SCRAPE_S = 5.0
"""Between two scrapes, as the target has it."""


def cpu_percent(process: psutil.Process, seconds: float) -> float:
    """Share of one core over a while, per cent."""
    before = process.cpu_times()
    time.sleep(seconds)
    after = process.cpu_times()
    return 100 * (after.user + after.system - before.user - before.system) / seconds


def scrapes(endpoint: Path, process: psutil.Process) -> float:
    """Seconds of processor time that a scrape costs the daemon, less what it takes anyway."""
    idle = cpu_percent(process, IDLE_S)
    before, begin = process.cpu_times(), time.monotonic()
    for _ in range(SCRAPES):
        with socket.socket(socket.AF_UNIX) as reader:
            reader.connect(str(endpoint))
            reader.sendall(b"GET /metrics HTTP/1.0\r\nAccept: application/openmetrics-text; version=1.0.0\r\n\r\n")
            while reader.recv(1 << 16):
                pass
    after = process.cpu_times()
    taken = after.user + after.system - before.user - before.system - idle / 100 * (time.monotonic() - begin)
    return taken / SCRAPES


def main() -> None:
    """Run and write build/bench/daemon.json."""
    with namespaces() as (a, _), daemon(namespace=a, rate="1gbit") as mfsd, Client(target=mfsd.target) as client:
        time.sleep(2)
        idle = cpu_percent(mfsd.process, IDLE_S)
        rss = mfsd.process.memory_info().rss / 1e6
        # Sockets of this namespace: the daemon looks them up in its own, so they count as elsewhere and are matched by
        # tuple; what it costs to hold them is the same.
        client.request("r", ttft_left_s=300)
        for i in range(CONNECTIONS):
            there = tuple_of(f"10.{i >> 8}.{i & 255}.1", 6000, src="10.255.0.1", sport=40_000)
            client.transfer(f"t{i}", there, 1 << 30, stage=Stage.P2D, request="r")
        assert client.flush(10)
        time.sleep(2)
        busy = cpu_percent(mfsd.process, IDLE_S)
        scrape = 100 * scrapes(mfsd.folder / "mfsd.sock.metrics", mfsd.process) / SCRAPE_S
        figures = [
            Figure.against("rss_idle_mb", rss, "MB", target=120, want="at most"),
            Figure.against("cpu_idle_percent", idle, "% of a core", target=2, want="at most"),
            Figure.against("cpu_scrape_percent", scrape, "% of a core, one scrape in 5 s", target=1, want="at most"),
            Figure(f"cpu_{CONNECTIONS}_transfers_percent", busy, "% of a core"),
            Figure("rss_loaded_mb", mfsd.process.memory_info().rss / 1e6, "MB"),
        ]
    write("daemon", figures)


if __name__ == "__main__":
    main()
