# SPDX-License-Identifier: Apache-2.0
"""Results as JSON, as tables on a terminal and as one self-contained page, of which page.html.j2 is the form."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

import jinja2

from mfsd.ground import tables
from mfsd.lab.hosts.machine import NICE, commit, machine
from mfsd.lab.hosts.tcp import CONGESTION
from mfsd.lab.settings import KV_CONDUITS, P2D_CONDUITS, told

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from matplotlib.figure import Figure

    from mfsd.lab.results.result import Result

PAGE: Final = jinja2.Environment(
    loader=jinja2.PackageLoader("mfsd.lab.results", "."), autoescape=True, undefined=jinja2.StrictUndefined
).get_template("page.html.j2")
SPOILT: Final = "The machine rather than the network may have been measured. "

Rows = list[list[str]]
"""A table; the first row is its head."""


@dataclass
class Section:
    """A part of a page."""

    title: str = ""
    words: list[tuple[Literal["", "good", "bad"], str]] = field(default_factory=list)
    """Paragraphs, and how they are to look."""
    rows: Rows = field(default_factory=list)
    figure: Figure | None = None
    name: str = ""
    """Of the picture's file."""
    picture: str = ""
    """The same as base64."""


def problems(results: Sequence[Result]) -> list[str]:
    """Why cells may describe the machine instead of the network; empty when they don't."""
    return [f"{r.settings.name}: {p}" for r in results for p in r.health.problems]


def health(results: Sequence[Result]) -> dict[str, Any]:
    """The same for JSON."""
    return {"ok": not problems(results), "problems": problems(results)}


def spoilt(results: Sequence[Result]) -> Section:
    """The same for a page."""
    return Section(words=[("bad", SPOILT + p) for p in problems(results)])


def settings(results: Sequence[Result]) -> list[tuple[str, str, str]]:
    """All that one needs to know to judge the figures: name, value, meaning."""
    cells = [r.settings for r in results]
    scaled, sysctls = cells[0].scaled, results[0].sysctls
    return [
        *told(cells),
        ("scale", f"{scaled.scale:g}", "Lab bytes per real byte; times are as they are."),
        ("compute", f"{scaled.model.compute_s * 1e6:.1f} us", f"Per token and GPU: {scaled.model.name}."),
        ("connections", f"1, {KV_CONDUITS}, {P2D_CONDUITS}", "Collective, KV reuse, P2D; per pair and instance."),
        ("congestion", CONGESTION, "Congestion control of all connections."),
        ("sysctls", ", ".join(f"{k} = {v}" for k, v in sorted(sysctls.items())), "Of every host."),
        ("nice", str(NICE), "All processes of the lab."),
        ("offered", _each(f"{max(r.offered.values()):.2f}" for r in results), "To the busiest link."),
        ("machine", ", ".join(f"{k} {v}" for k, v in machine().items()), "What all of this ran on."),
        ("commit", _each(r.commit for r in results), "Of the project."),
    ]  # fmt: skip


def _each(texts: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(texts))


def write(
    folder: Path, name: str, title: str, sections: Sequence[Section], results: Sequence[Result], data: Mapping[str, Any]
) -> None:
    """NAME.json with ``data`` and the settings of these cells, NAME.html, and its pictures beside it."""
    publish(folder, name, title, sections, settings(results), data)


def publish(
    folder: Path,
    name: str,
    title: str,
    sections: Sequence[Section],
    table: Sequence[tuple[str, str, str]],
    data: Mapping[str, Any],
) -> None:
    """The same; ``table``: name, value and meaning of each setting."""
    folder.mkdir(parents=True, exist_ok=True)
    for section in sections:
        if section.figure is not None:
            out = io.BytesIO()
            section.figure.savefig(out, format="png", dpi=110)
            (folder / f"{name}-{section.name}.png").write_bytes(out.getvalue())
            section.picture = base64.b64encode(out.getvalue()).decode()
    page = {"title": title, "sections": sections, "settings": [["setting", "value", "meaning"], *table]}
    (folder / f"{name}.html").write_text(PAGE.render(page=page) + "\n", encoding="utf-8")
    full = {**data, "settings": {k: v for k, v, _ in table}, "machine": machine(), "commit": commit()}
    (folder / f"{name}.json").write_text(json.dumps(full, indent=2) + "\n", encoding="utf-8")


def show(rows: Rows, title: str) -> None:
    """Print a table."""
    heads: list[tuple[str, Literal["left", "right"]]] = [(h, "right" if i else "left") for i, h in enumerate(rows[0])]
    tables.write(tables.Line(title, "bold"), tables.table(heads, rows[1:]))


def markdown(rows: Rows) -> str:
    """For docs."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
