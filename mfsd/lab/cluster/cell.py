# SPDX-License-Identifier: Apache-2.0
"""One run of the cluster: an arm, a regime, a load and a seed."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import psutil

from mfsd.lab.cluster.arms import ARMS
from mfsd.lab.cluster.hinter import Hinter
from mfsd.lab.cluster.jobs import SLO_SCALE, Work, jobs, link_loads
from mfsd.lab.cluster.lanes import BIN_S, Meter, Plugboard
from mfsd.lab.cluster.regimes import REGIMES
from mfsd.lab.cluster.serving import Instance, Log
from mfsd.lab.cluster.teller import Teller
from mfsd.lab.hosts.health import Probe, verdict
from mfsd.lab.hosts.machine import real_time
from mfsd.lab.hosts.tcp import EFFICIENCY
from mfsd.model import Stage

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mfsd.lab.cluster.arms import Arm
    from mfsd.lab.cluster.jobs import Job
    from mfsd.lab.cluster.lanes import Lane
    from mfsd.lab.cluster.regimes import Cluster, Regime
    from mfsd.lab.hosts.network import Network, Setting

WARM_UP_S: Final = 2.0
"""Requests that arrive sooner are served but not counted: they meet an empty cluster."""
SETTLE_S: Final = 0.2
PATIENCE_S: Final = 6.0
"""After the last arrival; what is unfinished then counts as never done."""
CHUNK: Final = 65_536
"""Bytes of cross traffic at a time."""


@dataclass(frozen=True, slots=True)
class Cell:
    """What is run. Its name is that of its file."""

    arm: str
    regime: str
    work: Work
    setting: Setting = "classes"
    tag: str = ""
    """Distinguishes series that use the same cell otherwise differently."""

    @property
    def name(self) -> str:
        """Unique among the cells of a matrix."""
        w = self.work
        more = [f"slo{w.slo_scale:g}"] if w.slo_scale != SLO_SCALE else []
        more += [f"tight{w.tight:g}"] if w.tight else []
        more += ["poisson"] if w.poisson else []
        more += [self.setting] if self.setting != "classes" else []
        more += [self.tag] if self.tag else []
        return "_".join([self.regime, f"load{w.load:g}", f"seed{w.seed}", self.arm, *more])


@dataclass(slots=True)
class _Run:
    """What is alive during a run."""

    log: Log = field(default_factory=Log)
    meter: Meter = field(default_factory=Meter)
    begin: float = 0.0


def run(
    network: Network, cell: Cell, on_progress: Callable[[float], None] = lambda _s: None, regime: Regime | None = None
) -> dict[str, Any]:
    """Run a cell on a network of the regime's hosts; returns every raw figure, JSON-able. Raises LabError.

    ``regime`` stands in for the one that the cell names, if it is to differ from it.
    """
    regime, arm = regime or REGIMES[cell.regime], ARMS[cell.arm]
    work = jobs(regime, cell.work)
    network.govern(arm, cell.setting)
    gc.collect()
    gc.disable()  # a collection in the middle would look like a late machine
    try:
        return asyncio.run(_replay(network, cell, regime.cluster, arm, work, on_progress))
    finally:
        gc.enable()


async def _replay(
    network: Network, cell: Cell, cluster: Cluster, arm: Arm, work: Sequence[Job], on_progress: Callable[[float], None]
) -> dict[str, Any]:
    loop, hosts = asyncio.get_running_loop(), network.fabric.hosts
    with Plugboard() as board, Teller(network.targets) as teller:
        hinter = Hinter(teller, cluster.steps, arm.faults, cell.work.seed)
        state = _Run()
        instances = [Instance(i, cluster, hosts, board, hinter, state.log) for i in range(cluster.instances)]
        noise = [
            board.connect(hosts[f"p{p}"], hosts[f"d{d}"], Stage.NONE)
            for p in range(cluster.prefill)
            for d in range(cluster.decode)
            if arm.background
        ]
        for lane in board.lanes:
            lane.meter = state.meter
        teller.settle()
        before, own = network.cpu_seconds(), sum(psutil.Process().cpu_times()[:2])
        counted = network.counters()
        probe = Probe()
        # Real GPUs do not wait for a processor that the daemons of eight hosts are using.
        with real_time():
            state.begin = loop.time() + SETTLE_S
            for instance in instances:
                instance.begin = state.begin
            tasks = [asyncio.create_task(i.run()) for i in instances]
            tasks += [asyncio.create_task(_disturb(lane, cluster, arm.background)) for lane in noise]
            await _arrivals(state, instances, work, on_progress)
            await _drain(state, work, tasks, on_progress)
        elapsed = loop.time() - state.begin
        health = probe.stop()
        health["mfsd_cpu"] = (network.cpu_seconds() - before) / elapsed
        health["emulator_cpu"] = (sum(psutil.Process().cpu_times()[:2]) - own) / elapsed
        for task in tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks)
        counters = {k: v - counted.get(k, 0) for k, v in network.counters().items()}
        hints = teller.stats()
    return _result(cell, cluster, work, state, elapsed, health) | {"counters": counters, "hints": hints}


async def _arrivals(
    state: _Run, instances: Sequence[Instance], work: Sequence[Job], on_progress: Callable[[float], None]
) -> None:
    loop = asyncio.get_running_loop()
    for job in work:
        due = state.begin + job.at
        await asyncio.sleep(max(due - loop.time(), 0.0))
        now = loop.time()
        state.log.late.append(now - due)
        on_progress(now - state.begin)
        instances[job.instance].arrive(job)


async def _drain(
    state: _Run, work: Sequence[Job], tasks: Sequence[asyncio.Task[None]], on_progress: Callable[[float], None]
) -> None:
    loop = asyncio.get_running_loop()
    until = loop.time() + PATIENCE_S
    while len(state.log.done) < len(work) and loop.time() < until:
        await asyncio.sleep(0.05)
        on_progress(loop.time() - state.begin)
        for task in tasks:
            if task.done():
                task.result()  # raises what ended it


async def _disturb(lane: Lane, cluster: Cluster, share: float) -> None:
    """Unhinted bytes at a steady rate; what does not fit waits."""
    each = share * cluster.rate_of("d0").bytes_per_s / cluster.prefill
    while True:
        if lane.queued < 8 * CHUNK:
            lane.put(CHUNK, lambda _at: None)
        await asyncio.sleep(CHUNK / each)


def _result(
    cell: Cell, cluster: Cluster, work: Sequence[Job], state: _Run, elapsed: float, health: dict[str, float]
) -> dict[str, Any]:
    log = state.log
    rates = {h: cluster.rate_of(h).bytes_per_s * EFFICIENCY * BIN_S for h in cluster.hosts}
    first, last = int(state.begin / BIN_S), int((state.begin + work[-1].at) / BIN_S)
    peak = max((size / rates[host] for (host, _, _), size in state.meter.bins.items()), default=0.0)
    use: dict[str, float] = {}
    for (host, way, number), size in state.meter.bins.items():
        if first <= number <= last:
            use[f"{host} {way}"] = use.get(f"{host} {way}", 0.0) + size / rates[host] / (last - first + 1)
    figures = {
        **health,
        "overslept": log.overslept / log.passes if log.passes else 0.0,
        "arrival_late_p99_ms": float(np.percentile(log.late, 99)) * 1000 if log.late else 0.0,
        "link_peak": peak,
    }
    problems = verdict(figures)
    return {
        "cell": asdict(cell),
        "name": cell.name,
        "cluster": asdict(cluster),
        "at": time.time(),
        "elapsed_s": elapsed,
        "offered": {k: round(v, 4) for k, v in link_loads(cluster, work, cell.work.duration).items()},
        "used": {k: round(v, 4) for k, v in sorted(use.items())},
        "requests": [
            {
                **asdict(job),
                "began": log.began.get(job.id),
                "computed": log.computed.get(job.id),
                "done": log.done.get(job.id),
                "counted": job.at >= WARM_UP_S,
            }
            for job in work
        ],
        "collectives": [(round(at, 5), round(took, 6), size) for at, took, size in log.collectives],
        "fetch_waits_s": [round(w, 6) for w in log.fetch_waits],
        "health": {"ok": not problems, "problems": problems, **{k: round(v, 4) for k, v in figures.items()}},
    }
