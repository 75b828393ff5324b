# SPDX-License-Identifier: Apache-2.0
"""What the daemon costs when nothing happens: resident memory and processor time, idle and with 1,000 hinted sockets.

The real process in a namespace of its own, enforcing htb on one end of a veth pair.
"""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING

from bench.common import Figure, parser, write
from bench.parts.host import daemon, namespaces
from mfsd.client import Client, Stage, tuple_of

if TYPE_CHECKING:
    from bench.parts.host import Daemon

IDLE_S = 10.0
CONNECTIONS = 1000
SCRAPES = 50
SCRAPE_S = 5.0
"""Between two scrapes, as the target has it."""


def cpu_percent(mfsd: Daemon, seconds: float) -> float:
    """Share of one core over a while, per cent."""
    before = mfsd.cpu_s
    time.sleep(seconds)
    return 100 * (mfsd.cpu_s - before) / seconds


def scrape_s(mfsd: Daemon) -> float:
    """Seconds of processor time that a scrape costs the daemon, less what it takes anyway."""
    idle = cpu_percent(mfsd, IDLE_S)
    before, begin = mfsd.cpu_s, time.monotonic()
    for _ in range(SCRAPES):
        with socket.socket(socket.AF_UNIX) as reader:
            reader.connect(str(mfsd.folder / "mfsd.sock.metrics"))
            reader.sendall(b"GET /metrics HTTP/1.0\r\nAccept: application/openmetrics-text; version=1.0.0\r\n\r\n")
            while reader.recv(1 << 16):
                pass
    taken = mfsd.cpu_s - before - idle / 100 * (time.monotonic() - begin)
    return taken / SCRAPES


def main() -> None:
    """Run and write build/bench/daemon.json."""
    parser(__doc__).parse_args()
    with namespaces() as (a, _), daemon(namespace=a, rate="1gbit") as mfsd, Client(target=mfsd.target) as client:
        time.sleep(2)
        idle = cpu_percent(mfsd, IDLE_S)
        rss = mfsd.process.memory_info().rss / 1e6
        # Sockets of this namespace: the daemon looks them up in its own, so they count as elsewhere and are matched by
        # tuple; what it costs to hold them is the same.
        client.request("r", ttft_left_s=300)
        for i in range(CONNECTIONS):
            there = tuple_of(f"10.{i >> 8}.{i & 255}.1", 6000, src="10.255.0.1", sport=40_000)
            client.transfer(f"t{i}", there, 1 << 30, stage=Stage.P2D, request="r")
        assert client.flush(10)
        time.sleep(2)
        busy = cpu_percent(mfsd, IDLE_S)
        scrape = 100 * scrape_s(mfsd) / SCRAPE_S
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
