# SPDX-License-Identifier: Apache-2.0
"""Pictures of a run as SVG text. Needs matplotlib (extra ``lab``)."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, Final

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from mfsd.lab.results import binned, egress, timings
from mfsd.lab.story import SCAVENGER, rank_of
from mfsd.model import Stage

if TYPE_CHECKING:
    import numpy.typing as npt
    from matplotlib.axes import Axes

    from mfsd.lab.arm import Outcome, Plan
    from mfsd.lab.story import Story

BIN_S: Final = 0.02
STAGES: Final = (
    (Stage.COLLECTIVE, "collectives (stage 2)", "#4477aa"),
    (Stage.KV_REUSE, "KV reuse (stage 1)", "#66ccee"),
    (Stage.P2D, "prefill to decode (stage 3)", "#ccbb44"),
)
OWN: Final = "#aa3377"
OFF: Final = "#bbbbbb"
ON: Final = "#228833"
TO_MBIT: Final = 8e-6


def _svg(figure: Figure) -> str:
    """The picture as an <svg> element, without the XML prologue, fit for a page."""
    out = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mfsd"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def timeline(plan: Plan, outcome: Outcome, story: Story) -> str:
    """What the link carried, what of it was this request's, and at which level its connection stood."""
    t = story.timing
    start, end = min(t.arrival, story.began) - 0.1, max(t.done, t.deadline) + 0.15
    at = start + BIN_S * (np.arange(int(np.ceil((end - start) / BIN_S))) + 0.5)
    figure = Figure(figsize=(10, 7.2), layout="constrained")
    axes: npt.NDArray[Any] = figure.subplots(3, 1, sharex=True, height_ratios=[3, 2, 2])
    rows = egress(outcome, t.rank)
    _link(axes[0], plan, rows, at, start, end)
    _own(axes[1], rows, story, at, start, end)
    _levels(axes[2], story, end)
    for ax in axes:
        ax.axvline(t.deadline, color="red", linestyle="--", linewidth=1.2)
        ax.axvline(t.computed, color="black", linestyle=":", linewidth=1)
        ax.axvline(t.done, color=OWN, linewidth=1)
        ax.set_xlim(start, end)
    top = axes[0].get_ylim()[1]
    marks = ((t.deadline, " deadline", "red"), (t.computed, " prefill ends", "black"), (t.done, " first token", OWN))
    for i, (x, text, colour) in enumerate(marks):
        axes[0].text(x, top * (0.97 - 0.09 * i), text, color=colour, va="top", fontsize=8)
    axes[2].set_xlabel("seconds since the beginning of the replay")
    return _svg(figure)


def _link(ax: Axes, plan: Plan, rows: npt.NDArray[Any], at: npt.NDArray[Any], start: float, end: float) -> None:
    stacks = [binned(rows[rows["stage"] == stage], start, end, BIN_S) * TO_MBIT / BIN_S for stage, _, _ in STAGES]
    ax.stackplot(at, stacks, labels=[n for _, n, _ in STAGES], colors=[c for *_, c in STAGES], step="mid", linewidth=0)
    ax.axhline(plan.scaled.link.bits_per_s / 1e6, color="black", linewidth=0.8)
    ax.set_ylabel("host egress (as received), Mbit/s")
    ax.legend(loc="lower left", fontsize=8)


def _own(ax: Axes, rows: npt.NDArray[Any], story: Story, at: npt.NDArray[Any], start: float, end: float) -> None:
    lane = rows[(rows["stage"] == Stage.P2D) & (rows["lane"] == story.lane)]
    own = lane["key"] == story.timing.id
    mine, others = (binned(part, start, end, BIN_S) * TO_MBIT / BIN_S for part in (lane[own], lane[~own]))
    labels = [f"request {story.timing.id}", "others on its connection"]
    ax.stackplot(at, [mine, others], labels=labels, colors=[OWN, OFF], step="mid", linewidth=0)
    ax.set_ylabel("P2D goodput, Mbit/s")
    ax.legend(loc="upper left", fontsize=8)


def _levels(ax: Axes, story: Story, end: float) -> None:
    ranks = [rank_of(s.level) for s in story.steps]
    shown = sorted({*range(2, 5), *ranks})
    y = {rank: i for i, rank in enumerate(shown)}
    ax.step([*(s.at for s in story.steps), min(story.timing.done, end)], [y[r] for r in [*ranks, ranks[-1]]],
            where="post", color=OWN, linewidth=2)  # fmt: skip
    rescued = [(s.at, y[rank_of(s.level)]) for s in story.steps if s.rescued]
    if rescued:
        xs, ys = zip(*rescued, strict=True)
        ax.plot(xs, ys, "v", color="black", markersize=6, label="rescued (queue purged)")
        ax.legend(loc="lower right", fontsize=8)
    ax.set_yticks(range(len(shown)), ["scavenger" if r == SCAVENGER else f"level {r}" for r in shown])
    ax.set_ylim(len(shown) - 0.6, -0.4)
    ax.set_ylabel("level of its connection")
    ax.grid(axis="y", alpha=0.3)


def cdf(plan: Plan, off: Outcome, on: Outcome) -> str:
    """Distribution of TTFT, and of TTFT over what it may be."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for outcome, colour, label in ((off, OFF, "fair TCP"), (on, ON, "mfsd")):
        found = timings(plan, outcome)
        for ax, values in (
            (left, [t.ttft for t in found]),
            (right, [t.ttft / (t.deadline - t.arrival) for t in found]),
        ):
            ends = np.sort([v for v in values if np.isfinite(v)])
            share = np.arange(1, len(ends) + 1) / len(values)
            ax.step(ends, share, where="post", color=colour, linewidth=2.2, label=label)
    left.set_xlabel("TTFT, seconds")
    left.set_ylabel("share of requests")
    right.set_xlabel("TTFT over its objective")
    right.axvline(1.0, color="red", linestyle="--", linewidth=1.2)
    right.text(1.02, 0.02, "deadline", color="red", fontsize=8)
    for ax, ticks in ((left, (0.1, 0.2, 0.5, 1, 2, 5, 10)), (right, (0.25, 0.5, 1, 2, 4, 8, 16))):
        ax.set_xscale("log")
        ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
        ax.set_xticks([], minor=True)
        ax.set_ylim(0, 1.02)
        ax.grid(alpha=0.3)
        ax.legend(loc="upper left", fontsize=8)
    return _svg(figure)
