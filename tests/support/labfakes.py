# SPDX-License-Identifier: Apache-2.0
"""A wire without a network for the emulator, and a run without an emulator for the reports."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from mfsd.lab.arm import Outcome, Plan
from mfsd.lab.host import ARRIVAL
from mfsd.lab.models import Model, Scaled
from mfsd.lab.rank import Lanes, Rank
from mfsd.lab.workload import Job
from mfsd.model import Stage
from mfsd.units import Rate

if TYPE_CHECKING:
    from collections.abc import Callable

    from mfsd.lab.traffic import Frame

LAYERS = 4
TINY = Scaled(Model("tiny", LAYERS, kv_bytes=64, dispatch_bytes=128, compute_s=1e-6, link_bits=1e9), Rate(1e9 / 8))


@dataclass
class Hints:
    """A client that remembers what it was told, in order."""

    said: list[tuple[str, Any]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __getattr__(self, name: str) -> Callable[..., None]:
        def hint(*args: Any, **kwargs: Any) -> None:
            with self.lock:
                self.said.append((name, (args, kwargs)))

        return hint

    def of(self, name: str) -> list[Any]:
        with self.lock:
            return [what for said, what in self.said if said == name]


@dataclass
class FakeLane:
    """Delivers at once, keeps what it carried."""

    index: int
    deliver: Callable[[Frame], None]
    queued: int = 0
    sock: object = None
    carried: list[Frame] = field(default_factory=list)

    def put(self, frame: Frame, announce: Callable[[], None], written: Callable[[], None]) -> None:
        announce()
        self.carried.append(frame)
        # From another thread, as a reader would: the rank may hold its own lock now.
        threading.Thread(target=self._arrive, args=(frame, written), daemon=True).start()

    def _arrive(self, frame: Frame, written: Callable[[], None]) -> None:
        self.deliver(frame)
        written()


class Mail:
    """Management network: to one rank."""

    def __init__(self, to: Callable[[dict[str, Any]], None]) -> None:
        self.to = to
        self.sent: list[dict[str, Any]] = []

    def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)
        self.to(message)


class Pair:
    """Two ranks joined by fake lanes."""

    def __init__(self, jobs: list[Job], max_batch: int) -> None:
        self.decoded: list[Frame] = []
        self.hints = [Hints(), Hints()]
        self.ranks: list[Rank] = []
        self.lanes: list[Any] = []
        for i in range(2):
            lanes: Any = Lanes(
                FakeLane(0, self._to(1 - i)),  # type: ignore[arg-type]  # the same shape as Lane
                [FakeLane(0, self._to(1 - i))],  # type: ignore[list-item]
                [FakeLane(4 * i + k, self.decoded.append) for k in range(2)],  # type: ignore[misc]
            )
            self.lanes.append(lanes)
            mine = [j for j in jobs if j.rank == i]
            self.ranks.append(Rank(i, mine, TINY, lanes, self.hints[i], max_batch))  # type: ignore[arg-type]
        self.mail = [Mail(self.ranks[1].on_message), Mail(self.ranks[0].on_message)]

    def _to(self, rank: int) -> Callable[[Frame], None]:
        return lambda frame: self.ranks[rank].on_frame(frame, 0.0)

    def run(self, begin: float) -> None:
        for rank, mail in zip(self.ranks, self.mail, strict=True):
            rank.start(begin, mail)  # type: ignore[arg-type]  # the same shape as Messages
        for rank in self.ranks:
            assert rank.finished.wait(20), "the ranks wait for each other"


def job(number: int, rank: int, *, at: float = 0.0, new: int = 100, remote: int = 0, slo: float = 1.0) -> Job:
    return Job(number, at, rank, new + 2 * remote, new, remote, slo / 3, slo)


def outcome(plan: Plan, done: dict[int, float], *, governed: bool) -> Outcome:
    """A run in which each request took a pass of 0.1 s and its KV came in ten pieces until it was done."""
    ranks: list[dict[str, Any]] = []
    pieces: list[tuple[float, int, int, int, int]] = []
    for rank in range(2):
        mine = [j for j in plan.jobs if j.rank == rank]
        ranks.append(
            {
                "batches": [(j.at, j.at + 0.1, [j.id]) for j in mine],
                "exchanges": [(j.at, 0.002, 125_000) for j in mine],
                "fetch_waits": [0.0],
                "computed": 1.0,
                "overslept": 0.01,
                "lane_of": {j.id: 4 * rank for j in mine},
                "p2d_began": {j.id: j.at + 0.02 for j in mine},
            }
        )
        for j in mine:
            end = done.get(j.id, j.at + 1.0)
            pieces += [(end - 0.01 * k, Stage.P2D, j.id, 1_200_000, 4 * rank) for k in range(10)]
    decode = np.sort(np.array(pieces, dtype=ARRIVAL), order="at")
    nothing = np.zeros(0, dtype=ARRIVAL)
    return Outcome(
        governed=governed,
        done=done,
        ranks=ranks,
        hints=[{}, {}],
        arrivals={"decode0": decode, "prefill0": nothing, "prefill1": nothing},
        levels=[[], []] if governed else [],
        counters=[{"rescues": 2}, {"rescues": 3}] if governed else [],
        health={"cpu": 0.5, "timer_late_p99_ms": 1.0, "mfsd_cpu_s": 0.0, "emulator_cpu_s": 0.0},
        sysctls={"net.ipv4.tcp_rto_min_us": "5000"},
    )
