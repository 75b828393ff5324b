# SPDX-License-Identifier: Apache-2.0
"""What every benchmark reports, and where.

A figure that has a target says whether it met it; nothing here fails the run, because a slow machine isn't a defect.
Compare figures of one run with each other: that is what ``baseline`` and ``ratio`` are for.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Self

from mfsd.ground import tables
from mfsd.lab.hosts.machine import commit, machine

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT: Final = Path(__file__).resolve().parent.parent
HEADS: Final = (
    ("figure", "left"), ("value", "right"), ("unit", "left"), ("baseline", "right"), ("ratio", "right"),
    ("target", "right"), ("met", "left"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Figure:
    """One number. ``baseline`` is what it is compared with (same unit, same run), ``ratio`` is value / baseline."""

    name: str
    value: float
    unit: str
    baseline: float | None = None
    ratio: float | None = None
    target: float | None = None
    met: bool | None = None

    @classmethod
    def against(
        cls, name: str, value: float, unit: str, *, target: float, want: Literal["at most", "at least"], **kwargs: Any
    ) -> Self:
        """Make a figure with a target; decides ``met``."""
        met = value <= target if want == "at most" else value >= target
        return cls(name, value, unit, target=target, met=met, **kwargs)


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Of a benchmark's command line; --help says what its module says. One without options parses it all the same."""
    name = f"python -m bench.{Path(sys.argv[0]).stem}"
    return argparse.ArgumentParser(name, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def write(name: str, figures: Sequence[Figure]) -> Path:
    """Write build/bench/NAME.json and print the figures as a table."""
    path = ROOT / "build" / "bench" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {"name": name, "commit": commit(), "machine": machine(), "figures": [asdict(f) for f in figures]}
    path.write_text(json.dumps(report, indent=2) + "\n")

    def words(f: Figure) -> list[str]:
        numbers = ["" if x is None else f"{x:,.4g}" for x in (f.baseline, f.ratio, f.target)]
        return [f.name, f"{f.value:,.4g}", f.unit, *numbers, {None: "", True: "yes", False: "NO"}[f.met]]

    console = tables.console()
    console.print(tables.table(HEADS, (words(f) for f in figures), f"bench {name}"))
    console.print(f"{path.relative_to(ROOT)}  on  {report['machine']}", markup=False)
    return path
