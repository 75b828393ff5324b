# SPDX-License-Identifier: Apache-2.0
"""The serving process of one host, a prefill rank or the decode host: started by arm.py, spoken to over pipes.

-> its Order (a line of JSON)
<- {"what": "ready"}                     it listens
-> {"what": "connect"}                   everybody listens
<- {"what": "connected"}
-> {"what": "go", "begin": ...}          monotonic time of the replay's beginning
<- {"what": "progress", "done": n}       decode: requests whose KV is complete
<- {"what": "finished"}                  prefill: both ranks have computed everything
-> {"what": "stop"}
<- {"what": "result", ...}               and arrivals.npy in the directory
"""

from __future__ import annotations

import json
import os
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import psutil

from mfsd.client import Client
from mfsd.client.selectors import cookie_of
from mfsd.lab.hosts.enter import die_with_parent, enter
from mfsd.lab.messages import Messages
from mfsd.lab.models import Model, Scaled
from mfsd.lab.rank import KV_LANES, P2D_LANES, Lanes, Rank
from mfsd.lab.traffic import Frame, Lane, Server
from mfsd.lab.workload import Job
from mfsd.units import Rate

PORT: Final = 7100
ARRIVAL: Final = np.dtype([("at", "f8"), ("stage", "u1"), ("key", "u4"), ("size", "u4"), ("lane", "u1")])
"""One read of a reading thread; ``at`` in monotonic seconds."""
_out = threading.Lock()


@dataclass(frozen=True, slots=True)
class Order:
    """What a host is to do. JSON-able."""

    role: Literal["prefill", "decode"]
    index: int
    namespace: str
    parent: int
    directory: str
    """Of the arm; management sockets and results."""
    peers: list[str]
    """Addresses of the other rank and of the decode host; none for the decode host."""
    target: str
    """Of mfsd's Hints service; empty: no hints."""
    model: dict[str, Any]
    """As ``asdict`` of models.Model."""
    link_bits: float
    max_batch: int
    jobs: list[dict[str, Any]]
    """As ``asdict`` of Job."""


def say(**message: Any) -> None:
    """Tell the runner."""
    with _out:
        print(json.dumps(message), flush=True)  # noqa: T201 - stdout is the way back to the runner


def hear(what: str) -> dict[str, Any]:
    """Wait for the runner to say ``what``; it is gone when its end of the pipe is."""
    line = sys.stdin.readline()
    if not line:
        sys.exit(1)
    message: dict[str, Any] = json.loads(line)
    if message["what"] != what:
        raise RuntimeError(f"expected {what!r}, got {line.strip()}")
    return message


def save(server: Server, order: Order) -> None:
    """Write what has arrived, in order of time."""
    rows = np.array([(a.at, a.stage, a.key, a.size, a.lane) for a in server.arrivals()], dtype=ARRIVAL)
    np.save(Path(order.directory) / f"arrivals-{order.role}{order.index}.npy", np.sort(rows, order="at"))


def decode(order: Order) -> None:
    """Receive KV, and note when a request's is complete: that is its first token."""
    layers = Model(**order.model).layers
    got: dict[int, int] = {}
    done: dict[int, float] = {}
    lock = threading.Lock()

    def on_frame(frame: Frame, at: float) -> None:
        with lock:
            got[frame.key] = got.get(frame.key, 0) + 1
            if got[frame.key] == layers:
                done[frame.key] = at
                say(what="progress", done=len(done))

    server = Server(PORT, on_frame)
    say(what="ready")
    hear("connect")
    say(what="connected")
    hear("go")
    hear("stop")
    server.close()
    save(server, order)
    with lock:
        say(what="result", done=done, cpu_s=sum(psutil.Process().cpu_times()[:2]))


def prefill(order: Order) -> None:
    """Play one rank."""
    scaled = Scaled(Model(**order.model), Rate(order.link_bits / 8))
    ranks: list[Rank] = []

    def on_frame(frame: Frame, at: float) -> None:
        ranks[0].on_frame(frame, at)  # nobody sends before "go"

    server = Server(PORT, on_frame)
    path = Path(order.directory) / "management"
    accept = Messages.listen(path) if order.index == 0 else None
    say(what="ready")
    hear("connect")
    other, decoder = order.peers
    lanes = Lanes(
        Lane((other, PORT), 0),
        [Lane((other, PORT), i) for i in range(KV_LANES)],
        [Lane((decoder, PORT), P2D_LANES * order.index + i) for i in range(P2D_LANES)],
    )
    with Client(f"rank{order.index}", order.target) as client:
        rank = Rank(order.index, [Job(**j) for j in order.jobs], scaled, lanes, client, order.max_batch)
        ranks.append(rank)
        peer = accept() if accept is not None else Messages.connect(path)
        peer.receive(rank.on_message)
        say(what="connected", cookies={lane.index: cookie_of(lane.sock) for lane in lanes.p2d})
        rank.start(hear("go")["begin"], peer)
        threading.Thread(target=_tell_end, args=(rank,), daemon=True).start()
        hear("stop")
        stats = asdict(client.stats)
    save(server, order)
    say(what="result", log=asdict(rank.log), hints=stats, cpu_s=sum(psutil.Process().cpu_times()[:2]))
    for lane in lanes.all():
        lane.close()


def _tell_end(rank: Rank) -> None:
    rank.finished.wait()
    say(what="finished")


def fail(args: threading.ExceptHookArgs) -> None:
    """A thread has failed: so has the experiment."""
    threading.__excepthook__(args)
    os._exit(1)


def main() -> None:
    """Do what the order on stdin says."""
    threading.excepthook = fail
    order = Order(**json.loads(sys.stdin.readline()))
    die_with_parent(order.parent)
    enter(order.namespace)
    (decode if order.role == "decode" else prefill)(order)
    sys.stdout.flush()
    os._exit(0)  # the reading threads are blocked in the kernel and have nothing to lose


if __name__ == "__main__":
    main()
