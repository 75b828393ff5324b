# SPDX-License-Identifier: Apache-2.0
"""What is logged about a failure: a traceback as Python prints it, in whole lines, without anybody's variables."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Final

import pytest

FAILS: Final = """
import sys
import structlog
from mfsd import logs
logs.configure(sys.argv[1], "info")
def fall(private="SECRET" + "-OF-A-SESSION"):
    raise ValueError("long-word-" * 20 + "end")
try:
    fall()
except ValueError:
    structlog.get_logger("x").exception("failed", device="eth0-" * 20)
"""


@pytest.mark.parametrize("style", ["console", "json"])
def test_a_failure(style: str) -> None:
    done = subprocess.run([sys.executable, "-c", FAILS, style], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert "SECRET-OF-A-SESSION" not in done.stderr
    first, *lines = done.stderr.splitlines()
    if style == "json":
        event = json.loads(first)
        assert (event["event"], event["level"], event["device"], lines) == ("failed", "error", "eth0-" * 20, [])
        lines = event["exception"].splitlines()
    assert "eth0-" * 20 in first
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == f"ValueError: {'long-word-' * 20}end"
