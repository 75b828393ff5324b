# SPDX-License-Identifier: Apache-2.0
"""``mfsd lab real``: the same requests over gloo and Mooncake's transfer engine, with and without mfsd."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from mfsd.lab import trace, workload
from mfsd.lab.hosts.governor import Governor
from mfsd.lab.hosts.health import Probe, verdict
from mfsd.lab.hosts.machine import commit, machine
from mfsd.lab.hosts.net import RTO_MIN, RTO_MIN_US, Fabric, LabError, plain_link
from mfsd.lab.hosts.process import Process
from mfsd.lab.hosts.tcp import EFFICIENCY
from mfsd.lab.models import MIXTRAL, RANKS, Scaled
from mfsd.lab.real.engine import PORTS
from mfsd.lab.real.memory import SLICE, Memory
from mfsd.lab.real.worker import Order, Role
from mfsd.lab.results import added_up, mean_ms, percentiles_ms
from mfsd.units import Rate

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from mfsd.lab.workload import Job

ARMS: Final = {"none": "fair sharing (no mfsd)", "mfs": "MFS as published", "deadline-ladder": "deadline ladder"}
"""Policies of mfsd and their titles; "none": plain TCP over plain queues."""
PREFILL: Final = tuple(f"p{i}" for i in range(RANKS))
HOSTS: Final = (*PREFILL, "d0", "s0")
ROLES: Final[dict[str, Role]] = {"p": "prefill", "d": "decode", "s": "store"}
SENDERS: Final = (*PREFILL, "s0")
LINK: Final = "200mbit"
STEPS: Final = 8
READY_S: Final = 60.0
"""Importing torch takes a while, twice on two cores."""
SETTLE_S: Final = 0.5
PATIENCE_S: Final = 20.0
PEAK_S: Final = 0.1
ENGINE: Final = {
    "MC_MIN_RPC_PORT": str(PORTS[0]),
    "MC_MAX_RPC_PORT": str(PORTS[1]),
    "MC_TCP_SLICE_SIZE": str(SLICE),
    "MC_LOG_LEVEL": "ERROR",
    "OMP_NUM_THREADS": "1",
}
"""Environment of the workers."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What every arm does."""

    jobs: Sequence[Job]
    scaled: Scaled
    max_batch: int = 4096


def plan_of(duration: float, speed: float, seed: int) -> Plan:
    """The demo's requests, scaled to ``LINK``. Raises LabError when there are none."""
    scaled = Scaled(MIXTRAL, Rate.parse(LINK), RANKS, STEPS)
    jobs = workload.jobs(trace.load(seed=seed), workload.Selection(duration=duration, speed=speed), scaled)
    if not jobs:
        raise LabError(f"no request of the trace falls into {duration:g} s")
    return Plan(jobs, scaled)


def check_extra() -> None:
    """Raise LabError when a transport is not installed."""
    missing = [name for name in ("torch", "mooncake") if importlib.util.find_spec(name) is None]
    if missing:
        raise LabError(
            f"{' and '.join(missing)} not installed: pip install 'mfsd[transports]' (--extra-index-url "
            "https://download.pytorch.org/whl/cpu spares torch's 5 GB of CUDA; Debian also needs libibverbs1 libnuma1)"
        )


def run(plan: Plan, policy: str, on_progress: Callable[[float], None] = lambda _s: None) -> dict[str, Any]:
    """Run one arm; returns its figures, JSON-able. Raises LabError."""
    check_extra()
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mfsd-")))
        fabric = stack.enter_context(Fabric(HOSTS, optional={RTO_MIN: str(RTO_MIN_US)}))
        governors: dict[str, Governor] = {}
        for name in SENDERS:
            host = fabric.hosts[name]
            if policy == "none":
                plain_link(host, plan.scaled.link)
            else:
                options = {"policy": {"name": policy}}
                governors[name] = stack.enter_context(Governor(host, directory, plan.scaled.link, options))
        orders = [
            Order(
                ROLES[name[0]],
                int(name[1:]),
                fabric.hosts[name].namespace,
                os.getpid(),
                {h.name: h.address for h in fabric.hosts.values()},
                {n: g.target for n, g in governors.items()},
                asdict(plan.scaled.model),
                plan.scaled.link.bits_per_s,
                plan.scaled.rounds,
                plan.max_batch,
                [asdict(j) for j in plan.jobs],
            )
            for name in HOSTS
        ]
        processes = {
            o.name: stack.enter_context(Process("mfsd.lab.real.worker", o.name, asdict(o), ENGINE)) for o in orders
        }
        return _replay(plan, processes, governors, on_progress)


def _replay(
    plan: Plan,
    processes: Mapping[str, Process],
    governors: Mapping[str, Governor],
    on_progress: Callable[[float], None],
) -> dict[str, Any]:
    peers = {name: p.wait("ready", READY_S) for name, p in processes.items()}
    begin = time.monotonic() + SETTLE_S
    probe, cpu = Probe(), sum(g.cpu_seconds() for g in governors.values())
    for process in processes.values():
        process.tell("go", begin=begin, peers=peers)
    last = max(j.at for j in plan.jobs)
    while time.monotonic() < begin + last + PATIENCE_S:
        time.sleep(0.1)
        on_progress(time.monotonic() - begin)
        for process in processes.values():
            process.check()
        done = processes["d0"].said.get("progress", {}).get("done", 0)
        if done == len(plan.jobs) and all("finished" in processes[p].said for p in PREFILL):
            break
    health = probe.stop()
    elapsed = time.monotonic() - begin
    health["mfsd_cpu"] = (sum(g.cpu_seconds() for g in governors.values()) - cpu) / elapsed
    counters = added_up(g.counters() for g in governors.values())
    for process in processes.values():
        process.tell("stop")
    results = {name: p.wait("result", 20) for name, p in processes.items()}
    return figures(plan, results, begin, elapsed, health) | {"mfsd": counters}


