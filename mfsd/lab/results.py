# SPDX-License-Identifier: Apache-2.0
"""From what happened to figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from mfsd.lab.hosts.health import verdict
from mfsd.lab.hosts.tcp import EFFICIENCY
from mfsd.lab.models import RANKS
from mfsd.lab.rank import P2D_LANES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import numpy.typing as npt

    from mfsd.lab.arm import Outcome, Plan

PEAK_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class Timing:
    """One request of one arm; seconds since the beginning of the replay."""

    id: int
    rank: int
    arrival: float
    deadline: float
    began: float
    """Of its forward pass."""
    computed: float
    """End of it."""
    done: float
    """First token: its KV is complete at the decode host. inf: never."""

    @property
    def ttft(self) -> float:
        """Seconds; inf: never."""
        return self.done - self.arrival

    @property
    def met(self) -> bool:
        """In time."""
        return self.done <= self.deadline


def timings(plan: Plan, outcome: Outcome) -> list[Timing]:
    """All requests, in order of arrival."""
    passes = {job: (began, end) for rank in outcome.ranks for began, end, jobs in rank["batches"] for job in jobs}
    never = (float("inf"), float("inf"))
    return [
        Timing(j.id, j.rank, j.at, j.at + j.slo, *passes.get(j.id, never), outcome.done.get(j.id, float("inf")))
        for j in plan.jobs
    ]


def egress(outcome: Outcome, rank: int) -> npt.NDArray[Any]:
    """What arrived from one rank, wherever it went; dtype host.ARRIVAL, in order of time."""
    decode = outcome.arrivals["decode0"]
    own = decode[(decode["lane"] // P2D_LANES) == rank]
    out: npt.NDArray[Any] = np.sort(np.concatenate([own, outcome.arrivals[f"prefill{1 - rank}"]]), order="at")
    return out


def binned(rows: npt.NDArray[Any], start: float, end: float, width: float) -> npt.NDArray[np.float64]:
    """Bytes per bin of ``width`` seconds from ``start``, shape (bins,)."""
    bins = max(int(np.ceil((end - start) / width)), 1)
    at = np.floor((rows["at"] - start) / width).astype(np.int64)
    inside = (at >= 0) & (at < bins)
    out: npt.NDArray[Any] = np.bincount(at[inside], rows["size"][inside].astype(np.float64), minlength=bins)
    return out.astype(np.float64)


def link_peak(plan: Plan, outcome: Outcome) -> float:
    """Goodput of the busiest rank in its best 100 ms, over what its link can carry of TCP payload."""
    best = 0.0
    for rank in range(RANKS):
        rows = egress(outcome, rank)
        if len(rows):
            best = max(best, float(binned(rows, 0.0, float(rows["at"][-1]) + PEAK_S, PEAK_S).max()))
    return best / (plan.scaled.link.bytes_per_s * EFFICIENCY * PEAK_S)


def percentiles_ms(values: Sequence[float], *qs: float) -> list[float]:
    """Percentiles in ms that were really measured (no interpolation); 0 for no values."""
    if not values:
        return [0.0] * len(qs)
    return [float(x) * 1000 for x in np.percentile(values, qs, method="inverted_cdf")]


def summary(plan: Plan, outcome: Outcome) -> dict[str, Any]:
    """The figures of one arm, JSON-able; times in ms. What never ended counts as having taken until we stopped."""
    all_of_them = timings(plan, outcome)
    stopped = max((j.at for j in plan.jobs), default=0.0) + plan.patience_s
    ttft = [min(t.done, stopped) - t.arrival for t in all_of_them]
    p50, p99 = percentiles_ms(ttft, 50, 99)
    exchanges = [(took, size) for rank in outcome.ranks for _, took, size in rank["exchanges"]]
    took = [t for t, _ in exchanges]
    collective_p50, collective_p99 = percentiles_ms(took, 50, 99)
    wire = plan.scaled.link.bytes_per_s * EFFICIENCY
    finished = [t for t in all_of_them if np.isfinite(t.done)]
    computed = sum(rank["computed"] for rank in outcome.ranks)
    figures = {
        **outcome.health,
        "overslept": sum(rank["overslept"] for rank in outcome.ranks) / computed if computed else 0.0,
        "link_peak": link_peak(plan, outcome),
    }
    problems = verdict(figures)
    return {
        "requests": len(all_of_them),
        "deadlines_met": sum(t.met for t in all_of_them),
        "never_done": len(all_of_them) - len(finished),
        "ttft_p50_ms": p50,
        "ttft_p99_ms": p99,
        "ttft_mean_ms": mean_ms(ttft),
        "ttft_over_unloaded_p50": float(np.median([t / j.unloaded for t, j in zip(ttft, plan.jobs, strict=True)])),
        "waiting_mean_ms": mean_ms([t.began - t.arrival for t in finished]),
        "prefill_mean_ms": mean_ms([t.computed - t.began for t in finished]),
        "p2d_after_prefill_mean_ms": mean_ms([t.done - t.computed for t in finished]),
        "collective_mean_ms": mean_ms(took),
        "collective_p50_ms": collective_p50,
        "collective_p99_ms": collective_p99,
        "collective_wire_ms": mean_ms([size / wire for _, size in exchanges]),
        "kv_reuse_stall_ms": sum(sum(rank["fetch_waits"]) for rank in outcome.ranks) * 1000,
        "mfsd": added_up(outcome.counters),
        "health": {"ok": not problems, "problems": problems, **{k: round(v, 4) for k, v in figures.items()}},
    }


def mean_ms(values: Sequence[float]) -> float:
    """Mean of seconds in ms; 0 for no values."""
    return float(np.mean(values)) * 1000 if values else 0.0


def added_up(counters: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Counters of several hosts, name by name."""
    out: dict[str, int] = {}
    for one in counters:
        for name, value in one.items():
            out[name] = out.get(name, 0) + value
    return out
