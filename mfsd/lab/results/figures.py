# SPDX-License-Identifier: Apache-2.0
"""From cells to figures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mfsd.lab.hosts.tcp import EFFICIENCY

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from mfsd.lab.results.result import Result


def met(result: Result) -> npt.NDArray[np.bool_]:
    """Per counted request: in time."""
    return np.array([r.met for r in result.counted], dtype=np.bool_)


def ttft(result: Result) -> npt.NDArray[np.float64]:
    """Seconds per counted request; what never ended has taken until the end of the run."""
    return np.array([min(r.ttft, result.elapsed - r.at) for r in result.counted])


def collective_ms(result: Result) -> float:
    """Mean time of a collective in ms."""
    return mean_ms([took for _, took, _ in result.collectives])


def mean_ms(values: Sequence[float]) -> float:
    """Mean of seconds in ms; 0 for no values."""
    return float(np.mean(values)) * 1000 if len(values) else 0.0


def percentiles_ms(values: Sequence[float], *qs: float) -> list[float]:
    """Percentiles in ms that were really measured (no interpolation); 0 for no values."""
    if not len(values):
        return [0.0] * len(qs)
    return [float(x) * 1000 for x in np.percentile(values, qs, method="inverted_cdf")]


def summary(result: Result) -> dict[str, Any]:
    """The figures of one cell, times in ms. JSON-able."""
    requests, in_time, times = result.counted, met(result), ttft(result).tolist()
    done = [(r, r.began, r.computed, r.done) for r in requests
            if r.began is not None and r.computed is not None and r.done is not None]  # fmt: skip
    took = [t for _, t, _ in result.collectives]
    p50, p99 = percentiles_ms(times, 50, 99)
    collective_p50, collective_p99 = percentiles_ms(took, 50, 99)
    wire = result.settings.scaled.link.bytes_per_s * EFFICIENCY / (result.settings.prefill - 1)
    return {
        "requests": len(requests),
        "deadlines_met": int(in_time.sum()),
        "attainment": float(in_time.mean()) if len(in_time) else 0.0,
        "never_done": sum(r.done is None for r in requests),
        "ttft_p50_ms": p50,
        "ttft_p99_ms": p99,
        "ttft_mean_ms": mean_ms(times),
        "ttft_over_unloaded_p50": float(np.median([t / r.unloaded for t, r in zip(times, requests, strict=True)]))
        if requests
        else 0.0,
        "waiting_mean_ms": mean_ms([began - r.at for r, began, _, _ in done]),
        "prefill_mean_ms": mean_ms([computed - began for _, began, computed, _ in done]),
        "p2d_after_prefill_mean_ms": mean_ms([end - computed for _, _, computed, end in done]),
        "p2d_earliness_p50_ms": float(np.median([r.deadline - end for r, _, _, end in done])) * 1000 if done else 0.0,
        "collective_mean_ms": collective_ms(result),
        "collective_p50_ms": collective_p50,
        "collective_p99_ms": collective_p99,
        "collective_wire_ms": mean_ms([size / wire for _, _, size in result.collectives]),
        "kv_reuse_stall_ms": sum(result.fetch_waits) * 1000,
        "mfsd": result.counters,
        "hints": result.hints,
        "health": {"ok": result.health.ok, "problems": result.health.problems, **result.health.figures},
    }
