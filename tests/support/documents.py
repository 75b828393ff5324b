# SPDX-License-Identifier: Apache-2.0
"""The documentation as text: its pages, what stands in code, tables and headings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
DOCS: Final = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
PRESENT: Final = [path for path in DOCS if path.name != "CHANGELOG.md"]
"""Those that say how things are; the change log also names what is gone."""

FENCE: Final = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SPAN: Final = re.compile(r"`([^`\n]+)`")
LINK: Final = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def spans(path: Path) -> list[str]:
    """What stands in backticks outside of blocks."""
    return SPAN.findall(FENCE.sub("", path.read_text()))


def code(path: Path) -> str:
    """Blocks, fenced or indented, and what stands in backticks."""
    text = path.read_text()
    fenced = [body for _, body in FENCE.findall(text)]
    indented = [line for line in FENCE.sub("", text).splitlines() if line.startswith("    ")]
    return "\n".join([*fenced, *indented, *spans(path)])


def table(text: str, heading: str) -> list[list[str]]:
    """Rows of the first table below a heading, without its head."""
    lines = text[text.index(f"\n{heading}\n") :].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return rows
