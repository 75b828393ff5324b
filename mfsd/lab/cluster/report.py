# SPDX-License-Identifier: Apache-2.0
"""Results as JSON, as tables and as one self-contained page."""

from __future__ import annotations

import base64
import html
import io
import json
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from rich.table import Table as RichTable

from mfsd.lab.cluster import plots
from mfsd.lab.cluster.arms import ARMS
from mfsd.lab.cluster.cell import PATIENCE_S, WARM_UP_S
from mfsd.lab.cluster.evaluate import Table, at_level, key_of, summary
from mfsd.lab.cluster.jobs import MAX_TOKENS, MIN_TOKENS
from mfsd.lab.cluster.regimes import MEAN_OF, REGIMES
from mfsd.lab.hosts.machine import machine
from mfsd.lab.hosts.tcp import CONGESTION
from mfsd.lab.rank import KV_LANES, P2D_LANES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from matplotlib.figure import Figure

    from mfsd.lab.cluster.evaluate import AtLevel, Key
    from mfsd.lab.cluster.matrix import Part

LEVELS: Final = ((0.475, ("two-class", "karuna")), (0.20, ("two-class",)))
"""Shares that fair sharing meets, at which the arms are compared, and arms without which a load does not count."""
RIVALS: Final = ("none", "two-class", "sjf", "edf", "edf-all", "karuna", "pias", "mfs")
OURS: Final = "ladder-net"
_STYLE: Final = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 13px; }
td, th { border-bottom: 1px solid #ddd; padding: .25rem .8rem .25rem 0; text-align: right; }
td:first-child, th:first-child { text-align: left; }
.bad { background: #fdd; padding: .6rem 1rem; }
img { max-width: 100%; }
"""

Rows = list[list[str]]


def settings(part: Part, commit: str) -> dict[str, Any]:
    """All that one needs to know to judge the figures, in words."""
    used = {c.regime for c in part.cells}
    clusters = {r: REGIMES[r].cluster for r in REGIMES if r in used}
    first = next(iter(clusters.values()))
    scaled = first.scaled
    return {
        "hosts": f"{first.prefill} prefill, {first.decode} decode, {first.stores} stores; namespaces, an mfsd each",
        "links": f"{first.rate} ({first.decode_rate} at decode hosts) for {scaled.model.link_bits / 1e9:g} Gbit/s: "
        f"bytes x {scaled.scale:g}, times as they are",
        "switch": "an output queue per port at the host's rate; three strict classes by DSCP unless said otherwise",
        "model": f"{scaled.model.name}, expert-parallel over {scaled.ranks} ranks; {scaled.rounds} groups of layers",
        "compute": f"{scaled.model.compute_s * 1e6:.1f} us per token and GPU (calibrated sleep)",
        "prompts": f"{MIN_TOKENS} to {MAX_TOKENS} tokens",
        "slo": "3x the unloaded TTFT of each request (computed) unless said otherwise",
        "connections": f"per process pair: 1 collective, {KV_LANES} KV reuse, {P2D_LANES} P2D; kept; {CONGESTION}",
        "regimes": {r: REGIMES[r].title for r in clusters},
        "not counted": f"arrivals in the first {WARM_UP_S:g} s; what takes {PATIENCE_S:g} s after the last never ends",
        "machine": machine(),
        "commit": commit,
    }


def quick_data(part: Part, results: Sequence[Mapping[str, Any]], commit: str) -> dict[str, Any]:
    """What quick.json holds: per policy and load the figures and the health."""
    figures: dict[str, dict[str, Any]] = {}
    for result in results:
        cell = result["cell"]
        figures.setdefault(cell["arm"], {})[f"{cell['work']['load']:g}"] = summary(result)
    problems = [f"{r['name']}: {p}" for r in results for p in r["health"]["problems"]]
    return {
        "regime": part.cells[0].regime,
        "policies": figures,
        "health": {"ok": not problems, "problems": problems},
        "settings": settings(part, commit),
    }


def healthy(results: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Results in which the network was the bottleneck; the others are named, not reported."""
    return [r for r in results if r["health"]["ok"]]


def cells_table(results: Sequence[Mapping[str, Any]]) -> Rows:
    """A row per cell."""
    rows = [
        ["policy", "regime", "load", "seed", "requests", "in time", "TTFT p50", "p99", "collective", "CPU", "health"]
    ]
    for result in results:
        cell, s = result["cell"], summary(result)
        rows.append(
            [
                ARMS[cell["arm"]].title,
                cell["regime"],
                f"{cell['work']['load']:g}",
                str(cell["work"]["seed"]),
                str(s["requests"]),
                f"{s['attainment']:.3f}",
                f"{s['ttft_p50_ms']:.0f} ms",
                f"{s['ttft_p99_ms']:.0f} ms",
                f"{s['collective_mean_ms']:.1f} ms",
                f"{s['health']['cpu']:.0%}",
                "ok" if s["health"]["ok"] else "; ".join(s["health"]["problems"]),
            ]
        )
    return rows


def level_table(found: AtLevel) -> Rows:
    """A row per arm: attainment per regime, mean, over fair sharing and two-class, collectives."""
    regimes = list(found.by_regime)
    rows = [
        [
            "policy",
            *(f"{r} at {found.loads[r]:g}" for r in regimes),
            "mean [95 %]",
            "/ fair",
            "/ two-class",
            "collective time / fair",
        ]
    ]
    for arm, mean in found.attainment.items():
        row = [ARMS[arm].title, *(f"{found.by_regime[r][arm].value:.3f}" for r in regimes), mean.text]
        for rival in ("none", "two-class"):
            ratio = found.over.get((arm, rival))
            row.append(f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]" if ratio else "1")
        rows.append([*row, f"{found.collective[arm]:.2f}"])
    return rows


def console(rows: Rows, title: str) -> RichTable:
    """For a terminal."""
    table = RichTable(*rows[0], title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows[1:]:
        table.add_row(*row)
    return table


def markdown(rows: Rows) -> str:
    """For docs."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _html(rows: Rows) -> str:
    def line(row: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in row) + "</tr>"

    return "<table>" + line(rows[0], "th") + "".join(line(r, "td") for r in rows[1:]) + "</table>"


class Page:
    """Collects sections; writes PNGs beside the page, and the page with the same pictures inside."""

    def __init__(self, folder: Path, name: str, title: str) -> None:
        self._folder, self._name, self._title = folder, name, title
        self._parts: list[str] = []

    def text(self, words: str, *, bad: bool = False) -> None:
        """A paragraph."""
        self._parts.append(f"<p{' class=bad' if bad else ''}>{html.escape(words)}</p>")

    def table(self, title: str, rows: Rows) -> None:
        """A section with a table."""
        self._parts.append(f"<h2>{html.escape(title)}</h2>{_html(rows)}")

    def picture(self, name: str, title: str, figure: Figure) -> None:
        """A section with a picture."""
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=110)
        (self._folder / f"{self._name}-{name}.png").write_bytes(out.getvalue())
        data = base64.b64encode(out.getvalue()).decode()
        alt = html.escape(title)
        self._parts.append(f'<h2>{alt}</h2><img alt="{alt}" src="data:image/png;base64,{data}">')

    def write(self) -> Path:
        """Write NAME.html."""
        path = self._folder / f"{self._name}.html"
        title = html.escape(self._title)
        path.write_text(
            f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
            f"</head><body><h1>{title}</h1>{''.join(self._parts)}</body></html>\n",
            encoding="utf-8",
        )
        return path


def _settings_rows(data: Mapping[str, Any]) -> Rows:
    return [["setting", ""], *([k, v if isinstance(v, str) else json.dumps(v)] for k, v in data.items())]


def write_quick(
    folder: Path, part: Part, results: Sequence[Mapping[str, Any]], commit: str
) -> tuple[dict[str, Any], Rows]:
    """quick.json, quick.html and pictures; returns what quick.json holds and the table."""
    data = quick_data(part, results, commit)
    rows = cells_table(results)
    page = Page(folder, "quick", "mfsd lab: quick look")
    for problem in data["health"]["problems"]:
        page.text(f"The machine rather than the network may have been measured. {problem}", bad=True)
    page.table("Cells", rows)
    page.picture("distributions", "Distributions", plots.distributions(results, list(data["policies"])))
    page.table("Settings", _settings_rows(data["settings"]))
    (folder / "quick.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    page.write()
    return data, rows


def write_full(
    folder: Path, parts: Sequence[Part], results: Mapping[str, Sequence[Mapping[str, Any]]], commit: str
) -> dict[str, Rows]:
    """lab.json, lab.html and pictures from what has been run so far; returns the tables by title."""
    page = Page(folder, "lab", "mfsd lab")
    tables: dict[str, Rows] = {}
    data: dict[str, Any] = {"parts": {}, "settings": settings(parts[0], commit)}
    for part in parts:
        all_of_them = results[part.name]
        good = healthy(all_of_them)
        spoilt = [r["name"] for r in all_of_them if not r["health"]["ok"]]
        data["parts"][part.name] = {
            "cells": len(part.cells),
            "run": len(all_of_them),
            "spoilt by the machine": spoilt,
            "figures": {r["name"]: summary(r) for r in all_of_them},
        }
        if not good:
            continue
        page.text(
            f"{part.title}: {len(all_of_them)} of {len(part.cells)} cells run, {len(spoilt)} left out because the "
            "machine was the bottleneck."
        )
        for title, rows in _part_tables(part, good, data["parts"][part.name]).items():
            tables[title] = rows
            page.table(title, rows)
        arms = [a for a in ARMS if any(r["cell"]["arm"] == a for r in good)]
        if part.name == "main":
            page.picture("attainment", "Attainment against load", plots.attainment(Table(good), _complete(good, arms)))
            few = [a for a in ("none", "two-class", "karuna", "mfs", OURS) if a in arms]
            page.picture("distributions", "Distributions over all cells", plots.distributions(good, few))
        else:
            page.picture(part.name, part.title, plots.bars(good, arms, part.title))
    page.table("Settings", _settings_rows(data["settings"]))
    (folder / "lab.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    page.write()
    return tables


def _complete(results: Sequence[Mapping[str, Any]], arms: Sequence[str]) -> list[str]:
    """Arms that have run wherever fair sharing has."""
    table = Table(results)
    wanted = set(table.met.get("none", {}))
    return [a for a in arms if set(table.met[a]) >= wanted] if wanted else list(arms)


def _part_tables(part: Part, good: Sequence[Mapping[str, Any]], data: dict[str, Any]) -> dict[str, Rows]:
    if part.name != "main" or all(r["cell"]["arm"] != "none" for r in good):
        return {part.title: variant_table(good)}
    table = Table(good)
    out: dict[str, Rows] = {}
    for level, references in LEVELS:
        found = at_level(table, level, references)
        if found is not None:
            out[f"Where fair sharing meets {level:.0%} (really: {found.fair:.1%})"] = level_table(found)
            data[f"fair {level:g}"] = {
                "fair": round(found.fair, 4),
                "attainment": {a: f.data() for a, f in found.attainment.items()},
                "over": {f"{a} / {b}": f.data() for (a, b), f in found.over.items() if a == OURS},
                "by_regime": {r: {a: f.data() for a, f in row.items()} for r, row in found.by_regime.items()},
                "collective_over_fair": {a: round(v, 4) for a, v in found.collective.items()},
                "loads": found.loads,
            }
    return out


def variant_table(results: Sequence[Mapping[str, Any]]) -> Rows:
    """A row per arm and SLO scale: attainment per regime and its mean, over the cells that all rows of a regime have.

    Unlike at_level it has no intervals: these parts say in which direction something goes.
    """
    by_scale: dict[float, list[Mapping[str, Any]]] = {}
    for result in results:
        by_scale.setdefault(result["cell"]["work"]["slo_scale"], []).append(result)
    regimes = [r for r in REGIMES if any(x["cell"]["regime"] == r for x in results)]
    averaged = [r for r in regimes if r in MEAN_OF] or regimes
    rows = [["policy", "cells", *regimes, "mean", "TTFT p50", "collective"]]
    for scale, of_scale in sorted(by_scale.items()):
        table, found = Table(of_scale), {r["name"]: summary(r) for r in of_scale}
        keys = {r: _common(table, r) for r in regimes}
        for arm in (a for a in ARMS if a in table.met):
            mine = {r: [k for k in keys[r] if k in table.met[arm]] for r in regimes}
            met = {r: np.concatenate([table.met[arm][k] for k in ks]).mean() for r, ks in mine.items() if ks}
            each = [found[r["name"]] for r in of_scale if r["cell"]["arm"] == arm and key_of(r) in mine[key_of(r)[0]]]
            rows.append(
                [
                    ARMS[arm].title + (f", SLO {scale:g}x" if len(by_scale) > 1 else ""),
                    str(len(each)),
                    *(f"{met[r]:.3f}" if r in met else "" for r in regimes),
                    f"{np.mean([met[r] for r in averaged]):.3f}" if set(averaged) <= set(met) else "",
                    f"{np.mean([s['ttft_p50_ms'] for s in each]):.0f} ms" if each else "",
                    f"{np.mean([s['collective_mean_ms'] for s in each]):.1f} ms" if each else "",
                ]
            )
    return rows


def _common(table: Table, regime: str) -> list[Key]:
    """What all arms that ran in a regime at all have run of it."""
    sets = [{k for k in met if k[0] == regime} for met in table.met.values()]
    return sorted(set.intersection(*(s for s in sets if s))) if any(sets) else []
