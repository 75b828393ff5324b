# SPDX-License-Identifier: Apache-2.0
"""What the demo adds to two cells of its preset: one deferred transfer seen closely, and how long promotions take."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from mfsd.ground.units import Rate
from mfsd.lab import far, promotion
from mfsd.lab.results import plots, report, story
from mfsd.lab.results.figures import summary
from mfsd.lab.results.report import Section

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from mfsd.lab.results.report import Rows
    from mfsd.lab.results.result import Result
    from mfsd.lab.serving.driver import Played

RESCUE: Final = promotion.Settings(flows=8, rescue=True, trials=6, watch=0.3, rate=Rate.parse("1gbit"))
PLAIN: Final = replace(RESCUE, rescue=False, trials=3, watch=1.0)
INTRO: Final = (
    "A prefill instance of two ranks and a decode host, as network namespaces with real TCP. Requests come from the "
    "Mooncake trace; GPUs are sleeps. Both runs get the same requests at the same times. Fair TCP: one htb class and a "
    "FIFO per host. mfsd: its daemon on both ranks, hints over gRPC."
)
PROMOTION: Final = (
    f"Promotion latency: {RESCUE.flows} saturating deferred flows on a link of {RESCUE.rate}, one of them promoted. "
    f"With mfsd {RESCUE.trials} times; the column of fair TCP is plain re-classification (rescue off), {PLAIN.trials} "
    f"times, watched for {PLAIN.watch:g} s each."
)


def seconds(settings: promotion.Settings) -> float:
    """About how long a series of promotions takes."""
    return 4.0 + (settings.recover + settings.starve + max(settings.settle, settings.watch)) * (settings.trials + 1)


def promotions(trials: Sequence[promotion.Trial], watch: float) -> dict[str, Any]:
    """Latency of a series of promotions; a median that was not seen is given as the time watched (and ``censored``)."""
    values = [watch * 1000 if t.latency_ms is None else t.latency_ms for t in trials]
    return {
        "promotion_p50_ms": float(np.percentile(values, 50, method="inverted_cdf")),
        "promotion_trials": len(trials),
        "promotion_censored": sum(t.latency_ms is None for t in trials),
        "promotion_watch_ms": watch * 1000,
    }


def table(off: Mapping[str, Any], on: Mapping[str, Any]) -> Rows:
    """Name, without, with."""

    def both(name: str, key: str, pattern: str = "{:,.0f} ms") -> list[str]:
        return [name, pattern.format(off[key]), pattern.format(on[key])]

    out = [
        ["", "fair TCP", "mfsd"],
        ["deadlines met", *(f"{arm['deadlines_met']} of {arm['requests']}" for arm in (off, on))],
        both("TTFT, median", "ttft_p50_ms"),
        both("TTFT, 99th percentile", "ttft_p99_ms"),
        both("TTFT over unloaded TTFT, median", "ttft_over_unloaded_p50", "{:.2f}"),
        both("collective time, mean", "collective_mean_ms", "{:.2f} ms"),
        both("  on an idle wire", "collective_wire_ms", "{:.2f} ms"),
        both("wait for the forward pass, mean", "waiting_mean_ms"),
        both("forward pass, mean", "prefill_mean_ms"),
        both("P2D after the forward pass, mean", "p2d_after_prefill_mean_ms"),
    ]
    if "promotion_p50_ms" in off:
        out.append(["promotion latency, median", _latency(off), _latency(on)])
    return out


def _latency(arm: Mapping[str, Any]) -> str:
    seen = arm["promotion_p50_ms"] < arm["promotion_watch_ms"]
    return f"{arm['promotion_p50_ms']:.0f} ms" if seen else f"not within {arm['promotion_watch_ms']:.0f} ms"


def verdict(off: Mapping[str, Any], on: Mapping[str, Any]) -> str:
    """One sentence on the outcome, good or bad."""
    before, after, n = off["deadlines_met"], on["deadlines_met"], on["requests"]
    if after > before:
        return f"With mfsd {after} of {n} requests met their deadline, without it {before}."
    if after == before:
        return f"mfsd made no difference to the deadlines here: {after} of {n} met with it and without it."
    return f"mfsd did worse here: {after} of {n} deadlines met with it, {before} without it."


def write(
    folder: Path,
    results: tuple[Result, Result],
    played: Played,
    series: Mapping[str, Sequence[promotion.Trial]],
    beyond: Mapping[str, far.Arm],
) -> tuple[Rows, list[str]]:
    """demo.json, demo.html and pictures; returns the table, and what is to be said below it.

    ``results``: without mfsd and with it; ``played``: the latter; ``series``: "plain" and "rescue", if they were run;
    ``beyond``: what far.py gave, if it was run.
    """
    off, on = (summary(r) for r in results)
    if series:
        off |= promotions(series["plain"], PLAIN.watch)
        on |= promotions(series["rescue"], RESCUE.watch)
    best = next(iter(story.stories(results[1], played)), None)
    rows, said, told = table(off, on), verdict(off, on), story.describe(best)
    mood: Any = "good" if on["deadlines_met"] > off["deadlines_met"] else "bad"
    sections = [
        Section(words=[("", INTRO), (mood, said)], rows=rows),
        report.spoilt(results),
        Section(words=[("", PROMOTION)] if series else []),
        *([far.section(beyond)] if beyond else []),
        Section("One prefill-to-decode transfer", [("", told)], name="timeline",
                figure=None if best is None else plots.timeline(results[1], played, best)),
        Section("Time to first token", figure=plots.distributions(results, ("ttft", "objective")), name="ttft"),
    ]  # fmt: skip
    data = {"off": off, "on": on, "health": report.health(results), "story": told, "network": far.data(beyond)}
    report.write(folder, "demo", "mfsd demo: the same requests with and without it", sections, results, data)
    words = [said, f"The timeline in demo.html: {told}"]
    ran = {name: arm.median() for name, arm in beyond.items() if arm.outcome is not None}
    if ran:
        times = ", ".join(f"{median:.1f} with {name}" for name, median in ran.items())
        words.append(f"Behind a switch's FIFO port an urgent message takes so many times its time alone: {times}.")
    words += [f"{name} could not be run: {arm.problem}" for name, arm in beyond.items() if arm.problem]
    return rows, words
