# SPDX-License-Identifier: Apache-2.0
"""From cells to figures with confidence intervals.

Arms get the same requests, so they are compared pairwise: intervals are percentile bootstraps (95 %) over requests,
drawn within each (regime, load, seed) and the same ones for all arms. They cover the chance of which requests came, not
that of another trace.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from mfsd.lab.results.figures import collective_ms, met
from mfsd.lab.settings import MEAN_OF, PRESETS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import numpy.typing as npt

    from mfsd.lab.results.result import Result

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


def key_of(result: Result) -> Key:
    """What two arms must share to be compared."""
    s = result.settings
    return s.regime, s.load, s.seed


class Table:
    """Cells of one setting as arrays: arm -> (regime, load, seed) -> in time, per counted request."""

    def __init__(self, results: Iterable[Result]) -> None:
        self.met: dict[str, dict[Key, npt.NDArray[np.bool_]]] = {}
        self.collective: dict[str, dict[Key, float]] = {}
        for result in results:
            arm, key = result.settings.arm, key_of(result)
            self.met.setdefault(arm, {})[key] = met(result)
            self.collective.setdefault(arm, {})[key] = collective_ms(result)

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
        sizes = {k: len(next(m[k] for m in self.met.values() if k in m)) for k in keys}
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


def nearest(fair: Mapping[tuple[str, float], npt.NDArray[np.float64]], regime: str, level: float) -> float:
    """The measured load of a regime at which fair sharing's attainment is nearest to ``level``."""
    return min((abs(float(v[0]) - level), load) for (r, load), v in fair.items() if r == regime)[1]


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
    loads: dict[str, float]
    """Regime -> load."""


def at_level(table: Table, level: float, references: Sequence[str] = ()) -> AtLevel | None:
    """Attainment where fair sharing meets ``level``, mean over the regimes; None without cells of fair sharing.

    Arms that have not run all of these cells are left out, and so are loads at which the references have not run.
    """
    # Fair sharing alone may have run at more loads, to find those that matter.
    fair = "none"
    everywhere = table.shared([fair, *(a for a in references if a in table.met)])
    if not everywhere:
        return None
    points = curve(table, fair, everywhere, table.draws(everywhere, 1))
    loads = {r: nearest(points, r, level) for r in PRESETS if any(k[0] == r for k in everywhere)}
    keys = [k for k in everywhere if loads[k[0]] == k[1]]
    arms = [fair, *(a for a in table.arms if a != fair and set(keys) <= set(table.met[a]))]
    draws = table.draws(keys)
    curves = {a: curve(table, a, keys, draws) for a in arms}
    averaged: list[str] = [r for r in MEAN_OF if r in loads] or list(loads)
    mean = {a: np.mean([curves[a][r, loads[r]] for r in averaged], axis=0) for a in arms}
    floor = 1e-9
    return AtLevel(
        level=level,
        fair=float(mean[fair][0]),
        attainment={a: figure(mean[a]) for a in arms},
        over={(a, b): figure(mean[a] / np.maximum(mean[b], floor)) for a in arms for b in arms if a != b},
        by_regime={r: {a: figure(curves[a][r, load]) for a in arms} for r, load in loads.items()},
        collective={a: _collective(table, a, fair, [k for k in keys if k[0] in averaged]) for a in arms},
        loads=loads,
    )


def _collective(table: Table, arm: str, fair: str, keys: Sequence[Key]) -> float:
    """Mean over the regimes of mean collective time over fair sharing's."""
    ratios = []
    for regime in {k[0] for k in keys}:
        ours, theirs = (np.mean([table.collective[a][k] for k in keys if k[0] == regime]) for a in (arm, fair))
        ratios.append(float(ours / theirs) if theirs else 1.0)
    return float(np.mean(ratios))