def figures(
    plan: Plan, results: Mapping[str, Mapping[str, Any]], begin: float, elapsed: float, health: Mapping[str, float]
) -> dict[str, Any]:
    """Of one arm; times in ms. What never ended counts as having taken until the end of the run."""
    done = {int(k): at - begin for k, at in results["d0"]["done"].items()}
    ttft = [done.get(j.id, elapsed) - j.at for j in plan.jobs]
    p50, p99 = percentiles_ms(ttft, 50, 99)
    logs = [results[p]["log"] for p in PREFILL]
    # The rank that came last did not wait for the other one.
    exchanges = [min(pair) for pair in zip(*(log["exchanges"] for log in logs), strict=False)]
    computed = sum(log["computed"] for log in logs)
    all_health = {
        **health,
        "overslept": sum(log["overslept"] for log in logs) / computed if computed else 0.0,
        "link_peak": _peak(plan, results["d0"]["slices"]),
    }
    problems = verdict(all_health)
    return {
        "requests": len(plan.jobs),
        "deadlines_met": sum(t <= j.slo for t, j in zip(ttft, plan.jobs, strict=True)),
        "never_done": len(plan.jobs) - len(done),
        "ttft_p50_ms": p50,
        "ttft_p99_ms": p99,
        "collective_mean_ms": mean_ms(exchanges),
        "kv_reuse_stall_ms": sum(sum(log["fetch_waits"]) for log in logs) * 1000,
        "hints": added_up(h for p in PREFILL for h in results[p]["hints"]),
        "health": {"ok": not problems, "problems": problems, **{k: round(v, 4) for k, v in all_health.items()}},
    }


def _peak(plan: Plan, slices: Mapping[str, Sequence[Sequence[float]]]) -> float:
    """P2D of the busiest rank in its best 100 ms, over what its link can carry of payload."""
    memory, rank = Memory.of(plan.jobs, plan.scaled), {j.id: j.rank for j in plan.jobs}
    bins: dict[tuple[int, int], float] = {}
    for request, seen in slices.items():
        number = int(request)
        each = memory.size[number] * memory.steps / len(memory.marks(number))
        for at, count in seen:
            key = rank[number], int(at / PEAK_S)
            bins[key] = bins.get(key, 0.0) + count * each
    return max(bins.values(), default=0.0) / (plan.scaled.link.bytes_per_s * EFFICIENCY * PEAK_S)


def compare(
    out: Path, plans: Mapping[int, Plan], policies: Sequence[str], on_progress: Callable[[str, float], None]
) -> tuple[dict[str, Any], list[list[str]]]:
    """Run every policy on every seed's plan, and write real.json; returns its content and a table. Raises LabError."""
    found: dict[str, dict[str, Any]] = {}
    for seed, plan in plans.items():
        for policy in policies:

            def tell(s: float, text: str = f"seed {seed}, {ARMS[policy]}") -> None:
                on_progress(text, s)

            found.setdefault(policy, {})[str(seed)] = run(plan, policy, tell)
    some = next(iter(plans.values()))
    data = {
        "policies": found,
        "settings": {
            "hosts": "two prefill ranks, a decode host, a store; an mfsd on each sender",
            "transports": "gloo all-to-all (stage 2), Mooncake transfer engine over TCP (1: reads, 3: writes)",
            "link": f"{LINK} out of each host, standing for {some.scaled.model.link_bits / 1e9:g} Gbit/s",
            "model": f"{some.scaled.model.name}, {STEPS} groups of layers",
            "slo": "3x the unloaded TTFT of each request (computed)",
            "versions": {name: _version(name) for name in ("torch", "mooncake-transfer-engine-non-cuda")},
        },
        "machine": machine(),
        "commit": commit(),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "real.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    return data, table(found)


def table(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[list[str]]:
    """A row per policy, over all seeds."""
    rows = [["policy", "runs", "in time", "TTFT p50", "p99", "collective", "stage-1 stalls", "health"]]
    for policy, runs in found.items():
        each = list(runs.values())
        met, all_of_them = sum(r["deadlines_met"] for r in each), sum(r["requests"] for r in each)
        problems = [p for r in each for p in r["health"]["problems"]]

        def mean(name: str, each: Sequence[Mapping[str, Any]] = each) -> float:
            return float(np.mean([r[name] for r in each]))

        rows.append(
            [
                ARMS[policy],
                str(len(each)),
                f"{met} of {all_of_them}",
                f"{mean('ttft_p50_ms'):.0f} ms",
                f"{mean('ttft_p99_ms'):.0f} ms",
                f"{mean('collective_mean_ms'):.1f} ms",
                f"{mean('kv_reuse_stall_ms'):.0f} ms",
                "; ".join(dict.fromkeys(problems)) or "ok",
            ]
        )
    return rows


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "unknown"
