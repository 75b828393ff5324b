# SPDX-License-Identifier: Apache-2.0
"""Was a guest's run complete and green? A skip counts as failure where the kernel has what the test missed."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

_LACKS: Final = re.compile(r"this kernel has no (\w+)")
_LACKS_NOT: Final = re.compile(r"needs a kernel without (\w+)|this kernel has (?!no )(\w+)")


@dataclass(slots=True)
class Case:
    """One test's result. ``outcome`` is passed, failed or skipped; ``text`` says why."""

    tier: str
    file: str
    name: str
    outcome: str
    seconds: float
    text: str = ""
    feature: str = ""
    measured: dict[str, str] = field(default_factory=dict)
    """What the test recorded, e.g. latencies; by name."""


@dataclass(slots=True)
class Run:
    """A batch of tests on a kernel. ``problems`` is empty exactly when it counts as green."""

    kernel: str
    release: str
    seconds: float
    features: list[str]
    batch: str
    commit: str
    date: str
    cases: list[Case] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    doctor: list[str] = field(default_factory=list)

    def count(self, outcome: str) -> int:
        """How many tests passed, failed, were skipped."""
        return sum(c.outcome == outcome for c in self.cases)

    def save(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Run:
        """Undo save."""
        data = json.loads(path.read_text())
        return cls(**data | {"cases": [Case(**c) for c in data["cases"]]})


def read_cases(junit: Path) -> list[Case]:
    """All cases of a JUnit report."""
    out = []
    for case in ET.parse(junit).getroot().iter("testcase"):  # noqa: S314 - our own file
        parts = case.get("classname", "").split(".")
        tier = parts[1] if parts[:1] == ["tests"] and len(parts) > 1 else "?"
        broken = [e for tag in ("failure", "error") for e in case.findall(tag)]
        skip = case.find("skipped")
        outcome = "failed" if broken else "skipped" if skip is not None else "passed"
        text = (broken[0].get("message") if broken else skip.get("message") if skip is not None else "") or ""
        measured = {p.get("name", ""): p.get("value", "") for p in case.iter("property")}
        feature = measured.pop("feature", "")
        name, file = case.get("name", ""), parts[-1] if parts else "?"
        seconds = float(case.get("time", "0"))
        out.append(Case(tier, file, name, outcome, seconds, text[:500], feature, measured))
    return out


def judge(cases: list[Case], has: set[str]) -> list[str]:
    """Everything that is wrong with these results on a kernel that has these features."""
    problems = []
    for c in cases:
        where = f"{c.tier}/{c.file}::{c.name}"
        if c.outcome == "failed":
            problems.append(f"{where}: {c.text.splitlines()[0] if c.text else 'failed'}")
        elif c.outcome == "skipped":
            lacks, without = _LACKS.search(c.text), _LACKS_NOT.search(c.text)
            if lacks and lacks[1] not in has:
                continue
            if without and (without[1] or without[2]) in has:
                continue
            problems.append(f"{where}: skipped: {c.text}")
    return problems if any(c.outcome == "passed" for c in cases) else [*problems, "no test passed"]
