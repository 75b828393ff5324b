# SPDX-License-Identifier: Apache-2.0
"""From cells to figures with confidence intervals.

Arms get the same requests, so they are compared pairwise: intervals are percentile bootstraps (95 %) over requests,
drawn within each (regime, load, seed) and the same ones for all arms. They cover the chance of which requests came, not
that of another trace.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from mfsd.lab.cluster.regimes import MEAN_OF, REGIMES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import numpy.typing as npt

DRAWS: Final = 1000
Key = tuple[str, float, int]
"""Regime, load, seed."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A mean and its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def text(self) -> str:
        """As in tables."""
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def data(self) -> list[float]:
        """JSON-able."""
        return [round(v, 4) for v in (self.value, self.low, self.high)]


def counted(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The requests of a cell that count."""
    return [r for r in result["requests"] if r["counted"]]


def met(result: Mapping[str, Any]) -> npt.NDArray[np.bool_]:
    """Per counted request: in time."""
    return np.array([r["done"] is not None and r["done"] - r["at"] <= r["slo"] for r in counted(result)])


def ttft(result: Mapping[str, Any]) -> npt.NDArray[np.float64]:
    """Seconds per counted request; what never ended has taken until the end of the run."""
    end = result["elapsed_s"]
    return np.array([(end if r["done"] is None else r["done"]) - r["at"] for r in counted(result)])


def summary(result: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of one cell, times in ms."""
    took, in_time = ttft(result), met(result)
    if not len(took):
        took, in_time = np.zeros(1), np.zeros(1, dtype=np.bool_)
    p50, p99 = np.percentile(took, [50, 99], method="inverted_cdf") * 1000
    collectives = [c[1] for c in result["collectives"]]
    early = [r["at"] + r["slo"] - r["done"] for r in counted(result) if r["done"] is not None]
    return {
        "requests": len(counted(result)),
        "attainment": float(in_time.mean()),
        "never_done": sum(r["done"] is None for r in counted(result)),
        "ttft_p50_ms": float(p50),
        "ttft_p99_ms": float(p99),
        "collective_mean_ms": float(np.mean(collectives)) * 1000 if collectives else 0.0,
        "p2d_earliness_p50_ms": float(np.median(early)) * 1000 if early else 0.0,
        "fetch_wait_ms": sum(result["fetch_waits_s"]) * 1000,
        "health": result["health"],
    }


class Table:
    """Cells of one setting as arrays: arm -> (regime, load, seed) -> in time, per counted request."""

    def __init__(self, results: Iterable[Mapping[str, Any]]) -> None:
        self.met: dict[str, dict[Key, npt.NDArray[np.bool_]]] = {}
        self.collective: dict[str, dict[Key, float]] = {}
        for result in results:
            cell = result["cell"]
            key = cell["regime"], cell["work"]["load"], cell["work"]["seed"]
            self.met.setdefault(cell["arm"], {})[key] = met(result)
            self.collective.setdefault(cell["arm"], {})[key] = summary(result)["collective_mean_ms"]

    @property
    def arms(self) -> list[str]:
        """In the order of their first cells."""
        return list(self.met)

    def shared(self, arms: Sequence[str]) -> list[Key]:
        """Keys that all these arms have."""
        keys = set.intersection(*(set(self.met.get(a, {})) for a in arms)) if arms else set()
        return sorted(keys)

    def draws(self, keys: Sequence[Key], number: int = DRAWS) -> dict[Key, npt.NDArray[np.intp]]:
        """Which requests each bootstrap draw takes, the same for every arm. Shape (number, requests) per key."""
        rng = np.random.default_rng(0)
        some = next(iter(self.met.values()))
        sizes = {k: len(next(m[k] for m in self.met.values() if k in m)) for k in keys}
        del some
        return {k: rng.integers(0, n, (number, n)) for k, n in sizes.items()}


def curve(
    table: Table, arm: str, keys: Sequence[Key], draws: Mapping[Key, npt.NDArray[np.intp]]
) -> dict[tuple[str, float], npt.NDArray[np.float64]]:
    """(regime, load) -> attainment; element 0 is what was measured, the others are bootstrap draws."""
    sums: dict[tuple[str, float], tuple[npt.NDArray[np.float64], int]] = {}
    for key in keys:
        values = table.met[arm][key]
        each = np.concatenate([[values.sum()], values[draws[key]].sum(axis=1)]).astype(float)
        total, n = sums.get(key[:2], (np.zeros(len(each)), 0))
        sums[key[:2]] = total + each, n + len(values)
    return {k: total / max(n, 1) for k, (total, n) in sums.items()}


def figure(values: npt.NDArray[np.float64]) -> Figure:
    """Of element 0 with the interval of the others."""
    low, high = np.percentile(values[1:], [2.5, 97.5])
    return Figure(float(values[0]), float(low), float(high))


def weights(fair: Mapping[tuple[str, float], npt.NDArray[np.float64]], regime: str, level: float) -> dict[float, float]:
    """Loads of a regime and their weights for linear interpolation to where fair sharing meets ``level``.

    Beyond the loads measured: the nearest one.
    """
    points = sorted((float(v[0]), load) for (r, load), v in fair.items() if r == regime)
    above = [p for p in points if p[0] >= level]
    below = [p for p in points if p[0] < level]
    if not above or not below:
        return {(below[-1] if below else above[0])[1]: 1.0}
    (high, a), (low, b) = above[0], below[-1]
    share = (level - low) / (high - low) if high > low else 1.0
    return {a: share, b: 1.0 - share}


@dataclass(frozen=True, slots=True)
class AtLevel:
    """All arms at the loads where fair sharing meets a given share."""

    level: float
    fair: float
    """What it really meets there, mean over the regimes."""
    attainment: dict[str, Figure]
    over: dict[tuple[str, str], Figure]
    """(arm, rival) -> ratio of the means over the regimes."""
    by_regime: dict[str, dict[str, Figure]]
    collective: dict[str, float]
    """Mean collective time over that of fair sharing."""
    loads: dict[str, dict[float, float]]


def at_level(table: Table, level: float, arms: Sequence[str], fair: str = "none") -> AtLevel | None:
    """Attainment of arms where fair sharing meets ``level``, mean over the regimes. None without shared cells."""
    arms = [fair, *(a for a in arms if a != fair)]
    keys = table.shared(arms)
    if not keys:
        return None
    draws = table.draws(keys)
    curves = {a: curve(table, a, keys, draws) for a in arms}
    regimes = [r for r in REGIMES if any(k[0] == r for k in keys)]
    averaged = [r for r in MEAN_OF if r in regimes] or regimes
    loads = {r: weights(curves[fair], r, level) for r in regimes}
    by = {a: {r: sum((curves[a][r, load] * w for load, w in loads[r].items()), np.zeros(1)) for r in regimes}
          for a in arms}  # fmt: skip
    mean = {a: np.mean([by[a][r] for r in averaged], axis=0) for a in arms}
    floor = 1e-9
    return AtLevel(
        level=level,
        fair=float(mean[fair][0]),
        attainment={a: figure(mean[a]) for a in arms},
        over={(a, b): figure(mean[a] / np.maximum(mean[b], floor)) for a in arms for b in arms if a != b},
        by_regime={r: {a: figure(by[a][r]) for a in arms} for r in regimes},
        collective={a: _collective(table, a, fair, keys, {r: loads[r] for r in averaged}) for a in arms},
        loads=loads,
    )


def _collective(
    table: Table, arm: str, fair: str, keys: Sequence[Key], loads: Mapping[str, Mapping[float, float]]
) -> float:
    ratios = []
    for regime, parts in loads.items():
        for load, weight in parts.items():
            here = [k for k in keys if k[:2] == (regime, load)]
            ours = np.mean([table.collective[arm][k] for k in here])
            theirs = np.mean([table.collective[fair][k] for k in here])
            ratios.append((weight, float(ours / theirs) if theirs else 1.0))
    total = sum(w for w, _ in ratios)
    return sum(w * r for w, r in ratios) / total if total else 1.0
