# SPDX-License-Identifier: Apache-2.0
"""What a hint costs the thread that gives it: with a daemon, without one, and with one that hangs.

    make bench NAME=client        (build/bench/client.json)

A transfer on a socket (whose cookie and position are asked of the kernel), one by selector, a completion, a request;
singly, at a pace that a worker might have, with the garbage collector as it is in a worker.
"""

from __future__ import annotations

import contextlib
import socket
import time
from typing import TYPE_CHECKING, Final

import numpy as np

from bench.common import Figure, parser, write
from bench.parts.host import daemon
from mfsd.client import Client, Stage, tuple_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROUNDS: Final = 20_000
PACE_S: Final = 50e-6
"""Between two hints: 10,000 or so a second, with the work around them."""
TARGETS_US: Final = {"p50": 5.0, "p99": 50.0}


@contextlib.contextmanager
def target_of(what: str) -> Iterator[str]:
    """Target of a daemon that is ``there``, ``gone`` (never was), or ``hanging`` (stopped)."""
    if what == "gone":
        yield "unix:/nowhere/mfsd.sock"
        return
    with daemon('sockets = "listing"') as mfsd:
        if what == "hanging":
            mfsd.process.suspend()
        try:
            yield mfsd.target
        finally:
            mfsd.process.resume()


def timed(call: Callable[[int], None]) -> dict[str, float]:
    """Microseconds of one call: p50 and p99."""
    took = np.empty(ROUNDS)
    clock = time.perf_counter_ns
    for i in range(ROUNDS):
        begun = clock()
        call(i)
        took[i] = clock() - begun
        until = begun + PACE_S * 1e9
        while clock() < until:
            pass
    return {"p50": float(np.percentile(took, 50)) / 1e3, "p99": float(np.percentile(took, 99)) / 1e3}


def measure(what: str) -> dict[str, dict[str, float]]:
    """By kind of hint."""
    with target_of(what) as target, Client(target=target) as client, socket.create_server(("127.0.0.1", 0)) as server:
        sock = socket.create_connection(server.getsockname())
        with sock:
            there = tuple_of("127.0.0.1", 6000)
            client.request("r", ttft_left_s=60)
            return {
                "request": timed(lambda i: client.request(f"r{i}", ttft_left_s=1.0)),
                "transfer on a socket": timed(
                    lambda i: client.transfer(f"s{i}", sock, 1 << 20, stage=Stage.P2D, request="r")
                ),
                "transfer by selector": timed(
                    lambda i: client.transfer(f"t{i}", there, 1 << 20, stage=Stage.P2D, request="r")
                ),
                "completion": timed(lambda i: client.done(transfer=f"t{i}")),
            }


def main() -> None:
    parser(__doc__).parse_args()
    write(
        "client",
        [
            Figure.against(f"{what}: {kind}, {name}", found[name], "us", target=limit, want="at most")
            for what in ("there", "gone", "hanging")
            for kind, found in measure(what).items()
            for name, limit in TARGETS_US.items()
        ],
    )


if __name__ == "__main__":
    main()
