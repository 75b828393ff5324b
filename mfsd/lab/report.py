# SPDX-License-Identifier: Apache-2.0
"""What the demo found, as data, as a table and as a page. Everything here is computed from what was measured."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mfsd.lab.promotion import Trial
    from mfsd.lab.story import Story

Rows = list[tuple[str, str, str]]

_PAGE: Final = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>mfsd demo</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; margin: 1rem 0; }}
td, th {{ border-bottom: 1px solid #ddd; padding: .3rem .9rem .3rem 0; text-align: left; vertical-align: top; }}
td.n, th.n {{ text-align: right; font-variant-numeric: tabular-nums; }}
.bad {{ background: #fdd; padding: .6rem 1rem; }}
.good {{ background: #e7f4e4; padding: .6rem 1rem; }}
svg {{ max-width: 100%; height: auto; }}
pre {{ white-space: pre-wrap; font-size: 12px; }}
</style>
</head>
<body>
<h1>mfsd demo: the same requests with and without it</h1>
<p>{intro}</p>
{verdict}
{table}
<h2>One prefill-to-decode transfer</h2>
<p>{story}</p>
{timeline}
<h2>Time to first token</h2>
{cdf}
<h2>Settings</h2>
{settings}
</body>
</html>
"""


def promotion_summary(trials: Sequence[Trial], watch: float) -> dict[str, Any]:
    """Latency of a series of promotions; a median that was not seen is given as the time watched (and ``censored``)."""
    values = [watch * 1000 if t.latency_ms is None else t.latency_ms for t in trials]
    censored = sum(t.latency_ms is None for t in trials)
    median = float(np.percentile(values, 50, method="inverted_cdf"))
    return {
        "promotion_p50_ms": median,
        "promotion_trials": len(trials),
        "promotion_censored": censored,
        "promotion_watch_ms": watch * 1000,
    }


def rows(off: dict[str, Any], on: dict[str, Any]) -> Rows:
    """Name, without, with."""

    def both(name: str, key: str, pattern: str = "{:,.0f} ms") -> tuple[str, str, str]:
        return name, pattern.format(off[key]), pattern.format(on[key])

    out: Rows = [
        ("deadlines met", _met(off), _met(on)),
        both("TTFT, median", "ttft_p50_ms"),
        both("TTFT, 99th percentile", "ttft_p99_ms"),
        both("TTFT over unloaded TTFT, median", "ttft_over_unloaded_p50", "{:.2f}"),
        both("collective time, mean", "collective_mean_ms", "{:.2f} ms"),
        both("  on an idle wire", "collective_wire_ms", "{:.2f} ms"),
        both("wait for the forward pass, mean", "waiting_mean_ms"),
        both("forward pass, mean", "prefill_mean_ms"),
        both("P2D after the forward pass, mean", "p2d_after_prefill_mean_ms"),
    ]
    if "promotion_p50_ms" in off and "promotion_p50_ms" in on:
        out.append(("promotion latency, median (see below)", _latency(off), _latency(on)))
    return out


def _met(arm: dict[str, Any]) -> str:
    return f"{arm['deadlines_met']} of {arm['requests']}"


def _latency(arm: dict[str, Any]) -> str:
    seen = arm["promotion_p50_ms"] < arm["promotion_watch_ms"]
    return f"{arm['promotion_p50_ms']:.0f} ms" if seen else f"not within {arm['promotion_watch_ms']:.0f} ms"


def console_table(found: Rows) -> Table:
    """For a terminal."""
    table = Table("", "fair TCP", "mfsd", title="mfsd demo")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in found:
        table.add_row(*row)
    return table


def verdict(off: dict[str, Any], on: dict[str, Any]) -> str:
    """One sentence on the outcome, good or bad."""
    before, after, n = off["deadlines_met"], on["deadlines_met"], on["requests"]
    if after > before:
        return f"With mfsd {after} of {n} requests met their deadline, without it {before}."
    if after == before:
        return f"mfsd made no difference to the deadlines here: {after} of {n} met with it and without it."
    return f"mfsd did worse here: {after} of {n} deadlines met with it, {before} without it."


def health_lines(off: dict[str, Any], on: dict[str, Any]) -> list[str]:
    """Why the figures may describe the machine instead of the network; empty when they don't."""
    return [
        f"{name}: {problem}" for name, arm in (("fair TCP", off), ("mfsd", on)) for problem in arm["health"]["problems"]
    ]


def describe(story: Story | None) -> str:
    """What the timeline shows, in words and figures."""
    if story is None:
        return "No prefill-to-decode transfer was seen in this run."
    t = story.timing
    text = (
        f"Request {t.id} (rank {t.rank}, connection {story.lane}) was due {t.deadline - t.arrival:.2f} s after its "
        f"arrival; its forward pass took from {t.began - t.arrival:.2f} s to {t.computed - t.arrival:.2f} s. "
    )
    if story.promoted is None:
        return text + "Its connection was never promoted after having been deferred: no better example occurred."
    text += (
        f"Its connection spent {story.deferred:.2f} s at its lowest level, in which {story.early:.0%} of the bytes "
        f"came through, and was promoted {t.deadline - story.promoted:.3f} s before the deadline. "
    )
    if any(s.rescued for s in story.steps):
        text += "Its starved queue was purged on the way (rescue). "
    late = t.done - t.deadline
    return text + (f"It was done {-late:.3f} s early." if late <= 0 else f"It was {late:.3f} s late.")


def page(report: dict[str, Any], found: Rows, story: Story | None, timeline: str, cdf: str) -> str:
    """The self-contained page: no script, nothing loaded from anywhere."""
    off, on, settings = report["off"], report["on"], report["settings"]
    problems = health_lines(off, on)
    good = on["deadlines_met"] > off["deadlines_met"]
    parts = [f'<p class="{"good" if good else "bad"}">{html.escape(verdict(off, on))}</p>']
    if problems:
        said = html.escape("; ".join(problems))
        parts.append(f'<p class="bad">These figures may describe the machine rather than the network: {said}.</p>')
    cells = "".join(
        f'<tr><td>{html.escape(name)}</td><td class="n">{html.escape(a)}</td><td class="n">{html.escape(b)}</td></tr>'
        for name, a, b in found
    )
    table = f'<table><tr><th></th><th class="n">fair TCP</th><th class="n">mfsd</th></tr>{cells}</table>'
    listed = {**settings, "machine": report["machine"], "commit": report["commit"]}
    lines = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(str(v))}</td></tr>" for k, v in listed.items())
    return _PAGE.format(
        intro=html.escape(
            "A prefill instance of two ranks and a decode host, as network namespaces with real TCP over links of "
            f"{settings['link']}. Requests come from the Mooncake trace; GPUs are sleeps. Both runs get the same "
            "requests at the same times. Fair TCP: one htb class and a FIFO per host. mfsd: its daemon on both ranks, "
            "default policy, hints over gRPC."
        ),
        verdict="".join(parts),
        table=table,
        story=html.escape(describe(story)),
        timeline=timeline,
        cdf=cdf,
        settings=f"<table>{lines}</table>",
    )
