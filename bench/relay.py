# SPDX-License-Identifier: Apache-2.0
"""How long a hint takes that crosses hosts: from the worker that waits to the engine of the daemon that sends.

    make bench NAME=relay        (build/bench/relay.json)

Two daemons in two network namespaces, with certificates. Hints go by turns to the one daemon by way of the other, and
straight to it; its own record (mfsctl record) says when it heard of each. The two clocks are set by the fastest hint of
all, so what is printed is what the others took more than that one, which is a few tenths of a millisecond. Hints name a
range of ports, as those of the connectors do: a connection that is named by both ports and never seen is given up after
20 s, with all that was announced on it.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import grpc
import numpy as np

from bench.common import Figure, parser, write
from mfsd.client import Client, Stage, tuple_of
from mfsd.lab.hosts.machine import take_precedence
from mfsd.lab.hosts.net import LabError
from mfsd.lab.vllm.hosts import DECODE, PREFILL, Arm, World
from mfsd.v1 import control_pb2 as pb

if TYPE_CHECKING:
    from mfsd.lab.hosts.governor import Governor

ROUNDS: Final = 1000
PACE_S: Final = 0.01
KEPT: Final = 100
"""Hints that are not taken back yet."""
SIZE: Final = 1 << 20
PORTS: Final = (20_000, 20_099)
TARGET_MS: Final = 2.0


class Heard:
    """When a daemon has heard of transfers, by the end of their names, in seconds of its record."""

    def __init__(self, governor: Governor) -> None:
        self.at: dict[str, float] = {}
        self._call = governor.control.Record(pb.RecordRequest())
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with contextlib.suppress(grpc.RpcError):
            for reply in self._call:
                for line in reply.lines:
                    said = json.loads(line)
                    if "hint" in said:
                        self.at[said["id"].rpartition("/")[2]] = said["t"]

    def close(self) -> None:
        """Stop listening."""
        time.sleep(1.0)  # what is on its way
        self._call.cancel()
        self._thread.join()


def measure() -> dict[str, list[float]]:
    """Milliseconds by way."""
    with (
        tempfile.TemporaryDirectory(prefix="mfsd-") as folder,
        World(Path(folder)) as world,
        world.governed(Arm.CONNECTOR) as governors,
        Client("there", governors[PREFILL].target) as straight,
        Client("here", governors[DECODE].target) as relayed,
    ):
        here, there = (world.fabric.hosts[n].address for n in (DECODE, PREFILL))
        heard, where = Heard(governors[PREFILL]), tuple_of(here, 0, there, PORTS)
        said: dict[str, float] = {}
        for client in (straight, relayed):
            client.request("r", ttft_left_s=500)
            client.transfer("warm-up", where, SIZE, stage=Stage.P2D, request="r")
            client.flush(5.0)
        time.sleep(1.0)
        for i in range(2 * ROUNDS):
            client, name = (relayed, f"relayed-{i}") if i % 2 else (straight, f"straight-{i}")
            said[name] = time.monotonic()
            client.transfer(name, where, SIZE, stage=Stage.P2D, request="r")
            time.sleep(PACE_S / 2)  # what is said just before a hint would have the daemon tick when that one comes
            if i >= KEPT:  # what is taken back before it has left would never be heard of
                old = i - KEPT
                way, kind = (relayed, "relayed") if old % 2 else (straight, "straight")
                way.cancel(transfer=f"{kind}-{old}")
            time.sleep(PACE_S / 2)
        heard.close()
        missing = [name for name in said if name not in heard.at]
        if missing:
            raise LabError(f"not heard of: {', '.join(missing)}")
        late = {n: heard.at[n] - at for n, at in said.items()}
        first = min(late.values())
        ways = ("straight", "relayed")
        return {way: [(v - first) * 1e3 for n, v in late.items() if n.startswith(way)] for way in ways}


def main() -> None:
    """See the module."""
    parser(__doc__).parse_args()
    try:
        take_precedence()
        found = measure()
    except LabError as e:
        sys.exit(f"bench relay: {e}")
    p50, p99 = ({way: float(np.percentile(v, q)) for way, v in found.items()} for q in (50, 99))
    write(
        "relay",
        [
            Figure("relayed, p50", p50["relayed"], "ms", p50["straight"], p50["relayed"] / max(p50["straight"], 1e-3)),
            Figure.against("relayed, p99", p99["relayed"], "ms", target=TARGET_MS, want="at most",
                           baseline=p99["straight"], ratio=p99["relayed"] / max(p99["straight"], 1e-3)),
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
