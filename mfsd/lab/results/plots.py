# SPDX-License-Identifier: Apache-2.0
"""Pictures of results. Needs matplotlib (extra ``lab``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from mfsd.ground.model import Stage
from mfsd.lab.arms import arm_of
from mfsd.lab.results.evaluate import Table, curve, figure
from mfsd.lab.results.figures import met
from mfsd.lab.results.result import binned
from mfsd.lab.results.story import SCAVENGER, rank_of
from mfsd.lab.settings import PRESETS
from mfsd.policy import registry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import numpy.typing as npt
    from matplotlib.axes import Axes

    from mfsd.lab.results.result import Result
    from mfsd.lab.results.story import Story
    from mfsd.lab.serving.driver import Played

COLOURS: Final = (
    "#bbbbbb", "#4477aa", "#66ccee", "#ccbb44", "#ee6677", "#aa3377", "#228833", "#000000", "#997700", "#ee99aa",
    "#004488", "#bb5566", "#ddaa33",
)  # fmt: skip
"""By position in the list of arms; fair sharing first."""
BIN_S: Final = 0.02
STAGES: Final = (
    (Stage.COLLECTIVE, "collectives (stage 2)", "#4477aa"),
    (Stage.KV_REUSE, "KV reuse (stage 1)", "#66ccee"),
    (Stage.P2D, "prefill to decode (stage 3)", "#ccbb44"),
)
OWN: Final = "#aa3377"
OTHERS: Final = "#bbbbbb"
TO_MBIT: Final = 8e-6


def _style(arms: Sequence[str]) -> dict[str, dict[str, Any]]:
    return {
        a: {
            "color": COLOURS[i % len(COLOURS)],
            "label": arm_of(a).title,
            "linewidth": 2.4 if a in {"none", registry.DEFAULT} else 1.4,
        }
        for i, a in enumerate(arms)
    }


def attainment(table: Table, arms: Sequence[str]) -> Figure:
    """Share of requests in time against load, one panel per regime."""
    keys = table.shared(arms)
    draws = table.draws(keys, 300)
    regimes = [r for r in PRESETS if any(k[0] == r for k in keys)]
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
        ax.set_title(PRESETS[regime].title, fontsize=10)
        ax.set_xlabel("offered to the busiest link")
        ax.set_ylim(0, 1)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("requests in time")
    out.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return out


@dataclass(frozen=True, slots=True)
class Panel:
    """One distribution: ``values`` of a cell; requests that have none count as above all others."""

    label: str
    values: Callable[[Result], Iterable[float]]
    log: bool = True
    deadline: float | None = None
    """Where it is, on this axis."""


PANELS: Final = {
    "ttft": Panel("TTFT, seconds", lambda r: (q.ttft for q in r.counted)),
    "objective": Panel("TTFT over its objective", lambda r: (q.ttft / q.slo for q in r.counted), deadline=1.0),
    "slowdown": Panel("TTFT over unloaded TTFT", lambda r: (q.ttft / q.unloaded for q in r.counted)),
    "collective": Panel("collective time, ms", lambda r: (took * 1000 for _, took, _ in r.collectives)),
    "late": Panel(
        "P2D ends so long after the deadline, s",
        lambda r: (q.ttft - q.slo for q in r.counted),
        log=False,
        deadline=0.0,
    ),
}


def distributions(results: Sequence[Result], panels: Sequence[str]) -> Figure:
    """Cumulative distributions per arm, over all cells given."""
    arms = list(dict.fromkeys(r.settings.arm for r in results))
    styles = _style(arms)
    out = Figure(figsize=(4.5 * len(panels), 4.2), layout="constrained")
    axes: Any = out.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, panel in zip(axes, (PANELS[name] for name in panels), strict=True):
        for arm in arms:
            values = np.array([v for r in results if r.settings.arm == arm for v in panel.values(r)])
            ends = np.sort(values[np.isfinite(values)])
            if len(ends):
                ax.step(ends, np.arange(1, len(ends) + 1) / len(values), where="post", **styles[arm])
        if panel.log:
            _logarithmic(ax)
            ax.tick_params(axis="x", labelsize=8)
        else:
            ax.set_xlim(-2, 4)
        if panel.deadline is not None:
            ax.axvline(panel.deadline, color="red", linestyle="--", linewidth=1.2)
            ax.text(panel.deadline, 0.02, " deadline", color="red", fontsize=8)
        ax.set_xlabel(panel.label)
        ax.set_ylim(0, 1.02)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("share")
    axes[0].legend(fontsize=8)
    return out


def _logarithmic(ax: Axes) -> None:
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)


def bars(results: Sequence[Result], title: str) -> Figure:
    """Attainment of arms over the cells given."""
    found: dict[str, list[npt.NDArray[np.bool_]]] = {}
    for r in results:
        found.setdefault(arm_of(r.settings.arm).title, []).append(met(r))
    out = Figure(figsize=(8, 0.4 * max(len(found), 1) + 1), layout="constrained")
    ax = out.subplots()
    values = [float(np.concatenate(each).mean()) for each in found.values()]
    drawn = ax.barh(list(found)[::-1], values[::-1], color="#4477aa")
    ax.bar_label(drawn, fmt="%.3f", padding=3, fontsize=8)
    ax.set_xlabel("requests in time")
    ax.set_title(title, fontsize=10)
    return out


def strips(values: Mapping[str, Sequence[float]], label: str) -> Figure:
    """All values of each name, a row for each; 1 is where nothing is in the way."""
    out = Figure(figsize=(8, 0.7 * len(values) + 1.1), layout="constrained")
    ax = out.subplots()
    for row, (name, found) in enumerate(values.items()):
        ax.plot(found, [-row] * len(found), "o", markersize=5, alpha=0.6, color=COLOURS[row + 1], label=name)
    ax.set_yticks([-row for row in range(len(values))], list(values))
    ax.set_ylim(-len(values) + 0.4, 0.6)
    _logarithmic(ax)
    ax.axvline(1.0, color="black", linewidth=0.8)
    ax.set_xlabel(label)
    ax.grid(axis="x", alpha=0.3)
    return out


def timeline(result: Result, played: Played, story: Story) -> Figure:
    """What the link carried, what of it was this request's, and at which level its connection stood."""
    r, conduits = story.request, result.settings.conduits()
    start, end = min(r.at, story.began) - 0.1, max(story.done, r.deadline) + 0.15
    count = int(np.ceil((end - start) / BIN_S))
    at = start + BIN_S * (np.arange(count) + 0.5)
    rows = played.arrivals
    rows = rows[np.array([c.src for c in conduits])[rows["conduit"]] == f"p{r.rank}"]
    stage = np.array([c.stage for c in conduits])[rows["conduit"]]

    def mbit(chosen: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
        return binned(rows[chosen], played.begin + start, count, BIN_S) * TO_MBIT / BIN_S

    out = Figure(figsize=(10, 7.2), layout="constrained")
    top, middle, bottom = axes = out.subplots(3, 1, sharex=True, height_ratios=[3, 2, 2])
    top.stackplot(at, [mbit(stage == s) for s, _, _ in STAGES], labels=[n for _, n, _ in STAGES],
                  colors=[c for *_, c in STAGES], step="mid", linewidth=0)  # fmt: skip
    top.axhline(result.settings.scaled.link.bits_per_s / 1e6, color="black", linewidth=0.8)
    top.set_ylabel("host egress (as received), Mbit/s")
    top.legend(loc="lower left", fontsize=8)
    here, own = rows["conduit"] == story.conduit, rows["key"] == r.id
    middle.stackplot(at, [mbit(here & own), mbit(here & ~own)], colors=[OWN, OTHERS], step="mid", linewidth=0,
                     labels=[f"request {r.id}", "others on its connection"])  # fmt: skip
    middle.set_ylabel("P2D goodput, Mbit/s")
    middle.legend(loc="upper left", fontsize=8)
    _levels(bottom, story)
    marks = (
        (r.deadline, "deadline", "red", "--"),
        (r.computed or r.at, "prefill ends", "black", ":"),
        (story.done, "first token", OWN, "-"),
    )
    for i, (x, text, colour, line) in enumerate(marks):
        for ax in axes:
            ax.axvline(x, color=colour, linestyle=line, linewidth=1.1)
        top.text(x, top.get_ylim()[1] * (0.97 - 0.09 * i), f" {text}", color=colour, va="top", fontsize=8)
    bottom.set_xlim(start, end)
    bottom.set_xlabel("seconds since the beginning of the replay")
    return out


def _levels(ax: Axes, story: Story) -> None:
    ranks = [rank_of(s.level) for s in story.steps]
    shown = sorted({*range(2, 5), *ranks})
    y = {rank: i for i, rank in enumerate(shown)}
    ax.step([*(s.at for s in story.steps), story.done], [y[r] for r in [*ranks, ranks[-1]]], where="post", color=OWN,
            linewidth=2)  # fmt: skip
    rescued = [(s.at, y[rank_of(s.level)]) for s in story.steps if s.rescued]
    if rescued:
        xs, ys = zip(*rescued, strict=True)
        ax.plot(xs, ys, "v", color="black", markersize=6, label="rescued (queue purged)")
        ax.legend(loc="lower right", fontsize=8)
    ax.set_yticks(range(len(shown)), ["scavenger" if r == SCAVENGER else f"level {r}" for r in shown])
    ax.set_ylim(len(shown) - 0.6, -0.4)
    ax.set_ylabel("level of its connection")
    ax.grid(axis="y", alpha=0.3)
