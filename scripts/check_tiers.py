#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Fail when a tier of tests that should have run did not.

A tier is a folder of tests/. Reads the JUnit report of the run: every tier must have passed tests, and a skip is
accepted only for a reason listed here, because a skipped tier looks just like a green one.
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

ALLOWED_SKIPS = (
    "this kernel has no ",  # prio, drr, ...: the stock kernels of the VM tier have them
    "needs a kernel without ",
)

ELSEWHERE = ("vm",)  # collected in guests only; scripts/vm/judge.py watches over them


def main(report: str) -> int:
    """Read the report, print a table, return the exit status."""
    root = Path(__file__).resolve().parent.parent / "tests"
    tiers = sorted(p.name for p in root.iterdir() if any(p.glob("test_*.py")) and p.name not in ELSEWHERE)
    passed: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    problems: list[str] = []
    for case in ET.parse(report).getroot().iter("testcase"):  # noqa: S314 - our own file
        name = case.get("classname", "")
        tier = next((t for t in tiers if f".{t}." in f".{name}."), "?")
        skip = case.find("skipped")
        if skip is None:
            passed[tier] += case.find("failure") is None and case.find("error") is None
            continue
        skipped[tier] += 1
        reason = skip.get("message") or ""
        if not reason.startswith(ALLOWED_SKIPS):
            problems.append(f"{name}.{case.get('name')}: skipped: {reason}")
    problems += [f"tier {t}: no test passed" for t in tiers if not passed[t]]
    for tier in tiers:
        print(f"tier {tier:<10} {passed[tier]:>5} passed {skipped[tier]:>4} skipped")
    for problem in problems:
        print(f"tiers: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
