# SPDX-License-Identifier: Apache-2.0
"""One arm of an experiment: the same work on the same network, governed by mfsd or not."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from mfsd.lab.host import ARRIVAL, Order
from mfsd.lab.hosts.governor import Governor
from mfsd.lab.hosts.health import Probe
from mfsd.lab.hosts.levels import LevelWatch
from mfsd.lab.hosts.net import RTO_MIN, RTO_MIN_US, Fabric, LabError, plain_link
from mfsd.lab.hosts.process import Process
from mfsd.lab.models import RANKS, Scaled

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy.typing as npt

    from mfsd.lab.hosts.levels import LevelChange
    from mfsd.lab.hosts.net import Host
    from mfsd.lab.workload import Job

PREFILL: Final = [f"p{i}" for i in range(RANKS)]
DECODE: Final = "d0"
SETTLE_S: Final = 0.3
"""From "go" to the beginning of the replay."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What an arm does, apart from being governed or not."""

    jobs: Sequence[Job]
    scaled: Scaled
    max_batch: int = 4096
    """New tokens that a rank takes into an iteration, unless one request alone has more."""
    rto_min_us: int | None = RTO_MIN_US
    """tcp_rto_min_us of every host, where the kernel has it; None: the kernel's default, 200 ms."""
    patience_s: float = 20.0
    """Wait so long after the last arrival for what is unfinished; after that it counts as never done."""
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """mfsd's configuration where it differs from the defaults."""


@dataclass(slots=True)
class Outcome:
    """What happened. Times in seconds since the beginning of the replay; durations in seconds."""

    governed: bool
    done: dict[int, float]
    """Request -> when its KV was complete at the decode host."""
    ranks: list[dict[str, Any]]
    """rank.Log of each rank, as JSON."""
    hints: list[dict[str, Any]]
    """client.Stats of each rank."""
    arrivals: dict[str, npt.NDArray[Any]]
    """Per receiving host, dtype host.ARRIVAL."""
    levels: list[list[LevelChange]]
    """Per rank; empty without mfsd."""
    counters: list[dict[str, int]]
    """mfsd's own, per rank."""
    health: dict[str, float]
    sysctls: dict[str, str]


def run(plan: Plan, *, governed: bool, on_progress: Callable[[float], None] = lambda _s: None) -> Outcome:
    """Run one arm. ``on_progress`` is told the seconds of replay that have passed. Raises LabError."""
    optional = {} if plan.rto_min_us is None else {RTO_MIN: str(plan.rto_min_us)}
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mfsd-")))
        fabric = stack.enter_context(Fabric([*PREFILL, DECODE], optional=optional))
        hosts = [fabric.hosts[name] for name in PREFILL]
        governors = []
        for host in hosts:
            if governed:
                governors.append(stack.enter_context(Governor(host, directory, plan.scaled.link, plan.options)))
            else:
                plain_link(host, plan.scaled.link)
        orders = _orders(plan, hosts, fabric.hosts[DECODE], directory, [g.target for g in governors])
        processes = [stack.enter_context(_process(order)) for order in orders]
        return _replay(plan, processes, governors, directory, dict(fabric.applied), on_progress)


def _process(order: Order) -> Process:
    return Process("mfsd.lab.host", f"{order.role}{order.index}", asdict(order))


def _orders(plan: Plan, hosts: list[Host], decoder: Host, directory: Path, targets: list[str]) -> list[Order]:
    model = asdict(plan.scaled.model)

    def order(role: Any, index: int, host: Host, peers: list[str], jobs: list[dict[str, Any]]) -> Order:
        target = targets[index] if role == "prefill" and targets else ""
        bits = plan.scaled.link.bits_per_s
        here = str(directory)
        return Order(role, index, host.namespace, os.getpid(), here, peers, target, model, bits, plan.max_batch, jobs)

    out = [order("decode", 0, decoder, [], [])]
    for i, host in enumerate(hosts):
        jobs = [asdict(j) for j in plan.jobs if j.rank == i]
        out.append(order("prefill", i, host, [hosts[1 - i].address, decoder.address], jobs))
    return out


def _replay(
    plan: Plan,
    processes: list[Process],
    governors: list[Governor],
    directory: Path,
    sysctls: dict[str, str],
    on_progress: Callable[[float], None],
) -> Outcome:
    decoder, *ranks = processes
    for process in processes:
        process.wait("ready", 20)
    for process in processes:
        process.tell("connect")
    cookies = [p.wait("connected", 20).get("cookies", {}) for p in processes][1:]
    begin = time.monotonic() + SETTLE_S
    probe = Probe()
    watches = [LevelWatch(g, c, begin) for g, c in zip(governors, cookies, strict=False)]
    for process in processes:
        process.tell("go", begin=begin)
    last = max((j.at for j in plan.jobs), default=0.0)
    while time.monotonic() < begin + last + plan.patience_s:
        time.sleep(0.1)
        on_progress(time.monotonic() - begin)
        for process in processes:
            process.check()
        done = decoder.said.get("progress", {}).get("done", 0)
        if done == len(plan.jobs) and all("finished" in r.said for r in ranks):
            break
    health = probe.stop()
    levels = [w.stop() for w in watches]
    counters = [g.counters() for g in governors]
    health["mfsd_cpu_s"] = sum(g.cpu_seconds() for g in governors)
    health["tick_p50_ms"] = max((g.status().tick_p50_ms for g in governors), default=0.0)
    for process in processes:
        process.tell("stop")
    results = [p.wait("result", 20) for p in processes]
    health["emulator_cpu_s"] = sum(r["cpu_s"] for r in results)
    return Outcome(
        governed=bool(governors),
        done={int(k): at - begin for k, at in results[0]["done"].items()},
        ranks=[_since(r["log"], begin) for r in results[1:]],
        hints=[r["hints"] for r in results[1:]],
        arrivals={p.name: _arrivals(directory / f"arrivals-{p.name}.npy", begin) for p in processes},
        levels=levels,
        counters=counters,
        health=health,
        sysctls=sysctls,
    )


def _arrivals(path: Path, begin: float) -> npt.NDArray[Any]:
    rows: npt.NDArray[Any] = np.load(path)
    if rows.dtype != ARRIVAL:
        raise LabError(f"{path.name} holds {rows.dtype}")
    rows["at"] -= begin
    return rows


def _since(log: dict[str, Any], begin: float) -> dict[str, Any]:
    """A rank's log with times since the beginning."""
    log["exchanges"] = [(at - begin, took, size) for at, took, size in log["exchanges"]]
    log["batches"] = [(a - begin, b - begin, jobs) for a, b, jobs in log["batches"]]
    log["p2d_began"] = {int(k): at - begin for k, at in log["p2d_began"].items()}
    log["lane_of"] = {int(k): lane for k, lane in log["lane_of"].items()}
    return log
