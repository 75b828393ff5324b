# SPDX-License-Identifier: Apache-2.0
"""Tables of cells, and the reports that are made of them: ``cell``, ``quick`` and ``real``; ``full``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from mfsd.lab.arms import ARMS, arm_of
from mfsd.lab.results import plots, report
from mfsd.lab.results.evaluate import Table, at_level, key_of
from mfsd.lab.results.figures import summary
from mfsd.lab.results.report import Section
from mfsd.lab.settings import MEAN_OF, REGIMES, varying
from mfsd.policy import registry

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from mfsd.lab.matrix import Part
    from mfsd.lab.results.evaluate import AtLevel, Key
    from mfsd.lab.results.report import Rows
    from mfsd.lab.results.result import Result

LEVELS: Final = ((0.475, ("two-class", "karuna")), (0.20, ("two-class",)))
"""Shares that fair sharing meets, at which the arms are compared, and arms without which a load does not count."""
OURS: Final = registry.DEFAULT
FEW: Final = ("none", "two-class", "mfs", "ladder-net", OURS)
LAB_PANELS: Final = ("slowdown", "collective", "late")


def cells_table(results: Sequence[Result]) -> Rows:
    """A row per arm and whatever else differs, over all seeds: figures that can't be added up are means over runs."""
    by = [name for name in varying([r.settings for r in results]) if name != "seed"]
    groups: dict[tuple[Any, ...], list[Result]] = {}
    for r in results:
        groups.setdefault((r.settings.arm, *(getattr(r.settings, name) for name in by)), []).append(r)
    rows = [["policy", *by, "runs", "in time", "share", "TTFT p50", "p99", "collective", "stage-1 stalls", "CPU",
             "health"]]  # fmt: skip
    for (arm, *values), group in groups.items():
        each = [summary(r) for r in group]

        def mean(name: str, each: Sequence[Mapping[str, Any]] = each) -> float:
            return float(np.mean([s[name] for s in each]))

        met, requests = (sum(s[name] for s in each) for name in ("deadlines_met", "requests"))
        rows.append(
            [
                arm_of(arm).title,
                *(f"{v:g}" if isinstance(v, float) else str(v) for v in values),
                str(len(group)),
                f"{met} of {requests}",
                f"{met / max(requests, 1):.3f}",
                f"{mean('ttft_p50_ms'):,.0f} ms",
                f"{mean('ttft_p99_ms'):,.0f} ms",
                f"{mean('collective_mean_ms'):.1f} ms",
                f"{mean('kv_reuse_stall_ms'):,.0f} ms",
                f"{np.mean([s['health']['cpu'] for s in each]):.0%}",
                "; ".join(dict.fromkeys(p for r in group for p in r.health.problems)) or "ok",
            ]
        )
    return rows


def write_cells(folder: Path, name: str, title: str, results: Sequence[Result]) -> Rows:
    """NAME.json, NAME.html and pictures of some cells; returns their table."""
    labels = varying([r.settings for r in results]) or ["seed"]
    policies: dict[str, dict[str, Any]] = {}
    for r in results:
        label = " ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in (getattr(r.settings, k) for k in labels))
        policies.setdefault(r.settings.arm, {})[label] = summary(r)
    rows = cells_table(results)
    sections = [
        report.spoilt(results),
        Section("Cells", rows=rows),
        Section("Distributions", figure=plots.distributions(results, LAB_PANELS), name="distributions"),
    ]
    data = {"regime": results[0].settings.regime, "policies": policies, "health": report.health(results)}
    report.write(folder, name, title, sections, results, data)
    return rows


def level_table(found: AtLevel) -> Rows:
    """A row per arm: attainment per regime, mean, over fair sharing and two-class, collectives."""
    regimes = list(found.by_regime)
    rows = [["policy", *(f"{r} at {found.loads[r]:g}" for r in regimes), "mean [95 %]", "/ fair", "/ two-class",
             "collective time / fair"]]  # fmt: skip
    for arm, mean in found.attainment.items():
        row = [arm_of(arm).title, *(f"{found.by_regime[r][arm].value:.3f}" for r in regimes), mean.text]
        for rival in ("none", "two-class"):
            ratio = found.over.get((arm, rival))
            row.append(f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]" if ratio else "1")
        rows.append([*row, f"{found.collective[arm]:.2f}"])
    return rows


