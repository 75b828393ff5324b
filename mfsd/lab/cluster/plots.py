# SPDX-License-Identifier: Apache-2.0
"""Pictures of the lab's results. Needs matplotlib (extra ``lab``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
from matplotlib.figure import Figure

from mfsd.lab.cluster.arms import ARMS
from mfsd.lab.cluster.evaluate import Table, counted, curve, figure, met, ttft
from mfsd.lab.cluster.regimes import REGIMES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes

COLOURS: Final = (
    "#bbbbbb", "#4477aa", "#66ccee", "#ccbb44", "#ee6677", "#aa3377", "#228833", "#000000", "#997700", "#ee99aa",
    "#004488", "#bb5566", "#ddaa33",
)  # fmt: skip
"""By position in the list of arms; fair sharing first."""


def _style(arms: Sequence[str]) -> dict[str, dict[str, Any]]:
    return {
        a: {
            "color": COLOURS[i % len(COLOURS)],
            "label": ARMS[a].title,
            "linewidth": 2.4 if a in {"none", "ladder-net"} else 1.4,
        }
        for i, a in enumerate(arms)
    }


def attainment(table: Table, arms: Sequence[str]) -> Figure:
    """Share of requests in time against load, one panel per regime."""
    keys = table.shared(arms)
    draws = table.draws(keys, 300)
    regimes = [r for r in REGIMES if any(k[0] == r for k in keys)]
    out = Figure(figsize=(3.6 * max(len(regimes), 1) + 2.6, 4.2), layout="constrained")
    axes: Any = out.subplots(1, max(len(regimes), 1), sharey=True, squeeze=False)[0]
    styles = _style(arms)
    for arm in arms:
        points = curve(table, arm, keys, draws)
        for ax, regime in zip(axes, regimes, strict=False):
            loads = sorted(load for r, load in points if r == regime)
            figures = [figure(points[regime, load]) for load in loads]
            ax.plot(loads, [f.value for f in figures], marker="o", markersize=3, **styles[arm])
            ax.fill_between(
                loads, [f.low for f in figures], [f.high for f in figures], color=styles[arm]["color"], alpha=0.10
            )
    for ax, regime in zip(axes, regimes, strict=False):
        ax.set_title(REGIMES[regime].title, fontsize=10)
        ax.set_xlabel("offered to the busiest link")
        ax.set_ylim(0, 1)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("requests in time")
    out.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return out


def distributions(results: Sequence[Mapping[str, Any]], arms: Sequence[str]) -> Figure:
    """TTFT over unloaded TTFT, collective time, and how early P2D ends, over all cells given."""
    out = Figure(figsize=(13, 4.2), layout="constrained")
    left, middle, right = out.subplots(1, 3)
    styles = _style(arms)
    for arm in arms:
        cells = [r for r in results if r["cell"]["arm"] == arm]
        if not cells:
            continue
        slow = np.concatenate([ttft(r) / [q["unloaded"] for q in counted(r)] for r in cells])
        _cdf(left, slow, styles[arm])
        _cdf(middle, np.array([c[1] * 1000 for r in cells for c in r["collectives"]]), styles[arm])
        early = [q["at"] + q["slo"] - q["done"] for r in cells for q in counted(r) if q["done"] is not None]
        _cdf(right, np.array(early), styles[arm], total=sum(len(counted(r)) for r in cells))
    for ax, label in (
        (left, "TTFT over unloaded TTFT"),
        (middle, "collective time, ms"),
        (right, "P2D ends so long before the deadline, s"),
    ):
        ax.set_xlabel(label)
        ax.set_ylim(0, 1.02)
        ax.grid(alpha=0.3)
    left.set_xscale("log")
    middle.set_xscale("log")
    right.axvline(0, color="red", linestyle="--", linewidth=1)
    right.set_xlim(-4, 2)
    left.set_ylabel("share")
    left.legend(fontsize=7)
    return out


def _cdf(ax: Axes, values: Any, style: dict[str, Any], total: int = 0) -> None:
    ends = np.sort(values)
    if len(ends):
        ax.step(ends, np.arange(1, len(ends) + 1) / (total or len(ends)), where="post", **style)


def bars(results: Sequence[Mapping[str, Any]], arms: Sequence[str], title: str) -> Figure:
    """Attainment of arms over the cells given."""
    found = []
    for arm in arms:
        values = [met(r) for r in results if r["cell"]["arm"] == arm]
        if values:
            found.append((ARMS[arm].title, float(np.concatenate(values).mean())))
    out = Figure(figsize=(8, 0.4 * max(len(found), 1) + 1), layout="constrained")
    ax = out.subplots()
    names, values_ = [n for n, _ in found][::-1], [v for _, v in found][::-1]
    drawn = ax.barh(names, values_, color="#4477aa")
    ax.bar_label(drawn, fmt="%.3f", padding=3, fontsize=8)
    ax.set_xlabel("requests in time")
    ax.set_title(title, fontsize=10)
    return out
