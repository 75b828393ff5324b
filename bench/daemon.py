# SPDX-License-Identifier: Apache-2.0
"""What the daemon costs when nothing happens: resident memory and processor time, idle and with 1,000 hinted sockets.

The real process in a namespace of its own, enforcing htb on one end of a veth pair.
"""

from __future__ import annotations

import secrets
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from bench.common import Figure, write
from mfsd.client import Client, tuple_of
from mfsd.model import Stage

IDLE_S = 10.0
CONNECTIONS = 1000
SCRAPES = 50
SCRAPE_S = 5.0
"""Between two scrapes, as the target has it."""


def ip(*words: str) -> None:
    """Run the ip command."""
    subprocess.run(["ip", *words], check=True)


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


def wait_until_served(client: Client, log: Path) -> None:
    """Return when the daemon answers; raises RuntimeError with its log otherwise."""
    for _ in range(200):
        client.request("warm-up", ttft_left_s=1.0)
        if client.flush(0.2):
            client.cancel(request="warm-up")
            return
    raise RuntimeError(f"the daemon does not answer: {log.read_text()}")


def main() -> None:
    """Run and write build/bench/daemon.json."""
    name = f"mfsd-b-{secrets.token_hex(3)}"
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as folder:
        path, log = Path(folder), Path(folder) / "log"
        (path / "mfsd.toml").write_text(
            f'[daemon]\nsocket = "{path}/mfsd.sock"\nstate_dir = "{path}"\nmode = "enforce"\n'
            '[[device]]\nname = "v0"\nbackend = "htb"\nrate = "1gbit"\n'
        )
        ip("netns", "add", name)
        daemon = None
        try:
            ip("-n", name, "link", "add", "v0", "type", "veth", "peer", "name", "v1")
            ip("-n", name, "link", "set", "v0", "up")
            ip("-n", name, "link", "set", "v1", "up")
            ip("-n", name, "link", "set", "lo", "up")
            command = [sys.executable, "-m", "mfsd.daemon", "--config", str(path / "mfsd.toml")]
            with log.open("wb") as out:
                daemon = subprocess.Popen(["ip", "netns", "exec", name, *command], stdout=out, stderr=out)
            process = psutil.Process(daemon.pid)
            with Client(target=f"unix:{path}/mfsd.sock") as client:
                wait_until_served(client, log)
                time.sleep(2)
                idle = cpu_percent(process, IDLE_S)
                rss = process.memory_info().rss / 1e6
                figures += [
                    Figure.against("rss_idle_mb", rss, "MB", target=120, want="at most"),
                    Figure.against("cpu_idle_percent", idle, "% of a core", target=2, want="at most"),
                ]
                # Sockets of this namespace: the daemon looks them up in its own, so they count as elsewhere and are
                # matched by tuple; what it costs to hold them is the same.
                client.request("r", ttft_left_s=300)
                for i in range(CONNECTIONS):
                    where = f"10.{i >> 8}.{i & 255}.1"
                    there = tuple_of(where, 6000, src="10.255.0.1", sport=40_000)
                    client.transfer(f"t{i}", there, 1 << 30, stage=Stage.P2D, request="r")
                client.flush(10)
                time.sleep(2)
                busy = cpu_percent(process, IDLE_S)
                took = scrapes(path / "mfsd.sock.metrics", process)
                figures += [
                    Figure.against(
                        "cpu_scrape_percent",
                        100 * took / SCRAPE_S,
                        "% of a core, one scrape in 5 s",
                        target=1,
                        want="at most",
                    ),
                    Figure(f"cpu_{CONNECTIONS}_transfers_percent", busy, "% of a core"),
                    Figure("rss_loaded_mb", process.memory_info().rss / 1e6, "MB"),
                ]
        finally:
            if daemon is not None:
                daemon.terminate()
                daemon.wait(timeout=20)
            ip("netns", "del", name)
    write("daemon", figures)


if __name__ == "__main__":
    main()