def write_full(folder: Path, parts: Sequence[Part], results: Mapping[str, Sequence[Result]]) -> dict[str, Rows]:
    """lab.json, lab.html, lab.md and pictures from what has been run so far; returns the tables by title."""
    tables: dict[str, Rows] = {}
    sections: list[Section] = []
    data: dict[str, Any] = {}
    for part in parts:
        every = results[part.name]
        good = [r for r in every if r.health.ok]  # the others are named, not reported
        spoilt = [r.settings.name for r in every if not r.health.ok]
        figures = {r.settings.name: summary(r) for r in every}
        data[part.name] = {"cells": len(part.cells), "run": len(every), "spoilt by the machine": spoilt,
                           "figures": figures}  # fmt: skip
        if not good:
            continue
        words = f"{len(every)} of {len(part.cells)} cells run, {len(spoilt)} left out: the machine was the bottleneck."
        sections.append(Section(part.title, [("", words)]))
        found = _part_tables(part, good, data[part.name])
        tables |= found
        sections += [Section(title, rows=rows) for title, rows in found.items()]
        if part.name == "main":
            few = [r for r in good if r.settings.arm in FEW]
            curves = plots.attainment(Table(good), _complete(good))
            sections += [
                Section("Attainment against load", figure=curves, name="attainment"),
                Section(
                    "Distributions over all cells", figure=plots.distributions(few, LAB_PANELS), name="distributions"
                ),
            ]
        else:
            sections.append(Section(figure=plots.bars(good, part.title), name=part.name))
    every = [r for some in results.values() for r in some]
    if every:
        report.write(folder, "lab", "mfsd-lab", sections, every, {"parts": data})
        text = "\n\n".join(f"{t}\n\n{report.markdown(r)}" for t, r in tables.items())
        (folder / "lab.md").write_text(text + "\n", encoding="utf-8")
    return tables


def _complete(results: Sequence[Result]) -> list[str]:
    """Arms that have run wherever fair sharing has."""
    table = Table(results)
    wanted = set(table.met.get("none", {}))
    return [a for a in table.arms if set(table.met[a]) >= wanted] if wanted else table.arms


def _part_tables(part: Part, good: Sequence[Result], data: dict[str, Any]) -> dict[str, Rows]:
    if part.name != "main" or all(r.settings.arm != "none" for r in good):
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


def variant_table(results: Sequence[Result]) -> Rows:
    """A row per arm and SLO scale: attainment per regime and its mean, over the cells that all rows of a regime have.

    Unlike at_level it has no intervals: these parts say in which direction something goes.
    """
    by_scale: dict[float, list[Result]] = {}
    for result in results:
        by_scale.setdefault(result.settings.slo_scale, []).append(result)
    regimes = [r for r in REGIMES if any(x.settings.regime == r for x in results)]
    averaged = [r for r in regimes if r in MEAN_OF] or regimes
    rows = [["policy", "cells", *regimes, "mean", "TTFT p50", "collective"]]
    for scale, of_scale in sorted(by_scale.items()):
        table, found = Table(of_scale), {r.settings.name: summary(r) for r in of_scale}
        keys = {r: _common(table, r) for r in regimes}
        for arm in (a for a in ARMS if a in table.met):
            mine = {r: [k for k in keys[r] if k in table.met[arm]] for r in regimes}
            met = {r: np.concatenate([table.met[arm][k] for k in ks]).mean() for r, ks in mine.items() if ks}
            each = [
                found[r.settings.name] for r in of_scale if r.settings.arm == arm and key_of(r) in mine[key_of(r)[0]]
            ]
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
