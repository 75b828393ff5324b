#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Fail when a tier of tests that should have run did not.

    check_tiers.py [--pure] REPORT...

A tier is a folder of tests/. Reads the JUnit reports of the run: every tier must have passed tests, and a skip is
accepted only for a reason listed here, because a skipped tier looks just like a green one. Prints for each tier what
passed, what was skipped, and the seconds that its tests took (of all processes together). ``--pure``: the report is
that of `make check`: tiers of nothing but privileged tests have no part in it, and tools that `make setup` installs may
be missing.
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from pathlib import Path

ALLOWED_SKIPS = (
    "this kernel has no ",  # prio, drr, ...: the stock kernels of the VM tier have them
    "needs a kernel without ",
)
ALLOWED_WITHOUT_SETUP = (
    *ALLOWED_SKIPS,
    "systemd-analyze is not installed",
    "tmux is not installed",
    "a C compiler is not installed",
)

ELSEWHERE = ("vm", "system", "kubernetes")
"""Collected in guests, in machines of their own, and with Helm's code only; their targets of make watch over them."""
PRIVILEGED = ("bpf", "e2e")  # nothing in them runs without


def main(reports: list[str], *, pure: bool) -> int:
    """Read the reports, print a table, return the exit status."""
    root = Path(__file__).resolve().parent.parent / "tests"
    tiers = sorted(p.name for p in root.iterdir() if any(p.glob("test_*.py")) and p.name not in ELSEWHERE)
    passed: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    seconds: defaultdict[str, float] = defaultdict(float)
    problems: list[str] = []
    cases = (case for report in reports for case in ET.parse(report).getroot().iter("testcase"))  # noqa: S314 - our own
    for case in cases:
        name = case.get("classname", "")
        tier = next((t for t in tiers if f".{t}." in f".{name}."), "?")
        seconds[tier] += float(case.get("time", "0"))
        skip = case.find("skipped")
        if skip is None:
            passed[tier] += case.find("failure") is None and case.find("error") is None
            continue
        skipped[tier] += 1
        reason = skip.get("message") or ""
        if not reason.startswith(ALLOWED_WITHOUT_SETUP if pure else ALLOWED_SKIPS):
            problems.append(f"{name}.{case.get('name')}: skipped: {reason}")
    expected = [t for t in tiers if not (pure and t in PRIVILEGED)]
    problems += [f"tier {t}: no test passed" for t in expected if not passed[t]]
    for tier in sorted(expected, key=lambda t: -seconds[t]):
        print(f"tier {tier:<10} {passed[tier]:>5} passed {skipped[tier]:>4} skipped {seconds[tier]:>7.1f} s")
    print(f"     {'all':<10} {passed.total():>5} passed {skipped.total():>4} skipped {sum(seconds.values()):>7.1f} s")
    for problem in problems:
        print(f"tiers: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    given = sys.argv[1:]
    sys.exit(main([arg for arg in given if arg != "--pure"], pure="--pure" in given))
